"""pytorch_model.bin: what torch.save writes is read, and anything else that a pickle or a zip can
say is refused without being run. encoder_fixture makes the files byte by byte."""
import io
import pickle
import random
import struct
import zipfile
from pathlib import Path

import encoder_fixture as ef
import hf_fixture as hf
import numpy as np
import pytest
from encoder_fixture import (ORDERED_DICT, pickle_of, put_int, put_ints, put_name, put_tensor,
                             put_text, save_zip)
from test_convert import convert, convert_weights, refused, weights
from test_convert import folder  # noqa: F401 (a fixture: a Qwen3)
from test_convert_encoder import SHAPE, bert, weights_of, xlmr  # noqa: F401 (fixtures)

BIN, SAFE = "pytorch_model.bin", "model.safetensors"
POSITION_IDS = {"embeddings.position_ids": np.arange(66)[None]}


def to_bin(folder, is_bert=False, **options):
    """Puts a pytorch_model.bin in the place of model.safetensors."""
    (folder / SAFE).unlink(missing_ok=True)
    ef.save_bin(folder / BIN, ef.random_arrays(SHAPE, 7, is_bert), **options)
    return folder / BIN


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("is_bert", [False, True])
def test_both_forms_give_the_same_weights(request, is_bert, dtype):
    folder = request.getfixturevalue("bert" if is_bert else "xlmr")
    ef.save_arrays(folder / SAFE, ef.random_arrays(SHAPE, 7, is_bert), dtype)
    want = convert(folder)
    path = to_bin(folder, is_bert, dtype=dtype, more=POSITION_IDS)
    q = convert(folder)
    assert weights_of(q) == weights_of(want) and q.config == want.config
    assert f"file: {BIN} {path.stat().st_size} bytes\n" in q.provenance
    assert "embeddings.position_ids left out" in q.provenance


def test_a_qwen3(folder):  # noqa: F811
    want = convert(folder)
    (folder / SAFE).unlink()
    ef.save_bin(folder / BIN, {
        name: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        for name, (_, shape, data) in weights().items()})  # BF16
    assert weights_of(convert(folder)) == weights_of(want)


def test_only_an_encoder_has_a_pooler(folder):  # noqa: F811
    hf.save_safetensors(folder / SAFE, {
        name: (dtype, shape, [data]) for name, (dtype, shape, data) in (weights() | {
            "pooler.dense.bias": ("F32", (1,), bytes(4))}).items()})
    assert refused(folder) == "pooler.dense.bias: no tensor of this model (got 1 extra, want none)"


def test_safetensors_go_first(xlmr):  # noqa: F811
    want = convert(xlmr)
    (xlmr / BIN).write_bytes(b"not even a zip")
    assert weights_of(convert(xlmr)) == weights_of(want)


def test_shards(xlmr):  # noqa: F811
    want, arrays, where = convert(xlmr), ef.random_arrays(SHAPE, 7), {}
    (xlmr / SAFE).unlink()
    for i in range(2):
        name = f"pytorch_model-{i + 1:05}-of-00002.bin"
        part = dict(list(arrays.items())[i::2])
        ef.save_bin(xlmr / name, part)
        where |= dict.fromkeys(part, name)
    hf.save_json(xlmr / f"{BIN}.index.json", {"metadata": {}, "weight_map": where})
    assert weights_of(convert(xlmr)) == weights_of(want)
    (xlmr / name).unlink()
    assert refused(xlmr) == f"{BIN}.index.json: shard {name}: no such file in the source"


