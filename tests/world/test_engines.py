"""examples/engines by the real engines on this machine, each with processes that are killed on the
way: no row is lost, none comes twice, vectors are the bare pipe's bits, and one bad record among
20,000 is one error.

    QEMB_ENGINES_TEXTS=200000 .venv-world/engines/bin/pytest -q -s tests/world/test_engines.py

kills nothing and prints the table of docs/scale.md instead: texts a second of so many texts."""
import getpass
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import numpy
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
import yaml
from helpers import QEMB, ROOT, free_port, wait_for

ENGINES = ROOT / "examples/engines"
MODEL = ROOT / "examples/demo.qemb"
MEASURED = int(os.environ.get("QEMB_ENGINES_TEXTS", 0))
TEXTS = MEASURED or 20_000
LIMIT = 3600 if MEASURED else 900  # seconds, after which a program hangs
FILES = 20
BAD = 12_345
PIPE = ["--input=jsonl", "--output=jsonl", "--errors-ok"]
# A qemb on PATH: the real one, after it has taken the order that lies beside it, if there is one.
# An order is a command that is run when the process has written so many bytes and has not ended.
WRAPPER = """#!/bin/sh
here={here}
if mv $here/todo $here/$$.order 2>/dev/null; then
    victim=$$ parent=$PPID
    (while w=$(sed -n 's/^wchar: //p' /proc/$victim/io) && [ "${{w:-0}}" -lt {bytes} ]; do
         sleep 0.005
     done
     ! grep -q '^State:.*Z' /proc/$victim/status && mv $here/$victim.order $here/$victim.done &&
         . $here/$victim.done
    ) </dev/null >$here/$victim.log 2>&1 &
fi
exec {qemb} "$@"
"""
KILL = "kill -9 $victim"
KILL_PARENT = "kill -9 $parent"
# The reader stands still until qemb waits for it in the middle of a line, which then stays half.
KILL_IN_A_LINE = "kill -STOP $parent; sleep 0.5; kill -9 $victim; kill -CONT $parent"
KILLED_AT = 4_000_000  # bytes: more than a file's vectors, less than a process has to write
EARLY = 1_500_000  # where a process has one file or batch


class Workplace:
    """A directory with the texts, what the pipe makes of them, and a place for one engine."""

    def __init__(self, root):
        self.root = root
        words = [w for line in (ROOT / "examples/packages.txt").open(encoding="utf-8")
                 for w in line.split()]
        draw = random.Random(1)
        texts = [" ".join(draw.choices(words, k=draw.randint(3, 12))) + f" {i}"
                 for i in range(TEXTS)]
        texts[BAD] = None
        self.list, self.table, self.lines = root / "list", root / "texts.parquet", root / "lines"
        for folder in (self.table, self.lines, root / "expected"):
            folder.mkdir()
        names = [str(self.lines / f"texts-{i:02}") for i in range(FILES)]
        self.list.write_text("".join(f"{name}\n" for name in names))
        for i, name in enumerate(names):
            ids = range(i * TEXTS // FILES, (i + 1) * TEXTS // FILES)
            records = [json.dumps({"id": n, "text": texts[n]}) + "\n" for n in ids]
            Path(name).write_text("".join(records))
            table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.int64()),
                                   "text": texts[ids.start:ids.stop]})
            pyarrow.parquet.write_table(table, self.table / f"{i:02}.parquet")

    def pipe(self):
        """The pipe's answers to each file; the seconds that it took."""
        start = time.time()
        for source in sorted(self.lines.iterdir()):
            with source.open() as texts, self.expected(source.name).open("wb") as out:
                subprocess.run([QEMB, "-m", MODEL, "--quiet", *PIPE], stdin=texts, stdout=out,
                               stderr=subprocess.DEVNULL, check=True)
        return time.time() - start

    def expected(self, name):
        return self.root / "expected" / name

    def answers(self):
        """[vector as 32-bit floats, or the error's code] of the bare pipe, by id"""
        records = [json.loads(line) for i in range(FILES)
                   for line in self.expected(f"texts-{i:02}").open()]
        assert [r["id"] for r in records] == list(range(TEXTS))
        return [numpy.array(r["embedding"], numpy.float32) if "embedding" in r
                else r["error"]["code"] for r in records]


