"""The committed goldens of encoders are what tests/fixtures/encoder_golden.py describes."""
import json
import struct
import subprocess

import numpy as np
import pytest
from edit_qemb import NO_TOKEN, Qemb
from helpers import QEMB, ROOT

# architecture, bos_id, pad_id, first_position; pooling; layers, hidden, heads, eps
WANT = {
    "xlmr": ((1, 0, 1, 2), 2, (3, 32, 2), 1e-5),
    "e5": ((1, 0, NO_TOKEN, 0), 1, (2, 64, 2), 1e-12),
    "xlmr64": ((1, 0, 1, 2), 1, (2, 64, 1), 1e-5),
}
LABELS = {"empty", "word", "scripts", "pad", "pads", "mask", "added", "fullwidth", "unknown",
          "repeated"}


def read(name):
    """{label: (text or None, ids, vector)}"""
    lines = (ROOT / f"tests/golden/{name}.vec").read_text().splitlines()
    assert lines[:2] == ["golden 1", f"model {name}"]
    found = {}
    for at in range(7, len(lines), 5):
        label, text, ids, _, vec = (line.split() for line in lines[at : at + 5])
        v = np.array([float.fromhex(x) for x in vec[2:]])
        # Rounding to float32 changes a number by 2^-24 of it at most, its square by twice that.
        assert abs(v @ v - 1) <= 2.0**-23 * (1 + 1e-6)
        found[label[1]] = (None if text[1] == "-1" else bytes.fromhex("".join(text[2:])).decode(),
                           [int(i) for i in ids[2:]], v)
    return found


@pytest.mark.parametrize("name", WANT)
def test_committed_goldens_are_sound(name):
    q = Qemb(ROOT / f"tests/golden/{name}.qemb")
    data = (ROOT / f"tests/golden/{name}.qemb").read_bytes()
    own, pooling, (layers, hidden, heads), eps = WANT[name]
    assert len(data) < 300_000
    assert struct.unpack_from("<4I", data, 148) == own
    assert struct.unpack_from("<2f", data, 108) == (0, np.float32(eps))
    c = q.config
    assert (c["n_layers"], c["hidden"], c["n_heads"]) == (layers, hidden, heads)
    assert (c["pooling"], c["attention"], c["eos_id"], c["max_positions"]) == (pooling, 1, 2, 200)
    assert "note: random weights\n" in q.sections["provenance"][4].decode()
    assert q.prompts == ({"query": "query: ", "document": "passage: "} if name == "e5" else {})
    cases = read(name)
    assert LABELS <= set(cases)
    assert {len(ids) for _, ids, _ in cases.values()} >= {2, 3, 17, 63, 64, 65, 128, 129, 199, 200}
    for label, (text, ids, v) in cases.items():
        assert (text is None) == label.startswith("length") and len(v) == hidden
        assert (ids[0], ids[-1]) == (0, 2) and max(ids) < c["vocab"]
    assert cases["empty"][1] == [0, 2]
    assert 1 in cases["pad"][1] and cases["pads"][1] == [0, 1, 1, 2]
    assert 0 in cases["added"][1][1:] and 3 in cases["unknown"][1]


@pytest.mark.parametrize("options", [[], ["--int8"]])
def test_make_big_qemb(tmp_path, options):
    """Its encoders pass the loader and give vectors."""
    subprocess.run([ROOT / "tests/fixtures/make_big_qemb.py", tmp_path / "m.qemb", "--shape",
                    "tiny-encoder", *options], check=True)
    texts = [[0, 2], [0, *range(5, 500), 2], [0, 1, 7, 2]]
    r = subprocess.run([QEMB, "-m", tmp_path / "m.qemb", "--input", "jsonl", "--output", "f32"],
                       input="".join(json.dumps({"ids": t}) + "\n" for t in texts).encode(),
                       stdout=subprocess.PIPE, check=True)
    v = np.frombuffer(r.stdout, "<f4").reshape(3, 64)
    assert np.isfinite(v).all() and len(np.unique(v, axis=0)) == 3
