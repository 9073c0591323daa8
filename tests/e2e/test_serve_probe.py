"""`qemb-serve --probe`, the health check of containers: with the server itself and with hand-made
answers."""
import contextlib
import socket
import subprocess
import threading

import pytest
from serve_client import GUARD, SERVE, server


def probe(port, *args):
    p = subprocess.run([SERVE, "--probe", "--port", str(port), *args], timeout=GUARD,
                       capture_output=True, text=True, check=False)
    assert p.stdout == ""
    return p.returncode, p.stderr


@contextlib.contextmanager
def answering(data):
    """A port on which each connection gets these bytes. None: no answer, the connection stays."""
    listener, kept = socket.create_server(("127.0.0.1", 0)), []

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if data is None:
                    kept.append(connection)
                    continue
                with connection:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1000)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        for connection in kept:
            connection.close()


def test_a_healthy_server():
    with server() as s:
        assert probe(s.port) == (0, "")
        assert probe(s.port, "--host", "localhost")[0] == 0
        assert probe(s.port, "--host", "0.0.0.0") == (0, "")  # as a container listens


@pytest.mark.parametrize("data,said", [
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", "not healthy (got 503, want 200)"),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", "not healthy (got 404, want 200)"),
    (b"HTTP/1.1 200", None),
    (b"HTTP/1.1 2", "not healthy (got 2, want 200)"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer (Protocol error)"),
    (b"", "no answer (Protocol error)"),
    (None, "no answer (Resource temporarily unavailable)"),
])
def test_answers(data, said):
    with answering(data) as port:
        status, message = probe(port)
        assert status == (1 if said else 0)
        assert message == (f"qemb-serve: 127.0.0.1 port {port}: {said}\n" if said else "")


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        port = unused.getsockname()[1]
        status, message = probe(port)
    assert status == 1
    assert message == f"qemb-serve: 127.0.0.1 port {port}: no answer (Connection refused)\n"
    status, message = probe(port, "--host", "no.such.host.invalid")
    assert status == 1 and message.startswith("qemb-serve: --host: no.such.host.invalid: ")
