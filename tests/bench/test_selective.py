"""What frameworks mean by selective recompute."""

from __future__ import annotations

import numpy as np

from meshwright.bench.predict import Predictor
from meshwright.bench.selective import kept_nodes
from meshwright.bench.software import Selective
from meshwright.cost.columns import FORWARD
from meshwright.cost.table import CostTable
from meshwright.cost.work import Family
from meshwright.plans.plan import Recompute
from tests.bench.given_runs import run


def recomputed(table: CostTable, selective: Selective) -> dict[Family, int]:
    """How many operators of a family run again."""
    found = table.with_kept(kept_nodes(table.columns.nodes, selective))
    rows = found.activations((Recompute.SELECTIVE,) * found.num_segments).recomputed
    nodes = table.columns.nodes
    real = rows[~nodes.is_view[rows]]
    assert (FORWARD == nodes.phase[real]).all()
    families, counts = np.unique(nodes.family[real], return_counts=True)
    return {Family(int(f)): int(n) for f, n in zip(families, counts, strict=True)}


def test_what_runs_again() -> None:
    table = Predictor().priced(run(flash_attention=True, arch="llama", gated_mlp=True)).table
    own = recomputed(table, Selective.POINTWISE)
    core = recomputed(table, Selective.CORE_ATTENTION)
    second = recomputed(table, Selective.EVERY_SECOND_PRODUCT)

    assert 0 == own.get(Family.MATMUL, 0)
    assert own.get(Family.NORM, 0) > 0
    assert core[Family.ATTENTION] > 0
    assert {Family.ATTENTION, Family.COPY} >= set(core)
    assert second[Family.MATMUL] > 0
    assert 0 == second.get(Family.ATTENTION, 0)
