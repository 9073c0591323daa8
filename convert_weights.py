#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#   "numpy>=1.24,<3",
#   "safetensors>=0.4.3,<1",
#   "huggingface_hub>=0.23,<3",
#   "gguf>=0.16,<1",
#   "tqdm>=4.60,<5",
# ]
# ///
"""convert_weights.py - converts an embedding or rerank model of the Qwen3 family, or an XLM-RoBERTa
or BERT encoder with a Unigram tokenizer, to one .qemb file.

The source is a Hugging Face directory, a name on the hub or a GGUF file. A checkpoint that qemb
would compute differently from transformers and sentence-transformers is refused with one line:
read_config, read_tokenizer, read_modules and check_tensors look for the differences. A GGUF file is
read in the form of config.json and tokenizer.json. qemb.h describes the layout of a .qemb file.

Weights are converted in blocks of rows, so memory does not grow with the model. The file is written
under a temporary name in the same directory and renamed when it is complete on disk. It depends on
the source and the options alone: the same checkpoint gives the same bytes.

A checkpoint may be hostile: none of it is run, no file of it is read before it is known to be a
regular one, and what it says is printed without control characters. If qemb is built, the new file
has to give finite vectors before it gets its name.
"""
import argparse
import base64
import fcntl
import hashlib
import io
import json
import math
import os
import pickletools
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path


def no_package(e):
    """Returns the line for a package that is not installed."""
    needs = re.findall(r'^#   ("[^"]+")', Path(__file__).read_text(encoding="utf-8"), re.M)
    return (f"convert_weights.py: {e.name.split('.')[0]}: no such package; `make convert` installs "
            "it for .venv/bin/python convert_weights.py, or: pip install " + " ".join(needs))


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of a package that is loading
try:
    import numpy as np
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(no_package(missing))

VERSION = "0.1.0"
GROUP = 64  # weights in a row of an INT8 matrix that share a scale
BLOCK = 1 << 22  # numbers converted at a time; a block takes about 24 bytes a number
BITS_BLOCK = 1 << 16  # numbers whose significant bits are looked at together
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROMPTS, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
BERT = "sentence_bert_config.json"  # sentence-transformers writes it for any kind of model
LOGIT_SCORE = "1_LogitScore/config.json"
JSON_FILES = ["config.json", "tokenizer.json", "modules.json", PROMPTS, POOLING, BERT, LOGIT_SCORE]
TOKENIZER_CONFIG, ADAPTER = "tokenizer_config.json", "adapter_config.json"
ADDED_TOKENS, SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# Of sentence-transformers' modules
MODULE_FILES = ["?_*/config.json", "?_Dense/model.safetensors", "?_Dense/pytorch_model.bin"]
# A name's place in its list is its number in the file.
KINDS, POOLINGS = ["embedding", "reranker"], ["last", "mean", "first"]
ATTENTIONS, ACTIVATIONS = ["causal", "bidirectional"], ["identity", "tanh"]
NO_TOKEN = 0xFFFFFFFF  # as eos_id
BERT_ARCHITECTURE = 1  # in the file; Qwen3 is 0
# The prompts of a reranker: its model card's, which lib/text_ids.c puts around a pair.
RERANKER = {
    "prefix": "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
              "Query and the Instruct provided. Note that the answer can only be \"yes\" or \"no\"."
              "<|im_end|>\n<|im_start|>user\n",
    "suffix": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "instruct": "Given a web search query, retrieve relevant passages that answer the query",
}
# The prompts of embeddings whose source may have none: those of Qwen3-Embedding's own checkpoint,
# which a GGUF file cannot hold; pplx-embed and bge-m3 were trained without, and bare texts are both
# prompts; multilingual-e5's are in its model card alone.
KNOWN_PROMPTS = {
    "Qwen3-Embedding": {"query": f"Instruct: {RERANKER['instruct']}\nQuery:", "document": ""},
    "pplx-embed": {"query": "", "document": ""},
    "bge-m3": {"query": "", "document": ""},
    "multilingual-e5": {"query": "query: ", "passage": "passage: "},
}
CLASSIFIER, PPLX, VOYAGE = ("Qwen3ForSequenceClassification", "PPLXQwen3Model",
                            "Qwen3BidirectionalModel")
# What lib/model_file.c and tokenizer.c take at most, with FIELDS. test_convert_hostile compares.
MAX_ROWS = 1 << 16  # of a dense layer
MAX_PROMPTS = 64
MAX_MERGES, MAX_TOKEN = 1 << 20, 1024  # a token in bytes
MAX_PIECES, MAX_PIECE = 1 << 20, 255  # a piece of a Unigram vocabulary in bytes
MAX_PAIRS = 1 << 20  # of characters, in a charsmap
MAX_SCORE = 1000000  # of a piece; scores are negative
MAX_TEXT_FILE = 1 << 28  # bytes of a JSON file or a template; Qwen3's tokenizer.json has 11 MB
QEMB = Path(__file__).resolve().parent / "qemb"
PROBES = "a", "What is gravity?", "\n\tL'été 2026: 中文 \U0001f600 <|im_end|> don't"
RERANKER_WINDOW = 8192  # tokens of a pair, prefix and suffix included, in the model card
# The only pre-tokenizer pattern that tokenizer.c implements.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Refused(Exception):
    """An error for the user, in one line. The arguments: the object, the rest of the line."""

    def __str__(self):
        return ": ".join(map(str, self.args))


class Interrupted(BaseException):
    """A signal; the argument is its number."""


def one_line(text):
    return printable(" ".join(str(text).split()))[:2000]


def refuse(obj, what, got=None, want=None):
    sides = ", ".join(f"{k} {v}" for k, v in (("got", got), ("want", want)) if v is not None)
    raise Refused(obj, what + (f" ({sides})" if sides else ""))


def show(value):
    """JSON on one line, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def show_both(a, b):
    """Two values as JSON. If one is long, both are cut to where they begin to differ."""
    a, b = json.dumps(a), json.dumps(b)
    if max(len(a), len(b)) <= 120:
        return a, b
    at = max(0, len(os.path.commonprefix([a, b])) - 40)
    return ["..." * (at > 0) + t[at : at + 110] + "..." * (len(t) > at + 110) for t in (a, b)]


def expect(obj, what, got, *allowed, hint=""):
    """hint: what the user can do."""
    if got not in allowed:
        sides = show_both(got, *allowed) if len(allowed) == 1 else (
            show(got), " or ".join(map(show, allowed)))
        refuse(obj, f"{what}; {hint}" if hint else what, *sides)


def printable(text):
    """text with escapes in place of control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def regular_size(path, name):
    """Returns the bytes of a file of the source. Another kind might block or never end."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        refuse(name, "no such file in the source")
    if not stat.S_ISREG(found.st_mode):
        refuse(name, "not a regular file")
    return found.st_size


def read_text_file(folder, name):
    size = regular_size(folder / name, name)
    if size > MAX_TEXT_FILE:
        refuse(name, "too large", f"{size} bytes", f"at most {MAX_TEXT_FILE}")
    return (folder / name).read_bytes()


class Number(float):
    """A number with a fraction or an exponent, as it stands in a JSON file."""

    def __new__(cls, text):
        number = super().__new__(cls, text)
        number.text = text
        return number


def parse(folder, name, read, *args):
    """Returns read(value of the JSON file, *args). Any exception in read refuses the file."""
    data, number = read_text_file(folder, name), Number if name == "tokenizer.json" else None
    return understand(name, lambda: read(json.loads(data, parse_float=number), *args))


def understand(name, read, form="JSON of the known form"):
    """Returns read(), which looks into values of unknown types."""
    try:
        return read()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as e:
        what = " ".join(str(e).split())[:120]
        refuse(name, f"not {form} ({type(e).__name__}: {what})")


# ---- keys --------------------------------------------------------------------------------------

# Of any config.json, and no vector depends on them.
ANY_CONFIG = """
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    initializer_range is_encoder_decoder is_matryoshka label2id length_penalty matryoshka_dimensions
    matryoshka_dims max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sentence_transformers sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript typical_p
    use_bfloat16 use_cache"""

# The keys that the files of a source may have. First those that are read, which also refuses the
# values that qemb has not; behind the line, those that change no vector. Any other key is refused:
# a setting that qemb does not know may change vectors. --ignore KEY says that it does not.
KEYS = {
    "config.json": """
        architectures attention_bias auto_map head_dim hidden_act hidden_size id2label
        intermediate_size is_causal layer_types max_position_embeddings model_type
        num_attention_heads num_hidden_layers num_key_value_heads num_labels partial_rotary_factor
        per_layer_config pruned_heads quantization_config rms_norm_eps rope_parameters rope_scaling
        rope_theta tie_word_embeddings use_bidirectional_attention use_sliding_window vocab_size
        |
        add_cross_attention attention_dropout hidden_dropout is_decoder max_window_layers mlp_bias
        pad_token_id pretraining_tp sliding_window unsloth_fixed """ + ANY_CONFIG,
    # An encoder's config.json
    "encoder": """
        add_cross_attention architectures auto_map hidden_act hidden_size intermediate_size
        is_decoder layer_norm_eps max_position_embeddings model_type num_attention_heads
        num_hidden_layers pad_token_id position_embedding_type pruned_heads quantization_config
        type_vocab_size vocab_size
        |
        attention_probs_dropout_prob directionality gradient_checkpointing hidden_dropout_prob
        id2label num_labels output_past pooler_fc_size pooler_num_attention_heads
        pooler_num_fc_layers pooler_size_per_head pooler_type tie_word_embeddings """ + ANY_CONFIG,
    TOKENIZER_CONFIG: """add_bos_token add_eos_token add_prefix_space added_tokens_decoder
        additional_special_tokens auto_map bos_token chat_template cls_token do_lower_case eos_token
        extra_special_tokens mask_token model_max_length model_specific_special_tokens pad_token
        sep_token split_special_tokens tokenizer_class truncation_side unk_token
        |
        backend chat_template_file clean_up_tokenization_spaces errors fix_mistral_regex from_slow
        is_local legacy local_files_only max_length merges_file model_input_names name_or_path
        pad_to_multiple_of pad_token_id pad_token_type_id padding padding_side processor_class
        response_schema response_template return_token_type_ids sp_model_kwargs
        spaces_between_special_tokens special_tokens_map_file stride tokenizer_file truncation
        truncation_strategy trust_remote_code use_default_system_prompt use_fast vocab_file
        vocab_size""",
    SPECIAL_TOKENS: """additional_special_tokens bos_token cls_token eos_token extra_special_tokens
        mask_token model_specific_special_tokens pad_token sep_token unk_token""",
    BERT: """config_args config_kwargs do_lower_case document_length mask_prompt max_seq_length
        modality_config model_args model_kwargs module_output_name processing_kwargs processor_args
        processor_kwargs query_expansion query_length tokenizer_args tokenizer_kwargs
        tokenizer_name_or_path transformer_task
        |
        backend cache_dir unpad_inputs""",
    PROMPTS: """default_prompt_name model_type prompts suffix truncate_dim
        |
        activation_fn max_length num_labels score_functions similarity_fn_name""",
    "modules.json": "kwargs name path type | idx",
    "Pooling": """include_prompt pooling_mode pooling_mode_cls_token pooling_mode_lasttoken
        pooling_mode_max_tokens pooling_mode_mean_sqrt_len_tokens pooling_mode_mean_tokens
        pooling_mode_weightedmean_tokens
        |
        embedding_dimension word_embedding_dimension""",
    "Dense": """activation_function bias in_features module_input_name module_output_name
        out_features use_residual""",
    "LogitScore": "false_token_id true_token_id | module_input_name module_output_name",
    "Normalize": "| module_input_name module_output_name",
    "GGUF": """add_bos_token add_eos_token add_sep_token add_space_prefix eos_token_id merges model
        pre token_type tokens
        |
        bos_token_id cls_token_id eom_token_id eot_token_id fim_mid_token_id fim_pad_token_id
        fim_pre_token_id fim_rep_token_id fim_sep_token_id fim_suf_token_id mask_token_id
        mask_token padding_token_id scores sep_token_id seperator_token_id token_type_count
        unknown_token_id""",  # tokenizer.ggml.*
}
FREE_KEYS = re.compile("_.*|.*_version")  # of programs, for themselves


def unknown_keys(j, name):
    """Returns the keys of the file that are on no list."""
    kind = name.split("/")[0].split("_", 1)[-1] if "/" in name else name
    if kind == "config.json" and j["architectures"][0] in ENCODERS:
        kind = "encoder"
    if kind not in KEYS:
        return []
    known, parts = KEYS[kind].split(), j if name == "modules.json" else [j]
    return [key for part in parts for key in part.keys()
            if key not in known and not FREE_KEYS.fullmatch(key)]


def check_keys(folder, names, ignore, notes):
    """Refuses the keys of these files that are on no list, but for those to ignore. Adds notes."""
    unknown = [(name, key) for name in names for key in parse(folder, name, unknown_keys, name)]
    ignore_keys(unknown, ignore, notes)


def ignore_keys(unknown, ignore, notes):
    """unknown: pairs of a file and a key."""
    for name, key in unknown:
        if key not in ignore:
            refuse(name, f"{show(key)} is a setting that qemb does not know, and may change "
                   f"vectors; if it changes none: --ignore {key}")
        notes.append(f"{name}: {key} ignored, by --ignore")
    for key in ignore:
        if key not in dict(map(reversed, unknown)):
            refuse("--ignore", "no file has such a key, or qemb knows it", show(key),
                   "a key that was refused as unknown")


# ---- config.json -------------------------------------------------------------------------------

# The header's names and order, Hugging Face's names, and the ranges that lib/model_file.c accepts.
FIELDS = (
    ("n_layers", "num_hidden_layers", 1, 1024),
    ("hidden", "hidden_size", 1, 1 << 16),
    ("n_heads", "num_attention_heads", 1, 1 << 10),
    ("n_kv_heads", "num_key_value_heads", 1, 1 << 10),
    ("head_dim", "head_dim", 2, 1 << 10),
    ("ffn", "intermediate_size", 1, 1 << 20),
    ("vocab", "vocab_size", 256, 1 << 24),
    ("max_positions", "max_position_embeddings", 1, 1 << 22),
    ("rope_theta", "rope_theta", 1.0, 1e12),
    ("norm_eps", "rms_norm_eps", 1e-30, 0.5),
)
Config = namedtuple("Config", [field[0] for field in FIELDS])
# What else config.json says. labels: of a classifier's rows. linear: rows of the projection that
# voyage's class has behind the final norm, or None. places: of an encoder, or None
Claims = namedtuple("Claims", "architecture attention tied labels linear places", defaults=[None])
# How an encoder counts positions. pad_id: the token that takes none, or NO_TOKEN; first: row of the
# position table of a text's first token; types: rows of the type table
Places = namedtuple("Places", "pad_id first types")
SCALING_HINT = "if it was added after the training, for longer texts,"
# Architecture -> model_type
ENCODERS = {"XLMRobertaModel": "xlm-roberta", "BertModel": "bert"}
ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen3Model": "qwen3", CLASSIFIER: "qwen3",
                 PPLX: "bidirectional_pplx_qwen3", VOYAGE: "qwen3", **ENCODERS}
ONE_SCORE = "a classifier or reranker, whose output is a score and no vector"
# Those that people may take for one of these -> why they are not
OTHERS = {
    "JinaEmbeddingsV5Model": "its adapters are not merged; convert the repository of one task, "
    "whose name ends in -retrieval, -text-matching, -classification or -clustering",
    "XLMRobertaForSequenceClassification": ONE_SCORE, "BertForSequenceClassification": ONE_SCORE,
    "XLMRobertaXLModel": "its layers norm their input, those of XLMRobertaModel their output",
    "RobertaModel": "its tokenizer is a byte-level BPE of another kind than Qwen3's",
    "NewModel": "code of its own (gte), with rotary positions and a gated MLP",
}
# The architectures that are code in the checkpoint (auto_map), read and found to be Qwen3Model with
# bidirectional attention: perplexity's pplx-embed-v1; voyage's and ai-sage's. With the class of
# their configuration, which adds nothing, or None.
CUSTOM = {PPLX: "PPLXQwen3Config", VOYAGE: None}


def read_auto_map(o, architecture, classes):
    """Refuses code other than that of the architecture, which says how the model is computed."""
    for name, code in classes.items():
        want = (None if architecture not in CUSTOM else
                CUSTOM[architecture] if name == "AutoConfig" else architecture)
        if want is None or code.rsplit(".")[-1] != want:
            refuse(o, f"auto_map: {name} is code of its own, which qemb does not have", show(code),
                   f"{want or 'none'}, as architectures says {architecture}")


def read_attention(o, j, architecture):
    both, causal = j.get("use_bidirectional_attention"), j.get("is_causal", True)
    expect(o, "use_bidirectional_attention", both, None, False, True)
    if architecture in CUSTOM:
        hint = f"{architecture} is bidirectional"
        expect(o, "use_bidirectional_attention", both, None, True, hint=hint)
        expect(o, "is_causal", j.get("is_causal", False), False, hint=hint)
        return "bidirectional"
    expect(o, "is_causal", causal, True, False)
    if both and causal:
        refuse(o, "use_bidirectional_attention: transformers' Qwen3 reads is_causal alone and "
               'would be causal; if it was trained bidirectional, copy the source and add '
               '"is_causal": false, else remove this', "true", '"is_causal": false beside it')
    return ATTENTIONS[not causal]


def read_claims(j):
    o = "config.json"
    names = j.get("architectures")
    for other, why in OTHERS.items():
        if names == [other]:
            refuse(o, f"architectures: {why}", show(names))
    expect(o, "architectures", names, *([name] for name in ARCHITECTURES))
    name, tied = names[0], j.get("tie_word_embeddings")
    expect(o, "model_type", j.get("model_type"), ARCHITECTURES[name])
    read_auto_map(o, name, j.get("auto_map") or {})
    if name in ENCODERS:
        return Claims(name, "bidirectional", False, {}, None, read_places(o, j, name))
    expect(o, "tie_word_embeddings", tied, None, False, True)
    rows = j.get("num_labels") if name == VOYAGE else None
    if rows is not None and (type(rows) is not int or not 1 <= rows <= MAX_ROWS):
        refuse(o, "num_labels", show(rows), f"an integer from 1 to {MAX_ROWS}")
    labels = j.get("id2label") or {}
    if not isinstance(labels, dict) or not all(row.isdecimal() for row in labels):
        refuse(o, "id2label", show(labels), "labels by the numbers of their rows")
    return Claims(name, read_attention(o, j, name), bool(tied), labels, rows)


def read_places(o, j, architecture):
    types = j.get("type_vocab_size")
    if type(types) is not int or not 1 <= types <= 1 << 16:
        refuse(o, "type_vocab_size", show(types), f"an integer from 1 to {1 << 16}")
    if architecture == "BertModel":
        return Places(NO_TOKEN, 0, types)
    # The default of XLMRobertaConfig. transformers counts from pad_token_id + 1, and passes over
    # tokens of that id: the padding in a batch, or a literal <pad> in a text.
    pad = j.get("pad_token_id", 1)
    if type(pad) is not int or not 0 <= pad < 1 << 16:
        refuse(o, "pad_token_id", show(pad), f"an integer from 0 to {(1 << 16) - 1}")
    return Places(pad, pad + 1, types)


def read_fields(o, j, keys):
    """Returns the Config. keys: a field's key, if it is not that of FIELDS."""
    for name, key, low, high in FIELDS:
        key, kinds = keys.get(name, key), (int,) if isinstance(low, int) else (int, float)
        if key and (type(j.get(key)) not in kinds or not low <= j[key] <= high):
            name = "an integer" if len(kinds) == 1 else "a number"
            refuse(o, key, show(j.get(key)), f"{name} from {low:g} to {high:g}")
    return Config(*(j[keys.get(name, key)] for name, key, _, _ in FIELDS))


