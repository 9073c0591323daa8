"""convert_weights.py with XLM-RoBERTa and BERT encoders: every byte of the file, and what it
refuses. The reader of .qemb files and the runs are those of test_convert."""
import base64
import json
import lzma
import os
import re
import struct
import sys
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import encoder_fixture as ef
import hf_fixture as hf
import numpy as np
import pytest
import unigram_fixture as uf
from helpers import vectors_of
from test_convert import ROOT, Qemb, convert, convert_weights, edit, refused, run, setting
from test_convert_hostile import c_number, fuzz_convert

sys.path.insert(0, str(ROOT / "tests/retrieval"))
import retrieval_accuracy  # noqa: E402

SHARED = Path(os.environ.get("QEMB_SHARED", ROOT.parent / "shared"))
SHAPE, NO_TOKEN = ef.SHAPE, 0xFFFFFFFF
PIECES = len(uf.pieces())
BOTH = pytest.mark.parametrize("bert", [False, True], ids=["xlm-roberta", "bert"])


@pytest.fixture
def xlmr(tmp_path, monkeypatch):
    return source(tmp_path, monkeypatch, False)


@pytest.fixture
def bert(tmp_path, monkeypatch):
    return source(tmp_path, monkeypatch, True)


def source(tmp_path, monkeypatch, bert, name="source"):
    """Makes a whole checkpoint, and runs the test in an empty directory."""
    ef.save_directory(tmp_path / name, bert=bert)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / name


# ---- weights -----------------------------------------------------------------------------------


def expected_sections(t, s, bert):
    """Section -> float32 numbers, for the tensors t of a checkpoint."""
    vector = lambda *names: np.concatenate([t[n] for n in names])[None]
    rows = lambda *names: np.concatenate([t[n] for n in names])
    want = {"tok_emb": t["embeddings.word_embeddings.weight"],
            "pos_emb": (t["embeddings.position_embeddings.weight"]
                        + t["embeddings.token_type_embeddings.weight"][:1]),
            "emb_norm": vector("embeddings.LayerNorm.weight"),
            "emb_norm_bias": vector("embeddings.LayerNorm.bias")}
    for i in range(s["layers"]):
        p = f"encoder.layer.{i}."
        three = [f"{p}attention.self.{name}." for name in ("query", "key", "value")]
        want |= {f"layers.{i}.{name}": data for name, data in {
            "wqkv": rows(*(x + "weight" for x in three)),
            "bqkv": vector(*(x + "bias" for x in three)),
            "wo": rows(p + "attention.output.dense.weight"),
            "bo": vector(p + "attention.output.dense.bias"),
            "attn_norm": vector(p + "attention.output.LayerNorm.weight"),
            "attn_norm_bias": vector(p + "attention.output.LayerNorm.bias"),
            "wup": rows(p + "intermediate.dense.weight"),
            "bup": vector(p + "intermediate.dense.bias"),
            "wdown": rows(p + "output.dense.weight"),
            "bdown": vector(p + "output.dense.bias"),
            "mlp_norm": vector(p + "output.LayerNorm.weight"),
            "mlp_norm_bias": vector(p + "output.LayerNorm.bias")}.items()}
    return want


TABLES = {"unigram", "added_tokens", "prompts", "provenance"}


def assert_weights(q, arrays, bert):
    want = expected_sections(arrays, SHAPE, bert)
    for name, w in want.items():
        matrix = name == "tok_emb" or name.rpartition(".")[2] in ("wqkv", "wo", "wup", "wdown")
        assert q.sections[name].dtype == ("<f2" if matrix else "<f4"), name
        assert q.sections[name].shape == w.shape, name
        assert q.sections[name].tobytes() == w.astype("<f2" if matrix else "<f4").tobytes(), name
    assert set(q.sections) == set(want) | TABLES


def weights_of(q):
    """Of either family."""
    return {name: data.tobytes() for name, data in q.sections.items() if name != "provenance"}


def test_bge_m3s_form(xlmr):
    q = convert(xlmr)
    assert q.config == dict(n_layers=2, hidden=24, n_heads=3, n_kv_heads=3, head_dim=8, ffn=40,
                            vocab=440, max_positions=64, eos_id=2)
    assert q.use == dict(kind=0, pooling=2, attention=1, dense_rows=0, activation=0, window=0)
    assert q.encoder == dict(architecture=1, bos_id=0, pad_id=1, first_position=2)
    assert q.rope_theta == 0 and q.norm_eps == np.float32(1e-5)
    assert q.sections["pos_emb"].shape == (66, 24)
    assert_weights(q, ef.random_arrays(SHAPE, 7), False)
    assert q.prompts == {}
    assert "note: pooler.dense.weight, pooler.dense.bias left out: vectors do not use them\n" in (
        q.provenance)
    assert "note: texts get the ids of tokenizer.json. XLMRobertaTokenizer of" in q.provenance
    assert "pooling: first token\n" in q.provenance


