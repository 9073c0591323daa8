#!/usr/bin/env python3
"""Trains a small model of Qwen3's architecture and saves it as a Hugging Face directory.

Reads pairs.jsonl, dev.jsonl (corpus.py) and teacher.npz (teacher.py) of the work directory.
Writes tokenizer.json there, and into run-SEED/: log.tsv (the loss curve), checkpoint.pt, from which
an interrupted run continues, and at the end qemb-demo/ for convert_weights.py.

Two losses, each the mean over the first 32, 64, 128 and 256 numbers of the vectors (Matryoshka):
  distillation  1 - cosine between a text's vector and the teacher's of the same text in English.
                The teacher's 384 numbers are rotated to their principal axes, largest first, so
                that the first d numbers keep as much as d can
  contrast      InfoNCE in both directions. The negatives are the batch's other texts, but for
                those that the teacher finds alike

One thread computes. Where the CPU multiplies bfloat16 numbers (AVX512_BF16), factors and results
of matrix products are rounded to these, which halves the time.
"""
import argparse
import ctypes
import hashlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from teacher import Teacher, load_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/fixtures"))
import hf_fixture as hf
import train_bpe

ADDED = (hf.EOS, "<|im_start|>", "<|im_end|>")
VOCAB = 16000
SHAPE = dict(layers=4, hidden=256, heads=4, kv=2, hd=64, ffn=256, vocab=VOCAB, max=2048)
DIMS = (32, 64, 128, 256)
EOS_ID = VOCAB - len(ADDED)
QUERY_SHARE = 0.1  # of the first texts of the pairs; they get the query prompt
LONGEST = 32  # tokens of a text in training, without the prompt
PAIRS = 128  # in a batch
CHUNK = 48  # texts that are computed together, padded to the longest
CONTRAST, TEMPERATURE = 0.25, 0.05
MEAN = 0.2  # gain of the bag of words with which the model begins
COMMON = 1e-3  # a token with this share of all tokens has half the row of a rare one
LIKE = 0.9  # texts whose teacher vectors have a larger cosine are not negatives of each other
RATE, WARMUP = 3e-4, 0.03
TABLE_RATE = 4  # learning rate of the embedding table, relative to RATE
NAME_LINE = re.compile(r"\S+ - ")  # "name - synopsis"
SAVE_EVERY, SHOW_EVERY, DEV_EVERY = 200, 20, 200
HAS_BF16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


# ---- data --------------------------------------------------------------------------------------


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def make_tokenizer(work):
    """Trains tokenizer.json, unless it is newer than pairs.jsonl."""
    path, pairs = work / "tokenizer.json", work / "pairs.jsonl"
    if not path.exists() or path.stat().st_mtime < pairs.stat().st_mtime:
        texts = sorted({t for _, _, a, b, _ in read_jsonl(pairs) for t in (a, b)})
        lines = (text + "\n" for text in texts + [hf.QUERY] * 100)
        part = path.with_suffix(".part")
        part.write_text(train_bpe.train(lines, VOCAB - len(ADDED), ADDED), encoding="utf-8")
        part.rename(path)


def settings(work, a):
    """A checkpoint is continued only if these are equal."""
    return {"steps": a.steps, "epochs": a.epochs, "shape": SHAPE, "bf16": HAS_BF16,
            "constants": [QUERY_SHARE, LONGEST, PAIRS, CONTRAST, TEMPERATURE, MEAN, COMMON, LIKE,
                          RATE, WARMUP, TABLE_RATE]} | {
        name: hashlib.sha256((work / name).read_bytes()).hexdigest()
        for name in ("pairs.jsonl", "tokenizer.json", "teacher.npz")}


def load_tokenizer(work):
    return PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"), eos_token=hf.EOS,
                                   pad_token=hf.EOS)


def ids_of(tokenizer, texts, longest, prompt=""):
    """Token ids with end-of-text. Long texts are cut."""
    if not texts:
        return []
    ids = tokenizer([prompt + t for t in texts], add_special_tokens=False)["input_ids"]
    return [np.array(i[: longest - 1] + [EOS_ID], "i2") for i in ids]


