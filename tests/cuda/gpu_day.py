#!/usr/bin/env python3
"""Tests and measures qemb on a machine with a GPU, in order of value.

    gpu_day.py [PHASE...] [OPTION...]     check, speed, variants; all three without a PHASE
    gpu_day.py cublaslt [TOOLKIT]         prints the directory that holds cuBLASLt

The programs are those that `make gpu-pack` built. Each step has a limit of its own and appends a
line of JSON to OUT/PHASE.jsonl when it ends, and the next step starts whatever happened. A step
that no longer fits in the phase's time is not started. Results of a step: ok, failed, crashed,
timeout, skipped (the machine lacks something), no time. Exit status 1 if a step failed, crashed or
ran out of time, 77 if there is no GPU. bench/gpu_table.py makes tables of the results. Needs Python
alone. `make gpu-day` runs it."""

import argparse
import contextlib
import glob
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"check": 225, "speed": 400, "variants": 150}
SKIPPED = 77  # exit status of a program that found no GPU, or not what it needs

# Every test of test_cuda is in one group (test_gpu_day.py). A group is a process: what stops one
# stops no other. What relies on unproven instructions comes last.
GROUPS = [
    ("ptx", r"ptx_(?!tma|wgmma|cluster).*"),
    ("kernels", r"(rmsnorm|layernorm|qknorm_rope|swiglu|bias|gelu|quantize|dequantize|embed).*"),
    ("attention", r"attention_(?!hopper).*"),
    ("ops", r"op_(?!fp8|.*hopper).*"),
    ("models", r"(forward|golden|overflow|hot_path|plan|timed|table|batch).*"),
    ("encoders", r"encoder.*"),
    ("graphs", r"(graph|in_flight).*"),
    ("int8", r"int8.*"),
    ("fp8", r"(op_fp8|fp8|accuracy).*"),
    ("same bits", r"same_bits.*"),
    ("refusals", r"(refuse|device).*"),
    ("ptx tma", r"ptx_tma.*"),
    ("ptx wgmma", r"ptx_wgmma.*"),
    ("ptx cluster", r"ptx_cluster.*"),
    ("hopper gate_up", r"gate_up_hopper.*"),
    ("hopper attention", r"attention_hopper.*"),
    ("hopper ops", r"op_.*hopper.*"),
    ("hopper models", r"hopper.*"),
]
# Own kernels alone: cuBLASLt's read rows up to a multiple of 16, which nobody needs to write. So
# initcheck is not run either; the emulation fills unwritten memory with NaN instead.
SANITIZED = [
    ("memcheck", 40, r"(ptx_(ldm|cp)|attention_(narrow|wide)_64|rmsnorm|qknorm|swiglu).*"),
    ("racecheck", 40, r"(ptx_(ldm|cp)|attention_(narrow|wide)_64|rmsnorm|qknorm|swiglu).*"),
    ("synccheck", 30, r"(ptx_(ldm|cp)|attention_(narrow|wide)_64|rmsnorm|qknorm|swiglu).*"),
    ("memcheck", 40, r"(ptx_tma|gate_up_hopper|attention_hopper_64).*"),
]
# Ops of bench_cuda that are kernels of qemb's, and these kernels' names
OWN_KERNELS = {
    "rmsnorm": "rmsnorm_kernel",
    "qknorm_rope": "qknorm_rope_kernel",
    "attention": "attention_kernel",
    "attention_hopper": "attention_hopper_kernel",
    "gate_up_hopper": "gate_up_kernel",
}
TEXTS = {16: 32000, 32: 16000, 64: 8000, 128: 4000, 512: 1000}  # tokens: texts of a run
END_OF_TEXT = 151643
MODEL_BYTES = 24 << 30  # of the files of a day


def cublaslt(toolkit=None):
    """The directory of libcublasLt.so.N, or None: the toolkit's, or where PyTorch keeps it."""
    places = [f"{toolkit}/lib64"] if toolkit else []
    places += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    places += ["/usr/local/cuda*/lib64", "/usr/lib/x86_64-linux-gnu"]
    packages = [*sys.path, "/opt/*/lib/python3*/site-packages"]
    packages += ["/opt/*/.venv/lib/python3*/site-packages", "/usr/local/lib/python3*/*-packages"]
    places += [f"{p}/{d}" for p in packages if p for d in ("nvidia/*/lib", "torch/lib")]
    for place in places:
        for found in sorted(glob.glob(f"{place}/libcublasLt.so.*")) if place else []:
            return os.path.dirname(found)
    return None


