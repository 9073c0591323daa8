#!/usr/bin/env python3
"""The goldens in tests/golden: small random Qwen3 models and what transformers says about texts.

Per model NAME: a checkpoint that transformers itself saves (kept in the scratch directory),
NAME.qemb from convert_weights.py, and NAME.vec. The directory hf-tiny is one such checkpoint, for
tests/test_convert.py. Weights and texts have fixed seeds. `make golden` runs this.

The vectors. Matrices are rounded to FP16, as the .qemb has them, norms stay FP32. Then the modules
of transformers compute in double, one text at a time, with eager attention: last row of the final
norm, scaled to length 1. transformers forces float32 in three places (the norms' mean square, RoPE's
angles, the softmax); `in_double` lifts that, so the vectors are exact to the float32 that they are
stored in. The same model in plain float32, as anybody would run it, gives the line f32_diff.

NAME.vec is text, made for fscanf; %a numbers are C's hexadecimal floats, exact:
    golden 1
    model NAME
    dim D
    f32_diff %a      largest |float32 - double| of any number of any vector in this file
    f32_cosine %a    largest 1 - cosine between float32's and double's vector
    max_swiglu %a    largest |silu(gate) * up| of any layer and row, in float32
    cases N
then N times
    case LABEL
    text N HEX       the text's N bytes in hexadecimal; N is -1, and HEX is missing, where the case
                     is a list of ids and not a text; HEX is missing for the empty text, too
    ids N ID...      token ids, end-of-text included
    norm %a          length of the final-normed row, before it is scaled
    vec D %a...      the vector
"""
import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import hf_fixture as hf
import numpy as np
import tokenizers
import torch
import train_bpe
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

ROOT = Path(__file__).resolve().parent.parent
VOCAB, MAX = 512, 200
ADDED = (hf.EOS, "<|im_start|>", "<think>", "</think>")
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 128, 129, MAX - 1, MAX)
TEXTS = (
    ("empty", ""),
    ("word", "test"),
    ("query", hf.QUERY + "What is the capital of China?"),
    ("passage", "Gravity is a force that attracts two bodies towards each other. It gives weight "
                "to physical objects."),
    ("code", "int main(void)\n{\n\treturn 0;  /* nothing */\n}\r\n"),
    ("scripts", "Größe, été, Zürich; Предложение; 北京是中国的首都; 한국어; नमस्ते"),
    ("decomposed", "Cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab"),
    ("faces", "👍🏽 👩‍👩‍👧 🇨🇳"),
    ("added", "a<think>b</think> <|im_start|>c<|endoftext|>"),
    ("spaces", "  two  spaces \n\n\n and\ttabs \u00a0 1234567 don't WE'LL"),
    ("nul", "a\0b"),
)


class Model:
    def __init__(self, name, layers, hidden, heads, kv, hd, ffn, theta=1e6, kind="causal",
                 dtype="bfloat16", shard="1GB", tied=True, massive=False):
        self.name, self.theta, self.kind, self.dtype, self.shard = name, theta, kind, dtype, shard
        self.tied, self.massive = tied, massive
        self.shape = dict(layers=layers, hidden=hidden, heads=heads, kv=kv, hd=hd, ffn=ffn,
                          vocab=VOCAB, max=MAX)


MODELS = (
    Model("hf-tiny", 2, 32, 2, 1, 32, 48, shard="40KB"),
    Model("gqa1", 2, 96, 2, 2, 64, 128),
    Model("gqa2", 3, 64, 4, 2, 64, 160, theta=1e4, kind="bare", dtype="float32", shard="200KB"),
    Model("gqa4", 2, 64, 4, 1, 128, 96, tied=False, shard="100KB"),
    Model("square", 2, 128, 2, 1, 64, 256, dtype="float16", kind="bare"),
    Model("massive", 4, 64, 2, 1, 64, 128, massive=True),
)