def test_multilingual_e5_smalls_form(bert):
    q = convert(bert)
    assert q.use == dict(kind=0, pooling=1, attention=1, dense_rows=0, activation=0, window=0)
    assert q.encoder == dict(architecture=1, bos_id=0, pad_id=NO_TOKEN, first_position=0)
    assert q.config["max_positions"] == 64 and q.config["eos_id"] == 2
    assert q.rope_theta == 0 and q.norm_eps == np.float32(1e-12)
    assert q.sections["pos_emb"].shape == (64, 24)
    assert_weights(q, ef.random_arrays(SHAPE, 7, True), True)
    assert "transformers 5" not in q.provenance  # it has this file's pipeline


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@BOTH
def test_dtypes_and_prefixes(tmp_path, monkeypatch, bert, dtype):
    folder = source(tmp_path, monkeypatch, bert)
    arrays = ef.random_arrays(SHAPE, 7, bert)
    ef.save_arrays(folder / "model.safetensors", {
        ("bert." if bert else "roberta.") + name: w for name, w in arrays.items()}, dtype)
    rounded = {name: round_to(w, dtype) for name, w in arrays.items()}
    assert_weights(convert(folder), rounded, bert)


def round_to(w, dtype):
    """Float32 numbers that dtype has, nearest to w, ties to even."""
    if dtype != "BF16":
        return w.astype(dict(F32="f4", F16="f2")[dtype]).astype("f4")
    unit = np.exp2(np.floor(np.log2(np.abs(w, dtype="f8"))) - 7)  # 8 significant bits
    return (np.rint(w / unit) * unit).astype("f4")


def test_int8(xlmr):
    """Each matrix as from a Qwen3: groups of 64, the largest is 127 steps."""
    q, f16 = convert(xlmr, "--dtype", "int8"), convert(xlmr)
    for i in range(2):
        for name in "wqkv", "wo", "wup", "wdown":
            codes, scale = q.sections[f"layers.{i}.{name}"], q.sections[f"layers.{i}.{name}.scale"]
            w = f16.sections[f"layers.{i}.{name}"].astype("f8")
            assert codes.dtype == "i1" and scale.shape == (len(w), 1)
            # half a step, and the rounding of a scale and of a product to float32
            assert (np.abs(codes * scale.astype("f8") - w) <= scale * (0.5 + 127 * 2**-22)).all()
            assert (np.abs(codes).max(axis=1) == 127).all()
        for name in "bqkv", "bo", "bup", "bdown", "attn_norm", "mlp_norm_bias":
            assert (q.sections[f"layers.{i}.{name}"] == f16.sections[f"layers.{i}.{name}"]).all()
    assert (q.sections["pos_emb"] == f16.sections["pos_emb"]).all()


@BOTH
def test_an_int8_file_out_of_an_f16_file(tmp_path, monkeypatch, bert):
    """tests/retrieval makes one, to measure what INT8 costs."""
    folder = source(tmp_path, monkeypatch, bert)
    want = convert(folder, "--dtype", "int8")
    convert(folder)
    retrieval_accuracy.write_int8_file("out.qemb", tmp_path / "got.qemb")
    got = Qemb(tmp_path / "got.qemb")
    assert weights_of(got) == weights_of(want)
    assert (got.config, got.encoder) == (want.config, want.encoder)


@pytest.mark.parametrize("pad,rows", [(0, 65), (1, 66), (5, 70)])
def test_positions_follow_the_padding(xlmr, pad, rows):
    """A text's first token has the row behind pad_token_id's."""
    edit(xlmr / "config.json", lambda j: j.update(pad_token_id=pad, max_position_embeddings=rows))
    arrays = ef.random_arrays(SHAPE, 7)
    name = "embeddings.position_embeddings.weight"
    arrays[name] = ef.random_array(name, (rows, 24), 8)
    ef.save_arrays(xlmr / "model.safetensors", arrays)
    q = convert(xlmr)
    assert q.encoder == dict(architecture=1, bos_id=0, pad_id=pad, first_position=pad + 1)
    assert q.config["max_positions"] == 64
    assert_weights(q, arrays, False)


def test_the_default_of_pad_token_id(xlmr):
    edit(xlmr / "config.json", lambda j: j.pop("pad_token_id") and None)
    assert convert(xlmr).encoder["first_position"] == 2


def test_a_limit_below_the_positions(xlmr):
    edit(xlmr / "sentence_bert_config.json", setting("max_seq_length", 32))
    assert convert(xlmr).use["window"] == 32


def test_weights_beyond_halves(xlmr):
    arrays = ef.random_arrays(SHAPE, 7)
    name = "encoder.layer.1.attention.self.value.weight"
    arrays[name][3, 5] = 65536
    ef.save_arrays(xlmr / "model.safetensors", arrays)
    assert refused(xlmr) == f"{name}[3, 5]: number (got 65536, want a finite one up to 65504)"
    arrays = ef.random_arrays(SHAPE, 7)
    arrays["embeddings.token_type_embeddings.weight"][0, 3] = np.nan
    ef.save_arrays(xlmr / "model.safetensors", arrays)
    assert refused(xlmr).startswith("embeddings.position_embeddings.weight[0, 3]: number (got nan")


