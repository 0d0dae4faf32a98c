"""What kernels of training take beyond the price of an operator measured alone and for a moment.

- The backward of fused attention computes the scores again: five products where the forward has
  two, at a lower rate (arXiv 2205.14135; 2307.08691 and 2407.08608 print both rates). Tables of
  measured operators come from inference, so it is priced as its forward, ``BACKWARD_PRODUCTS``
  times, over ``attention_backward``.
- The kernels a framework trains with may be older than those of the tables: ``attention_forward``.
- Long runs of matrix products are held back by the board's power where a short measurement is not:
  ``Device.sustained_share``.
- Products in fp8 or four bits read operands that were rounded first: each is read once more and
  written for every use, with a pass for its largest value where scales are not delayed:
  ``cast_bytes`` for every element of both operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray
from meshwright.cost.work import Family, OperatorWork

__all__ = ["BACKWARD_PRODUCTS", "PLAIN", "TrainingKernels", "as_forward"]

BACKWARD_PRODUCTS = 2.5
"""Of fused attention, over its forward's."""

_PRODUCTS = (
    Family.MATMUL,
    Family.BATCHED_MATMUL,
    Family.GROUPED_MATMUL,
    Family.CONVOLUTION,
    Family.CONVOLUTION_BACKWARD,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingKernels:
    """Shares of the rate an operator's price stands for."""

    attention_forward: float = 1.0
    attention_backward: float = 1.0
    """Over the forward's."""
    sustained: float = 1.0
    """Of products that arithmetic bounds."""
    cast_bytes: float = 0.0
    """For each element of both operands of a product that is cast."""

    def times_s(
        self,
        time_s: FloatArray,
        work: OperatorWork,
        *,
        is_cast: np.ndarray,
        flop_per_s: FloatArray,
        bytes_per_s: float,
    ) -> FloatArray:
        """(N,) ``time_s`` of operators as training runs them; bounded below by ``time_s``."""
        rate = np.ones(len(time_s))
        rate[work.family == Family.ATTENTION] = self.attention_forward
        rate[work.family == Family.ATTENTION_BACKWARD] = (
            self.attention_forward * self.attention_backward
        )
        is_product = np.isin(work.family, _PRODUCTS)
        is_bound = work.flop / flop_per_s >= work.num_bytes / bytes_per_s
        rate[is_product & is_bound] = self.sustained
        found = time_s / rate
        if self.cast_bytes:
            b, m, n, k = work.dims.T
            operands = np.where(is_cast, b * (m * k + k * n), 0.0)
            found = found + operands * self.cast_bytes / bytes_per_s
        return np.asarray(found)


PLAIN = TrainingKernels()
"""Operators as measured."""


def as_forward(work: OperatorWork) -> tuple[OperatorWork, FloatArray]:
    """``work`` with each backward of attention as one forward, and (N,) how many of them it is."""
    is_backward = work.family == Family.ATTENTION_BACKWARD
    times = np.where(is_backward, BACKWARD_PRODUCTS, 1.0)
    if not is_backward.any():
        return work, times
    forward = OperatorWork(
        family=np.where(is_backward, int(Family.ATTENTION), work.family),
        dtype=work.dtype,
        dims=work.dims,
        flop=work.flop / times,
        num_bytes=work.num_bytes / times,
        edges=work.edges,
        edge_kind=work.edge_kind,
    )
    return forward, times
