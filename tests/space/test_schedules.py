"""Schedules tried for a decision, and the plans they give."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plans.checks import check_structure
from meshwright.plans.plan import ScheduleName
from meshwright.space.decision import Decision, Sharding, Skeleton, Strategy
from meshwright.space.evaluate import candidate_of_decision
from meshwright.space.pins import Pins
from meshwright.space.schedules import with_schedules
from meshwright.space.search import Candidate, SearchContext
from tests.cost.graphs import zoo
from tests.cost.plans import context_of

REFERENCE = "tiny-gpt?num_layers=8&hidden=256&num_heads=4&vocab_size=64&seq_len=256"


def pipeline(num_microbatches: int = 4) -> tuple[SearchContext, Decision]:
    """Eight blocks on four A100s, a stage each."""
    context = context_of(zoo(REFERENCE, 32), "4xa100-80gb", 32)
    classes = context.model.segment_classes
    strategy = Strategy(sharding=Sharding(name="replicate", by_class=((),) * len(set(classes))))
    return context, Decision(
        skeleton=Skeleton.of({}, num_stages=4, num_microbatches=num_microbatches),
        starts=(0, 6, 10, 14),
        strategies=(strategy,) * len(classes),
    )


def candidates(context: SearchContext, decision: Decision) -> dict[str, Candidate]:
    """By schedule, number of stages, and whether sequences are sliced."""
    found = {}
    for variant in with_schedules(context, decision):
        name = f"{variant.skeleton.schedule} {len(variant.starts)}"
        name += " sliced" if variant.skeleton.token_slices else ""
        found[name] = candidate_of_decision(context, variant, solver="test")
    return found


def test_only_what_runs_unless_asked_for_more() -> None:
    context, decision = pipeline()

    found = candidates(context, decision)

    assert ["1f1b 4", "gpipe 4"] == sorted(found)
    assert [[], []] == [candidate.plan.unrunnable for candidate in found.values()]


def test_more_schedules_are_faster_valid_and_marked() -> None:
    """Four micro-batches on four stages idle a lot; every other schedule idles less."""
    context, decision = pipeline()

    found = candidates(replace(context, allow_unrunnable=True), decision)

    others = {"zb-h1 4", "interleaved 8", "interleaved 16", "1f1b 4 sliced"}
    assert {"1f1b 4", "gpipe 4"} | others == set(found)
    for name in others:
        check_structure(found[name].plan)
        assert found[name].time_s < 0.9 * found["1f1b 4"].time_s
        assert 1 == len(found[name].plan.unrunnable)
    assert 256 == sum(found["1f1b 4 sliced"].plan.token_slices)
    devices = [stage.first_device for stage in found["interleaved 8"].plan.stages]
    assert [0, 1, 2, 3, 0, 1, 2, 3] == devices


def test_pins_are_respected() -> None:
    context, decision = pipeline()
    pinned = replace(context, allow_unrunnable=True, pins=Pins(schedule=ScheduleName.ZB_H1))

    assert ["zb-h1 4"] == list(candidates(pinned, decision))


def test_interleaving_needs_full_rounds() -> None:
    """Two micro-batches do not fill a round of four groups."""
    context, decision = pipeline(num_microbatches=2)

    found = candidates(replace(context, allow_unrunnable=True), decision)

    assert not any("interleaved" in name for name in found)
    assert "zb-h1 4" in found
