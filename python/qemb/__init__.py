"""Vectors of texts by Qwen3-Embedding models and encoders, with the bits of the program qemb.

    import qemb

    model = qemb.Model("model.qemb")
    documents = model.embed(["Beijing is a city.", "Gravity attracts bodies."])
    query = model.embed(["capital of China"], query=True)
    cosines = documents @ query[0]
"""
from __future__ import annotations

import ctypes
import operator
import os
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from . import _library

__version__ = "0.1.0"
__all__ = ["Error", "Model"]

_MATHS = ("f32", "bf16", "int16", "int8")  # qemb_math
_CHUNK = 4096  # texts that are given to the library at a time, of which it computes one batch
_lib = _library.load(__version__)


class Error(Exception):
    """What qemb refuses. code: a short name that stays the same from version to version
    ("too_long", "invalid_utf8", "model_file"). index: which text, or None."""

    def __init__(self, code: str, message: str, index: int | None = None):
        super().__init__(code, message, index)
        self.code, self.message, self.index = code, message, index

    def __str__(self) -> str:
        if self.index is None:
            return self.message
        what = self.message[6:] if self.message.startswith("text: ") else self.message
        return f"texts[{self.index}]: {what}"


def _error_of(err: _library.Err, index: int | None = None) -> Error:
    return Error(err.code.decode(), err.msg.decode("utf-8", "replace"), index)


