"""On gloo processes every plan is one step of plain PyTorch: fp64 to 1e-10, fp32 to 1e-5."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from meshwright.plans.plan import Precision
from tests.equivalence.processes import lowered, run_on_processes
from tests.equivalence.recipes import MODELS, RECIPES, REFUSED
from tests.equivalence.subject import built_in, plan_of

TOLERANCE = {Precision.FP64: 1e-10, Precision.FP32: 1e-5}

QUICK = {
    2: {
        "tiny-gpt": ("zero1", "tp2", "pp2 micro4"),
        "tiny-moe": ("ep2 micro2", "zero3 micro2 full"),
    },
    4: {
        "tiny-gpt": ("dp2 tp2 zero3 selective", "pp2 dp2 zero2 micro2"),
        "tiny-clip": ("hsdp zero3",),
    },
    8: {"tiny-llama": ("pp2 dp2 sp2 zero2 micro2 full",)},
}


def _check(num_ranks: int, plans: dict[str, Sequence[str]], precision: Precision) -> None:
    runs = []
    for model, names in plans.items():
        subject = built_in(model, precision=precision)
        runs += [
            lowered(f"{model}, {name}", subject, plan_of(subject, RECIPES[name])) for name in names
        ]
    found = run_on_processes(runs, num_ranks=num_ranks)

    assert [run.name for run in runs] == [one.name for one in found]
    assert {} == {one.name: one for one in found if not one.worst <= TOLERANCE[precision]}


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", sorted(QUICK))
def test_some_plans_in_fp64(num_ranks: int) -> None:
    _check(num_ranks, QUICK[num_ranks], Precision.FP64)


@pytest.mark.dist
def test_some_plans_in_fp32() -> None:
    _check(4, QUICK[4], Precision.FP32)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", sorted(QUICK))
def test_all_plans_in_fp64(num_ranks: int) -> None:
    plans = {
        model: [
            name
            for name, recipe in RECIPES.items()
            if recipe.num_devices == num_ranks and name not in REFUSED.get(model, ())
        ]
        for model in MODELS
    }
    _check(num_ranks, plans, Precision.FP64)
