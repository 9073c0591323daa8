"""convert_weights.py: what it writes, read back by independent code, and what it refuses."""
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import hf_fixture as hf
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import convert_weights  # noqa: E402

TINY = ROOT / "tests/golden/hf-tiny"
SHAPE = dict(layers=2, hidden=24, heads=4, kv=2, hd=10, ffn=20, vocab=300, max=64)
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "t"), ("Ġt", "h")]
ADDED = (hf.EOS, "<think>", "é中")
OTHER = "layers.0.mlp.up_proj.weight"
NO_TOKEN = 0xFFFFFFFF
PLAIN = dict(kind=0, pooling=0, attention=0, dense_rows=0, activation=0, window=0)
JUDGE = ('<|im_start|>system\nJudge whether the Document meets the requirements based on the Query '
         'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
         "<|im_start|>user\n")
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"


# ---- a reader of .qemb files, after qemb.h -----------------------------------------------------


def significant_bits(halves):
    """8 if every number is an integer below 2^8 times a power of two, else 11."""
    eighths = np.frexp(halves.astype("f8"))[0] * 256
    return 8 if (eighths == np.rint(eighths)).all() else 11


class Qemb:
    """Reads a .qemb file as qemb.h describes it, and asserts every rule stated there."""

    DTYPES = {0: "u1", 1: "<u4", 2: "<f4", 3: "<f2", 4: "i1"}

    def __init__(self, path):
        b = Path(path).read_bytes()
        assert b[:8] == b"qemb\r\n\x1a\n"
        version, order, size, check, n, zero = struct.unpack_from("<IIQQII", b, 8)
        assert (version, order, size, zero) == (1, 0x01020304, len(b), 0)
        assert b[40:72] == hashlib.sha256(b[4096:]).digest()
        self.sha256 = b[40:72].hex()
        keys = "n_layers hidden n_heads n_kv_heads head_dim ffn vocab max_positions eos_id".split()
        self.config = dict(zip(keys, struct.unpack_from("<9I", b, 72)))
        self.rope_theta, self.norm_eps = struct.unpack_from("<2f", b, 108)
        keys = "kind pooling attention dense_rows activation window".split()
        self.use = dict(zip(keys, struct.unpack_from("<6I", b, 116)))
        keys = "architecture bos_id pad_id first_position".split()
        self.encoder = dict(zip(keys, struct.unpack_from("<4I", b, 148)))
        assert not any(b[164:4096]) and (self.encoder["architecture"] == 1 or not any(b[148:164]))
        h = 0xCBF29CE484222325
        for byte in b[:24] + bytes(8) + b[32 : 4096 + 96 * n]:
            h = ((h ^ byte) * 0x100000001B3) % (1 << 64)
        assert h == check

        self.sections, self.bits, end = {}, {}, 4096 + 96 * n
        tables = 0xCBF29CE484222325
        for i in range(n):
            name, dtype, bits, rows, cols, at, size, zero8 = struct.unpack_from(
                "<48sIIQQQQQ", b, 4096 + 96 * i)
            assert zero8 == 0
            assert at % 256 == 0 and 0 <= at - end < 256 and not any(b[end:at])
            data = np.frombuffer(b, self.DTYPES[dtype], rows * cols, at).reshape(rows, cols)
            assert data.nbytes == size
            name = name.rstrip(b"\0").decode()
            self.sections[name], self.bits[name] = data, bits
            assert bits in (0, significant_bits(data) if dtype == 3 else 0)
            end = at + size
            for byte in b[at:end] if rows == 1 or name == "merges" else b"":
                tables = ((tables ^ byte) * 0x100000001B3) % (1 << 64)
        assert struct.unpack_from("<Q", b, 140)[0] in (tables, 0)  # 0: an older file
        assert end == len(b)
        assert list(self.sections) == self.expected_names()
        self.added = self.read_added(self.sections["added_tokens"].tobytes())
        strings = self.sections["prompts"].tobytes().decode().split("\0")
        assert strings.pop() == ""
        self.prompts = dict(zip(strings[::2], strings[1::2], strict=True))
        self.provenance = self.sections["provenance"].tobytes().decode()
        assert all(re.match(r"[a-z]+: .", line) for line in self.provenance.splitlines())

    def expected_names(self):
        if self.encoder["architecture"]:
            return self.encoder_names()
        layer = "attn_norm wqkv q_norm k_norm wo mlp_norm wgu wdown".split()
        if self.sections["layers.0.wqkv"].dtype == "i1":
            layer = [n for t in layer for n in ([t] if "norm" in t else [t, t + ".scale"])]
        layers = [f"layers.{i}.{t}" for i in range(self.config["n_layers"]) for t in layer]
        dense = ["dense", "dense_bias"] if self.use["dense_rows"] else []
        return ["merges", "added_tokens", "prompts", "provenance", "tok_emb", *layers, "final_norm",
                *dense]

    def encoder_names(self):
        matrices = "wqkv wo wup wdown".split()
        if self.sections["layers.0.wqkv"].dtype == "i1":
            matrices = [f"{m} {m}.scale" for m in matrices]
        layer = ("{} bqkv {} bo attn_norm attn_norm_bias {} bup {} bdown mlp_norm mlp_norm_bias"
                 ).format(*matrices).split()
        layers = [f"layers.{i}.{t}" for i in range(self.config["n_layers"]) for t in layer]
        dense = ["dense", "dense_bias"] if self.use["dense_rows"] else []
        return ["unigram", "added_tokens", "prompts", "provenance", "tok_emb", "pos_emb",
                "emb_norm", "emb_norm_bias", *layers, *dense]

    def read_added(self, b):
        """(id, text) of each token, and True if it takes the white space before it."""
        tokens, at = [], 0
        while at < len(b):
            i, n = struct.unpack_from("<II", b, at)
            strips = (True,) * (n >> 31)
            assert not strips or self.encoder["architecture"]
            n &= (1 << 31) - 1
            tokens.append((i, b[at + 8 : at + 8 + n].decode(), *strips))
            end = at + 8 + n
            at = -(-end // 4) * 4
            assert not any(b[end:at])
        assert at == len(b)
        return tokens


def read_source(folder):
    """name without 'model.' -> float32 array, from all safetensors files. Shares no code with the
    converter's reader."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        b = path.read_bytes()
        n = struct.unpack_from("<Q", b)[0]
        for name, t in json.loads(b[8 : 8 + n]).items():
            if name == "__metadata__":
                continue
            low, high = (8 + n + x for x in t["data_offsets"])
            raw = b[low:high]
            if t["dtype"] == "BF16":
                raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
            w = np.frombuffer(raw, "<f2" if t["dtype"] == "F16" else "<f4").astype("f4")
            tensors[name.removeprefix("model.")] = w.reshape(t["shape"])
    return tensors


def expected_weights(t, layers):
    """Section -> the source's numbers in it."""
    want = {"tok_emb": t["embed_tokens.weight"], "final_norm": t["norm.weight"][None]}
    for i in range(layers):
        def get(*names):
            return np.concatenate([t[f"layers.{i}.{n}.weight"] for n in names])

        want |= {f"layers.{i}.{k}": v for k, v in {
            "attn_norm": get("input_layernorm")[None], "q_norm": get("self_attn.q_norm")[None],
            "k_norm": get("self_attn.k_norm")[None],
            "wqkv": get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "wo": get("self_attn.o_proj"), "mlp_norm": get("post_attention_layernorm")[None],
            "wgu": get("mlp.gate_proj", "mlp.up_proj"), "wdown": get("mlp.down_proj")}.items()}
    return want


def assert_weights(q, folder):
    want = expected_weights(read_source(folder), q.config["n_layers"])
    for name, w in want.items():
        got = q.sections[name]
        vector = name.endswith("norm")
        assert got.dtype == ("<f4" if vector else "<f2"), name
        assert got.shape == w.shape, name
        assert got.tobytes() == w.astype("<f4" if vector else "<f2").tobytes(), name
    assert set(q.sections) - set(want) - {"dense", "dense_bias"} == {
        "merges", "added_tokens", "prompts", "provenance"}


# ---- sources and runs --------------------------------------------------------------------------


def weights(dtype="BF16", prefix="model.", **changes):
    """name -> (dtype, shape, bytes) of a small random model."""
    return {name: (d, shape, b"".join(blocks)) for name, (d, shape, blocks) in
            hf.random_tensors(SHAPE | changes, 7, dtype, prefix=prefix).items()}


def save(path, tensors):
    hf.save_safetensors(path, {name: (d, s, [data]) for name, (d, s, data) in tensors.items()})


def save_shards(folder, tensors, count=3):
    """The tensors in `count` files with an index -> the index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, where = list(tensors), {}
    for i in range(count):
        shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save(folder / shard, part)
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    hf.save_json(folder / "model.safetensors.index.json", index)
    return index


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a valid source with one BF16 file, and runs the test in an empty directory."""
    d = tmp_path / "source"
    d.mkdir()
    hf.save_json(d / "config.json", hf.config_json(SHAPE))
    hf.save_json(d / "tokenizer.json", hf.tokenizer_json(MERGES, ADDED))
    hf.save_sentence_transformers(d, SHAPE["hidden"])
    save(d / "model.safetensors", weights())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return d


def run(*args):
    """convert_weights.py in this process. SystemExit carries what goes to stderr."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
            convert_weights.main()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def convert(folder, *args):
    run(folder, "--out", "out.qemb", *args)
    assert os.listdir() == ["out.qemb"]
    return Qemb("out.qemb")


def refused(*args):
    """Returns the one line of the error. Checks that no file is left."""
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as e:
        run(*args)
    message = e.value.code
    assert isinstance(message, str), "a string is what sys.exit prints before it exits 1"
    assert message.startswith("convert_weights.py: ") and "\n" not in message
    assert sorted(os.listdir()) == before
    return message.removeprefix("convert_weights.py: ")


def edit(path, change):
    """change(the JSON value) in place; a value that it returns replaces the old one."""
    j = json.loads(path.read_text(encoding="utf-8"))
    replaced = change(j)
    path.write_text(json.dumps(j if replaced is None else replaced), encoding="utf-8")


# ---- what it writes ----------------------------------------------------------------------------


def test_golden_is_reproduced(tmp_path, monkeypatch):
    """A directory saved by transformers (BF16, two shards) gives the committed bytes, but for what
    an older converter did not write."""
    monkeypatch.chdir(tmp_path)
    q = convert(TINY, "--note", "random weights", "-q")
    assert_weights(q, TINY)
    got, want = (bytearray(p.read_bytes()) for p in (tmp_path / "out.qemb",
                                                     TINY.parent / "hf-tiny.qemb"))
    for b in got, want:  # the golden has no significant bits, and so other digests
        b[24:32], b[40:72] = bytes(8), bytes(32)
        for i in range(struct.unpack_from("<I", b, 32)[0]):
            b[4096 + 96 * i + 52 : 4096 + 96 * i + 56] = bytes(4)
    assert got == want
    assert q.config == dict(n_layers=2, hidden=32, n_heads=2, n_kv_heads=1, head_dim=32, ffn=48,
                            vocab=512, max_positions=200, eos_id=500)
    assert q.rope_theta == np.float32(1e6) and q.norm_eps == np.float32(1e-6)
    assert q.prompts == {"query": hf.QUERY, "document": ""}
    assert q.use == PLAIN


# What differs from Qwen3-Embedding in a golden: the header, the token at a text's end
RELATIVES = {
    "harrier": ({}, 500), "f2llm": ({}, 504), "octen": ({}, 500), "jina-v5": ({}, 500),
    "pplx": (dict(pooling=1, attention=1, dense_rows=32, activation=1), NO_TOKEN),
    "voyage": (dict(pooling=1, attention=1, dense_rows=64), NO_TOKEN),
    "dense": (dict(dense_rows=24, activation=1), 500),
    "whole": (dict(pooling=1, attention=1), 500),
}


@pytest.mark.parametrize("name", ["hf-tiny", "gqa1", "gqa2", "gqa4", "square", "massive", "demo",
                                  *RELATIVES])
def test_committed_goldens_are_sound(name):
    """NAME.qemb, and NAME.vec in the form that tests/fixtures/make_golden.py documents."""
    q = Qemb(ROOT / f"tests/golden/{name}.qemb")
    assert ("note: random weights\n" in q.provenance) == (name != "demo")
    if name == "pplx":
        assert q.prompts == {"query": "", "document": ""}
    lines = (ROOT / f"tests/golden/{name}.vec").read_text().splitlines()
    head = dict(line.split(" ", 1) for line in lines[:7])
    assert lines[0] == "golden 1" and head["model"] == name
    use, end = RELATIVES.get(name, ({}, q.config["eos_id"]))
    assert (q.use, q.config["eos_id"]) == (PLAIN | use, end)
    assert int(head["dim"]) == (q.use["dense_rows"] or q.config["hidden"])
    assert (float.fromhex(head["max_swiglu"]) > 65504) == (name == "massive")
    assert 0 < float.fromhex(head["f32_diff"]) < 1e-6  # float32 did no worse than a few roundings
    cases = [lines[i : i + 5] for i in range(7, len(lines), 5)]
    assert len(cases) == int(head["cases"])
    lengths = set()
    for label, text, ids, norm, vec in (map(str.split, case) for case in cases):
        assert [line[0] for line in (label, text, ids, norm, vec)] == [
            "case", "text", "ids", "norm", "vec"]
        assert int(text[1]) == (len(bytes.fromhex("".join(text[2:]))) if "length" not in label[1]
                                else -1)
        assert int(ids[1]) == len(ids) - 2 <= q.config["max_positions"]
        assert end in (int(ids[-1]), NO_TOKEN) and max(map(int, ids[2:])) < q.config["vocab"]
        lengths.add(int(ids[1]))
        v = np.array([float.fromhex(x) for x in vec[2:]])
        assert len(v) == int(vec[1]) == int(head["dim"])
        # Rounding to float32 changes a number by 2^-24 of it at most, its square by twice that.
        assert abs(v @ v - 1) <= 2.0**-23 * (1 + 1e-6) and float.fromhex(norm[1]) > 0
    assert lengths >= {1, 2, 3, 17, 63, 64, 65, 128, 129, 199, 200}


def test_committed_reranker_is_sound():
    """reranker.qemb and reranker.jsonl. Each kind of pair is there."""
    q = Qemb(ROOT / "tests/golden/reranker.qemb")
    assert q.use == PLAIN | dict(kind=1, dense_rows=1, window=256)
    assert q.prompts == {"prefix": JUDGE, "suffix": ANSWER, "instruct": TASK}
    text = (ROOT / "tests/golden/reranker.jsonl").read_text(encoding="utf-8")
    pairs = list(map(json.loads, text.splitlines()))
    assert len(pairs) == 1000 and len(text) < 400_000
    scores = np.array([p["score"] for p in pairs])
    assert (0 < scores).all() and (scores < 1).all() and scores.std() > 0.05
    assert sum(p["tokens"] == 256 for p in pairs) >= 50 and max(p["tokens"] for p in pairs) == 256
    assert {p["tokens"] for p in pairs} >= {254, 255}
    assert sum(not p["document"] for p in pairs) >= 40 and any(not p["query"] for p in pairs)
    assert {p.get("instruct") for p in pairs} >= {None, ""}
    for token in "<|im_end|>", "<|endoftext|>", "<think>":
        assert any(token in p["document"] for p in pairs)


def test_small_model_says_that_it_is_random():
    q = Qemb(ROOT / "tests/fixtures/small.qemb")
    assert "note: random weights, untrained" in q.provenance
    assert q.prompts == {"query": hf.QUERY, "document": ""}


def test_small_reranker():
    q = Qemb(ROOT / "tests/fixtures/reranker.qemb")
    assert "note: random weights, untrained" in q.provenance
    assert q.use == PLAIN | dict(kind=1, dense_rows=1, window=2048)
    assert q.prompts == {"prefix": JUDGE, "suffix": ANSWER, "instruct": TASK}
    assert q.config["eos_id"] == NO_TOKEN


def test_every_field(folder):
    q = convert(folder)
    assert_weights(q, folder)
    assert q.config == dict(n_layers=2, hidden=24, n_heads=4, n_kv_heads=2, head_dim=10, ffn=20,
                            vocab=300, max_positions=64, eos_id=260)
    assert q.rope_theta == np.float32(1e6) and q.norm_eps == np.float32(1e-6)
    # 'a' is byte 97, the 65th printable one after '!'; U+0120 stands for the space, byte 32
    a, space = 97 - 33, 188 + 32
    assert q.sections["merges"].tolist() == [[a, a + 1], [256, a + 2], [space, a + 19],
                                             [258, a + 7]]
    assert q.added == [(260, hf.EOS), (261, "<think>"), (262, "é中")]
    assert q.prompts == {"query": hf.QUERY, "document": ""}
    lines = q.provenance.splitlines()
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    size = (folder / "model.safetensors").stat().st_size
    assert lines[0] == "source: source"
    assert f"file: tokenizer.json sha256 {digest}" in lines
    assert f"file: model.safetensors {size} bytes" in lines
    assert "weights: BF16 to f16" in lines and "pooling: last token" in lines
    assert lines[-1] == f"converter: convert_weights.py {convert_weights.VERSION}"


def test_version_is_the_projects():
    version = re.search(r'QEMB_VERSION "(.*)"', (ROOT / "qemb.h").read_text())[1]
    assert convert_weights.VERSION == version


def test_byte_alphabet_follows_its_definition():
    """Printable bytes stand for themselves and come first; the others follow from U+0100 on."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173)]
    alphabet = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    vocab = {ch: i for i, ch in enumerate(alphabet)}
    assert convert_weights.read_merges({"vocab": vocab, "merges": []}).shape == (0, 2)


def test_int8(folder, capsys, monkeypatch):
    """Groups of 64 columns; the last group of a row has the rest: 72 = 64 + 8, 130 = 2 * 64 + 2,
    40."""
    monkeypatch.setattr(convert_weights, "BLOCK", 300)  # a matrix in many pieces
    wide = dict(hidden=72, ffn=130)
    edit(folder / "config.json", lambda j: hf.config_json(SHAPE | wide))
    tensors = weights("F32", **wide)
    put(tensors, "model." + OTHER, 3, 7.0)
    dtype, shape, data = tensors["model.layers.1.self_attn.v_proj.weight"]
    zeros = data[:256] + bytes(32) + data[288:]  # the second group of its first row
    tensors["model.layers.1.self_attn.v_proj.weight"] = dtype, shape, zeros
    save(folder / "model.safetensors", tensors)
    q = convert(folder, "--dtype", "int8")
    worst = 0
    for name, w in expected_weights(read_source(folder), q.config["n_layers"]).items():
        got, scale = q.sections[name], q.sections.get(name + ".scale")
        if scale is None:
            assert name.endswith("norm") or name == "tok_emb"
            assert got.tobytes() == w.astype(got.dtype).tobytes()
            continue
        starts = range(0, w.shape[1], 64)
        assert got.dtype == "i1" and got.shape == w.shape and scale.shape == (len(w), len(starts))
        h = w.astype("<f2").astype("f8")  # what an F16 file has
        for s, at in zip(scale.T[:, :, None].astype("f8"), starts, strict=True):
            group, codes = h[:, at : at + 64], got[:, at : at + 64]
            largest = np.abs(group).max(axis=1, keepdims=True)
            # one rounding of the quotient
            assert (np.abs(s * 127 - largest) <= 2.0**-24 * largest).all(), name
            assert (np.abs(codes).max(axis=1, keepdims=True) == 127 * (largest > 0)).all(), name
            # half a step, and the roundings of 127 / largest, its product and the scale, at 127
            assert (np.abs(codes * s - group) <= s * (0.5 + 127 * 3 * 2.0**-24)).all(), name
            worst = max(worst, np.abs(codes * s - w[:, at : at + 64]).max())
    assert q.sections["layers.1.wqkv.scale"][-shape[0], 1] == 0
    assert q.bits.pop("tok_emb") == 11 and not any(q.bits.values())
    out = capsys.readouterr().out
    shown = float(re.search(r"rounding   at most (\S+) at model." + OTHER, out)[1])
    assert abs(shown - worst) <= 0.01 * worst
    assert "F32 to int8 matrices" in out and "weights: F32 to int8\n" in q.provenance


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("shards", [0, 3])
def test_dtypes_prefixes_shards(folder, dtype, prefix, shards):
    tensors = weights(dtype, prefix)
    if shards:
        save_shards(folder, tensors, shards)
    else:
        save(folder / "model.safetensors", tensors)
    q = convert(folder)
    assert_weights(q, folder)
    assert recorded(q) == dict.fromkeys(recorded(q), 8 if dtype == "BF16" else 11)


def recorded(q):
    """Matrix -> its significant bits."""
    return {name: bits for name, bits in q.bits.items() if q.sections[name].dtype == "<f2"}


def of_8_bits(dtype):
    """The weights of a BF16 model in F16 or F32."""
    return {name: (dtype, shape, hf.to_bytes(np.frombuffer(
        b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)), "<f4"), dtype))
        for name, (_, shape, data) in weights().items()}


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("row", [0, 19])
def test_one_number_of_9_bits(folder, monkeypatch, dtype, row):
    """At the beginning or in the last block of the second tensor of a matrix."""
    monkeypatch.setattr(convert_weights, "BITS_BLOCK", 2 * SHAPE["hidden"])
    tensors = of_8_bits(dtype)
    save(folder / "model.safetensors", tensors)
    assert set(recorded(convert(folder)).values()) == {8}
    put(tensors, "model." + OTHER, row * SHAPE["hidden"] + 5, 1 + 2.0**-8)
    save(folder / "model.safetensors", tensors)
    got = recorded(convert(folder))
    assert got.pop("layers.0.wgu") == 11 and set(got.values()) == {8}


