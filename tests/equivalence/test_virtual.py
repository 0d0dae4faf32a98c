"""On virtual ranks in fp64, every plan is one step of plain PyTorch."""

from __future__ import annotations

from functools import lru_cache

import pytest

from meshwright.errors import PlanRefused
from tests.equivalence.recipes import MODELS, RECIPES, REFUSED
from tests.equivalence.subject import (
    Subject,
    built_in,
    largest_differences,
    on_virtual_ranks,
    plan_of,
)

TOLERANCE = 1e-10
REASON = r"needs the whole batch at once.*num_microbatches=1|no operator is cut along it"


@lru_cache(maxsize=1)
def _subject(model: str) -> Subject:
    return built_in(model)


WHOLE = {"tiny-gpt", "tiny-clip"}
"""Models that meet every plan in the quick tests too."""

MIXTURES = {
    "zero3 micro2 full",
    "sp2 full",
    "dp2 tp2 zero3 selective",
    "pp2 dp2 zero2 micro2",
    "pp2 dp2 tp2 zero1",
}
"""Plans that every model meets in the quick tests; with the others the grid is marked slow."""

GRID = [
    pytest.param(
        model, recipe, marks=() if model in WHOLE or recipe in MIXTURES else pytest.mark.slow
    )
    for model in MODELS
    for recipe in RECIPES
]


@pytest.mark.parametrize(("model", "recipe"), GRID)
def test_plan_equals_plain_pytorch(model: str, recipe: str) -> None:
    subject = _subject(model)
    plan = plan_of(subject, RECIPES[recipe])
    if recipe in REFUSED.get(model, ()):
        with pytest.raises(PlanRefused, match=REASON):
            on_virtual_ranks(subject, plan)
        return
    loss, gradients, parameters = largest_differences(subject, on_virtual_ranks(subject, plan))

    assert TOLERANCE >= loss
    assert TOLERANCE >= gradients
    assert TOLERANCE >= parameters
