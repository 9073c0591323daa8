"""libqemb.so by ctypes: the part of qemb.h that this package uses."""
import ctypes
import os
from ctypes import POINTER, Structure, c_char, c_char_p, c_int, c_size_t, c_void_p


class Err(Structure):
    """qemb_err"""
    _fields_ = [("code", c_char_p), ("msg", c_char * 400)]


class Options(Structure):
    """qemb_options"""
    _fields_ = [("batch_tokens", c_int), ("max_tokens", c_int), ("mlp_rows", c_int),
                ("threads", c_int), ("device", c_int), ("deterministic", c_int),
                ("hopper", c_int), ("no_graphs", c_int), ("vram", c_size_t),
                ("cache_dir", c_char_p), ("on_layer_loaded", c_void_p),
                ("between_steps", c_void_p), ("between_arg", c_void_p)]


class TextOptions(Structure):
    """qemb_text_options"""
    _fields_ = [("prompt", c_char_p), ("truncate", c_int), ("dim", c_int)]


class Table(Structure):
    """The first members of qemb_ops."""
    _fields_ = [("name", c_char_p), ("math", c_int)]


_FUNCTIONS = {  # name: (result, arguments)
    "qemb_cpu_table": (POINTER(Table), [c_int]),
    "qemb_cpu_choose": (POINTER(Table), [c_char_p, c_int]),
    "qemb_batch_tokens": (c_int, [POINTER(Table)]),
    "qemb_embedder_open": (c_int, [POINTER(c_void_p), c_char_p, POINTER(Table), POINTER(Options),
                                   POINTER(Err)]),
    "qemb_embedder_close": (None, [c_void_p]),
    "qemb_embedder_dim": (c_int, [c_void_p]),
    "qemb_embedder_max_tokens": (c_int, [c_void_p]),
    "qemb_embedder_prompt": (c_char_p, [c_void_p, c_char_p]),
    "qemb_embedder_prompt_name": (c_char_p, [c_void_p, c_int]),
    "qemb_embedder_task_prompt": (c_int, [c_void_p, c_char_p, POINTER(c_void_p), POINTER(Err)]),
    "qemb_embed_texts": (c_int, [c_void_p, POINTER(TextOptions), c_void_p, c_void_p, c_int,
                                 c_void_p, POINTER(Err)]),
}

free = ctypes.CDLL(None).free
free.argtypes, free.restype = [c_void_p], None


def load(version: str) -> ctypes.CDLL:
    """The library: $QEMB_LIBRARY, or the one in this package. It must have this version, since
    the interface may change with every one."""
    path = os.environ.get("QEMB_LIBRARY") or os.path.join(os.path.dirname(__file__), "libqemb.so")
    try:
        lib = ctypes.CDLL(path)
        lib.qemb_version.restype = c_char_p
    except (OSError, AttributeError) as e:
        raise ImportError(f"{path}: cannot be used ({e}); install the package by pip, or name a "
                          "libqemb.so in QEMB_LIBRARY") from None
    found = lib.qemb_version().decode()
    if found != version:
        raise ImportError(f"{path}: another version (got {found}, want {version})")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