@pytest.mark.filterwarnings("error")
def test_significant_bits_of_a_refused_number(folder):
    """They are looked for first, and overflow silently."""
    tensors = of_8_bits("F32")
    put(tensors, "model." + OTHER, 5, 2.0**20)
    save(folder / "model.safetensors", tensors)
    assert "number (got 1.04858e+06, want a finite one" in refused(folder)


def test_bf16_below_the_range_of_fp16(folder):
    """Halves below 2^-14 lose the last bits of a BF16 number; what rounds up has fewer."""
    tensors = weights()
    for k in range(40):
        put(tensors, "model." + OTHER, k, (1 + k % 2 * 127 / 128) * 2.0 ** -(10 + k // 2))
    save(folder / "model.safetensors", tensors)
    assert set(recorded(convert(folder)).values()) == {8}  # Qemb compares it with the numbers


def test_many_blocks(folder, monkeypatch):
    """Blocks of a few rows, the last one short, give the same file as one block per tensor."""
    whole = convert(folder).sha256
    monkeypatch.setattr(convert_weights, "BLOCK", 7 * SHAPE["hidden"] + 1)
    assert convert(folder).sha256 == whole
    monkeypatch.setattr(convert_weights, "BLOCK", 1)
    assert convert(folder).sha256 == whole


def test_same_source_same_bytes(folder, tmp_path):
    convert(folder)
    first = Path("out.qemb").read_bytes()
    other = tmp_path / "elsewhere" / "source"
    shutil.copytree(folder, other)
    convert(other)
    assert Path("out.qemb").read_bytes() == first


def test_default_name_and_quiet(folder, capfd):
    run(folder, "-q")
    assert os.listdir() == ["source.qemb"]
    Qemb("source.qemb")
    assert capfd.readouterr() == ("", "")


def test_dot_is_a_directory_with_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(".", "-q")
    assert Path("source.qemb").is_file()


def test_existing_output_is_replaced(folder):
    Path("out.qemb").write_bytes(b"old")
    convert(folder)


def test_permissions_follow_the_umask(folder):
    old = os.umask(0o027)
    try:
        convert(folder)
    finally:
        os.umask(old)
    assert os.stat("out.qemb").st_mode & 0o777 == 0o640


def test_summary(folder, capsys):
    q = convert(folder, "--note", "two\nlines")
    out, err = capsys.readouterr()
    assert err == ""
    sources = read_source(folder)
    parameters = sum(w.size for w in sources.values())
    assert out.startswith(f"out.qemb: {Path('out.qemb').stat().st_size:,} bytes in ")
    assert f"{len(sources)}, {parameters:,} parameters, BF16 to f16" in out
    assert "tokenizer  4 merges, end-of-text 260" in out and "prompts    query, document" in out
    assert f"sha256     {q.sha256}" in out
    assert q.provenance.endswith("note: two lines\n")


def model_line(folder, capsys, *args):
    run(folder, "--out", "out.qemb", *args)
    return re.search(r"^  model      (.*)$", capsys.readouterr().out, re.M)[1]


def test_summary_of_the_model(folder, capsys):
    assert model_line(folder, capsys) == "embedding, last, causal, longest text 64"
    add_dense(folder)
    edit(folder / "1_Pooling/config.json", mean_pooling)
    edit(folder / "config.json", setting("is_causal", False))
    hf.save_json(folder / "sentence_bert_config.json", {"max_seq_length": 20})
    assert model_line(folder, capsys) == (
        "embedding, mean, bidirectional, dense 6 tanh, longest text 20")
    edit(folder / "2_Dense/config.json",
         setting("activation_function", "torch.nn.modules.linear.Identity"))
    assert ", dense 6, longest" in model_line(folder, capsys)


def test_summary_of_a_reranker(reranker, capsys):
    assert model_line(reranker, capsys) == "reranker, last, causal, longest text 64"


def number(value, dtype):
    return hf.to_bytes(np.array([value], "f4"), dtype)


def put(tensors, name, at, value):
    """Sets one number of a tensor."""
    dtype, shape, data = tensors[name]
    size = len(number(0, dtype))
    data = data[: at * size] + number(value, dtype) + data[(at + 1) * size :]
    tensors[name] = (dtype, shape, data)


@pytest.fixture
def zeros(monkeypatch):
    """Most weights of the test are zeros, which give no vector: qemb does not try the new file."""
    monkeypatch.setattr(convert_weights, "QEMB", "/nonexistent")


def test_edge_values_and_rounding(folder, capsys, zeros):
    """BF16 -> FP16 by hand: exact from 2^-14 up, ties to even below; and what the summary says."""
    dtype, shape, data = weights()["model." + OTHER]
    cases = [
        (0.0, 0.0), (-0.0, -0.0), (65280.0, 65280.0), (-65280.0, -65280.0),
        (2.0**-14, 2.0**-14), (1.9921875 * 2.0**-14, 1.9921875 * 2.0**-14),
        (2.0**-24, 2.0**-24), (255 * 2.0**-24, 255 * 2.0**-24),  # subnormal and exact
        (2.0**-25, 0.0),  # tie, to even
        (3 * 2.0**-25, 2.0**-23),  # tie, to even
        (1.0078125 * 2.0**-25, 2.0**-24),  # above the tie
        (-(255 * 2.0**-25), -(2.0**-17)),  # 127.5 steps: tie, to 128
        (2.0**-40, 0.0), (-1e-38, -0.0), (2.0**-133, 0.0),  # BF16's own subnormals too
    ]
    values = np.zeros(shape[0] * shape[1], "f4")
    values[: len(cases)] = [v for v, _ in cases]
    tensors = {n: (d, s, bytes(len(b))) for n, (d, s, b) in weights().items()}
    tensors["model." + OTHER] = (dtype, shape, hf.to_bytes(values, "BF16"))
    save(folder / "model.safetensors", tensors)
    got = convert(folder).sections["layers.0.wgu"][SHAPE["ffn"] :].ravel()
    want = np.array([w for _, w in cases], "<f2")
    assert got[: len(cases)].tobytes() == want.tobytes()  # bytes: -0.0 is not 0.0
    out = capsys.readouterr().out
    # The four ties and near-ties have an error of 2^-25 or slightly less, the last three of their
    # own magnitude.
    assert f"at most {2.0**-25:.3g} at model.{OTHER}[0, 8]; 7 numbers below 2^-14" in out


def test_f32_rounds_and_says_where(folder, capsys, monkeypatch, zeros):
    monkeypatch.setattr(convert_weights, "BLOCK", 2 * SHAPE["hidden"])  # rows count over blocks
    tensors = weights("F32", "")
    tensors = {n: (d, s, bytes(len(b))) for n, (d, s, b) in tensors.items()}
    put(tensors, OTHER, 5 * SHAPE["hidden"] + 3, 4097.0)  # FP16 has steps of 4 there
    put(tensors, OTHER, 6 * SHAPE["hidden"], 65504.0)
    put(tensors, OTHER, 0, 2.0**-14 - 2.0**-26)  # rounded, and tiny
    put(tensors, OTHER, 1, 2.0**-14 + 2.0**-26)  # rounded, not tiny
    put(tensors, "norm.weight", 2, 1e30)  # a vector stays FP32
    save(folder / "model.safetensors", tensors)
    q = convert(folder)
    w = q.sections["layers.0.wgu"]
    assert w[SHAPE["ffn"] + 5, 3] == 4096 and w[SHAPE["ffn"] + 6, 0] == 65504
    assert q.sections["final_norm"][0, 2] == np.float32(1e30)
    assert f"at most 1 at {OTHER}[5, 3]; 1 numbers below" in capsys.readouterr().out


# ---- what it accepts ---------------------------------------------------------------------------


def without(*path):
    """Removes the value at a path of keys."""
    *path, last = path

    def change(j):
        for key in path:
            j = j[key]
        del j[last]
    return change


def setting(*path_and_value):
    """Sets the value at a path of keys."""
    *path, last, value = path_and_value

    def change(j):
        for key in path:
            j = j[key]
        j[last] = value
    return change


def steps(*changes):
    def change(j):
        for step in changes:
            step(j)
    return change


def newer_rope(j):
    theta = j.pop("rope_theta")
    j["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}


def string_merges(j):
    j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]


def bare_template(j):
    j["post_processor"] = j["post_processor"]["processors"][1]


ACCEPTED = {
    "bare architecture": ("config.json", setting("architectures", ["Qwen3Model"])),
    "newer rope": ("config.json", newer_rope),
    "default scaling": ("config.json", setting("rope_scaling", {"type": "default"})),
    "no optional fields": ("config.json", lambda j: {
        k: v for k, v in j.items()
        if k not in ("attention_bias", "use_sliding_window", "rope_scaling")}),
    "full attention": ("config.json", setting("layer_types", ["full_attention"] * 2)),
    "integer theta": ("config.json", setting("rope_theta", 1000000)),
    "merges as strings": ("tokenizer.json", string_merges),
    "template alone": ("tokenizer.json", bare_template),
    "truncation left over": ("tokenizer.json", setting("truncation", {"max_length": 512})),
    "padding left over": ("tokenizer.json", setting("padding", {"strategy": "BatchLongest"})),
    "null suffix": ("tokenizer.json", setting("model", "end_of_word_suffix", None)),
    "not bidirectional": ("config.json", setting("use_bidirectional_attention", False)),
    "causal": ("config.json", setting("is_causal", True)),
    "no normalize": ("modules.json", without(-1)),
    "newer modules": ("modules.json", setting(0, "type", "sentence_transformers.base.modules."
                                              "transformer.Transformer")),
    "newer kind": ("config_sentence_transformers.json", setting("model_type",
                                                                "SentenceTransformer")),
    "prompt not pooled": ("1_Pooling/config.json", setting("include_prompt", False)),
    "pooling by name": ("1_Pooling/config.json", lambda j: {"pooling_mode": "lasttoken"}),
    "module types moved": ("modules.json", setting(1, "type", "sentence_transformers.x.Pooling")),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_other_spellings(folder, case):
    before = convert(folder)
    name, change = ACCEPTED[case]
    edit(folder / name, change)
    q = convert(folder)
    assert (q.config, q.rope_theta, q.added) == (before.config, before.rope_theta, before.added)
    assert q.use == PLAIN
    for section, data in before.sections.items():
        if section != "provenance":
            assert q.sections[section].tobytes() == data.tobytes(), section


def test_lm_head_is_left_out_and_said(folder, capsys):
    plain = convert(folder)
    tensors = weights()
    save(folder / "model.safetensors",
         tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    q = convert(folder)
    note = "lm_head.weight left out: embeddings do not use it"
    assert f"note: {note}\n" in q.provenance and note in capsys.readouterr().out
    for section in plain.sections:
        if section != "provenance":
            assert q.sections[section].tobytes() == plain.sections[section].tobytes()


def test_no_prompts_file(folder, capsys):
    (folder / "config_sentence_transformers.json").unlink()
    assert convert(folder).prompts == {}
    assert "prompts    none" in capsys.readouterr().out


def test_no_modules_file(folder):
    (folder / "modules.json").unlink()
    convert(folder)


NO_NORMALIZE = ("modules.json has no Normalize: vectors in sentence-transformers have any length, "
                "here length 1")


def test_no_normalize(folder, capsys):
    assert "Normalize" not in convert(folder).provenance
    edit(folder / "modules.json", without(-1))
    for args in (), ("--pooling", "mean"):
        capsys.readouterr()
        assert f"note: {NO_NORMALIZE}\n" in convert(folder, *args).provenance
        assert f"note       {NO_NORMALIZE}\n" in capsys.readouterr().out
    (folder / "modules.json").unlink()
    assert "Normalize" not in convert(folder).provenance


def test_transformer_alone(folder):
    """A directory 1_Pooling that modules.json does not name is left from elsewhere."""
    edit(folder / "modules.json", lambda j: j[:1])
    assert refused(folder) == "modules.json: no module that pools; " + NO_KIND
    q = convert(folder, "--pooling", "mean")
    assert q.use == PLAIN | {"pooling": 1} and "pooling: mean, by --pooling\n" in q.provenance
    assert f"note: {NO_NORMALIZE}\n" in q.provenance


NO_KIND = ("if its last token is pooled, say so with --pooling last; if it was trained with "
           "Qwen3-Reranker's prompt (docs/models.md), with --kind reranker; other rerankers are "
           "not supported")


LANGUAGE_MODEL = ("config.json: a language model, and no file of sentence-transformers says that "
                  "it embeds, as those of Qwen/Qwen3-Embedding-0.6B do; ")


def mean_pooling(j):
    j.update(pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True)


@pytest.mark.parametrize("mode", ["absent", "mean"])
def test_pooling_last_by_hand(folder, mode):
    pooling = folder / "1_Pooling/config.json"
    if mode == "absent":
        pooling.unlink()
        (folder / "modules.json").unlink()
    else:
        edit(pooling, mean_pooling)
    if mode == "absent":
        hint = refused(folder, "--out", "out.qemb")
        assert hint == LANGUAGE_MODEL + NO_KIND
    q = convert(folder, "--pooling", "last")
    assert "pooling: last token, by --pooling\n" in q.provenance and q.use == PLAIN


def test_head_dim_defaults_to_128(folder):
    """As in Qwen3Config. Here q_norm has 10 numbers, so it must not fit."""
    edit(folder / "config.json", without("head_dim"))
    assert "want [512, 24]" in refused(folder)


# ---- rerankers ---------------------------------------------------------------------------------

# "yes" and "no" are tokens of their own
WORDS = [("y", "e"), ("ye", "s"), ("n", "o")]
YES, NO = 256 + len(MERGES) + 1, 256 + len(MERGES) + 2
SCORES = "Qwen3ForSequenceClassification"


@pytest.fixture
def reranker(folder):
    """The first revision of a reranker: what transformers saves, with another tokenizer.json."""
    new = folder.parent / "Qwen3-Reranker-tiny"
    folder.rename(new)
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        (new / name).unlink()
    hf.save_json(new / "tokenizer.json", hf.tokenizer_json(MERGES + WORDS, ADDED, appended=False))
    return new


def logit_row(folder, name="embed_tokens.weight"):
    w = read_source(folder)[name]
    return (w[YES] - w[NO])[None]


def assert_reranker(q, row, **prompts):
    assert q.use == PLAIN | dict(kind=1, dense_rows=1, window=64)  # max_positions
    assert q.config["eos_id"] == NO_TOKEN
    assert q.sections["dense"].tobytes() == row.astype("<f4").tobytes() and row.any()
    assert q.sections["dense_bias"].tolist() == [[0]]
    assert q.prompts == {"prefix": JUDGE, "suffix": ANSWER, "instruct": TASK} | prompts
    assert "kind: reranker\n" in q.provenance and "pooling:" not in q.provenance


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_reranker(reranker, capsys, dtype):
    save(reranker / "model.safetensors", weights(dtype))
    q = convert(reranker)
    assert_weights(q, reranker)
    assert_reranker(q, logit_row(reranker))
    assert "end-of-text none" in capsys.readouterr().out


def test_reranker_window(reranker):
    edit(reranker / "config.json", setting("max_position_embeddings", 40960))
    assert convert(reranker).use["window"] == 8192


def test_reranker_int8(reranker):
    """Its dense row stays in float."""
    q = convert(reranker, "--dtype", "int8")
    assert_reranker(q, logit_row(reranker))


def head(seed=8, dtype="BF16"):
    return {"lm_head.weight": (dtype, (SHAPE["vocab"], SHAPE["hidden"]), hf.to_bytes(
        np.random.default_rng(seed).standard_normal((SHAPE["vocab"], SHAPE["hidden"])), dtype))}


def test_reranker_with_its_own_head(reranker):
    save(reranker / "model.safetensors", weights() | head())
    edit(reranker / "config.json", setting("tie_word_embeddings", False))
    q = convert(reranker)
    assert_reranker(q, logit_row(reranker, "lm_head.weight"))
    assert "left out" not in q.provenance


def test_reranker_without_its_own_head(reranker):
    edit(reranker / "config.json", setting("tie_word_embeddings", False))
    assert refused(reranker) == "lm_head.weight: missing tensor (got 1 missing, want none)"


def test_reranker_with_a_tied_head_in_its_file(reranker):
    """transformers 5 ties it, if the two are equal."""
    tensors = weights()
    same = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save(reranker / "model.safetensors", tensors | same)
    assert_reranker(convert(reranker), logit_row(reranker))
    put(same, "lm_head.weight", NO * SHAPE["hidden"] + 3, 5.0)
    save(reranker / "model.safetensors", tensors | same)
    assert refused(reranker) == ("lm_head.weight: differs from model.embed_tokens.weight, to which "
                                 "config.json ties it")


NO_PROMPT = ("a classifier or reranker, and nothing says its prompt; if it was trained with Qwen3-"
             "Reranker's (docs/models.md), say so with --kind reranker; others are not supported")


@pytest.mark.parametrize("labels", [None, {"0": "LABEL_0"}])
def test_classifier_with_one_row(folder, reranker, labels):
    """Reward models have the same form, so the name decides, or --kind."""
    row = hf.to_bytes(np.random.default_rng(9).standard_normal(SHAPE["hidden"]), "F32")
    save(reranker / "model.safetensors", weights() | {
        "score.weight": ("F32", (1, SHAPE["hidden"]), row)})
    edit(reranker / "config.json", lambda j: j.update(architectures=[SCORES], id2label=labels))
    assert_reranker(convert(reranker), np.frombuffer(row, "<f4"))
    plain = reranker.rename(reranker.with_name("plain"))
    hf.save_json(plain / "modules.json", [{"name": "0", "path": "",
                                             "type": "sentence_transformers.models.Transformer"}])
    assert refused(plain, "--out", "out.qemb") == "config.json: " + NO_PROMPT
    assert_reranker(convert(plain, "--kind", "reranker"), np.frombuffer(row, "<f4"))
    save(plain / "model.safetensors", weights() | head() | {
        "score.weight": ("F32", (1, SHAPE["hidden"]), row)})
    assert refused(plain, "--kind", "reranker") == (
        "lm_head.weight: no tensor of this model (got 1 extra, want none)")


@pytest.mark.parametrize("yes", [0, 1])
def test_classifier_with_two_rows(reranker, yes):
    rows = np.random.default_rng(9).standard_normal((2, SHAPE["hidden"])).astype("<f4")
    save(reranker / "model.safetensors", weights() | {
        "score.weight": ("F32", rows.shape, rows.tobytes())})
    edit(reranker / "config.json", lambda j: j.update(
        architectures=[SCORES], id2label={str(yes): "yes", str(1 - yes): "no"}))
    assert_reranker(convert(reranker), rows[yes] - rows[1 - yes])
    plain = reranker.rename(reranker.with_name("boolean-questions"))
    assert refused(plain, "--out", "out.qemb") == "config.json: " + NO_PROMPT
    assert_reranker(convert(plain, "--kind", "reranker"), rows[yes] - rows[1 - yes])
    plain.rename(reranker)
    edit(reranker / "config.json", setting("id2label", {"0": "LABEL_0", "1": "LABEL_1"}))
    assert "id2label (got" in refused(reranker)
    edit(reranker / "config.json", without("id2label"))
    assert refused(reranker) == "score.weight: shape (got [2, 24], want [1, 24])"


@pytest.mark.parametrize("name,change,says", [
    ("sentence_bert_config.json", {"max_seq_length": 50.5}, "max_seq_length (got 50.5, want an in"),
    ("tokenizer_config.json", {"model_max_length": 50.5}, "model_max_length (got 50.5, want an in"),
    ("config_sentence_transformers.json", {"prompts": {"query": False}},
     'prompt "query" (got false, want a text)'),
    ("config_sentence_transformers.json", {"default_prompt_name": "nope"},
     'default_prompt_name (got "nope", want the name of a prompt, or null)'),
    ("1_Pooling/config.json", {"pooling_mode": None, "pooling_mode_lasttoken": False},
     "pooling; if it is wrong"),
    ("config.json", {"id2label": {"a": "yes"}}, "id2label (got"),
    ("config.json", {"id2label": ["yes", "no"]}, "id2label (got"),
])
def test_odd_values_have_a_message(folder, name, change, says):
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    assert refused(folder).startswith(f"{name}: {says}")


def message(role, end=""):
    return f'messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first{end}'


def template(*values, start="", prefix=JUDGE, query="\n<Query>: ", end=ANSWER + "\n"):
    """A chat template of a reranker. values: for the task, the query and the document."""
    task, q, d = values
    return (f"{start}{prefix}<Instruct>: {{{{ {task} }}}}{query}{{{{ {q} }}}}\n<Document>: "
            f"{{{{ {d} }}}}{end}")


MESSAGES = [message("system", f' | default("{TASK}")'), message("query"), message("document")]
NAMES = ["instruction", "query_text", "document_text"]
# Those of sentence-transformers' tests, and of Qwen3-Reranker since April 2026
TEMPLATES = [template(*MESSAGES), template(*NAMES, start="".join(
    f"{{%- set {name} = {value} -%}}\n" for name, value in zip(NAMES, MESSAGES)))]
CHAT = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content +"
        " '<|im_end|>\n' }}{%- endfor %}{%- set ns.last_query_index = 0 %}")  # as Qwen3's


def logit_score(folder, true=YES, false=NO, default="query"):
    """The files of a newer revision, after sentence-transformers' documentation."""
    base, text = "sentence_transformers.", {"method": "forward", "method_output_name": "logits"}
    hf.save_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": base + "base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_LogitScore",
         "type": base + "cross_encoder.modules.logit_score.LogitScore"}])
    hf.save_json(folder / "1_LogitScore/config.json", {"true_token_id": true,
                                                       "false_token_id": false})
    hf.save_json(folder / "config_sentence_transformers.json", {
        "activation_fn": "torch.nn.modules.linear.Identity", "default_prompt_name": default,
        "model_type": "CrossEncoder", "prompts": {"query": "Find the passage"}})
    hf.save_json(folder / "sentence_bert_config.json", {
        "transformer_task": "text-generation", "module_output_name": "causal_logits",
        "modality_config": {"text": text, "message": text | {"format": "flat"}}})


