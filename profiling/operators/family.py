"""What a family of operators is: how inputs are made, what is called, how much work that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshwright.profiling.operators.candidate import Candidate, Dims, Direction, DtypeName, Work

__all__ = [
    "ALL_FLOATS",
    "FLOATS",
    "MATRIX_FLOATS",
    "Built",
    "Family",
    "Maker",
    "doubled",
    "log_int",
    "size",
]

FLOATS = frozenset({DtypeName.FP32, DtypeName.BF16, DtypeName.FP16})
MATRIX_FLOATS = FLOATS | {DtypeName.TF32}
ALL_FLOATS = MATRIX_FLOATS | {DtypeName.FP8}

_TORCH_DTYPES = {
    DtypeName.FP32: torch.float32,
    DtypeName.TF32: torch.float32,
    DtypeName.BF16: torch.bfloat16,
    DtypeName.FP16: torch.float16,
    DtypeName.FP8: torch.float8_e4m3fn,
}


class Maker:
    """Makes seeded tensors on one device."""

    def __init__(self, dtype: DtypeName, device: str, seed: int = 0) -> None:
        self.dtype_name = dtype
        self.dtype = _TORCH_DTYPES[dtype]
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        """Standard normal values in the dtype; asks for a gradient unless told otherwise."""
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return made.to(self.dtype).requires_grad_(grad)

    def indices(self, *shape: int, below: int) -> Tensor:
        """Integers from 0 to ``below`` - 1."""
        return torch.randint(below, shape, generator=self._generator, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Inputs and what is called on them."""

    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    can_compile: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Operators of one name."""

    name: str
    dims: tuple[str, ...]
    """Keys of Records that describe the sizes; sorted."""
    directions: tuple[Direction, ...]
    dtypes: frozenset[DtypeName]
    build: Callable[[Dims, Maker], Built]
    work: Callable[[Dims, Direction, int], Work]
    """Of sizes, direction and bytes of an element."""
    sample: Callable[[np.random.Generator], Dims]
    """Sizes drawn where models live."""
    note: str = ""
    """What its counts leave out, where that is not evident."""

    def candidate(
        self,
        dims: Dims,
        direction: Direction,
        dtype: DtypeName,
        *,
        compiled: bool = False,
        model: str = "",
        tp: int = 0,
        role: str = "",
    ) -> Candidate:
        """The candidate of these sizes."""
        assert set(dims) == set(self.dims), f"{self.name}: sizes {sorted(dims)}, not {self.dims}"
        return Candidate(
            op=self.name,
            direction=direction,
            dtype=dtype,
            dims=tuple(sorted(dims.items())),
            compiled=compiled,
            model=model,
            tp=tp,
            role=role,
        )

    def work_of(self, candidate: Candidate) -> Work:
        """What one call of ``candidate`` has to do."""
        return self.work(candidate.sizes, candidate.direction, candidate.dtype.num_bytes)


def size(dims: Dims, *names: str) -> int:
    """Product of the integer sizes of these names."""
    return math.prod(int(dims[name]) for name in names)


def log_int(rng: np.random.Generator, low: int, high: int, multiple: int = 1) -> int:
    """A multiple of ``multiple`` between ``low`` and ``high``, log-uniform before it is rounded."""
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(round(drawn / multiple), math.ceil(low / multiple)), high // multiple) * multiple


def doubled(work: Work, direction: Direction) -> Work:
    """``work`` of the forward pass, twice in the backward: two products of the same sizes."""
    factor = 2 if direction is Direction.BWD else 1
    return Work(factor * work.flop, factor * work.bytes)