def ask(*command):
    """The first line of a program's output, or nothing."""
    try:
        r = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return r.stdout.strip().splitlines()[0] if r.returncode == 0 and r.stdout.strip() else ""


def tail(data, n):
    return data[-n:].decode(errors="replace")


class Clocks(threading.Thread):
    """What nvidia-smi says five times a second: SM clock in MHz, power in W, memory in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples, self.process = [], None
        fields = "--query-gpu=clocks.sm,power.draw,memory.used"
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", fields, "--format=csv,noheader,nounits", "-lms", "200"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return
        self.start()

    def run(self):
        for line in self.process.stdout:
            try:
                self.samples.append((time.monotonic(), *map(float, line.split(","))))
            except ValueError:
                pass

    def since(self, start):
        """Median clock, largest power and memory since then."""
        rows = [s[1:] for s in list(self.samples) if s[0] >= start]
        if not rows:
            return {}
        mhz, watts, mib = zip(*rows)
        return {"sm_mhz": sorted(mhz)[len(mhz) // 2], "watts": max(watts), "gpu_mib": max(mib)}

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()


class Done:
    """How a process ended: result in words, exit status, and what it wrote."""

    def __init__(self, result, status=None, out=b"", err=b"", seconds=0.0):
        self.result, self.status, self.seconds = result, status, seconds
        self.out, self.err = out, err

    @property
    def ok(self):
        return self.result == "ok"


def execute(command, limit, stdin=None, env=None, discard=False):
    """Runs command for at most limit seconds; ends it with all that it started. stdin: a path."""
    start = time.monotonic()
    try:
        with open(stdin or os.devnull, "rb") as source:
            p = subprocess.Popen([str(c) for c in command], stdin=source, env=env, cwd=ROOT,
                                 stdout=subprocess.DEVNULL if discard else subprocess.PIPE,
                                 stderr=subprocess.PIPE, start_new_session=True)
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        return Done("skipped" if missing else "failed", None, b"", str(e).encode())
    try:
        out, err = p.communicate(timeout=limit)
        late = False
    except subprocess.TimeoutExpired:
        late = True
        kill_group(p)
        out, err = p.communicate()
    except BaseException:  # the day is ended from outside
        kill_group(p)
        raise
    out, seconds = out or b"", time.monotonic() - start
    said = re.search(rb"^skipped", out + b"\n" + err, re.M)
    if late:
        result = "timeout"
    elif p.returncode < 0:
        result = "crashed"
    elif p.returncode == SKIPPED or (said and p.returncode == 0):
        result = "skipped"
    else:
        result = "failed" if p.returncode else "ok"
    return Done(result, p.returncode, out, err, seconds)


def kill_group(p):
    try:
        os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Day:
    """One phase: its time, its log, and the steps' common part."""

    def __init__(self, options, phase):
        self.o, self.phase = options, phase
        self.end = time.monotonic() + (options.seconds or SECONDS[phase])
        self.log = open(options.out / f"{phase}.jsonl", "a", encoding="utf-8", buffering=1)
        library = cublaslt()
        paths = [p for p in (library, os.environ.get("LD_LIBRARY_PATH")) if p]
        tools = glob.glob("/usr/local/cuda*/bin") + glob.glob("/opt/nvidia/nsight-compute/*")
        self.env = os.environ | {"LD_LIBRARY_PATH": ":".join(paths),
                                 "PATH": ":".join([os.environ["PATH"], *tools])}
        self.failed = False
        self.clocks = Clocks()
        self.cache = options.tmp / "cache"  # what an earlier phase has timed is not timed again
        self.cache.mkdir(parents=True, exist_ok=True)
        for kept in options.out.glob("cublaslt-*"):
            shutil.copy(kept, self.cache)

    def program(self, name):
        return self.o.programs / name

    def say(self, step, result, **fields):
        row = {"phase": self.phase, "step": step, "result": result, **fields}
        self.failed = self.failed or result in ("failed", "crashed", "timeout")
        self.log.write(json.dumps(row) + "\n")
        shown = " ".join(f"{k}={v}" for k, v in fields.items()
                         if k not in ("output", "kernels", "tests", "clocks"))
        print(f"{self.phase:8} {step:34} {result:8} {shown}"[:200], flush=True)

    def wanted(self, step):
        return not self.o.steps or re.search(self.o.steps, step)

    def limit(self, step, limit):
        """Seconds that the step may take: 0 if it was not asked for, or if less than half its limit
        is left."""
        if not self.wanted(step):
            return 0
        limit = min(limit, self.o.limit or limit)
        left = self.end - time.monotonic()
        if left < limit / 2:
            self.say(step, "no time", left=round(left, 1))
            return 0
        return min(limit, left)

    def run(self, step, limit, command, stdin=None, discard=False, find=None, keep=4000,
            env=None):
        """A step that is a command. find(done): what it measured; nothing means that it failed.
        Without, the output's last bytes are kept. Returns Done, or None if it was not started."""
        limit = self.limit(step, limit)
        if not limit:
            return None
        start = time.monotonic()
        done = execute(command, limit, stdin, env or self.env, discard)
        fields = {"seconds": round(done.seconds, 2), "status": done.status}
        found = find(done) if find and done.ok else None
        if find and done.ok and not found:
            done.result = "failed"
        if found:
            fields |= found
        else:
            text = tail(done.out, keep) + tail(done.err, keep)
            lines = [x for x in text.splitlines() if x.strip()]
            fields |= {"last": lines[-1][:160] if lines else "", "output": text}
        self.say(step, done.result, **fields, clocks=self.clocks.since(start))
        return done