def test_newer_reranker(reranker):
    logit_score(reranker)
    q = convert(reranker)
    assert_reranker(q, logit_row(reranker), instruct="Find the passage")
    assert "file: 1_LogitScore/config.json sha256 " in q.provenance
    plain = reranker.rename(reranker.with_name("plain"))
    assert refused(plain, "--out", "out.qemb") == "modules.json: " + NO_PROMPT
    q = convert(plain, "--kind", "reranker")
    assert_reranker(q, logit_row(plain), instruct="Find the passage")


@pytest.mark.parametrize("text", [
    *TEMPLATES, TEMPLATES[0].replace('"', "'").replace(JUDGE.replace('"', "'"), JUDGE),
    TEMPLATES[1].replace("\n", "\r\n"), template(
        MESSAGES[0], '(messages | selectattr("role", "eq", "query") | first).content',
        '(messages | selectattr("role", "eq", "document") | first).content[0].text')])
@pytest.mark.parametrize("place", ["file", "text", "list"])
def test_template_of_a_reranker(reranker, text, place):
    """It says the prompt, whatever the name."""
    plain = reranker.rename(reranker.with_name("plain"))
    logit_score(plain)
    if place == "file":
        (plain / "chat_template.jinja").write_text(text, newline="")
    hf.save_json(plain / "tokenizer_config.json", {"chat_template": {
        "file": CHAT, "text": text,
        "list": [{"name": "tool_use", "template": CHAT}, {"name": "default", "template": text}],
    }[place]})
    assert_reranker(convert(plain), logit_row(plain), instruct="Find the passage")
    logit_score(plain, default=None)
    assert_reranker(convert(plain), logit_row(plain))
    (plain / "modules.json").unlink()
    edit(plain / "config.json", setting("architectures", [SCORES]))
    row = np.ones((1, SHAPE["hidden"]), "<f4")
    save(plain / "model.safetensors", weights() | {
        "score.weight": ("F32", row.shape, row.tobytes())})
    assert_reranker(convert(plain), row)


@pytest.mark.parametrize("default", [None, "query"])
def test_task_of_a_template(reranker, default):
    """sentence-transformers takes it if there is no prompt, or an empty one."""
    logit_score(reranker, default=default)
    edit(reranker / "config_sentence_transformers.json", setting("prompts", "query", ""))
    text = TEMPLATES[1].replace(TASK, "Find it")
    (reranker / "chat_template.jinja").write_text(text)
    assert_reranker(convert(reranker), logit_row(reranker), instruct="Find it")


def test_template_that_is_not_taken(reranker):
    """Without modality_config, sentence-transformers joins query and document itself."""
    plain = reranker.rename(reranker.with_name("plain"))
    logit_score(plain)
    (plain / "chat_template.jinja").write_text(TEMPLATES[0])
    edit(plain / "sentence_bert_config.json", without("modality_config", "message"))
    assert refused(plain) == "modules.json: " + NO_PROMPT
    (plain / "sentence_bert_config.json").unlink()
    assert refused(plain) == "modules.json: " + NO_PROMPT
    assert convert(plain, "--kind", "reranker").use["kind"] == 1


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("newer", [False, True])
def test_general_template(reranker, place, newer):
    """The first revisions have the one of Qwen3, for conversations. It says nothing."""
    if newer:
        logit_score(reranker, default=None)
    if place.endswith("json"):
        hf.save_json(reranker / place, {"chat_template": CHAT})
    else:
        (reranker / place).write_text(CHAT)
    assert_reranker(convert(reranker), logit_row(reranker))
    plain = reranker.rename(reranker.with_name("plain"))
    assert "--kind reranker" in refused(plain, "--out", "out.qemb")
    assert_reranker(convert(plain, "--kind", "reranker"), logit_row(plain))