# What torch 2.15 saves of torch.nn.Linear(3, 2), with its memo and _metadata.
LINEAR = (
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x06\x00\x00\x00weightq\x02ctorch._util"
    b"s\n_rebuild_tensor_v2\nq\x03((X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X"
    b"\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07K\x06tq\x08QK\x00K\x02K\x03\x86q\tK\x03K"
    b"\x01\x86q\n\x89h\x00)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00biasq\x0eh\x03((h\x04h\x05X\x01"
    b"\x00\x00\x001q\x0fh\x07K\x02tq\x10QK\x00K\x02\x85q\x11K\x01\x85q\x12\x89h\x00)Rq\x13tq"
    b"\x14Rq\x15u}q\x16X\t\x00\x00\x00_metadataq\x17h\x00)Rq\x18X\x00\x00\x00\x00q\x19}q\x1aX"
    b"\x07\x00\x00\x00versionq\x1bK\x01sssb.")
DATA = {"data/0": bytes(range(24)), "data/1": bytes(range(24, 32))}


def tensors_of(tmp_path, data, members=None, folder="x"):
    """name -> bytes of what the converter finds."""
    path = tmp_path / BIN
    save_zip(path, {"data.pkl": data} | (DATA if members is None else members), folder)
    whole = path.read_bytes()
    size = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
    return {name: whole[t.offset : t.offset + int(np.prod(t.shape)) * size[t.dtype]]
            for name, t in convert_weights.open_pickle(path, BIN).items()}


def test_a_file_of_torch(tmp_path):
    assert tensors_of(tmp_path, LINEAR, folder="name of the file") == {
        "weight": DATA["data/0"], "bias": DATA["data/1"]}


def test_tensors_that_share_a_storage(tmp_path):
    got = tensors_of(tmp_path, pickle_of({
        "all": put_tensor("0", "F32", (2, 3)),
        "row": put_tensor("0", "F32", (3,), offset=3, count=6),
        "one": put_tensor("0", "F32", (1, 1), (9, 7), offset=5, count=6),
        "none": put_tensor("0", "F32", (0, 3), offset=6, count=6)}))
    assert got == {"all": DATA["data/0"], "row": DATA["data/0"][12:], "one": DATA["data/0"][20:],
                   "none": b""}


def test_beyond_four_gigabytes(tmp_path):
    """The members' places then stand in zip64's fields. The file is sparse, and read in parts."""
    path = tmp_path / BIN
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data/0", DATA["data/0"])
        z.fp.seek(5 << 30)
        z.start_dir = 5 << 30
        z.writestr("x/data/1", DATA["data/1"])
        z.writestr("x/data.pkl", LINEAR)
    assert path.stat().st_size > 5 << 30
    t = convert_weights.open_pickle(path, BIN)["bias"]
    assert t.offset > 5 << 30
    with open(path, "rb") as f:
        f.seek(t.offset)
        assert f.read(8) == DATA["data/1"]


# ---- hostile pickles ---------------------------------------------------------------------------

START, END = b"\x80\x02", b"."
CALLED = []


def called(*args):
    CALLED.append(args)


def refusal(tmp_path, data, members=None):
    """Why the converter refuses a data.pkl. Nothing of it may be called."""
    CALLED.clear()
    with pytest.raises(convert_weights.Refused) as e:
        tensors_of(tmp_path, data, members)
    assert not CALLED
    text = convert_weights.one_line(e.value)
    assert text.startswith(f"{BIN}: ") and "\n" not in text
    return text.removeprefix(f"{BIN}: ")