def test_a_dense_layer(xlmr):
    """sentence-transformers' module, as safetensors and as torch.save writes it."""
    edit(xlmr / "modules.json", lambda j: j.insert(2, {
        "idx": 2, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}))
    edit(xlmr / "modules.json", lambda j: j[3].update(idx=3, path="3_Normalize"))
    (xlmr / "2_Dense").mkdir()
    hf.save_json(xlmr / "2_Dense/config.json", {
        "in_features": 24, "out_features": 6, "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity"})
    arrays = {"linear.weight": np.arange(144, dtype="f4").reshape(6, 24) / 64,
              "linear.bias": np.arange(6, dtype="f4")}
    ef.save_arrays(xlmr / "2_Dense/model.safetensors", arrays)
    q = convert(xlmr)
    assert q.use["dense_rows"] == 6 and list(q.sections)[-2:] == ["dense", "dense_bias"]
    assert q.sections["dense"].tobytes() == arrays["linear.weight"].tobytes()
    (xlmr / "2_Dense/model.safetensors").unlink()
    ef.save_bin(xlmr / "2_Dense/pytorch_model.bin", arrays)
    assert weights_of(convert(xlmr)) == weights_of(q)


# ---- what config.json may say ------------------------------------------------------------------


@pytest.mark.parametrize("change,words", [
    (dict(architectures=["XLMRobertaForSequenceClassification"]),
     "architectures: a classifier or reranker, whose output is a score and no vector (got ["),
    (dict(architectures=["XLMRobertaXLModel"], model_type="xlm-roberta-xl"),
     "architectures: its layers norm their input, those of XLMRobertaModel their output"),
    (dict(architectures=["RobertaModel"], model_type="roberta"),
     "architectures: its tokenizer is a byte-level BPE"),
    (dict(architectures=["NewModel"], model_type="new"), "architectures: code of its own (gte)"),
    (dict(architectures=["XLMRobertaForMaskedLM"]), "architectures (got ["),
    (dict(model_type="bert"), 'model_type (got "bert", want "xlm-roberta")'),
    (dict(auto_map={"AutoModel": "modeling.XLMRobertaModel"}),
     "auto_map: AutoModel is code of its own, which qemb does not have"),
    (dict(hidden_act="gelu_new"), 'hidden_act (got "gelu_new", want "gelu")'),
    (dict(hidden_act="relu"), 'hidden_act (got "relu", want "gelu")'),
    (dict(position_embedding_type="relative_key"),
     'position_embedding_type (got "relative_key", want "absolute")'),
    (dict(is_decoder=True), "is_decoder (got true, want null or false)"),
    (dict(add_cross_attention=True), "add_cross_attention (got true, want null or false)"),
    (dict(pruned_heads={"0": [1]}), 'pruned_heads (got {"0": [1]}, want null or {})'),
    (dict(quantization_config={"bits": 4}), "quantization_config; convert the model from which"),
    (dict(num_attention_heads=5), "hidden_size (got 24, want a multiple of 5 heads)"),
    (dict(num_attention_heads=24), "hidden_size a head (got 1, want an integer from 2 to 1024)"),
    (dict(num_attention_heads=None), "num_attention_heads (got null, want an integer from 1)"),
    (dict(hidden_size=24.0), "hidden_size (got 24.0, want an integer from 1)"),
    (dict(layer_norm_eps=0), "layer_norm_eps (got 0, want a number from 1e-30 to 0.5)"),
    (dict(layer_norm_eps=None), "layer_norm_eps (got null, want a number from 1e-30 to 0.5)"),
    (dict(vocab_size=255), "vocab_size (got 255, want an integer from 256 to"),
    (dict(max_position_embeddings=2),
     "max_position_embeddings, from 2 on (got 0, want an integer from 1 to"),
    (dict(pad_token_id=None), "pad_token_id (got null, want an integer from 0 to 65535)"),
    (dict(pad_token_id=440, max_position_embeddings=505),
     "pad_token_id (got 440, want below vocab_size, 440)"),
    (dict(pad_token_id=-1), "pad_token_id (got -1, want an integer from 0 to 65535)"),
    (dict(type_vocab_size=0), "type_vocab_size (got 0, want an integer from 1 to 65536)"),
    (dict(rope_theta=1e4), '"rope_theta" is a setting that qemb does not know'),
    (dict(new_trick=1), '"new_trick" is a setting that qemb does not know'),
])
def test_refuses_config(xlmr, change, words):
    edit(xlmr / "config.json", lambda j: j.update(change))
    assert refused(xlmr).startswith("config.json: " + words)


def test_refuses_too_many_pairs_of_characters(xlmr, monkeypatch):
    monkeypatch.setattr(convert_weights, "MAX_PAIRS", 0)
    assert re.fullmatch(r"tokenizer.json: pairs of characters in precompiled_charsmap "
                        r"\(got [1-9][0-9]*, want at most 0\)", refused(xlmr))


