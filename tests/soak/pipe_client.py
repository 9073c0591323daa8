"""The pipe of a soak: ./qemb with long input in which lines are bad, stopped now and then, and with
a disk that fills up."""
import json
import random
import signal
import subprocess
import threading
import time

from account import Loss

BAD = [b"not JSON\n", b'{"text": 3}\n', b'{"text": "\xff"}\n', b"{}\n",
       b'{"text": "' + b"word " * 20000 + b'"}\n']
ROOM = 100_000  # bytes until the disk is full


def make_input(oracle, rng, n):
    """(bytes, what is to come: a text's vector, or None for an error)"""
    lines, want = [], []
    for _ in range(n):
        if rng.random() < 0.05:
            lines.append(rng.choice(BAD))
            want.append(None)
        else:
            text = rng.choice(oracle.texts)
            lines.append(json.dumps({"text": text}).encode() + b"\n")
            want.append(oracle.full[text])
    return b"".join(lines), want


def check(lines, want):
    """Each line is the vector of its record, or an error that names its line."""
    for i, (line, vector) in enumerate(zip(lines, want), 1):
        if vector is None:
            error = json.loads(line)
            if error["line"] != i or not error["error"]["code"]:
                raise Loss(f"an error of line {i}", line)
        elif line.decode() != vector:
            raise Loss(f"the vector of line {i}", line[:200])


def stopped_and_continued(qemb, oracle, rng, folder):
    data, want = make_input(oracle, rng, 1500)
    p = subprocess.Popen([qemb, "-m", oracle.model, "--input", "jsonl", "--output", "base64",
                          "--threads", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)

    def disturb():
        for _ in range(3):
            time.sleep(rng.uniform(0.05, 0.5))
            p.send_signal(signal.SIGSTOP)  # an error only if it has ended: then nothing
            time.sleep(rng.uniform(0.05, 0.5))
            p.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        out, err = p.communicate(data, timeout=300)
    except subprocess.TimeoutExpired:
        p.kill()
        raise Loss("the end of the pipe", "none in 300 s") from None
    finally:
        thread.join()
    lines = out.split(b"\n")
    if p.returncode != 3 or lines.pop() or len(lines) != len(want):
        raise Loss(f"status 3 and {len(want)} lines", (p.returncode, len(lines), err[-300:]))
    check(lines, want)
    return "right"


def onto_a_full_disk(qemb, oracle, rng, folder):
    """Status 4 and a message; what was written before is right."""
    data, want = make_input(oracle, rng, 600)
    path = folder / "full"
    with open(path, "wb") as out:
        p = subprocess.run(["env", "--ignore-signal=XFSZ", "prlimit", f"--fsize={ROOM}", qemb, "-m",
                            oracle.model, "--input", "jsonl", "--output", "base64", "--threads",
                            "1"], input=data, stdout=out, stderr=subprocess.PIPE, timeout=300)
    whole = path.read_bytes().split(b"\n")[:-1]
    if p.returncode != 4 or not p.stderr.strip() or path.stat().st_size > ROOM or not whole:
        raise Loss("status 4 and a message", (p.returncode, p.stderr[-300:], len(whole)))
    check(whole, want)
    return "right until the disk was full"


def pipe_client(qemb, oracle, account, stop, folder, seed):
    rng = random.Random(seed)
    while not stop.wait(2):
        for kind in (stopped_and_continued, onto_a_full_disk):
            try:
                account.add("pipe", kind.__name__, kind(qemb, oracle, rng, folder))
            except (Loss, ValueError, KeyError, TypeError) as e:
                account.lose("pipe", kind.__name__, e)