def _c_string(what: str, text: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(text)
    if 0 in encoded:
        raise Error("usage", f"{what}: NUL in it")
    return encoded


def _choose_table(cpu: str | None, math: str | None) -> Any:
    """The table of ops that the program's --cpu and --math would choose."""
    tables: dict[str, int] = {}
    while table := _lib.qemb_cpu_table(len(tables)):
        tables[table.contents.name.decode()] = table.contents.math
    number = tables.get(cpu or "", 0)
    if math is not None:
        if math not in _MATHS:
            raise Error("usage", f"math: no such arithmetic (got {math}, want {', '.join(_MATHS)})")
        number = _MATHS.index(math)
    name = None if cpu is None else _c_string("cpu", cpu)
    if found := _lib.qemb_cpu_choose(name, number):
        return found
    if _lib.qemb_cpu_choose(name, _MATHS.index("int8")):  # whose error is the largest
        raise Error("usage", f"math: a smaller error than that of cpu {cpu} (got {math})")
    raise Error("usage", f"cpu: not on this machine (got {cpu}, want {', '.join(tables)})")


def _how_to_convert(path: str) -> str:
    """What a message says behind the reason if there is no .qemb file at path."""
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"qemb":
                return ""
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        pass
    except OSError:
        return ""
    return (" (want a .qemb file; in qemb's source, make convert MODEL=DIRECTORY_OR_HUB_NAME "
            "OUT=model.qemb makes one)")


def _integer(name: str, value: int | None, least: int, most: int) -> int:
    """value, or 0 for None."""
    if value is None:
        return 0
    value = operator.index(value)
    if not least <= value <= most:
        raise Error("usage", f"{name}: out of range (got {value}, want {least}..{most})")
    return value


class Model:
    """A .qemb file of an embedding model, opened.

    math: "f32" (the default), "int16", "bf16" or "int8". cpu: instructions such as "avx2", or a
    table; by default the fastest. threads: by default all CPUs that the process may use.
    max_tokens: the longest text, by default the model's window. truncate: cuts longer texts, which
    are errors otherwise.

    Threads may share a model: it computes one batch at a time, and other Python threads run
    meanwhile. A forked process opens the file again when it first needs it. A pickled model is its
    path and its options."""

    def __init__(self, path: str | os.PathLike[str], math: str | None = None,
                 cpu: str | None = None, threads: int | None = None,
                 max_tokens: int | None = None, truncate: bool = False):
        self.path = os.path.abspath(os.fspath(path))
        self._arguments = (self.path, math, cpu, threads, max_tokens, truncate)
        self._truncate = bool(truncate)
        self._table = _choose_table(cpu, math)
        self._options = _library.Options(
            batch_tokens=_lib.qemb_batch_tokens(self._table),
            max_tokens=_integer("max_tokens", max_tokens, 1, 2**31 - 1),
            threads=_integer("threads", threads, 1, 4096))
        self._closed = False
        self._lock = threading.Lock()  # held while the library computes a batch
        self._open()
        _models.add(self)

    def _open(self) -> None:
        handle, err = ctypes.c_void_p(), _library.Err()
        if _lib.qemb_embedder_open(ctypes.byref(handle), _c_string("path", self.path), self._table,
                                   ctypes.byref(self._options), ctypes.byref(err)):
            error = _error_of(err)
            raise Error(error.code, error.message + _how_to_convert(self.path))
        self._handle: ctypes.c_void_p | None = handle
        self._finalize = weakref.finalize(self, _lib.qemb_embedder_close, handle)
        self._finalize.atexit = False  # a daemon thread may use it until the process ends
        self._dim: int = _lib.qemb_embedder_dim(handle)
        self._max_tokens: int = _lib.qemb_embedder_max_tokens(handle)
        self._prompts: dict[str, bytes] = {}
        while name := _lib.qemb_embedder_prompt_name(handle, len(self._prompts)):
            self._prompts[name.decode()] = _lib.qemb_embedder_prompt(handle, name)

    @contextmanager
    def _turn(self) -> Iterator[ctypes.c_void_p]:
        """The library's model, locked."""
        with self._lock:
            if self._closed:
                raise Error("closed", f"{self.path}: the model is closed")
            if self._handle is None:
                self._open()
            assert self._handle is not None
            yield self._handle

    @property
    def dim(self) -> int:
        """The numbers of a whole vector."""
        return self._dim

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text, with its prompt and the end-of-text."""
        return self._max_tokens

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name."""
        return {name: text.decode() for name, text in self._prompts.items()}

    @property
    def table(self) -> str:
        """The table of ops that computes, such as "avx512-int8"."""
        name: bytes = self._table.contents.name
        return name.decode()

    def embed(self, texts: Iterable[str], query: bool = False, prompt: str | None = None,
              instruct: str | None = None, dim: int | None = None,
              on_error: Callable[[Error], object] | None = None) -> np.ndarray:
        """-> float32 (n, dim): the texts' vectors, of length 1.

        Documents of most models have no prompt; those of multilingual-e5 have "document". query:
        the model's prompt "query". prompt: another one by its name. instruct: the prompt of a task,
        in the form of the model's own. dim: keeps the first numbers of a vector.

        A text that is too long, or not Unicode, raises Error with its index. With on_error it gets
        a row of NaN, on_error gets the Error, and the other texts are embedded."""
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts: one text (want a list: embed([text]))")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}]: not a str (got {type(text).__name__})")
        dim = self._dim if dim is None else operator.index(dim)
        if not 1 <= dim <= self._dim:
            raise Error("bad_dim", f"dim: out of range (got {dim}, want 1..{self._dim})")
        before = self._prompt_of(query, prompt, instruct)
        options = _library.TextOptions(before, self._truncate, dim)
        out = np.empty((len(texts), dim), np.float32)
        for at in range(0, len(texts), _CHUNK):
            self._embed_chunk(texts[at:at + _CHUNK], at, options, out, on_error)
        return out

    def _prompt_of(self, query: bool, name: str | None, task: str | None) -> bytes | None:
        if bool(query) + (name is not None) + (task is not None) > 1:
            raise Error("usage", "query, prompt and instruct: only one of them")
        if task is not None:
            return self._task_prompt(task)
        if query:
            name = "query"
        if name is None:
            return None
        if name not in self._prompts:
            raise Error("usage", f"prompt: not one of the model's (got {name!r}, want one of: "
                                 f"{', '.join(self._prompts) or 'none, it has no prompts'})")
        return self._prompts[name]

    def _task_prompt(self, task: str) -> bytes:
        if not task or "\0" in task:
            raise Error("usage", f"instruct: {'NUL in the task' if task else 'an empty task'} "
                                 "(leave it out for documents)")
        try:
            encoded = task.encode()
        except UnicodeEncodeError as e:
            raise Error("invalid_utf8", f"instruct: {e}") from None
        made, err = ctypes.c_void_p(), _library.Err()
        with self._turn() as handle:
            if _lib.qemb_embedder_task_prompt(handle, encoded, ctypes.byref(made),
                                              ctypes.byref(err)):
                raise _error_of(err)
        prompt = ctypes.string_at(made)
        _library.free(made)
        return prompt

    def _embed_chunk(self, texts: list[str], at: int, options: _library.TextOptions,
                     out: np.ndarray, on_error: Callable[[Error], object] | None) -> None:
        """out[at:at + n] = the vectors of texts (n). A lone surrogate becomes bytes that the
        library refuses. Between two batches Python gets its signals."""
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        n, done, err = len(data), 0, _library.Err()
        pointers = (ctypes.c_char_p * n)(*data)
        lengths = (ctypes.c_size_t * n)(*map(len, data))
        while done < n:
            with self._turn() as handle:
                count = _lib.qemb_embed_texts(
                    handle, ctypes.byref(options),
                    ctypes.byref(pointers, done * ctypes.sizeof(ctypes.c_char_p)),
                    ctypes.byref(lengths, done * ctypes.sizeof(ctypes.c_size_t)), n - done,
                    out.ctypes.data + (at + done) * out.strides[0], ctypes.byref(err))
            if count < 0:
                error = _error_of(err, at + done)
                if on_error is None:
                    raise error
                on_error(error)
                out[at + done] = np.nan
                count = 1
            done += count

    def close(self) -> None:
        """Frees the model's memory. It may be closed twice."""
        with self._lock:
            self._closed, self._handle = True, None
            self._finalize()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<qemb.Model {self.path!r}, dim {self._dim}, {self.table}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    """In the new process: a model's threads are not there, and its lock may be taken. Its memory is
    the parent's, shared; to free it would wait for the threads."""
    for model in list(_models):
        model._finalize.detach()
        model._handle, model._lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