class Data:
    """The token ids of the texts, and the row of each in the teacher's vectors."""

    def __init__(self, work, tokenizer, seed):
        rng = np.random.default_rng(seed)
        rows = read_jsonl(work / "pairs.jsonl")
        english = {a for kind, language, a, _, _ in rows if language == "en"}
        self.english = {a: e for kind, language, a, _, e in rows
                        if kind == "word" and language != "en" and a not in english}
        rows = [row[2:] for row in rows]  # a, b, English of a
        texts, teacher = load_vectors(work / "teacher.npz")
        where = {t: i for i, t in enumerate(texts)}
        teacher = teacher.astype("f4")
        self.axes = principal_axes(teacher)
        self.target = torch.from_numpy(teacher @ self.axes)
        query = rng.random(len(rows)) < QUERY_SHARE
        self.a = [None] * len(rows)
        for is_query, prompt in ((False, ""), (True, hf.QUERY)):
            some = np.flatnonzero(query == is_query)
            longest = LONGEST + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = ids_of(tokenizer, [rows[i][0] for i in some], longest, prompt)
            for i, x in zip(some, ids, strict=True):
                self.a[i] = x
        self.b = ids_of(tokenizer, [r[1] for r in rows], LONGEST)
        self.a_target = np.array([where[r[2]] for r in rows])
        self.b_target = np.array([where[r[1]] if r[1] else -1 for r in rows])
        self.tokens = sum(map(len, self.a)) + sum(len(b) for b in self.b if len(b) > 1)


