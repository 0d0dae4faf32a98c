"""Contexts of one program on several clusters."""

from __future__ import annotations

import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.plans.plan import JobSpec
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.space.contexts import make_context, study
from tests.cost.graphs import tiny_gpt

JOB = JobSpec(global_batch=16)


def test_a_program_is_priced_alike_whoever_used_it_before() -> None:
    """Sharded graphs are shared by contexts; what they cost is not."""
    graph = tiny_gpt()
    program = study(graph)

    for name in ("cpu:4", "8xa100", "4xt4", "cpu:4"):
        cluster = parse_cluster(name)
        alone = make_context(graph, reference="tiny", cluster=cluster, job=JOB)
        shared = make_context(program, reference="tiny", cluster=cluster, job=JOB)
        expected, found = (Exhaustive().propose(context) for context in (alone, shared))
        assert alone.reference == shared.reference
        assert [c.plan for c in expected.candidates] == [c.plan for c in found.candidates]
        assert [c.time_s for c in expected.candidates] == [c.time_s for c in found.candidates]


def test_the_batch_must_be_the_captured_one() -> None:
    with pytest.raises(BadRequest, match="captured with a batch of 16 but the job's global batch"):
        make_context(
            study(tiny_gpt()),
            reference="tiny",
            cluster=parse_cluster("cpu:4"),
            job=JobSpec(global_batch=8),
        )
