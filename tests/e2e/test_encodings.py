"""Byte order marks and UTF-16, in every text that is read; control characters in messages."""
import gzip
import http.client
import json
import re
import subprocess

import pytest
from helpers import GUARD, QEMB, ROOT, SMALL, stdout_of
from serve_client import SERVE, server

RERANKER = str(ROOT / "tests/fixtures/reranker.qemb")
BOM = b"\xef\xbb\xbf"


def qemb(*args, data=b"", model=("-m", SMALL), **kw):
    return subprocess.run([QEMB, *map(str, args), *model], input=data, capture_output=True,
                          timeout=GUARD, **kw)


# ---- byte order marks --------------------------------------------------------------------------

@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_one_mark_is_dropped(pack):
    for args, text in (((), b"hello\nworld\n"), (("-0",), b"hello\0wor\nld"),
                       (("--input", "jsonl"), b'{"text":"hello"}\n{"text":"x"}')):
        want = stdout_of(qemb(*args, "--dim", 4, data=text))
        assert stdout_of(qemb(*args, "--dim", 4, data=pack(BOM + text))) == want
    plain = stdout_of(qemb(data=b"hello"))
    assert stdout_of(qemb(data=pack(BOM * 2 + b"hello"))) != plain, "one is dropped"
    second = stdout_of(qemb(data=pack(b"a\n" + BOM + b"hello"))).splitlines()[1]
    assert second + b"\n" != plain, "only where the input begins"


def test_a_mark_alone_is_no_record():
    assert stdout_of(qemb(data=BOM)) == b""
    assert len(stdout_of(qemb(data=BOM + b"\n")).splitlines()) == 1
    assert len(stdout_of(qemb(data=BOM[:2] + b"\n"), status=3, errors="1 of 1").splitlines()) == 1


def test_a_mark_of_other_commands(tmp_path):
    text = b"hello\nworld\n"
    for args, model in ((("tokenize",), SMALL), (("rerank", "--query", "hello"), RERANKER)):
        plain, marked = (stdout_of(qemb(*args, data=d, model=("-m", model)))
                         for d in (text, BOM + text))
        assert plain == marked
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "marked").write_bytes(BOM + text)
    for index in ((), ("--index", tmp_path / "i"), ("--index", tmp_path / "i")):
        got = stdout_of(qemb("grep", "-k", 2, "--json", *index, "hello", tmp_path / "marked"))
        lines = [json.loads(g) for g in got.splitlines()]
        assert sorted(x["text"] for x in lines) == ["hello", "world"], "at the right place"
    out = tmp_path / "out"
    files = tmp_path / "plain", tmp_path / "marked"
    stdout_of(qemb("shards", "--quiet", "--out", out, *files), errors="2 made")
    assert (out / "plain.jsonl").read_bytes() == (out / "marked.jsonl").read_bytes()


# ---- UTF-16 ------------------------------------------------------------------------------------

@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(codec, tmp_path):
    text = "hello\nzwölf\n"
    record = '{"text":"hello"}\n'
    for args, data in (((), text), (("--input", "jsonl"), record), (("tokenize",), text)):
        p = qemb(*args, data=data.encode(codec))
        assert stdout_of(p, status=1, errors="standard input: .*UTF-16, want UTF-8") == b""
        assert p.stderr.count(b"\n") == 1
    path = tmp_path / "text"
    path.write_bytes(text.encode(codec))
    assert stdout_of(qemb("grep", "hello", path), status=2, errors="UTF-16") == b""
    p = qemb("shards", "--quiet", "--out", tmp_path / "out", path)
    assert p.returncode == 1 and b"UTF-16" in p.stderr
    assert not list((tmp_path / "out").glob("text*"))


def test_nul_bytes_are_not_utf16():
    """Letters that end with NUL are records; NUL in a text is a character."""
    assert len(stdout_of(qemb("-0", "--dim", 1, data=b"a\0b\0c\0d\0")).splitlines()) == 4
    assert len(stdout_of(qemb("--dim", 1, data=b"a\0bc\0d\n")).splitlines()) == 1
    assert len(stdout_of(qemb("--dim", 1, data=b"a\0\nbc\n")).splitlines()) == 2


# ---- control characters ------------------------------------------------------------------------

