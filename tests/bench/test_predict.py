"""Every row ends as a prediction or as a reason."""

from __future__ import annotations

import math

import pytest

from meshwright.bench.masks import bytes_with_masks
from meshwright.bench.models import with_family
from meshwright.bench.predict import Predictor, RunPrediction
from meshwright.bench.runs import Skipped
from meshwright.cost.pricing import ANALYTIC_INTERVAL, Pricing
from tests.bench.given_runs import Cell, run
from tests.cost.learned import PeakOperators

MODERN: dict[str, Cell] = {
    "arch": "llama",
    "gated_mlp": True,
    "kv_heads": 2,
    "gpu": "gb200",
    "precision": "fp8",
    "framework": "torchtitan",
    "zero_stage": 3,
    "pp": 1,
    "dp": 4,
    "nvlink_domain_gpus": 72,
    "gpus_per_host": 4,
    "hosts": 2,
}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def predicted(predictor: Predictor, **changes: Cell) -> RunPrediction:
    found = predictor.predict(run(**changes))
    assert isinstance(found, RunPrediction), found
    return found


def test_causes_sum_to_the_step(predictor: Predictor) -> None:
    found = predicted(predictor)

    assert math.isclose(found.step_time_s, sum(found.breakdown.values()))
    assert found.peak_memory_bytes == sum(found.memory_breakdown.values())
    low_s, high_s = found.step_time_interval_s
    assert low_s <= found.step_time_s <= high_s
    assert found.fits


def test_parameters_of_the_built_model(predictor: Predictor) -> None:
    """4 layers of 12 hidden^2 + 13 hidden, tokens and positions, the last norm."""
    layers = 4 * (12 * 256**2 + 13 * 256)

    assert layers + (1024 + 128) * 256 + 2 * 256 == predicted(predictor).num_parameters


@pytest.mark.parametrize(
    "changes",
    [
        MODERN,
        {**MODERN, "dp": 2, "cp": 2, "precision": "bf16", "recompute": "full"},
        {**MODERN, "arch": "moe", "experts": 8, "experts_per_token": 2, "ep": 4, "tp": 1, "dp": 8},
        {"arch": "bert", "vocab": None},
        {"arch": "t5", "layers": 2, "pp": 1, "dp": 4},
        {"arch": "vit", "seq_len": None, "pp": 1, "dp": 4},
        {"recompute": "selective", "flash_attention": False, "sequence_parallel": True},
        {"gpu": "h100_sxm_80gb", "precision": "nvfp4"},
        {"micro_batch": 3},
        {"heads": None, "ffn_hidden": None, "vocab": None, "seq_len": 256, "framework": None},
    ],
    ids=str,
)
def test_all_kinds_of_rows_are_predicted(predictor: Predictor, changes: dict[str, Cell]) -> None:
    found = predicted(predictor, **changes)

    assert 0 < found.step_time_s < 10
    assert 0 < found.peak_memory_bytes < 80e9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "abacus"}, "abacus"),
        ({"global_batch": None}, "global_batch"),
        ({"gpus": None, "dp": None, "hosts": None}, "number of devices"),
        ({"arch": "other", "model_name": "AmoebaNet"}, "AmoebaNet"),
        ({"layers": None}, "layers"),
        ({"layers": None, "params_b": 9e4}, "layers is"),
        ({"arch": "moe"}, "experts is not told"),
        ({"pp": 8, "tp": 1, "dp": 1}, "8 stages but 4 layers"),
    ],
)
def test_what_cannot_be_predicted_has_a_reason(
    predictor: Predictor, changes: dict[str, Cell], reason: str
) -> None:
    found = predictor.predict(run(**changes))

    assert isinstance(found, Skipped)
    assert "small-1" == found.run_id
    assert reason in found.reason


def test_shared_graph_gives_what_the_graph_of_the_whole_batch_gives(
    predictor: Predictor,
) -> None:
    """Amounts scaled from 4 samples are those of a graph captured with all 32."""
    shared = predictor.priced(run())
    alone = Predictor()
    alone.batch = 32
    whole = alone.priced(run())

    assert math.isclose(whole.cost().time_s, shared.cost().time_s, rel_tol=1e-9)
    assert whole.cost().memory.peak_bytes.max() == pytest.approx(
        shared.cost().memory.peak_bytes.max(), rel=1e-3
    )


def test_eager_host_shows_in_small_steps_only(predictor: Predictor) -> None:
    """The same row compiled waits less for launches."""
    eager = predicted(predictor, framework="Megatron-Core")
    compiled = predicted(predictor, framework="Megatron-Core, torch.compile")

    assert compiled.breakdown["launch"] < eager.breakdown["launch"]


