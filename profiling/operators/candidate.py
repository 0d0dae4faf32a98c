"""One operator measurement that could be made: operator, direction, dtype and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from meshwright.records import Kind, Record, Scalar

__all__ = ["Candidate", "Dims", "Direction", "DtypeName", "Work", "key_of_record"]

Dims = Mapping[str, int | bool | str]
"""What a family's operator is described by, by the keys of Records of operators."""


class Direction(StrEnum):
    """Which part of a training step."""

    FWD = "fwd"
    BWD = "bwd"
    """Only the backward pass, of every differentiable input."""
    UPDATE = "update"


class DtypeName(StrEnum):
    """Element types by the names Records use; ``tf32`` is fp32 whose products are rounded."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"

    @property
    def num_bytes(self) -> int:
        """Of one element."""
        return {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}[self.value]


class Work(NamedTuple):
    """What one call has to do at least."""

    flop: int
    """Floating-point operations; a multiply-add counts two."""
    bytes: int
    """Traffic: inputs and weights read once, results written once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One operator with its sizes; two of one ``key`` are the same measurement."""

    op: str
    direction: Direction
    dtype: DtypeName
    dims: tuple[tuple[str, int | bool | str], ...]
    """Sorted by key."""
    compiled: bool = False
    model: str = ""
    """The model these sizes are of; empty where they were drawn."""
    tp: int = 0
    """Tensor-parallel degree that cut the model; 0 where they were drawn."""
    role: str = ""
    """Where in the model it stands."""

    @property
    def sizes(self) -> dict[str, int | bool | str]:
        """``dims`` as a mapping."""
        return dict(self.dims)

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies the measurement on one machine."""
        return (self.op, str(self.direction), str(self.dtype), self.dims, self.compiled)

    @property
    def group(self) -> tuple[object, ...]:
        """What measurements have in common that are compared by their sizes."""
        words = tuple(value for _, value in self.dims if isinstance(value, bool | str))
        return (self.op, str(self.direction), str(self.dtype), words, self.compiled)

    def __str__(self) -> str:
        sizes = ", ".join(f"{key} {value}" for key, value in self.dims)
        how = " compiled" if self.compiled else ""
        return f"{self.op} {self.direction} {self.dtype}{how} ({sizes})"

    def extra(self) -> dict[str, Scalar]:
        """The keys of the Record that say what was measured."""
        found: dict[str, Scalar] = {
            **dict(self.dims),
            "direction": str(self.direction),
            "dtype": str(self.dtype),
            "compiled": self.compiled,
        }
        if self.model:
            found |= {"model": self.model, "tp": self.tp}
        if self.role:
            found["role"] = self.role
        return found


def key_of_record(record: Record, dim_names: Mapping[str, tuple[str, ...]]) -> object:
    """``Candidate.key`` of what a Record measured; None where it is none of ours.

    Args:
        record: Of any kind.
        dim_names: For each operator the names of its sizes.
    """
    if record.kind != Kind.OPERATOR or record.name not in dim_names:
        return None
    extra = record.extra
    dims = tuple((name, extra.get(name)) for name in sorted(dim_names[record.name]))
    compiled = bool(extra.get("compiled", False))
    return (record.name, extra.get("direction"), extra.get("dtype"), dims, compiled)