CONTROLS = "\x1b[2J\x9b31m\x7f\x85"  # what a terminal might execute


def is_clean(said):
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.decode())


@pytest.mark.parametrize("args, status", [
    (("-m", f"no{CONTROLS}such.qemb"), 2), ((f"--{CONTROLS}",), 1), (("-m", SMALL, CONTROLS), 1),
    (("-m", SMALL, "--prompt", CONTROLS), 2), (("-m", SMALL, "--dim", CONTROLS), 1),
    (("-m", SMALL, "--output", CONTROLS), 1), (("info", "-m", CONTROLS), 2),
    (("grep", "-m", SMALL, "a", CONTROLS), 2), (("shards", "-m", SMALL, "--out", CONTROLS), 1)])
def test_messages_have_no_control_characters(args, status, tmp_path):
    p = qemb(*args, model=(), cwd=tmp_path)
    assert p.returncode == status and p.stderr and is_clean(p.stderr), p.stderr


def test_info_shows_no_control_characters(tmp_path):
    path = tmp_path / f"a{CONTROLS}.qemb"
    path.symlink_to(SMALL)
    got = stdout_of(qemb("info", model=("-m", path)))
    assert is_clean(got) and b"a?[2J?31m??.qemb" in got


def test_errors_of_records_have_no_control_characters():
    key = json.dumps({CONTROLS: 1}, ensure_ascii=False).encode()
    for args in (("--output", "jsonl"), ("--on-error", "skip")):
        p = qemb("--input", "jsonl", *args, data=key.replace(b"\x1b", b"\\u001b"))
        assert p.returncode == 3 and is_clean(p.stdout.replace(b"\n", b"")) and is_clean(p.stderr)


def test_the_server_says_no_control_characters():
    with server("--name", "a" + CONTROLS) as s:
        assert is_clean(s.request("GET", "/v1/models").body)
        got = s.post({"model": CONTROLS, "input": "a", CONTROLS: 1})
        assert got.status == 404 and is_clean(got.body)
        assert is_clean(s.post({"input": "a", "encoding_format": CONTROLS}).body)
    p = subprocess.run([SERVE, "-m", f"no{CONTROLS}.qemb", "--port", "0"], capture_output=True,
                       timeout=GUARD)
    assert p.returncode == 2 and is_clean(p.stderr), p.stderr


# ---- the server --------------------------------------------------------------------------------

def status_for(s, key):
    h = http.client.HTTPConnection("127.0.0.1", s.port, timeout=GUARD)
    h.request("GET", "/v1/models", headers={"Authorization": "Bearer " + key})
    return h.getresponse().status


def test_key_files(tmp_path):
    keys = tmp_path / "keys"
    keys.write_bytes(BOM + b"sk-one\r\n# comment\nsk-two \n" + BOM + b"sk-three")
    keys.chmod(0o600)
    with server("--api-key-file", keys) as s:
        assert [status_for(s, k) for k in ("sk-one", "sk-two", "sk-three", "sk")] == [
            200, 200, 401, 401]


@pytest.mark.parametrize("data, says", [
    ("sk-one\n".encode("utf-16"), b"UTF-16, want UTF-8"),
    ("sk-one\n".encode("utf-16-be"), b"UTF-16, want UTF-8"),
    (b"sk-\0one", b"NUL in a key"), (b"ok\nsk\0\n", b"NUL in a key"),
    (b"k" * 1023, b"too long"), (BOM + b"\n", b"no key in it")])
def test_key_files_that_are_refused(tmp_path, data, says):
    keys = tmp_path / "keys"
    keys.write_bytes(data)
    keys.chmod(0o600)
    p = subprocess.run([SERVE, "-m", SMALL, "--port", "0", "--api-key-file", keys],
                       capture_output=True, timeout=GUARD)
    assert p.returncode == 1 and says in p.stderr, p.stderr


def test_bodies():
    body = json.dumps({"input": "hello"})
    with server() as s:
        want = s.post(body.encode())
        got = s.post(BOM + body.encode())
        assert got.status == 200 and got.json["data"] == want.json["data"]
        for codec in ("utf-16", "utf-16-le", "utf-16-be"):
            got = s.post(body.encode(codec))
            assert got.status == 400 and "UTF-16, want UTF-8" in got.json["error"]["message"]
