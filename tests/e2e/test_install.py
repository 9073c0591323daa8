"""`make install` while a program runs, `make uninstall`, and the completion of shells, in a real
interactive bash."""
import os
import pty
import re
import select
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import GUARD, ROOT, make, options_of

MODEL = ROOT / "tests/fixtures/small.qemb"


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


class Server:
    """qemb-serve on a free port; its log is read until it names the port."""

    def __init__(self, program):
        args = [program, "-m", MODEL, "--port", "0"]
        self.process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r'"event":"listening","port":(\d+)', line):
                self.url = f"http://127.0.0.1:{found[1]}"
                break

    def ask(self):
        """Returns an answer's bytes after its id and times: the vector of one text."""
        request = urllib.request.Request(f"{self.url}/v1/embeddings",
                                         b'{"model": "small", "input": "a text"}',
                                         {"Content-Type": "application/json"})
        until = time.monotonic() + GUARD
        while True:
            try:
                with urllib.request.urlopen(request, timeout=GUARD) as answer:
                    return re.search(rb'"embedding":(\[.*?\])', answer.read())[1]
            except urllib.error.HTTPError as e:  # it loads the model
                assert e.code == 503 and time.monotonic() < until
                time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_install_replaces_what_runs_and_uninstall_leaves_nothing(tmp_path):
    prefix = tmp_path / "prefix"
    stranger = prefix / "share/bash-completion/completions/other"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    make("install", f"PREFIX={prefix}")
    program = prefix / "bin/qemb-serve"
    first = program.stat().st_ino
    with Server(program) as server:
        answer = server.ask()
        for _ in range(2):
            make("install", f"PREFIX={prefix}")
            assert server.ask() == answer
        assert program.stat().st_ino != first
        # The process still has the file that it was started from.
        assert os.stat(f"/proc/{server.process.pid}/exe").st_ino == first
        with Server(program) as new:
            assert new.ask() == answer
        make("uninstall", f"PREFIX={prefix}")
        assert files(prefix) == {stranger.relative_to(prefix).as_posix()}
        assert not [p for p in prefix.rglob("*qemb*")]
        assert server.ask() == answer


def test_install_below_destdir_names_the_final_prefix(tmp_path):
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/a &|b", "LIBDIR=lib/here")
    prefix = tmp_path / "opt/a &|b"
    assert (prefix / "lib/here/libqemb.a").exists()
    assert "prefix=/opt/a &|b\nlibdir=${prefix}/lib/here\n" in (
        prefix / "lib/here/pkgconfig/qemb.pc").read_text()
    assert not re.search("@[A-Z]+@",
                             (prefix / "lib/systemd/system/qemb-serve.service").read_text())
    make("uninstall", f"DESTDIR={tmp_path}", "PREFIX=/opt/a &|b", "LIBDIR=lib/here")
    assert files(tmp_path) == set()


def test_installed_programs_are_stripped_and_the_unit_is_valid(installed):
    for program in "qemb", "qemb-serve":
        sections = subprocess.run(["readelf", "-SW", installed / "bin" / program], check=True,
                                  capture_output=True, text=True).stdout
        assert ".text" in sections
        assert ".symtab" not in sections and ".debug_info" not in sections
    unit = installed / "lib/systemd/system/qemb-serve.service"
    assert f"\nExecStart={installed}/bin/qemb-serve -m " in unit.read_text()
    options = re.findall(r"(?<![\w-])--[a-z-]+", unit.read_text())
    text = subprocess.run([installed / "bin/qemb-serve", "--help"], check=True,
                          capture_output=True, text=True).stdout
    assert options and all(f"{option} " in text for option in options)


