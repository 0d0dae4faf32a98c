"""What the handwritten program dispatches on a fake process group."""

from __future__ import annotations

import dataclasses

import pytest

from meshwright.errors import PlanRefused
from meshwright.plans.plan import ScheduleName
from meshwright.runtime.dryrun import Traffic, dry_run
from meshwright.spmd.program import Collective, StageProgram
from tests.runtime import handwritten


def test_counts_of_the_first_stage() -> None:
    """2 ranks along dp and tp, 3 micro-batches of 2 rows, 8-byte elements, h = 3.

    tp: one all-reduce of 2 x 5 each forward. Gathers: w1 (2 chunks of 3 x 3) each forward and w2
    (2 chunks of 2 x 5) once. Scatters: the same two, once. The tied bias of 5: one all-reduce.
    """
    program, _ = handwritten.two_stages(2, 2, 3)

    found = dry_run(
        program,
        handwritten.layout(2, 2),
        rank=3,
        schedule=ScheduleName.ONE_F_ONE_B,
        num_microbatches=3,
    )

    assert {
        ("all_reduce", ("tp",)): Traffic(num_calls=3, num_bytes=3 * 80),
        ("all_gather", ("dp_shard",)): Traffic(num_calls=4, num_bytes=3 * 144 + 160),
        ("reduce_scatter", ("dp_shard",)): Traffic(num_calls=2, num_bytes=144 + 160),
        ("all_reduce", ("dp_shard",)): Traffic(num_calls=1, num_bytes=40),
    } == found.collectives
    assert 3 * 80 + 40 == found.num_bytes_sent


def test_one_rank_of_thousands() -> None:
    """The second stage of 12 x 512 ranks, impersonated in this process."""
    _, program = handwritten.two_stages(12, 512, 1)

    found = dry_run(
        program,
        handwritten.layout(12, 512),
        rank=12 * 512 + 5,
        schedule=ScheduleName.GPIPE,
        num_microbatches=1,
    )

    assert 2 == found.collectives["all_reduce", ("dp_shard",)].num_calls


def _with_wrong_bytes(program: StageProgram) -> StageProgram:
    body = tuple(
        dataclasses.replace(item, num_bytes=item.num_bytes + 1)
        if isinstance(item, Collective)
        else item
        for item in program.publish.body
    )
    return dataclasses.replace(program, publish=dataclasses.replace(program.publish, body=body))


def test_bytes_that_differ_are_refused() -> None:
    program, _ = handwritten.two_stages(2, 1, 1)

    with pytest.raises(PlanRefused, match="all_gather along dp_shard: the program says 2 calls of"):
        dry_run(
            _with_wrong_bytes(program),
            handwritten.layout(2, 1),
            rank=0,
            schedule=ScheduleName.GPIPE,
            num_microbatches=1,
        )
