"""What the rules cover, and what is said of operators they do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.cluster import parse_cluster
from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.coverage import RuleCoverage, rule_coverage
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import JobSpec
from meshwright.solvers.planner import make_context
from tests.cost.graphs import two_linear


class Triangular(nn.Module):
    """Solves a triangular system, for which there is no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        upper = torch.triu(self.layer.weight)
        return torch.linalg.solve_triangular(upper, x.t(), upper=True).sum()


def coverage_of(graph: object) -> RuleCoverage:
    found = analyze_graph(with_explicit_factories(graph))  # type: ignore[arg-type]
    return rule_coverage(found.analysis, found.segmentation, found.labels)


def test_two_products_are_covered() -> None:
    """16 x 4 x 8 and 16 x 8 x 2 products, two operations each; x needs no gradient: 2 + 3 of them.

    Forward 2 (512 + 256), backward 2 (512 + 2 x 256).
    """
    found = coverage_of(two_linear(16))
    (product,) = [item for item in found.operators if item.target == "aten.mm.default"]

    assert () == found.without_rule
    assert 1.0 == found.covered_fraction == found.covered_flop_fraction
    assert (5, 2 * (512 + 256) + 2 * (512 + 2 * 256)) == (product.count, product.flop)
    assert product == found.operators[0]
    assert {16, 4, 8} <= {size for segment in found.segments for size in segment.sizes.values()}


def test_an_operator_without_a_rule_is_replicated_and_named() -> None:
    graph = capture(Triangular(), (torch.zeros(8, 4),)).graph
    found = coverage_of(graph)
    said: list[str] = []
    make_context(
        graph,
        reference="test",
        cluster=parse_cluster("cpu:2"),
        job=JobSpec(global_batch=8),
        progress=said.append,
    )

    assert "aten.linalg_solve_triangular.default" in found.without_rule
    assert 1 > found.covered_fraction > 0.5
    assert any("linalg_solve_triangular.default has no rule" in line for line in said)
