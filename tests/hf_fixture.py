"""Hugging Face directories of random Qwen3 models, for tests and for the models that tests use.

The weights are drawn so that a forward pass stays sane: every projection keeps the scale of what it
reads, q and k heads have norms away from 1, and what the layers add to the residual stream is about
as large as what the embedding table put there. The files and their names are those of a checkpoint
that its owner uploaded: config.json, tokenizer.json, safetensors, and sentence-transformers' files.
"""
import json
import struct
from pathlib import Path

import numpy as np

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"
QUERY = ("Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
         "Query:")

# Sizes of the three real models.
SHAPES = {
    "0.6B": dict(layers=28, hidden=1024, heads=16, kv=8, hd=128, ffn=3072, vocab=151669, max=32768),
    "4B": dict(layers=36, hidden=2560, heads=32, kv=8, hd=128, ffn=9728, vocab=151665, max=40960),
    "8B": dict(layers=36, hidden=4096, heads=32, kv=8, hd=128, ffn=12288, vocab=151665, max=40960),
}


def config_json(s, theta=1e6, dtype="bfloat16", tied=True):
    """config.json as the real models have it, for the sizes s."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": s["vocab"] - 1, "eos_token_id": s["vocab"] - 1, "head_dim": s["hd"],
        "hidden_act": "silu", "hidden_size": s["hidden"], "initializer_range": 0.02,
        "intermediate_size": s["ffn"], "max_position_embeddings": s["max"],
        "max_window_layers": s["layers"], "model_type": "qwen3",
        "num_attention_heads": s["heads"], "num_hidden_layers": s["layers"],
        "num_key_value_heads": s["kv"], "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": theta, "sliding_window": None, "tie_word_embeddings": tied,
        "torch_dtype": dtype, "use_cache": True, "use_sliding_window": False,
        "vocab_size": s["vocab"],
    }


def tensor_shapes(s):
    """name (without 'model.') -> shape, in the order in which checkpoints are saved."""
    D, F, hd, Q, KV = s["hidden"], s["ffn"], s["hd"], s["heads"] * s["hd"], s["kv"] * s["hd"]
    shapes = {"embed_tokens.weight": (s["vocab"], D)}
    for i in range(s["layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (D,), "mlp.down_proj": (D, F), "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D), "post_attention_layernorm": (D,), "self_attn.k_norm": (hd,),
            "self_attn.k_proj": (KV, D), "self_attn.o_proj": (D, Q), "self_attn.q_norm": (hd,),
            "self_attn.q_proj": (Q, D), "self_attn.v_proj": (KV, D)}.items()}
    return shapes | {"norm.weight": (D,)}


def generator(seed, name):
    """Random numbers that depend on seed and tensor name alone, not on the order of the tensors."""
    return np.random.Generator(np.random.PCG64([seed, *name.encode()]))


def random_rows(rng, name, shape, n):
    """The next n rows of a matrix, or the whole vector, as (n, cols) float32."""
    if len(shape) == 1:  # norm weights: far from all ones
        return rng.uniform(0.5, 1.5, (1, shape[0])).astype("f4")
    w = rng.standard_normal((n, shape[1]), dtype="f4")
    if name != "embed_tokens.weight":  # a row's output has the scale of its input, or half of it
        gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        w *= np.float32(gain / np.sqrt(shape[1]))
    return w


# ---- massive activations -----------------------------------------------------------------------


class Massive:
    """Edits random weights so that every text's token 0 gets massive activations in layer 1, as in
    the real models: one SwiGLU output beyond 65504, then two residual dimensions that are two to
    three orders of magnitude above the others and stay so.

    How a layer can know that it is at position 0: the embeddings' dimensions 0..n-1 are random
    signs. One head of layer 0 has no query, so it attends to all positions alike, and writes the
    mean m of the signs to n reserved dimensions. |m| is 1 at position 0 and smaller everywhere
    else, unless the text repeats its first token. Layer 0's MLP adds up the |m_j|, layer 1's
    neuron 0 fires where the sum is almost n. Small models have few signs: there it may fire at
    position 1 as well.
    """

    GATE, UP = 3200.0, 400.0  # of the massive neuron

    def __init__(self, s):
        D, self.hd = s["hidden"], s["hd"]
        self.n = n = min(64, s["hd"], D // 4, s["ffn"] // 2 - 1)
        self.const, self.sum, self.mean = n, n + 1, np.arange(n + 2, 2 * n + 2)
        self.out = np.array([2 * n + 2, 2 * n + 3])  # the massive dimensions
        self.reserved = np.arange(n, 2 * n + 4)
        # Mean squares of the residual at position 0 before layer 0's attention and before its MLP
        # give the sum there; 0.75 of it parts position 0 from the others, which have half or less.
        ms0 = (D - n - 3) / D
        ms1 = ms0 + 0.25 * (D - 2 * n - 4) / D + n / (D * ms0)
        self.threshold = 0.75 / (np.sqrt(ms0) * ms1)

    def edit(self, name, w, row):
        """w: rows row.. of tensor `name`, float32, changed in place."""
        hd, n = self.hd, self.n
        layer, _, part = name.removeprefix("layers.").partition(".")
        rows = np.arange(row, row + len(w))
        if name == "embed_tokens.weight":
            w[:, self.reserved] = 0
            w[:, :n] = np.sign(w[:, :n]) + (w[:, :n] == 0)
            w[:, self.const] = 1
        elif part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            w[np.isin(rows, self.reserved)] = 0
            if layer in ("0", "1"):
                w[rows < n] = 0
        if layer not in ("0", "1"):
            return
        if part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            w[:] = 1
        head0 = rows < hd
        if layer == "0" and part == "self_attn.q_proj.weight":
            w[head0] = 0
        elif layer == "0" and part == "self_attn.v_proj.weight":
            w[head0] = 0
            picks = rows[rows < n]
            w[picks - row, picks] = 1
        elif layer == "0" and part == "self_attn.o_proj.weight":
            w[:, :hd] = 0
            mine = np.flatnonzero(np.isin(rows, self.mean))
            w[mine, rows[mine] - self.mean[0]] = 1
        elif layer == "0" and part == "mlp.gate_proj.weight":
            # silu(16 m) is 16 m for m > 0 and almost 0 for m < 0; neurons j and n + j make |m_j|
            for i in np.flatnonzero(rows < 2 * n):
                w[i] = 0
                w[i, self.mean[rows[i] % n]] = 16 if rows[i] < n else -16
        elif layer == "0" and part == "mlp.up_proj.weight":
            w[rows < 2 * n] = 0
            w[rows < 2 * n, self.const] = 1
        elif layer == "0" and part == "mlp.down_proj.weight":
            w[:, : 2 * n] = 0
            w[rows == self.sum, : 2 * n] = 1 / (16 * n)
        elif layer == "1" and part == "mlp.gate_proj.weight":
            w[rows == 0] = 0
            w[rows == 0, self.sum] = self.GATE
            w[rows == 0, self.const] = -self.threshold * self.GATE
        elif layer == "1" and part == "mlp.up_proj.weight":
            w[rows == 0] = 0
            w[rows == 0, self.const] = self.UP
        elif layer == "1" and part == "mlp.down_proj.weight":
            w[:, 0] = 0
            w[np.isin(rows, self.out), 0] = 1 / 64


# ---- files -------------------------------------------------------------------------------------


def to_bytes(w, dtype):
    """float32 numbers as little-endian BF16 (to nearest even), F16 or F32."""
    if dtype == "BF16":
        u = np.ascontiguousarray(w, "<f4").view("<u4")
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return w.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def save_safetensors(path, tensors):
    """tensors: name -> (dtype, shape, blocks of bytes); the blocks are drawn one at a time."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, blocks in tensors.values():
            for block in blocks:
                f.write(block)


