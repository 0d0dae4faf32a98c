"""Ranks, coordinates and groups of a plan."""

from __future__ import annotations

import msgspec
import pytest

from meshwright.errors import PlanRefused
from meshwright.plans.plan import (
    GraphReference,
    JobSpec,
    Mesh,
    ParallelPlan,
    Provenance,
    SegmentPlan,
    Stage,
)
from meshwright.runtime.mesh import Coordinate, Layout, layout_of

LAYOUT = Layout(stage_shape=(1, 2, 1, 1, 3), first_devices=(6, 0))


def test_ranks_are_row_major_and_tp_innermost() -> None:
    """Stage 0 starts at device 6; dp_shard 1, tp 2 is its row-major place 1 * 3 + 2."""
    stage, coordinate = LAYOUT.locate(11)

    assert 0 == stage
    assert (0, 1, 0, 0, 2) == coordinate.index
    assert 11 == LAYOUT.rank_of(0, coordinate)
    assert (1, 0) == (LAYOUT.locate(3)[0], LAYOUT.locate(3)[1].position(("tp",)))


def test_peers_are_ordered_by_position() -> None:
    coordinate = LAYOUT.locate(10)[1]

    assert [9, 10, 11] == [LAYOUT.rank_of(0, peer) for peer in coordinate.peers(("tp",))]
    assert [7, 10] == [LAYOUT.rank_of(0, peer) for peer in coordinate.peers(("dp_shard",))]
    assert 6 == len(coordinate.peers(("dp_shard", "tp")))


def test_position_along_several_axes() -> None:
    coordinate = Coordinate(shape=(2, 3, 1, 1, 4), index=(1, 2, 0, 0, 3))

    assert 1 * 3 * 4 + 2 * 4 + 3 == coordinate.flat
    assert 1 * 4 + 3 == coordinate.position(("dp_replicate", "tp"))


def test_a_rank_beyond_the_plan_is_refused() -> None:
    with pytest.raises(PlanRefused, match="rank 12: no stage owns it; start 12 ranks"):
        LAYOUT.locate(12)


def _plan(first_devices: tuple[int, int]) -> ParallelPlan:
    return ParallelPlan(
        model=GraphReference(
            reference="m", graph_sha256="0" * 64, num_parameters=1, num_segments=2
        ),
        cluster="cpu:4",
        job=JobSpec(global_batch=4),
        mesh=Mesh(pp=2, tp=2),
        stages=[
            Stage(first_segment=s, last_segment=s, first_device=first, num_devices=2)
            for s, first in enumerate(first_devices)
        ],
        segments=[SegmentPlan(segment_class=0, name="", shard={})],
        provenance=Provenance(meshwright_version="0", solver="test", level="manual"),
    )


def test_layout_of_a_plan() -> None:
    assert Layout(stage_shape=(1, 1, 1, 1, 2), first_devices=(0, 2)) == layout_of(_plan((0, 2)))


def test_overlapping_stages_are_refused() -> None:
    plan = _plan((0, 2))
    stages = [msgspec.structs.replace(stage, first_device=0) for stage in plan.stages]

    with pytest.raises(PlanRefused, match=r"stages do not cover devices 0\.\.3 exactly once"):
        layout_of(msgspec.structs.replace(plan, stages=stages))
