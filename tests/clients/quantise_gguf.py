"""Quantise GGUF files with llama.cpp's own library, as node-llama-cpp ships it: python quantise_gguf.py LIBRARY JOBS

JOBS is a JSON list of [from, to, number of the type (llama_ftype), file of an imatrix or null]. Every tensor of two
dimensions or more gets the one type (llama-quantize --pure), but routers stay F32, embedding and head get Q8_0. The
imatrix is an npz of means of squares by tensor name, of all experts in a row. Only ctypes and numpy are needed; an
abort of the library ends this process alone.
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy

Q8_0 = 8  # its number among the ggml types


class Imatrix(ctypes.Structure):
    """struct llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Settings(ctypes.Structure):
    """struct llama_model_quantize_params."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, ctypes.c_bool) for name in ("keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(Imatrix)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", ctypes.c_size_t),
    )


def quantise(library: ctypes.CDLL, source: str, to: str, kind: int, imatrix: str | None) -> None:
    settings: Settings = library.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.pure = 1, kind, True
    settings.output_tensor_type = settings.token_embedding_type = Q8_0
    if imatrix is not None:
        with numpy.load(imatrix) as file:
            means = {name: numpy.ascontiguousarray(file[name], numpy.float32).ravel() for name in file.files}
        entries = (Imatrix * (len(means) + 1))()  # the last one, empty, ends the list
        for entry, (name, values) in zip(entries, means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    if library.llama_model_quantize(source.encode(), to.encode(), ctypes.byref(settings)):
        raise SystemExit(f"{source} to type {kind} failed")


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    library.llama_model_quantize_default_params.restype = Settings
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Settings))
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_backend_init()
    for job in json.loads(sys.argv[2]):
        quantise(library, *job)


if __name__ == "__main__":
    main()