# ---- check ---------------------------------------------------------------------------------------


def facts(day):
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory",
              "power.limit", "compute_cap")
    values = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    machine = dict(zip(fields, values.split(", ")))
    packed = day.o.programs / "COMMIT"
    commit = packed.read_text().strip() if packed.exists() else \
        ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    day.say("machine", "ok", **machine, commit=commit, cores=os.cpu_count(), cublaslt=cublaslt(),
            date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()))


def more_facts(day):
    shell = "uname -r; head -2 /etc/os-release; ldd --version | head -1; free -g; df -h / /dev/shm"
    tools = "for t in nvcc ncu compute-sanitizer gcc git; do command -v $t || echo no $t; done"
    torch = ("try:\n import torch, transformers as t\n"
             " print(torch.__version__, t.__version__, torch.version.cuda)\n"
             "except ImportError as e:\n print('skipped:', e)\n")
    day.run("fact: system", 10, ["sh", "-c", shell])
    day.run("fact: tools", 10, ["sh", "-c", tools])
    day.run("fact: libraries", 10, ["ldd", day.program("qemb-cuda")])
    day.run("fact: python", 40, ["python3", "-c", torch], env=dict(os.environ))
    day.run("fact: nvidia-smi", 20, ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"])


def all_tests(day):
    return execute([day.program("test_cuda"), "--list"], 60, env=day.env).out.decode().split()


def group_of(test):
    return next((name for name, names in GROUPS if re.fullmatch(names, test)), "others")


def test_group(day, group, tests):
    """Each test that ends is noted. After one that stops the process, the next process takes up
    the tests behind it."""
    limit = day.limit(f"test {group}", 30)
    if not limit or not tests:
        return
    end = time.monotonic() + limit
    times, stopped, out, results = {}, {}, "", []
    left = list(tests)
    while left and end - time.monotonic() > 1:
        command = [day.program("test_cuda"), "--times", "--exact", *left]
        done = execute(command, min(20, limit * 2 / 3, end - time.monotonic()), env=day.env)
        text = tail(done.out, 6000) + tail(done.err, 2000)
        out += text
        results.append(done.result)
        ended = re.findall(r"^ *([0-9.]+) s  (\w+)$", done.out.decode(errors="replace"), re.M)
        times |= {name: float(s) for s, name in ended}
        left = [t for t in left if t not in times]
        if re.search(r"^\d+ tests, ", text, re.M) or done.result == "skipped":
            break
        if left:
            stopped[left.pop(0)] = done.result
    worst = [r for r in ("crashed", "timeout", "failed", "skipped") if r in results]
    failed = re.findall(r"^FAIL (\w+)", out, re.M)
    day.say(f"test {group}", worst[0] if worst else "ok", ended=len(times), of=len(tests),
            seconds=round(limit - end + time.monotonic(), 1), stopped=stopped, not_run=left,
            failed=sorted(set(failed)), tests=times, output=out[-6000:] if worst else "")


def test_groups(day):
    tests = all_tests(day)
    for group in (*(name for name, _ in GROUPS), "others"):
        test_group(day, group, [t for t in tests if group_of(t) == group])


def sanitizers(day):
    tests = all_tests(day)
    for tool, limit, names in SANITIZED:
        chosen = [t for t in tests if re.fullmatch(names, t)]
        day.run(f"{tool} {chosen[0] if chosen else ''}", limit,
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                 day.program("test_cuda"), "--exact", *chosen])