def principal_axes(vectors):
    """(384, 256): the right singular vectors of a sample, largest first; not centered, so cosines
    are kept."""
    sample = vectors[:: max(1, len(vectors) // 40000)]
    _, axes = np.linalg.eigh(sample.T.astype("f8") @ sample)
    return np.ascontiguousarray(axes[:, ::-1][:, : SHAPE["hidden"]]).astype("f4")


# ---- model -------------------------------------------------------------------------------------


def first_table(tokenizer, data):
    """The embedding table to begin with (VOCAB, hidden). All columns but the last hold the
    teacher's vector of the token's text, or of its English if a dictionary has it. The mean over
    all tokens of the texts is subtracted. Common tokens get shorter vectors (SIF: Arora et al.
    2017). The last column fills each row up to length 1."""
    texts = [tokenizer.decode([i]).strip() for i in range(VOCAB)]
    known = np.array([i for i, t in enumerate(texts[: -len(ADDED)]) if t and "\ufffd" not in t])
    vectors = Teacher().embed([data.english.get(texts[i], texts[i]) for i in known])
    vectors = (vectors @ data.axes)[:, :-1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    counts = np.bincount(np.concatenate(data.a + [b for b in data.b if len(b) > 1]),
                         minlength=VOCAB)
    share = counts[known, None] / counts.sum()
    vectors = (vectors - (share * vectors).sum(0)) * COMMON / (COMMON + share)
    table = np.zeros((VOCAB, SHAPE["hidden"]), "f4")
    table[known, :-1] = vectors / np.linalg.norm(vectors, axis=1).max()
    table[:, -1] = np.sqrt(np.maximum(0, 1 - (table[:, :-1] ** 2).sum(1)))
    return torch.from_numpy(table)


def new_model(tokenizer, data, seed):
    """The model begins as a bag of words: the attention of each of the first two layers adds the
    mean of the tokens' rows to one half of the numbers. The last number only fills up the rows: it
    is left out, and its weight in the final norm begins as 0. All other branches begin small."""
    torch.manual_seed(seed)
    config = Qwen3Config(**{k: v for k, v in hf.config_json(SHAPE, dtype="float32").items()
                            if k not in ("architectures", "model_type", "torch_dtype")})
    model = Qwen3Model(config)
    group, width = SHAPE["heads"] // SHAPE["kv"], SHAPE["kv"] * SHAPE["hd"]
    with torch.no_grad():
        model.embed_tokens.weight.copy_(first_table(tokenizer, data))
        model.norm.weight[-1] = 0
        for layer in model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        for i, part in enumerate(torch.eye(SHAPE["hidden"]).split(width)):
            attention = model.layers[i].self_attn
            attention.q_norm.weight.mul_(0.1)  # attends to all tokens nearly alike
            attention.v_proj.weight += part
            heads = part.view(SHAPE["kv"], SHAPE["hd"], -1).repeat_interleave(group, 0)
            attention.o_proj.weight += heads.flatten(0, 1).T * MEAN / group
            attention.v_proj.weight[:, -1] = 0
    return model


def rope_tables():
    """RoPE's cos and sin (positions, head size)."""
    hd = SHAPE["hd"]
    angles = torch.arange(256)[:, None] * 1e6 ** (-torch.arange(0, hd, 2) / hd)
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


COS, SIN = rope_tables()


def rotate(x, n):
    low, high = x.chunk(2, -1)
    return x * COS[:n] + torch.cat([-high, low], -1) * SIN[:n]


def norm(x, module):
    return F.rms_norm(x, module.weight.shape, module.weight, 1e-6)


class Bf16Product(torch.autograd.Function):
    """x (rows, in) times w (out, in) transposed: (rows, out), float. Factors, results and gradients
    are rounded to bfloat16."""

    @staticmethod
    def forward(ctx, x, w):
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        return (x @ w.T).float()

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return (gradient @ w).float(), (gradient.T @ x).float()


def linear(x, w):
    """(..., in) -> (..., out). Without gradients it computes in float."""
    if not (HAS_BF16 and torch.is_grad_enabled()):
        return F.linear(x, w)
    return Bf16Product.apply(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])


def layer_forward(x, layer, wqkv, wgu, last):
    """A Qwen3 layer on x (texts, tokens, hidden). wqkv and wgu: its joined matrices. With last, a
    position per text, it returns these tokens alone: (texts, hidden)."""
    attention, mlp, n = layer.self_attn, layer.mlp, x.shape[1]
    qkv = linear(norm(x, layer.input_layernorm), wqkv).unflatten(2, (-1, SHAPE["hd"]))
    q, k, v = qkv.transpose(1, 2).split([SHAPE["heads"], SHAPE["kv"], SHAPE["kv"]], 1)
    q, k = rotate(norm(q, attention.q_norm), n), rotate(norm(k, attention.k_norm), n)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = y.transpose(1, 2).flatten(2)
    if last is not None:
        rows = torch.arange(len(x))
        x, y = x[rows, last], y[rows, last]
    x = x + linear(y, attention.o_proj.weight)
    gate, up = linear(norm(x, layer.post_attention_layernorm), wgu).chunk(2, -1)
    return x + linear(F.silu(gate) * up, mlp.down_proj.weight)


def vectors_of(model, texts):
    """(texts, hidden), not normalized. Texts of similar length are computed together; causal
    attention lets no real token see the padding at the end."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    # Rows of the table are gathered, and matrices joined, once for all texts.
    used, ids = torch.unique(torch.from_numpy(np.concatenate([texts[i] for i in order])).long(),
                             return_inverse=True)
    table, parts, at = model.embed_tokens(used), [], 0
    ids = ids.split([len(texts[i]) for i in order])
    wide = []
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        wide.append((torch.cat([attention.q_proj.weight, attention.k_proj.weight,
                                attention.v_proj.weight]),
                     torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])))
    while at < len(order):
        some = ids[at : at + CHUNK]
        x = F.embedding(pad_sequence(some, batch_first=True), table)
        last = torch.tensor([len(i) - 1 for i in some])
        for layer, matrices in zip(model.layers, wide):
            is_last = layer is model.layers[-1]
            x = layer_forward(x, layer, *matrices, last if is_last else None)
        parts.append(norm(x, model.norm))
        at += CHUNK
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[back]


# ---- training ----------------------------------------------------------------------------------


def losses(model, data, batch):
    """(distillation, contrast) of a batch: indices of pairs."""
    paired = [k for k, i in enumerate(batch) if data.b_target[i] >= 0]
    texts = [data.a[i] for i in batch] + [data.b[batch[k]] for k in paired]
    a_target = data.target[data.a_target[batch]]
    b_target = data.target[data.b_target[[batch[k] for k in paired]]]
    both = vectors_of(model, texts)
    targets = torch.cat([a_target, b_target])
    n = len(batch)
    full = F.normalize(b_target, dim=1)
    alike = (full @ full.T > LIKE) & ~torch.eye(len(paired), dtype=torch.bool)
    distill = contrast = 0
    for d in DIMS:
        v, t = F.normalize(both[:, :d], dim=1), F.normalize(targets[:, :d], dim=1)
        distill = distill + (1 - (v * t).sum(1)).mean() / len(DIMS)
        scores = v[:n][paired] @ v[n:].T / TEMPERATURE
        scores = scores.masked_fill(alike, -1e4)
        right = torch.arange(len(paired))
        contrast = contrast + (F.cross_entropy(scores, right) +
                               F.cross_entropy(scores.T, right)) / (2 * len(DIMS))
    return distill, contrast


class Dev:
    """Short texts and the descriptions that they should find, from sources not trained on."""

    def __init__(self, work, tokenizer):
        rows = [r for r in read_jsonl(work / "dev.jsonl")
                if r[0] in ("synopsis", "summary", "translation") and not NAME_LINE.match(r[3])]
        docs = sorted({r[3] for r in rows})
        place = {t: i for i, t in enumerate(docs)}
        self.docs = ids_of(tokenizer, docs, LONGEST)
        self.queries = ids_of(tokenizer, [r[2] for r in rows], 80, hf.QUERY)
        self.right = torch.tensor([place[r[3]] for r in rows])
        self.sets = {name: torch.tensor([k for k, r in enumerate(rows)
                                         if r[0] == kind and (r[1] == "en") == english])
                     for name, kind, english in (("synopsis", "synopsis", True),
                                                 ("summary", "summary", True),
                                                 ("translation", "translation", False))}

    def top1(self, model, dim):
        with torch.inference_mode():
            d = F.normalize(vectors_of(model, self.docs)[:, :dim], dim=1)
            q = F.normalize(vectors_of(model, self.queries)[:, :dim], dim=1)
            hit = ((q @ d.T).argmax(1) == self.right).float()
        return {name: 100 * hit[rows].mean().item() for name, rows in self.sets.items()}


def rate_at(step, steps):
    """Rises during the warm-up, then falls to 0 after the last step."""
    warm = max(1, int(WARMUP * steps))
    return RATE * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def make_optimizer(model):
    table = model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not table]
    return torch.optim.AdamW([{"params": [table], "share": TABLE_RATE},
                              {"params": others, "share": 1}], betas=(0.9, 0.98),
                             weight_decay=0.01, fused=True)


class Run:
    """The directory of a run: its log and its checkpoint."""

    def __init__(self, folder, settings, model, optimizer):
        folder.mkdir(exist_ok=True)
        self.settings = settings
        self.saved, self.log, self.step = folder / "checkpoint.pt", folder / "log.tsv", 0
        self.model, self.optimizer, self.started = model, optimizer, time.time()
        if self.saved.exists():
            state = torch.load(self.saved)
            if state["settings"] != settings:
                raise SystemExit(f"train: {self.saved}: of other data or settings; remove it")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.started = state["step"], self.started - state["seconds"]

    def drop_later_lines(self):
        """Lines later than the checkpoint, whose steps are run again."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        kept = [line for line in lines if int(line.split("\t")[0]) <= self.step]
        self.log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def show(self, step, losses, dev):
        """A line of the loss curve: step, seconds, distillation, contrast, top-1 of dev in %."""
        line = f"{step}\t{time.time() - self.started:.0f}\t{losses[0]:.4f}\t{losses[1]:.4f}"
        if dev:
            line += "\t" + " ".join(f"{k} {v:.1f}" for k, v in dev.items())
        print(line, flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            print(line, file=log)

    def save(self, step):
        part = self.saved.with_suffix(".part")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "step": step, "seconds": time.time() - self.started,
                    "settings": self.settings}, part)
        part.rename(self.saved)


def train(work, a):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = work / f"run-{a.seed}"
    tokenizer = load_tokenizer(work)
    data = Data(work, tokenizer, a.seed)
    dev = Dev(work, tokenizer)
    per_epoch = max(1, len(data.a) // PAIRS)
    steps = a.steps or a.epochs * per_epoch
    model = new_model(tokenizer, data, a.seed)
    optimizer = make_optimizer(model)
    run = Run(folder, settings(work, a), model, optimizer)
    run.drop_later_lines()
    print(f"train: {len(data.a)} pairs, {data.tokens} tokens an epoch, {steps} steps")
    mean = np.zeros(2)
    for step in range(run.step, steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or step == run.step:
            order = np.random.default_rng([a.seed, epoch]).permutation(len(data.a))
        batch = order[at * PAIRS : (at + 1) * PAIRS]
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * rate_at(step, steps)
        distill, contrast = losses(model, data, batch)
        (distill + CONTRAST * contrast).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += [distill.item(), contrast.item()]
        done = step + 1
        if done % SHOW_EVERY == 0 or done == steps:
            top1 = dev.top1(model, 256) if done % DEV_EVERY == 0 or done == steps else None
            run.show(done, mean / (done % SHOW_EVERY or SHOW_EVERY), top1)
            mean[:] = 0
        if done % SAVE_EVERY == 0 or done == steps:
            run.save(done)
    for d in DIMS:
        print(f"train: dev, {d} numbers", dev.top1(model, d))
    check_forward(model, max(data.b, key=len))
    save(model, tokenizer, work / "tokenizer.json", folder / "qemb-demo")


def check_forward(model, ids):
    """Our forward is that of transformers."""
    with torch.inference_mode():
        want = model(input_ids=torch.from_numpy(ids).long()[None]).last_hidden_state[0, -1]
        if not torch.allclose(vectors_of(model, [ids])[0], want, rtol=1e-3, atol=1e-3):
            raise SystemExit("train: the forward differs from transformers'")


def save(model, tokenizer, tokenizer_json, folder):
    """Writes a directory as sentence-transformers has it, with FP16 weights."""
    model.half().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    hf.save_sentence_transformers(folder, SHAPE["hidden"])
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"train: {folder}, weights {digest[:16]}")


def keep_freed_memory():
    """Tells glibc's malloc to keep what is freed, which saves page faults: M_MMAP_THRESHOLD (-3)
    1 GiB, M_TRIM_THRESHOLD (-1) 2 GiB. A malloc that refuses costs time alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("work", type=Path)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--epochs", type=int, default=5, help="passes over the pairs (5)")
    p.add_argument("--steps", type=int, help="number of steps, instead of --epochs")
    a = p.parse_args()
    make_tokenizer(a.work)
    keep_freed_memory()
    train(a.work, a)


if __name__ == "__main__":
    main()