def read_encoder(o, j, places):
    for key, value in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        expect(o, key, j.get(key, value), value)
    for key in ("is_decoder", "add_cross_attention"):
        expect(o, key, j.get(key), None, False)
    for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        if type(j.get(key)) is not int or j[key] < 1:
            refuse(o, key, show(j.get(key)), "an integer from 1")
    hidden, heads = j["hidden_size"], j["num_attention_heads"]
    if hidden % heads:
        refuse(o, "hidden_size", hidden, f"a multiple of {heads} heads")
    head, longest = "hidden_size a head", f"max_position_embeddings, from {places.first} on"
    keys = {"n_kv_heads": "num_attention_heads", "head_dim": head, "max_positions": longest,
            "rope_theta": None, "norm_eps": "layer_norm_eps"}
    c = read_fields(o, j | {head: hidden // heads, None: 0.0, longest: (
        j["max_position_embeddings"] - places.first)}, keys)
    if places.pad_id != NO_TOKEN and places.pad_id >= c.vocab:
        refuse(o, "pad_token_id", places.pad_id, f"below vocab_size, {c.vocab}")
    return c


def read_config(j, claims):
    o = "config.json"
    expect(o, "pruned_heads", j.get("pruned_heads"), None, {})
    expect(o, "quantization_config", j.get("quantization_config"), None, False,
           hint="convert the model from which this one was quantized")
    if claims.places:
        return read_encoder(o, j, claims.places)
    expect(o, "hidden_act", j.get("hidden_act"), "silu")
    for key in ("attention_bias", "use_sliding_window"):
        expect(o, key, j.get(key), None, False)
    expect(o, "per_layer_config", j.get("per_layer_config"), None, {})
    expect(o, "partial_rotary_factor", j.get("partial_rotary_factor"), None, 1)
    for kind in j.get("layer_types") or []:
        expect(o, "layer_types", kind, "full_attention")
    # Older programs write rope_theta and rope_scaling, newer ones rope_parameters with both.
    thetas = {j["rope_theta"]} if j.get("rope_theta") is not None else set()
    for key in ("rope_scaling", "rope_parameters"):
        rope = j.get(key) or {}
        hint = f"{SCALING_HINT} copy the source and remove " + (
            key if key == "rope_scaling" else f"all of {key} but rope_theta")
        for name in ("rope_type", "type"):
            expect(o, f"{key}.{name}", rope.get(name, "default"), "default", hint=hint)
        for name, value in rope.items():
            if name == "rope_theta":
                thetas.add(value)
            elif name not in ("rope_type", "type"):
                refuse(o, f"{key}.{name}", show(value), 'rope_type "default"')
    if len(thetas) != 1:
        refuse(o, "rope_theta", show(sorted(thetas)), "one value")
    # 128 is the default of Qwen3Config; check_tensors compares it with the shape of q_norm.
    c = read_fields(o, {"head_dim": 128, **j, "rope_theta": thetas.pop()}, {})
    if c.n_heads % c.n_kv_heads:
        refuse(o, "num_attention_heads", c.n_heads, f"a multiple of {c.n_kv_heads} key/value heads")
    if c.head_dim % 2:
        refuse(o, "head_dim", c.head_dim, "an even number")
    return c


# ---- tokenizer.json ----------------------------------------------------------------------------


def read_merges(model):
    """Returns (M, 2) u32. The vocabulary must be the 256 bytes, then one id per merge, in order."""
    o, vocab, merges = "tokenizer.json", model["vocab"], model["merges"]
    # GPT-2's byte alphabet: first the printable bytes as themselves, then the others as
    # U+0100 and up.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    for i, ch in enumerate(plain + list(range(256, 512 - len(plain)))):
        expect(o, f"id of the byte character {show(chr(ch))}", vocab.get(chr(ch)), i)
    if len(merges) > MAX_MERGES:
        refuse(o, "merges", len(merges), f"at most {MAX_MERGES}")
    ids = np.empty((len(merges), 2), "<u4")
    for i, merge in enumerate(merges):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        for k, part in enumerate((a, b)):
            if not vocab.get(part, 256 + i) < 256 + i:
                refuse(o, f"merge {i}, {show(part)}", vocab.get(part, "no id"), f"below {256 + i}")
            ids[i, k] = vocab[part]
        if len(a + b) > MAX_TOKEN:  # a character stands for a byte
            refuse(o, f"merge {i}, bytes of its token", len(a + b), f"at most {MAX_TOKEN}")
        expect(o, f"id of merge {i}, {show(a + b)}", vocab.get(a + b), 256 + i)
    expect(o, "vocabulary size", len(vocab), 256 + len(merges))
    return ids


ADDED_FLAGS = "single_word", "lstrip", "rstrip"


def check_late(text, name, early):
    """Refuses a token that is "normalized", as add_tokens() makes them, if more than its text's
    normal form decides where it is found: transformers looks for it behind NFC, in what the other
    tokens (early) leave."""
    o, what = "tokenizer.json", f"{name} normalized"
    if not text.isascii():
        refuse(o, f"{what}, with characters outside of ASCII", "true", "false")
    for other in early:
        if any(text[i:].startswith(other) or i and other.startswith(text[i:])
               for i in range(len(text))):
            refuse(o, f"{what}, which {show(other)} begins in", "true", "false")


def added_token(i, text, strips=False):
    """Returns its bytes in the section added_tokens. strips: it takes the white space before it."""
    return struct.pack("<II", i, len(text) | strips << 31) + text + bytes(-len(text) % 4)


def read_added(tokens, first, vocab):
    """Returns the section added_tokens. Their ids are first .. vocab-1."""
    o, out, seen = "tokenizer.json", b"", set()
    early = [t["content"] for t in tokens if not t["normalized"]]
    for t in sorted(tokens, key=lambda t: t["id"]):
        name, i, text = f"added token {show(t['content'])}", t["id"], t["content"].encode()
        for flag in ADDED_FLAGS:
            expect(o, f"{name} {flag}", t[flag], False)
        expect(o, f"{name} normalized", t["normalized"], False, True)
        if t["normalized"]:
            check_late(t["content"], name, early)
        if type(i) is not int or not first <= i < vocab or i in seen:
            refuse(o, f"{name} id", show(i), f"one of its own, from {first} to {vocab - 1}")
        if not text or text in seen:
            refuse(o, f"{name} text", "an empty or repeated one", "one of its own")
        if len(text) > MAX_TOKEN:
            refuse(o, f"{name} bytes", len(text), f"at most {MAX_TOKEN}")
        seen |= {i, text}
        out += added_token(i, text)
    return out


def read_eos(post, added):
    """Returns the id that the post-processor appends once to a text, or NO_TOKEN."""
    o = "tokenizer.json"
    steps = post["processors"] if post and post["type"] == "Sequence" else [post]
    steps = [s for s in steps if s and s["type"] != "ByteLevel"]  # ByteLevel only changes offsets
    if not steps:
        return NO_TOKEN
    expect(o, "post_processor", [s["type"] for s in steps], ["TemplateProcessing"])
    single = steps[0]["single"]
    expect(o, "post_processor, a single text", [list(piece)[0] for piece in single],
           ["Sequence", "SpecialToken"])
    name = single[1]["SpecialToken"]["id"]
    ids = steps[0]["special_tokens"][name]["ids"]
    known = [t["id"] for t in added if t["content"] == name]
    if ids != known:
        refuse(o, f"post_processor, ids of {show(name)}", show(ids), show(known))
    return ids[0]


# table and added: the sections; words: what the table has, for the summary; bos_id, eos_id: before
# and behind every text; ids: {token: id}, and those of added tokens alone; late: those of which
# read_added has checked that they may be "normalized"; strips: those that take the white space
# before them; classes: those of transformers that take tokenizer.json as it is. notes: for the user
Tokenizer = namedtuple("Tokenizer", "table words added bos_id eos_id ids added_ids late strips "
                       "classes notes", defaults=[(), ()])


