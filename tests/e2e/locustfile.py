"""locust -f tests/e2e/locustfile.py --host http://127.0.0.1:8080 --headless -u 50 -r 50 -t 10s

One task: it posts one Chinese sentence. MODEL names the model (default demo)."""

import os

from locust import HttpUser, constant, task


class Client(HttpUser):
    wait_time = constant(0)

    @task
    def embed(self):
        body = {"model": os.environ.get("MODEL", "demo"), "input": "今天天气很好，我们去公园散步吧。"}
        with self.client.post("/v1/embeddings", json=body, catch_response=True) as r:
            if r.status_code != 200 or len(r.json()["data"]) != 1:
                r.failure(f"status {r.status_code}")
