"""Mixtures that do not fit exactly are solved again with less room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from meshwright.plans.plan import Recompute
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.layerwise import LayerwiseDP
from meshwright.solvers.mixture import Mixture, best_mixture, polished
from meshwright.solvers.refit import refitted
from tests.cost.graphs import tiny_gpt, zoo
from tests.solvers.test_layerwise import middle_bytes, recompute_space, tight_context


@dataclass(frozen=True)
class Answer:
    mixture: Mixture | None


def test_a_mixture_leaves_the_room_it_is_told_to() -> None:
    """Uniform plans are estimated exactly and need none."""
    mixed = []
    memory = middle_bytes(tiny_gpt(), 16, 1)
    space = recompute_space(tight_context(tiny_gpt(), 16, memory, cpus=2), 1)
    for spare in (0.0, 0.005, 0.01, 0.05):
        mixture, _ = best_mixture(space, spare=spare)

        assert mixture is not None
        better, _ = polished(space, mixture, spare=spare)
        found = space.evaluate(better.assignment[None], better.starts[None], simulate=False)

        assert better.fits
        mixed.append(len(set(better.assignment.tolist())) > 1)
        assert found.excess[0] <= (-spare if mixed[-1] else 0.0)
    assert any(mixed[1:])


def test_what_does_not_fit_is_solved_again_with_what_was_missing_left_free() -> None:
    """The first answer recomputes nothing and says that it fits; it does not."""
    memory = middle_bytes(tiny_gpt(), 16, 1)
    context = tight_context(tiny_gpt(), 16, memory, cpus=2)
    space = recompute_space(context, 1)
    by_policy = {s.recompute: number for number, s in enumerate(space.strategies)}
    start = np.zeros(1, np.int64)
    asked: list[float] = []

    def again(spare: float) -> Answer:
        asked.append(spare)
        leanest = np.full(space.num_segments, by_policy[Recompute.FULL])
        return Answer(Mixture(leanest, start, 1.0, 0.0))

    fastest = np.full(space.num_segments, by_policy[Recompute.NONE])
    first = Answer(Mixture(fastest, start, 1.0, 0.0))
    (found,) = refitted(context, space, first, again, solver="test")

    assert found.cost.fits
    assert 1 == len(asked)
    assert 0.0 < asked[0] < 0.01


def test_what_never_fits_is_given_up() -> None:
    context = tight_context(tiny_gpt(), 16, 10**4, cpus=2)
    space = recompute_space(context, 1)
    liar = Answer(Mixture(np.zeros(space.num_segments, int), np.zeros(1, int), 1.0, 0.0))
    asked: list[float] = []

    def again(spare: float) -> Answer:
        asked.append(spare)
        return liar

    assert () == refitted(context, space, liar, again, solver="test")
    assert sorted(asked) == asked
    assert 0 < len(asked) < 10


@pytest.mark.parametrize("model", ["tiny-gpt", "tiny-llama"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_mixtures_never_lose_to_the_best_uniform_plan(model: str, share: float) -> None:
    graph = zoo(model, 64)
    roomy, leanest = (
        Exhaustive().propose(tight_context(graph, 64, memory, cpus=2)).candidates[0]
        for memory in (10**12, 10**3)
    )
    low, high = (float(c.cost.memory.peak_bytes.max()) for c in (leanest, roomy))
    context = tight_context(graph, 64, int(low + share * (high - low)), cpus=2)
    frontier = Frontier(context)
    uniform = Exhaustive(frontier.survey).propose(context).candidates[0]
    mixed = LayerwiseDP(frontier).propose(context).candidates

    assert uniform.cost.fits
    assert mixed[0].time_s <= uniform.time_s * (1 + 1e-9)