def save_checkpoint(m, folder, tokenizer):
    """A directory that transformers wrote, with the files that it does not write beside it."""
    s = m.shape
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=s["hidden"], intermediate_size=s["ffn"],
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"], head_dim=s["hd"], max_position_embeddings=MAX,
        rope_parameters={"rope_type": "default", "rope_theta": m.theta}, rms_norm_eps=1e-6,
        tie_word_embeddings=m.tied)
    model = (Qwen3ForCausalLM if m.kind == "causal" else Qwen3Model)(config)
    edit = hf.Massive(s).edit if m.massive else lambda name, w, row: None
    with torch.no_grad():
        for name, p in model.named_parameters():
            bare = name.removeprefix("model.")
            w = hf.random_rows(hf.generator(3, m.name + bare), bare, tuple(p.shape), len(p))
            edit(bare, w, 0)
            p.copy_(torch.from_numpy(w).reshape(p.shape))
    model.to(getattr(torch, m.dtype)).save_pretrained(folder, max_shard_size=m.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    hf.save_sentence_transformers(folder, s["hidden"])


@contextlib.contextmanager
def in_double(model):
    """transformers' modules without the places where they go back to float32."""
    rope = model.rotary_emb
    plain = rope.inv_freq
    hd, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    rope.inv_freq = theta ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    with mock.patch.object(torch, "float32", torch.float64), \
            mock.patch.object(torch, "float", torch.float64), \
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield model.double()
    model.float()
    rope.inv_freq = plain


def last_row(model, ids):
    """The final-normed row of the last of ids, in the model's own dtype."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return out[0, -1].numpy()


def load_rounded(folder):
    """The checkpoint as its .qemb has it: matrices through FP16, everything else as it is."""
    model = Qwen3Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(p.half().float())
    return model.eval()


def cases(name, tokenizer):
    """(label, text or None, ids)"""
    eos = tokenizer.token_to_id(hf.EOS)
    rng = hf.generator(4, name)
    for n in LENGTHS:
        ids = [int(i) for i in rng.integers(0, tokenizer.get_vocab_size(), n - 1)]
        yield f"length_{n}", None, ids + [eos]
    for label, text in TEXTS:
        yield label, text, tokenizer.encode(text).ids


def unit(row):
    return row.astype("f8") / np.linalg.norm(row.astype("f8"))


def write_vec(m, folder, tokenizer, out):
    """NAME.vec. -> what the README says about it."""
    model, swiglu = load_rounded(folder), [0.0]

    def watch(module, inputs):
        swiglu[0] = max(swiglu[0], float(inputs[0].abs().max()))

    todo = list(cases(m.name, tokenizer))
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(watch) for layer in model.layers]
    single = [unit(last_row(model, ids)) for _, _, ids in todo]
    for h in hooks:
        h.remove()
    with in_double(model):
        rows = [last_row(model, ids) for _, _, ids in todo]
    assert all(row.dtype == np.float64 for row in rows)
    double = [unit(row) for row in rows]
    diff = max(float(np.abs(a - b).max()) for a, b in zip(single, double))
    cosine = max(float(1 - unit(a) @ b) for a, b in zip(single, double))

    lines = ["golden 1", f"model {m.name}", f"dim {m.shape['hidden']}", f"f32_diff {diff.hex()}",
             f"f32_cosine {cosine.hex()}", f"max_swiglu {swiglu[0].hex()}", f"cases {len(todo)}"]
    for (label, text, ids), row, vec in zip(todo, rows, double):
        data = text.encode() if text is not None else b""
        lines += [f"case {label}",
                  f"text {-1 if text is None else len(data)} {data.hex()}".rstrip(),
                  f"ids {len(ids)} {' '.join(map(str, ids))}",
                  f"norm {float(np.float32(np.linalg.norm(row))).hex()}",
                  f"vec {len(vec)} {' '.join(float(x).hex() for x in vec.astype('f4'))}"]
    out.write_text("\n".join(lines) + "\n")
    return diff, cosine, swiglu[0]


def write_readme(out, rows):
    table = ["| model | layers | hidden | heads / kv | head size | ffn | theta | source "
             "| f32_diff | 1 - cosine | max SwiGLU |", "|---" * 11 + "|"]
    for m, (diff, cosine, swiglu) in rows:
        s = m.shape
        source = (f"{m.dtype}, Qwen3{'ForCausalLM' if m.kind == 'causal' else 'Model'}, "
                  f"{'one file' if m.shard == '1GB' else 'sharded'}{'' if m.tied else ', untied'}")
        table.append(f"| {m.name} | {s['layers']} | {s['hidden']} | {s['heads']} / {s['kv']} "
                     f"| {s['hd']} | {s['ffn']} | {m.theta:g} | {source} | {diff:.1e} "
                     f"| {cosine:.0e} | {swiglu:.6g} |")
    out.write_text("\n".join([
        "# Goldens", "",
        "Made by tests/make_golden.py (`make golden`), which explains the format; do not edit. All "
        "weights are random.", "",
        f"Written by transformers {transformers.__version__}, torch "
        f"{torch.__version__.split('+')[0]}, tokenizers {tokenizers.__version__}, numpy "
        f"{np.__version__}.", "", *table, "",
        "f32_diff is the largest difference of a number in a unit vector between transformers in "
        "float32 and in double: what float32 costs a correct program.",
        "In `massive`, SwiGLU outputs at token 0 do not fit FP16 (65504)."]) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--scratch", type=Path, default=ROOT / "build/golden",
                   help="directory for the checkpoints")
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    a = p.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = (ROOT / "models/demo.txt").read_text(encoding="utf-8")
    tokenizer_text = train_bpe.train(text.splitlines(keepends=True), VOCAB - 12, ADDED)
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_text)
    a.out.mkdir(parents=True, exist_ok=True)
    readme = []
    for m in MODELS:
        folder = a.scratch / m.name
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(m, folder, tokenizer_text)
        subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--quiet", "--out",
                        a.out / f"{m.name}.qemb", "--note", "random weights"], check=True)
        readme.append((m, write_vec(m, folder, tokenizer, a.out / f"{m.name}.vec")))
    shutil.rmtree(a.out / "hf-tiny", ignore_errors=True)
    shutil.copytree(a.scratch / "hf-tiny", a.out / "hf-tiny")
    write_readme(a.out / "README.md", readme)


if __name__ == "__main__":
    main()
