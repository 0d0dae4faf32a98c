"""Integrated model and batch parallelism on P_r x P_c grids (arXiv 1712.04432).

A fully connected layer Y = W X with d_out x d_in weights and a batch of B: P_r ranks share the rows
of W, P_c the columns of X. Words a rank sends in rings (the paper's bandwidth terms)::

    forward    all-gather of Y among P_r      B / P_c  d_out  (P_r - 1) / P_r
    backward   all-reduce of dX among P_r   2 B / P_c  d_in   (P_r - 1) / P_r
    weights    all-reduce of dW among P_c   2 |W| / P_r       (P_c - 1) / P_c

With P_r = 1 that is data parallelism, 2 (P - 1) / P |W|; with P_c = 1 pure model parallelism. The
words are counted from the collectives our plans contain. They scatter dX and gather X again where
the paper reduces dX on all ranks, which is as many words. The first layer needs no dX, and the last
one's Y is not gathered, since the loss is summed from its parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.cost.table import CollectiveCount
from meshwright.graph.opgraph import OpGraph
from meshwright.space.search import SearchContext
from meshwright.spmd.program import CollectiveKind
from tests.cost.plans import context_of, uniform_plan

BATCH, WIDTHS = 16, (32, 64, 16, 8)
OUTPUTS = ["inner4", "inner3", "inner"]
"""Widths 8, 16 and 64, so that each product is cut along its output."""

GRIDS = [(1, 8), (2, 4), (4, 2), (8, 1)]
Counts = dict[tuple[CollectiveKind, tuple[str, ...]], CollectiveCount]


class Layers(nn.Module):
    """Products without bias, each cut by its output rows."""

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise(WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def captured() -> OpGraph:
    return capture(Layers(), (torch.zeros(BATCH, WIDTHS[0]),)).graph


def words_sent(kind: CollectiveKind, num_ranks: int, num_bytes: float) -> float:
    """fp32 words a rank sends in the ring of one collective."""
    rounds = 2 if kind is CollectiveKind.ALL_REDUCE else 1
    return rounds * (num_ranks - 1) / num_ranks * num_bytes / 4


def total(counts: Iterable[Counts], sizes: dict[str, int], axis: str) -> float:
    """Words a rank sends along ``axis``; the loss, one word, is left out."""
    found = 0.0
    for stage in counts:
        for (kind, axes), item in stage.items():
            if axes == (axis,) and item.num_bytes > 4:
                found += words_sent(kind, sizes[axis], item.num_bytes)
    return found


def words_of_grid(context: SearchContext, rows: int, columns: int) -> tuple[float, float]:
    """Words of model and of data parallelism that a rank sends in one step on a grid."""
    plan = uniform_plan(context, dp_replicate=columns, tp=rows)
    shard = {"dp_replicate": ["batch"], "tp": OUTPUTS}
    segments = [msgspec.structs.replace(entry, shard=shard) for entry in plan.segments]
    plan = msgspec.structs.replace(plan, segments=segments)
    sizes = {"tp": rows, "dp_replicate": columns}
    model, data = context.model.collective_counts(plan), context.model.data_bytes(plan)
    return total(model, sizes, "tp"), total(data, sizes, "dp_replicate")


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_words_of_a_grid(rows: int, columns: int) -> None:
    context = context_of(captured(), "8xa100", BATCH)
    model, data = words_of_grid(context, rows, columns)
    num_weights = 32 * 64 + 64 * 16 + 16 * 8
    forward = BATCH / columns * (64 + 16) * (rows - 1) / rows
    backward = 2 * BATCH / columns * (64 + 16) * (rows - 1) / rows

    assert forward + backward == pytest.approx(model)
    assert 2 * num_weights / rows * (columns - 1) / columns == pytest.approx(data)


def test_the_edges_of_the_grid() -> None:
    """P_r = 1: 2 (P - 1) / P |W| and nothing else; P_c = 1: no word of data parallelism."""
    context = context_of(captured(), "8xa100", BATCH)

    assert (0.0, pytest.approx(2 * 7 / 8 * 3200)) == words_of_grid(context, 1, 8)
    assert (pytest.approx(3 * 16 * 80 * 7 / 8), 0.0) == words_of_grid(context, 8, 1)
