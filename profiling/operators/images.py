"""Convolutions, batch norm and pooling over images of (b, channels, height, width)."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, Work
from meshwright.profiling.operators.family import (
    FLOATS,
    MATRIX_FLOATS,
    Built,
    Family,
    Maker,
    doubled,
    log_int,
    size,
)

__all__ = ["IMAGES", "padding_of"]

_BOTH = (Direction.FWD, Direction.BWD)
_POOL_INDEX_BYTES = 8


def padding_of(kernel: int, stride: int) -> int:
    """Zeros on each side: windows keep their centers inside, or tile the image without any."""
    return (kernel - 1) // 2 if stride < kernel else 0


def _out(length: int, kernel: int, stride: int) -> int:
    return (length + 2 * padding_of(kernel, stride) - kernel) // stride + 1


def _out_area(dims: Dims) -> int:
    kernel, stride = size(dims, "kernel"), size(dims, "stride")
    height, width = size(dims, "height"), size(dims, "width")
    return _out(height, kernel, stride) * _out(width, kernel, stride)


def _image(dims: Dims, make: Maker) -> Tensor:
    return make.normal(*(size(dims, name) for name in ("b", "channels_in", "height", "width")))


def _conv2d(dims: Dims, make: Maker) -> Built:
    kernel, stride, groups = size(dims, "kernel"), size(dims, "stride"), size(dims, "groups")
    weight = make.normal(
        size(dims, "channels_out"), size(dims, "channels_in") // groups, kernel, kernel
    )
    padding = padding_of(kernel, stride)

    def call(image: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(image, weight, stride=stride, padding=padding, groups=groups)

    return Built(call=call, inputs=(_image(dims, make), weight))


def _conv2d_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    per_window = size(dims, "channels_in", "kernel", "kernel") // size(dims, "groups")
    results = size(dims, "b", "channels_out") * _out_area(dims)
    weights = size(dims, "channels_out") * per_window
    image = size(dims, "b", "channels_in", "height", "width")
    return doubled(
        Work(2 * results * per_window, (image + weights + results) * item_bytes), direction
    )


def _sample_conv2d(rng: np.random.Generator) -> Dims:
    length = int(rng.choice([7, 14, 28, 56, 112]))
    channels = log_int(rng, 32, 2048, 32)
    return {
        "b": log_int(rng, 1, 256),
        "channels_in": channels,
        "channels_out": int(channels * rng.choice([0.5, 1, 1, 2])),
        "kernel": int(rng.choice([1, 1, 3, 3, 3, 7])),
        "stride": int(rng.choice([1, 1, 2])),
        "height": length,
        "width": length,
        "groups": 1,
    }


def _batch_norm(dims: Dims, make: Maker) -> Built:
    channels = size(dims, "channels_in")
    mean, variance = make.normal(channels, grad=False), make.normal(channels, grad=False).abs()

    def call(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(image, mean, variance, weight, bias, training=True)

    return Built(
        call=call, inputs=(_image(dims, make), make.normal(channels), make.normal(channels))
    )


def _batch_norm_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """Scale and offset are read; backward reads the scale and writes both gradients."""
    numel = size(dims, "b", "channels_in", "height", "width")
    channels = size(dims, "channels_in")
    if direction is Direction.BWD:
        return Work(16 * numel, (3 * numel + 3 * channels) * item_bytes)
    return Work(8 * numel, (2 * numel + 2 * channels) * item_bytes)


def _sample_image(rng: np.random.Generator) -> Dims:
    length = int(rng.choice([7, 14, 28, 56, 112]))
    channels = log_int(rng, 32, 2048, 32)
    return {"b": log_int(rng, 1, 256), "channels_in": channels, "height": length, "width": length}


def _pool(dims: Dims, make: Maker) -> Built:
    kernel, stride = size(dims, "kernel"), size(dims, "stride")
    pool = F.max_pool2d if dims["variant"] == "max" else F.avg_pool2d
    padding = padding_of(kernel, stride)
    return Built(
        call=lambda image: pool(image, kernel, stride, padding), inputs=(_image(dims, make),)
    )


def _pool_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """One operation for each element of a window; the maximum's place is kept for backward."""
    results = size(dims, "b", "channels_in") * _out_area(dims)
    image = size(dims, "b", "channels_in", "height", "width")
    moved = (image + results) * item_bytes
    if dims["variant"] == "max":
        moved += results * _POOL_INDEX_BYTES
    ways = 2 if direction is Direction.BWD else 1
    return Work(ways * results * size(dims, "kernel", "kernel"), moved)


def _sample_pool(rng: np.random.Generator) -> Dims:
    dims = _sample_image(rng)
    length = size(dims, "height")
    if rng.random() < 0.5:
        return {**dims, "kernel": length, "stride": length, "variant": "avg"}
    return {**dims, "kernel": 3, "stride": 2, "variant": "max"}


IMAGES = (
    Family(
        name="conv2d",
        dims=(
            "b", "channels_in", "channels_out", "groups", "height", "kernel", "stride", "width",
        ),
        directions=_BOTH,
        dtypes=MATRIX_FLOATS,
        build=_conv2d,
        work=_conv2d_work,
        sample=_sample_conv2d,
        note="height and width of what it reads; padding (kernel - 1) / 2, none where windows tile",
    ),
    Family(
        name="batch_norm",
        dims=("b", "channels_in", "height", "width"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_batch_norm,
        work=_batch_norm_work,
        sample=_sample_image,
        note="in training",
    ),
    Family(
        name="pool",
        dims=("b", "channels_in", "height", "kernel", "stride", "variant", "width"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_pool,
        work=_pool_work,
        sample=_sample_pool,
        note="padding as conv2d",
    ),
)  # fmt: skip