def test_a_failed_install_leaves_the_old_file(installed):
    path = installed / "bin/qemb"
    before = path.read_bytes(), path.stat().st_ino
    made = subprocess.run(["make", "-s", "install", f"PREFIX={installed}", "STRIP=false"],
                          cwd=ROOT, capture_output=True, check=False)
    assert made.returncode
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root's make install calls ldconfig")
def test_root_installs_without_sbin_on_its_path(tmp_path):
    path = [p for p in os.environ["PATH"].split(":") if not p.rstrip("/").endswith("sbin")]
    env = {**os.environ, "PATH": ":".join(path)}
    assert not shutil.which("ldconfig", path=env["PATH"])
    subprocess.run(["make", "-s", "install", f"PREFIX={tmp_path}"], cwd=ROOT, env=env, check=True)


def test_a_python_environment_without_pip_is_made_again(tmp_path):
    """An interrupted `python3 -m venv` leaves one."""
    place = tmp_path / "environment"
    place.mkdir()
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$@" >>"$3/made"\ninstall -D "$0" "$3/bin/pip"\n')
    python.chmod(0o755)
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    for _ in range(2):
        make("--eval", f"again:\n\t$(call venv,{place})", "again", path)
        assert (place / "made").read_text() == f"-m venv {place}\n"


def test_packages_have_the_version_of_the_header(installed):
    version = re.search(r'QEMB_VERSION "(.*)"', (ROOT / "qemb.h").read_text())[1]
    changelog = (ROOT / "packaging/debian/changelog").read_text()
    assert re.match(rf"qemb \({re.escape(version)}-\d+\) ", changelog)
    assert f"image: qemb-serve:{version}\n" in (ROOT / "packaging/kubernetes.yaml").read_text()
    assert f"\nVersion: {version}\n" in (installed / "lib/pkgconfig/qemb.pc").read_text()


def test_the_dockerfile_copies_what_make_needs_to_install_packages(tmp_path):
    before = (ROOT / "packaging/image/Dockerfile.cuda").read_text().split("RUN make need-build")[0]
    copies = re.findall(r"^COPY (\S+) (\S+)$", before, re.M)
    for source, folder in copies:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / folder)
    p = subprocess.run(["make", "-n", "need-build"], cwd=tmp_path, capture_output=True, text=True,
                       check=False)
    assert copies and p.returncode == 0 and "libssl-dev" in p.stdout, p.stderr


def test_the_archive_is_made_again_when_a_file_in_it_changes():
    rules = subprocess.run(["make", "-pn", "dist"], cwd=ROOT, capture_output=True, text=True,
                           check=False).stdout
    needs = re.search(r"^build/dist/\S+\.tar\.gz: (build/.*)$", rules, re.M)[1].split()
    rows = (ROOT / "packaging/install.list").read_text().split("\n---\n")[0]
    sources = re.findall(r"^(?:file|text) +(\S+)", rows, re.M)
    assert len(sources) > 5 and {*sources, "LICENSE"} <= {*needs}


APT = """#!/bin/sh
echo "$@" >>$LOG
mkdir $LOG.lock || echo "two at once" >>$LOG
sleep 0.2
rmdir $LOG.lock
"""


@pytest.mark.skipif(not Path("/var/lib/dpkg").exists(), reason="not Debian")
def test_parallel_rules_install_packages_one_after_the_other(tmp_path):
    for name, text in (("apt-get", APT), ("dpkg-query", "#!/bin/sh\n"),
                       ("sudo", '#!/bin/sh\nexec "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    subprocess.run(["make", "-s", "-j4", "need-python", "need-build", "need-world-clients",
                    "need-world-engines"], cwd=ROOT, env=env, check=True, capture_output=True)
    said = log.read_text().splitlines()
    assert "two at once" not in said
    assert sum(line.startswith("install ") for line in said) == 4


# ---- completion --------------------------------------------------------------------------------