TEMPLATE_REFUSED = {
    "no judge": template(*MESSAGES, prefix=""),
    "another judge": template(*MESSAGES, prefix=JUDGE.replace("yes", "Yes")),
    "before": template(*MESSAGES, start="x"),
    "empty line": template(*MESSAGES, query="\n\n<Query>: "),
    "no break": template(*MESSAGES, query="<Query>: "),
    "order": template(MESSAGES[0], MESSAGES[2], MESSAGES[1]),
    "role": template(MESSAGES[0], MESSAGES[1], message("user")),
    "unset": template("system", "query", "document"),
    "trimmed": template(*MESSAGES).replace("{{ messages", "{{- messages"),
    "last value": template(MESSAGES[0], MESSAGES[1], message("document", " | trim")),
    "no thinking": template(*MESSAGES, end="<|im_end|>\n<|im_start|>assistant\n\n"),
    "a break less": template(*MESSAGES, end=ANSWER),
    "a break more": template(*MESSAGES, end=ANSWER + "\n\n"),
    "words": "Judge whether the Document meets the requirements X <Document>: {{ d }} <Query>: "
             "{{ q }} <Instruct>: {{ i }}",
    "short": "Is {{ d }} good for {{ q }}?",
    "loop": "{%- for m in messages %}{% if m.role == 'query' %}Q: {{ m.content }}{% endif %}"
            "{%- endfor %}",
    "empty": "",
}


@pytest.mark.parametrize("case", TEMPLATE_REFUSED)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_refuses_another_template(reranker, case, place):
    """Even if the name says Qwen3-Reranker."""
    text = TEMPLATE_REFUSED[case]
    if place.endswith("json"):
        hf.save_json(reranker / place, {"chat_template": text})
    else:
        (reranker / place).write_text(text)
    for _ in range(2):
        words = refused(reranker)
        assert words.startswith(f"{place}: chat template; it is not Qwen3-Reranker's, the only one "
                                "for pairs that qemb has (got ")
        logit_score(reranker)


def test_refuses_prompts_of_an_embedding(reranker):
    """CrossEncoder does not read them."""
    hf.save_json(reranker / "config_sentence_transformers.json", {
        "model_type": "SentenceTransformer", "prompts": {"q": "Q: "}, "default_prompt_name": "q"})
    assert refused(reranker) == ('config_sentence_transformers.json: model_type (got "Sentence'
                                 'Transformer", want null or "CrossEncoder")')


@pytest.mark.parametrize("true,false,words", [
    (NO, YES, f'true_token_id, of "yes" (got {NO}, want {YES})'),
    (YES, None, f'false_token_id, of "no" (got null, want {NO})')])
def test_refuses_other_answers(reranker, true, false, words):
    logit_score(reranker, true, false)
    assert refused(reranker) == f"1_LogitScore/config.json: {words}"


def test_reranker_by_hand(reranker):
    plain = reranker.rename(reranker.with_name("plain"))
    assert "--kind reranker" in refused(plain)
    assert_reranker(convert(plain, "--kind", "reranker"), logit_row(plain))
    assert_reranker(convert(plain, "--kind", "reranker", "--prompt", "instruct=Find = it\n"),
                    logit_row(plain), instruct="Find = it\n")
    assert "--pooling last" in refused(plain, "--kind", "embedding")


@pytest.mark.parametrize("name", ["query", "prefix", "suffix"])
def test_reranker_has_one_prompt_to_give(reranker, name):
    """The others are what it was trained with."""
    words = f'--prompt: of a reranker it can only give the task (got "{name}", want "instruct")'
    assert refused(reranker, "--prompt", f"{name}=x") == words
    assert refused(reranker, "--prompt", "instruct=x", "--prompt", f"{name}=x") == words


def test_kind_contradicts_the_files(folder, reranker):
    assert refused(reranker, "--kind", "embedding").startswith(LANGUAGE_MODEL)
    assert convert(reranker, "--kind", "embedding", "--pooling", "last").use == PLAIN
    hf.save_sentence_transformers(reranker, SHAPE["hidden"])
    assert refused(reranker, "--kind", "reranker") == (
        "--kind: modules.json says what the model is for (got reranker, want embedding)")
    (reranker / "modules.json").unlink()
    assert refused(reranker, "--kind", "reranker").startswith("--kind: 1_Pooling/config.json says ")
    logit_score(reranker)
    assert refused(reranker, "--kind", "embedding").startswith("--kind: modules.json says ")
    (reranker / "modules.json").unlink()
    edit(reranker / "config.json", setting("architectures", [SCORES]))
    assert refused(reranker, "--kind", "embedding").startswith("--kind: config.json says what ")


def test_kind_contradicts_pooling(reranker):
    assert refused(reranker, "--kind", "reranker", "--pooling", "last") == (
        "--kind: --pooling says what the model is for (got reranker, want embedding)")


def test_kind_contradicts_a_gguf(folder):
    assert refused(Pair(folder).gguf, "--kind", "reranker") == (
        "tiny.gguf: --kind: qwen3.pooling_type says what the model is for (got reranker, want "
        "embedding)")


def test_an_embedding_may_be_named_so(folder):
    named = folder.rename(folder.with_name("Qwen3-Reranker"))
    assert convert(named).use == PLAIN


@pytest.mark.parametrize("name,known", [
    ("qwen3_reranker", True), ("my-Qwen3Reranker-v2", True), ("other-reranker", False),
    ("Qwen2-Reranker", False)])
def test_reranker_by_name(reranker, name, known):
    named = reranker.rename(reranker.with_name(name))
    if known:
        assert convert(named).use["kind"] == 1
    else:
        assert "--kind reranker" in refused(named)


RERANKER_REFUSED = {
    "end token": ("tokenizer.json", lambda j: hf.tokenizer_json(MERGES + WORDS, ADDED),
                  "tokenizer.json: post_processor of a reranker (got an end token, want none)"),
    "no words": ("tokenizer.json", lambda j: hf.tokenizer_json(MERGES, ADDED, appended=False),
                 'tokenizer.json: no tokens "yes" and "no", which a reranker needs'),
    "bidirectional": ("config.json", setting("is_causal", False),
                      "config.json: attention of a reranker (got \"bidirectional\""),
}


@pytest.mark.parametrize("case", RERANKER_REFUSED)
def test_refuses_reranker(reranker, case):
    name, change, words = RERANKER_REFUSED[case]
    edit(reranker / name, change)
    assert refused(reranker).startswith(words)


def test_refuses_pooling_of_a_reranker(reranker):
    logit_score(reranker)
    assert refused(reranker, "--pooling", "mean").startswith("--pooling: an option for embeddings")


# ---- other embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("change", [mean_pooling, lambda j: {"pooling_mode": "mean"},
                                    lambda j: {"pooling_mode": ["mean"]}])
def test_mean(folder, change):
    edit(folder / "1_Pooling/config.json", change)
    q = convert(folder)
    assert q.use == PLAIN | {"pooling": 1} and "pooling: mean\n" in q.provenance
    assert_weights(q, folder)
    q = convert(folder, "--pooling", "last")
    assert q.use == PLAIN and "pooling: last token, by --pooling\n" in q.provenance


def pplx(j):
    j.update(architectures=["PPLXQwen3Model"], model_type="bidirectional_pplx_qwen3",
             auto_map={"AutoConfig": "configuration.PPLXQwen3Config",
                       "AutoModel": "modeling.PPLXQwen3Model"})


def voyage(j):
    j.update(architectures=["Qwen3BidirectionalModel"], use_bidirectional_attention=True,
             auto_map={"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"})


def test_mean_by_hand(folder):
    assert convert(folder, "--pooling", "mean").use == PLAIN | {"pooling": 1}


@pytest.mark.parametrize("change", [
    setting("is_causal", False),
    lambda j: j.update(is_causal=False, use_bidirectional_attention=True),
    setting("architectures", ["Qwen3BidirectionalModel"]),
    lambda j: j.update(architectures=["Qwen3BidirectionalModel"], is_causal=False),
    voyage, pplx])
def test_bidirectional(folder, change):
    edit(folder / "config.json", change)
    q = convert(folder)
    assert q.use == PLAIN | {"attention": 1} and "attention: bidirectional\n" in q.provenance


@pytest.mark.parametrize("post", [None, {"type": "ByteLevel"},
                                  {"type": "Sequence", "processors": [{"type": "ByteLevel"}]}])
def test_no_end_token(folder, post):
    edit(folder / "tokenizer.json", setting("post_processor", post))
    q = convert(folder)
    assert q.config["eos_id"] == NO_TOKEN and q.use == PLAIN
    note = "note: no token ends a text, as tokenizer.json says; --end-token appends one\n"
    assert note in q.provenance
    assert note not in convert(folder, "--end-token", "none").provenance
    assert note not in convert(folder, "--pooling", "mean").provenance


def add_dense(folder, rows=6, bias=True, kind="activation.Tanh", dtype="F32", **settings):
    """A module Dense as sentence-transformers saves it -> weight, bias"""
    edit(folder / "modules.json", setting(2, "name", "3"))
    edit(folder / "modules.json", lambda j: j.insert(2, {
        "idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}))
    hf.save_json(folder / "2_Dense/config.json", {
        "in_features": SHAPE["hidden"], "out_features": rows, "bias": bias,
        "activation_function": "torch.nn.modules." + kind} | settings)
    rng = np.random.default_rng(10)
    w = rng.standard_normal((rows, SHAPE["hidden"])).astype("f2").astype("f4")
    b = rng.standard_normal(rows).astype("f2").astype("f4") if bias else np.zeros(rows, "f4")
    tensors = {"linear.weight": (dtype, w.shape, hf.to_bytes(w, dtype))}
    save(folder / "2_Dense/model.safetensors", tensors | (
        {"linear.bias": (dtype, b.shape, hf.to_bytes(b, dtype))} if bias else {}))
    return w, b


@pytest.mark.parametrize("rows", [1, 6, 48])
@pytest.mark.parametrize("bias,kind,activation", [
    (True, "activation.Tanh", 1), (False, "linear.Identity", 0), (True, "linear.Identity", 0)])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_dense(folder, rows, bias, kind, activation, dtype):
    w, b = add_dense(folder, rows, bias, kind, dtype)
    q = convert(folder)
    assert q.use == PLAIN | {"dense_rows": rows, "activation": activation}
    assert q.sections["dense"].tobytes() == w.tobytes()
    assert q.sections["dense_bias"].tobytes() == b.tobytes() and b.any() == bias
    assert f"dense: {rows} rows, {['identity', 'tanh'][activation]}\n" in q.provenance
    assert "file: 2_Dense/config.json sha256 " in q.provenance


def test_dense_without_normalize_and_with_mean(folder):
    add_dense(folder)
    edit(folder / "modules.json", without(-1))
    edit(folder / "1_Pooling/config.json", mean_pooling)
    assert convert(folder).use == PLAIN | {"pooling": 1, "dense_rows": 6, "activation": 1}


def test_dense_activation_defaults_to_tanh(folder):
    add_dense(folder)
    edit(folder / "2_Dense/config.json", without("activation_function"))
    assert convert(folder).use["activation"] == 1


DENSE_REFUSED = {
    "width": (setting("in_features", 25), "in_features (got 25, want 24)"),
    "no rows": (setting("out_features", 0), "out_features (got 0, want an integer from 1"),
    "half a row": (setting("out_features", 6.0), "out_features (got 6.0"),
    "many rows": (setting("out_features", 65537), "out_features (got 65537"),
    "activation": (setting("activation_function", "torch.nn.modules.activation.GELU"),
                   'activation_function (got "torch.nn.modules.activation.GELU", want'),
    "residual": (setting("use_residual", True), "use_residual (got true"),
    "tokens": (setting("module_input_name", "token_embeddings"), "module_input_name (got"),
    "scores": (setting("module_output_name", "scores"), "module_output_name (got"),
    "bias": (setting("bias", 1.5), "bias (got 1.5, want true or false)"),
}


@pytest.mark.parametrize("case", DENSE_REFUSED)
def test_refuses_dense(folder, case):
    add_dense(folder)
    change, words = DENSE_REFUSED[case]
    edit(folder / "2_Dense/config.json", change)
    assert refused(folder).startswith("2_Dense/config.json: " + words)


def test_refuses_dense_weights(folder):
    w, b = add_dense(folder)
    edit(folder / "2_Dense/config.json", setting("out_features", 7))
    words = '2_Dense/model.safetensors: tensors (got {"linear.bias": [6],'
    assert refused(folder).startswith(words)
    edit(folder / "2_Dense/config.json", lambda j: j.update(out_features=6, bias=False))
    assert refused(folder).startswith(words)
    edit(folder / "2_Dense/config.json", setting("bias", True))
    w[3, 5] = np.nan
    save(folder / "2_Dense/model.safetensors", {
        "linear.weight": ("F32", w.shape, w.tobytes()), "linear.bias": ("F32", b.shape,
                                                                        b.tobytes())})
    assert refused(folder) == (
        "2_Dense linear.weight[3, 5]: number (got nan, want a finite one up to 3.40282e+38)")
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    assert refused(folder).startswith("2_Dense/pytorch_model.bin: not a zip; ")
    (folder / "2_Dense/pytorch_model.bin").unlink()
    assert refused(folder) == "2_Dense/model.safetensors: no such file in the source"


def projected(folder, rows=48, **config):
    """As in voyage-4-nano: its class projects every row, and then the rows are averaged."""
    w = np.random.default_rng(11).standard_normal((rows, SHAPE["hidden"])).astype("f4")
    save(folder / "model.safetensors", weights() | {
        "linear.weight": ("F32", w.shape, w.tobytes())})
    edit(folder / "config.json", voyage)
    edit(folder / "config.json", lambda j: j.update({"num_labels": rows} | config))
    edit(folder / "1_Pooling/config.json", mean_pooling)
    return w


def test_projection_inside_the_model(folder):
    w = projected(folder)
    q = convert(folder)
    assert q.use == PLAIN | {"pooling": 1, "attention": 1, "dense_rows": 48}
    assert q.sections["dense"].tobytes() == w.tobytes() and not q.sections["dense_bias"].any()
    add_dense(folder)
    assert refused(folder).startswith("2_Dense/config.json: a dense layer behind linear.weight")


EXTRA = "linear.weight: no tensor of this model (got 1 extra, want none)"


@pytest.mark.parametrize("change,words", [
    (setting("num_labels", 47), "linear.weight: shape (got [48, 24], want [47, 24])"),
    (without("num_labels"), EXTRA), (setting("num_labels", None), EXTRA),
    (lambda j: j.update(architectures=["Qwen3Model"], auto_map={}, is_causal=False), EXTRA),
    (pplx, EXTRA)])
def test_refuses_another_projection(folder, change, words):
    """The other classes have none, so transformers would leave the tensor out."""
    projected(folder)
    edit(folder / "config.json", change)
    assert refused(folder) == words


def test_refuses_no_projection(folder):
    """transformers would draw its numbers."""
    projected(folder)
    save(folder / "model.safetensors", weights())
    assert refused(folder) == "linear.weight: missing tensor (got 1 missing, want none)"


@pytest.mark.parametrize("rows", [0, 65537, True, "48", 48.0])
def test_refuses_rows_of_a_projection(folder, rows):
    projected(folder, num_labels=rows)
    assert refused(folder) == (f"config.json: num_labels (got {json.dumps(rows)}, want an integer "
                               "from 1 to 65536)")


def test_quantizer(folder):
    """As in pplx-embed-v1: tanh of the pooled row, by a dense layer that changes nothing else."""
    edit(folder / "modules.json", lambda j: j[:2] + [{
        "idx": 2, "name": "2", "path": "", "type": "st_quantize.FlexibleQuantizer"}])
    edit(folder / "1_Pooling/config.json", mean_pooling)
    assert refused(folder) == (
        'modules.json: modules with code of their own, which qemb does not have (got ["st_quantize'
        '.FlexibleQuantizer"], want types of sentence_transformers)')
    edit(folder / "config.json", pplx)
    q = convert(folder)
    assert q.use == PLAIN | {"pooling": 1, "attention": 1, "dense_rows": SHAPE["hidden"],
                             "activation": 1}
    assert (q.sections["dense"] == np.eye(SHAPE["hidden"])).all()
    assert "note: vectors are tanh of the pooled row, not rounded to 8 bits\n" in q.provenance


@pytest.mark.parametrize("source", [None, {}, {"prompts": {}}, {"prompts": None}])
def test_pplx_has_no_prompts(folder, source):
    """It was trained without: --query and --document are good and change no text."""
    edit(folder / "config.json", pplx)
    path = folder / "config_sentence_transformers.json"
    path.unlink() if source is None else hf.save_json(path, source)
    q = convert(folder)
    assert q.prompts == {"query": "", "document": ""}
    note = "note: the source has no prompts; query and document as in pplx-embed\n"
    assert note in q.provenance
    q = convert(folder, "--prompt", "query=Q: ")
    assert q.prompts == {"query": "Q: ", "document": ""}
    hf.save_json(path, {"prompts": {"code": "C: "}})
    q = convert(folder)
    assert q.prompts == {"code": "C: "} and "note: " not in q.provenance


def test_prompts_by_hand(folder):
    q = convert(folder, "--prompt", "query=Query: ", "--prompt", "code=")
    assert q.prompts == {"query": "Query: ", "document": "", "code": ""}
    assert "prompts: query, code by --prompt\n" in q.provenance
    (folder / "config_sentence_transformers.json").unlink()
    assert convert(folder, "--prompt", "query=a\nb=ü").prompts == {"query": "a\nb=ü"}
    assert refused(folder, "--prompt", "=x").endswith("at most 64, with names, without NUL "
                                                      "characters)")


@pytest.mark.parametrize("text", ["query", "query=\udcff"])
def test_refuses_a_malformed_prompt(folder, capsys, text):
    with pytest.raises(SystemExit) as e:
        run(folder, "--prompt", text)
    assert e.value.code == 2 and "want NAME=TEXT, in UTF-8" in capsys.readouterr().err


def test_refuses_a_line_break_written_out(folder, capsys):
    """In most quotes of a shell, \\n remains two characters."""
    with pytest.raises(SystemExit) as e:
        run(folder, "--prompt", "query=Instruct: x\\nQuery:")
    err = capsys.readouterr().err
    assert e.value.code == 2 and os.listdir() == []
    assert ("prompt query: a line break written as \\ and n (got Instruct: x\\nQuery:, want the "
            "line break itself: in bash --prompt $'NAME=...\\n...')\n") in err
    text = "Instruct: x\nQuery:"
    assert convert(folder, "--prompt", "query=" + text).prompts["query"] == text


def test_end_token_by_hand(folder):
    q = convert(folder, "--end-token", "<think>")
    assert q.config["eos_id"] == 261 and "end: <think>, by --end-token\n" in q.provenance
    assert convert(folder, "--end-token", "none").config["eos_id"] == NO_TOKEN
    assert refused(folder, "--end-token", "<|im_end|>") == (
        '--end-token: "<|im_end|>" is no token of this model')


@pytest.mark.parametrize("end", [hf.EOS, {"content": hf.EOS, "special": True}])
def test_tokenizer_config(folder, end):
    """Two places may name the end token."""
    hf.save_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "add_bos_token": False, "model_max_length": 10**30,
        "truncation_side": "right", "add_eos_token": True, "eos_token": end})
    q = convert(folder)
    assert q.use == PLAIN and "tokenizer_config" not in q.provenance
    edit(folder / "tokenizer_config.json", setting("eos_token", "<think>"))
    assert refused(folder).startswith('tokenizer_config.json: add_eos_token: "<think>" is not what '
                                      "tokenizer.json appends; say")
    assert convert(folder, "--end-token", "é中").config["eos_id"] == 262
    edit(folder / "tokenizer_config.json", setting("add_eos_token", False))
    assert convert(folder).config["eos_id"] == 260


@pytest.mark.parametrize("key,value", [
    ("add_prefix_space", True), ("add_bos_token", True), ("split_special_tokens", True),
    ("truncation_side", "left")])
def test_refuses_tokenizer_config(folder, key, value):
    hf.save_json(folder / "tokenizer_config.json", {key: value})
    assert refused(folder).startswith(f"tokenizer_config.json: {key} (got {json.dumps(value)}, ")


def test_refuses_a_tokenizer_of_its_own(folder):
    hf.save_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}})
    assert refused(folder).startswith("tokenizer_config.json: auto_map: a tokenizer with code of ")