def read_tokenizer(j, vocab):
    """Returns the Tokenizer of a Qwen3. Ignores `truncation` and `padding`, which are left from
    training and overwritten by transformers."""
    o, model, added = "tokenizer.json", j["model"], j["added_tokens"]
    split, level = j["pre_tokenizer"].get("pretokenizers") or [j["pre_tokenizer"], {}]
    for what, got, want in (
        ("model type", model.get("type"), "BPE"),
        ("normalizer", j["normalizer"], {"type": "NFC"}),
        ("pre_tokenizer", [split["type"], level.get("type")], ["Split", "ByteLevel"]),
        ("pre_tokenizer pattern", split.get("pattern"), {"Regex": SPLIT}),
        ("pre_tokenizer behavior", split.get("behavior"), "Isolated"),
        ("pre_tokenizer invert", split.get("invert"), False),
        ("ByteLevel add_prefix_space", level.get("add_prefix_space"), False),
        ("ByteLevel use_regex", level.get("use_regex"), False),
    ):
        expect(o, what, got, want)
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                "byte_fallback", "ignore_merges"):
        expect(o, f"model {key}", model.get(key), None, False, "")
    merges = read_merges(model)
    if 256 + len(merges) > vocab:
        refuse(o, "tokens", 256 + len(merges), f"at most vocab_size, {vocab}")
    added_ids = {t["content"]: t["id"] for t in added}
    return Tokenizer(Section("merges", U32, len(merges), 2, merges.tobytes()),
                     f"{len(merges):,} merges", read_added(added, 256 + len(merges), vocab),
                     0, read_eos(j["post_processor"], added), model["vocab"] | added_ids, added_ids,
                     [t["content"] for t in added if t["normalized"]], (), TOKENIZERS)


# ---- tokenizer.json of an encoder --------------------------------------------------------------

MAX_STEPS = 1 << 16  # that lead to the keys of a charsmap; bge-m3 has 6,338, and 5,512 keys
CLUSTER = 6  # UTF-8 bytes from which a grapheme cluster is not looked up as a whole
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
METASPACE = "\u2581"  # a space inside pieces


