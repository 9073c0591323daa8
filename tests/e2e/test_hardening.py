"""What packaging/ promises of a process that a stranger talks to: the systemd unit's score and its
filter of system calls, and the security settings of the Kubernetes manifests."""
import copy
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import GUARD, ROOT, SMALL

SERVE = os.path.abspath(os.environ.get("QEMB_SERVE_BIN", ROOT / "qemb-serve"))
SYSTEMD = pytest.mark.skipif(not shutil.which("systemd-analyze"),
                             reason="systemd-analyze is not there (apt-get install systemd)")
MOST_EXPOSED = 20  # tenths: systemd's exposure level must be below 2.0


# ---- the systemd unit ----------------------------------------------------------------------------


@pytest.fixture
def unit(installed):
    """The installed unit; its program is where it says."""
    return installed / "lib/systemd/system/qemb-serve.service"


def analyze(*args):
    command = ["systemd-analyze", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=GUARD)


def exposure(path):
    """systemd's own figure, 0.0 to 10.0, in tenths."""
    p = analyze("security", "--offline=yes", "--no-pager", path)
    return round(10 * float(re.search(r"exposure level for \S+: ([0-9.]+)", p.stdout)[1]))


@SYSTEMD
def test_the_unit_is_hardly_exposed(unit, tmp_path):
    assert exposure(unit) < MOST_EXPOSED
    weaker = tmp_path / "qemb-serve.service"  # the figure tells what is missing
    weaker.write_text(re.sub(r"(?m)^(System|Restrict|Private).*\n", "", unit.read_text()))
    assert exposure(weaker) > MOST_EXPOSED


@SYSTEMD
def test_systemd_understands_every_line_of_the_unit(unit, tmp_path):
    def complaints(path):
        p = analyze("verify", "--man=no", path)
        return p.stdout + p.stderr

    assert complaints(unit) == ""
    wrong = tmp_path / "qemb-serve.service"
    wrong.write_text(unit.read_text().replace("\nRestrictRealtime=", "\nRestrictRealtimes="))
    assert "RestrictRealtimes" in complaints(wrong)


class Argument(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64),
                ("b", ctypes.c_uint64)]


KILL, ALLOW, MASKED_EQ = 0x80000000, 0x7FFF0000, 7
PROT_WRITE, PROT_EXEC = 2, 4


def system_calls(words):
    """The names of the calls that a value of SystemCallFilter= stands for."""
    names = set()
    for word in words:
        if not word.startswith("@"):
            names.add(word)
            continue
        text = analyze("syscall-filter", word, "--no-pager").stdout
        names |= system_calls(re.findall(r"(?m)^    ([@\w]\S*)$", text))
    return names


def filter_of(text):
    """A function that puts this process under the unit's SystemCallFilter= and
    MemoryDenyWriteExecute=. Here what is forbidden kills, so that no call goes unnoticed."""
    allowed = set()
    for value in re.findall(r"(?m)^SystemCallFilter=(.*)$", text):
        if value.startswith("~"):
            allowed -= system_calls(value[1:].split())
        else:
            allowed |= system_calls(value.split())
    lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    add = lib.seccomp_rule_add_array
    add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    lib.seccomp_load.argtypes = [ctypes.c_void_p]
    context = lib.seccomp_init(KILL)
    wx = PROT_WRITE | PROT_EXEC
    values = {}  # of a call's protection, its third argument: (mask, what may be in it)
    if "\nMemoryDenyWriteExecute=yes" in text:
        values = {"mprotect": [(PROT_EXEC, 0)],
                  "mmap": [(wx, v) for v in (0, PROT_WRITE, PROT_EXEC)]}
        allowed -= {"pkey_mprotect"}
    for name in allowed:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # of another architecture
        for mask, value in values.get(name, [(0, 0)]):
            argument = Argument(2, MASKED_EQ, mask, value)
            count = 1 if name in values else 0
            assert add(context, ALLOW, number, count, ctypes.addressof(argument)) == 0, name

    def load():
        if lib.seccomp_load(context):
            os._exit(99)

    return load


def under(load, *command, **kw):
    return subprocess.Popen(command, preexec_fn=load, **kw)