def test_added_tokens_in_tokenizer_config(folder):
    """transformers adds those that tokenizer.json has not, or has with other flags."""
    path, flags = folder / "tokenizer_config.json", dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False)
    hf.save_json(path, {"added_tokens_decoder": {"261": {"content": "<think>"} | flags}})
    assert convert(folder).use == PLAIN
    for key, value, words in (
            ("content", "<other>", '"<other>" id in tokenizer.json (got null, want 261)'),
            ("content", "é中", " id in tokenizer.json (got 262, want 261)"),
            ("lstrip", True, '"<think>" lstrip (got true, want false)'),
            ("normalized", True, '"<think>" normalized (got true, want false)')):
        old = path.read_text()
        edit(path, setting("added_tokens_decoder", "261", key, value))
        message = refused(folder, "--out", "out.qemb")
        assert message.startswith("tokenizer_config.json: added_tokens_decoder: ")
        assert message.endswith(words)
        path.write_text(old)


TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
BERT_REFUSED = {
    "message": ({"modality_config": TEXT | {"message": TEXT["text"] | {"format": "flat"}}},
                "modality_config; with message, texts go through the chat template (got"),
    "hidden states": ({"modality_config": {"text": {"method": "f", "method_output_name": "h"}}},
                      "modality_config; with"),
    "task": ({"transformer_task": "text-generation"}, "transformer_task (got"),
    "output": ({"module_output_name": "sentence_embedding"}, "module_output_name (got"),
    "expansion": ({"query_expansion": {"length": 32}}, "query_expansion (got"),
    "processing": ({"processing_kwargs": {"text": {"add_special_tokens": False}}},
                   "processing_kwargs (got"),
    "config": ({"config_kwargs": {"is_causal": False}}, "config_kwargs.is_causal (got false, want "
               "no such key)"),
    "old config": ({"config_args": {"is_causal": False}}, "config_args.is_causal (got"),
    "tokenizer": ({"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args.truncation_sid"),
    "model": ({"model_args": {"add_pooling_layer": False}}, "model_args.add_pooling_layer (got"),
}


@pytest.mark.parametrize("case", BERT_REFUSED)
def test_refuses_sentence_bert_config(folder, case):
    settings, words = BERT_REFUSED[case]
    hf.save_json(folder / "sentence_bert_config.json", settings)
    assert refused(folder).startswith("sentence_bert_config.json: " + words)


def test_sentence_bert_config(folder):
    """What a newer sentence-transformers saves for texts."""
    hf.save_json(folder / "sentence_bert_config.json", {
        "transformer_task": "feature-extraction", "modality_config": TEXT, "processing_kwargs": {},
        "module_output_name": "token_embeddings", "unpad_inputs": None, "max_seq_length": 20,
        "model_args": {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"},
        "processor_kwargs": {"padding_side": "left"}})
    assert convert(folder).use == PLAIN | {"window": 20}


def test_refuses_another_template_by_name(reranker):
    logit_score(reranker)
    path = reranker / "sentence_bert_config.json"
    edit(path, setting("processing_kwargs", {"chat_template": {"chat_template": "other"}}))
    assert refused(reranker).startswith("sentence_bert_config.json: processing_kwargs (got ")


@pytest.mark.parametrize("name,key", [("sentence_bert_config.json", "max_seq_length"),
                                      ("tokenizer_config.json", "model_max_length")])
def test_window(folder, name, key):
    """sentence-transformers cuts a text to it; here it is a limit unless a caller says more."""
    hf.save_json(folder / name, {key: 20.0})
    assert convert(folder).use == PLAIN | {"window": 20}
    hf.save_json(folder / name, {key: 20})
    q = convert(folder)
    assert q.use == PLAIN | {"window": 20} and "window: 20 tokens\n" in q.provenance
    for value in True, "20":
        hf.save_json(folder / name, {key: value})
        assert refused(folder, "--out", "out.qemb") == (
            f"{name}: {key} (got {json.dumps(value)}, want an integer)")
    for value in 64, 65, 1e30, 10**400, float("inf"), None:
        hf.save_json(folder / name, {key: value})
        q = convert(folder)
        assert q.use == PLAIN and "window" not in q.provenance


def test_a_default_prompt_that_is_empty(folder):
    edit(folder / "config_sentence_transformers.json", setting("default_prompt_name", "document"))
    assert convert(folder).prompts == {"query": hf.QUERY, "document": ""}


def test_refuses_an_adapter(folder):
    hf.save_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    message = refused(folder)
    assert message.startswith("adapter_config.json: an adapter (LoRA)")
    assert "merge_and_unload()" in message


# ---- GGUF --------------------------------------------------------------------------------------

WIDE = dict(layers=2, hidden=32, heads=2, kv=1, hd=32, ffn=64, vocab=300, max=64)  # for Q8_0


class Pair:
    """The same model as a directory and as a GGUF file."""

    def __init__(self, folder, dtype="BF16", added=ADDED, merges=MERGES, **keys):
        self.folder, self.gguf, self.dtype = folder, folder.parent / "tiny.gguf", dtype
        plain = "F32" if dtype == "Q8_0" else dtype
        edit(folder / "config.json", lambda j: hf.config_json(WIDE))
        tensors = weights(plain, **WIDE)
        save(folder / "model.safetensors", tensors)
        self.tensors = read_source(folder)
        self.keys = hf.gguf_keys(WIDE, merges, added)
        self.save(**keys)

    def save(self, drop=(), add={}, arch="qwen3", **keys):
        """keys: with _ for the dots in "pooling_type" and so on"""
        tensors = {k: v for k, v in self.tensors.items() if k not in drop} | add
        hf.save_gguf(self.gguf, self.keys | keys, tensors, self.dtype, arch)


def same(a, b, *but):
    """Whether two files differ in provenance alone."""
    assert (a.config, a.use, a.rope_theta, a.norm_eps, a.added) == (
        b.config, b.use, b.rope_theta, b.norm_eps, b.added)
    assert list(a.sections) == list(b.sections) and a.bits == b.bits
    for name, data in a.sections.items():
        if name not in ("provenance", *but):
            assert data.tobytes() == b.sections[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("to", ["f16", "int8"])
def test_gguf(folder, monkeypatch, dtype, to):
    pair = Pair(folder, dtype)
    want = convert(folder, "--dtype", to)
    prompts = ["--prompt", "query=" + hf.QUERY, "--prompt", "document="]
    q = convert(pair.gguf, "--dtype", to, *prompts)
    same(q, want)
    lines = q.provenance.splitlines()
    assert lines[:2] == ["source: tiny.gguf", f"file: tiny.gguf {pair.gguf.stat().st_size} bytes"]
    assert f"weights: {' '.join(sorted({dtype, 'F32'}))} to {to}" in lines
    monkeypatch.setattr(convert_weights, "BLOCK", 3 * WIDE["hidden"] + 1)
    same(convert(pair.gguf, "--dtype", to, *prompts), want)


def test_gguf_q8_0(folder, monkeypatch):
    """The numbers are those of the package gguf."""
    import gguf

    pair = Pair(folder, "Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {"model." + name: ("F32", w.shape, (w if w.ndim == 1 else gguf.dequantize(
        gguf.quantize(w, kind), kind)).astype("<f4").tobytes()) for name, w in pair.tensors.items()}
    assert any(data != weights("F32", **WIDE)[name][2] for name, (_, _, data) in tensors.items())
    save(folder / "model.safetensors", tensors)
    want = convert(folder)
    q = convert(pair.gguf)
    same(q, want, "prompts")
    assert "weights: F32 Q8_0 to f16\n" in q.provenance
    monkeypatch.setattr(convert_weights, "BLOCK", 3 * WIDE["hidden"] + 1)
    same(convert(pair.gguf), want, "prompts")


def test_gguf_default_name_and_note(folder, capsys):
    pair = Pair(folder)
    run(pair.gguf)
    assert os.listdir() == ["tiny.qemb"]
    note = "a GGUF file has no prompts; --prompt NAME=TEXT gives some"
    assert f"note       {note}" in capsys.readouterr().out
    assert f"note: {note}\n" in Qemb("tiny.qemb").provenance


@pytest.mark.parametrize("key", ["Qwen3 Embedding 0.6B", "qwen3-embedding", "Qwen3_Embedding_4B"])
def test_gguf_of_qwen3_embedding(folder, capsys, key):
    """Its own prompts, those of the checkpoint, whose name is in a key or is the file's."""
    pair = Pair(folder, **{"general.name": key})
    q = convert(pair.gguf)
    same(q, convert(folder))
    assert q.prompts == {"query": hf.QUERY, "document": ""}
    note = "the source has no prompts; query and document as in Qwen3-Embedding\n"
    assert "note: " + note in q.provenance and "note       " + note in capsys.readouterr().out
    assert "--prompt NAME=TEXT" not in q.provenance
    q = convert(pair.gguf, "--prompt", "query=Q: ", "--prompt", "code=C: ")
    assert q.prompts == {"query": "Q: ", "document": "", "code": "C: "}
    assert "; document as in Qwen3-Embedding\n" in q.provenance
    both = "--prompt", "query=Q: ", "--prompt", "document="
    q = convert(pair.gguf, *both)
    assert q.prompts == {"query": "Q: ", "document": ""} and "note: " not in q.provenance
    pair.save()
    named = pair.gguf.rename(pair.gguf.with_name("Qwen3-Embedding-0.6B-f16.gguf"))
    assert convert(named).prompts == {"query": hf.QUERY, "document": ""}


@pytest.mark.parametrize("keys,use", [
    ({"qwen3.pooling_type": 3}, {}), ({"qwen3.pooling_type": 1}, {"pooling": 1}),
    ({"qwen3.pooling_type": 1, "qwen3.attention.causal": False}, {"pooling": 1, "attention": 1}),
    ({"qwen3.rope.scaling.type": "none", "qwen3.rope.dimension_count": 32}, {})])
def test_gguf_variants(folder, keys, use):
    assert convert(Pair(folder, **keys).gguf).use == PLAIN | use


def test_gguf_without_pooling(folder):
    pair = Pair(folder, **{"qwen3.pooling_type": None})
    assert refused(pair.gguf) == (
        "tiny.gguf: no qwen3.pooling_type that says what it is for; " + NO_KIND)
    assert convert(pair.gguf, "--pooling", "mean").use == PLAIN | {"pooling": 1}
    pair.save(**{"qwen3.pooling_type": 2})
    words = ("tiny.gguf: qwen3.pooling_type; if it is wrong, say what is pooled by --pooling last "
             "or mean (got ")
    assert refused(pair.gguf, "--out", "out.qemb") == words + "2, CLS; want MEAN, LAST or RANK)"
    assert convert(pair.gguf, "--pooling", "mean").use == PLAIN | {"pooling": 1}
    assert convert(pair.gguf, "--pooling", "last").use == PLAIN
    pair.save(**{"qwen3.pooling_type": 7})
    assert refused(pair.gguf) == words + "7; want MEAN, LAST or RANK)"


def test_gguf_with_a_head(folder):
    """An embedding does not use it."""
    pair = Pair(folder)
    pair.save(add={"lm_head.weight": pair.tensors["embed_tokens.weight"] + 1})
    q = convert(pair.gguf)
    same(q, convert(folder), "prompts")
    assert "note: lm_head.weight left out" in q.provenance


# ---- GGUF: the end token -----------------------------------------------------------------------