class Rates:
    """Seconds of each engine, beside those of the pipe right before and after it: other load of the
    machine changes both."""

    def __init__(self, work):
        self.work, self.seconds = work, {}
        self.pipe = work.pipe()

    def add(self, name, seconds):
        if MEASURED:
            before, self.pipe = self.pipe, self.work.pipe()
            self.seconds[name] = seconds, (before + self.pipe) / 2

    def show(self):
        print(f"\n\n{TEXTS} texts; engine, texts/s, the pipe's texts/s, per cent of it")
        for name, (s, pipe) in self.seconds.items():
            print(f"| {name} | {TEXTS / s:,.0f} | {TEXTS / pipe:,.0f} | {100 * pipe / s:.0f} |")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def rates(work):
    timed = Rates(work)
    yield timed
    if MEASURED:
        timed.show()


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


class Engine:
    """Programs that have a qemb on PATH which follows orders."""

    def __init__(self, root, killed_at=KILLED_AT):
        self.bin, self.out, self.orders = root / "bin", root / "out", 0
        self.bin.mkdir()
        wrapper = self.bin / "qemb"
        wrapper.write_text(WRAPPER.format(here=self.bin, qemb=QEMB, bytes=killed_at))
        wrapper.chmod(0o755)
        self.env = {**os.environ, "PYSPARK_PYTHON": sys.executable, "RAY_USAGE_STATS_ENABLED": "0",
                    "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def order(self, *commands):
        """The next process gets the first command, the one that starts next after it is done gets
        the second, and so on. None when measuring."""
        name = "todo"
        for i, command in enumerate(commands if not MEASURED else ()):
            self.orders += 1
            following = f"order-{i + 1}"
            (self.bin / name).write_text(f"{command}\n[ ! -e $here/{following} ] || "
                                         f"mv $here/{following} $here/todo\n")
            name = following

    def run(self, command, **more):
        p = subprocess.run([str(c) for c in command], env=self.env | more.pop("env", {}),
                           capture_output=True, text=True, timeout=LIMIT, **more)
        self.log = p.stdout + p.stderr
        return p

    def good(self, command, **more):
        start = time.time()
        p = self.run(command, **more)
        assert p.returncode == 0, self.log[-5000:]
        return time.time() - start

    def all_followed(self):
        done = len(list(self.bin.glob("*.done")))
        logs = [f.read_text() for f in self.bin.glob("*.log")]
        assert (done, "".join(logs)) == (self.orders, "")

    def table_is_whole(self, work, table):
        self.all_followed()
        table = pyarrow.dataset.dataset(table, format="parquet").to_table().sort_by("id")
        assert table["id"].to_pylist() == list(range(TEXTS))
        vectors, errors = table["embedding"].to_pylist(), table["error"].to_pylist()
        for want, vector, error in zip(work.answers(), vectors, errors):
            if isinstance(want, str):
                assert (vector, error["code"]) == (None, want)
            else:
                assert error is None
                assert numpy.array_equal(numpy.array(vector, numpy.float32), want)
        assert [i for i, e in enumerate(errors) if e is not None] == [BAD]

    def shards_are_whole(self, work):
        self.all_followed()
        names = {f"texts-{i:02}" for i in range(FILES)}
        visible = {p.name for p in self.out.iterdir() if not p.name.startswith(".")}
        assert visible == {n + e for n in names for e in (".jsonl", ".json")}
        assert len(list(self.out.glob(".*.part"))) <= self.orders  # what a kill leaves
        about = {n: json.loads((self.out / f"{n}.json").read_text()) for n in names}
        for n in names:
            assert (self.out / f"{n}.jsonl").read_bytes() == work.expected(n).read_bytes(), n
        assert sum(a["rows"] for a in about.values()) == TEXTS
        assert sum(a["errors"] for a in about.values()) == 1


SPARK = ["spark-submit", "--master=local[2,4]", "--driver-memory=1g",
         "--conf=spark.ui.enabled=false"]


def test_spark(work, engine, rates):
    engine.order(KILL_IN_A_LINE, KILL_PARENT)
    rates.add("Spark", engine.good([*SPARK, ENGINES / "spark.py", MODEL, work.table, engine.out]))
    engine.table_is_whole(work, engine.out)


PIPES = """
import sys
from pyspark.sql import SparkSession
lines, command, order = sys.argv[1:]
spark = SparkSession.builder.getOrCreate()
for check in False, True:
    open(order, "w").write("kill -9 $victim\\n")
    answers = spark.sparkContext.textFile(lines, 2).coalesce(2).pipe(command, checkCode=check)
    print("answers", check, answers.count())
"""


@pytest.mark.skipif(MEASURED > 0, reason="measures nothing")
def test_spark_pipe_without_check_code_loses_rows(work, engine, tmp_path):
    """What spark.py warns of. checkCode=True makes the task fail and run again."""
    program = tmp_path / "pipes.py"
    program.write_text(PIPES)
    command = shlex.join([str(engine.bin / "qemb"), "-m", str(MODEL), "--threads=1", *PIPE])
    engine.orders = 2
    engine.good([*SPARK, program, work.lines, command, engine.bin / "todo"])
    engine.all_followed()
    counts = dict(re.findall(r"^answers (\w+) (\d+)$", engine.log, re.M))
    assert int(counts["False"]) < TEXTS
    assert int(counts["True"]) == TEXTS


# Two actors and the tasks beside them; on a cluster Ray knows its CPUs.
RAY = """
import runpy, sys, ray
ray.init(num_cpus=4, object_store_memory=200_000_000, include_dashboard=False)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ray_data(work, tmp_path, rates):
    engine = Engine(tmp_path, EARLY)
    engine.order(KILL_IN_A_LINE, KILL_PARENT)
    rates.add("Ray Data", engine.good([sys.executable, "-c", RAY, ENGINES / "ray_data.py", MODEL,
                                       work.table, engine.out, 2]))
    engine.table_is_whole(work, engine.out)


def test_shards(work, engine, rates):
    engine.order(KILL)
    command = [engine.bin / "qemb", "shards", "-m", MODEL, "--out", engine.out, *PIPE, "-"]
    with work.list.open() as files:
        if not MEASURED:
            assert engine.run(command, stdin=files).returncode == -signal.SIGKILL
            assert 0 < len(list(engine.out.glob("*.json"))) < FILES
            files.seek(0)
        rates.add("qemb shards", engine.good(command, stdin=files))
    engine.shards_are_whole(work)


def test_parallel(work, engine, rates):
    command = [str(c) for c in (ENGINES / "parallel.sh", MODEL, engine.out, work.list)]
    env = engine.env | {"JOBS": "2", "FILES": "5"}
    if not MEASURED:  # parallel itself is killed, with a job; the other one is left alone
        engine.order(f"kill -9 $victim $(cat {engine.bin}/pid)")
        run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
        (engine.bin / "pid").write_text(str(run.pid))
        run.stderr.read()
        assert run.wait() == -signal.SIGKILL
    engine.order(KILL)
    rates.add("GNU parallel", engine.good(command, env=env))
    engine.shards_are_whole(work)
    before = {p: p.stat().st_mtime_ns for p in engine.out.iterdir()}
    engine.good(command, env=env)  # nothing is left to do
    assert {p: before[p] for p in before if p.suffix == ".jsonl"} == \
        {p: p.stat().st_mtime_ns for p in engine.out.glob("*.jsonl")}


def test_parallel_again_takes_what_is_new(engine, tmp_path):
    files, listed = [tmp_path / f"{i}" for i in range(3)], tmp_path / "list"
    command = [ENGINES / "parallel.sh", MODEL, engine.out, listed]
    for some in (files[:2], files):  # the second time one is new, and one has changed
        for i, file in enumerate(some):
            file.write_text(json.dumps({"text": f"{i} of {len(some)}"}) + "\n")
        listed.write_text("".join(f"{file}\n" for file in some))
        engine.good(command)
        for file in some:
            with file.open() as texts:
                want = subprocess.run([QEMB, "-m", MODEL, *PIPE], stdin=texts, check=True,
                                      stdout=subprocess.PIPE).stdout
            assert (engine.out / f"{file.name}.jsonl").read_bytes() == want


SLURM = """
ClusterName=qemb
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(engine, tmp_path):
    """A cluster of this machine: engine.env has SLURM_CONF, for sbatch and the like."""
    for name in "state", "spool":
        (tmp_path / name).mkdir()
    conf = tmp_path / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(SLURM.format(host=host, user=getpass.getuser(), dir=tmp_path,
                                 cpus=os.cpu_count(), ports=(free_port(), free_port())))
    engine.env["SLURM_CONF"] = str(conf)
    daemons = []
    try:
        for name in "slurmctld", "slurmd":
            with (tmp_path / f"{name}.log").open("w") as log:
                daemons.append(subprocess.Popen([f"/usr/sbin/{name}", "-D"], env=engine.env,
                                                stdout=log, stderr=log))
        wait_for(lambda: "idle" in engine.run(["sinfo", "--noheader"]).stdout, LIMIT, pause=0.2)
        yield engine
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def test_slurm(work, slurm, rates, tmp_path):
    """A qemb is killed; another task is requeued as by preemption, which waits two minutes, so it
    is told to begin."""
    slurm.order(KILL, "scontrol requeue $SLURM_JOB_ID")

    def finished():
        queue = slurm.run(["squeue", "--noheader", "--array", "--format=%A %r"]).stdout.split("\n")
        for job, _, reason in (line.partition(" ") for line in queue):
            if reason == "BeginTime":
                slurm.good(["scontrol", "update", f"jobid={job}", "starttime=now"])
        return queue == [""]

    start = time.time()
    slurm.good(["sbatch", "--array=3-6", "--cpus-per-task=1", "--mem=500",
                f"--output={tmp_path}/%a.out", ENGINES / "slurm.sh", MODEL, slurm.out, work.list])
    wait_for(finished, LIMIT, pause=0.2)
    rates.add("Slurm", time.time() - start)
    jobs = slurm.run(["scontrol", "show", "job", "--oneliner"]).stdout
    said = [(p.name, p.read_text()) for p in tmp_path.glob("*.out")]
    assert jobs.count("JobState=COMPLETED") == 4, (jobs, said)
    slurm.shards_are_whole(work)
    if not MEASURED:
        assert len(re.findall("Restarts=1", jobs)) == 1
        assert sum("Killed" in text for _, text in said) == 1


def test_slurm_refuses_an_array_with_gaps(work, engine):
    env = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "2",
           "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "1"}
    p = engine.run([ENGINES / "slurm.sh", MODEL, engine.out, work.list], env=env)
    assert p.returncode == 1
    assert p.stderr == ("slurm.sh: the array has gaps (want --array=FIRST-LAST: the slices of LIST "
                        "depend on it)\n")
    assert not engine.out.exists()


@pytest.fixture(scope="session")
def job():
    return yaml.safe_load((ENGINES / "kubernetes.yaml").read_text())


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_kubernetes_manifest(job, version):
    """By the API server's schemas, in which no other key may stand. 1.33 is the first version whose
    backoffLimitPerIndex is stable."""
    kubernetes_validate.validate(job, version, strict=True)
    wrong = json.loads(json.dumps(job))
    wrong["spec"]["backofLimitPerIndex"] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_the_servers_manifests(version):
    for m in yaml.safe_load_all((ROOT / "packaging/kubernetes.yaml").read_text()):
        kubernetes_validate.validate(m, version, strict=True)


def test_kubernetes(work, tmp_path, job, rates):
    """What the Job's pods execute, in busybox, with a loop in the controller's place: it starts an
    index again as the manifest says. No container: mounts, users and resources are not checked."""
    engine = Engine(tmp_path, EARLY)
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    for name in "sh", "awk":
        (engine.bin / name).symlink_to("/bin/busybox")
    places = {"/data/list": work.list, "/data/vectors": engine.out, "/models/model.qemb": MODEL}
    command = [*container["command"], *container["args"]]
    for place, here in places.items():
        assert place in command[-1]
        command[-1] = command[-1].replace(place, str(here))
    assert f"n={spec['completions']} " in command[-1]
    fatal = spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    engine.order(KILL, KILL, KILL_PARENT)
    env = engine.env | {"PATH": f"{engine.bin}:/usr/bin:/bin"}
    start, pods = time.time(), 0
    for index in range(spec["completions"]):
        for attempt in range(spec["backoffLimitPerIndex"] + 1):
            pods += 1
            p = engine.run(command, env=env | {"JOB_COMPLETION_INDEX": str(index)})
            assert p.returncode not in fatal
            if p.returncode == 0:
                break
        assert p.returncode == 0, engine.log
    rates.add("Kubernetes' command", time.time() - start)
    engine.shards_are_whole(work)
    assert pods == spec["completions"] + engine.orders


@pytest.mark.parametrize("script", ["parallel.sh", "slurm.sh"])
def test_shellcheck(script):
    subprocess.run(["shellcheck", ENGINES / script], check=True)


def test_examples_are_short():
    for example in ENGINES.iterdir():
        most = 50 if example.suffix == ".yaml" else 40  # with what a pod may not do
        assert len(example.read_text().splitlines()) <= most, example
