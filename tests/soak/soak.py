#!/usr/bin/env python3
"""Runs qemb-serve and qemb under good and hostile traffic while faults are injected, and accounts
for every request: `make soak SOAK_S=seconds`.

Two servers: one with a small model, a reranker, API keys and a Redis, whose log is a pipe; one with
the demo model and without Redis, whose log is a file. A good request must get the bits that ./qemb
gave before the run, or a refusal that the manual names, with Retry-After; anything else is lost.
Status 1, and a list, if something was lost, leaked or hung. --out has soak.json, soak.svg and the
logs; with --publish the figures go into docs/reliability.md, docs/soak.svg and
bench/results/soak.json."""
import argparse
import atexit
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from account import Account, Samples
from faults import Redis, Server, end_children, inject, is_sanitized
from pipe_client import pipe_client
from report import plot, publish, table
from traffic import (GUARD, Client, Oracle, Reader, last_request, make_texts, one, run_good,
                     start_clients)

ROOT = Path(__file__).resolve().parents[2]
QEMB = os.path.abspath(os.environ.get("QEMB_BIN", ROOT / "qemb"))
SERVE = os.path.abspath(os.environ.get("QEMB_SERVE_BIN", ROOT / "qemb-serve"))
RERANKER = str(ROOT / "tests" / "fixtures" / "reranker.qemb")
MANUAL = (ROOT / "docs" / "man" / "qemb-serve.1").read_text()
# KiB over the run. An allocator may keep so much; 300,000 requests that leak 64 bytes each do more.
MOST_GROWTH = 16 << 10


def documented_codes():
    """The codes of statuses 429 and 503 in the manual. A server that is ready never says "loading",
    one that runs never "shutting_down"."""
    rows = re.findall(r"(?ms)^(?:429|503)\b.*?(?=^[0-9A-Z.])", MANUAL)
    return set(re.findall(r"[a-z]+(?:_[a-z]+)+", " ".join(rows))) - {"shutting_down"}


def build_clock(folder):
    """The library that moves a server's clock; None without a compiler, or if the server is built
    with a sanitizer, which must be loaded first."""
    if is_sanitized(SERVE) or not shutil.which("gcc"):
        return None
    target = str(folder / "clock.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, ROOT / "tests/soak/clock.c", "-ldl"],
                   check=True)
    return target


def start_servers(folder, seed):
    words = (ROOT / "examples" / "packages.txt").read_text().split()
    models = {"redis": ROOT / "tests" / "fixtures" / "small.qemb",
              "alone": ROOT / "examples" / "demo.qemb"}
    # More than --cache holds, so that Redis is asked, and vectors are computed again.
    texts = {"redis": make_texts(words, 5000, seed), "alone": make_texts(words, 1500, seed)}
    pairs = [(f"query {i}", texts["alone"][10 * i + 20:10 * i + 21 + i % 9]) for i in range(40)]
    oracles = {"redis": Oracle(QEMB, str(models["redis"]), texts["redis"], RERANKER, pairs),
               "alone": Oracle(QEMB, str(models["alone"]), texts["alone"])}
    redis = Redis(folder)
    servers = [
        Server("redis", SERVE, models["redis"], folder,
               ["--redis", f"127.0.0.1:{redis.port}", "--redis-timeout", "250", "--reranker",
                RERANKER],
               key="soak-key", piped=True),
        Server("alone", SERVE, models["alone"], folder, [], clock=build_clock(folder))]
    for s in servers:
        s.oracle, s.documented = oracles[s.name], documented_codes()
    return servers, redis


def watch(servers, samples, account, seconds, stop):
    """Samples once a second until the time is over. False: a server has ended."""
    until = time.monotonic() + seconds
    told = time.monotonic()
    while time.monotonic() < until:
        time.sleep(1)
        for server, own in zip(servers, samples):
            own.take()
            if server.process.poll() is not None:
                account.lose(server.name, "server", f"it ended: {server.process.returncode}")
                stop.set()
                return False
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            done = {s.name: account.total(s.name) for s in servers}
            print(f"{account.now():6.0f} s  requests {done}  lost {account.n_losses}", flush=True)
    return True


def join(threads, account, limit):
    until = time.monotonic() + limit
    for t in threads:
        t.join(max(0, until - time.monotonic()))
        if t.is_alive():
            account.lose(t.name.split()[0], "client", f"{t.name}: still waits after {limit} s")


def warm_up(server, account):
    """Every thread of the server has been at work, and has what it opens at first use."""
    def some(i):
        c = Client(server, account, f"first {i}")
        for _ in range(20):
            run_good(c, one)
        c.keep(None)

    threads = [threading.Thread(target=some, args=(i,), daemon=True, name=f"{server.name} first")
               for i in range(8)]
    for t in threads:
        t.start()
    join(threads, account, GUARD)
    time.sleep(1)


