"""Operators with one size larger, their arithmetic and traffic with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import Family, OperatorWork

__all__ = ["growing_dims", "resized"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_PRODUCTS = (
    Family.MATMUL,
    Family.BATCHED_MATMUL,
    Family.GROUPED_MATMUL,
    Family.CONVOLUTION,
    Family.CONVOLUTION_BACKWARD,
)
_ATTENTION = (Family.ATTENTION, Family.ATTENTION_BACKWARD)


def growing_dims(work: OperatorWork) -> NDArray[np.bool_]:
    """(N, 4): is it a size of which the operator does more when it grows?

    All four of products and attention, and rows and row length of all others.
    """
    is_dense = np.isin(work.family, (*_PRODUCTS, *_ATTENTION))
    always = np.ones(work.count, np.bool_)
    is_size = np.stack([is_dense, always, always, is_dense], axis=1)
    return is_size & (work.family != Family.COLLECTIVE)[:, None]


def resized(work: OperatorWork, dim: IntArray | int, factor: float) -> OperatorWork:
    """``work`` with ``dims[:, dim]`` times ``factor`` (rounded up, at least 1) and no edges.

    Args:
        work: N operators.
        dim: (N,) or one for all: 0 to 3 for b, m, n, k.
        factor: of the dim.
    """
    rows = np.arange(work.count)
    dims = work.dims.copy()
    dims[rows, dim] = np.maximum(np.ceil(dims[rows, dim] * factor), 1.0)
    ratio = dims[rows, dim] / work.dims[rows, dim]
    traffic = _dense_elements(work.family, dims) / _dense_elements(work.family, work.dims)
    return replace(
        work,
        dims=dims,
        flop=work.flop * ratio,
        num_bytes=work.num_bytes * traffic,
        edges=np.zeros((2, 0), np.int64),
        edge_kind=np.zeros(0, np.int64),
    )


def _dense_elements(family: IntArray, dims: FloatArray) -> FloatArray:
    """Elements read and written when the operator's operands are dense."""
    b, m, n, k = dims.T
    product = b * (m * k + k * n + m * n)
    attention = 2 * b * k * (m + n)
    return np.where(
        np.isin(family, _PRODUCTS),
        product,
        np.where(np.isin(family, _ATTENTION), attention, b * m * n),
    )