def read_charsmap(text):
    """Returns {key: replacement} of a SentencePiece charsmap, in UTF-8: the keys that Hugging
    Face's tokenizers can find. It looks up a cluster of fewer than CLUSTER bytes, else each of its
    characters, and takes the shortest key with which they begin.

    u32 bytes of a Darts double array, its u32 units, then replacements that end with NUL. The
    children of a node lie at its base xor their byte."""
    what, data = "precompiled_charsmap", base64.b64decode(text, validate=True)
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        refuse("tokenizer.json", f"{what}, bytes of its array", size,
               f"a multiple of 4 up to {max(0, len(data) - 4)}")
    units, texts = np.frombuffer(data, "<u4", size // 4, 4).astype("i8"), data[4 + size :]
    labels, rules, steps = np.arange(1, 256), {}, 0

    def step(unit):
        return (unit >> 10) << ((unit & 0x200) >> 6)

    todo = [(b"", step(int(units[0])))]
    while todo:
        key, base = todo.pop()
        slots = base ^ labels
        there = slots < len(units)
        slots, bytes_there = slots[there], labels[there]
        found = (units[slots] & 0x800000FF) == bytes_there
        steps += np.count_nonzero(found)
        if steps > MAX_STEPS:  # nodes may be shared, or lead back to themselves
            refuse("tokenizer.json", f"{what}, bytes of its keys", "more", f"at most {MAX_STEPS}")
        for slot, byte in zip(slots[found].tolist(), bytes_there[found].tolist()):
            unit, longer = int(units[slot]), key + bytes([byte])
            node = slot ^ step(unit)
            if unit >> 8 & 1:
                rules[longer] = replacement(longer, units, node, texts)
            elif len(longer) < CLUSTER - 1:
                todo.append((longer, node))
    return rules


def replacement(key, units, node, texts):
    """Returns what the charsmap puts in the place of key."""
    o, what = "tokenizer.json", f"precompiled_charsmap, key {key!r}"
    if len(key.decode()) > 2:
        refuse(o, f"{what}, characters", len(key.decode()), "1 or 2")
    at = int(units[node]) & 0x7FFFFFFF if node < len(units) else len(texts)
    end = texts.find(b"\0", at, at + MAX_PIECE + 1)
    if end < 0:
        refuse(o, f"{what}, replacement", "none, or a longer one", f"at most {MAX_PIECE} bytes")
    texts[at:end].decode()
    return texts[at:end]


def charsmap_tables(rules):
    """Returns the tables of the section unigram: singles, pairs and replacements, as bytes."""
    texts, places, size = [], {}, 0
    tables = [], []
    for key, text in sorted((tuple(map(ord, key.decode())), text) for key, text in rules.items()):
        if text not in places:
            places[text], size = size, size + len(text)
            texts.append(text)
        tables[len(key) - 1].append((*key, places[text] | len(text) << 24))
    return *(np.array(t, "<u4").tobytes() for t in tables), b"".join(texts)


NUMBER = re.compile(r"(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?")
POWERS = [float(f"1e{n}") for n in range(309)]  # ** may be off by a bit


def read_score(value, piece):
    """Returns the number that Hugging Face's tokenizers reads. Its JSON parser rounds twice: the
    digits, and their quotient by a power of ten; digits that overflow 64 bits are left out."""
    text = value.text if type(value) is Number else str(value) if type(value) is int else ""
    found, score = NUMBER.fullmatch(text), math.inf
    if found and len(found[2]) <= 20:  # more are over 2**64
        sign, whole, part, exponent = found.groups("")
        digits = whole + part
        zeros = len(digits) - len(digits.lstrip("0"))
        digits = digits[: max(len(whole), zeros + 20)]
        n = int(digits)
        while n >= 2**64 and len(digits) > len(whole):
            digits = digits[:-1]
            n = int(digits)
        power = int(exponent or 0) - (len(digits) - len(whole))
        score = float(n) if n < 2**64 else math.inf
        while power < -308 and score:
            score, power = score / 1e308, power + 308
        if score:
            score = (score / POWERS[-power] if power < 0 else
                     score * POWERS[power] if power <= 308 else math.inf)
    if score > MAX_SCORE or score and not sign:
        refuse("tokenizer.json", f"score of {show(piece)}", text[:40] or show(value),
               f"a number from -{MAX_SCORE} to 0")
    return -score if sign else score


def read_spaces(j):
    """Returns the charsmap, and how spaces are cut: 0, runs of them become one, as for bge-m3; or
    1, the text is split at white space, as for multilingual-e5."""
    o = "tokenizer.json"
    steps = j["normalizer"].get("normalizers") or [j["normalizer"]]
    cuts = j["pre_tokenizer"].get("pretokenizers") or [j["pre_tokenizer"]]
    charsmap, *others = steps
    expect(o, "normalizer", [step["type"] for step in steps], ["Precompiled", "Replace"],
           ["Precompiled"])
    expect(o, "normalizer, what is replaced", others, [], [SPACES])
    expect(o, "pre_tokenizer", [cut["type"] for cut in cuts],
           ["WhitespaceSplit", "Metaspace"] if not others else ["Metaspace"])
    for name, *want in (("type", "Metaspace"), ("replacement", METASPACE), ("split", None, True),
                        ("add_prefix_space", None, True), ("str_rep", None, METASPACE),
                        ("prepend_scheme", None, "always")):
        expect(o, f"Metaspace {name}", cuts[-1].get(name), *want)
    return charsmap["precompiled_charsmap"], int(not others)


def read_ends(post, added_ids):
    """Returns the ids that the post-processor puts before and behind a text."""
    o = "tokenizer.json"
    expect(o, "post_processor", post["type"], "TemplateProcessing")
    expect(o, "post_processor, a single text", [list(piece)[0] for piece in post["single"]],
           ["SpecialToken", "Sequence", "SpecialToken"])
    ends = []
    for piece in post["single"][::2]:
        name = piece["SpecialToken"]["id"]
        ids = post["special_tokens"][name]["ids"]
        expect(o, f"post_processor, ids of {show(name)}", ids, [added_ids.get(name)])
        ends.append(added_ids[name])
    return ends


def read_pieces(model, vocab):
    """Returns {piece: id} and the scores."""
    o, pieces = "tokenizer.json", model["vocab"]
    for key in model:
        expect(o, "model key", key, "type", "unk_id", "vocab", "byte_fallback")
    expect(o, "model byte_fallback", model.get("byte_fallback"), None, False)
    if not 1 <= len(pieces) <= min(vocab, MAX_PIECES):
        refuse(o, "pieces", len(pieces), f"1 to {min(vocab, MAX_PIECES)}, as vocab_size is {vocab}")
    ids = {}
    for i, (text, _) in enumerate(pieces):
        n = len(text.encode())
        if not 1 <= n <= MAX_PIECE or text in ids:
            refuse(o, f"piece {i}, {show(text)}", f"{n} bytes" if text not in ids else "a repeated "
                   "one", f"one of its own, of up to {MAX_PIECE} bytes")
        ids[text] = i
    unknown = model["unk_id"]
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        refuse(o, "unk_id", show(unknown), f"an id below {len(pieces)}")
    return ids, [read_score(score, text) for text, score in pieces]


def read_unigram(j, vocab):
    """Returns the Tokenizer of an encoder. `truncation`, `padding` and `decoder` are ignored."""
    o, model, added = "tokenizer.json", j["model"], b""
    expect(o, "model type", model["type"], "Unigram")
    charsmap, spaces = read_spaces(j)
    ids, scores = read_pieces(model, vocab)
    added_ids = {t["content"]: ids.get(t["content"]) for t in j["added_tokens"]}
    for t in sorted(j["added_tokens"], key=lambda t: t["id"]):
        name = f"added token {show(t['content'])}"
        for flag in ("single_word", "rstrip", "normalized"):
            expect(o, f"{name} {flag}", t[flag], False)
        expect(o, f"{name} lstrip", t["lstrip"], False, True)
        expect(o, f"{name} id", t["id"], ids.get(t["content"], "that of a piece"))
        added += added_token(ids[t["content"]], t["content"].encode(), t["lstrip"])
    expect(o, "added tokens of the same text", len(j["added_tokens"]) - len(added_ids), 0)
    bos_id, eos_id = read_ends(j["post_processor"], added_ids)
    singles, pairs, replacements = charsmap_tables(read_charsmap(charsmap))
    if len(pairs) // 12 > MAX_PAIRS:
        refuse(o, "pairs of characters in precompiled_charsmap", len(pairs) // 12,
               f"at most {MAX_PAIRS}")
    texts = [text.encode() for text in ids]
    pieces = b"".join(texts)
    data = struct.pack("<8I", len(ids), model["unk_id"], spaces, len(singles) // 8,
                       len(pairs) // 12, len(pieces), len(replacements), 0)
    data += np.array(scores, "<f8").tobytes() + singles + pairs + bytes(map(len, texts))
    data += pieces + replacements
    strips = [t["content"] for t in j["added_tokens"] if t["lstrip"]]
    notes = [] if spaces else [
        "texts get the ids of tokenizer.json. XLMRobertaTokenizer of transformers 5 ignores its "
        "normalizer and pre_tokenizer: white space at an end of a text or beside a special token "
        "may give other ids there"]
    return Tokenizer(Section("unigram", U8, 1, len(data), data), f"{len(ids):,} pieces", added,
                     bos_id, eos_id, ids, added_ids, [], strips, ENCODER_TOKENIZERS, notes)


# ---- the tokenizer's other files ---------------------------------------------------------------

# Classes of transformers that take tokenizer.json as it is.
ANY_TOKENIZER = [None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"]
TOKENIZERS = [*ANY_TOKENIZER, "Qwen2Tokenizer", "Qwen2TokenizerFast"]
ENCODER_TOKENIZERS = [*ANY_TOKENIZER, "XLMRobertaTokenizer", "XLMRobertaTokenizerFast"]
SPECIAL_KEYS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
SPECIAL_LISTS = "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"


def read_special_tokens(j, o, tokenizer):
    """Refuses a special token that tokenizer.json does not have, since transformers would add it:
    a text that contains it would get other ids."""
    tokens = [j.get(key) for key in SPECIAL_KEYS]
    for key in SPECIAL_LISTS:
        more = j.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    for t in tokens:
        name = t["content"] if isinstance(t, dict) else t
        if name is not None and name not in tokenizer.added_ids:
            refuse(o, f"{show(name)} is no added token of tokenizer.json, and transformers adds it;"
                   f" {SAVE_TOKENIZER}")
        if isinstance(t, dict):
            expect(o, f"{show(name)} lstrip", t.get("lstrip", False), name in tokenizer.strips)


def read_added_tokens(j, tokenizer):
    """Refuses what transformers would add to tokenizer.json."""
    for token, i in j.items():
        expect(ADDED_TOKENS, f"id of {show(token)} in tokenizer.json; {SAVE_TOKENIZER}",
               tokenizer.added_ids.get(token), i)


SAVE_TOKENIZER = ("load it by transformers' AutoTokenizer.from_pretrained(DIRECTORY) and replace "
                  "the files by those of its save_pretrained(NEW)")


def read_tokenizer_config(j, tokenizer, given):
    """Refuses what transformers would do on top of tokenizer.json. given: --end-token. Returns the
    limit of a text in tokens, or None."""
    o, end = TOKENIZER_CONFIG, j.get("eos_token")
    for key in ("add_prefix_space", "add_bos_token", "split_special_tokens", "do_lower_case"):
        expect(o, key, j.get(key), None, False)
    expect(o, "tokenizer_class", j.get("tokenizer_class"), *tokenizer.classes)
    if j.get("auto_map"):
        refuse(o, "auto_map: a tokenizer with code of its own, which qemb does not have",
               show(j["auto_map"]), "none")
    for i, t in (j.get("added_tokens_decoder") or {}).items():  # goes before tokenizer.json's
        name = f"added_tokens_decoder: {show(t['content'])}"
        expect(o, f"{name} id in tokenizer.json", tokenizer.ids.get(t["content"]), int(i))
        for flag in ADDED_FLAGS:
            want = flag == "lstrip" and t["content"] in tokenizer.strips
            expect(o, f"{name} {flag}", t.get(flag, False), want)
        late = t["content"] in tokenizer.late
        expect(o, f"{name} normalized", t.get("normalized", not t.get("special")), late)
    expect(o, "truncation_side", j.get("truncation_side"), None, "right")
    read_special_tokens(j, o, tokenizer)
    end = end["content"] if isinstance(end, dict) else end
    added = j.get("add_eos_token") and not given
    if added and tokenizer.ids.get(end, NO_TOKEN) != tokenizer.eos_id:
        refuse(o, f"add_eos_token: {show(end)} is not what tokenizer.json appends; say what a text "
               "ends with by --end-token TOKEN, or none")
    return read_limit(o, j, "model_max_length")


def read_limit(o, j, key):
    """Returns the limit of a text in tokens, or None."""
    value = j.get(key)
    if value is not None and type(value) not in (int, float):
        refuse(o, key, show(value), "an integer")
    if type(value) is float and math.isfinite(value):
        if not value.is_integer():
            refuse(o, key, show(value), "an integer")
        return int(value)
    return value


def end_token(given, ids):
    """Returns the id of the token that --end-token names."""
    if given == "none":
        return NO_TOKEN
    if given not in ids:
        refuse("--end-token", f"{show(given)} is no token of this model")
    return ids[given]


# ---- what sentence-transformers adds -----------------------------------------------------------


QUANTIZER = "st_quantize.FlexibleQuantizer"  # code of perplexity's checkpoints: identity_dense


def read_modules(j, architecture):
    """Returns {module: the folder of its files}, in order, without Dropout, which only training
    has."""
    o, modules = "modules.json", list({m["name"]: m for m in j}.values())  # the last of a name
    kinds = [m["type"].rsplit(".")[-1] for m in modules]
    bare = [kind for kind in kinds if kind != "Dropout"]
    if not re.fullmatch("Transformer( Pooling( Dense)?( Normalize)?| Pooling FlexibleQuantizer"
                        "| LogitScore)?", " ".join(bare)):
        refuse(o, "modules", show(kinds), "Transformer, Pooling, Dense or not, "
               "Normalize or not; or Transformer, LogitScore; Dropout anywhere")
    own = [m["type"] for m in modules if not m["type"].startswith("sentence_transformers.")]
    if own != [QUANTIZER] * (architecture == PPLX and "FlexibleQuantizer" in kinds):
        refuse(o, "modules with code of their own, which qemb does not have",
               show(own), "types of sentence_transformers")
    for i, (kind, m) in enumerate(zip(kinds, modules)):
        expect(o, f"kwargs of {kind}", m.get("kwargs"), None, [])
        if kind in ("Transformer", "Pooling", "Dense", "LogitScore"):
            expect(o, f"path of {kind}", m["path"], f"{i}_{kind}" if i else "")
    return {kind: m["path"] for kind, m in zip(kinds, modules) if kind != "Dropout"}


# What a model's loading may be told without another result, but for rounding.
LOADING = {"attn_implementation", "torch_dtype", "dtype", "device_map", "low_cpu_mem_usage",
           "padding_side", "trust_remote_code", "use_cache"}


def read_bert(j, kind):
    """Returns the limit of a text in tokens, or None."""
    for key in ("do_lower_case", "mask_prompt"):
        expect(BERT, key, j.get(key), None, False)
    for key in ("query_length", "document_length", "query_expansion", "tokenizer_name_or_path"):
        expect(BERT, key, j.get(key), None)
    for key in [f"{what}_{end}" for what in ("model", "config", "tokenizer", "processor")
                for end in ("args", "kwargs")]:
        for name, value in (j.get(key) or {}).items():
            if name not in LOADING:
                refuse(BERT, f"{key}.{name}", show(value), "no such key")
    expect(BERT, "processing_kwargs", j.get("processing_kwargs"), None, {})
    if kind == "embedding":
        expect(BERT, "transformer_task", j.get("transformer_task"), None, "feature-extraction")
        expect(BERT, "modality_config; with message, texts go through the chat template",
               j.get("modality_config"), None,
               {"text": {"method": "forward", "method_output_name": "last_hidden_state"}})
        expect(BERT, "module_output_name", j.get("module_output_name"), None, "token_embeddings")
    return read_limit(BERT, j, "max_seq_length")


def read_pooling(j, encoder):
    """Returns one of POOLINGS."""
    # One flag per pooling mode or, in newer files, the mode's name, or a list of names.
    kinds = [k.removeprefix("pooling_mode_").removesuffix("_tokens") for k, on in j.items()
             if k.startswith("pooling_mode_") and on]
    kinds = ["cls" if kind == "cls_token" else kind for kind in kinds]
    mode = j.get("pooling_mode") or []
    mode = [mode] if isinstance(mode, str) else mode
    kinds = sorted([*mode, *({*kinds} - {*mode})])
    expect(POOLING, "pooling", kinds, ["cls"] if encoder else ["lasttoken"], ["mean"],
           hint="if it is wrong, say what is pooled by --pooling "
           f"{'first' if encoder else 'last'} or mean")
    if kinds != ["lasttoken"]:  # the last token is never the prompt's
        expect(POOLING, "include_prompt", j.get("include_prompt", True), True)
    return {"lasttoken": "last", "mean": "mean", "cls": "first"}[kinds[0]]


def read_dense(j, o, hidden):
    """Returns the rows of the dense layer, whether it has a bias, its activation. o: the file."""
    rows = j["out_features"]
    expect(o, "in_features", j["in_features"], hidden)
    if type(rows) is not int or not 1 <= rows <= MAX_ROWS:
        refuse(o, "out_features", show(rows), f"an integer from 1 to {MAX_ROWS}")
    expect(o, "bias", j.get("bias", True), True, False)
    expect(o, "use_residual", j.get("use_residual"), None, False)
    for key in ("module_input_name", "module_output_name"):
        expect(o, key, j.get(key), None, "sentence_embedding")
    names = {"torch.nn.modules.linear.Identity": "identity",
             "torch.nn.modules.activation.Tanh": "tanh"}
    kind = j.get("activation_function", list(names)[1])
    expect(o, "activation_function", kind, *names)
    return rows, j.get("bias", True), names[kind]


def read_logit_score(j, ids):
    for key, word in (("true_token_id", "yes"), ("false_token_id", "no")):
        expect(LOGIT_SCORE, f"{key}, of {show(word)}", j.get(key), ids.get(word))


def read_chat_template(j):
    """Returns the template in tokenizer_config.json that transformers takes by default, or None."""
    template = j.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}
    return template.get("default") if isinstance(template, dict) else template


# A message of a pair in a template, without its spaces; the group is its role.
MESSAGE = (r'messages\|selectattr\("role","eq","(\w+)"\)\|map\(attribute="content"\)\|first'
           r'|\(messages\|selectattr\("role","eq","(\w+)"\)\|first\)\.content(?:\[0\]\.text)?')


def read_template(o, text):
    """Returns the task that a chat template gives a pair without one, or None if the template is
    not for pairs. sentence-transformers makes a pair's prompt with it. Nothing here can run it, so
    its text must be that of Qwen3-Reranker's, which may name the messages first."""
    values, tasks = {}, []
    text = text.replace("\r\n", "\n")
    if re.search(r"\bfor \w+ in messages", text) and not re.search(
            """["'](query|document)["']""", text):
        return None  # of a conversation: the general one of Qwen3
    while m := re.match(r"\s*\{%- *set (\w+) = ([^{}%]*) -%\}\s*", text):
        values[m[1]], text = m[2], text[m.end():]

    def role(m):
        value = values.get(m[1], m[1])
        default = re.fullmatch(r"""(.*)\| *default\((["'])([^"'\\]*)\2\) *""", value, re.S)
        found = re.fullmatch(MESSAGE, re.sub(r"\s", "", default[1] if default else value).replace(
            "'", '"'))
        if not found:
            return m[0]
        if "system" in found.groups():
            tasks.append(default[3] if default else "")
        return f"{{{{ {found[1] or found[2]}'s text }}}}"  # which no template can contain

    pair = "\n".join(f"<{tag}>: {{{{ {name}'s text }}}}" for tag, name in (
        ("Instruct", "system"), ("Query", "query"), ("Document", "document")))
    # Jinja leaves out the last line break.
    expect(o, "chat template", re.sub(r"\{\{ ([^{}]*?) \}\}", role, text),
           RERANKER["prefix"] + pair + RERANKER["suffix"] + "\n",
           hint="it is not Qwen3-Reranker's, the only one for pairs that qemb has")
    return tasks[0]


def read_prompts(j, kind, given, notes, known=None, task=RERANKER["instruct"]):
    """Returns the section prompts and the names. given: those of --prompt. known: the model of
    KNOWN_PROMPTS whose prompts a source without any gets; adds a note. A reranker has the three of
    its model card; a CrossEncoder's prompt is the task, if it has one, else `task` is."""
    prompts, default = dict(j.get("prompts") or {}), j.get("default_prompt_name")
    for name, text in prompts.items():
        prompts[name] = text = "" if text is None else text  # sentence-transformers puts none then
        if not isinstance(text, str):
            refuse(PROMPTS, f"prompt {show(name)}", show(text), "a text")
    if default is not None and default not in prompts:
        refuse(PROMPTS, "default_prompt_name", show(default), "the name of a prompt, or null")
    if kind == "reranker":
        expect(PROMPTS, "model_type", j.get("model_type"), None, "CrossEncoder")
        prompts = RERANKER | {"instruct": default is not None and prompts[default] or task}
    else:
        if prompts.get(default) != "":  # a prompt that changes no text may be the default
            expect(PROMPTS, "default_prompt_name", default, None, hint="copy the source and remove "
                   f"it, and choose the prompt by qemb --prompt {default}")
        dim = j.get("truncate_dim")
        expect(PROMPTS, "truncate_dim", dim, None, hint="copy the source and remove it, and cut "
               f"the vectors by qemb --dim {dim}")
        expect(PROMPTS, "suffix", j.get("suffix"), None)
        expect(PROMPTS, "model_type", j.get("model_type"), None, "SentenceTransformer")
        if known and not prompts:
            prompts = dict(KNOWN_PROMPTS[known])
            own = " and ".join(name for name in prompts if name not in given)
            if own:
                notes.append(f"the source has no prompts; {own} as in {known}")
    others = [name for name in given if name != "instruct"]
    if kind == "reranker" and others:
        refuse("--prompt", "of a reranker it can only give the task", " and ".join(
            map(show, others)), show("instruct"))
    prompts |= given
    if kind == "embedding" and "passage" in prompts and "document" not in prompts:
        prompts["document"] = prompts["passage"]
        notes.append("document is another name of the prompt passage: --document uses it")
    if kind == "embedding" and prompts.get("document"):
        notes.append("documents have a prompt here, which only --document puts before them")
    if len(prompts) > MAX_PROMPTS or any(not k or "\0" in k + v for k, v in prompts.items()):
        refuse(PROMPTS, "prompts", show(prompts), f"at most {MAX_PROMPTS}, with names, without NUL "
               "characters")
    return "".join(f"{k}\0{v}\0" for k, v in prompts.items()).encode(), list(prompts)


# ---- weights of a checkpoint -------------------------------------------------------------------

Tensor = namedtuple("Tensor", "name path dtype shape offset")  # offset in bytes, in the file
SOURCE_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
# 32 numbers of a GGUF file are q * scale
Q8_0 = np.dtype([("scale", "<f2"), ("q", "i1", 32)])


# Tensors of an encoder that no vector depends on; the last is a buffer of older transformers.
LEFT_OUT = "pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"


def read_index(j, o):
    """Returns {tensor: shard}."""
    index = dict(j["weight_map"].items())
    for shard in index.values():
        if not shard or os.path.basename(shard) != shard:
            refuse(o, "shard", show(shard), "the name of a file beside the index")
    return index


def open_safetensors(path, name):
    """Returns {name: Tensor} of a file, whose name in messages is `name`. The package checks the
    header."""
    regular_size(path, name)
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as e:
        refuse(name, f"damaged, or not safetensors: {e}")
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
    header.pop("__metadata__", None)
    return {key: Tensor(key, path, t["dtype"], tuple(t["shape"]), 8 + n + t["data_offsets"][0])
            for key, t in header.items()}


def open_tensors(folder, architecture, notes):
    """Returns {name without the model's: Tensor} and the shards. Adds a note for LEFT_OUT."""
    one, index_file, read = SINGLE, INDEX, open_safetensors
    if not any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        one, index_file, read = PICKLE, PICKLE_INDEX, open_pickle
    index = {}
    if not os.path.lexists(folder / one):
        if not os.path.lexists(folder / index_file):
            refuse(folder, "no weights", None, f"{SINGLE}, {INDEX}, {PICKLE} or {PICKLE_INDEX}")
        index = parse(folder, index_file, read_index, index_file)
    prefix = {"XLMRobertaModel": "roberta.", "BertModel": "bert."}.get(architecture, "model.")
    tensors, shards = {}, sorted(set(index.values())) or [one]
    for shard in shards:
        if not os.path.lexists(folder / shard):
            refuse(index_file, f"shard {shard}: no such file in the source")
        for name, t in read(folder / shard, shard).items():
            key = name.removeprefix(prefix)
            if key in tensors:
                refuse(name, "there twice", f"{tensors[key].path.name} and {shard}", "one")
            if index and index.get(name) != shard:
                refuse(name, "not where the index says", shard, index.get(name, "not listed"))
            tensors[key] = t
    for name, shard in index.items():
        if name.removeprefix(prefix) not in tensors:
            refuse(name, f"the index names it, {shard} lacks it")
    left = [name for name in LEFT_OUT if architecture in ENCODERS and tensors.pop(name, None)]
    if left:
        notes.append(f"{', '.join(left)} left out: vectors do not use them")
    for t in tensors.values():
        check_dtype(t)
    return tensors, shards


def check_dtype(t):
    if t.dtype not in SOURCE_DTYPES:
        refuse(t.name, "dtype", t.dtype, ", ".join(SOURCE_DTYPES))


def read_rows(t, row, n, cols):
    """Returns rows row..row+n-1 of tensor t as float32 (n, cols)."""
    dtype, each = (Q8_0, 32) if t.dtype == "Q8_0" else (np.dtype(SOURCE_DTYPES[t.dtype]), 1)
    with open(t.path, "rb", buffering=0) as f:
        f.seek(t.offset + row * cols // each * dtype.itemsize)
        w = np.fromfile(f, dtype, n * cols // each)
    if w.size * each != n * cols:
        refuse(t.path.name, "shrank while it was read", f"{w.size * each} numbers", n * cols)
    if t.dtype == "BF16":  # the upper half of a float32
        w = (w.astype("<u4") << 16).view("<f4")
    if t.dtype == "Q8_0":
        w = w["q"] * w["scale"].astype("<f4")[:, None]
    return w.astype("<f4", copy=False).reshape(n, cols)


def read_blocks(t, rows, cols, block):
    """Yields (row, w), where w (n, cols) are the rows of tensor t from `row` on as float32: all of
    them in blocks of about `block` numbers."""
    step = max(1, block // cols)
    for row in range(0, rows, step):
        yield row, read_rows(t, row, min(step, rows - row), cols)


# ---- pytorch_model.bin -------------------------------------------------------------------------

# What torch.save writes: a zip of stored members. DIRECTORY/data.pkl is a pickle of {name: tensor}
# that refers to the numbers in DIRECTORY/data/KEY. A pickle is a program, and Python's unpickler
# calls whatever it names. read_pickle calls nothing: it knows the opcodes that torch.save writes,
# and makes a dictionary or a Tensor where the three names below would be called.
StorageType = namedtuple("StorageType", "dtype itemsize")
ORDERED_DICT, REBUILD = object(), object()
NAMES = {"collections OrderedDict": ORDERED_DICT, "torch._utils _rebuild_tensor_v2": REBUILD,
         "torch FloatStorage": StorageType("F32", 4), "torch HalfStorage": StorageType("F16", 2),
         "torch BFloat16Storage": StorageType("BF16", 2),
         "torch LongStorage": StorageType("I64", 8)}
CONSTANTS = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "NEWTRUE": lambda: True,
             "NEWFALSE": lambda: False, "NONE": lambda: None}
MAX_PICKLE = 1 << 20  # bytes of data.pkl; a tensor takes about 150
MAX_DIRECTORY = 1 << 23  # bytes that zipfile may read at once: the list of members
SAFE = "in transformers, model.save_pretrained(NEW, safe_serialization=True)"
Storage = namedtuple("Storage", "dtype itemsize offset count")  # numbers of a member, in the file


class SmallReads(io.FileIO):
    """A file of which nobody reads much at once."""

    def read(self, n=-1):
        if n > MAX_DIRECTORY:
            raise ValueError(f"a list of members of {n} bytes, want at most {MAX_DIRECTORY}")
        return super().read(n)


def read_pickle(data, name, path, members):
    """Returns the value of a data.pkl. members: {key: (place, bytes)}. Values may be nested so deep
    that hashing, comparing or printing one would overflow the C stack: only texts and numbers
    are."""
    stack, marks, memo = [], [], {}

    def pop(n=None):
        """The last n values, or those behind the last mark."""
        start = marks.pop() if n is None else len(stack) - n
        if start < 0:
            raise IndexError("an empty stack")
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, value, _ in pickletools.genops(data):
        op = opcode.name
        if op == "MARK":
            marks.append(len(stack))
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op]())
        elif op in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(value)
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif op == "GLOBAL":
            if value not in NAMES:
                refuse(name, f"its pickle names {value.replace(' ', '.')}, which weights do not "
                       "need and which could be code; it was not called")
            stack.append(NAMES[value])
        elif op in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(None if op == "TUPLE" else int(op[-1]))))
        elif op == "BINPERSID":
            stack.append(read_storage(name, members, *pop(1)))
        elif op == "REDUCE":
            function, args = pop(2)
            if type(args) is not tuple or function is ORDERED_DICT and args or (
                    function is not ORDERED_DICT and function is not REBUILD):
                raise TypeError("a call of an unknown form")
            stack.append({} if function is ORDERED_DICT else make_tensor(name, path, *args))
        elif op in ("SETITEM", "SETITEMS", "BUILD"):  # a state is _metadata, which is not used
            items = pop(1) * 2 if op == "BUILD" else pop(2 if op == "SETITEM" else None)
            if type(stack[-1]) is not dict or len(items) % 2:
                raise TypeError("items of something else than a dictionary")
            for key, item in zip(items[::2], items[1::2]) if op != "BUILD" else ():
                if type(key) is not str:
                    raise TypeError("a key that is no text")
                stack[-1][key] = item
        elif op not in ("PROTO", "STOP"):
            refuse(name, f"its pickle has the opcode {op}, which weights do not need and which "
                   "could run code; it was not run")
    return stack.pop()


