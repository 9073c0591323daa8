"""The settings of a checkpoint: each is used, known to be harmless, or refused with its name.
Sources and readers are those of test_convert."""
import base64
import json
import shutil
import subprocess

import hf_fixture as hf
import pytest
from helpers import QEMB, ROOT, run as run_program, stdout_of, vectors_of
from serve_client import server
from test_convert import (ADDED, PLAIN, Pair, SHAPE, add_dense, convert, convert_weights, edit,
                          folder, refused, save, setting, weights)  # folder: the fixture

CONFIG, TOKENIZER, BERT, PROMPTS, MODULES = (
    "config.json", "tokenizer_config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "modules.json")
SPECIAL, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
NORMALIZE = "2_Normalize/config.json"


def add(folder, name, **settings):
    """Sets keys of a file, which is made if there is none."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    hf.save_json(path, (json.loads(path.read_text()) if path.exists() else {}) | settings)


def without_notes(q):
    return {k: v.tobytes() for k, v in q.sections.items() if k != "provenance"}, q.config, q.use


# ---- keys --------------------------------------------------------------------------------------

# What the checkpoints of the family and the programs that save them have, by their documentation:
# the tokenizer of Qwen3, the configurations of transformers 4.51 to 5.5, and sentence-transformers
# 2.7 to 6.2.
REAL = {
    CONFIG: dict(
        attention_dropout=0.0, bos_token_id=260, eos_token_id=260, pad_token_id=260,
        initializer_range=0.02, max_window_layers=28, sliding_window=None, torch_dtype="bfloat16",
        dtype="bfloat16", transformers_version="4.51.3", use_cache=True, _name_or_path="x",
        _attn_implementation_autoset=True, unsloth_version="2025.6.1", layer_types=None,
        return_dict=True, output_hidden_states=False, is_encoder_decoder=False,
        chunk_size_feed_forward=0, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
        problem_type=None, pretraining_tp=1, partial_rotary_factor=1.0, pruned_heads={},
        is_matryoshka=True, matryoshka_dimensions=[24, 12], sentence_transformers={}),
    TOKENIZER: dict(
        add_bos_token=False, add_prefix_space=False, additional_special_tokens=["<think>"],
        bos_token=None, clean_up_tokenization_spaces=False, eos_token=hf.EOS, errors="replace",
        model_max_length=131072, pad_token=hf.EOS, split_special_tokens=False, backend="tokenizers",
        tokenizer_class="Qwen2Tokenizer", unk_token=None, padding_side="left", is_local=False,
        extra_special_tokens={}, chat_template="{{ messages }}", processor_class="P",
        model_specific_special_tokens={"image_token": "<think>"}, max_length=512, stride=0,
        truncation_strategy="longest_first", name_or_path="x", local_files_only=False),
    SPECIAL: dict(eos_token={"content": hf.EOS, "lstrip": False}, pad_token=hf.EOS,
                  additional_special_tokens=["<think>", "é中"]),
    ADDED_TOKENS: {text: 260 + i for i, text in enumerate(ADDED)},
    BERT: dict(max_seq_length=64, do_lower_case=False, transformer_task="feature-extraction",
               module_output_name="token_embeddings", unpad_inputs=None, processing_kwargs={}),
    PROMPTS: dict(__version__={"pytorch": "2.6.0", "sentence_transformers": "4.1.0"},
                  model_type="SentenceTransformer", similarity_fn_name="cosine"),
    "1_Pooling/config.json": dict(embedding_dimension=24),
    NORMALIZE: dict(module_input_name="sentence_embedding"),
}


def test_keys_of_real_checkpoints(folder):
    want = convert(folder)
    for name, settings in REAL.items():
        add(folder, name, **settings)
    edit(folder / MODULES, setting(1, "kwargs", []))
    q = convert(folder)
    assert without_notes(q) == without_notes(want) and "note:" not in q.provenance


def test_harmless_keys_change_nothing(folder):
    """Whatever their values: nobody reads them."""
    want, n = convert(folder), 0
    for name, words in convert_weights.KEYS.items():
        _, line, harmless = words.partition("|")
        keys, n = harmless.split(), n + len(harmless.split())
        if name.endswith(".json") and name != MODULES:
            add(folder, name, **dict.fromkeys(keys, {"any": ["value"]}))
        elif name == "Pooling":
            add(folder, "1_Pooling/config.json", **dict.fromkeys(keys, "any"))
    q = convert(folder)
    assert n > 100 and without_notes(q) == without_notes(want) and "note:" not in q.provenance


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, SPECIAL, BERT, PROMPTS, NORMALIZE,
                                  "1_Pooling/config.json", "2_Dense/config.json", MODULES])
def test_an_unknown_setting(folder, name):
    """It may change vectors, so a person has to say that it does not."""
    if "Dense" in name:
        add_dense(folder)
    want = convert(folder)
    if name == MODULES:
        edit(folder / name, setting(1, "new_trick", 7))
    else:
        add(folder, name, new_trick=7, new_version=3, _new=4)
    assert refused(folder, "--out", "out.qemb") == (
        f'{name}: "new_trick" is a setting that qemb does not know, and may change vectors; if it '
        "changes none: --ignore new_trick")
    q = convert(folder, "--ignore", "new_trick")
    assert without_notes(q) == without_notes(want)
    assert f"note: {name}: new_trick ignored, by --ignore\n" in q.provenance


def test_an_unknown_setting_of_a_gguf(folder):
    pair = Pair(folder, **{"tokenizer.ggml.new_trick": True, "qwen3.pooling_type": 3})
    assert refused(pair.gguf) == (
        f'{pair.gguf.name}: "new_trick" is a setting that qemb does not know, and may change '
        "vectors; if it changes none: --ignore new_trick")
    assert "new_trick ignored" in convert(pair.gguf, "--ignore", "new_trick").provenance


@pytest.mark.parametrize("key", ["truncate_dim", "nothing"])
def test_only_unknown_settings_can_be_ignored(folder, key):
    """One that is known is not taken for harmless, and a wrong name is not taken for one."""
    add(folder, PROMPTS, truncate_dim=None)
    assert refused(folder, "--ignore", key) == (
        f'--ignore: no file has such a key, or qemb knows it (got "{key}", want a key that was '
        "refused as unknown)")
    add(folder, PROMPTS, truncate_dim=12)
    assert refused(folder, "--ignore", key).startswith(f"{PROMPTS}: truncate_dim; ")


@pytest.mark.parametrize("name,key,value,words", [
    (CONFIG, "per_layer_config", {"1": {"head_dim": 12}}, '(got {"1": {"head_dim": 12}}, want'),
    (CONFIG, "pruned_heads", {"0": [1]}, '(got {"0": [1]}, want null or {})'),
    (CONFIG, "partial_rotary_factor", 0.5, "(got 0.5, want null or 1)"),
    (TOKENIZER, "tokenizer_class", "LlamaTokenizerFast", '(got "LlamaTokenizerFast", want null or'),
    (TOKENIZER, "do_lower_case", True, "(got true, want null or false)"),
    (BERT, "mask_prompt", True, "(got true, want null or false)"),
    (BERT, "tokenizer_name_or_path", "other", '(got "other", want null)'),
])
def test_refuses_settings_that_change_vectors(folder, name, key, value, words):
    add(folder, name, **{key: value})
    assert refused(folder).startswith(f"{name}: {key} {words}")


# ---- tokens that transformers adds -------------------------------------------------------------


@pytest.mark.parametrize("key,value", [
    ("pad_token", "[PAD]"), ("bos_token", {"content": "[PAD]"}), ("eos_token", "ab"),
    ("additional_special_tokens", ["<think>", "[PAD]"]), ("extra_special_tokens", ["[PAD]"]),
    ("extra_special_tokens", {"x": "[PAD]"}), ("model_specific_special_tokens", {"x": "[PAD]"})])
@pytest.mark.parametrize("name", [TOKENIZER, SPECIAL])
def test_refuses_special_tokens_of_their_own(folder, name, key, value):
    """transformers gives [PAD] the next id; "ab" is a merge, which would become an added token."""
    add(folder, name, **{key: value})
    token = "ab" if value == "ab" else "[PAD]"
    assert refused(folder).startswith(
        f'{name}: "{token}" is no added token of tokenizer.json, and transformers adds it; load it')


@pytest.mark.parametrize("tokens,words", [
    ({"<new>": 263}, 'id of "<new>" in tokenizer.json; load it'),
    ({"<think>": 262}, 'id of "<think>" in tokenizer.json; load it'),
    ({"ab": 256}, 'id of "ab" in tokenizer.json; load it')])
def test_refuses_tokens_only_in_added_tokens_json(folder, tokens, words):
    hf.save_json(folder / ADDED_TOKENS, {hf.EOS: 260} | tokens)
    assert refused(folder).startswith(f"{ADDED_TOKENS}: {words}")

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
LATE = ('added tokens such as "<new>" are found before NFC, and by transformers behind it: other '
        "ids where NFC changes the text of one, as a combining mark behind it may\n")


def late_token(folder, text):
    edit(folder / "tokenizer.json", lambda j: j["added_tokens"].append(
        FLAGS | {"id": 263, "content": text, "normalized": True, "special": False}))


def test_tokens_of_add_tokens(folder):
    """transformers' add_tokens() makes a token "normalized" unless it is told otherwise."""
    late_token(folder, "<new>")
    hf.save_json(folder / TOKENIZER, {"added_tokens_decoder": {
        "263": FLAGS | {"content": "<new>", "normalized": True}}})
    q = convert(folder)
    assert q.added[-1] == (263, "<new>") and "note: " + LATE in q.provenance
    p = subprocess.run([QEMB, "tokenize", "-m", "out.qemb"], input=b"a<new>b", capture_output=True)
    assert json.loads(stdout_of(p)) == [64, 263, 65, 260]
    edit(folder / TOKENIZER, setting("added_tokens_decoder", "263", "normalized", False))
    assert refused(folder, "--out", "out.qemb").startswith(
        f'{TOKENIZER}: added_tokens_decoder: "<new>" normalized (got false, want true)')


@pytest.mark.parametrize("text,words", [
    ("<néw>", "with characters outside of ASCII"), ("x<think>", 'which "<think>" begins in'),
    ("<thi", ""), ("new<", 'which "<|endoftext|>" begins in'),
    ("<think>x", 'which "<think>" begins in')])
def test_refuses_tokens_that_depend_on_the_order(folder, text, words):
    """transformers looks for these in what the others leave of a text."""
    late_token(folder, text)
    if not words:
        assert convert(folder).added[-1] == (263, text)
        return
    assert refused(folder).startswith(
        f"tokenizer.json: added token {json.dumps(text)} normalized, {words}")


# ---- what is accepted --------------------------------------------------------------------------

DROPOUT = {"idx": 2, "name": "d", "path": "2_Dropout",
           "type": "sentence_transformers.models.Dropout"}


@pytest.mark.parametrize("at", [2, 3])
def test_dropout(folder, at):
    """Only training has it."""
    want = convert(folder)
    edit(folder / MODULES, lambda j: j.insert(at, DROPOUT))
    add(folder, "2_Dropout/config.json", dropout=0.1)
    q = convert(folder)
    assert without_notes(q) == without_notes(want) and "note:" not in q.provenance


def test_two_modules_of_a_name(folder):
    """sentence-transformers keeps the last one, in the place of the first."""
    want = convert(folder)
    edit(folder / MODULES, lambda j: j.insert(2, DROPOUT | {"name": "2"}))
    assert without_notes(convert(folder)) == without_notes(want)
    edit(folder / MODULES, setting(3, "name", "1"))
    assert 'modules (got ["Transformer", "Normalize", "Dropout"], want' in refused(
        folder, "--out", "out.qemb")


def test_dense_behind_dropout(folder):
    """The folders of modules have their numbers."""
    add_dense(folder)
    want = convert(folder)
    (folder / "2_Dense").rename(folder / "3_Dense")
    edit(folder / MODULES, lambda j: j.insert(2, DROPOUT))
    edit(folder / MODULES, setting(3, "path", "3_Dense"))
    q = convert(folder)
    assert without_notes(q) == without_notes(want)
    assert "file: 3_Dense/config.json sha256 " in q.provenance


def test_prompts_that_are_null(folder):
    """No prompt, as an empty one; one may be the default."""
    edit(folder / PROMPTS, setting("prompts", {"query": None, "document": "", "x": "X: "}))
    assert convert(folder).prompts == {"query": "", "document": "", "x": "X: "}
    edit(folder / PROMPTS, setting("default_prompt_name", "query"))
    assert convert(folder).prompts == {"query": "", "document": "", "x": "X: "}
    edit(folder / PROMPTS, setting("default_prompt_name", "x"))
    assert refused(folder, "--out", "out.qemb").startswith(f"{PROMPTS}: default_prompt_name; ")


def test_pooling_through_make():
    def command(*args):
        return run_program("make", "-n", "-o", ".venv/.convert", "convert", "MODEL=x", *args,
                           cwd=ROOT)

    assert '"x"   --pooling "last"' in command("POOLING=last")
    assert "--pooling" not in command()


# ---- prompts and limits ------------------------------------------------------------------------


def prompted(folder, *args):
    edit(folder / PROMPTS, setting("prompts", {
        "query": "Query: ", "document": "Passage: ", "STS ü": "Compare: ", "none": None}))
    return convert(folder, *args)


NOTE = "documents have a prompt here, which only --document puts before them\n"


def test_a_prompt_of_documents_is_said(folder, capsys):
    q = prompted(folder)
    assert "note: " + NOTE in q.provenance and "note       " + NOTE in capsys.readouterr().out
    assert NOTE not in convert(folder, "--prompt", "document=").provenance


WAYS = [((), ""), (("--query",), "Query: "), (("--document",), "Passage: "),
        (("--prompt", "document"), "Passage: "), (("--prompt", "STS ü"), "Compare: "),
        (("--prompt", "none"), "")]


@pytest.mark.parametrize("options,prompt", WAYS)
def test_every_prompt_of_the_file_in_the_pipe(folder, options, prompt):
    prompted(folder)
    got = vectors_of(["the abc", ""], *options, model="out.qemb")
    want = vectors_of([prompt + "the abc", prompt], model="out.qemb")
    assert got.tobytes() == want.tobytes()
    assert got.shape == (2, SHAPE["hidden"])


def test_prompts_of_the_file_in_the_server(folder):
    prompted(folder)
    for options, prompt in WAYS[:5]:
        with server("--name", "small", *options, model="out.qemb") as s:
            got = s.embed(["the abc"])
        want = vectors_of([prompt + "the abc"], model="out.qemb")
        assert base64.b64decode(got[0]) == want.tobytes()


def test_info_says_window_prompts_and_dimensions(folder):
    add_dense(folder, rows=6)
    hf.save_json(folder / BERT, {"max_seq_length": 12})
    prompted(folder)
    lines = run_program(QEMB, "info", "-m", "out.qemb").splitlines()
    assert "longest text     12 tokens, up to 64 by --max-tokens" in lines
    assert "vector           6 numbers, fewer by --dim" in lines
    for name, text in ("query", "Query: "), ("document", "Passage: "), ("none", ""):
        assert f"prompt           {json.dumps(name)}: {json.dumps(text)}" in lines


def test_a_longer_text_than_max_seq_length(folder):
    """sentence-transformers cuts it there without a word. Here that is an error, or asked for."""
    hf.save_json(folder / BERT, {"max_seq_length": 12})
    convert(folder)
    text = "a b c d e f g h i j k l m n o p"  # 31 bytes, each a token but for " t"
    p = subprocess.run([QEMB, "-m", "out.qemb"], input=text.encode(), capture_output=True)
    assert p.returncode == 3 and b'"too_long"' in p.stdout
    got = vectors_of([text], "--truncate", model="out.qemb")
    assert got.tobytes() == vectors_of([text[:11]], model="out.qemb").tobytes()
    p = subprocess.run([QEMB, "-m", "out.qemb", "--max-tokens", "40"], input=text.encode(),
                       capture_output=True)
    assert stdout_of(p) != b""


# ---- tensors and adapters ----------------------------------------------------------------------


def test_a_wrong_prefix_shows_a_name_of_the_file(folder):
    save(folder / "model.safetensors", weights(prefix="model.model."))
    assert refused(folder) == (
        "embed_tokens.weight: missing tensor; the source has model.model.embed_tokens.weight (got "
        "24 missing, want none)")
    save(folder / "model.safetensors", {"x.y": ("F32", (1,), bytes(4))})
    assert refused(folder) == (
        "embed_tokens.weight: missing tensor; the source has x.y (got 24 missing, want none)")


def test_a_lora_alone(folder):
    """The folder that a training leaves: no config.json, no weights."""
    lora = folder.parent / "lora"
    lora.mkdir()
    hf.save_json(lora / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-Embedding-0.6B"})
    save(lora / "adapter_model.safetensors", {"x": ("F32", (1,), bytes(4))})
    message = refused(lora)
    assert message.startswith("adapter_config.json: an adapter (LoRA) alone, without the model "
                              "that it changes; merge it first: peft's AutoPeftModel")
    assert 'base_model_name_or_path "Qwen/Qwen3-Embedding-0.6B"' in message
    shutil.copytree(lora, folder, dirs_exist_ok=True)
    assert refused(folder).startswith("adapter_config.json: an adapter (LoRA), which transformers ")


def test_plain_source_has_no_notes(folder):
    q = convert(folder)
    assert q.use == PLAIN and "note:" not in q.provenance