def test_limits_are_the_loaders():
    source = (ROOT / "lib/unigram.c").read_text()
    named = dict(re.findall(r"^    ([A-Z_]+) = ([0-9]+(?: << [0-9]+)?),", source, re.M))
    assert c_number(named["PIECES_MAX"]) == convert_weights.MAX_PIECES
    assert c_number(named["PAIRS_MAX"]) == convert_weights.MAX_PAIRS
    assert c_number(named["SCORE_MOST"]) == convert_weights.MAX_SCORE
    assert c_number(named["CLUSTER"]) == convert_weights.CLUSTER


def test_settings_that_change_nothing(xlmr):
    want = convert(xlmr)
    edit(xlmr / "config.json", lambda j: j.update(
        is_decoder=False, add_cross_attention=False, chunk_size_feed_forward=0, pruned_heads={},
        gradient_checkpointing=False, directionality="bidi", pooler_type="first_token_transform"))
    assert weights_of(convert(xlmr)) == weights_of(want)


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop("encoder.layer.1.output.dense.bias"),
     "encoder.layer.1.output.dense.bias: missing tensor (got 1 missing, want none)"),
    (lambda t: t.update({"encoder.layer.2.output.dense.bias": np.zeros(24, "f4")}),
     "encoder.layer.2.output.dense.bias: no tensor of this model (got 1 extra, want none)"),
    (lambda t: t.update({"embeddings.token_type_embeddings.weight": np.zeros((2, 24), "f4")}),
     "embeddings.token_type_embeddings.weight: shape (got [2, 24], want [1, 24])"),
    (lambda t: t.pop("embeddings.token_type_embeddings.weight"),
     "embeddings.token_type_embeddings.weight: missing tensor"),
    (lambda t: t.update({"embeddings.position_embeddings.weight": np.zeros((64, 24), "f4")}),
     "embeddings.position_embeddings.weight: shape (got [64, 24], want [66, 24])"),
    (lambda t: t.update({"encoder.layer.0.attention.self.key.bias": np.zeros(72, "f4")}),
     "encoder.layer.0.attention.self.key.bias: shape (got [72], want [24])"),
    (lambda t: t.update({"pooler.dense.other": np.zeros(24, "f4")}),
     "pooler.dense.other: no tensor of this model"),
    (lambda t: t.update({"embeddings.new_ids": np.zeros((1, 66), "f4")}),
     "embeddings.new_ids: no tensor of this model"),
])
def test_refuses_tensors(xlmr, change, words):
    arrays = ef.random_arrays(SHAPE, 7)
    change(arrays)
    ef.save_arrays(xlmr / "model.safetensors", arrays)
    assert refused(xlmr).startswith(words)


# ---- pooling, prompts, the other files ---------------------------------------------------------


@pytest.mark.parametrize("flag,pooling", [("cls_token", 2), ("mean_tokens", 1), (None, None),
                                          ("max_tokens", None), ("lasttoken", None)])
@BOTH
def test_pooling(tmp_path, monkeypatch, bert, flag, pooling):
    folder = source(tmp_path, monkeypatch, bert)
    hf.save_json(folder / "1_Pooling/config.json", {f"pooling_mode_{flag}": True} if flag else {})
    if pooling:
        assert convert(folder).use["pooling"] == pooling
        hf.save_json(folder / "1_Pooling/config.json", {
            "pooling_mode": flag.split("_")[0]})  # newer files
        assert convert(folder).use["pooling"] == pooling
        return
    assert refused(folder).startswith("1_Pooling/config.json: pooling; if it is wrong, say what is "
                                      "pooled by --pooling first or mean (got ")
    for option, number in ("first", 2), ("mean", 1):
        assert convert(folder, "--pooling", option).use["pooling"] == number


def test_options_of_the_other_family(xlmr, tmp_path):
    assert refused(xlmr, "--pooling", "last") == (
        "--pooling: of an encoder (got last, want first or mean)")
    assert refused(xlmr, "--kind", "reranker").startswith("--kind: a reranker; of this family, ")
    assert refused(xlmr, "--end-token", "</s>").startswith("--end-token: tokenizer.json says what")
    assert refused(ROOT / "tests/golden/hf-tiny", "--pooling", "first") == (
        "--pooling: of a Qwen3 (got first, want last or mean)")


def test_refuses_a_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    hf.save_gguf("x.gguf", {"bert.block_count": 2}, {
        "embed_tokens.weight": np.zeros((300, 24), "f4")}, "F32", "bert")
    assert refused("x.gguf") == 'x.gguf: general.architecture (got "bert", want "qwen3")'


def test_refuses_an_adapter(xlmr):
    hf.save_json(xlmr / "adapter_config.json", {"base_model_name_or_path": "BAAI/bge-m3"})
    ef.save_bin(xlmr / "pytorch_model.bin", ef.random_arrays(SHAPE, 7))
    for _ in range(2):
        assert refused(xlmr).startswith("adapter_config.json: an adapter (LoRA), which ")
        (xlmr / "model.safetensors").unlink(missing_ok=True)