def read_storage(name, members, pid):
    """pid: a pickle's ("storage", type, key, device, numbers)."""
    tag, kind, key, _, count = pid
    if type(kind) is not StorageType or type(key) is not str or type(count) is not int or (
            type(tag) is not str or tag != "storage"):
        raise TypeError("a storage of an unknown form")
    if key not in members:
        refuse(name, f"storage {show(key)}: no such member")
    offset, size = members[key]
    if count < 0 or count * kind.itemsize != size:
        refuse(name, f"storage {show(key)}, bytes", size, count * kind.itemsize)
    return Storage(*kind, offset, count)


def make_tensor(name, path, storage, first, shape, strides, grad, hooks, metadata=None):
    """In the place of torch._utils._rebuild_tensor_v2."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError("a tensor without storage or shape")
    if len(shape) > 8 or len(shape) != len(strides) or (
            metadata is not None and (type(metadata) is not dict or metadata)):
        raise ValueError("a tensor of an unknown form")
    if any(type(n) is not int or n < 0 for n in (first, *shape, *strides)):
        raise ValueError("a tensor with a size that is no number")
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides)):
        if n > 1 and stride != step:
            refuse(name, "strides of a tensor; save it contiguous", list(strides),
                   f"those of the shape {list(shape)}")
        step *= n
    if first + step > storage.count:
        refuse(name, "numbers of a tensor's storage", storage.count, first + step)
    return Tensor("", path, storage.dtype, shape, storage.offset + first * storage.itemsize)


def zip_members(archive, file, name):
    """Returns {member's name: (place of its bytes in the file, bytes)}."""
    members, end = {}, 0
    for m in sorted(archive.infolist(), key=lambda m: m.header_offset):
        what = f"member {show(m.filename)}"
        if m.filename in members:
            refuse(name, f"{what}: there twice")
        if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 or (
                m.compress_size != m.file_size):
            refuse(name, f"{what}: compressed or encrypted, which torch.save does not write")
        head = b""
        if m.header_offset >= end:  # it may be negative
            file.seek(m.header_offset)
            head = file.read(30)
        if head[:4] != b"PK\3\4" or len(head) < 30:
            refuse(name, f"{what}: not where the list of members says, or within another one")
        start = m.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        end = start + m.file_size
        members[m.filename] = start, m.file_size
    if end > regular_size(file.name, name):
        refuse(name, "bytes", regular_size(file.name, name), f"{end} and more")
    return members


def open_pickle(path, name):
    """Returns {name: Tensor} of a file of torch.save."""
    regular_size(path, name)
    with SmallReads(path) as file:
        if file.read(4) != b"PK\3\4":
            refuse(name, "not a zip; torch.save before version 1.6 wrote another form, and a file "
                   "of Git LFS has to be downloaded: load it and save it anew, best as "
                   f"safetensors: {SAFE}")
        try:
            members = zip_members(zipfile.ZipFile(file), file, name)
            return read_members(members, file, path, name)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, KeyError,
                TypeError, AttributeError, IndexError, ValueError, OverflowError) as e:
            what = " ".join(str(e).split())[:120]
            refuse(name, f"damaged, or not of torch.save ({type(e).__name__}: {what})")


def read_members(members, file, path, name):
    def read(member, limit):
        start, size = members[member]
        if size > limit:
            refuse(name, f"bytes of {member}", size, f"at most {limit}")
        file.seek(start)
        return file.read(size)

    pickles = [member for member in members if member.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        refuse(name, "members DIRECTORY/data.pkl", len(pickles), "one, as torch.save writes")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in members:
        expect(name, "byteorder", read(folder + "byteorder", 64).decode(), "little")
    storages = {member.removeprefix(folder + "data/"): place for member, place in members.items()
                if member.startswith(folder + "data/")}
    found = read_pickle(read(pickles[0], MAX_PICKLE), name, path, storages)
    if type(found) is not dict or any(type(t) is not Tensor for t in found.values()):
        refuse(name, "its pickle is no dictionary of names and tensors")
    return {key: t._replace(name=key) for key, t in found.items()}


# ---- GGUF --------------------------------------------------------------------------------------

# Its names and Hugging Face's. llama.cpp's converter permutes no rows of this architecture.
GGUF_TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
                "cls.output": "score"}
GGUF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
GGUF_CONFIG = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads", "attention.key_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.causal": "is_causal"}
GGUF_OTHER = ["attention.value_length", "rope.dimension_count", "rope.scaling.type", "vocab_size",
              "pooling_type", "classifier.output_labels"]
# pooling_type -> kind, pooling. llama.cpp writes 4 for rerankers, and none for what it cannot tell.
GGUF_POOLING = {1: ("embedding", "mean"), 3: ("embedding", "last"), 4: ("reranker", "last"),
                None: (None, "last"), 0: (None, "last")}
END_HINT = ("; say what a text ends with by --end-token TOKEN, or none: "
            "--end-token '<|endoftext|>' for Qwen3-Embedding")


def open_gguf(path):
    """Returns {key: value} and {Hugging Face's name without 'model.': Tensor}. The package reads
    the keys and checks where tensors lie; read_rows reads them."""
    import gguf  # slow to load

    try:
        reader = gguf.GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        found = [Tensor(t.name, path, t.tensor_type.name, tuple(map(int, reversed(t.shape))),
                        int(t.data_offset)) for t in reader.tensors]
    except Exception as e:  # of any type, when a file is damaged
        what = " ".join(str(e).split())[:120]
        refuse(path.name, f"damaged, or not GGUF ({type(e).__name__}: {what})")
    if meta.get("split.count", 1) != 1:
        refuse(path.name, "a part of a model; join the parts: llama-gguf-split --merge")
    expect(path.name, "byte order", reader.byte_order, "I")
    tensors = {}
    for t in found:
        if t.dtype not in [*SOURCE_DTYPES, "Q8_0"]:
            refuse(t.name, "type, whose loss of accuracy nobody has measured here; convert the "
                   "original or a file of more bits", t.dtype, ", ".join([*SOURCE_DTYPES, "Q8_0"]))
        base, _, end = t.name.rpartition(".")
        blk, layer, part = (base.split(".", 2) + ["", ""])[:3]
        if blk == "blk" and part in GGUF_LAYER:
            base = f"layers.{layer}.{GGUF_LAYER[part]}"
        tensors[f"{GGUF_TENSORS.get(base, base)}.{end}"] = t
    return meta, tensors


def gguf_config(meta, o, rows):
    """Returns what config.json would say. rows: of the embedding table."""
    expect(o, "general.architecture", meta.get("general.architecture"), "qwen3")
    own = {k.removeprefix("qwen3."): v for k, v in meta.items() if k.startswith("qwen3.")}
    for key in own:
        if key not in [*GGUF_CONFIG, *GGUF_OTHER]:
            refuse(o, f"qwen3.{key}", show(own[key]), "no such key")
    expect(o, "qwen3.rope.scaling.type", own.get("rope.scaling.type"), None, "none",
           hint=f"{SCALING_HINT} convert the original without it")
    for key in ("attention.value_length", "rope.dimension_count"):
        expect(o, f"qwen3.{key}", own.get(key), None, own["attention.key_length"])
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu",
            "head_dim": None, "vocab_size": rows} | {
                GGUF_CONFIG[k]: v for k, v in own.items() if k in GGUF_CONFIG}


