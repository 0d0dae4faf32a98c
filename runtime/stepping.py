"""The optimizer's step over a slice of the parameters at a time, so that its temporaries are few.

Every optimizer here works element by element, so parameters may be cut anywhere: each bucket of
slices has a torch optimizer of its own and gives the same numbers as one over everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.plans.plan import OptimizerSpec
from meshwright.profiling.optimizers import make_optimizer
from meshwright.spmd.parameters import STEP_BYTES

__all__ = ["SlicedOptimizer"]

_BYTES_PER_ELEMENT = 8
"""Temporaries at most: an fp32 copy of the gradient and AdamW's square root, or one of either in
fp64."""


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    start: int
    stop: int
    tensor: Tensor
    """A flat view of the parameter's elements."""


class SlicedOptimizer:
    """Updates tensors in place; holds the optimizer's state."""

    def __init__(
        self, spec: OptimizerSpec, tensors: Mapping[str, Tensor], *, step_bytes: int = STEP_BYTES
    ) -> None:
        """``tensors`` are contiguous; ``step_bytes``: room for the temporaries of a step."""
        self._buckets: list[list[_Slice]] = [[]]
        room = most = max(step_bytes // _BYTES_PER_ELEMENT, 1)
        for name, tensor in tensors.items():
            flat, start = tensor.view(-1), 0
            while start < flat.numel():
                if room == 0:
                    self._buckets.append([])
                    room = most
                stop = min(start + room, flat.numel())
                self._buckets[-1].append(_Slice(name, start, stop, flat[start:stop]))
                room -= stop - start
                start = stop
        self._optimizers = [
            make_optimizer(spec, [one.tensor for one in bucket]) for bucket in self._buckets
        ]

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Update by name; what has no gradient stays as it is, as in ``torch.optim``."""
        for bucket, optimizer in zip(self._buckets, self._optimizers, strict=True):
            if optimizer is None:
                continue
            for one in bucket:
                gradient = gradients.get(one.name)
                if gradient is not None:
                    part = gradient.reshape(-1)[one.start : one.stop]
                    one.tensor.grad = part.to(one.tensor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_bytes(self, names: Collection[str]) -> int:
        """Of the optimizer's state for some tensors; torch's scalar step counters left out."""
        found: defaultdict[str, int] = defaultdict(int)
        for bucket, optimizer in zip(self._buckets, self._optimizers, strict=True):
            for one in bucket:
                state = {} if optimizer is None else optimizer.state.get(one.tensor, {})
                found[one.name] += sum(
                    item.numel() * item.element_size()
                    for item in state.values()
                    if isinstance(item, torch.Tensor) and item.ndim > 0
                )
        return sum(found[name] for name in names)
