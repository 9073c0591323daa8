"""What a soak does to its processes: to Redis, to the servers, to their memory, log and clock."""
import contextlib
import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from helpers import REDIS, free_port, is_sanitized  # noqa: E402

MIB = 1 << 20
children = []  # the processes of the soak, for end_children


def start(*args, **kw):
    children.append(subprocess.Popen(*args, **kw))
    return children[-1]


def end_children():
    for p in children:
        if p.poll() is None:
            p.kill()  # also one that is stopped
            p.wait()


class Redis:
    """A Redis that can be killed and started again at the same port."""

    def __init__(self, folder):
        self.port, self.folder, self.process = free_port(), folder, None
        self.start()

    def start(self):
        self.process = start(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--maxmemory", "32mb"], executable=REDIS,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                self.command("PING")
                return
            assert time.monotonic() < until and self.process.poll() is None, "no Redis"
            time.sleep(0.05)

    def command(self, *words):
        """The first line of the reply, or the string that follows it."""
        words = [w if isinstance(w, bytes) else str(w).encode() for w in words]
        with socket.create_connection(("127.0.0.1", self.port), 20) as s:
            s.sendall(b"*%d\r\n" % len(words) +
                      b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
            with s.makefile("rb") as f:
                line = f.readline().rstrip()
                if not line:
                    raise OSError("Redis closed the connection")
                return f.read(int(line[1:])) if line[:1] == b"$" and line != b"$-1" else line

    def kill(self):
        self.process.kill()  # also one that is stopped
        self.process.wait()


class Log:
    """A server's standard error. By a pipe, a thread reads it, unless it is held; in a file, it is
    read at the end. Every line must be JSON."""

    def __init__(self, path, piped):
        self.path, self.held = path, threading.Event()
        self.file = open(path, "ab", buffering=0)
        self.thread, self.write = None, self.file
        if piped:
            read, write = os.pipe()
            self.write = os.fdopen(write, "wb")
            self.thread = threading.Thread(target=self.copy, args=(os.fdopen(read, "rb", 0),),
                                           daemon=True)

    def started(self):
        """The process has its copy: the pipe must end with the process."""
        self.write.close()
        if self.thread:
            self.thread.start()

    def copy(self, pipe):
        with pipe:
            while data := pipe.read(65536):
                self.file.write(data)
                while self.held.is_set():
                    time.sleep(0.05)

    def lines(self):
        """(the lines that are JSON, the others)"""
        good, bad = [], []
        for line in open(self.path, "rb").read().splitlines():
            try:
                good.append(json.loads(line))
            except ValueError:
                bad.append(line)
        return good, bad


class Server:
    """A qemb-serve under load."""

    patience = 5  # --receive-timeout, in seconds

    def __init__(self, name, program, model, folder, args, *, key=None, piped=False, clock=None):
        self.name, self.key, self.folder = name, key, folder
        self.model = str(folder / f"{name}.qemb")
        shutil.copy(model, self.model)
        self.log, self.clock = Log(folder / f"{name}.log", piped), None
        self.sanitized = is_sanitized(program)
        self.args = [program, "-m", self.model, "--port", "0", "--threads", "1",
                     "--receive-timeout", str(self.patience), "--drain", "10", "--cache", "1",
                     "--deadline", "30", "--max-connections", "200", *args]
        if key:
            (folder / f"{name}.keys").write_text(key + "\n")
            (folder / f"{name}.keys").chmod(0o600)
            self.args += ["--api-key-file", str(folder / f"{name}.keys")]
        env = dict(os.environ)
        if clock:
            self.clock = folder / f"{name}.clock"
            self.clock.write_text("0")
            env |= {"LD_PRELOAD": clock, "SOAK_CLOCK": str(self.clock)}
        self.process = start(self.args, stderr=self.log.write, env=env,
                             preexec_fn=no_signal_at_a_full_disk)
        self.log.started()
        self.port, self.oracle, self.documented = self.wait_ready(), None, set()

    def wait_ready(self):
        until, roles = time.monotonic() + 120, self.args.count("--reranker") + 1
        while True:
            lines, _ = self.log.lines()
            port = [e["port"] for e in lines if e.get("event") == "listening"]
            if port and sum(e.get("event") == "ready" for e in lines) == roles:
                return port[0]
            assert self.process.poll() is None, f"{self.name}: {self.process.returncode}"
            assert time.monotonic() < until, f"{self.name}: not ready"
            time.sleep(0.05)


def no_signal_at_a_full_disk():
    """RLIMIT_FSIZE stands for a full disk: with the signal ignored, a write fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


# ---- the faults: each a context that is left when it is over -------------------------------------


@contextlib.contextmanager
def limit(server, what, soft):
    """A soft limit of a running process."""
    pid = server.process.pid
    old, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (old, hard))


def memory(server, rng):
    """No more than a few MiB beside what it has mapped."""
    pages = int(open(f"/proc/{server.process.pid}/statm").read().split()[0])
    return limit(server, resource.RLIMIT_AS,
                 pages * resource.getpagesize() + rng.choice([0, 1, 4]) * MIB)


def descriptors(server, rng):
    """No more descriptors than there are."""
    return limit(server, resource.RLIMIT_NOFILE,
                 len(os.listdir(f"/proc/{server.process.pid}/fd")) + rng.randint(1, 3))


def full_disk(server, rng):
    """Of the log, if it is a file."""
    size = os.path.getsize(server.log.path) + rng.randint(0, 50)
    return limit(server, resource.RLIMIT_FSIZE, size)


@contextlib.contextmanager
def held_log(server, rng):
    """Nobody reads the pipe of the log."""
    server.log.held.set()
    try:
        yield
    finally:
        server.log.held.clear()


@contextlib.contextmanager
def stopped(server, rng):
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def clock(server, rng):
    """The wall clock jumps."""
    server.clock.write_text(str(rng.choice([-86400, -3600, 3600, 86400 * 400])))
    try:
        yield
    finally:
        server.clock.write_text("0")


@contextlib.contextmanager
def flood(server, rng):
    """More connections than the server takes. Half say nothing, the others part of a header."""
    held = []
    try:
        for i in range(300):
            s = socket.socket()
            held.append(s)
            s.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                s.connect(("127.0.0.1", server.port))
        time.sleep(0.2)
        for s in held[::2]:
            with contextlib.suppress(OSError):
                s.send(b"GET /hea")
        yield
    finally:
        for s in held:
            s.close()


@contextlib.contextmanager
def reload(server, rng):
    """The same model in a new file, loaded while the old one answers: by the signal, or where there
    is a key by a request."""
    new = f"{server.model}.new"
    shutil.copy(server.model, new)
    os.replace(new, server.model)
    if server.key and rng.random() < 0.5:
        c = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        c.request("POST", "/admin/reload", headers={"Authorization": f"Bearer {server.key}"})
        status = c.getresponse().status
        c.close()
        if status not in (200, 202):
            raise ValueError(f"POST /admin/reload: {status}")
    else:
        server.process.send_signal(signal.SIGHUP)
    yield


@contextlib.contextmanager
def signals(server, rng):
    """Those that a server ignores."""
    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        server.process.send_signal(signum)
    yield


@contextlib.contextmanager
def redis_killed(redis, rng):
    redis.kill()
    try:
        yield
    finally:
        redis.start()


def redis_stopped(redis, rng):
    return stopped(redis, rng)


@contextlib.contextmanager
def redis_full(redis, rng):
    """It refuses writes: OOM."""
    redis.command("CONFIG", "SET", "maxmemory", "1mb")
    try:
        yield
    finally:
        redis.command("CONFIG", "SET", "maxmemory", "32mb")
        redis.command("FLUSHALL")


@contextlib.contextmanager
def redis_read_only(redis, rng):
    """A replica whose master is away."""
    redis.command("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        redis.command("REPLICAOF", "NO", "ONE")


# Of so many entries, those that are vectors get the number ARGV[2] in each place, ARGV[3] behind.
DAMAGE = """for i = 1, ARGV[1] do
  local key = redis.call('RANDOMKEY')
  local n = key and redis.pcall('STRLEN', key)
  if type(n) == 'number' and n >= 64 then
    redis.call('SET', key, string.rep(ARGV[2], math.floor(n / 4)) .. ARGV[3])
  end
end"""


@contextlib.contextmanager
def redis_damaged(redis, rng):
    """Vectors with NaN or infinity, of another norm, of another length, one of 20 MB. A logit is
    left alone: no check can tell one from another."""
    for number in (float("nan"), float("inf"), 1e30, 0.0, 3.0):
        end = rng.choice([b"", b"", b"\0", bytes(4)])
        redis.command("EVAL", DAMAGE, 0, 500, struct.pack("<f", number), end)
    key = redis.command("RANDOMKEY")
    if key != b"$-1":
        redis.command("SET", key, bytes(20 * MIB))
    yield


REPLIES = {  # of a Redis that is none; the first byte of "drips" comes again and again
    "silence": b"", "drips": b"$", "an endless list": b"*2000000000\r\n",
    "an endless string": b"$2147483647\r\n", "noise": bytes(range(256)) * 64,
    "errors": b"-ERR x\r\n",
}


@contextlib.contextmanager
def redis_impostor(redis, rng):
    """Another program answers at its port."""
    redis.kill()
    reply, over, held = REPLIES[rng.choice(list(REPLIES))], threading.Event(), []
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", redis.port))
    listener.listen()
    listener.settimeout(0.05)

    def answer():
        while not over.is_set():
            with contextlib.suppress(OSError):
                held.append(listener.accept()[0])
                held[-1].setblocking(False)
            for s in held:
                with contextlib.suppress(OSError):
                    s.recv(1 << 20)
                    s.send(reply)
                if reply == b"$":
                    with contextlib.suppress(OSError):
                        s.send(b"1")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for s in [*held, listener]:
            s.close()
        redis.start()


def faults_of(server, redis, manual):
    """[(name, context)] that this server can be exposed to."""
    # A sanitizer ends the process that it cannot give memory.
    of_server = [] if server.sanitized else [memory]
    of_server += [descriptors, stopped, flood, held_log if server.log.thread else full_disk]
    of_server += [clock] if server.clock else []
    of_server += [reload] if "SIGHUP" in manual else []
    of_server += [signals] if "SIGUSR1" in manual else []
    of_redis = [redis_killed, redis_stopped, redis_full, redis_read_only, redis_damaged,
                redis_impostor]
    return [(f.__name__, f, server) for f in of_server] + \
        ([(f.__name__, f, redis) for f in of_redis] if redis else [])


def inject(server, redis, manual, account, stop, seconds, seed):
    """One fault after the other, each for some seconds, with a pause between two."""
    rng, todo = random.Random(seed), []
    while not stop.wait(seconds / 2):
        todo = todo or rng.sample(faults_of(server, redis, manual), k=len(
            faults_of(server, redis, manual)))
        name, fault, of = todo.pop()
        window = account.opens(name, server.name)
        try:
            with fault(of, rng):
                stop.wait(rng.uniform(0.5, 1) * (min(seconds, 4) if name == "stopped" else seconds))
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as e:
            if server.process.poll() is not None:
                return  # the main thread says so
            account.lose(server.name, "the soak itself", f"{name}: {e!r}")
        finally:
            account.closes(window)