def test_sources_and_interval_are_those_of_the_pricing(predictor: Predictor) -> None:
    """Half trusted operators make part of a step learned; the interval narrows with it."""
    pricing = Pricing(name="learned", operators=PeakOperators(trust=0.5), interval=(0.9, 1.1))
    analytic = predicted(predictor)
    learned = predictor.beside(pricing).predict(run())

    assert isinstance(learned, RunPrediction)
    assert ("analytic",) == analytic.source
    assert {"analytic", "learned"} == set(learned.source)
    low, high = (bound / learned.step_time_s for bound in learned.step_time_interval_s)
    plain = [bound / analytic.step_time_s for bound in analytic.step_time_interval_s]
    assert plain == pytest.approx(ANALYTIC_INTERVAL)
    assert plain[0] < low < 0.9
    assert 1.1 < high < plain[1]


def test_one_run_alone(predictor: Predictor) -> None:
    found = Predictor().predict(run())

    assert isinstance(found, RunPrediction)
    assert math.isclose(predicted(predictor).step_time_s, found.step_time_s)


def test_masks_of_dropout_are_kept_with_what_is_dropped(predictor: Predictor) -> None:
    """In every layer a byte more for each score of 2 bytes after dropout."""
    fused = predictor.priced(run(layers=2, pp=1, tp=1, dp=8))
    written = predictor.priced(run(layers=2, pp=1, tp=1, dp=8, flash_attention=False))
    columns = fused.table.columns
    plain = written.model.table_of_plan(written.plan).columns

    assert (bytes_with_masks(columns, 2) == columns.values.num_bytes).all()
    more = bytes_with_masks(plain, 2) - plain.values.num_bytes
    assert 2 == (more > 0).sum()
    assert (plain.values.num_bytes[more > 0] / 2 == more[more > 0]).all()
    assert written.table.columns.values.num_bytes.sum() > fused.table.columns.values.num_bytes.sum()


def test_the_last_rank_s_peak_where_that_was_measured(predictor: Predictor) -> None:
    """With 1F1B the first stage holds one more micro-batch, so the last one needs less."""
    cells: dict[str, Cell] = {"pp": 4, "tp": 1, "vocab": 128.0}
    fullest = predicted(predictor, **cells)
    last = predicted(predictor, **cells, notes="Megatron CI run; golden file dev")

    assert last.peak_memory_bytes < fullest.peak_memory_bytes
    assert last.fullness == fullest.fullness


def test_context_parallel_ranks_share_optimizer_state(predictor: Predictor) -> None:
    cells: dict[str, Cell] = {"pp": 1, "tp": 1, "dp": 2, "cp": 4, "zero_stage": 1}
    alone = predicted(predictor, **cells, framework="DeepSpeed")
    shared = predicted(predictor, **cells)

    expected = alone.memory_breakdown["optimizer"] / 4
    assert expected == pytest.approx(shared.memory_breakdown["optimizer"], rel=0.02)


LONG: dict[str, Cell] = {"tp": 1, "pp": 1, "dp": 2, "cp": 4, "seq_len": 8192, "hidden": 512}


def test_tokens_of_both_ends_share_causal_attention(predictor: Predictor) -> None:
    """Megatron's ranks do half of all pairs; consecutive tokens make the last rank do 7/8."""
    shared = predicted(predictor, **LONG)
    uneven = predicted(predictor, **LONG, framework="Megatron", notes="")
    plain = predicted(predictor, **{**LONG, "framework": "torchtitan"})

    assert shared.breakdown["compute"] == uneven.breakdown["compute"]
    assert shared.breakdown["compute"] < plain.breakdown["compute"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ep": 4, "dp": 2, "tp": 2},
        {"ep": 4, "dp": 1, "tp": 2, "cp": 2},
        {"ep": 2, "dp": 1, "tp": 4},
    ],
)
def test_experts_over_ranks_of_other_axes(predictor: Predictor, changes: dict[str, Cell]) -> None:
    """Rows travel, they are not gathered: no dearer than four times experts over data alone."""
    experts: dict[str, Cell] = {"arch": "moe", "experts": 8, "experts_per_token": 2}
    usual = predicted(predictor, **experts, ep=2, pp=2, sequence_parallel=True)
    found = predicted(predictor, **experts, **changes, pp=2, sequence_parallel=True)

    assert usual.num_parameters == found.num_parameters
    assert 0 < found.breakdown["tp_communication"] < 4 * usual.breakdown["tp_communication"]


@pytest.mark.parametrize(
    ("changes", "arch"),
    [
        ({"arch": "mixtral", "model_name": "Mixtral 8x7B"}, "moe"),
        ({"arch": "other", "model_name": "Qwen2.5 72B"}, "llama"),
        ({"arch": None, "model_name": "BLOOM 176B"}, "gpt"),
        ({"arch": "dense", "model_name": "A", "gated_mlp": True}, "llama"),
        ({"arch": "other", "model_name": "Mamba 2.8B"}, "other"),
        ({"arch": "t5", "model_name": "Qwen"}, "t5"),
    ],
)
def test_family_by_name(changes: dict[str, Cell], arch: str) -> None:
    assert arch == with_family(run(**changes)).arch
