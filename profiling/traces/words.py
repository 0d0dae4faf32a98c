"""Types, directions and collectives as profilers, PyTorch, NCCL and tables call them, in our words.

Ours are those of ``meshwright.records.kinds``; whoever writes Records uses them, so that one query
finds what was measured here and what was imported.
"""

from __future__ import annotations

import re

from meshwright.records.kinds import COLLECTIVES, DIRECTIONS, DTYPES

__all__ = ["collective_of", "direction_of", "dtype_of", "item_bytes_of"]

_DTYPES = {name: name for name in DTYPES} | {
    "float": "fp32", "float32": "fp32", "single": "fp32",
    "double": "fp64", "float64": "fp64",
    "half": "fp16", "float16": "fp16",
    "bfloat16": "bf16",
    "f8e4m3": "fp8", "fp8_e4m3": "fp8", "float8_e4m3fn": "fp8", "float8_e4m3": "fp8",
    "f8e5m2": "fp8_e5m2", "float8_e5m2": "fp8_e5m2",
    "int": "int32", "long": "int64", "long int": "int64", "long long": "int64",
    "short": "int16", "short int": "int16",
    "char": "int8", "signed char": "int8", "byte": "uint8", "unsigned char": "uint8",
    "complexfloat": "complex64", "c10::complex<float>": "complex64",
    "complexdouble": "complex128", "c10::complex<double>": "complex128",
}  # fmt: skip

_DIRECTIONS = {name: name for name in DIRECTIONS} | {
    "forward": "fwd", "backward": "bwd", "optimizer": "update",
}  # fmt: skip

_ITEM_BYTES = {
    "complex128": 16, "fp64": 8, "int64": 8, "uint64": 8, "complex64": 8, "fp32": 4, "int32": 4,
    "uint32": 4, "fp16": 2, "bf16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "fp8": 1, "fp8_e5m2": 1,
}  # fmt: skip


def dtype_of(word: object) -> str | None:
    """Our name (``fp32``) of a type of elements; None if ``word`` is none."""
    if not isinstance(word, str):
        return None
    text = word.strip().lower()
    return _DTYPES.get(text) or _DTYPES.get(re.sub(r"^(c10::|at::|torch\.|nccl)", "", text))


def item_bytes_of(dtype: str | None) -> int | None:
    """Of one element of a type by our name; None where it is not a whole number or not known."""
    return _ITEM_BYTES.get(dtype or "")


def direction_of(word: str) -> str | None:
    """Our name (``fwd``) of a part of a training step; None if ``word`` is none."""
    return _DIRECTIONS.get(word.strip().lower())


def collective_of(word: str) -> str | None:
    """Our name of a collective that a table names so or with other separators, else None."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    return next((name for name in COLLECTIVES if name.replace("_", "") == letters), None)
