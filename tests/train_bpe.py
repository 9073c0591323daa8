"""Trains a small byte-level BPE vocabulary of the form that Qwen3's tokenizer has."""
import json

import hf_fixture as hf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers


def train(lines, tokens, added):
    """-> the text of a tokenizer.json: `tokens` tokens from bytes and merges, then the added ones."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(hf.SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    model = json.loads(t.to_str())["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    text = json.dumps(hf.tokenizer_json(merges, added), ensure_ascii=False, indent=2)
    # One id per merge is the form that the converter wants; two merges may in principle make one
    # string, and a text may be too short for that many merges.
    made = json.loads(text)["model"]["vocab"]
    if made != model["vocab"] or len(made) != tokens:
        raise SystemExit(f"train_bpe: vocabulary (got {len(made)} tokens, want {tokens} in order)")
    return text
