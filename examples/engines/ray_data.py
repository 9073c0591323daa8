#!/usr/bin/env python3
"""A column of texts to vectors by Ray Data: ray_data.py MODEL IN.parquet OUT.parquet ACTORS

IN has the columns id and text, OUT has id, embedding and error; one of the last two is null. An
actor keeps one `qemb` from PATH. When it dies the actor ends, and a new one gets the batch again.
(An exception would end the job, or with max_errored_blocks lose rows.) Reading and writing need
CPUs beside ACTORS, else Ray waits for ever."""
import json
import os
import sys
from subprocess import PIPE, Popen
from threading import Thread

import pyarrow
import ray

MODEL, SOURCE, TARGET, ACTORS = sys.argv[1:]
QEMB = ["qemb", "-m", MODEL, "--threads=1", "--input=jsonl", "--output=jsonl", "--errors-ok"]
ROW = pyarrow.schema({"id": pyarrow.int64(), "embedding": pyarrow.list_(pyarrow.float32()),
                      "error": pyarrow.struct({"code": pyarrow.string(),
                                               "message": pyarrow.string()})})


class Embed:
    def __init__(self):
        self.qemb = Popen(QEMB, stdin=PIPE, stdout=PIPE, encoding="utf-8")

    def __call__(self, batch):
        records = "".join(json.dumps(record) + "\n" for record in batch.to_pylist())
        Thread(target=lambda: print(records, end="", file=self.qemb.stdin, flush=True)).start()
        answers = [self.qemb.stdout.readline() for _ in range(len(batch))]
        if not all(answer.endswith("\n") for answer in answers):
            os._exit(1)
        return pyarrow.Table.from_pylist([json.loads(answer) for answer in answers], ROW)


ray.data.read_parquet(SOURCE, columns=["id", "text"]) \
    .repartition(target_num_rows_per_block=4096) \
    .map_batches(Embed, batch_size=1024, batch_format="pyarrow", concurrency=int(ACTORS),
                 max_restarts=4, max_task_retries=4).write_parquet(TARGET)