class Shell:
    """An interactive bash with the installed completion."""

    def __init__(self, prefix, folder):
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.environ |= {"PATH": f"{prefix}/bin:{os.environ['PATH']}", "TERM": "dumb",
                           "INPUTRC": "/dev/null", "COLUMNS": "5000", "HISTFILE": ""}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        scripts = prefix / "share/bash-completion/completions"
        self.say(f"PS1='READY>'; source {scripts}/qemb; source {scripts}/qemb-serve\n")
        # A TAB lists at once, without a question however long the list is.
        self.say("bind 'set show-all-if-ambiguous on'; bind 'set completion-query-items 0'; "
                 "bind 'set page-completions off'; stty columns 5000\n")

    def say(self, text):
        """Writes text and returns what the shell writes until its next prompt."""
        os.write(self.terminal, text.encode())
        return self.read_until("\nREADY>")

    def read_until(self, end):
        out, until = "", time.monotonic() + GUARD
        while not out.replace("\r", "").endswith(end):
            ready, _, _ = select.select([self.terminal], [], [], until - time.monotonic())
            assert ready, out
            out += os.read(self.terminal, 65536).decode()
        return out.replace("\r", "")

    def complete(self, line):
        """Returns the words that a TAB offers at the end of the line; if it offers one word, the
        arguments as the shell would pass them, with "|" behind each."""
        os.write(self.terminal, line.encode() + (
            b"\t\x01printf 'ARGUMENTS:'; printf '%s|' \x05; echo\n"))
        out = self.read_until("\nREADY>")
        # The lines of the list are those that show neither the prompt nor the line.
        words = [word for text in out.splitlines() for word in text.split()
                 if not any(s in text for s in ("READY>", line.strip(), "ARGUMENTS:"))]
        return sorted(words) or re.search(r"^ARGUMENTS:(.*)$", out, re.M)[1]

    def close(self):
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def shell(installed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    for name in "a model.qemb", "texts.txt", "other.qemb":
        (folder / name).touch()
    (folder / "models").mkdir()
    s = Shell(installed, folder)
    yield s
    s.close()


def test_every_option_is_offered_after_some_command(shell, installed):
    assert set(shell.complete("qemb-serve --")) == options_of(installed, "qemb-serve")
    commands = shell.complete("qemb ")
    assert {"grep", "info", "rerank", "tokenize"} <= set(commands)
    offered = {c: set(shell.complete(f"qemb {c} --")) for c in ["", *commands]}
    assert set().union(*offered.values()) == options_of(installed, "qemb")
    assert "--index" in offered["grep"] and "--index" not in offered[""]
    assert "--output" in offered[""] and "--output" not in offered["grep"]


def choices(prefix, option):
    """The values that the program itself says it wants."""
    said = subprocess.run([prefix / "bin/qemb", "-m", MODEL, option, "?"], capture_output=True,
                          text=True, check=False, input="").stderr
    return sorted(re.search(r"want (.*?)\)", said)[1].split(", "))


def test_values_are_offered(shell, installed):
    for option in "--output", "--input", "--on-error":
        want = choices(installed, option)
        assert shell.complete(f"qemb {option} ") == want
        assert shell.complete(f"qemb {option}=") == want
    assert set(choices(installed, "--math")) <= set(shell.complete("qemb --math "))
    assert shell.complete("qemb --output npy -m mod") == "qemb|--output|npy|-m|models/|"


def test_files_are_offered(shell):
    assert shell.complete("qemb -m other") == "qemb|-m|other.qemb|"
    assert shell.complete("qemb --model=a") == "qemb|--model=a model.qemb|"
    assert shell.complete("qemb-serve --reranker te") == "qemb-serve|--reranker|te|"
    assert shell.complete("qemb-serve --api-key-file te") == "qemb-serve|--api-key-file|texts.txt|"
    assert shell.complete("qemb-serve --gpu-cache ") == "qemb-serve|--gpu-cache|models/|"
    assert shell.complete("qemb grep --query te") == "qemb|grep|--query|texts.txt|"
    assert shell.complete("qemb rerank --query te") == "qemb|rerank|--query|te|"
    assert shell.complete("qemb grep -k 1 words te") == "qemb|grep|-k|1|words|texts.txt|"