@pytest.mark.parametrize("added", [None, False])
def test_gguf_without_end_token(folder, added):
    """Older files do not say that the model was trained with one."""
    pair = Pair(folder, **{"tokenizer.ggml.add_eos_token": added})
    assert refused(pair.gguf) == (
        "tiny.gguf: tokenizer.ggml.add_eos_token; say what a text ends with by --end-token TOKEN, "
        "or none: --end-token '<|endoftext|>' for Qwen3-Embedding "
        f"(got {json.dumps(added)}, want true)")
    assert convert(pair.gguf, "--end-token", hf.EOS).config["eos_id"] == 260
    assert convert(pair.gguf, "--end-token", "none").config["eos_id"] == NO_TOKEN


def test_gguf_with_another_end_token(folder):
    """Right for F2LLM, and known to be wrong for Qwen3-Embedding."""
    keys = {"tokenizer.ggml.eos_token_id": 261}
    pair = Pair(folder, added=(hf.EOS, "<|im_end|>"), **keys)
    assert convert(pair.gguf).config["eos_id"] == 261
    pair.save(**keys, **{"general.name": "Qwen3 Embedding 0.6B"})
    assert "tokenizer.ggml.eos_token_id; say what a text ends with by --end-token" in refused(
        pair.gguf)
    assert convert(pair.gguf, "--end-token", hf.EOS).config["eos_id"] == 260


# ---- GGUF: rerankers ---------------------------------------------------------------------------


@pytest.fixture
def ranker(reranker):
    """A reranker as a directory, and as llama.cpp's converter writes it."""
    pair = Pair(reranker, merges=MERGES + WORDS)
    pair.keys |= {"qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["yes", "no"],
                  "tokenizer.chat_template.rerank": JUDGE + "<Instruct>: " + TASK +
                  "\n<Query>: {query}\n<Document>: {document}" + ANSWER,
                  "tokenizer.ggml.add_eos_token": None}
    pair.rows = pair.tensors["embed_tokens.weight"][[YES, NO]]
    return pair


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_gguf_reranker(ranker, dtype):
    save(ranker.folder / "model.safetensors", weights(dtype, **WIDE))
    ranker.dtype, ranker.tensors = dtype, read_source(ranker.folder)
    ranker.save(add={"score.weight": ranker.tensors["embed_tokens.weight"][[YES, NO]]})
    q = convert(ranker.gguf)
    same(q, convert(ranker.folder))
    assert_reranker(q, logit_row(ranker.folder))


def test_gguf_reranker_without_template(ranker):
    """Then its name says the prompt, or --kind."""
    keys = {"tokenizer.chat_template.rerank": None}
    ranker.save(add={"score.weight": ranker.rows}, **keys)
    assert refused(ranker.gguf, "--out", "out.qemb") == "tiny.gguf: " + NO_PROMPT
    same(convert(ranker.gguf, "--kind", "reranker"), convert(ranker.folder))
    ranker.save(add={"score.weight": ranker.rows}, **keys, **{"general.name": "Qwen3 Reranker"})
    same(convert(ranker.gguf), convert(ranker.folder))


def test_gguf_reranker_of_before_cls_output(ranker):
    """Older files are language models; the rows are in the embedding table or the head."""
    old = {"qwen3.pooling_type": None, "qwen3.classifier.output_labels": None,
           "tokenizer.chat_template.rerank": None}
    ranker.save(**old)
    assert "--kind reranker" in refused(ranker.gguf)
    same(convert(ranker.gguf, "--kind", "reranker"), convert(ranker.folder))
    ranker.save(**old, **{"general.name": "Qwen3 Reranker 0.6B"})
    same(convert(ranker.gguf), convert(ranker.folder))
    other = ranker.tensors["embed_tokens.weight"][::-1].copy()
    ranker.save(**old, add={"lm_head.weight": other})
    assert_reranker(convert(ranker.gguf, "--kind", "reranker"), (other[YES] - other[NO])[None])


@pytest.mark.parametrize("labels", [["yes", "no"], ["no", "yes"]])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("dtype", ["BF16", "Q8_0"])
def test_gguf_reranker_with_swapped_labels(ranker, labels, order, dtype):
    """The rows tell, where the embedding table has them, even rounded to 8 bits there."""
    ranker.dtype = dtype
    ranker.save(add={"score.weight": ranker.rows[::order].copy()},
                **{"qwen3.classifier.output_labels": labels})
    assert_reranker(convert(ranker.gguf), (ranker.rows[0] - ranker.rows[1])[None])


@pytest.mark.parametrize("labels,sign", [(["yes", "no"], 1), (["no", "yes"], -1)])
def test_gguf_reranker_untied(ranker, labels, sign):
    """Its rows are in cls.output alone."""
    rows = np.random.default_rng(12).standard_normal((2, 32)).astype("f4")
    ranker.save(add={"score.weight": rows}, **{"qwen3.classifier.output_labels": labels})
    assert_reranker(convert(ranker.gguf), sign * (rows[0] - rows[1])[None])


def test_gguf_reranker_task(ranker):
    template = ranker.keys["tokenizer.chat_template.rerank"]
    ranker.save(add={"score.weight": ranker.rows}, **{
        "tokenizer.chat_template.rerank": template.replace(TASK, "Find the passage")})
    assert convert(ranker.gguf).prompts["instruct"] == "Find the passage"
    assert convert(ranker.gguf, "--prompt", "instruct=Else").prompts["instruct"] == "Else"
    ranker.save(add={"score.weight": ranker.rows}, **{
        "tokenizer.chat_template.rerank": template.replace("yes", "Yes")})
    message = refused(ranker.gguf)
    assert message.startswith("tiny.gguf: tokenizer.chat_template.rerank; it is not Qwen3-"
                              "Reranker's, the only one that qemb has (got ...")
    assert re.search(r'be \\"Yes\\" or .*, want \.\.\..* be \\"yes\\" or ', message)


@pytest.mark.parametrize("old,new,got,want", [
    ("system", "user", r'\(got "<\|im_start\|>user\\nJudge', r'"<\|im_start\|>system\\nJudge'),
    ("\n<Query>", "\n\n<Query>", r"the query\\n\\n<Query>", r"the query\\n<Query>"),
    ("\n\n</think>", "", r"<think>\\n\\n", r"<think>\\n\\n</think>"),
    ("<Instruct>: ", "", r">user\\nGiven a web", r">user\\n<Instruct>: Given a web")])
def test_gguf_reranker_shows_what_differs(ranker, old, new, got, want):
    template = ranker.keys["tokenizer.chat_template.rerank"].replace(old, new, 1)
    ranker.save(add={"score.weight": ranker.rows}, **{"tokenizer.chat_template.rerank": template})
    assert re.search(f"{got}.*, want .*{want}", refused(ranker.gguf))


@pytest.mark.parametrize("labels", [None, ["yes"], ["a", "b"], ["yes", "yes"]])
def test_gguf_reranker_without_labels(ranker, labels):
    rows = np.ones((2, 32), "f4")
    ranker.save(add={"score.weight": rows}, **{"qwen3.classifier.output_labels": labels})
    assert refused(ranker.gguf) == (
        f"tiny.gguf: qwen3.classifier.output_labels (got {json.dumps(labels)}, "
        'want ["yes", "no"] or ["no", "yes"])')


def test_gguf_reranker_refuses_options(ranker):
    ranker.save(add={"score.weight": ranker.rows})
    assert "--end-token: an option for embeddings" in refused(ranker.gguf, "--end-token", hf.EOS)
    assert "--pooling: an option for embeddings" in refused(ranker.gguf, "--pooling", "last")
    ranker.save(add={"score.weight": ranker.rows[:1]})
    assert "cls.output.weight: shape (got [1, 32], want [2, 32])" in refused(ranker.gguf)


# ---- GGUF: what it refuses ---------------------------------------------------------------------

