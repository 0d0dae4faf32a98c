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


@lru_cache(maxsize=1)
def _subject(model: str) -> Subject:
    return built_in(model)


QUICK = {"tiny-gpt", "tiny-clip"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=() if model in QUICK else pytest.mark.slow) for model in MODELS],
)
def test_plan_equals_plain_pytorch(model: str, recipe: str) -> None:
    subject = _subject(model)
    plan = plan_of(subject, RECIPES[recipe])
    if recipe in REFUSED.get(model, ()):
        with pytest.raises(PlanRefused, match=r"needs the whole batch at once.*num_microbatches=1"):
            on_virtual_ranks(subject, plan)
        return
    loss, gradients, parameters = largest_differences(subject, on_virtual_ranks(subject, plan))

    assert TOLERANCE >= loss
    assert TOLERANCE >= gradients
    assert TOLERANCE >= parameters
