"""Plans priced under every schedule: time, bubble, memory in flight, token slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.breakdown import step_breakdown_s
from meshwright.cost.choice import Choice, StepCost
from meshwright.cost.model import choice_of
from meshwright.cost.pipeline import closed_form_s, inputs_of_crossing
from meshwright.cost.slices import attention_shares, sliced_transfers_s, token_shares
from meshwright.cost.stage_work import StageWork
from meshwright.cost.table import CostTable, Split
from meshwright.errors import PlanRefused
from meshwright.plans.plan import AXIS_NAMES, Recompute, ScheduleName
from meshwright.space.search import SearchContext
from meshwright.spmd.lower import lower
from meshwright.spmd.schedule import depths
from meshwright.spmd.sharded import shard_graph
from meshwright.spmd.stage import SegmentChoices
from tests.cost.graphs import tiny_gpt, zoo
from tests.cost.plans import context_of, uniform_plan
from tests.cost.towers import towers

GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB_H1 = (
    ScheduleName.GPIPE,
    ScheduleName.ONE_F_ONE_B,
    ScheduleName.INTERLEAVED,
    ScheduleName.ZB_H1,
)
DEEP = "tiny-gpt?num_layers=8&hidden=256&num_heads=4&vocab_size=64&seq_len=256"

Case = tuple[SearchContext, CostTable, Choice]


def deep_pipeline(num_microbatches: int = 8, stages: int = 4, chunks: int = 1) -> Case:
    """Eight blocks on A100s, ``chunks`` runs of segments on each of ``stages``."""
    context = context_of(zoo(DEEP, 32), f"{stages}xa100-80gb", 32)
    plan = uniform_plan(context, pp=stages, num_microbatches=num_microbatches)
    choice = choice_of(plan, context.model.segment_classes)
    table = context.model.table([entry.shard for entry in plan.segments], {"micro": 8})
    count = stages * chunks
    # Equal blocks: two segments for each, embeddings in front and the head behind.
    starts = tuple(0 if not s else 2 + s * 16 // count for s in range(count))
    devices = tuple(s % stages for s in range(count))
    return context, table, replace(choice, starts=starts, first_devices=devices)


def priced(case: Case, **changes: object) -> StepCost:
    context, table, choice = case
    return context.model.pricer.price(table, replace(choice, **changes))  # type: ignore[arg-type]


def bubble_fraction(cost: StepCost) -> float:
    return cost.breakdown_s["bubble"] / cost.time_s


def test_schedules_rank_as_published() -> None:
    """More stages on a device group and zero bubbles idle less than 1F1B, which idles as GPipe."""
    plain = deep_pipeline()
    one = bubble_fraction(priced(plain, schedule=ONE_F_ONE_B))
    two = bubble_fraction(priced(deep_pipeline(chunks=2), schedule=INTERLEAVED))
    zero = bubble_fraction(priced(plain, schedule=ZB_H1))

    assert bubble_fraction(priced(plain, schedule=GPIPE)) == pytest.approx(one, rel=0.25)
    assert one > 0.2
    assert two < 0.65 * one
    assert zero < 0.65 * one


@pytest.mark.parametrize("simulate", [True, False])
def test_causes_of_the_interleaved_schedule_add_up(simulate: bool) -> None:
    """The busiest group works on all of its stages; nothing of it is lost or counted twice."""
    context, table, choice = deep_pipeline(chunks=2)
    choice = replace(choice, schedule=INTERLEAVED)
    work = context.model.pricer.work(table, choice)
    own_s = work.own_s(8).reshape(2, 4).sum(axis=0)
    cost = context.model.pricer.price(table, choice, simulate=simulate)
    waits_s = cost.breakdown_s["bubble"] + cost.breakdown_s["pipeline_transfer"]

    assert own_s.max() == pytest.approx(cost.time_s - waits_s)
    assert cost.time_s > own_s.max()


def test_stages_of_a_device_group_share_its_memory() -> None:
    """Two groups with two stages each: parameters and activations in flight add up."""
    case = deep_pipeline(stages=2, chunks=2)
    inter = priced(case, schedule=INTERLEAVED).memory.by_cause
    apart = priced(deep_pipeline(stages=4), schedule=GPIPE, split=case[2].split).memory.by_cause

    for cause in ("parameters", "optimizer", "accumulators"):
        each = apart[cause]
        assert [each[0] + each[2], each[1] + each[3]] * 2 == pytest.approx(inter[cause].tolist())
    # GPipe holds 8 micro-batches of a stage; group 0 holds at most (4, 1) or (3, 2) of its two.
    held = apart["activations"] / 8
    most = max(4 * held[0] + held[2], 3 * held[0] + 2 * held[2])
    assert most == pytest.approx(inter["activations"][0], rel=0.1)


def test_what_zb_h1_puts_off_by_hand() -> None:
    """Blocks of width 32 on 16 x 8 tokens: one value of 32 takes 16,384 bytes.

    The W of the feed-forward part are its two products, as many flop as in its forward; they wait
    with what went into both (1 and 4 values) and the gradients of what came out (4 and 1). Those of
    attention are four products; they wait with 2 inputs and the gradients of q, k, v and output.
    """
    context = context_of(tiny_gpt(), "cpu:4", 16)
    table = context.model.table([{}] * 5, {})
    nodes, values = table.columns.nodes, table.columns.values
    storage, segment = table.put_off.waiting
    feed_forward, attention = 3, 2
    in_w = table.put_off.is_weight & (nodes.segment == feed_forward)
    forward = (nodes.phase == 1) & (nodes.segment == feed_forward)

    def sizes(number: int) -> list[float]:
        return sorted(values.num_bytes[storage[segment == number]].tolist())

    assert nodes.flop[forward].sum() == nodes.flop[in_w].sum() > 0
    assert [16384.0, 16384.0, 65536.0, 65536.0] == sizes(feed_forward)
    assert [16384.0] * 6 == sizes(attention)


def test_zb_h1_holds_what_gradients_of_parameters_wait_for() -> None:
    """Stage s of 4 holds min(4 - s, M) micro-batches for B and s for W."""
    case = deep_pipeline()
    _, table, choice = case
    plain = priced(case, schedule=ONE_F_ONE_B).memory.by_cause["activations"]
    zero = priced(case, schedule=ZB_H1).memory.by_cause["activations"]
    stage_of = choice.stage_of(table.num_segments)
    storage, segment = table.put_off.waiting
    values = table.columns.values
    size = values.num_bytes[storage] * table.weights(choice.split)[values.scale[storage]]
    mine = stage_of[segment] == 3
    waiting = sum(dict(zip(storage[mine].tolist(), size[mine].tolist(), strict=True)).values())

    assert plain[0] == pytest.approx(zero[0], rel=0.02)
    assert plain[3] + 3 * waiting == pytest.approx(zero[3], rel=0.02)
    assert zero.max() <= 1.1 * plain.max()


def test_a_dag_of_stages_waits_for_what_it_reads() -> None:
    """Forward values up, gradients down; a forward value down is for a backward."""
    crossing = [(1, 0, 2), (1, 1, 2), (2, 2, 0), (2, 2, 1), (1, 2, 0)]

    assert ((), (), (0, 1)) == inputs_of_crossing(crossing, 3)


def test_cost_and_runtime_run_equally_far_ahead() -> None:
    """Every segment of two towers a stage: the towers are half as deep as a chain would be."""
    context = context_of(towers(), "cpu:16", 64)
    model = context.model
    count = len(model.segment_classes)
    sharded = shard_graph(
        model.analysis, model.segmentation, model.labels, shards=[{}] * count, axis_sizes={}
    )
    programs = lower(
        sharded,
        stage_of_segment=range(count),
        choices=[SegmentChoices(zero_stage=0, recompute=Recompute.NONE)] * count,
        bucket_bytes=1,
    )
    split = Split(
        axis_sizes=tuple((axis, 1) for axis in AXIS_NAMES), num_microbatches=1, num_stages=count
    )
    table = model.table([{} for _ in set(model.segment_classes)], {})
    crossing = table.crossing_bytes(split, np.arange(count))

    found = depths(inputs_of_crossing(crossing, count))

    assert found == tuple(program.depth for program in programs)
    assert count // 2 + 1 == max(found)


def test_refuses_micro_batches_that_do_not_fill_rounds() -> None:
    case = deep_pipeline(num_microbatches=2, chunks=2)

    with pytest.raises(PlanRefused, match="2 micro-batches do not divide into rounds of 4"):
        priced(case, schedule=INTERLEAVED)


# Token slices ------------------------------------------------------------------------------------


def test_shares_of_slices_by_hand() -> None:
    """Of 4 tokens the last half attends to 1/4 + 1/2 of the square: l (2 c + l) / T^2."""
    assert [0.5, 0.5] == token_shares((2, 2)).tolist()
    assert [0.25, 0.75] == attention_shares((2, 2)).tolist()
    assert pytest.approx(1.0) == attention_shares((5, 3, 7, 1)).sum()


def test_every_slice_pays_the_latency() -> None:
    found = sliced_transfers_s({(0, 1): 1.5}, (3, 1), {(0, 1): 0.5})

    assert {(0, 1): [0.5 + 0.75, 0.5 + 0.25]} == found


def test_one_slice_is_the_whole_sequence() -> None:
    case = deep_pipeline()
    whole, one = priced(case), priced(case, token_slices=(256,))

    assert whole.time_s == pytest.approx(one.time_s, rel=1e-9)
    assert whole.memory.peak_bytes.tolist() == one.memory.peak_bytes.tolist()


def test_slices_fill_the_pipeline_of_one_micro_batch() -> None:
    """Two slices let stages overlap; sixteen of 16 tokens launch too often."""
    case = deep_pipeline(num_microbatches=1)
    whole, two = priced(case), priced(case, token_slices=(128, 128))
    many = priced(case, token_slices=(16,) * 16)

    assert two.time_s < 0.8 * whole.time_s
    assert two.breakdown_s["compute"] == pytest.approx(whole.breakdown_s["compute"], rel=0.05)
    assert many.breakdown_s["launch"] > 4 * two.breakdown_s["launch"]
    assert whole.memory.by_cause["activations"] == pytest.approx(two.memory.by_cause["activations"])


def test_breakdown_of_slices_by_hand() -> None:
    """Two stages of 2 s forward and 2 s backward, half of it attention, slices of 1 and 1 tokens.

    A slice takes 0.5 + 0.25 and 0.5 + 0.75 s each way; sum + (S - 1) max, there and back:
    2 (2 + 1.25) s.
    """
    sums = {"compute": np.array([2.0, 2.0])}
    shares = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    parts = {"hides": np.ones(2)}
    for phase in ("forward", "backward"):
        parts |= {f"{phase}_attention": np.ones(2), f"{phase}_host": np.zeros(2)}
        for number, share in enumerate(shares):
            parts[f"{phase}_compute_{number}"] = share * np.ones(2)
            parts[f"{phase}_communication_{number}"] = np.zeros(2)
    rest = {"launch": np.zeros(2), "tp_communication": np.zeros(2)}
    work = StageWork(
        forward={**sums, **rest},
        backward={**sums, **rest},
        tail={"compute": np.zeros(2)},
        parts=parts,
    )
    choice = Choice(
        split=Split(axis_sizes=(), num_microbatches=1, num_stages=2),
        starts=(0, 1),
        first_devices=(0, 1),
        zero_stages=(0, 0),
        policies=(Recompute.NONE, Recompute.NONE),
        schedule=GPIPE,
        bucket_bytes=1,
        token_slices=(1, 1),
    )
    found = step_breakdown_s(
        choice,
        work,
        forward_transfer_s={(0, 1): 0.0},
        backward_transfer_s={(1, 0): 0.0},
        latency_s=lambda *_: 0.0,
        simulate=True,
    )

    assert pytest.approx(6.5) == sum(found.values())
    assert pytest.approx(4.0) == found["compute"]


def test_closed_forms_of_equal_stages() -> None:
    """M micro-batches and the bubbles: (S - 1) (F + B) over k, less 2 W, or of a slice."""
    six = [1.0] * 4, [2.0] * 4, 6

    assert pytest.approx(6 * 3 + 3 * 3) == closed_form_s(*six)
    assert pytest.approx(6 * 3 + 3 * 1) == closed_form_s(*six, weight_s=[1.0] * 4)
    assert pytest.approx(6 * 6 + 1 * 6 / 2) == closed_form_s(*six, num_groups=2)
    assert pytest.approx(6 * 3 + 1 * 2) == closed_form_s([[0.5, 0.5]] * 2, [[1.5, 0.5]] * 2, 6)
