"""What a rank holds: slices, ZeRO chunks, fp32 copies, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshwright.errors import PlanRefused
from meshwright.plans.plan import OptimizerName, OptimizerSpec
from meshwright.runtime.mesh import Coordinate, Layout
from meshwright.runtime.state import RankState, assemble, slice_tensor
from meshwright.spmd.program import ShardSpec
from tests.runtime import handwritten

CPU = torch.device("cpu")
LAYOUT = Layout(stage_shape=(1, 2, 1, 1, 2), first_devices=(0,))
STRIDED = ShardSpec(factors=(((3, ()), (4, ("tp",))), ((2, ("dp_shard",)),)))


def test_strided_partitioning_keeps_a_block_of_every_factor() -> None:
    """12 rows are 3 x 4 and tp splits the inner 4: rank tp=1 has rows 2, 3, 6, 7, 10, 11."""
    full = torch.arange(12).unsqueeze(1).expand(12, 2).contiguous()
    coordinate = Coordinate(shape=(1, 2, 1, 1, 2), index=(0, 0, 0, 0, 1))

    assert [[2], [3], [6], [7], [10], [11]] == slice_tensor(full, STRIDED, coordinate).tolist()


def test_blocks_of_all_ranks_make_the_full_tensor() -> None:
    full = torch.arange(24).view(12, 2)
    blocks = [(c, slice_tensor(full, STRIDED, c)) for c in LAYOUT.coordinates]

    assert torch.equal(full, assemble((12, 2), STRIDED, blocks))


def test_rows_that_do_not_divide_are_refused() -> None:
    shard = ShardSpec(factors=(((3, ("tp",)),),))

    with pytest.raises(PlanRefused, match=r"w: 3 rows do not divide among 2 ranks along \('tp',\)"):
        slice_tensor(torch.zeros(3), shard, LAYOUT.coordinates[0], "w")


def _state(rank: int, dtype: str, optimizer: OptimizerSpec, *, offload: bool = False) -> RankState:
    program, _ = handwritten.two_stages(2, 2, 1, dtype)
    slots = tuple(replace(slot, offload=offload) for slot in program.parameters)
    program = replace(program, parameters=slots)
    coordinate = handwritten.layout(2, 2).coordinates[rank]
    source = handwritten.parameters(getattr(torch, dtype)).__getitem__
    return RankState(program, coordinate, source, optimizer=optimizer, device=CPU)


def _stepped(state: RankState) -> RankState:
    """The state after a step with gradients of one."""
    slots = state.program.parameters
    state.optimizer_step({slot.name: torch.ones_like(state.optimized(slot.name)) for slot in slots})
    return state


def test_bytes_in_fp32_with_adamw() -> None:
    """With tp = dp = 2, so h = 3: w1 chunk 3 x 3, w2 3 x 5 and its chunk 2 x 5, b 5.

    Held in fp32: 9 + 15 + 5 = 29. AdamW adds the chunk of w2 and two moments of what it updates:
    10 + 2 (9 + 10 + 5) = 58.
    """
    state = _stepped(_state(0, "float32", OptimizerSpec()))

    assert 29 * 4 == state.parameter_bytes
    assert 58 * 4 == state.optimizer_bytes


def test_bytes_in_bf16_with_sgd() -> None:
    """29 elements of 2 bytes, and an fp32 copy of the 9 + 10 + 5 that are updated."""
    state = _stepped(_state(0, "bfloat16", OptimizerSpec(name=OptimizerName.SGD)))

    assert 29 * 2 == state.parameter_bytes
    assert 24 * 4 == state.optimizer_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_optimizer_steps_memory_of_its_own(dtype: str) -> None:
    """It makes the same parameters, and what it adds to the device's memory is nothing."""
    state = _stepped(_state(0, dtype, OptimizerSpec(), offload=True))
    usual = _stepped(_state(0, dtype, OptimizerSpec()))
    published, expected = state.to_publish(), usual.to_publish()

    assert 0 == state.optimizer_bytes
    assert usual.parameter_bytes == state.parameter_bytes
    for slot in state.program.parameters:
        held = state.held[slot.stored]
        assert state.optimized(slot.name).data_ptr() != held.data_ptr()
        assert torch.equal(usual.optimized(slot.name), state.optimized(slot.name))
        assert torch.equal(usual.held[slot.stored], held)
    assert expected.keys() == published.keys()
    assert all(torch.equal(expected[value], published[value]) for value in published)


def test_bf16_steps_add_up_in_the_fp32_copy() -> None:
    """Steps of 1e-4 vanish in bf16 beside a weight of about 1, and must not in the copy."""
    optimizer = OptimizerSpec(name=OptimizerName.SGD, learning_rate=1e-4, weight_decay=0.0)
    state = _state(0, "bfloat16", optimizer)
    before = state.optimized("b").clone()
    for _ in range(100):
        _stepped(state)
    slot = next(slot for slot in state.program.parameters if slot.name == "b")

    torch.testing.assert_close(before - 0.01, state.optimized("b"), rtol=1e-5, atol=1e-6)
    assert torch.equal(state.optimized("b").bfloat16(), state.held[slot.stored])


def test_a_parameter_of_another_shape_is_refused() -> None:
    program, _ = handwritten.two_stages(1, 1, 1)
    wrong = {name: tensor[:-1] for name, tensor in handwritten.parameters().items()}

    with pytest.raises(PlanRefused, match=r"w1: shape \(4, 6\) but the plan was made for \(5, 6\)"):
        RankState(
            program,
            handwritten.layout(1, 1).coordinates[0],
            wrong.__getitem__,
            optimizer=OptimizerSpec(),
            device=CPU,
        )


def test_the_users_tensors_are_never_changed() -> None:
    full = handwritten.parameters()
    program, _ = handwritten.two_stages(1, 1, 1)
    state = RankState(
        program,
        handwritten.layout(1, 1).coordinates[0],
        full.__getitem__,
        optimizer=OptimizerSpec(),
        device=CPU,
    )
    _stepped(state)

    for name, tensor in handwritten.parameters().items():
        assert torch.equal(tensor, full[name])