def settle(server, samples, base, account):
    """Descriptors and threads come back to what they were before the traffic."""
    until = time.monotonic() + 2 * server.patience + 20
    while True:
        c = Client(server, account, "settle")
        run_good(c, one)
        c.keep(None)
        row = samples.take()
        if row and row[2] <= base[2] and row[4] <= base[4]:
            return row
        if not row or time.monotonic() > until:
            account.lose(server.name, "leak", "descriptors and threads: "
                         f"{row and (row[2], row[4])} at the end, {base[2], base[4]} at the start")
            return row
        time.sleep(0.5)


def end(server, account):
    """SIGTERM with requests under way: each gets its answer, and the status is 0."""
    server.documented = server.documented | {"shutting_down"}
    threads = []
    for i in range(6):
        c = Client(server, account, f"end {i}")
        threads.append(threading.Thread(target=run_good, args=(c, last_request), daemon=True,
                                        name=f"{server.name} end"))
        threads[-1].start()
    time.sleep(0.2)  # they are accepted; to compute them takes longer
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    join(threads, account, GUARD)
    try:
        status = server.process.wait(GUARD)
    except subprocess.TimeoutExpired:
        account.lose(server.name, "end", f"still there {GUARD} s after SIGTERM")
        server.process.kill()
        status = server.process.wait()
    if status:
        account.lose(server.name, "end", f"status {status}")
    return time.monotonic() - start


def metrics(server, account):
    with Client(server, account, "metrics").connect() as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
        return Reader(s).answer()[2].decode()


def check_log(server, account):
    good, bad = server.log.lines()
    full = sum(w[0] == "full_disk" and w[1] == server.name for w in account.windows)
    if len(bad) > full:  # a disk that fills up cuts one line
        account.lose(server.name, "log", f"{len(bad)} lines are not JSON: {bad[:3]}")
    return len(good)


def machine():
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True).stdout.strip()
    return {"cpu": cpu[1] if cpu else platform.machine(), "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(), "commit": commit, "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def run(o, folder):
    servers, redis = start_servers(folder, o.seed)
    account, stop = Account(), threading.Event()
    samples = [Samples(account, s.process) for s in servers]
    pause = max(1.5, min(8, o.seconds / 40))
    for s in servers:
        warm_up(s, account)
    bases = [own.take() for own in samples]
    clients = [t for s in servers for t in start_clients(s, account, stop, o.seed)]
    clients += [threading.Thread(
        target=pipe_client, args=(QEMB, servers[0].oracle, account, stop, folder, o.seed),
        name="pipe 0", daemon=True)]
    clients[-1].start()
    breakers = [threading.Thread(
        target=inject, daemon=True, name=f"{s.name} faults",
        args=(s, redis if s.name == "redis" else None, MANUAL, account, stop, pause, o.seed))
        for s in servers] if o.faults else []
    for t in breakers:
        t.start()
    alive = watch(servers, samples, account, o.seconds, stop)
    traffic = account.now()
    stop.set()
    join([*breakers, *clients], account, 2 * GUARD)
    ends = [settle(s, own, base, account) if alive else None
            for s, own, base in zip(servers, samples, bases)]
    for s, own in zip(servers, samples):
        s.growth = own.growth(traffic)
        if s.growth and s.growth * traffic / 3600 > MOST_GROWTH:
            account.lose(s.name, "leak", f"memory grows by {s.growth:.0f} KiB an hour")
        with contextlib.suppress(OSError):
            redis.command("FLUSHALL")
        s.metrics = metrics(s, account) if alive else ""
        s.seconds_to_end = end(s, account) if alive else None
        s.log_lines = check_log(s, account)
    return account, servers, samples, bases, ends, traffic


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--seconds", type=int, default=600)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path, default=ROOT / "build" / "soak")
    p.add_argument("--no-faults", dest="faults", action="store_false")
    p.add_argument("--publish", action="store_true", help="into docs/ and bench/results/")
    o = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    atexit.register(end_children)
    o.out.mkdir(parents=True, exist_ok=True)
    for old in o.out.iterdir():
        old.unlink()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    account, servers, samples, bases, ends, traffic = run(o, o.out)
    text = table(account, servers, samples, bases, ends, traffic)
    kinds = {f"{s} {k}": dict(c) for (s, k), c in sorted(account.outcomes.items())}
    result = {"machine": machine(), "seconds": round(traffic), "seed": o.seed,
              "lost": account.n_losses, "losses": account.losses, "kinds": kinds, "table": text,
              "faults": [[w[0], w[1], round(w[2], 1), w[3] and round(w[3], 1)]
                         for w in account.windows],
              "metrics": {s.name: dict(re.findall(r"(?m)^(qemb_\w+) ([0-9.e+]+)$", s.metrics))
                          for s in servers},
              "samples": {s.name: [[round(v, 1) for v in r] for r in own.rows[::10]]
                          for s, own in zip(servers, samples)}}
    rows = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    (o.out / "soak.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    plot(o.out, account, servers, samples, traffic)
    print(text)
    for loss in account.losses:
        print("LOST", json.dumps(loss))
    print(f"{account.n_losses} lost; {o.out}/soak.json has all")
    if o.publish:
        publish(ROOT, o.out, result)
    return 1 if account.n_losses else 0


if __name__ == "__main__":
    sys.exit(main())