T = "tokenizer.ggml."
GGUF_REFUSED = {
    "key": ({"qwen3.expert_count": 8}, "qwen3.expert_count (got 8, want no such key)"),
    "yarn": ({"qwen3.rope.scaling.type": "yarn"},
             "qwen3.rope.scaling.type; if it was added after the training, for longer texts, "
             'convert the original without it (got "yarn", want null or "none")'),
    "partial rope": ({"qwen3.rope.dimension_count": 16}, "dimension_count (got 16, want null or "),
    "value length": ({"qwen3.attention.value_length": 16}, "value_length (got 16, want null or 32"),
    "no head size": ({"qwen3.attention.key_length": None}, "not GGUF of the known form (KeyError"),
    "no layers": ({"qwen3.block_count": None}, "tiny.gguf: qwen3.block_count (got null"),
    "no theta": ({"qwen3.rope.freq_base": None}, "tiny.gguf: qwen3.rope.freq_base (got []"),
    "heads": ({"qwen3.attention.head_count": 3}, "attn_q.weight: shape (got"),
    "tokenizer": ({T + "model": "llama"}, 'tokenizer.ggml.model (got "llama", want "gpt2")'),
    "split": ({T + "pre": "llama-bpe"}, 'tokenizer.ggml.pre (got "llama-bpe", want "qwen2")'),
    "no split": ({T + "pre": None}, 'tokenizer.ggml.pre (got null, want "qwen2")'),
    "sep": ({T + "add_sep_token": True}, "tokenizer.ggml.add_sep_token (got true, want null or"),
    "space": ({T + "add_space_prefix": True}, "tokenizer.ggml.add_space_prefix (got true"),
    "bos": ({T + "add_bos_token": True}, "tokenizer.ggml.add_bos_token (got true"),
    "no tokens": ({T + "tokens": None}, "not GGUF of the known form (KeyError: 'tokens')"),
    "no merges": ({T + "merges": None}, "not GGUF of the known form (KeyError: 'merges')"),
    "merge": ({T + "merges": ["a b", "b a", "c d", "e f"]},
              'tokenizer.ggml: id of merge 1, "ba" (got null, want 257)'),
    "few types": ({T + "token_type": [1]}, "numbers of tokens and types (got 1, want 300)"),
    "end": ({T + "eos_token_id": 300}, "not GGUF of the known form (IndexError"),
    "unused end": ({T + "eos_token_id": 299}, '--end-token: "[PAD299]" is no token of this model'),
    "part": ({"split.count": 2}, "a part of a model; join the parts: llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_refuses_gguf(folder, case):
    keys, words = GGUF_REFUSED[case]
    message = refused(Pair(folder, **keys).gguf)
    assert message.startswith("tiny.gguf: ") and words in message


def test_refuses_gguf_of_another_model(folder):
    message = refused(Pair(folder, arch="llama").gguf)
    assert message == 'tiny.gguf: general.architecture (got "llama", want "qwen3")'


def test_refuses_a_kind_of_token(folder):
    pair = Pair(folder)
    pair.keys[T + "token_type"][262] = 2
    pair.save()
    assert 'type of the token "\\u00e9\\u4e2d" (got 2, want 1 or 3 or 4 or 5)' in refused(pair.gguf)


def test_refuses_tensors_of_gguf(folder):
    pair = Pair(folder)
    pair.save(drop=[OTHER])
    words = "missing tensor (got 1 missing, want none)"
    assert refused(pair.gguf) == f"tiny.gguf: blk.0.ffn_up.weight: {words}"
    for name in pair.tensors:
        if name != "embed_tokens.weight":
            pair.save(drop=[name])
            assert refused(pair.gguf) == f"tiny.gguf: {hf.gguf_name(name)}: {words}"
    pair.save(drop=["embed_tokens.weight"])
    assert refused(pair.gguf) == "tiny.gguf: token_embd.weight: missing tensor"
    pair.save(add={"rope_freqs.weight": np.ones(16, "f4")})
    assert refused(pair.gguf).startswith("tiny.gguf: rope_freqs.weight: no tensor of this model")
    pair.dtype = "Q4_0"
    pair.save()
    message = refused(pair.gguf)
    assert message.startswith("tiny.gguf: token_embd.weight: type, whose loss of accuracy")
    assert message.endswith("(got Q4_0, want BF16, F16, F32, Q8_0)")


@pytest.mark.parametrize("keep", [0, 3, 24, 100, 4000, -40, -1])
def test_refuses_a_damaged_gguf(folder, keep):
    path = Pair(folder).gguf
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(path).startswith("tiny.gguf: damaged, or not GGUF (")


def test_refuses_a_gguf_of_the_other_byte_order(folder):
    import gguf

    path = folder.parent / "tiny.gguf"
    w = gguf.GGUFWriter(path, "qwen3", endianess=gguf.GGUFEndian.BIG)
    w.add_tensor("token_embd.weight", np.ones((256, 32), "f4"))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    assert "byte order (got" in refused(path)


def test_refuses_a_gguf_that_shrinks(folder, monkeypatch):
    pair = Pair(folder)
    plain = convert_weights.check_tensors

    def check_tensors(*args):
        os.truncate(pair.gguf, 20000)
        return plain(*args)

    monkeypatch.setattr(convert_weights, "check_tensors", check_tensors)
    assert refused(pair.gguf).startswith("tiny.gguf: shrank while it was read (got ")


@pytest.mark.parametrize("more", [(), ("config.json", "tokenizer.json")])
def test_refuses_a_directory_of_gguf_files(folder, more):
    pair = Pair(folder)
    new = folder.with_name("files")
    new.mkdir()
    for name in more:
        shutil.copy(folder / name, new / name)
    for i in range(5):
        shutil.copy(pair.gguf, new / f"{i}.gguf")
    words = "files: GGUF files and no checkpoint; name one of them (got 0.gguf, "
    assert refused(new) == (words + "1.gguf, 2.gguf, 3.gguf and 1 more, want config.json and "
                            "model.safetensors)")
    shutil.copy(pair.gguf, folder / "x.gguf")
    convert(folder)


@pytest.mark.parametrize("listed", [True, False])
def test_hub_name_of_gguf_files(tmp_path, monkeypatch, listed):
    """None of them is among the files asked for, so the directory may not even exist."""
    import huggingface_hub

    def files(name, revision):
        assert (name, revision) == ("owner/some-GGUF", "0123")
        if not listed:
            raise OSError("no network")
        return ["README.md", "config.json", "Q8_0/some-Q8_0.gguf", "some-f16.gguf"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns, revision=None: str(tmp_path / "0123"))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
    monkeypatch.chdir(tmp_path)
    assert refused("owner/some-GGUF") == (
        "owner/some-GGUF: GGUF files and no checkpoint; download one of them by hf download and "
        "name that (got Q8_0/some-Q8_0.gguf, some-f16.gguf, want config.json and "
        "model.safetensors)" if listed else "config.json: no such file in the source")


# ---- what it refuses ---------------------------------------------------------------------------

CONFIG_REFUSED = {
    "model_type": (setting("model_type", "qwen2"), 'model_type (got "qwen2", want "qwen3")'),
    "architecture": (setting("architectures", ["Qwen3ForTokenClassification"]), "architectures"),
    "adapters": (setting("architectures", ["JinaEmbeddingsV5Model"]), "adapters are not merged"),
    "own code": (setting("auto_map", {"AutoModel": "modeling.OtherModel"}),
                 "auto_map: AutoModel is code of its own, which qemb does not have (got "
                 '"modeling.OtherModel", want none, as architectures says Qwen3ForCausalLM)'),
    "another code": (lambda j: j.update(architectures=["Qwen3Model"], auto_map={
        "AutoModel": "modeling.Qwen3BidirectionalModel"}), "want none, as architectures says Qwen"),
    "own configuration": (setting("auto_map", {"AutoConfig": "c.OtherConfig"}),
                          'auto_map: AutoConfig is code of its own, which qemb does not have (got '
                          '"c.OtherConfig", want none, as'),
    "pplx code": (steps(pplx, setting("auto_map", "AutoModel", "m.Qwen3BidirectionalModel")),
                  'AutoModel is code of its own, which qemb does not have (got "m.Qwen3Bidirectiona'
                  'lModel", want PPLXQwen3Model, as architectures says PPLXQwen3Model)'),
    "second code": (steps(pplx, lambda j: j["auto_map"].update(AutoModelForCausalLM="m.Other")),
                    "AutoModelForCausalLM is code of its own"),
    "pplx configuration": (steps(pplx, lambda j: j["auto_map"].update(AutoConfig="c.OtherConfig")),
                           "want PPLXQwen3Config, as architectures says PPLXQwen3Model"),
    "voyage configuration": (steps(voyage, lambda j: j["auto_map"].update(AutoConfig="c.Other")),
                             "AutoConfig is code of its own"),
    "own tokenizer": (setting("auto_map", {"AutoTokenizer": ["t.Tokenizer", None]}), "code of its"),
    "pplx type": (setting("architectures", ["PPLXQwen3Model"]),
                  'model_type (got "qwen3", want "bidirectional_pplx_qwen3")'),
    "two attentions": (lambda j: j.update(is_causal=True, use_bidirectional_attention=True),
                       "use_bidirectional_attention: transformers' Qwen3 reads is_causal alone"),
    "unread attention": (setting("use_bidirectional_attention", True),
                         "use_bidirectional_attention: transformers' Qwen3 reads is_causal alone "
                         "and would be causal; if it was trained bidirectional, copy the source "
                         'and add "is_causal": false, else remove this (got true, want "is_causal"'
                         ": false beside it)"),
    "text attention": (setting("use_bidirectional_attention", "yes"), '(got "yes", want null or'),
    "causal voyage": (steps(voyage, setting("is_causal", True)), "is_causal; Qwen3Bidirectional"
                      "Model is bidirectional (got true, want false)"),
    "causal pplx": (steps(pplx, lambda j: j.update(use_bidirectional_attention=False)),
                    "use_bidirectional_attention; PPLXQwen3Model is bidirectional (got false, want "
                    "null or true)"),
    "tied": (setting("tie_word_embeddings", "no"), 'tie_word_embeddings (got "no", want null or'),
    "no architecture": (without("architectures"), "architectures (got null"),
    "activation": (setting("hidden_act", "gelu"), 'hidden_act (got "gelu", want "silu")'),
    "bias": (setting("attention_bias", True), "attention_bias (got true"),
    "sliding": (setting("use_sliding_window", True), "use_sliding_window (got true"),
    "null causal": (setting("is_causal", None), "is_causal (got null, want true or false)"),
    "quantized": (setting("quantization_config", {"bits": 4}), "quantization_config; convert the "
                  'model from which this one was quantized (got {"bits"'),
    "sliding layer": (setting("layer_types", ["full_attention", "sliding_attention"]),
                      'layer_types (got "sliding_attention"'),
    "yarn": (setting("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
             "rope_scaling.rope_type; if it was added after the training, for longer texts, copy "
             'the source and remove rope_scaling (got "yarn", want "default")'),
    "old yarn": (setting("rope_scaling", {"factor": 4.0, "type": "yarn"}),
                 'remove rope_scaling (got "yarn"'),
    "new yarn": (setting("rope_parameters", {"rope_type": "yarn"}), "rope_parameters.rope_type; if "
                 "it was added after the training, for longer texts, copy the source and remove "
                 'all of rope_parameters but rope_theta (got "yarn", want "default")'),
    "partial rope": (setting("rope_parameters", {"partial_rotary_factor": 0.5}),
                     "rope_parameters.partial_rotary_factor (got 0.5"),
    "two thetas": (setting("rope_parameters", {"rope_theta": 10000.0}),
                   "rope_theta (got [10000.0, 1000000.0], want one value)"),
    "no theta": (without("rope_theta"), "rope_theta (got [], want one value)"),
    "text theta": (setting("rope_theta", "1e6"), 'rope_theta (got "1e6", want a number'),
    "small theta": (setting("rope_theta", 0.5), "rope_theta (got 0.5"),
    "no eps": (without("rms_norm_eps"), "rms_norm_eps (got null"),
    "zero eps": (setting("rms_norm_eps", 0), "rms_norm_eps (got 0"),
    "no layers": (setting("num_hidden_layers", 0), "num_hidden_layers (got 0, want an integer"),
    "float": (setting("hidden_size", 24.0), "hidden_size (got 24.0, want an integer"),
    "bool": (setting("num_key_value_heads", True), "num_key_value_heads (got true"),
    "text": (setting("vocab_size", "300"), "vocab_size (got"),
    "missing": (without("intermediate_size"), "intermediate_size (got null"),
    "huge": (setting("max_position_embeddings", 1 << 40), "embeddings (got 1099511627776, want"),
    "heads": (setting("num_attention_heads", 3), "heads (got 3, want a multiple of 2 key/value"),
    "odd head": (setting("head_dim", 11), "head_dim (got 11, want an even number)"),
    "list": (lambda j: [1], "not JSON of the known form"),
    "theta list": (setting("rope_theta", [1]), "not JSON of the known form"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSED)
def test_refuses_config(folder, case):
    change, words = CONFIG_REFUSED[case]
    edit(folder / "config.json", change)
    message = refused(folder)
    assert message.startswith("config.json: ") and words in message


PRE, SPLIT = "pre_tokenizer", ("pre_tokenizer", "pretokenizers", 0)
LEVEL, TEMPLATE = ("pre_tokenizer", "pretokenizers", 1), ("post_processor", "processors", 1)
FIRST = ("added_tokens", 0)


def swap_bytes(j):
    v = j["model"]["vocab"]
    v["a"], v["b"] = v["b"], v["a"]


def swap_merges(j):
    v = j["model"]["vocab"]
    v["ab"], v["abc"] = v["abc"], v["ab"]


TOKENIZER_REFUSED = {
    "type": (setting("model", "type", "Unigram"), 'model type (got "Unigram", want "BPE")'),
    "dropout": (setting("model", "dropout", 0.1), "model dropout (got 0.1"),
    "unk": (setting("model", "unk_token", "<unk>"), "model unk_token"),
    "prefix": (setting("model", "continuing_subword_prefix", "##"), "continuing_subword_prefix"),
    "suffix": (setting("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    "byte fallback": (setting("model", "byte_fallback", True), "byte_fallback (got true"),
    "ignore merges": (setting("model", "ignore_merges", True), "ignore_merges (got true"),
    "normalizer": (setting("normalizer", {"type": "NFKC"}), 'normalizer (got {"type": "NFKC"}'),
    "no normalizer": (setting("normalizer", None), "normalizer (got null"),
    "no pre-tokenizer": (setting(PRE, None), "not JSON of the known form"),
    "byte level alone": (setting(PRE, {"type": "ByteLevel"}), '(got ["ByteLevel", null]'),
    "pattern": (setting(*SPLIT, "pattern", "Regex", hf.SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")),
                r"\\p{N}]?\\p{L}+|\\p{N}{1,3}| "),
    "string pattern": (setting(*SPLIT, "pattern", {"String": hf.SPLIT}), "pre_tokenizer pattern"),
    "behavior": (setting(*SPLIT, "behavior", "Removed"), 'behavior (got "Removed"'),
    "invert": (setting(*SPLIT, "invert", True), "invert (got true"),
    "prefix space": (setting(*LEVEL, "add_prefix_space", True), "add_prefix_space (got true"),
    "use regex": (setting(*LEVEL, "use_regex", True), "use_regex (got true"),
    "third step": (lambda j: j[PRE]["pretokenizers"].append({"type": "Digits"}),
                   "not JSON of the known form"),
    "byte ids": (swap_bytes, 'id of the byte character "a" (got 65, want 64)'),
    "byte missing": (without("model", "vocab", "z"),
                     'id of the byte character "z" (got null'),
    "merge order": (swap_merges, 'id of merge 0, "ab" (got 257, want 256)'),
    "merge of unknown": (setting("model", "merges", 1, ["ab", "ő"]),
                         'merge 1, "\\u0151" (got no id, want below 257)'),
    "merge of younger": (lambda j: j["model"]["merges"].reverse(), "merge 0, "),
    "repeated merge": (setting("model", "merges", 1, ["a", "b"]), 'id of merge 1, "ab" (got 256'),
    "merge of three": (setting("model", "merges", 1, ["a", "b", "c"]), "not JSON of the known"),
    "extra vocabulary": (setting("model", "vocab", "qqq", 270), "size (got 261, want 260)"),
    "no merges": (without("model", "merges"), "not JSON of the known form"),
    "lstrip": (setting(*FIRST, "lstrip", True), '"<|endoftext|>" lstrip (got true, want false)'),
    "rstrip": (setting(*FIRST, "rstrip", True), "rstrip (got true"),
    "single word": (setting(*FIRST, "single_word", True), "single_word (got true"),
    "normalized": (setting(*FIRST, "normalized", 1.5), "normalized (got 1.5, want false or true"),
    "id of a merge": (setting("added_tokens", 1, "id", 257), '"<think>" id (got 257'),
    "id beyond the table": (setting("added_tokens", 2, "id", 300),
                            "id (got 300, want one of its own, from 260 to 299)"),
    "id no integer": (setting("added_tokens", 1, "id", 261.0), "id (got 261.0, want"),
    "id twice": (setting("added_tokens", 1, "id", 260), "id (got 260"),
    "text twice": (setting("added_tokens", 1, "content", hf.EOS), "text (got an empty or repeated"),
    "empty text": (setting("added_tokens", 1, "content", ""), '"" text (got an empty'),
    "lone surrogate": (setting("added_tokens", 1, "content", "\ud800"), "UnicodeEncodeError"),
    "other post-processor": (setting(*TEMPLATE, "type", "BertProcessing"), "post_processor"),
    "no end-of-text": (without(*TEMPLATE, "single", -1),
                       'a single text (got ["Sequence"], want ["Sequence", "SpecialToken"])'),
    "end-of-text first": (lambda j: j["post_processor"]["processors"][1]["single"].reverse(),
                          "a single text"),
    "end-of-text twice": (lambda j: j["post_processor"]["processors"][1]["single"].append(
        {"SpecialToken": {"id": hf.EOS, "type_id": 0}}), "a single text"),
    "no added token": (setting(*TEMPLATE, "single", 1, "SpecialToken", "id", "<x>"), "KeyError"),
    "two ids": (setting(*TEMPLATE, "special_tokens", hf.EOS, "ids", [260, 260]), "(got [260, 260]"),
    "another id": (setting(*TEMPLATE, "special_tokens", hf.EOS, "ids", [261]),
                   "(got [261], want [260])"),
    "list": (lambda j: [], "not JSON of the known form"),
}


@pytest.mark.parametrize("case", TOKENIZER_REFUSED)
def test_refuses_tokenizer(folder, case):
    change, words = TOKENIZER_REFUSED[case]
    edit(folder / "tokenizer.json", change)
    message = refused(folder)
    assert message.startswith("tokenizer.json: ") and words in message


def test_refuses_more_tokens_than_rows(folder):
    edit(folder / "config.json", setting("vocab_size", 259))
    assert refused(folder) == "tokenizer.json: tokens (got 260, want at most vocab_size, 259)"


WRONG = "pooling; if it is wrong, say what is pooled by --pooling last or mean "
ST_REFUSED = {
    "max pooling": ("1_Pooling/config.json", lambda j: j.update(
        pooling_mode_lasttoken=False, pooling_mode_max_tokens=True), WRONG + '(got ["max"]'),
    "two poolings": ("1_Pooling/config.json", setting("pooling_mode_mean_tokens", True),
                     WRONG + '(got ["lasttoken", "mean"], want ["lasttoken"] or ["mean"])'),
    "newer list": ("1_Pooling/config.json", lambda j: {"pooling_mode": ["mean", "max"]},
                   WRONG + '(got ["max", "mean"]'),
    "mean twice": ("1_Pooling/config.json", lambda j: {"pooling_mode": ["mean", "mean"]},
                   WRONG + '(got ["mean", "mean"]'),
    "prompt left out": ("1_Pooling/config.json", lambda j: {
        "pooling_mode": "mean", "include_prompt": False}, "include_prompt (got false, want true)"),
    "newer cls": ("1_Pooling/config.json", lambda j: {"pooling_mode": "cls"}, '(got ["cls"]'),
    "no pooling": ("1_Pooling/config.json", lambda j: {}, WRONG + "(got []"),
    "no pooling module": ("modules.json", without(1), 'modules (got ["Transformer", '
                          '"Normalize"], want Transformer, Pooling, Dense or not, Normalize or '),
    "own pooling": ("modules.json", setting(1, "type", "custom_st.Pooling"),
                    'code of their own, which qemb does not have (got ["custom_st.Pooling"], want'),
    "two dense": ("modules.json", lambda j: j[:2] + [{"type": "Dense", "name": n} for n in "23"],
                  '"Pooling", "Dense", "Dense"], want'),
    "dense behind": ("modules.json", lambda j: j.append({"type": "x.Dense", "name": "3"}),
                     '"Normalize", "Dense"], want'),
    "dense elsewhere": ("modules.json", lambda j: j.insert(
        2, {"type": "sentence_transformers.models.Dense", "path": "3", "name": "x"}),
                        'path of Dense (got "3", want "2_Dense")'),
    "no name": ("modules.json", without(1, "name"), "not JSON of the known form (KeyError: 'name"),
    "own dropout": ("modules.json", lambda j: j.insert(2, {"type": "x.Dropout", "name": "d"}),
                    'code of their own, which qemb does not have (got ["x.Dropout"], want'),
    "model elsewhere": ("modules.json", setting(0, "path", "0_Transformer"),
                        'path of Transformer (got "0_Transformer", want "")'),
    "pooling elsewhere": ("modules.json", setting(1, "path", "2_Pooling"), 'Pooling (got "2_'),
    "default prompt": ("config_sentence_transformers.json", setting("default_prompt_name", "query"),
                       "default_prompt_name; copy the source and remove it, and choose the prompt "
                       'by qemb --prompt query (got "query", want null)'),
    "kind": ("config_sentence_transformers.json", setting("model_type", "SparseEncoder"),
             'model_type (got "SparseEncoder"'),
    "cut": ("config_sentence_transformers.json", setting("truncate_dim", 12),
            "truncate_dim; copy the source and remove it, and cut the vectors by qemb --dim 12 "
            "(got 12, want null)"),
    "suffix": ("config_sentence_transformers.json", setting("suffix", "<|im_end|>"), "suffix (got"),
    "NUL": ("config_sentence_transformers.json", setting("prompts", "query", "a\0b"), "NUL char"),
    "unnamed": ("config_sentence_transformers.json", setting("prompts", "", "x"), "prompts (got"),
    "too many": ("config_sentence_transformers.json",
                 setting("prompts", {str(i): "" for i in range(65)}), "at most 64"),
    "number": ("config_sentence_transformers.json", setting("prompts", "query", 3), "want a text"),
}


@pytest.mark.parametrize("key", ["query_length", "document_length"])
def test_refuses_two_lengths(folder, key):
    hf.save_json(folder / "sentence_bert_config.json", {key: 24})
    assert refused(folder) == f"sentence_bert_config.json: {key} (got 24, want null)"


def test_refuses_lower_case(folder):
    settings = folder / "sentence_bert_config.json"
    hf.save_json(settings, {"max_seq_length": 512, "do_lower_case": False})
    convert(folder)
    edit(settings, setting("do_lower_case", True))
    assert refused(folder) == (
        "sentence_bert_config.json: do_lower_case (got true, want null or false)")


@pytest.mark.parametrize("case", ST_REFUSED)
def test_refuses_sentence_transformers(folder, case):
    name, change, words = ST_REFUSED[case]
    edit(folder / name, change)
    message = refused(folder)
    assert message.startswith(f"{name}: ") and words in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_refuses_a_missing_file(folder, name):
    (folder / name).unlink()
    assert refused(folder).startswith(f"{name}: no such file in the source")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json",
                                  "1_Pooling/config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100000])
def test_refuses_what_is_not_json(folder, name, data):
    (folder / name).write_bytes(data)
    assert refused(folder).startswith(f"{name}: not JSON")


# ---- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_refuses_a_missing_tensor(folder, prefix):
    tensors = weights(prefix=prefix)
    del tensors[prefix + OTHER]
    save(folder / "model.safetensors", tensors)
    assert refused(folder) == f"{OTHER}: missing tensor (got 1 missing, want none)"


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "score.weight",
                                  "model.layers.0.self_attn.q_proj.bias", "model.lm_head.bias"])
def test_refuses_an_extra_tensor(folder, name):
    save(folder / "model.safetensors", weights() | {name: ("F32", (1,), bytes(4))})
    assert refused(folder) == f"{name}: no tensor of this model (got 1 extra, want none)"


@pytest.mark.parametrize("shape", [(24, 20), (480,), (1, 20, 24), (10, 48)])
def test_refuses_a_misshapen_tensor(folder, shape):
    tensors = weights()
    dtype, _, data = tensors["model." + OTHER]
    save(folder / "model.safetensors", tensors | {"model." + OTHER: (dtype, shape, data)})
    assert refused(folder) == f"model.{OTHER}: shape (got {list(shape)}, want [20, 24])"


def test_refuses_a_vector_that_is_a_matrix(folder):
    tensors = weights()
    dtype, _, data = tensors["model.norm.weight"]
    save(folder / "model.safetensors", tensors | {"model.norm.weight": (dtype, (1, 24), data)})
    assert refused(folder) == "model.norm.weight: shape (got [1, 24], want [24])"


def test_refuses_another_dtype(folder):
    tensors = weights()
    _, shape, data = tensors["model." + OTHER]
    save(folder / "model.safetensors", tensors | {"model." + OTHER: ("I16", shape, data)})
    assert refused(folder) == f"model.{OTHER}: dtype (got I16, want BF16, F16, F32)"


def test_refuses_a_tensor_with_and_without_prefix(folder):
    tensors = weights()
    save(folder / "model.safetensors", tensors | {OTHER: tensors["model." + OTHER]})
    assert "there twice" in refused(folder)


@pytest.mark.parametrize("dtype,value,shown", [
    ("BF16", 65536.0, "65536"), ("BF16", -70144.0, "-70144"), ("BF16", np.inf, "inf"),
    ("BF16", np.nan, "nan"), ("F16", -np.inf, "-inf"), ("F16", np.nan, "nan"),
    ("F32", 65505.0, "65505"), ("F32", 1e38, "1e+38"), ("F32", np.nan, "nan")])
def test_refuses_what_fp16_cannot_hold(folder, monkeypatch, dtype, value, shown):
    monkeypatch.setattr(convert_weights, "BLOCK", 4 * SHAPE["hidden"])  # rows count over blocks
    tensors = weights(dtype)
    put(tensors, "model." + OTHER, 13 * SHAPE["hidden"] + 5, value)
    put(tensors, "model." + OTHER, 14 * SHAPE["hidden"], value)  # the first one is named
    save(folder / "model.safetensors", tensors)
    message = refused(folder)
    assert message == f"model.{OTHER}[13, 5]: number (got {shown}, want a finite one up to 65504)"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_a_norm_that_is_not_finite(folder, value):
    tensors = weights()
    put(tensors, "model.layers.1.self_attn.k_norm.weight", 3, value)
    save(folder / "model.safetensors", tensors)
    assert refused(folder).startswith("model.layers.1.self_attn.k_norm.weight[3]: number (got ")


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_refuses_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(folder).startswith("model.safetensors: damaged, or not safetensors: ")


def test_refuses_a_file_that_shrinks(folder, monkeypatch):
    """The file shrinks between the check of its header and the reading of its weights."""
    plain = convert_weights.check_tensors

    def check_tensors(*args):
        os.truncate(folder / "model.safetensors", 6000)
        return plain(*args)

    monkeypatch.setattr(convert_weights, "check_tensors", check_tensors)
    message = refused(folder)
    assert message.startswith("model.safetensors: shrank while it was read (got ")


def test_refuses_what_is_not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x02pickle" * 1000)
    assert refused(folder).startswith("model.safetensors: damaged")


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.pt"])
def test_refuses_no_weights(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert refused(folder) == (
        f"{folder}: no weights (want model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin or pytorch_model.bin.index.json)")


SHARD = "model-00002-of-00003.safetensors"


def test_refuses_a_missing_shard(folder):
    save_shards(folder, weights())
    (folder / SHARD).unlink()
    assert refused(folder) == (f"model.safetensors.index.json: shard {SHARD}: no such file in the "
                               "source")


@pytest.mark.parametrize("shard", ["../source/" + SHARD, 3, "", None])
def test_refuses_a_shard_that_is_no_name(folder, shard):
    index = save_shards(folder, weights())
    index["weight_map"]["model." + OTHER] = shard
    hf.save_json(folder / "model.safetensors.index.json", index)
    assert refused(folder).startswith("model.safetensors.index.json: ")


def test_refuses_a_tensor_in_two_shards(folder):
    tensors = weights()
    index = save_shards(folder, tensors)
    other = next(s for s in sorted(set(index["weight_map"].values()))
                 if s != index["weight_map"]["model." + OTHER])
    part = {n: tensors[n] for n, s in index["weight_map"].items() if s == other}
    save(folder / other, part | {"model." + OTHER: tensors["model." + OTHER]})
    message = refused(folder)
    assert message.startswith(f"model.{OTHER}: ") and re.search("there twice|not where", message)


def test_refuses_an_index_that_names_a_missing_tensor(folder):
    index = save_shards(folder, weights())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARD
    hf.save_json(folder / "model.safetensors.index.json", index)
    assert refused(folder) == (
        f"model.layers.9.mlp.up_proj.weight: the index names it, {SHARD} lacks it")


def test_refuses_an_index_that_points_to_another_shard(folder):
    index = save_shards(folder, weights())
    where = index["weight_map"]
    real = where["model." + OTHER]
    where["model." + OTHER] = next(s for s in sorted(where.values()) if s != real)
    hf.save_json(folder / "model.safetensors.index.json", index)
    assert refused(folder) == (f"model.{OTHER}: not where the index says (got {real}, want "
                               f"{where['model.' + OTHER]})")


def test_refuses_a_tensor_that_the_index_forgot(folder):
    index = save_shards(folder, weights())
    del index["weight_map"]["model." + OTHER]
    hf.save_json(folder / "model.safetensors.index.json", index)
    assert "want not listed" in refused(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": {}}}])
def test_refuses_a_malformed_index(folder, index):
    save_shards(folder, weights())
    hf.save_json(folder / "model.safetensors.index.json", index)
    assert refused(folder).startswith("model.safetensors.index.json: ")


def test_refuses_a_file_as_source(folder):
    path = folder / "model.safetensors"
    assert refused(path) == (f"{path}: source (got a file, want a directory, a .gguf file or a "
                             "name on the hub)")


@pytest.mark.parametrize("name", ["no-such-directory", "a/b/c", "/no/such", "", "a b/c"])
def test_refuses_what_is_neither_directory_nor_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "":
        monkeypatch.chdir("/")  # "" is "."
        assert "config.json: no such file" in refused(name)
    else:
        assert "no such directory, and not a name on the hub (want owner/name)" in refused(name)


def test_refuses_a_directory_as_output(folder):
    os.mkdir("out.qemb")
    assert refused(folder, "--out", "out.qemb") == (
        "out.qemb: output (got something else, want a file, or a free name)")


def test_refuses_an_output_nowhere(folder):
    assert refused(folder, "--out", "no/out.qemb").endswith("No such file or directory")


# ---- the hub -----------------------------------------------------------------------------------


def test_hub_name(folder, monkeypatch):
    """The download is asked for what is needed, and the commit is recorded. No network."""
    import huggingface_hub
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot, asked = folder.parent / "snapshots" / commit, []
    shutil.copytree(folder, snapshot)

    def download(name, allow_patterns):
        asked.append((name, set(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run("Qwen/Qwen3-Embedding-0.6B")
    name, patterns = asked.pop()
    assert name == "Qwen/Qwen3-Embedding-0.6B" and not asked
    assert patterns >= {"config.json", "tokenizer.json", "1_Pooling/config.json", "modules.json",
                        "config_sentence_transformers.json", "model*.safetensors",
                        "model.safetensors.index.json", "adapter_config.json",
                        "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                        "?_*/config.json", "?_Dense/model.safetensors",
                        "1_LogitScore/config.json", "chat_template.jinja"}
    assert os.listdir() == ["Qwen3-Embedding-0.6B.qemb"]
    lines = Qemb("Qwen3-Embedding-0.6B.qemb").provenance.splitlines()
    assert lines[:2] == ["source: Qwen/Qwen3-Embedding-0.6B", f"revision: {commit}"]


def test_hub_refusal_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def download(name, allow_patterns):
        raise OSError("404 Client Error.\n\nRepository Not Found\nfor url")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert refused("some/model") == (
        "some/model: no such directory, and not from the hub: 404 Client Error. Repository Not "
        "Found for url")


def test_hub_without_network(tmp_path):
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", "some/model", "-q"],
                       capture_output=True, text=True, cwd=tmp_path,
                       env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")})
    assert (r.returncode, r.stdout, r.stderr.count("\n")) == (1, "", 1)
    assert r.stderr.startswith("convert_weights.py: some/model: no such directory, and not from")


# ---- as a program ------------------------------------------------------------------------------


def test_exit_status_and_streams(folder):
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", "out.qemb"],
                       capture_output=True, text=True)
    assert (r.returncode, r.stderr) == (0, "") and r.stdout.count("\n") == 8
    edit(folder / "config.json", setting("model_type", "llama"))
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", "no.qemb"],
                       capture_output=True, text=True)
    assert (r.returncode, r.stdout) == (1, "")
    assert r.stderr == 'convert_weights.py: config.json: model_type (got "llama", want "qwen3")\n'
    assert os.listdir() == ["out.qemb"]


NEEDS = re.findall(r'^#   ("[a-z_]+>=.*"),$', (ROOT / "convert_weights.py").read_text(), re.M)


def test_packages_missing():
    """-I -S: without site-packages."""
    r = subprocess.run([sys.executable, "-I", "-S", ROOT / "convert_weights.py", "--help"],
                       capture_output=True, text=True)
    assert (r.returncode, r.stdout) == (1, "") and len(NEEDS) == 5
    assert r.stderr == (
        "convert_weights.py: numpy: no such package; `make convert` installs it for .venv/bin/"
        f"python convert_weights.py, or: pip install {' '.join(NEEDS)}\n")


@pytest.mark.parametrize("name", ["gguf", "huggingface_hub"])
def test_a_package_missing(folder, monkeypatch, name):
    """Those that only some sources need."""
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    path = folder.parent / "x.gguf"
    path.touch()
    source = path if name == "gguf" else "owner/name"
    assert refused(source).startswith(f"{name}: no such package; `make convert` installs it ")


# Stops in the middle of the weights, says so, and waits to be killed.
HALFWAY = """
import sys, time
sys.path.insert(0, {root!r})
import convert_weights as c
plain, calls = c.read_rows, []
def read_rows(t, *args):
    calls.append(t)
    if len(calls) == 10:
        print("halfway", flush=True)
        time.sleep(600)
    return plain(t, *args)
c.read_rows = read_rows
c.main()
"""


def stop_halfway(folder, signal_number):
    script = HALFWAY.format(root=str(ROOT))
    p = subprocess.Popen([sys.executable, "-c", script, folder, "--out", "out.qemb"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "halfway\n"
    assert len(os.listdir()) == 2  # the old file and a temporary one beside it
    p.send_signal(signal_number)
    _, err = p.communicate()
    return p.returncode, err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing(folder, name):
    Path("out.qemb").write_bytes(b"old")
    number = getattr(signal, name)
    status, err = stop_halfway(folder, number)
    assert status == 128 + number
    assert err == f"convert_weights.py: stopped by {name}, nothing written\n"
    assert os.listdir() == ["out.qemb"] and Path("out.qemb").read_bytes() == b"old"


def test_a_kill_leaves_the_old_file(folder):
    Path("out.qemb").write_bytes(b"old")
    status, _ = stop_halfway(folder, signal.SIGKILL)
    assert status == -signal.SIGKILL and Path("out.qemb").read_bytes() == b"old"
    run(folder, "--out", "out.qemb")  # the temporary file does not disturb the next run
    Qemb("out.qemb")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9999])
def test_a_full_disk(folder, part):
    """A limit on file size stands for a full disk: in the header, the weights, the last flush."""
    run(folder, "-q", "--out", "out.qemb")
    limit = int(part * Path("out.qemb").stat().st_size)
    Path("out.qemb").write_bytes(b"old")
    r = subprocess.run(
        [sys.executable, ROOT / "convert_weights.py", folder, "--out", "out.qemb"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert (r.returncode, r.stdout) == (1, "")
    assert r.stderr == "convert_weights.py: out.qemb: File too large\n"
    assert os.listdir() == ["out.qemb"] and Path("out.qemb").read_bytes() == b"old"


# Zeros give no vector, so the new file is not tried by qemb.
MEASURE = """
import sys
sys.path.insert(0, {root!r})
import convert_weights as c
c.QEMB = "/nonexistent"
c.main()
print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_model(folder):
    """A table of 320 MB, all zeros and sparse, and a tiny one. Between them lies at most what one
    block of BLOCK numbers takes: FP32, its bits on the way from BF16, FP16, FP32 again, error and
    magnitude, and the bytes written, 32 bytes a number at most."""
    peaks = []
    for hidden, vocab in ((64, 300), (64, 2_500_000)):
        s = SHAPE | {"hidden": hidden, "vocab": vocab}
        edit(folder / "config.json", lambda j: hf.config_json(s))
        tensors = hf.tensor_shapes(s)
        hf.save_safetensors(folder / "model.safetensors",
                            {n: ("BF16", t, []) for n, t in tensors.items()})
        numbers = sum(int(np.prod(t)) for t in tensors.values())
        with open(folder / "model.safetensors", "r+b") as f:
            f.truncate(f.seek(0, 2) + 2 * numbers)
        r = subprocess.run([sys.executable, "-c", MEASURE.format(root=str(ROOT)), folder, "-q",
                            "--out", "out.qemb"], capture_output=True, text=True, check=True)
        peaks.append(int(r.stdout) * 1024)
        size = Path("out.qemb").stat().st_size
    assert size > 320e6
    assert peaks[1] - peaks[0] <= 32 * convert_weights.BLOCK < size / 2


def test_memory_does_not_grow_with_a_gguf(tmp_path, monkeypatch):
    """The same with a table in Q8_0, which the package maps, and which takes 34 / 32 bytes a number
    on the way instead of BF16's 2."""
    monkeypatch.chdir(tmp_path)
    peaks = []
    for vocab in (300, 2_500_000):
        hf.save_gguf("in.gguf", hf.gguf_keys(WIDE, MERGES, ADDED),
                     hf.tensor_shapes(WIDE | {"vocab": vocab}), "Q8_0")
        r = subprocess.run([sys.executable, "-c", MEASURE.format(root=str(ROOT)), "in.gguf", "-q",
                            "--out", "out.qemb"], capture_output=True, text=True, check=True)
        peaks.append(int(r.stdout) * 1024)
        size = Path("out.qemb").stat().st_size
    assert size > 160e6
    assert peaks[1] - peaks[0] <= 32 * convert_weights.BLOCK < size


def test_random_model_maker(tmp_path, monkeypatch):
    """The maker of full-size checkpoints: one layer, cut small by a shape of its own, converts, and
    depends on its seed alone."""
    import make_random_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hf.SHAPES, "0.6B", SHAPE)
    tokenizer = tmp_path / "tokenizer.json"
    hf.save_json(tokenizer, hf.tokenizer_json(MERGES, ADDED))
    digests = []
    for options in ([], [], ["--seed", "2"], ["--massive"]):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", ["make", "model", "--tokenizer", str(tokenizer), *options])
            make_random_model.main()
        run("model", "-q")
        digests.append(Qemb("model.qemb").sha256)
    assert digests[0] == digests[1] and len(set(digests)) == 3