THIS = put_name(__name__, "called")
FUNCTION = put_name("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize("module,name", [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("__builtin__", "eval"),
    ("builtins", "print"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"), ("torch", "load"), ("torch", "DoubleStorage"),
    ("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_qtensor"),
    ("torch.storage", "_load_from_bytes"), ("collections", "OrderedDict.fromkeys"),
    ("collections", "defaultdict"), ("copy_reg", "_reconstructor"), ("copyreg", "_reconstructor"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("convert_weights", "subprocess.run"),
    ("__main__", "x"), (__name__, "called"), ("\x1b[2J", "x")])
def test_refuses_names(tmp_path, module, name):
    call = put_name(module, name) + b"(" + put_text("touch /tmp/x") + b"tR"
    for data in (START + call + END, pickle_of({"x": call}),
                 pickle_of({"x": put_tensor("0", "F32", (6,)), "y": put_name(module, name)})):
        assert refusal(tmp_path, data) == convert_weights.one_line(
            f"its pickle names {module}.{name}, which weights do not need and which could be code; "
            "it was not called")


class Evil:
    def __reduce__(self):
        return called, (1,)


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_what_pickle_makes_of_a_call(tmp_path, protocol):
    data = pickle.dumps({"x": Evil()}, protocol)
    pickle.loads(data)
    assert CALLED  # so it would have run
    assert "it was not " in refusal(tmp_path, data)


@pytest.mark.parametrize("name,data", [
    ("STRING", b"(S'x'\ni" + THIS[1:]), ("INST", b"(i" + THIS[1:]), ("STACK_GLOBAL", b"\x93"),
    ("OBJ", b"(" + FUNCTION + b"o"),
    ("NEWOBJ", FUNCTION + b")\x81"), ("NEWOBJ_EX", FUNCTION + b")}\x92"),
    ("SHORT_BINUNICODE", b"\x8c\x02os\x8c\x06system\x93"), ("EXT1", b"\x82\x01"),
    ("EXT2", b"\x83\x01\x00"), ("EXT4", b"\x84\x01\x00\x00\x00"), ("PERSID", b"Px\n"),
    ("UNICODE", b"Vx\n"), ("BINSTRING", b"T\1\0\0\0x"), ("LONG", b"L5L\n"), ("DUP", b"N2"),
    ("LONG4", b"\x8b\1\0\0\0\5"), ("BINFLOAT", b"G" + bytes(8)), ("FRAME", b"\x95" + bytes(8)),
    ("MEMOIZE", b"N\x94"), ("PUT", b"Np5\n"), ("BYTEARRAY8", b"\x96" + bytes(8)),
    ("NEXT_BUFFER", b"\x97"), ("EMPTY_LIST", b"]"), ("READONLY_BUFFER", b"\x98"),
    ("FROZENSET", b"(\x91"),
    ("BINBYTES8", b"\x8e" + struct.pack("<Q", 1 << 60))])
def test_refuses_opcodes(tmp_path, name, data):
    message = refusal(tmp_path, START + data + END)
    if name == "BINBYTES8":
        assert message.startswith("damaged, or not of torch.save (ValueError: expected 11529215")
        return
    assert message == (f"its pickle has the opcode {name}, which weights do not need and which "
                       "could run code; it was not run")


STATE = b"}" + put_text("call") + b"K\x05s"


@pytest.mark.parametrize("what,data", [
    ("a state of a function", FUNCTION + STATE + b"b"),
    ("a state of slots", FUNCTION + b"N" + STATE + b"\x86b"),
    ("a state of a class", put_name("collections", "OrderedDict") + STATE + b"b"),
    ("a state of a type", put_name("torch", "FloatStorage") + STATE + b"b"),
    ("slots of a type", put_name("torch", "FloatStorage") + b"N" + STATE + b"\x86b"),
    ("a state of a tensor", put_tensor("0", "F32", (6,)) + STATE + b"b"),
    ("a type is called", put_name("torch", "FloatStorage") + b"K\x05\x85R"),
    ("a text is called", put_text("eval") + b")R"),
    ("an OrderedDict of something", put_name("collections", "OrderedDict") + b"}\x85R"),
    ("no arguments", FUNCTION + b")R"), ("a number for a storage", FUNCTION + b"(K\1K\0))\x89"
                                         + ORDERED_DICT + b"tR"),
    ("no end", b"N" * 5), ("an empty stack", b"0"), ("a dictionary as a key", b"}}}s"),
    ("a number as a key", ORDERED_DICT + b"K\1" + put_tensor("0", "F32", (6,)) + b"s"),
    ("an item of a function", FUNCTION + b"K\1K\2s"), ("an item of nothing", b"K\1K\2s"),
    ("three items", b"}(NNNu"), ("a mark that is not there", b"}u"),
    ("a memo that is not there", b"h\x07"),
    ("a text that is not there", b"X\xff\xff\0\0ab"),
    ("a text that is no UTF-8", b"X\1\0\0\0\xff")])
def test_refuses_programs(tmp_path, what, data):
    message = refusal(tmp_path, START + data + END)
    assert message.startswith(("damaged, or not of torch.save (", "its pickle is no dictionary",
                               "its pickle has the opcode POP")), message


def test_a_tuple_of_more_than_there_is(tmp_path):
    assert refusal(tmp_path, START + b"N\x86" + END) == FORM + "IndexError: an empty stack)"


def test_a_state_of_an_ordered_dict_is_not_used(tmp_path):
    """It has to be accepted, since torch.save writes _metadata there."""
    state = b"}(" + b"".join(put_text(name) + b"K\x05" for name in (
        "items", "values", "__class__", "__setstate__", "get")) + b"ub"
    whole = START + ORDERED_DICT + put_text("a") + put_tensor("0", "F32", (6,)) + b"s" + state + END
    assert tensors_of(tmp_path, whole) == {"a": DATA["data/0"]}


def test_the_memory_of_a_pickle(tmp_path):
    """Python's unpickler has a table as long as the largest index of PUT, of 32 GB here."""
    one = pickle_of({"x": put_tensor("0", "F32", (6,))})
    assert one.count(b"q\x00") == 1
    assert tensors_of(tmp_path, one.replace(b"q\x00", b"r" + struct.pack("<I", 1 << 31)))
    long = START + b"}b" * (1 << 19) + ORDERED_DICT + END
    assert refusal(tmp_path, long) == (
        f"bytes of x/data.pkl (got {len(long)}, want at most 1048576)")


DEEP = b")" + b"\x85" * 250_000  # a tuple in a tuple in a tuple ...


def test_deep_nesting(tmp_path):
    """Python's unpickler hashes keys; the hash of such a tuple ends the process."""
    named = ORDERED_DICT + put_text("a") + DEEP + b"s"
    for data in b"}" + DEEP + b"Ns", named, tensor(key_data=DEEP):
        assert refusal(tmp_path, START + data + END).startswith((
            "damaged, or not of torch.save (", "its pickle is no dictionary"))


def tensor(key="0", kind=put_name("torch", "FloatStorage"), tag="storage", count=put_int(6),
           offset=put_int(0), shape=put_ints([6]), strides=put_ints([1]), more=b"", key_data=None):
    return (FUNCTION + b"((" + put_text(tag) + kind + (key_data or put_text(key)) + put_text("cpu")
            + count + b"tQ" + offset + shape + strides + b"\x89" + ORDERED_DICT + more + b"tR")


FORM = "damaged, or not of torch.save ("


@pytest.mark.parametrize("data,words", [
    (tensor("7"), 'storage "7": no such member'),
    (tensor("../../etc/passwd"), 'storage "../../etc/passwd": no such member'),
    (tensor(count=put_int(7)), 'storage "0", bytes (got 24, want 28)'),
    (tensor(count=put_int(5)), 'storage "0", bytes (got 24, want 20)'),
    (tensor(count=put_int(-6)), 'storage "0", bytes (got 24, want -24)'),
    (tensor(kind=put_name("torch", "HalfStorage")), 'storage "0", bytes (got 24, want 12)'),
    (tensor(kind=put_text("FloatStorage")), FORM), (tensor(kind=b"K\1K\0\x86"), FORM),
    (tensor(kind=FUNCTION), FORM), (tensor(tag="module"), FORM), (tensor(count=b"\x88"), FORM),
    (tensor(count=b"N"), FORM), (tensor(key_data=b"}"), FORM),
    (tensor(key_data=b")"), FORM),
    (tensor().replace(FUNCTION, put_name("torch", "FloatStorage"), 1), FORM),
    (tensor(offset=put_int(1)), "numbers of a tensor's storage (got 6, want 7)"),
    (tensor(offset=put_int(-1)), FORM), (tensor(shape=put_ints([-6])), FORM),
    (tensor(shape=put_ints([7])), "numbers of a tensor's storage (got 6, want 7)"),
    (tensor(shape=b"}"), FORM), (tensor(strides=b"N"), FORM), (tensor(strides=put_ints([2])),
     "strides of a tensor; save it contiguous (got [2], want those of the shape [6])"),
    (tensor(strides=put_ints([0])), "strides of a tensor"), (tensor(strides=put_ints([-1])), FORM),
    (tensor(shape=put_ints([2, 3]), strides=put_ints([1, 2])), "strides of a tensor"),
    (tensor(shape=put_ints([1] * 9), strides=put_ints([1] * 9)), FORM),
    (tensor(shape=put_ints([6, 1])), FORM), (tensor(shape=b"\x88\x85"), FORM),
    (tensor(shape=b"(" + b"\x8a\xff" + b"\x7f" * 255 + b"t"),
     "numbers of a tensor's storage (got 6, want 62871"),
    (tensor(more=b"}" + put_text("conj") + b"\x88s"), FORM), (tensor(more=b"NN"), FORM)])
def test_refuses_tensors(tmp_path, data, words):
    message = refusal(tmp_path, pickle_of({"x": data}))
    assert message.startswith(words), message


@pytest.mark.parametrize("data", [
    b"N", b")", ORDERED_DICT + put_text("a") + b"K\1s", put_tensor("0", "F32", (6,)),
    ORDERED_DICT + put_text("state_dict") + b"}s",
    ORDERED_DICT + put_text("a") + put_name("torch", "FloatStorage") + b"s"])
def test_refuses_other_values(tmp_path, data):
    assert refusal(tmp_path, START + data + END) == (
        "its pickle is no dictionary of names and tensors")


# ---- hostile zips ------------------------------------------------------------------------------


def refused_file(tmp_path, data):
    (tmp_path / BIN).write_bytes(data)
    with pytest.raises(convert_weights.Refused) as e:
        convert_weights.open_pickle(tmp_path / BIN, BIN)
    text = convert_weights.one_line(e.value)
    assert text.startswith(f"{BIN}: ")
    return text.removeprefix(f"{BIN}: ")


def zip_of(members, **options):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w", **options) as z:
        for name, data in members:
            z.writestr(name, data)
    return b.getvalue()


GOOD = [("x/data.pkl", LINEAR), *((f"x/{name}", data) for name, data in DATA.items())]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("members,words", [
    (GOOD[1:], "members DIRECTORY/data.pkl (got 0, want one, as torch.save writes)"),
    ([*GOOD, ("y/data.pkl", LINEAR)], "members DIRECTORY/data.pkl (got 2, want one"),
    ([*GOOD, GOOD[1]], 'member "x/data/0": there twice'),
    ([("data.pkl", LINEAR), *GOOD[1:]], "members DIRECTORY/data.pkl (got 0"),
    (GOOD[:2], 'storage "1": no such member'),
    ([*GOOD, ("x/byteorder", b"big")], 'byteorder (got "big", want "little")'),
    ([*GOOD, ("x/byteorder", bytes(65))], "bytes of x/byteorder (got 65, want at most 64)"),
    ([GOOD[0], ("x/data/0", bytes(25)), GOOD[2]], 'storage "0", bytes (got 25, want 24)')])
def test_refuses_members(tmp_path, members, words):
    assert refused_file(tmp_path, zip_of(members)).startswith(words)


def test_refuses_compressed_members(tmp_path):
    """They could become any number of bytes."""
    for method in zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA:
        assert refused_file(tmp_path, zip_of(GOOD, compression=method)) == (
            'member "x/data.pkl": compressed or encrypted, which torch.save does not write')
    data = bytearray(zip_of(GOOD))
    data[data.rfind(b"PK\1\2") + 8] |= 1  # the flag of encryption, in the list of members
    assert "compressed or encrypted" in refused_file(tmp_path, data)
    data = bytearray(zip_of(GOOD))
    data[data.rfind(b"PK\1\2") + 10] = zipfile.ZIP_DEFLATED  # without another size
    assert "compressed or encrypted" in refused_file(tmp_path, data)


def test_refuses_members_of_members(tmp_path):
    """The list says that data/1 lies within data/0, or where no member is."""
    inner = zip_of(GOOD[2:])
    data = bytearray(zip_of([("x/data.pkl", LINEAR), ("x/data/0", inner), GOOD[2]]))
    at = data.rfind(b"PK\1\2")
    for place in data.find(inner), 1, len(data) - 30, len(data) + 5:
        data[at + 42 : at + 46] = struct.pack("<I", place)
        assert refused_file(tmp_path, data) in [
            f"member {name}: not where the list of members says, or within another one"
            for name in ('"x/data/1"', '"x/data/0"')]
    data = bytearray(zip_of(GOOD))  # its bytes reach into what follows, or beyond the file
    at = data.rfind(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<2I", 1 << 20, 1 << 20)
    assert refused_file(tmp_path, data).startswith(f"bytes (got {len(data)}, want ")
    at = data.find(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<2I", 1 << 10, 1 << 10)
    assert "within another one" in refused_file(tmp_path, data)


def test_refuses_a_long_list_of_members(tmp_path):
    """zipfile reads it as a whole."""
    with open(tmp_path / "big", "wb") as f:
        f.write(b"PK\3\4")
        f.truncate(1 << 30)
        f.seek(1 << 30)
        f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, (1 << 30) - 4, 4, 0))
    (tmp_path / "big").rename(tmp_path / BIN)
    with pytest.raises(convert_weights.Refused, match="of members of 1073741820 bytes, want"):
        convert_weights.open_pickle(tmp_path / BIN, BIN)


@pytest.mark.parametrize("data,words", [
    (b"", "not a zip; torch.save before version 1.6 wrote another form"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "not a zip; "),  # torch < 1.6
    (b"version https://git-lfs.github.com/spec/v1\n", "not a zip; "), (b"\x1f\x8b", "not a zip"),
    (b"PK\3\4" + bytes(500), "damaged, or not of torch.save (BadZipFile: ")])
def test_refuses_other_files(tmp_path, data, words):
    assert refused_file(tmp_path, data).startswith(words)


def test_damaged_files(tmp_path):
    """Cut off or changed anywhere, a file is refused in one line, or its tensors lie in it."""
    good, rng = zip_of(GOOD), random.Random(19)
    changed = [good[:n] for n in range(0, len(good), 7)]
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        changed.append(bytes(data))
    read = 0
    for data in changed:
        (tmp_path / BIN).write_bytes(data)
        try:
            found = convert_weights.open_pickle(tmp_path / BIN, BIN)
        except convert_weights.Refused as e:
            assert convert_weights.one_line(e).isprintable()
            continue
        read += 1
        for t in found.values():
            assert t.dtype in ("F32", "F16", "BF16", "I64") and t.offset >= 0
            assert t.offset + int(np.prod(t.shape, dtype=object)) * 2 <= len(data)
    assert 20 < read < len(changed) - 100


def test_in_the_command(xlmr):  # noqa: F811
    """One line, and no file."""
    path = to_bin(xlmr)
    save_zip(path, {"data.pkl": START + put_name("os", "system") + b"(" + put_text("touch ran")
                    + b"tR" + END})
    assert refused(xlmr) == (f"{BIN}: its pickle names os.system, which weights do not need and "
                             "which could be code; it was not called")
    assert not Path("ran").exists()