def gguf_tokenizer(meta, o):
    """Returns what tokenizer.json would say, without an end token."""
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items()}
    no = [None, False]
    for key, want in (("model", ["gpt2"]), ("pre", ["qwen2"]), ("add_bos_token", no),
                      ("add_sep_token", no), ("add_space_prefix", no)):
        expect(o, f"tokenizer.ggml.{key}", ggml.get(key), *want)
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    expect(o, "numbers of tokens and types", len(kinds), len(tokens))
    for token, kind in zip(tokens, kinds):  # normal, control, user-defined, unused
        expect(o, f"type of the token {show(token)}", kind, 1, 3, 4, 5)
    flags = dict.fromkeys([*ADDED_FLAGS, "normalized"], False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {"model": {"type": "BPE", "merges": ggml["merges"], "vocab": {
                token: i for i, token in enumerate(tokens) if kinds[i] == 1}},
            "added_tokens": [{"id": i, "content": token} | flags
                             for i, token in enumerate(tokens) if kinds[i] in (3, 4)],
            "normalizer": {"type": "NFC"}, "post_processor": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}


def is_qwen3_embedding(name):
    return bool(re.search("qwen3[-_ ]?embedding", name.lower()))


def gguf_end(meta, o, name):
    """Returns the token appended to every text of an embedding. Files made before llama.cpp read
    the post-processor (2025-06) say nothing of it and have another eos_token_id, <|im_end|>."""
    key = "tokenizer.ggml."
    expect(o, f"{key}add_eos_token{END_HINT}", meta.get(key + "add_eos_token"), True)
    token = meta[key + "tokens"][meta[key + "eos_token_id"]]
    if is_qwen3_embedding(name) and token != "<|endoftext|>":
        refuse(o, f"{key}eos_token_id{END_HINT}", show(token), show("<|endoftext|>"))
    return token


def gguf_task(template, o):
    """Returns the task of a reranker's template, which must be the model card's."""
    if template is None:
        return RERANKER["instruct"]
    found = re.search("<Instruct>: (.*)", template)
    task = found[1] if found else RERANKER["instruct"]
    middle = f"<Instruct>: {task}\n<Query>: {{query}}\n<Document>: {{document}}"
    expect(o, "tokenizer.chat_template.rerank", template,
           RERANKER["prefix"] + middle + RERANKER["suffix"],
           hint="it is not Qwen3-Reranker's, the only one that qemb has")
    return task


def gguf_labels(meta, s, o):
    """Returns {row: label} of cls.output: by the rows of the embedding table if it has two of them,
    since files with swapped labels were reported, else by the labels."""
    def close(a, b):  # Q8_0 rounds by 1/254 of a block's largest number at most
        return np.abs(a - b).max() <= np.abs(b).max() / 128

    cols, table, ids = s.config.hidden, s.tensors["embed_tokens.weight"], s.tokenizer.ids
    two = read_rows(s.tensors["score.weight"], 0, 2, cols)
    yes, no = (read_rows(table, ids[word], 1, cols)[0] for word in ("yes", "no"))
    if close(two[0], yes) and close(two[1], no):
        return {"0": "yes", "1": "no"}
    if close(two[0], no) and close(two[1], yes):
        return {"0": "no", "1": "yes"}
    labels = meta.get("qwen3.classifier.output_labels")
    expect(o, "qwen3.classifier.output_labels", labels, ["yes", "no"], ["no", "yes"])
    return dict(enumerate(labels))


# ---- dtypes of a .qemb -------------------------------------------------------------------------


class Rounding:
    """The rounding error of the matrices written."""

    worst, where, tiny = 0.0, "", 0  # tiny: rounded numbers below FP16's normal range

    def __init__(self):
        self.scales = []  # scales of the last INT8 matrix, until their section is written

    def note(self, error, t, row):
        r, col = divmod(int(error.argmax()), error.shape[1])
        if error[r, col] > self.worst:
            self.worst, self.where = float(error[r, col]), f" at {t.name}[{row + r}, {col}]"


def check_range(w, limit, t, row):
    """Refuses w (n, cols) at its first number that is NaN or beyond +-limit."""
    if not np.abs(w).max() <= limit:
        r, col = np.argwhere(~(np.abs(w) <= limit))[0]
        at = f"{row + r}, {col}" if len(t.shape) == 2 else col
        refuse(f"{t.name}[{at}]", "number", f"{w[r, col]:g}", f"a finite one up to {limit:g}")


def encode_f32(w, t, row, rounding):
    check_range(w, np.finfo("f4").max, t, row)
    return w.tobytes()


def encode_f16(w, t, row, rounding):
    check_range(w, 65504, t, row)
    h = w.astype("<f2")
    error = np.abs(h.astype("<f4") - w)
    rounding.note(error, t, row)
    rounding.tiny += int(np.count_nonzero(error[np.abs(w) < 2.0**-14]))
    return h.tobytes()


def encode_i8(w, t, row, rounding):
    """Quantizes groups of numbers to INT8. The largest magnitude of a group becomes 127, so the
    error is at most half a step. It starts from the numbers of an F16 file and uses the operations
    of pack_int8_f16 in backends/cpu/avx512.c, so tables for int8 give both files the same
    bits."""
    check_range(w, 65504, t, row)
    n, cols = w.shape
    groups = -(-cols // GROUP)
    h = np.zeros((n, groups * GROUP), "<f4")  # padded with zeros
    h[:, :cols] = w.astype("<f2")
    h = h.reshape(n, groups, GROUP)
    largest = np.abs(h).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    scale = largest / np.float32(127)
    h *= inverse
    q = np.rint(h, out=h).astype("i1")
    error = np.multiply(q, scale, out=h).reshape(n, -1)[:, :cols] - w
    rounding.note(np.abs(error, out=error), t, row)
    rounding.scales.append(scale.tobytes())
    return q.reshape(n, -1)[:, :cols].tobytes()


# code: the dtype's number in the file. row_bytes(n): bytes of a row of n numbers. encode: rows
# (n, cols) float32, from row `row` of tensor t on -> bytes
Dtype = namedtuple("Dtype", "code row_bytes encode")
U8, U32 = Dtype(0, lambda cols: cols, None), Dtype(1, lambda cols: 4 * cols, None)
F32 = Dtype(2, lambda cols: 4 * cols, encode_f32)
F16 = Dtype(3, lambda cols: 2 * cols, encode_f16)
MATRIX_DTYPES = {"f16": F16, "int8": Dtype(4, lambda cols: cols, encode_i8)}


def has_8_bits(t, rows, cols):
    """Whether every number of tensor t has at most 8 significant bits in FP16. Rounding to FP16 can
    only remove bits, so BF16 need not be read. A tensor is read up to the first block with more."""
    if t.dtype == "BF16":
        return True
    for _, w in read_blocks(t, rows, cols, BITS_BLOCK):
        with np.errstate(over="ignore"):  # encode_f16 refuses what is too large
            bits = w.astype("<f2").astype("<f4").view("<u4")
        if np.bitwise_or.reduce(bits, axis=None) & 0xFFFF:  # the upper half holds 8 bits
            return False
    return True


# ---- the .qemb file ----------------------------------------------------------------------------

# data: bytes; or [(name, rows)], the source tensors that are concatenated; or [] for the scales of
# the previous matrix. bits: significant bits of an F16 section's numbers, 8 or 11; else 0. plus:
# the tensor whose first row is added to all rows, or None
Section = namedtuple("Section", "name dtype rows cols data bits plus", defaults=[0, None])


def matrix_sections(name, dtype, cols, parts):
    rows = sum(rows for _, rows in parts)
    yield Section(name, dtype, rows, cols, parts)
    if dtype is not F16:
        yield Section(name + ".scale", F32, rows, -(-cols // GROUP), ())


def vector_section(name, n, *sources):
    """sources: tensors of n numbers, which are concatenated."""
    return Section(name, F32, 1, n * len(sources), [(source, 1) for source in sources])


def weight_sections(c, places, matrix):
    """Returns the sections of all weights in the order of the file. c: the Config. places: of an
    encoder, or None. `matrix` is the dtype of the layer matrices."""
    return encoder_sections(c, places, matrix) if places else qwen3_sections(c, matrix)


def qwen3_sections(c, matrix):
    vec = vector_section
    D, F, hd, Q, KV = c.hidden, c.ffn, c.head_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def mat(name, cols, *parts):
        return matrix_sections(name, matrix, cols, parts)

    yield Section("tok_emb", F16, c.vocab, D, [("embed_tokens.weight", c.vocab)])
    for i in range(c.n_layers):
        p, attn, mlp = f"layers.{i}.", f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        yield vec(p + "attn_norm", D, p + "input_layernorm.weight")
        yield from mat(p + "wqkv", D, (attn + "q_proj.weight", Q), (attn + "k_proj.weight", KV),
                       (attn + "v_proj.weight", KV))
        yield vec(p + "q_norm", hd, attn + "q_norm.weight")
        yield vec(p + "k_norm", hd, attn + "k_norm.weight")
        yield from mat(p + "wo", Q, (attn + "o_proj.weight", D))
        yield vec(p + "mlp_norm", D, p + "post_attention_layernorm.weight")
        yield from mat(p + "wgu", D, (mlp + "gate_proj.weight", F), (mlp + "up_proj.weight", F))
        yield from mat(p + "wdown", F, (mlp + "down_proj.weight", D))
    yield vec("final_norm", D, "norm.weight")


EMBEDDINGS = "embeddings."
TYPES = EMBEDDINGS + "token_type_embeddings.weight"


def encoder_sections(c, places, matrix):
    D, F, rows = c.hidden, c.ffn, places.first + c.max_positions

    def linear(w, b, cols, n, *sources):
        """Matrices of n rows one below the other, and their biases."""
        parts = [(source + ".weight", n) for source in sources]
        yield from matrix_sections(w, matrix, cols, parts)
        yield vector_section(b, n, *(source + ".bias" for source in sources))

    def norm(name, source):
        yield vector_section(name, D, source + ".LayerNorm.weight")
        yield vector_section(name + "_bias", D, source + ".LayerNorm.bias")

    yield Section("tok_emb", F16, c.vocab, D, [(EMBEDDINGS + "word_embeddings.weight", c.vocab)])
    yield Section("pos_emb", F32, rows, D, [(EMBEDDINGS + "position_embeddings.weight", rows)], 0,
                  TYPES)
    yield from norm("emb_norm", EMBEDDINGS[:-1])
    for i in range(c.n_layers):
        p, q = f"layers.{i}.", f"encoder.layer.{i}."
        attn = q + "attention."
        yield from linear(p + "wqkv", p + "bqkv", D, D, *(
            f"{attn}self.{name}" for name in ("query", "key", "value")))
        yield from linear(p + "wo", p + "bo", D, D, attn + "output.dense")
        yield from norm(p + "attn_norm", attn + "output")
        yield from linear(p + "wup", p + "bup", D, F, q + "intermediate.dense")
        yield from linear(p + "wdown", p + "bdown", F, D, q + "output.dense")
        yield from norm(p + "mlp_norm", q + "output")


def source_shape(w, rows):
    """The shape of a tensor that has `rows` rows of the section w."""
    return (rows, w.cols) if w.dtype is F16 or w.plus else (w.cols // len(w.data),)


def check_tensors(s):
    """Checks that the source has exactly the tensors of the sections and those that make its dense
    layer. Returns the latter: {name: shape}. Adds notes."""
    tensors, more = s.tensors, {}
    if s.kind == "reranker":
        more = logit_tensors(s)
    elif s.claims.linear:
        more = {"linear.weight": (s.claims.linear, s.config.hidden)}
    if s.claims.places:
        more = {TYPES: (s.claims.places.types, s.config.hidden)}
    want = {name: source_shape(w, rows)
            for w in weight_sections(s.config, s.claims.places, F16)
            for name, rows in w.data} | more
    missing, extra = [n for n in want if n not in tensors], [n for n in tensors if n not in want]
    if "lm_head.weight" in extra and s.kind == "embedding":  # saved by an untied Qwen3ForCausalLM
        extra.remove("lm_head.weight")
        s.notes.append("lm_head.weight left out: embeddings do not use it")
    if missing:
        like = [t.name for t in tensors.values() if t.name.endswith("." + missing[0])]
        if not like and len(missing) == len(want):
            like = [t.name for t in tensors.values()]
        refuse(missing[0], "missing tensor" + (f"; the source has {like[0]}" if like else ""),
               f"{len(missing)} missing", "none")
    if extra:
        refuse(tensors[extra[0]].name, "no tensor of this model", f"{len(extra)} extra", "none")
    for name, shape in want.items():
        if tensors[name].shape != shape:
            refuse(tensors[name].name, "shape", list(tensors[name].shape), list(shape))
    return {} if s.claims.places else more


# ---- the dense layer ---------------------------------------------------------------------------


def dense_sections(weight, rows, cols, bias=None):
    """weight, bias: as Section.data, or None for zeros."""
    return [Section("dense", F32, rows, cols, weight),
            Section("dense_bias", F32, 1, rows, bytes(4 * rows) if bias is None else bias)]


def open_dense(folder, path, hidden, tensors):
    """Returns the sections of sentence-transformers' module Dense in the folder `path`, and its
    activation. Adds its tensors."""
    o, file, read = f"{path}/config.json", f"{path}/{SINGLE}", open_safetensors
    rows, bias, activation = parse(folder, o, read_dense, o, hidden)
    if not os.path.lexists(folder / file) and os.path.lexists(folder / path / PICKLE):
        file, read = f"{path}/{PICKLE}", open_pickle
    found = read(folder / file, file)
    for t in found.values():
        check_dtype(t)
    want = ({"linear.bias": [rows]} if bias else {}) | {"linear.weight": [rows, hidden]}
    expect(file, "tensors", {k: list(t.shape) for k, t in sorted(found.items())}, want)
    tensors |= {"dense." + k: t._replace(name=f"{path} {k}") for k, t in found.items()}
    return dense_sections([("dense.linear.weight", rows)], rows, hidden,
                          [("dense.linear.bias", 1)] if bias else None), activation


def identity_dense(hidden):
    """perplexity's checkpoints give round(127 tanh(x)) of the pooled row x, which is compared by
    cosine. This layer is tanh(x); the rounding to 8 bits is left out."""
    return dense_sections(np.eye(hidden, dtype="<f4").tobytes(), hidden, hidden)


def logit_tensors(s):
    """Returns {name: shape} of the tensors that can have a reranker's logits, the right one
    first."""
    c, claims = s.config, s.claims
    if claims.architecture == CLASSIFIER:
        return {"score.weight": (2 if len(claims.labels) == 2 else 1, c.hidden)}
    names = ["embed_tokens.weight"] if claims.tied else []
    if not claims.tied or "lm_head.weight" in s.tensors:
        names.append("lm_head.weight")
    return dict.fromkeys(names, (c.vocab, c.hidden))


def logit_dense(s, ids):
    """Returns the sections of a reranker: the row that gives logit(yes) - logit(no), in float32."""
    expect("config.json", "attention of a reranker", s.claims.attention, "causal")
    if s.tokenizer.eos_id != NO_TOKEN:
        refuse("tokenizer.json", "post_processor of a reranker", "an end token", "none")
    names, cols = list(logit_tensors(s)), s.config.hidden
    t = s.tensors[names[0]]
    if t.shape[0] == 1:
        return dense_sections(encode_f32(read_rows(t, 0, 1, cols), t, 0, None), 1, cols)
    if names[0] == "score.weight":
        ids = {label: int(row) for row, label in s.claims.labels.items()}
        expect("config.json", "id2label", ids, {"no": 0, "yes": 1}, {"no": 1, "yes": 0})
    if not {"yes", "no"} <= set(ids):
        refuse("tokenizer.json", 'no tokens "yes" and "no", which a reranker needs')
    yes, no = (read_rows(t, ids[word], 1, cols) for word in ("yes", "no"))
    for word, row in ("yes", yes), ("no", no):
        if (row != read_rows(s.tensors[names[-1]], ids[word], 1, cols)).any():
            refuse("lm_head.weight", f"differs from {t.name}, to which config.json ties it")
    return dense_sections(encode_f32(yes - no, t, ids["yes"], None), 1, cols)


# ---- writing -----------------------------------------------------------------------------------


def add_bits(section, tensors):
    """Returns the section with its significant bits. The SHA-256 begins with the directory, so they
    are found before the section is written."""
    if section.dtype is not F16:
        return section
    eight = all(has_8_bits(tensors[name], rows, section.cols) for name, rows in section.data)
    return section._replace(bits=8 if eight else 11)


def layout(sections):
    """Returns the directory, the offset of each section, the size of the file."""
    entries, offsets, end = b"", [], 4096 + 96 * len(sections)
    for s in sections:
        at, size = -(-end // 256) * 256, s.rows * s.dtype.row_bytes(s.cols)
        entries += struct.pack("<48sIIQQQQQ", s.name.encode(), s.dtype.code, s.bits, s.rows,
                               s.cols, at, size, 0)
        offsets.append(at)
        end = at + size
    return entries, offsets, end


def header_fields(s):
    """Returns the header's bytes from 72 to 139 and from 148 on, for a Source."""
    dense_rows, places = s.dense[0].rows if s.dense else 0, s.claims.places
    return struct.pack("<9I2f6I", *s.config[:8], s.tokenizer.eos_id, *s.config[8:],
                       KINDS.index(s.kind), POOLINGS.index(s.pooling),
                       ATTENTIONS.index(s.claims.attention), dense_rows,
                       ACTIVATIONS.index(s.activation), s.window), struct.pack(
                           "<4I", BERT_ARCHITECTURE, s.tokenizer.bos_id, places.pad_id,
                           places.first) if places else bytes(16)


FNV_START = 0xCBF29CE484222325


def fnv1a(h, data):
    """Returns the FNV-1a 64 h of some bytes, continued by data."""
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def header(fields, n_sections, size, sha, directory, tables):
    """fields: header_fields. tables: the checksum of the tables and vectors."""
    h = b"qemb\r\n\x1a\n" + struct.pack("<IIQQII", 1, 0x01020304, size, 0, n_sections, 0) + sha
    h = (h + fields[0] + struct.pack("<Q", tables) + fields[1]).ljust(4096, b"\0")
    check = fnv1a(FNV_START, h + directory)  # with its own field zero
    return h[:24] + struct.pack("<Q", check) + h[32:]


def encoded(section, tensors, rounding):
    """Yields the bytes of a section in blocks."""
    if isinstance(section.data, bytes):
        yield section.data
        return
    if not section.data:
        yield b"".join(rounding.scales)
        rounding.scales.clear()
        return
    plus = section.plus and read_rows(tensors[section.plus], 0, 1, section.cols)
    for t, rows in ((tensors[name], rows) for name, rows in section.data):
        for row, w in read_blocks(t, rows, t.shape[-1], BLOCK):
            w = w if plus is None else w + plus
            yield section.dtype.encode(w, t, row, rounding)


def write_sections(f, fields, sections, tensors, bar):
    """Returns the SHA-256 (hex) and the Rounding."""
    directory, offsets, size = layout(sections)
    sha, rounding, tables = hashlib.sha256(), Rounding(), FNV_START

    def put(data):
        f.write(data)
        sha.update(data)
        bar.update(len(data))

    f.write(bytes(4096))
    put(directory)
    for section, offset in zip(sections, offsets):
        put(bytes(offset - f.tell()))
        for block in encoded(section, tensors, rounding):
            put(block)
            if section.rows == 1 or section.dtype is U32:
                tables = fnv1a(tables, bytes(block))
    f.seek(0)
    f.write(header(fields, len(sections), size, sha.digest(), directory, tables))
    return sha.hexdigest(), rounding


def open_temporary(path):
    """Returns a descriptor of the new file `path`, locked for this run. One that a killed run has
    left is removed: nobody holds its lock."""
    while True:
        try:
            fd, left = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), False
        except FileExistsError:
            try:
                fd, left = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), True
            except FileNotFoundError:  # its run has just ended
                continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else another run was quicker
                if not left:
                    return fd
                path.unlink()
        except BlockingIOError:
            refuse(path, "another run is writing it")
        except FileNotFoundError:
            pass
        os.close(fd)


def write_file(out, write, check):
    """Calls write(f) on a temporary file and check(its path), and renames it to `out`; removes it
    on failure. Returns what the two return."""
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        fd = open_temporary(temporary)
    except OSError as e:
        refuse(e.filename or temporary, e.strerror)
    try:
        with open(fd, "wb") as f:
            result = write(f)
            f.flush()
            os.fsync(f.fileno())
            checked = check(temporary)
            handle_signals(signal.SIG_IGN)  # from here on signals do not stop it
            os.replace(temporary, out)
    except BaseException as e:
        handle_signals(signal.SIG_IGN)
        temporary.unlink(missing_ok=True)
        if not isinstance(e, OSError):
            raise
        refuse(e.filename or out, e.strerror)  # an error of write() has no file name
    folder = os.open(out.parent, os.O_RDONLY)
    os.fsync(folder)  # sync the new name as well
    os.close(folder)
    return (*result, checked)


def check_vectors(path, kind):
    """Refuses the new file if the qemb that is built here cannot open it, or if it gives no finite
    vector for one of a few texts. Returns a line for the summary."""
    if not os.access(QEMB, os.X_OK):
        return "no, since qemb is not built here (make qemb)"
    records = [{"text": text} for text in PROBES]
    command = [QEMB, "--input", "jsonl"]
    if kind == "reranker":
        command, records = [QEMB, "rerank"], [{"query": PROBES[1], "documents": PROBES}]
    done = subprocess.run([*command, "-m", path, "--truncate"], check=False, capture_output=True,
                          input="".join(json.dumps(r) + "\n" for r in records).encode())
    said = one_line(done.stderr.decode("utf-8", "replace").removeprefix("qemb: "))
    if done.returncode == 2 and "memory" not in said:
        refuse(QEMB, f"cannot open what was written; if it is an older one, build it anew: {said}")
    if b'"non_finite"' in done.stdout:
        refuse("weights", "vectors of short texts are zero or not finite: numbers are damaged, or "
               "do not fit together")
    if done.returncode not in (0, 3):
        return f"no, qemb ended with status {done.returncode}: {said}"
    return f"{len(PROBES)} texts by qemb"


# ---- the command -------------------------------------------------------------------------------


def handle_signals(handler):
    """Leaves those alone that the caller ignores, as nohup does."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(s) != signal.SIG_IGN:
            signal.signal(s, handler)


def interrupt(number, frame):
    handle_signals(signal.SIG_IGN)  # a second one would end the clearing up
    raise Interrupted(number)


def has_checkpoint(folder):
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX))


def check_gguf(folder, files, source, hint):
    """Refuses a source that has GGUF files and no checkpoint."""
    names = sorted(f for f in files if f.endswith(".gguf"))
    if names and not has_checkpoint(folder):
        refuse(source, f"GGUF files and no checkpoint; {hint}", ", ".join(names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""), f"config.json and {SINGLE}")


def find_source(name, quiet):
    """Returns the directory or GGUF file, its name, and the commit (None if it is not from the
    hub)."""
    path = Path(name)
    if path.is_dir():
        return path, path.resolve().name, None
    if path.suffix == ".gguf" and path.is_file():
        return path, path.name, None
    if path.exists():
        refuse(name, "source", "a file", "a directory, a .gguf file or a name on the hub")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        refuse(name, "no such directory, and not a name on the hub", None, "owner/name")
    import huggingface_hub.utils  # slow to load

    if quiet:
        huggingface_hub.utils.disable_progress_bars()
    try:
        files = [*JSON_FILES, TOKENIZER_CONFIG, ADDED_TOKENS, SPECIAL_TOKENS, TEMPLATE, ADAPTER,
                 *MODULE_FILES, "model*.safetensors", INDEX]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
        if not has_checkpoint(folder):  # of both forms, only safetensors are loaded
            folder = Path(huggingface_hub.snapshot_download(
                name, revision=folder.name, allow_patterns=["pytorch_model*.bin", PICKLE_INDEX]))
    except Exception as e:  # network, access, spelling: the message of the hub
        refuse(name, f"no such directory, and not from the hub: {' '.join(str(e).split())[:300]}")
    if not has_checkpoint(folder):
        try:
            files = huggingface_hub.list_repo_files(name, revision=folder.name)
        except Exception:  # of any type; then what is missing is the message
            files = []
        check_gguf(folder, files, name, "download one of them by hf download and name that")
    return folder, name, folder.name  # the directory of a snapshot is named by its commit


def is_qwen3_reranker(name):
    return bool(re.search("qwen3[-_ ]?reranker", name.lower()))


def known_encoder(name):
    """A name of KNOWN_PROMPTS, or None. multilingual-e5-large-instruct has other prompts."""
    name = name.lower()
    if "multilingual-e5" in name and "instruct" not in name:
        return "multilingual-e5"
    return "bge-m3" if "bge-m3" in name else None


def check_pooling(args, encoder):
    wrong, right = ("last", "first or mean") if encoder else ("first", "last or mean")
    if args.pooling == wrong:
        refuse("--pooling", f"of {'an encoder' if encoder else 'a Qwen3'}", wrong, right)


def check_prompt(args, obj, source, told):
    """Refuses a reranker of which no template (told), name or --kind says that it was trained with
    Qwen3-Reranker's prompt. Others have other prompts, and classifiers, such as reward models,
    have the same form."""
    if not told and not is_qwen3_reranker(source) and args.kind != "reranker":
        refuse(obj, "a classifier or reranker, and nothing says its prompt; if it was trained with "
               "Qwen3-Reranker's (docs/models.md), say so with --kind reranker; others are not "
               "supported")


def find_task(args, folder, has, obj, source):
    """Returns the task of pairs without one, for a reranker."""
    text, name = None, TEMPLATE
    if os.path.lexists(folder / TEMPLATE):  # goes before tokenizer_config.json's
        text = read_text_file(folder, TEMPLATE).decode("utf-8", "replace")
    elif TOKENIZER_CONFIG in has:
        text, name = parse(folder, TOKENIZER_CONFIG, read_chat_template), TOKENIZER_CONFIG
    task = None if text is None else understand(name, lambda: read_template(name, text))
    # With modules.json, sentence-transformers takes the template only if this file says so.
    taken = "modules.json" not in has or BERT in has and parse(folder, BERT, lambda j: (
        "message" in (j.get("modality_config") or {})))
    check_prompt(args, obj, source, task is not None and taken)
    return RERANKER["instruct"] if task is None else task


def find_kind(args, said, source, place):
    """Returns the kind of model. said: what the source's files say, or None, and where. The first
    revisions of Qwen3-Reranker have the files of a language model and nothing that says what it is
    for, so the name decides, or --kind."""
    said, where = said
    kind = said or ("embedding" if args.pooling else args.kind)
    if not kind and is_qwen3_reranker(source):
        kind = "reranker"
    if not kind or kind == "embedding" and not said and not args.pooling:
        refuse(place[0], place[1] + "; if its last token is pooled, say so with --pooling last; "
               "if it was trained with Qwen3-Reranker's prompt (docs/models.md), with --kind "
               "reranker; other rerankers are not supported")
    if args.kind and args.kind != kind:
        refuse("--kind", f"{where if said else '--pooling'} says what the model is for", args.kind,
               kind)
    for option in ("pooling", "end_token") if kind == "reranker" else ():
        if getattr(args, option):
            refuse("--" + option.replace("_", "-"), "an option for embeddings",
                   getattr(args, option), "none for a reranker")
    return kind


def check_encoder(args, said, place):
    """Refuses what an encoder cannot be. said, place: as of find_kind."""
    if "reranker" in (said[0], args.kind):
        refuse(said[1] if said[0] == "reranker" else "--kind", "a reranker; of this family, only "
               "models whose output is a vector are supported")
    if args.end_token:
        refuse("--end-token", "tokenizer.json says what ends a text", args.end_token,
               "none for an encoder")
    if not said[0] and not args.pooling:
        refuse(place[0], f"{place[1]}; say what is pooled by --pooling first or mean")
    return "embedding"


# What a source says. config: Config; claims: Claims; tokenizer: Tokenizer; tensors: {name: Tensor};
# prompts: the section and the names; files: lines of provenance; notes: for the user; dense:
# sections, or []; activation: of them; window: as in the header
Source = namedtuple("Source", "config kind pooling claims tokenizer tensors prompts files notes "
                    "dense activation window")


def check_adapter(folder):
    """Refuses an adapter, beside weights or alone."""
    if not os.path.lexists(folder / ADAPTER):
        return
    merge = ("merge it first: peft's AutoPeftModelForFeatureExtraction.from_pretrained(DIRECTORY)"
             ".merge_and_unload().save_pretrained(NEW), and copy the other files")
    if has_checkpoint(folder):
        refuse(ADAPTER, f"an adapter (LoRA), which transformers would add to the weights; {merge}")
    base = parse(folder, ADAPTER, lambda j: j.get("base_model_name_or_path"))
    refuse(ADAPTER, f"an adapter (LoRA) alone, without the model that it changes; {merge} of that "
           "model", f"base_model_name_or_path {show(base)}", "a model's weights")


def read_directory(args, folder, source):
    """Returns the Source of a Hugging Face directory."""
    check_adapter(folder)
    check_gguf(folder, [p.name for p in folder.glob("*.gguf")], source, "name one of them")
    claims = parse(folder, "config.json", read_claims)
    c, encoder = parse(folder, "config.json", read_config, claims), bool(claims.places)
    check_pooling(args, encoder)
    tokenizer = parse(folder, "tokenizer.json", read_unigram if encoder else read_tokenizer,
                      c.vocab)
    modules = {}
    if os.path.lexists(folder / "modules.json"):
        modules = parse(folder, "modules.json", read_modules, claims.architecture)
    has = [name for name in JSON_FILES + [f"{path}/config.json" for path in modules.values() if path
                                          and f"{path}/config.json" not in JSON_FILES]
           if os.path.lexists(folder / name)]
    quiet = [name for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
             if os.path.lexists(folder / name)]  # not in the provenance
    said = (("reranker", "config.json") if claims.architecture == CLASSIFIER else
            ("reranker", "modules.json") if "LogitScore" in modules else
            ("embedding", "modules.json") if "Pooling" in modules else
            ("embedding", POOLING) if POOLING in has and not modules else (None, None))
    nothing = (POOLING, "no such file in the source")
    if claims.architecture == "Qwen3ForCausalLM":
        nothing = ("config.json", "a language model, and no file of sentence-transformers says "
                   "that it embeds, as those of Qwen/Qwen3-Embedding-0.6B do")
    place = ("modules.json", "no module that pools") if modules else nothing
    kind = check_encoder(args, said, place) if encoder else find_kind(args, said, source, place)
    pooling = args.pooling or "last"
    if kind == "embedding" and not args.pooling:
        pooling = parse(folder, POOLING, read_pooling, encoder)
    notes = [*tokenizer.notes]
    if tokenizer.late:
        notes.append(f"added tokens such as {show(tokenizer.late[0])} are found before NFC, and by "
                     "transformers behind it: other ids where NFC changes the text of one, as a "
                     "combining mark behind it may")
    if kind == "embedding" and modules and not {"Normalize", "FlexibleQuantizer"} & {*modules}:
        notes.append("modules.json has no Normalize: vectors in sentence-transformers have any "
                     "length, here length 1")
    if args.end_token:
        tokenizer = tokenizer._replace(eos_id=end_token(args.end_token, tokenizer.ids))
    elif kind == "embedding" and pooling == "last" and tokenizer.eos_id == NO_TOKEN:
        notes.append("no token ends a text, as tokenizer.json says; --end-token appends one")
    limits = [parse(folder, TOKENIZER_CONFIG, read_tokenizer_config, tokenizer, args.end_token)
              if TOKENIZER_CONFIG in quiet else None, parse(folder, BERT, read_bert, kind)
              if BERT in has else None]
    if SPECIAL_TOKENS in quiet:
        parse(folder, SPECIAL_TOKENS, read_special_tokens, SPECIAL_TOKENS, tokenizer)
    if ADDED_TOKENS in quiet:
        parse(folder, ADDED_TOKENS, read_added_tokens, tokenizer)
    if "LogitScore" in modules:
        parse(folder, LOGIT_SCORE, read_logit_score, tokenizer.ids)
    known = ("pplx-embed" if claims.architecture == PPLX else
             known_encoder(source) if encoder else None)
    more = [kind, args.prompts, notes, known]
    if kind == "reranker":
        more.append(find_task(args, folder, has + quiet, said[1], source))
    prompts = (parse(folder, PROMPTS, read_prompts, *more) if PROMPTS in has else
               read_prompts({}, *more))
    check_keys(folder, has + quiet, args.ignore, notes)
    tensors, shards = open_tensors(folder, claims.architecture, notes)
    files = [f"file: {name} sha256 " + hashlib.sha256(read_text_file(folder, name)).hexdigest()
             for name in has]
    files += [f"file: {s} {(folder / s).stat().st_size} bytes" for s in shards]
    s = Source(c, kind, pooling, claims, tokenizer, tensors, prompts, files, notes, [], "identity",
               default_window(kind, c, limits))
    more = check_tensors(s)
    if kind == "reranker":
        return s._replace(dense=logit_dense(s, tokenizer.ids))
    if "Dense" in modules and more:
        refuse(f"{modules['Dense']}/config.json", "a dense layer behind linear.weight", None,
               "one of the two")
    if "Dense" in modules:
        dense, activation = open_dense(folder, modules["Dense"], c.hidden, tensors)
        return s._replace(dense=dense, activation=activation)
    if more:  # before the pooling there; the mean of projections is the projection of the mean
        rows = claims.linear
        return s._replace(dense=dense_sections([("linear.weight", rows)], rows, c.hidden))
    if "FlexibleQuantizer" in modules:
        s.notes.append("vectors are tanh of the pooled row, not rounded to 8 bits")
        return s._replace(dense=identity_dense(c.hidden), activation="tanh")
    return s


def read_gguf(args, path, o):
    """Returns the Source of a GGUF file, whose name is o."""
    try:
        return understand(o, lambda: gguf_source(args, path, o), "GGUF of the known form")
    except Refused as e:
        raise Refused(o, gguf_words(o, *e.args))


def gguf_words(o, obj, text):
    """Returns a refusal without the file's name. Keys of config.json and tensors get the names that
    they have in a GGUF file."""
    if obj == "config.json":
        names = {v: k for k, v in GGUF_CONFIG.items()} | {"attention": "attention.causal"}
        return re.sub(r"^\w+", lambda m: f"qwen3.{names[m[0]]}" if m[0] in names else m[0], text)
    obj = "tokenizer.ggml" if obj == "tokenizer.json" else str(obj)
    obj = {f"{name}.weight": f"{own}.weight" for own, name in GGUF_TENSORS.items()}.get(obj, obj)
    for own, name in GGUF_LAYER.items():
        obj = re.sub(rf"^layers\.(\d+)\.{name}\.", rf"blk.\1.{own}.", obj)
    return text if obj == o else f"{obj}: {text}"


def gguf_source(args, path, o):
    meta, tensors = open_gguf(path)
    check_pooling(args, False)
    notes, known = [], KEYS["GGUF"].split()
    own = [key.removeprefix("tokenizer.ggml.") for key in meta if key.startswith("tokenizer.ggml.")]
    ignore_keys([(o, key) for key in own if key not in known], args.ignore, notes)
    if "embed_tokens.weight" not in tensors:
        refuse("token_embd.weight", "missing tensor")
    j = gguf_config(meta, o, tensors["embed_tokens.weight"].shape[0])
    claims = read_claims(j)
    c = read_config(j, claims)
    tokenizer = read_tokenizer(gguf_tokenizer(meta, o), c.vocab)
    pooling = meta.get("qwen3.pooling_type")
    if pooling not in GGUF_POOLING and not args.pooling:
        refuse(o, "qwen3.pooling_type; if it is wrong, say what is pooled by --pooling last or mean"
               f" (got {show(pooling)}{', CLS' * (pooling == 2)}; want MEAN, LAST or RANK)")
    said, pooling = GGUF_POOLING.get(pooling, (None, None))
    name = f"{meta.get('general.name', '')} {o}"
    kind = find_kind(args, (said, "qwen3.pooling_type"), name,
                     (o, "no qwen3.pooling_type that says what it is for"))
    if kind == "embedding":
        end = args.end_token or gguf_end(meta, o, name)
        tokenizer = tokenizer._replace(eos_id=end_token(end, tokenizer.ids))
        known = "Qwen3-Embedding" if is_qwen3_embedding(name) else None
        prompts = read_prompts({}, kind, args.prompts, notes, known)
        if not known and not args.prompts:
            notes.append("a GGUF file has no prompts; --prompt NAME=TEXT gives some")
    else:
        template = meta.get("tokenizer.chat_template.rerank")
        check_prompt(args, o, name, template is not None)
        prompts = read_prompts({}, kind, args.prompts, notes, None, gguf_task(template, o))
    claims = claims._replace(tied="lm_head.weight" not in tensors)
    if kind == "reranker" and "score.weight" in tensors:
        claims = claims._replace(architecture=CLASSIFIER, labels={"0": "", "1": ""})
    s = Source(c, kind, args.pooling or pooling, claims, tokenizer, tensors, prompts,
               [f"file: {o} {path.stat().st_size} bytes"], notes, [], "identity",
               default_window(kind, c, []))
    check_tensors(s)
    if kind == "reranker":
        if claims.architecture == CLASSIFIER:
            s = s._replace(claims=claims._replace(labels=gguf_labels(meta, s, o)))
        s = s._replace(dense=logit_dense(s, tokenizer.ids))
    return s


def default_window(kind, c, limits):
    """Returns the header's window. limits: of the source's files, for an embedding."""
    if kind == "reranker":
        return min(RERANKER_WINDOW, c.max_positions)
    least = min((n for n in limits if n and n > 0), default=c.max_positions)
    return least if least < c.max_positions else 0


def provenance(args, s, source, commit, dtypes):
    lines = [f"source: {source}"] + ([f"revision: {commit}"] if commit else []) + s.files
    lines += [f"weights: {dtypes} to {args.dtype}"]
    if s.kind == "reranker":
        lines.append("kind: reranker")
    else:
        words = {"last": "last token", "mean": "mean", "first": "first token"}
        lines.append(f"pooling: {words[s.pooling]}" + (", by --pooling" if args.pooling else ""))
    if s.claims.attention != "causal":
        lines.append(f"attention: {s.claims.attention}")
    if s.dense and s.kind == "embedding":
        lines.append(f"dense: {s.dense[0].rows} rows, {s.activation}")
    if args.end_token:
        lines.append(f"end: {args.end_token}, by --end-token")
    if s.window and s.kind == "embedding":
        lines.append(f"window: {s.window} tokens")
    if args.prompts:
        lines.append(f"prompts: {', '.join(args.prompts)} by --prompt")
    lines += [f"converter: convert_weights.py {VERSION}", *(f"note: {n}" for n in s.notes)]
    return "".join(printable(" ".join(line.split())) + "\n" for line in lines).encode()


def model_words(s):
    """Returns how vectors are made, for the summary."""
    words = [s.kind, s.pooling, s.claims.attention]
    if s.dense and s.kind == "embedding":
        words.append(f"dense {s.dense[0].rows}" + " tanh" * (s.activation == "tanh"))
    return ", ".join([*words, f"longest text {s.window or s.config.max_positions}"])


def convert(args):
    started = time.monotonic()
    folder, source, commit = find_source(args.source, args.quiet)
    out = Path(args.out or source.split("/")[-1].removesuffix(".gguf") + ".qemb")
    if out.exists() and not out.is_file():
        refuse(out, "output", "something else", "a file, or a free name")
    s = (read_gguf if folder.is_file() else read_directory)(args, folder, source)
    s.notes.extend(args.note)
    weights = [*weight_sections(s.config, s.claims.places, MATRIX_DTYPES[args.dtype]), *s.dense]
    weights = [add_bits(w, s.tensors) for w in weights]
    dtypes = " ".join(sorted({t.dtype for t in s.tensors.values()}))
    about = provenance(args, s, source, commit, dtypes)
    prompts, names = s.prompts
    sections = [s.tokenizer.table, *(Section(name, U8, 1, len(data), data) for name, data in
                  (("added_tokens", s.tokenizer.added), ("prompts", prompts),
                   ("provenance", about))), *weights]
    size = layout(sections)[2]
    with tqdm(total=size, unit="B", unit_scale=True, leave=False,
              disable=args.quiet or None) as bar:  # None: only on a terminal
        sha, rounding, checked = write_file(
            out, lambda f: write_sections(f, header_fields(s), sections, s.tensors, bar),
            lambda path: check_vectors(path, s.kind))
    if not args.quiet:
        parameters = sum(w.rows * w.cols for w in weights if w.data)
        tensors = sum(len(w.data) for w in weights if not isinstance(w.data, bytes))
        end = "none" if s.tokenizer.eos_id == NO_TOKEN else s.tokenizer.eos_id
        lines = [
            f"{out}: {size:,} bytes in {time.monotonic() - started:.1f} s",
            f"tensors    {tensors}, {parameters:,} parameters, {dtypes} to {args.dtype} matrices "
            "and f32 vectors",
            f"rounding   at most {rounding.worst:.3g}{rounding.where}; {rounding.tiny:,} numbers "
            "below 2^-14 were rounded",
            f"model      {model_words(s)}",
            f"tokenizer  {s.tokenizer.words}, end-of-text {end}",
            f"prompts    {', '.join(names) or 'none'}",
            f"checked    {checked}",
            f"sha256     {sha}",
            *(f"note       {n}" for n in s.notes)]
        try:
            print("\n  ".join(map(printable, lines)), flush=True)
        except OSError as e:
            refuse("standard output", e.strerror)


def named_prompt(text):
    name, equals, prompt = text.partition("=")
    if not equals or text != text.encode("utf-8", "replace").decode():
        raise argparse.ArgumentTypeError(f"{text!r} (want NAME=TEXT, in UTF-8)")
    if "\\n" in prompt:  # a shell leaves it in quotes, and no known prompt contains it
        raise argparse.ArgumentTypeError(
            f"prompt {name}: a line break written as \\ and n (got {prompt[:120]}, want the line "
            "break itself: in bash --prompt $'NAME=...\\n...')")
    return name, prompt


def main():
    p = argparse.ArgumentParser(
        description="Converts an embedding or rerank model of the Qwen3 family, or an XLM-RoBERTa "
        "or BERT encoder, to one .qemb file.")
    p.add_argument("source", help="a Hugging Face directory, a name on the hub (owner/name), or a "
                   ".gguf file")
    p.add_argument("--out", help="the file to write (default: the source's name with .qemb)")
    p.add_argument("--dtype", choices=list(MATRIX_DTYPES), default="f16", help="of the matrices")
    p.add_argument("--kind", choices=KINDS, help="what the model is for, if its files do not say")
    p.add_argument("--pooling", choices=POOLINGS, default="",
                   help="pool the last token, the mean or (encoders) the first token, whatever "
                   "the source says or does not say")
    p.add_argument("--end-token", default="", metavar="TOKEN",
                   help="append this token to every text, or none, whatever the source says")
    p.add_argument("--prompt", action="append", default=[], type=named_prompt, metavar="NAME=TEXT",
                   help="add the prompt NAME, or replace it")
    p.add_argument("--ignore", action="append", default=[], metavar="KEY",
                   help="go on although a file has the setting KEY, which qemb does not know")
    p.add_argument("--note", action="append", default=[], help="a line for the file's provenance")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    args = p.parse_args()
    args.prompts = dict(args.prompt)
    np.seterr(all="ignore")  # check_range and check_vectors find such numbers
    handle_signals(interrupt)
    try:
        convert(args)
    except Refused as e:
        sys.exit(f"convert_weights.py: {one_line(e)}")
    except ModuleNotFoundError as e:  # of those that are slow to load
        sys.exit(no_package(e))
    except OSError as e:
        sys.exit(f"convert_weights.py: {one_line(e.filename or args.source)}: {e.strerror or e}")
    except Interrupted as e:
        name = signal.Signals(e.args[0]).name
        print(f"convert_weights.py: stopped by {name}, nothing written", file=sys.stderr)
        sys.exit(128 + e.args[0])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    main()
