"""The plan of a row is the one that was run."""

from __future__ import annotations

import pytest

from meshwright.bench.given_plans import degrees_of
from meshwright.bench.predict import Predictor
from meshwright.bench.sizes import experts_of
from meshwright.errors import BadRequest
from meshwright.plans.plan import Recompute, ScheduleName
from tests.bench.given_runs import Cell, run


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def test_degrees_follow_from_each_other() -> None:
    """8 devices over tp 2 and pp 2 leave dp 2; 32 samples over 2 ranks of 2 are 8 micro-batches."""
    found, _ = degrees_of(run(dp=None))

    assert (2, 2, 2) == (found.dp, found.tp, found.pp)
    assert 8 == found.num_microbatches
    assert 2.0 == found.micro_batch


def test_devices_from_degrees() -> None:
    found, _ = degrees_of(run(gpus=None, dp=4, hosts=None, gpus_per_host=None))

    assert 16 == found.dp * found.tp * found.pp


def test_experts_that_nobody_counted() -> None:
    with pytest.raises(BadRequest, match="experts is not told"):
        degrees_of(run(arch="moe", ep=2))


@pytest.mark.parametrize(
    ("changes", "ep", "axes"),
    [
        ({}, 2, ()),
        ({"ep": 4}, 2, ("tp",)),
        ({"ep": 2, "notes": "etp 1"}, 1, ("tp",)),
        ({"ep": 2, "notes": "expert_tensor_parallel_size=2"}, 2, ()),
        ({"ep": 2, "experts": 64}, 1, ("tp",)),
        ({"ep": 4, "tp": 1, "cp": 2}, 2, ("cp",)),
        ({"ep": 4, "dp": 1, "cp": 2}, 1, ("tp", "cp")),
        ({"ep": 2, "tp": 4, "dp": 1}, 1, ()),
        ({"ep": 3}, 1, ()),
    ],
)
def test_experts_over_ranks_of_other_axes(
    changes: dict[str, Cell], ep: int, axes: tuple[str, ...]
) -> None:
    found, _ = degrees_of(run(**{"experts": 8, "ep": 2, **changes}))

    assert (ep, axes) == (found.ep, found.expert_axes)


def test_experts_over_data_parallel_ranks() -> None:
    """Those of a model's name count where the row has none; a dense model has none at all."""
    named = run(arch="moe", model_name="Mixtral 8x7B", ep=2)
    dense, said = degrees_of(run(ep=2))

    assert 2 == degrees_of(named)[0].ep
    assert 8 == experts_of(named)
    assert 1 == dense.ep
    assert ("ep 2 of a model without experts: 1",) == said


@pytest.mark.parametrize(
    ("micro_batch", "text"),
    [
        (3, "global_batch 32 is no multiple of dp 2 x micro_batch 3: 6 micro-batches of 2.667"),
        (20, "global_batch 32 is no multiple of dp 2 x micro_batch 20: 1 micro-batches of 16"),
    ],
)
def test_uneven_micro_batches_are_told(micro_batch: int, text: str) -> None:
    _, said = degrees_of(run(micro_batch=micro_batch))

    assert [f"{text} samples on average"] == list(said)
    assert () == degrees_of(run())[1]


def test_disagreeing_degrees_are_an_error() -> None:
    with pytest.raises(BadRequest, match="is not 8 gpus"):
        degrees_of(run(dp=4))
    with pytest.raises(BadRequest, match="does not divide"):
        degrees_of(run(tp=3))
    with pytest.raises(BadRequest, match="global_batch"):
        degrees_of(run(global_batch=None))


def test_mesh_stages_and_labels(predictor: Predictor) -> None:
    plan = predictor.priced(run()).plan

    assert (2, 2, 1, 2) == (
        plan.mesh.pp, plan.mesh.dp_replicate, plan.mesh.dp_shard, plan.mesh.tp,
    )  # fmt: skip
    assert ScheduleName.ONE_F_ONE_B is plan.schedule
    assert [0, 4] == [stage.first_device for stage in plan.stages]
    attention = next(item for item in plan.segments if "attention" in item.name)
    assert "heads" == attention.shard["tp"][0]
    assert ["batch"] == attention.shard["dp_replicate"]


def test_layers_in_equal_stages(predictor: Predictor) -> None:
    """4 layers on 2 stages: the second begins with layer 2."""
    priced = predictor.priced(run())

    second = priced.plan.stages[1].first_segment
    assert "layers.2" in priced.model.segmentation.segments[second].name


def test_cuts_told_in_the_notes(predictor: Predictor) -> None:
    """6 units, one before and one after the 4 layers: a cut at unit 2 is one at layer 1."""
    priced = predictor.priced(run(notes="stage cuts [0, 2, 6] over 6 units"))

    second = priced.plan.stages[1].first_segment
    assert "layers.1" in priced.model.segmentation.segments[second].name


def test_zero_and_recompute(predictor: Predictor) -> None:
    plan = predictor.priced(run(zero_stage=3, recompute="full", framework="FSDP")).plan

    assert (1, 2) == (plan.mesh.dp_replicate, plan.mesh.dp_shard)
    assert {3} == {item.zero_stage for item in plan.segments}
    assert {Recompute.FULL} == {item.recompute for item in plan.segments}


def test_interleaved_stages_return_to_the_first_devices(predictor: Predictor) -> None:
    plan = predictor.priced(run(virtual_stages=2, schedule="interleaved")).plan

    assert ScheduleName.INTERLEAVED is plan.schedule
    assert [0, 4, 0, 4] == [stage.first_device for stage in plan.stages]
