"""Optimizer steps over a list of parameters of one dtype, gradients and state in the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, Work
from meshwright.profiling.operators.family import FLOATS, Built, Family, Maker, log_int, size

__all__ = ["UPDATES"]

_OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}

_FLOPS = {"adam": 13, "adamw": 14, "sgd": 4}
"""For each parameter: Adam 3 for the mean, 4 for the square, 3 for the denominator, 3 for the
step; one more for decoupled decay; 4 for SGD with momentum."""

_MOVES = {"adam": 7, "adamw": 7, "sgd": 5}
"""Tensors of the parameters' size: parameter, gradient and state read, all but the gradient
written."""


def _family(name: str) -> Family:
    make_optimizer, options = _OPTIMIZERS[name]

    def build(dims: Dims, make: Maker) -> Built:
        parameters = [make.normal(count) for count in _sizes(dims)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        how = {"fused": dims["variant"] == "fused", "foreach": dims["variant"] == "foreach"}
        optimizer = make_optimizer(parameters, lr=1e-6, **options, **how)
        optimizer.step()  # makes the state

        def step(*_: Tensor) -> None:
            optimizer.step()

        return Built(call=step, inputs=(), can_compile=False)

    def work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
        del direction  # there is only one
        numel = size(dims, "numel")
        return Work(_FLOPS[name] * numel, _MOVES[name] * numel * item_bytes)

    return Family(
        name=name,
        dims=("num_tensors", "numel", "variant"),
        directions=(Direction.UPDATE,),
        dtypes=FLOATS,
        build=build,
        work=work,
        sample=_sample,
        note="parameters of equal size, numel of all of them together",
    )


def _sizes(dims: Dims) -> list[int]:
    """Elements of each parameter; they differ by one at most."""
    numel, count = size(dims, "numel"), size(dims, "num_tensors")
    return [numel * (index + 1) // count - numel * index // count for index in range(count)]


def _sample(rng: np.random.Generator) -> Dims:
    num_tensors = log_int(rng, 1, 256)
    return {
        "numel": num_tensors * log_int(rng, 256, 2**22, 256),
        "num_tensors": num_tensors,
        "variant": str(rng.choice(["fused", "foreach"])),
    }


UPDATES = tuple(_family(name) for name in _OPTIMIZERS)