def test_without_sentence_transformers(xlmr):
    for name in "modules.json", "1_Pooling/config.json", "sentence_bert_config.json":
        (xlmr / name).unlink()
    assert refused(xlmr) == ("1_Pooling/config.json: no such file in the source; say what is "
                             "pooled by --pooling first or mean")
    assert convert(xlmr, "--pooling", "first").use["pooling"] == 2


E5 = {"query": "query: ", "passage": "passage: ", "document": "passage: "}


@pytest.mark.parametrize("name,prompts", [
    ("multilingual-e5-small", E5), ("Multilingual-E5-large-finetuned", E5),
    ("multilingual-e5-large-instruct", {}), ("bge-m3", {"query": "", "document": ""}),
    ("bge-base", {})])
def test_prompts_of_the_model_card(tmp_path, monkeypatch, name, prompts):
    folder = source(tmp_path, monkeypatch, True, name)
    q = convert(folder)
    assert q.prompts == prompts
    note = "note: the source has no prompts; query and " + (
        "document as in bge-m3\n" if "m3" in name else "passage as in multilingual-e5\n")
    assert (note in q.provenance) == bool(prompts)
    hf.save_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "Q "}})
    assert convert(folder).prompts == {"query": "Q "}  # the source's own


def test_prompts_of_e5_by_option(tmp_path, monkeypatch):
    convert(source(tmp_path, monkeypatch, True, "multilingual-e5-base"))
    vectors = lambda text, *options: vectors_of([text], *options, model="out.qemb").tobytes()
    for option, prompt in (["--query"], "query: "), (["--document"], "passage: "), (
            ["--prompt", "passage"], "passage: "):
        assert vectors("gravity", *option) == vectors(prompt + "gravity") != vectors("gravity")


def test_a_prompt_for_passages_is_one_for_documents(xlmr):
    own = {"query": "query: ", "passage": "passage: "}
    hf.save_json(xlmr / "config_sentence_transformers.json", {"prompts": own})
    q = convert(xlmr)
    assert q.prompts == E5
    assert "note: document is another name of the prompt passage: --document uses it\n" in (
        q.provenance)
    assert convert(xlmr, "--prompt", "document=D ").prompts == own | {"document": "D "}


@pytest.mark.parametrize("name,change,words", [
    ("tokenizer_config.json", setting("tokenizer_class", "BertTokenizer"),
     'tokenizer_class (got "BertTokenizer", want null or'),
    ("tokenizer_config.json", setting("mask_token", "lstrip", False),
     '"<mask>" lstrip (got false, want true)'),
    ("special_tokens_map.json", setting("mask_token", "lstrip", False),
     '"<mask>" lstrip (got false, want true)'),
    ("special_tokens_map.json", setting("bos_token", {"content": "<s>", "lstrip": True}),
     '"<s>" lstrip (got true, want false)'),
    ("special_tokens_map.json", setting("pad_token", "[PAD]"), '"[PAD]" is no added token of'),
    ("tokenizer_config.json", lambda j: j.update(added_tokens_decoder={
        "2": {"content": "</s>", "lstrip": True, "special": True}}),
     'added_tokens_decoder: "</s>" lstrip (got true, want false)'),
])
def test_refuses_the_tokenizers_other_files(xlmr, name, change, words):
    edit(xlmr / name, change)
    assert refused(xlmr).startswith(f"{name}: {words}")