def one_by_one(day, step, model, lines, warm, *args):
    """Vectors of texts that come one at a time, and milliseconds from writing a line to reading its
    vector, without the first `warm` lines. From the third of a class on they are graphs."""
    limit = day.limit(step, 40)
    if not limit:
        return []
    got, ms, start = [], [], time.monotonic()
    p = subprocess.Popen(
        [day.program("qemb-cuda"), "-m", model, "--input", "jsonl", "--output", "base64",
         *map(str, args)], env=day.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    killer = threading.Timer(limit, kill_group, [p])
    killer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            for line in lines:
                begin = time.monotonic()
                p.stdin.write(line)
                p.stdin.flush()
                answer = p.stdout.readline()
                if not answer or answer.startswith(b"{"):  # an error
                    break
                ms.append((time.monotonic() - begin) * 1e3)
                got.append(answer)
            p.stdin.close()
        err = tail(p.stderr.read(), 1000)
        p.wait()
    finally:
        killer.cancel()
        kill_group(p)
    if len(got) == len(lines):
        ms = sorted(ms[warm:])
        day.say(step, "ok", median_ms=round(ms[len(ms) // 2], 3), texts=len(ms),
                p99_ms=round(ms[int(len(ms) * 0.99)], 3), args=[str(x) for x in args],
                clocks=day.clocks.since(start))
        return got
    day.say(step, "timeout" if p.returncode == -signal.SIGKILL else "failed", status=p.returncode,
            texts=len(got), output=err)
    return []


def same_bits(day):
    small = ROOT / "tests/fixtures/small.qemb"
    words = (ROOT / "tests/fixtures/small.txt").read_text(encoding="utf-8").split()
    lines = [json.dumps({"text": " ".join(words[i:i + 8])}).encode() + b"\n" for i in range(20)]
    lines = lines[:6] if day.o.quick else lines
    runs = [one_by_one(day, f"small model, graphs {word}", small, lines, 2, *args)
            for word, args in (("on", ()), ("off", ("--no-graphs",)))]
    if day.limit("graphs on and off: same bits", 1):
        same = "ok" if runs[0] == runs[1] else "failed"
        day.say("graphs on and off: same bits", same if all(runs) else "skipped",
                texts=len(runs[0]))


def kernels_of(done):
    rows = [json.loads(x) for x in done.out.decode().splitlines() if x.startswith("{")]
    return {"rows": len(rows), "kernels": rows} if rows else None


def kernels(day, math_name, limit):
    args = ["--json", "--math", math_name]
    if day.o.quick:
        args += ["--only", "rmsnorm T 32", "64", "2", "1", "64", "96"]
    day.run(f"kernels {math_name}", limit, [day.program("bench_cuda"), *args], find=kernels_of)


def check(day):
    facts(day)
    test_groups(day)
    cuda, cpu = day.program("qemb-cuda"), day.program("qemb")
    day.run("program against the CPU's", 60,
            ["python3", "tests/cuda/test_cuda_program.py", cuda, cpu])
    day.run("server against the CPU's", 40,
            ["python3", "tests/cuda/test_cuda_serve.py", day.program("qemb-serve-cuda"), cpu])
    same_bits(day)
    sanitizers(day)
    kernels(day, "f16", 60)
    more_facts(day)


# ---- speed ---------------------------------------------------------------------------------------


def records(tokens, texts, rng):
    """Texts of random ids, which share no prefix."""
    ids = rng.choices([f"{i}," for i in range(1000, 100000)], k=texts * tokens)
    return "".join(f'{{"ids": [{"".join(ids[i:i + tokens - 1])}{END_OF_TEXT}]}}\n'
                   for i in range(0, texts * tokens, tokens)).encode()


def rates(done):
    """The program's own line (--stats), whose clock starts when the model is loaded."""
    said = done.err.decode(errors="replace")
    m = re.search(r"(\d+) texts, (\d+) tokens in ([0-9.]+) s \(([0-9.]+) texts/s, ([0-9.]+) tok",
                  said)
    if not m:
        return None
    return {"texts": int(m[1]), "run_seconds": float(m[3]), "texts_s": float(m[4]),
            "tokens_s": float(m[5]), "stats": said.strip().splitlines()[-3:]}


class Model:
    """A file of random weights with a real model's shape, made when it is first wanted."""

    def __init__(self, day, shape, int8=False):
        self.day, self.made = day, False
        self.shape = shape
        self.name = f"{shape}{' int8' if int8 else ''}"
        self.path = day.o.tmp / f"{self.name.replace(' ', '-')}.qemb"
        self.flags = ["--int8"] if int8 else []
        self.cache = ["--cache", str(day.cache)]
        if day.o.quick:  # few sizes to time
            self.cache += ["--batch-tokens", "64", "--max-tokens", "64"]

    def file(self):
        if not self.made:
            self.made = True
            if not self.path.exists():
                shape = "tiny" if self.day.o.quick else self.shape
                done = execute(["python3", "tests/fixtures/make_big_qemb.py", self.path, "--shape",
                                shape, *self.flags], 60)
                if not done.ok:
                    self.path.unlink(missing_ok=True)
                self.day.say(f"make {self.name}", done.result, seconds=round(done.seconds, 1),
                             output=tail(done.err, 1000))
        return self.path

    def run(self, step, limit, stdin, *args, find=rates, discard=True, program="qemb-cuda"):
        if not self.day.wanted(step):
            return None
        command = [self.day.program(program), "-m", self.file(), "--input", "jsonl", "--output",
                   "f32", "--stats", *args]
        return self.day.run(step, limit, command, stdin, discard,
                            find=find and (lambda done: (found := find(done)) and
                                           {"model": self.name, "args": args} | found))

    def throughput(self, words, lengths, *args, times=1, limit=40, timed=True):
        """Lengths in tokens; times: as many texts more; timed: with the cache of algorithms."""
        for n in self.short(lengths):
            step = f"{self.name} {words}, {n} tokens"
            texts = 3 if self.day.o.quick else TEXTS[n] * times
            stdin = self.day.o.tmp / f"{n}-{texts}.jsonl"
            if not stdin.exists():
                stdin.write_bytes(records(n, texts, random.Random(1)))
            self.run(step, limit, stdin, *(self.cache if timed else ()), *args,
                     find=lambda done, n=n: (r := rates(done)) and {"tokens": n, "variant": words}
                     | r)

    def short(self, lengths):
        return [n for n in lengths if n <= 32 or not self.day.o.quick]

    def latency(self, lengths):
        rng = random.Random(2)
        for n in self.short(lengths):
            for word, args in (("graphs", ()), ("no graphs", ("--no-graphs",))):
                step = f"{self.name} one text of {n}, {word}"
                if self.day.wanted(step):
                    lines = [records(n, 1, rng) for _ in range(8 if self.day.o.quick else 110)]
                    one_by_one(self.day, step, self.file(), lines, min(10, len(lines) // 2),
                               *self.cache, *args)


def vectors(done, texts):
    if not done or not done.ok or len(done.out) % (4 * texts) or not done.out:
        return None
    dim = len(done.out) // 4 // texts
    return [struct.unpack_from(f"<{dim}f", done.out, 4 * dim * i) for i in range(texts)]


def accuracy(day, model, reference, ways):
    """Least cosine of a text's vector with that of reference, a step that has run with the first
    of the programs and arguments in ways."""
    rng, texts = random.Random(3), b""
    lengths = (2, 9) if day.o.quick else (2, 3, 9, 33, 64, 129)
    for n in lengths:
        texts += records(n, 1, rng)
    stdin = day.o.tmp / "accuracy.jsonl"
    stdin.write_bytes(texts)
    want = vectors(model.run(f"{model.name} vectors: {reference[0]}", 60, stdin, *reference[2],
                             program=reference[1], discard=False), len(lengths))

    def least(done):
        got = vectors(done, len(lengths))
        if not got or not want:
            return None
        pairs = [(g, w) for g, w in zip(got, want)]
        dots = [sum(map(lambda x, y: x * y, g, w)) for g, w in pairs]
        worst = max(abs(x - y) for g, w in pairs for x, y in zip(g, w))
        finite = all(math.isfinite(d) for d in dots)
        said = done.err.decode(errors="replace").strip().splitlines()
        return {"least_cosine": min(dots), "largest_error": worst,
                "stats": said[-1:]} if finite else None
    for name, args in ways:
        model.run(f"{model.name} accuracy: {name}", 40, stdin, *args, find=least, discard=False)


def slowest(rows):
    """The three own ops with the lowest share of what the device's copy and its largest product
    reach, each at its slowest size."""
    top = {r["op"]: r for r in rows if r["op"] == "device_copy" or "ceiling" in r["sizes"]}
    gb_s = top.get("device_copy", {}).get("gb_s", 1)
    tflop_s = top.get("matmul", {}).get("tflop_s", 1)
    share = {}
    for r in rows:
        if r["op"] in OWN_KERNELS and r["us"] >= 20:  # shorter ones are the launch
            part = max(r["gb_s"] / gb_s, r["tflop_s"] / tflop_s)
            share[r["op"]] = min(share.get(r["op"], (9, "")), (part, r["sizes"]))
    return sorted((part, op, sizes) for op, (part, sizes) in share.items())[:3]


def measured_kernels(day):
    """Rows of bench_cuda in FP16 from this machine's logs."""
    rows = []
    for log in ("check", "speed"):
        path = day.o.out / f"{log}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            rows = row["kernels"] if row["step"] == "kernels f16" and "kernels" in row else rows
    return rows


def profile(day):
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
    found = slowest(measured_kernels(day))
    if day.o.quick:
        found = found or [(0, "rmsnorm", "T 32")]
    for part, op, sizes in found:
        # --kill yes: its status says nothing once the kernel is measured
        shell = (f'command -v ncu >/dev/null || exit {SKIPPED}; said=$(ncu "$@"); echo "$said"; '
                 "case $said in *Section:*) ;; *) exit 1; esac")
        day.run(f"ncu {op} {sizes}", 40,
                ["sh", "-c", shell, "ncu", "--clock-control", "none", "--kill", "yes",
                 "--kernel-name", f"regex:{OWN_KERNELS[op]}", "--launch-skip", "3",
                 "--launch-count", "1",
                 *(x for s in sections for x in ("--section", s)), day.program("bench_cuda"),
                 "--only", f"{op} {sizes}"], keep=12000)


def transformers_rates(done):
    rows = [json.loads(x) for x in done.out.decode().splitlines() if x.startswith("{")]
    return {"rates": rows} if rows else None


def speed(day):
    facts(day)
    four, small, int8 = Model(day, "4B"), Model(day, "0.6B"), Model(day, "4B", int8=True)
    encoder = Model(day, "bge-m3")
    few = day.o.tmp / "few.jsonl"
    few.write_bytes(records(4, 1, random.Random(1)))
    four.run("4B tuning", 60, few, *four.cache)
    four.throughput("f16", TEXTS)
    four.throughput("hopper", (32, 512), "--hopper")
    four.throughput("fp8", (32, 128, 512), "--math", "fp8")
    four.latency((8, 32, 128))
    small.throughput("f16", TEXTS, times=6)
    cpu = ("CPU", "qemb", ())
    accuracy(day, small, cpu, [("f16", ()), ("hopper", ("--hopper",)), ("fp8", ("--math", "fp8")),
                               ("deterministic", ("--deterministic",))])
    if not any(r["op"] == "matmul" for r in measured_kernels(day)):
        kernels(day, "f16", 60)
    kernels(day, "fp8", 60)
    for model in (four, small):  # with the libraries that PyTorch chooses
        day.run(f"transformers {model.shape}", 90,
                ["python3", "bench/bench_transformers.py", model.shape], find=transformers_rates,
                env=dict(os.environ))
    int8.throughput("f16", (32, 512))
    encoder.throughput("f16", (32, 512), times=6)
    encoder.throughput("fp8", (32, 512), "--math", "fp8", times=6)
    accuracy(day, encoder, cpu, [("f16", ()), ("fp8", ("--math", "fp8"))])
    profile(day)


def keep_cache(day):
    """The fastest of cuBLASLt's algorithms, for the next run on such a GPU."""
    for path in day.cache.glob("cublaslt-*"):
        shutil.copy(path, day.o.out)


# ---- variants ------------------------------------------------------------------------------------

# Name, whether with the cache, lengths, arguments. Only with the cache are algorithms timed, FP8's
# fast accumulation among them.
VARIANTS = [
    ("f16", True, (32, 512), ()),
    ("f16, not timed", False, (32, 512), ()),
    ("fp8", True, (32, 512), ("--math", "fp8")),
    ("fp8, not timed", False, (32, 512), ("--math", "fp8")),
    ("batch 8192", True, (32, 512), ("--batch-tokens", "8192")),
    ("batch 16384", True, (32, 512), ("--batch-tokens", "16384")),
    ("deterministic", False, (32,), ("--deterministic",)),
]


def variants(day):
    facts(day)
    model = Model(day, "4B")
    for name, timed, lengths, args in VARIANTS:
        model.throughput(f"variant {name}", lengths, *args, timed=timed)
    accuracy(day, model, ("f16", "qemb-cuda", ()),
             [(name, (*(model.cache if timed else ()), *args))
              for name, timed, _, args in VARIANTS[1:] if "batch" not in name])


PHASES = {"check": check, "speed": speed, "variants": variants}


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("phases", nargs="*", default=list(PHASES), metavar="PHASE")
    packed = ROOT if ROOT.joinpath("test_cuda").exists() else ROOT / "build/gpu-pack"
    p.add_argument("--programs", type=Path, default=packed, help="their folder")
    p.add_argument("--out", type=Path, default=ROOT / "bench/results", help="the results' folder")
    p.add_argument("--seconds", type=float, help="of each phase (225, 400 and 150)")
    p.add_argument("--steps", metavar="REGEX", help="only steps whose name has a match")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="of every step, at most")
    p.add_argument("--quick", action="store_true", help="tiny models, few texts: tests the script")
    o = p.parse_args()
    if unknown := set(o.phases) - set(PHASES):
        p.error(f"{unknown.pop()}: no such phase (want {', '.join(PHASES)})")
    o.programs, o.out = o.programs.resolve(), o.out.resolve()
    return o


def main():
    if sys.argv[1:2] == ["cublaslt"]:
        print(cublaslt(*sys.argv[2:3]) or "")
        return 0
    o = options()
    o.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    memory = Path("/dev/shm")  # if it holds the models; else the disk
    fits = memory.is_dir() and shutil.disk_usage(memory).free > MODEL_BYTES
    with tempfile.TemporaryDirectory(prefix="qemb-", dir=memory if fits else None) as t:
        o.tmp = Path(t)
        failed = False
        for phase in o.phases:
            day = Day(o, phase)
            # With a GPU it runs no test and fails; a program that does not start says why.
            start = execute([day.program("test_cuda"), "--exact", "no test"], 60, env=day.env)
            if start.result == "skipped":
                print((start.out or start.err).decode().strip())
                return SKIPPED
            if b"0 tests" not in start.out:
                day.say("start", start.result, status=start.status, output=tail(start.err, 2000))
            try:
                PHASES[phase](day)
            finally:
                keep_cache(day)
                day.clocks.close()
                day.say("end", "ok", left=round(day.end - time.monotonic(), 1))
            failed = failed or day.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
