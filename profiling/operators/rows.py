"""What reads and writes m rows of n: element-wise operators, norms, softmax, sums, dropout.

Operations for each element: those of published tables of measurements where they have the
operator (add 1, softmax 5, layer norm 8, RMS norm 6, silu_mul 6), the backward pass twice the
forward. Traffic counts what each direction reads and writes of size m x n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, Work
from meshwright.profiling.operators.family import FLOATS, Built, Family, Maker, log_int, size

__all__ = ["ROWS"]

_FWD = (Direction.FWD,)
_BOTH = (Direction.FWD, Direction.BWD)
_NORM_EPSILON = 1e-5
_DROP_FRACTION = 0.1


def _rows_family(
    name: str,
    call: Callable[..., Tensor],
    *,
    flop: int,
    moves: tuple[int, int],
    num_inputs: int = 1,
    weights: int = 0,
    directions: tuple[Direction, ...] = _BOTH,
    mask_bytes: int = 0,
    note: str = "",
) -> Family:
    """A family of m rows of n.

    Args:
        name: Of the operator.
        call: Takes the inputs of (m, n), then the weights of (n,).
        flop: Of the forward pass for each element.
        moves: Tensors of (m, n) read and written by the forward and by the backward pass.
        num_inputs: Of (m, n).
        weights: Of (n,): a scale, then an offset.
        directions: Which passes there are.
        mask_bytes: For each element, written by the forward and read by the backward pass.
        note: See ``Family``.
    """

    def build(dims: Dims, make: Maker) -> Built:
        m, n = size(dims, "m"), size(dims, "n")
        rows = [make.normal(m, n) for _ in range(num_inputs)]
        return Built(call=call, inputs=(*rows, *(make.normal(n) for _ in range(weights))))

    def work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
        numel = size(dims, "m", "n")
        backward = direction is Direction.BWD
        moved = moves[1] if backward else moves[0]
        # Forward reads the weights; backward reads those that scale and writes all their gradients.
        vectors = weights + min(weights, 1) if backward else weights
        return Work(
            (2 if backward else 1) * flop * numel,
            numel * (moved * item_bytes + mask_bytes) + vectors * size(dims, "n") * item_bytes,
        )

    return Family(
        name=name,
        dims=("m", "n"),
        directions=directions,
        dtypes=FLOATS,
        build=build,
        work=work,
        sample=_sample_rows,
        note=note,
    )


def _sample_rows(rng: np.random.Generator) -> Dims:
    return {"m": log_int(rng, 32, 131072, 16), "n": log_int(rng, 128, 65536, 64)}


def _layer_norm(x_MN: Tensor, weight_N: Tensor, bias_N: Tensor) -> Tensor:
    return F.layer_norm(x_MN, (x_MN.shape[-1],), weight_N, bias_N, _NORM_EPSILON)


def _rms_norm(x_MN: Tensor, weight_N: Tensor) -> Tensor:
    return F.rms_norm(x_MN, (x_MN.shape[-1],), weight_N, _NORM_EPSILON)


def _sum(dims: Dims, make: Maker) -> Built:
    """Sums over the rows (the gradient of a bias) or over the columns (a mean of each row)."""
    dim = 0 if dims["variant"] == "over_rows" else 1
    x_MN = make.normal(size(dims, "m"), size(dims, "n"), grad=False)
    return Built(call=lambda x: x.sum(dim), inputs=(x_MN,))


def _sum_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    del direction  # there is only one
    kept = size(dims, "n" if dims["variant"] == "over_rows" else "m")
    numel = size(dims, "m", "n")
    return Work(numel, (numel + kept) * item_bytes)


def _sample_sum(rng: np.random.Generator) -> Dims:
    return {**_sample_rows(rng), "variant": str(rng.choice(["over_rows", "over_columns"]))}


ROWS = (
    _rows_family("add", torch.add, flop=1, moves=(3, 0), num_inputs=2, directions=_FWD),
    _rows_family("mul", torch.mul, flop=1, moves=(3, 5), num_inputs=2),
    _rows_family("div", torch.div, flop=1, moves=(3, 5), num_inputs=2),
    _rows_family("add_scalar", lambda x: x + 0.5, flop=1, moves=(2, 0), directions=_FWD),
    _rows_family("mul_scalar", lambda x: x * 0.5, flop=1, moves=(2, 2)),
    _rows_family("neg", torch.neg, flop=1, moves=(2, 2)),
    _rows_family("pow", torch.square, flop=1, moves=(2, 3), note="the square"),
    _rows_family("rsqrt", torch.rsqrt, flop=2, moves=(2, 3)),
    _rows_family("relu", F.relu, flop=1, moves=(2, 3)),
    _rows_family("tanh", torch.tanh, flop=5, moves=(2, 3)),
    _rows_family("gelu", F.gelu, flop=8, moves=(2, 3), note="exact, with erf"),
    _rows_family("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), flop=8, moves=(2, 3)),
    _rows_family("silu", F.silu, flop=5, moves=(2, 3)),
    _rows_family(
        "silu_mul",
        lambda gate, up: F.silu(gate) * up,
        flop=6,
        moves=(3, 5),
        num_inputs=2,
        note="traffic of one fused kernel; eager, it is two operators",
    ),
    _rows_family(
        "dropout",
        lambda x: torch.native_dropout(x, _DROP_FRACTION, train=True)[0],
        flop=2,
        moves=(2, 2),
        mask_bytes=1,
    ),
    _rows_family("softmax", lambda x: F.softmax(x, dim=-1), flop=5, moves=(2, 3)),
    _rows_family("layer_norm", _layer_norm, flop=8, moves=(2, 3), weights=2),
    _rows_family("rms_norm", _rms_norm, flop=6, moves=(2, 3), weights=1),
    Family(
        name="sum",
        dims=("m", "n", "variant"),
        directions=_FWD,
        dtypes=FLOATS,
        build=_sum,
        work=_sum_work,
        sample=_sample_sum,
    ),
)