@pytest.mark.parametrize("name", [None, "XLMRobertaTokenizer", "XLMRobertaTokenizerFast",
                                  "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_classes_of_tokenizers(xlmr, name):
    edit(xlmr / "tokenizer_config.json", lambda j: j.update(
        tokenizer_class=name, added_tokens_decoder={str(PIECES - 1): {
            "content": "<mask>", "lstrip": True, "special": True}}))
    convert(xlmr)


# ---- the section unigram -----------------------------------------------------------------------


class Unigram:
    """Reads the section as qemb.h describes it."""

    def __init__(self, b):
        (n, self.unk, self.spaces, n_singles, n_pairs, n_text, n_replacements, zero
         ) = struct.unpack_from("<8I", b)
        assert zero == 0
        at = 32
        take = lambda form, count, step: [
            struct.unpack_from(form, b, at + i * step) for i in range(count)]
        self.scores = [x for x, in take("<d", n, 8)]
        at += 8 * n
        singles = take("<2I", n_singles, 8)
        at += 8 * n_singles
        pairs = take("<3I", n_pairs, 12)
        at += 12 * n_pairs
        lengths, at = b[at : at + n], at + n
        text, replacements = b[at : at + n_text], b[at + n_text :]
        assert len(replacements) == n_replacements and sum(lengths) == n_text
        assert singles == sorted(set(singles)) and pairs == sorted(set(pairs))
        ends = list(accumulate(lengths, initial=0))
        self.pieces = [text[a:b].decode() for a, b in zip(ends, ends[1:])]
        self.table = {}
        for *key, place in singles + pairs:
            first, length = place & 0xFFFFFF, place >> 24
            assert first + length <= n_replacements
            self.table["".join(map(chr, key))] = replacements[first : first + length].decode()


def reachable(table):
    """What the oracle can find: keys of one character, and of two that have less than 6 bytes and
    begin with no key."""
    return {k: v for k, v in table.items()
            if len(k) == 1 or len(k) == 2 and len(k.encode()) < 6 and k[0] not in table}


def section(folder, *args):
    return Unigram(convert(folder, *args).sections["unigram"].tobytes())


@BOTH
def test_every_byte_of_the_tokenizer(tmp_path, monkeypatch, bert):
    folder = source(tmp_path, monkeypatch, bert)
    q = convert(folder)
    u = Unigram(q.sections["unigram"].tobytes())
    assert (u.unk, u.spaces) == (3, int(bert))
    assert u.pieces == [text for text, _ in uf.pieces()]
    # The fixture's scores have at most 17 digits.
    assert u.scores == [rounded_twice(repr(score)) for _, score in uf.pieces()]
    assert any(a != b for a, (_, b) in zip(u.scores, uf.pieces()))  # so it is no plain float()
    assert u.table == reachable(uf.TABLE) and 100 < len(u.table) < len(uf.TABLE)
    assert q.added == [(0, "<s>"), (1, "<pad>"), (2, "</s>"), (3, "<unk>"),
                       (PIECES - 1, "<mask>", True)]


def rounded_twice(text):
    """The digits as a double, divided by a power of ten, each rounded to nearest (by Fraction,
    which rounds once)."""
    whole, _, part = text.lstrip("-").partition(".")
    digits = float(Fraction(int(whole + part)))
    return (-1 if text[0] == "-" else 1) * float(Fraction(digits) / 10 ** len(part))


SCORES = ["-7.4715776443481445", "-9", "-0.1", "-1e2", "-1.5E-3", "-2.5e+2", "-0", "-0.0", "0",
          "-12.345678901234567890123456789", "-0.00000000000000000000000012345678901234567890123",
          "-1e-320", "-123456789.25e-330", "-1e-400", "-999999.9999999999", "-18446744073709551615e"
          "-18", "-1000000"]


def test_scores_are_those_of_the_oracle(xlmr):
    """Its own reader prints what it has read."""
    tokenizers = pytest.importorskip("tokenizers")
    j = uf.tokenizer_json()
    for i, _ in enumerate(SCORES):
        j["model"]["vocab"][10 + i][1] = f"@{i}@"
    text = json.dumps(j)
    for i, score in enumerate(SCORES):
        text = text.replace(f'"@{i}@"', score)
    (xlmr / "tokenizer.json").write_text(text)
    read = json.loads(tokenizers.Tokenizer.from_str(text).to_str())["model"]["vocab"]
    assert section(xlmr).scores == [score for _, score in read]


@pytest.mark.parametrize("score", ["0.5", "1e-5", "-1000001", "-1e7", "-1e400", "NaN", "-Infinity",
                                   "null", '"-1"', "true", "-18446744073709551616",
                                   "-123456789012345678901.5e-20", "-" + "1" * 5000])
def test_refuses_scores(xlmr, score):
    text = json.dumps(uf.tokenizer_json() | {"padding": "@"})
    vocab = json.dumps(uf.pieces()[5])
    (xlmr / "tokenizer.json").write_text(text.replace(vocab, f'["{uf.pieces()[5][0]}", {score}]'
                                         .replace("▁", "\\u2581")))
    assert re_score(refused(xlmr)), score


def re_score(message):
    return message.startswith(('tokenizer.json: score of "\\u2581the" (got ',
                               "tokenizer.json: not JSON of the known form (ValueError: "))


def change_charsmap(j, **table):
    j["normalizer"]["normalizers"][0]["precompiled_charsmap"] = uf.charsmap(uf.TABLE | table)


def raw_charsmap(j, data):
    j["normalizer"]["normalizers"][0]["precompiled_charsmap"] = base64.b64encode(data).decode()


def loop(j):
    """The base of all nodes is 0, so each of them has all bytes as children."""
    raw_charsmap(j, struct.pack("<257I", 1024, *(i | i << 10 for i in range(256))) + b"x\0")


def no_replacements(j):
    trie = uf.darts({b"z": 0})
    raw_charsmap(j, struct.pack("<I", len(trie)) + trie + b"text without an end")


def as_e5(j):
    j.update(uf.tokenizer_json(True))


TOKENIZER_REFUSED = {
    "BPE": (lambda j: j["model"].update(type="BPE"), 'model type (got "BPE", want "Unigram")'),
    "WordPiece": (lambda j: j["model"].update(type="WordPiece"), 'model type (got "WordPiece"'),
    "byte fallback": (setting("model", "byte_fallback", True),
                      "model byte_fallback (got true, want null or false)"),
    "a new key": (setting("model", "new", 1), 'model key (got "new", want "type" or'),
    "no unknown": (setting("model", "unk_id", None), "unk_id (got null, want an id below 418)"),
    "a far unknown": (setting("model", "unk_id", PIECES), "unk_id (got 418, want an id below 418)"),
    "too many": (lambda j: j["model"]["vocab"].extend([f"x{i}", -1.5] for i in range(23)),
                 "pieces (got 441, want 1 to 440, as vocab_size is 440)"),
    "none": (setting("model", "vocab", []), "pieces (got 0, want 1 to 440"),
    "empty": (setting("model", "vocab", 9, 0, ""), 'piece 9, "" (got 0 bytes, want one of its own'),
    "long": (setting("model", "vocab", 9, 0, "é" * 128), "piece 9, "),
    "twice": (setting("model", "vocab", 9, 0, "ing"), 'piece 137, "ing" (got a repeated one'),
    "surrogate": (setting("model", "vocab", 9, 0, "\ud800"), "not JSON of the known form (Unicode"),
    "NFKC": (setting("normalizer", {"type": "NFKC"}), 'normalizer (got ["NFKC"], want'),
    "no normalizer": (setting("normalizer", None), "not JSON of the known form"),
    "two spaces": (setting("normalizer", "normalizers", 1, "content", "  "),
                   "normalizer, what is replaced (got"),
    "strip": (lambda j: j["normalizer"]["normalizers"].append({"type": "Strip"}),
              'normalizer (got ["Precompiled", "Replace", "Strip"], want'),
    "only Precompiled": (lambda j: j["normalizer"]["normalizers"].pop() and None,
                         'pre_tokenizer (got ["Metaspace"], want ["WhitespaceSplit", '),
    "split too": (setting("pre_tokenizer", uf.tokenizer_json(True)["pre_tokenizer"]),
                  'pre_tokenizer (got ["WhitespaceSplit", "Metaspace"], want ["Metaspace"])'),
    "e5 without split": (lambda j: as_e5(j) or j.update(
        pre_tokenizer=j["pre_tokenizer"]["pretokenizers"][1]),
        'pre_tokenizer (got ["Metaspace"], want ["WhitespaceSplit", "Metaspace"])'),
    "never": (setting("pre_tokenizer", "prepend_scheme", "never"), "Metaspace prepend_scheme (got"),
    "first": (setting("pre_tokenizer", "prepend_scheme", "first"), "Metaspace prepend_scheme (got"),
    "no prefix": (setting("pre_tokenizer", "add_prefix_space", False),
                  "Metaspace add_prefix_space (got false, want null or true)"),
    "no split": (setting("pre_tokenizer", "split", False), "Metaspace split (got false, want"),
    "underscore": (setting("pre_tokenizer", "replacement", "_"), 'Metaspace replacement (got "_"'),
    "no template": (setting("post_processor", None), "not JSON of the known form"),
    "another end": (setting("post_processor", "type", "RobertaProcessing"), "post_processor (got"),
    "no start": (lambda j: j["post_processor"]["single"].pop(0) and None,
                 'post_processor, a single text (got ["Sequence", "SpecialToken"]'),
    "two ends": (lambda j: j["post_processor"]["single"].append(j["post_processor"]["single"][2]),
                 "post_processor, a single text (got"),
    "other ids": (setting("post_processor", "special_tokens", "<s>", "ids", [1]),
                  'post_processor, ids of "<s>" (got [1], want [0])'),
    "an added token of its own": (lambda j: j["added_tokens"].append(
        j["added_tokens"][0] | {"id": PIECES, "content": "<new>"}),
        'added token "<new>" id (got 418, want "that of a piece")'),
    "a wrong id": (setting("added_tokens", 1, "id", 2), 'added token "<pad>" id (got 2, want 1)'),
    "an added token twice": (lambda j: j["added_tokens"].append(j["added_tokens"][0]),
                             "added tokens of the same text (got 1, want 0)"),
    "rstrip": (setting("added_tokens", 4, "rstrip", True), 'added token "<mask>" rstrip (got true'),
    "normalized": (setting("added_tokens", 0, "normalized", True),
                   'added token "<s>" normalized (got true, want false)'),
    "single word": (setting("added_tokens", 0, "single_word", True),
                    'added token "<s>" single_word (got true'),
    "no base64": (setting("normalizer", "normalizers", 0, "precompiled_charsmap", "%%%%"),
                  "not JSON of the known form (Error: "),
    "no charsmap": (lambda j: raw_charsmap(j, b""), "precompiled_charsmap, bytes of its array"),
    "a cut array": (lambda j: raw_charsmap(j, struct.pack("<257I", 2048, *range(256))),
                    "precompiled_charsmap, bytes of its array (got 2048, want a multiple of 4 up"),
    "no NUL": (no_replacements, "precompiled_charsmap, key b'z', replacement (got none, or a"),
    "three characters": (lambda j: change_charsmap(j, xyz="x"),
                         "precompiled_charsmap, key b'xyz', characters (got 3, want 1 or 2)"),
    "a long replacement": (lambda j: change_charsmap(j, z="x" * 256),
                           "precompiled_charsmap, key b'z', replacement (got none, or a longer"),
    "a loop": (loop, "precompiled_charsmap, bytes of its keys (got more, want at most 65536)"),
}


@pytest.mark.parametrize("case", TOKENIZER_REFUSED)
def test_refuses_tokenizers(xlmr, case):
    change, words = TOKENIZER_REFUSED[case]
    edit(xlmr / "tokenizer.json", lambda j: change(j) and None)
    message = refused(xlmr)
    assert message.startswith("tokenizer.json: " + words), message


def test_the_longest_replacement(xlmr):
    edit(xlmr / "tokenizer.json", lambda j: change_charsmap(j, z="x" * 255))
    assert section(xlmr).table["z"] == "x" * 255


@pytest.mark.parametrize("key", [b"\xc3", b"a\xcc", b"\xff", b"a\x80"])
def test_refuses_keys_that_are_no_text(xlmr, key):
    trie = uf.darts({key: 0})
    data = struct.pack("<I", len(trie)) + trie + b"x\0"
    edit(xlmr / "tokenizer.json", lambda j: raw_charsmap(j, data))
    assert refused(xlmr).startswith("tokenizer.json: not JSON of the known form (UnicodeDecode")


@pytest.mark.parametrize("change", [
    setting("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                              "split": True}),
    setting("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "str_rep": "▁",
                              "add_prefix_space": True}),
    setting("decoder", None), setting("truncation", {"max_length": 8}),
    setting("padding", {"strategy": "BatchLongest"})])
def test_forms_of_a_tokenizer(xlmr, change):
    want = convert(xlmr).sections["unigram"].tobytes()
    edit(xlmr / "tokenizer.json", change)
    assert convert(xlmr).sections["unigram"].tobytes() == want


def test_a_qwen3_with_this_tokenizer(xlmr):
    hf.save_json(xlmr / "config.json", hf.config_json(
        dict(layers=2, hidden=24, heads=4, kv=2, hd=10, ffn=20, vocab=300, max=64)))
    assert refused(xlmr).startswith('tokenizer.json: model type (got "Unigram", want "BPE")')


def test_the_real_tokenizer():
    """bge-m3's: what its page counts, and what the oracle makes of every key."""
    path = SHARED / "encoder/bge-m3.tokenizer.json.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    j = json.loads(lzma.open(path, "rb").read(), parse_float=convert_weights.Number)
    t = convert_weights.read_unigram(j, 250002)
    u = Unigram(t.table.data)
    assert (len(u.pieces), u.unk, u.spaces, t.bos_id, t.eos_id) == (250002, 3, 0, 0, 2)
    assert [len(k) for k in u.table].count(1) == 4837 and len(u.table) == 4837 + 675
    assert max(len(p.encode()) for p in u.pieces) == 48
    assert max(len(v.encode()) for v in u.table.values()) == 33
    assert sum(a != float(s) for a, (_, s) in zip(u.scores, j["model"]["vocab"])) == 65856
    assert abs(min(u.scores) - 10 + 30.36) < 0.01
    tokenizers = pytest.importorskip("tokenizers")
    charsmap = j["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    precompiled = tokenizers.normalizers.Precompiled(base64.b64decode(charsmap))
    for key, text in u.table.items():
        got = precompiled.normalize_str(key)
        assert got == text or len(key) == 2 and got == parts(u.table, key), key


def parts(table, key):
    """What a pair becomes that is no grapheme cluster."""
    return "".join(table.get(c, c) for c in key)


# ---- what comes from the hub, and what is damaged ----------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_the_hubs_files(xlmr, monkeypatch, form):
    """The pickle is loaded only where there are no safetensors."""
    import huggingface_hub

    calls = []

    def download(name, allow_patterns, revision=None):
        calls.append((name, revision, "pytorch_model*.bin" in allow_patterns))
        if len(calls) == 2:
            ef.save_bin(xlmr / form, ef.random_arrays(SHAPE, 7))
        return str(xlmr)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if form == "pytorch_model.bin":
        (xlmr / "model.safetensors").unlink()
    run("BAAI/bge-m3")
    assert os.listdir() == ["bge-m3.qemb"]
    assert calls == [("BAAI/bge-m3", None, False), ("BAAI/bge-m3", "source", True)][
        : 1 + (form == "pytorch_model.bin")]


def test_mutated_checkpoints(tmp_path):
    """`make fuzz` runs more of them."""
    base, work = tmp_path / "base", tmp_path / "work"
    fuzz_convert.save_encoder_base(base)
    work.mkdir()
    found = {fuzz_convert.run_example(base, work, "test", i) for i in range(120)}
    assert found >= {"refused", "good"}