def random_tensors(s, seed, dtype="BF16", massive=False, prefix="model."):
    """name -> (dtype, shape, blocks) of a random checkpoint of sizes s, for save_safetensors."""
    edit = Massive(s).edit if massive else lambda name, w, row: None

    def blocks(name, shape):
        rng = generator(seed, name)
        rows, step = (1, 1) if len(shape) == 1 else (shape[0], max(1, (1 << 22) // shape[1]))
        for row in range(0, rows, step):
            w = random_rows(rng, name, shape, min(step, rows - row))
            edit(name, w, row)
            yield to_bytes(w, dtype)

    return {prefix + name: (dtype, shape, blocks(name, shape))
            for name, shape in tensor_shapes(s).items()}


def tokenizer_json(merges, added=(EOS,)):
    """tokenizer.json as the real one: merges, pairs of strings; the added tokens' ids follow, the
    first one is appended to every text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    vocab = {t: i for i, t in enumerate(alphabet + [a + b for a, b in merges])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": len(vocab) + i, "content": t, **flags, "special": i == 0}
             for i, t in enumerate(added)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}
    eos, eos_id = added[0]["content"], added[0]["id"]
    text_a = {"Sequence": {"id": "A", "type_id": 0}}
    text_b = {"Sequence": {"id": "B", "type_id": 0}}
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            level]},
        "post_processor": {"type": "Sequence", "processors": [level, {
            "type": "TemplateProcessing", "single": [text_a, end], "pair": [text_a, text_b, end],
            "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}}}]},
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [list(m) for m in merges]},
    }


def save_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_sentence_transformers(folder, hidden):
    """The files with which sentence-transformers describes Qwen3-Embedding."""
    folder, kind = Path(folder), "sentence_transformers.models."
    save_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": kind + "Normalize"}])
    flags = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens",
                           "weightedmean_tokens"), False) | {"lasttoken": True}
    save_json(folder / "1_Pooling/config.json", {
        "word_embedding_dimension": hidden,
        **{"pooling_mode_" + k: v for k, v in flags.items()}, "include_prompt": True})
    save_json(folder / "config_sentence_transformers.json", {
        "prompts": {"query": QUERY, "document": ""}, "default_prompt_name": None,
        "similarity_fn_name": "cosine"})


def save_random_model(folder, s, tokenizer, seed=1, theta=1e6, massive=False, tied=True):
    """A whole directory, one file of BF16 weights. tokenizer: the text of tokenizer.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "config.json", config_json(s, theta, tied=tied))
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    save_sentence_transformers(folder, s["hidden"])
    save_safetensors(folder / "model.safetensors", random_tensors(s, seed, massive=massive))