@SYSTEMD
@pytest.mark.parametrize("table", [(), ("--cpu", "plain")])
def test_the_server_needs_no_system_call_that_the_unit_forbids(unit, table):
    load = filter_of(unit.read_text())
    for forbidden in ("os.sched_setaffinity(0, [0])", "os.chown('/dev/null', 0, 0)",
                      "mmap.mmap(-1, 4096, prot=6)"):
        p = under(load, sys.executable, "-c", f"import mmap, os; {forbidden}")
        assert p.wait(GUARD) == -signal.SIGSYS, forbidden
    p = under(load, SERVE, "-m", SMALL, "--port", "0", "--threads", "2", *table,
              "--reranker", str(ROOT / "tests/fixtures/reranker.qemb"), stderr=subprocess.PIPE)
    try:
        log, ready = {}, 0
        while ready < 2:
            line = p.stderr.readline()
            assert line, p.wait(GUARD)
            line = json.loads(line)
            log[line["event"]] = line
            ready += line["event"] == "ready"
        for path, body in {"/v1/embeddings": {"input": ["a text", "zwei"]},
                           "/v1/rerank": {"query": "a", "documents": ["b"]}}.items():
            c = http.client.HTTPConnection("127.0.0.1", log["listening"]["port"], timeout=GUARD)
            c.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            assert c.getresponse().status == 200
            c.close()
    finally:
        p.terminate()
        p.stderr.read()
        assert p.wait(GUARD) == 0


# ---- Kubernetes ----------------------------------------------------------------------------------


def manifests(path):
    return {m["kind"]: m for m in yaml.safe_load_all(path.read_text())}


SERVER = manifests(ROOT / "packaging" / "kubernetes.yaml")
JOB = manifests(ROOT / "examples" / "engines" / "kubernetes.yaml")
WRITTEN = {"/data"}  # where a Job's vectors go; all else is mounted to be read


def pod_faults(pod):
    """What a pod may do that its work does not need."""
    own, rules = pod.get("securityContext", {}), []
    rules += [("a token of Kubernetes", pod.get("automountServiceAccountToken") is False)]
    rules += [("root", own.get("runAsNonRoot") is True and own.get("runAsUser", 0) > 0)]
    rules += [("seccomp", own.get("seccompProfile") == {"type": "RuntimeDefault"})]
    rules += [(f"the host's {key}", not pod.get(key))
              for key in ("hostNetwork", "hostPID", "hostIPC")]
    rules += [("a path of the host", "hostPath" not in v) for v in pod["volumes"]]
    for c in pod["containers"]:
        s, resources = c.get("securityContext", {}), c.get("resources", {})
        rules += [("privileged", not s.get("privileged"))]
        rules += [("more privileges", s.get("allowPrivilegeEscalation") is False)]
        rules += [("a root to write", s.get("readOnlyRootFilesystem") is True)]
        rules += [("capabilities", s.get("capabilities") == {"drop": ["ALL"]})]
        rules += [("no requests", set(resources.get("requests", {})) == {"cpu", "memory"})]
        rules += [("memory without limit", "memory" in resources.get("limits", {}))]
        rules += [(f"{m['mountPath']} to write", m.get("readOnly") or m["mountPath"] in WRITTEN)
                  for m in c["volumeMounts"]]
    return [name for name, good in rules if not good]


def server_faults(m):
    """What would stop the service when nodes are drained or a model loads slowly."""
    template, faults = m["Deployment"]["spec"]["template"], []
    labels = template["metadata"]["labels"].items()
    for c in template["spec"]["containers"]:
        startup = c.get("startupProbe", {})
        if startup.get("failureThreshold", 0) * startup.get("periodSeconds", 10) < 300:
            faults.append("a slow start is killed")
        faults += [p for p in ("readinessProbe", "livenessProbe") if p not in c]
    budget = m.get("PodDisruptionBudget", {"spec": {"selector": {"matchLabels": {"": ""}}}})["spec"]
    if not budget["selector"]["matchLabels"].items() <= labels or budget.get("maxUnavailable") != 1:
        faults.append("no budget of disruptions")
    if m["HorizontalPodAutoscaler"]["spec"]["minReplicas"] < 2:
        faults.append("one replica")
    return faults


PODS = {"server": SERVER["Deployment"], "job": JOB["Job"]}


@pytest.mark.parametrize("name", PODS)
def test_pods_may_do_only_what_they_need(name):
    pod = PODS[name]["spec"]["template"]["spec"]
    assert pod_faults(pod) == []
    settings = [(pod, k) for k in ("automountServiceAccountToken", "securityContext")]
    settings += [(pod["securityContext"], k)
                 for k in ("runAsNonRoot", "runAsUser", "seccompProfile")]
    for c in pod["containers"]:
        settings += [(c["securityContext"], k) for k in c["securityContext"]]
        settings += [(c["resources"], k) for k in c["resources"]]
        settings += [(m, "readOnly") for m in c["volumeMounts"] if "readOnly" in m]
    for place, key in settings:  # each is seen when it is missing
        kept = place.pop(key)
        assert pod_faults(pod), key
        place[key] = kept


def test_the_service_outlives_drained_nodes_and_slow_starts():
    assert server_faults(SERVER) == []

    def without(*path):
        m = copy.deepcopy(SERVER)
        place = m
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return server_faults(m)

    container = ("Deployment", "spec", "template", "spec", "containers", 0)
    assert without(*container, "startupProbe") and without(*container, "livenessProbe")
    assert without("PodDisruptionBudget")
    assert without("Deployment", "spec", "template", "metadata", "labels", "app")
