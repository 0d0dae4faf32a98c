"""A user's own module is cut by a plan like a built-in one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.plans.plan import Recompute
from meshwright.runtime.mesh import layout_of
from meshwright.runtime.virtual import VirtualCluster
from meshwright.spmd.prepared import lower_plan
from tests.equivalence.subject import (
    BATCH,
    Recipe,
    Subject,
    largest_differences,
    on_virtual_ranks,
    plan_of,
    subject_of,
)
from tests.equivalence.user_modules import SkipNet, TiedTagger, TwoViews

TP = ("vocab", "inner", "inner2", "inner3", "hidden")

RECIPES = {
    "dp2 micro2": Recipe({"dp_replicate": 2}, {"dp_replicate": BATCH}, micro=2),
    "zero3": Recipe({"dp_shard": 2}, {"dp_shard": BATCH}, zero=3, recompute=Recompute.FULL),
    "tp2": Recipe({"tp": 2}, {"tp": TP}),
    "pp2 micro4": Recipe({"pp": 2}, micro=4),
    "pp2 dp2 zero1 micro2": Recipe({"pp": 2, "dp_shard": 2}, {"dp_shard": BATCH}, zero=1, micro=2),
    "dp2 tp2 zero2": Recipe({"dp_shard": 2, "tp": 2}, {"dp_shard": BATCH, "tp": TP}, zero=2),
}


def _arguments(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if name == "skips":
        x, target = torch.randn(2, 8, 16, dtype=torch.float64)
        return SkipNet().double(), (x, target), {}
    if name == "tied":
        tokens, tags = torch.randint(0, 48, (2, 8, 6))
        return TiedTagger().double(), (tokens,), {"tags": tags}
    views = {
        "left": torch.randn(8, 12, dtype=torch.float64),
        "right": torch.randn(8, 8, dtype=torch.float64),
    }
    labels = torch.randint(0, 4, (8,))
    return TwoViews().double(), (views, labels), {"mix": 0.25, "signed": True}


@lru_cache(maxsize=3)
def _subject(name: str) -> Subject:
    model, args, kwargs = _arguments(name)
    return subject_of(name, model, args, kwargs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["skips", "tied", "views"])
def test_plan_equals_plain_pytorch(name: str, recipe: str) -> None:
    subject = _subject(name)
    found = on_virtual_ranks(subject, plan_of(subject, RECIPES[recipe]))

    assert max(largest_differences(subject, found)) <= 1e-10


@pytest.mark.parametrize("recipe", ["dp2 micro2", "pp2 micro4", "dp2 tp2 zero2"])
def test_outputs_are_those_of_the_module(recipe: str) -> None:
    """A batch of outputs is put together again, a mean is that of the whole batch."""
    model, args, kwargs = _arguments("skips")
    expected = model(*args, **kwargs)
    subject = _subject("skips")
    plan = plan_of(subject, RECIPES[recipe])
    cluster = VirtualCluster(
        lower_plan(subject.prepared, plan),
        layout_of(plan),
        subject.state.__getitem__,
        schedule=plan.schedule,
        num_microbatches=plan.num_microbatches,
        optimizer=plan.job.optimizer,
    )
    found = cluster.full_outputs(cluster.step(subject.data))

    for name in ("prediction", "smoothness"):
        torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-12, atol=1e-14)
