"""Prices of operators as training runs them."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.cost.training_kernels import TrainingKernels, as_forward
from meshwright.cost.work import DTYPES, Family, OperatorWork

FAMILIES = (Family.ATTENTION, Family.ATTENTION_BACKWARD, Family.MATMUL, Family.ELEMENTWISE)


def works() -> OperatorWork:
    return OperatorWork(
        family=np.array([int(family) for family in FAMILIES]),
        dtype=np.full(4, DTYPES.index("bfloat16")),
        dims=np.array([[1.0, 8, 8, 4], [1, 8, 8, 4], [1, 10, 20, 30], [1, 8, 8, 3]]),
        flop=np.array([1000.0, 2500.0, 12000.0, 64.0]),
        num_bytes=np.array([100.0, 250.0, 2200.0, 400.0]),
        edges=np.zeros((2, 0), dtype=np.int64),
        edge_kind=np.zeros(0, dtype=np.int64),
    )


def times(kernels: TrainingKernels) -> list[float]:
    is_cast = np.array([False, False, True, False])
    found = kernels.times_s(
        np.ones(4), works(), is_cast=is_cast, flop_per_s=100.0, bytes_per_s=100.0
    )
    return list(found.tolist())


def test_each_share_slows_its_own_operators() -> None:
    attention = TrainingKernels(attention_forward=0.5, attention_backward=0.8)

    assert [1.0, 1.0, 1.0, 1.0] == times(TrainingKernels())
    assert [2.0, 2.5, 1.0, 1.0] == times(attention)
    assert [1.0, 1.0, 1.25, 1.0] == times(TrainingKernels(sustained=0.8))


def test_casts_move_both_operands() -> None:
    """10 x 30 and 30 x 20 elements, 2 bytes each, at 100 B/s."""
    found = times(TrainingKernels(cast_bytes=2.0))

    assert pytest.approx([1.0, 1.0, 1.0 + 900 * 2 / 100, 1.0]) == found


def test_backward_of_attention_is_asked_as_its_forward() -> None:
    forward, count = as_forward(works())

    assert [1.0, 2.5, 1.0, 1.0] == count.tolist()
    assert int(Family.ATTENTION) == forward.family[1]
    assert (1000.0, 100.0) == (forward.flop[1], forward.num_bytes[1])
    assert works().flop[2] == forward.flop[2]
