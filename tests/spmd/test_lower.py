"""What plans of a small GPT become: collectives and bytes counted by hand.

4 layers, batch 8, 32 tokens, width 64, vocabulary 256, fp64; each layer has two halves, attention
and feed-forward. An activation of all tokens has 8 * 32 * 64 * 8 = 131072 bytes.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest

from meshwright.plans.plan import Recompute
from meshwright.spmd.prepared import lower_plan
from meshwright.spmd.program import Collective, Function, StageProgram
from tests.equivalence.subject import BATCH, SEQUENCE, TENSOR, Recipe, Subject, built_in, plan_of

ACTIVATION_BYTES = 131072
STATISTIC_BYTES = 8 * 32 * 8


@lru_cache(maxsize=1)
def _subject() -> Subject:
    return built_in("tiny-gpt")


def _program(recipe: Recipe) -> StageProgram:
    subject = _subject()
    (program,) = lower_plan(subject.prepared, plan_of(subject, recipe))
    return program


def _collectives(function: Function) -> list[Collective]:
    return [item for item in function.body if isinstance(item, Collective)]


def _counted(function: Function) -> Counter[tuple[str, int]]:
    return Counter((str(item.kind), item.num_bytes) for item in _collectives(function))


def test_tensor_parallel_reduces_once_for_each_half_of_a_block() -> None:
    """Eight halves and one more, forward and backward.

    Forward: the embedding too, and the loss takes a maximum and a sum for each token and the sum
    of all. Backward: 8 halves and the head; one sum for each token.
    """
    program = _program(Recipe({"tp": 2}, {"tp": TENSOR}))

    assert {
        ("all_reduce", ACTIVATION_BYTES): 9,
        ("all_reduce", STATISTIC_BYTES): 2,
        ("all_reduce", 8): 1,
    } == _counted(program.forward)
    assert {
        ("all_reduce", ACTIVATION_BYTES): 9,
        ("all_reduce", STATISTIC_BYTES): 1,
    } == _counted(program.backward_final)


def test_sequence_parallel_gathers_and_scatters_in_pairs() -> None:
    """Each all-reduce becomes a scatter and a gather.

    Backward gathers what entered a half again, for its weight gradient.
    """
    program = _program(Recipe({"tp": 2}, {"tp": SEQUENCE}))
    forward, backward = _counted(program.forward), _counted(program.backward_final)

    assert 9 == forward["reduce_scatter", ACTIVATION_BYTES]
    assert 9 == forward["all_gather", ACTIVATION_BYTES]
    assert 0 == forward["all_reduce", ACTIVATION_BYTES]
    assert 9 == backward["reduce_scatter", ACTIVATION_BYTES]
    assert 9 + 9 == backward["all_gather", ACTIVATION_BYTES]
    assert 0 == backward["all_reduce", ACTIVATION_BYTES]


def test_zero3_gathers_each_segment_once_forward_and_once_backward() -> None:
    """11 segments forward, 9 backward.

    The two tables of the embeddings are not needed in the backward pass (the head gathers the tied
    one).
    """
    program = _program(Recipe({"dp_shard": 2}, {"dp_shard": BATCH}, zero=3))
    forward = [c for c in _collectives(program.forward) if c.cause == "zero_gather"]
    backward = [c for c in _collectives(program.backward_final) if c.cause == "zero_gather"]

    assert 11 == len(forward)
    assert list(range(11)) == sorted(item.segment for item in forward)
    assert 9 == len(backward)
    assert () == program.published


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_reduced_once_in_buckets(zero: int) -> None:
    """All gradients, 8 bytes an element, pass once; no bucket holds two gradients beyond 16 KiB."""
    axis = "dp_shard" if zero else "dp_replicate"
    program = _program(Recipe({axis: 2}, {axis: BATCH}, zero=zero))
    reduced = [c for c in _collectives(program.backward_final) if c.cause == "dp_gradient"]
    kind = "reduce_scatter" if zero else "all_reduce"

    assert {kind} == {str(item.kind) for item in reduced}
    assert 8 * _subject().prepared.graph.num_parameters == sum(item.num_bytes for item in reduced)
    assert len(reduced) < len(program.parameters)


@pytest.mark.parametrize(
    ("zero", "stored", "optimized"), [(0, 1, 1), (1, 1, 2), (2, 1, 2), (3, 2, 2)]
)
def test_a_rank_holds_what_zero_says(zero: int, stored: int, optimized: int) -> None:
    """Of P parameters: P / ``stored`` between steps, optimizer state for P / ``optimized``."""
    program = _program(Recipe({"dp_shard": 2}, {"dp_shard": BATCH}, zero=zero))
    total = _subject().prepared.graph.num_parameters

    held = sum(program.values[slot.stored].num_elements for slot in program.parameters)
    stepped = sum(program.values[slot.optimized].num_elements for slot in program.parameters)
    assert total // stored == held
    assert total // optimized == stepped


def test_zero1_publishes_every_parameter() -> None:
    program = _program(Recipe({"dp_shard": 2}, {"dp_shard": BATCH}, zero=1))
    gathered = sum(item.num_bytes for item in _collectives(program.publish))

    assert {slot.name for slot in program.parameters} == {name for name, _ in program.published}
    assert 8 * _subject().prepared.graph.num_parameters == gathered


def test_full_recompute_keeps_what_enters_a_segment() -> None:
    """The inputs of 8 halves and of the head; else a number for each target, and the count."""
    kept = _program(Recipe(recompute=Recompute.FULL))
    large = [v for v in kept.saved if kept.values[v].num_bytes >= ACTIVATION_BYTES]
    small = sum(kept.values[v].num_bytes for v in kept.saved if v not in large)

    assert [ACTIVATION_BYTES] * 9 == [kept.values[value].num_bytes for value in large]
    assert 8 * 256 + 8 == small


def test_selective_recompute_keeps_less_than_none_and_more_than_full() -> None:
    def kept_bytes(recompute: Recompute) -> int:
        program = _program(Recipe(recompute=recompute))
        return sum(program.values[value].num_bytes for value in program.saved)

    assert kept_bytes(Recompute.FULL) < kept_bytes(Recompute.SELECTIVE) < kept_bytes(Recompute.NONE)


def test_one_rank_communicates_nothing() -> None:
    program = _program(Recipe())

    assert [] == [
        item
        for function in (program.prologue, program.forward, program.backward_final, program.publish)
        for item in _collectives(function)
    ]
