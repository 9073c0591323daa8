"""What people install, each started where it will run: the Debian packages in a clean Debian, the
portable archive in an old one, the image without root and with a read-only root. zsh and fish
complete the options.

debootstrap makes the systems; build/world keeps them for the next run, which does not need them."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import ROOT, free_port, make, options_of, run

MODEL = ROOT / "examples/demo.qemb"
CACHE = ROOT / "build" / "world"
TEXT = "play music from the terminal\n"
VARIANTS = [[], ["--math", "int16"], ["--math", "bf16"], ["--math", "int8"], ["--cpu", "plain"]]

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="debootstrap and chroot need root")


def vectors(*args):
    return run(ROOT / "qemb", "-m", MODEL, *args, input=TEXT)


class System:
    """A Debian in a folder, made for one test."""

    def __init__(self, folder, suite):
        self.root, kept = folder / suite, CACHE / f"{suite}.tar"
        if kept.exists():
            self.root.mkdir()
            run("tar", "-xf", kept, "-C", self.root)
            return
        run("debootstrap", "--variant=minbase", suite, self.root)
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = CACHE / f"{suite}.{os.getpid()}.tmp"
        run("tar", "-cf", temporary, "-C", self.root, ".")
        temporary.rename(kept)

    def command(self, *args):
        """The command line that runs a program in there, with /proc and without other processes."""
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child",
                f"--mount-proc={self.root}/proc", "chroot", self.root, *args]

    def run(self, *args, **kwargs):
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
               "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", "HOME": "/root"}
        return run(*self.command(*args), env=env, **kwargs)

    def files(self):
        """All paths but those of apt's and dpkg's own records."""
        records = r"/(proc|sys|dev|tmp)(/|$)|/var/(cache|log|lib/apt|lib/dpkg)/"
        paths = self.run("find", "/", "-xdev").splitlines()
        return {p for p in paths if not re.match(records, p)}


def ask(port):
    """Returns the vector of TEXT from a server on this machine."""
    body = json.dumps({"model": "demo", "input": TEXT.strip()}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body,
                                     {"Content-Type": "application/json"})
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"][0]["embedding"]
        except OSError:  # it starts
            assert time.monotonic() < until
            time.sleep(0.1)


@contextlib.contextmanager
def serving(system, program, model, *args):
    """Starts a server in the system. Yields its port."""
    port = free_port()
    command = system.command(program, "-m", model, "--port", str(port), *args)
    with subprocess.Popen([str(a) for a in command], stderr=subprocess.DEVNULL) as p:
        try:
            yield port
        finally:
            p.kill()  # unshare ignores SIGTERM; what it started dies with it


# ---- Debian packages ---------------------------------------------------------------------------


def test_packages_install_in_a_clean_debian_run_and_leave_nothing(tmp_path):
    make("deb")  # lintian's errors and warnings end it
    system = System(tmp_path, "bookworm")
    (system.root / "debs").mkdir()
    names = ["qemb", "qemb-data", "qemb-serve", "libqemb0", "libqemb-dev"]
    for name in names:
        (deb,) = (ROOT / "build/deb").glob(f"{name}_*.deb")
        shutil.copy(deb, system.root / "debs")
    system.run("apt-get", "update", "-qq")
    before = system.files()
    system.run("sh", "-ec", "apt-get install -qq --no-install-recommends /debs/*.deb")
    version = re.search(r'QEMB_VERSION "(.*)"', (ROOT / "qemb.h").read_text())[1]
    assert system.run("qemb", "--version") == f"qemb {version}\n"
    assert system.run("qemb", "grep", "-k", "1", "puppy", input="a dog\n").endswith("\ta dog\n")
    for args in VARIANTS:
        assert system.run("qemb", "-m", "/usr/share/qemb/demo.qemb", *args,
                          input=TEXT) == vectors(*args)
    with serving(system, "qemb-serve", "/usr/share/qemb/demo.qemb") as port:
        assert ask(port) == json.loads(vectors())
    new = system.files() - before
    for path in ("/usr/lib/systemd/system/qemb-serve.service", "/usr/share/man/man1/qemb.1.gz",
                 "/etc/systemd/system/multi-user.target.wants/qemb-serve.service",
                 "/usr/share/bash-completion/completions/qemb", "/etc/default/qemb-serve",
                 "/usr/share/zsh/vendor-completions/_qemb", "/usr/include/qemb.h",
                 "/usr/lib/x86_64-linux-gnu/libqemb.so", "/usr/lib/x86_64-linux-gnu/libqemb.so.0"):
        assert path in new
    unit = (system.root / "lib/systemd/system/qemb-serve.service").read_text()
    assert "\nExecStart=/usr/bin/qemb-serve " in unit
    system.run("apt-get", "purge", "-qq", "--autoremove", *names)
    assert system.files() == before


# ---- the portable archive ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive():
    make("dist")
    (path,) = (ROOT / "build/dist").glob("*.tar.gz")
    return path


def test_the_archive_runs_in_an_old_debian_and_gives_the_same_bits(archive, tmp_path):
    system = System(tmp_path, "bullseye")
    shutil.copy(ROOT / "qemb", system.root)
    with pytest.raises(AssertionError, match="GLIBC|libcrypto|libjansson"):
        system.run("/qemb", "--version")  # what is not portable
    run("tar", "-xf", archive, "--strip-components=1", "-C", system.root / "usr/local")
    for args in VARIANTS:
        assert system.run("qemb", "-m", "/usr/local/share/qemb/demo.qemb", *args,
                          input=TEXT) == vectors(*args)
    assert system.run("qemb", "grep", "-k", "1", "puppy", input="a dog\n").endswith("\ta dog\n")
    # Sources of names whose modules were built for another glibc, or are not there.
    (system.root / "etc/nsswitch.conf").write_text(
        "hosts: compat mymachines mdns4_minimal [NOTFOUND=return] files dns\n")
    (system.root / "etc/hosts").write_text("127.0.0.1 localhost here\n")
    with serving(system, "qemb-serve", "/usr/local/share/qemb/demo.qemb", "--host", "here") as port:
        assert ask(port) == json.loads(vectors())
        assert system.run("qemb-serve", "--probe", "--host", "here", "--port", str(port)) == ""


def test_the_archive_needs_no_library_and_is_made_again_to_the_byte(archive):
    (folder,) = (p for p in archive.parent.iterdir() if p.is_dir())
    for program in "qemb", "qemb-serve":
        dynamic = run("readelf", "-dl", folder / "bin" / program)
        assert "NEEDED" not in dynamic and "INTERP" not in dynamic
        assert re.search(r"Flags: .*\bNOW\b.*\bPIE\b", dynamic)
    licences = {p.name for p in (folder / "share/doc/qemb/licenses").iterdir()}
    assert {"libc6-dev", "libjansson-dev", "libssl-dev"} <= licences
    first = archive.read_bytes()
    archive.unlink()
    make("dist")
    assert archive.read_bytes() == first


# ---- the image ---------------------------------------------------------------------------------


class Podman:
    """podman with a store of its own. crun refuses a machine with both versions of cgroups, so
    version 2 is hidden from it there."""

    def __init__(self, folder):
        self.base = ["podman", "--root", folder / "store", "--runroot", folder / "run",
                     "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs",
                     "--events-backend", "file", "--runtime", "crun"]

    def __call__(self, *args):
        hidden = "umount /sys/fs/cgroup/unified 2>/dev/null; exec \"$@\""
        return run("unshare", "--mount", "sh", "-c", hidden, "sh", *self.base, *args)


@pytest.fixture
def podman():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # podman wants a short path
        yield Podman(Path(folder))


def test_the_image_serves_without_root_and_with_a_read_only_root(archive, podman):
    line = " ".join(map(str, [*podman.base, "build", "--isolation", "chroot", "--format",
                              "docker"]))
    make("image", f"BUILD_IMAGE={line}")
    (image,) = json.loads(podman("images", "--format", "json"))
    name = image["Names"][0]
    assert image["Size"] < 30e6
    command = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges",
               "--network", "host", "--cgroups", "disabled", "--ulimit", "nofile=1024:1024",
               "--ulimit", "nproc=1024:1024", name]
    port = free_port()
    box = podman("run", "--detach", *command, "-m", "/usr/local/share/qemb/demo.qemb", "--port",
                 str(port)).strip()
    try:
        assert ask(port) == json.loads(vectors())
        (state,) = json.loads(podman("inspect", box))
        assert state["HostConfig"]["ReadonlyRootfs"]
        process = Path(f"/proc/{state['State']['Pid']}/status").read_text()
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", process, re.M)
        assert re.search(r"^CapEff:\t0+$", process, re.M)
        health = state["Config"]["Healthcheck"]["Test"]
        assert health == ["CMD", "/usr/local/bin/qemb-serve", "--probe"]
        assert podman("exec", box, *health[1:], "--port", str(port)) == ""
        with pytest.raises(AssertionError, match="no answer"):
            podman("exec", box, *health[1:], "--port", str(free_port()))
    finally:
        podman("rm", "--force", "--time", "5", box)
    assert podman("run", "--rm", "--entrypoint", "/usr/local/bin/qemb", *command,
                  "--version").startswith("qemb ")


# ---- completion --------------------------------------------------------------------------------


def fish(prefix, line):
    """Returns what fish offers at the end of the line."""
    setup = (f"set -p PATH {prefix}/bin; "
             f"set -p fish_complete_path {prefix}/share/fish/vendor_completions.d; ")
    out = run("fish", "--no-config", "-c", f"{setup} complete -C '{line}'", cwd=prefix)
    return {text.split("\t")[0] for text in out.splitlines()}


ZSH = """
zmodload zsh/zpty
zpty -b z zsh -f -i
zpty -w z "PATH=$1/bin:\\$PATH; fpath=($1/share/zsh/site-functions \\$fpath); LISTMAX=100000"
zpty -w z "autoload -Uz compinit; compinit -u -D; stty columns 1000 rows 1000; PS1='>'"
zpty -w z "zstyle ':completion:*' verbose no; cd $1; bindkey '^D' list-choices"
zpty -w z "echo RE''ADY"
zpty -r -m z ready '*READY*'
zpty -w -n z "$2"$'\\x04\\x15'
zpty -w z "echo DO''NE"
zpty -r -m z out '*DONE*'
print -r -- $out
"""


def zsh(prefix, line):
    """Returns the words that an interactive zsh shows at the end of the line."""
    out = run("zsh", "-f", "-c", ZSH, "zsh", prefix, line)
    out = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", " ", out)  # what moves the cursor
    return set(re.findall(r"(?<![\w./-])[\w./-]+", out))


def test_fish_completes_what_the_programs_have(installed):
    assert fish(installed, "qemb-serve --") == options_of(installed, "qemb-serve")
    commands = ["", *fish(installed, "qemb ")]
    assert {"grep", "info", "rerank"} <= set(commands)
    offered = {c: fish(installed, f"qemb {c} --") for c in commands}
    assert set().union(*offered.values()) == options_of(installed, "qemb")
    assert "--index" in offered["grep"] and "--index" not in offered[""]
    assert {"json", "npy"} <= fish(installed, "qemb --output ")
    assert fish(installed, "qemb-serve --gpu-cache sh") == {"share/"}
    assert "share/qemb/demo.qemb" in fish(installed, "qemb -m share/qemb/d")


def test_zsh_completes_what_the_programs_have(installed):
    assert options_of(installed, "qemb-serve") <= zsh(installed, "qemb-serve --")
    commands = {"grep", "info", "rerank", "shards", "tokenize"}
    assert commands <= zsh(installed, "qemb ")
    offered = {c: zsh(installed, f"qemb {c} --") for c in ["", *commands, "plan", "check"]}
    assert options_of(installed, "qemb") <= set().union(*offered.values())
    assert "--index" in offered["grep"] and "--index" not in offered[""]
    assert {"json", "npy"} <= zsh(installed, "qemb --output ")
    assert "demo.qemb" in zsh(installed, "qemb -m share/qemb/")
