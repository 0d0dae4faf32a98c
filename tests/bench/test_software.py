"""Words of a row as options of the model, the plan and the prices."""

from __future__ import annotations

import pytest

from meshwright.bench.sizes import sizes_of
from meshwright.bench.software import calibration_for, software_of
from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.errors import BadRequest
from meshwright.plans.plan import Precision
from tests.bench.given_runs import Cell, run


@pytest.mark.parametrize(
    ("word", "precision", "products"),
    [
        ("bf16", Precision.BF16, "bfloat16"),
        ("fp16", Precision.FP16, "float16"),
        ("fp8", Precision.BF16, "float8_e4m3fn"),
        ("nvfp4", Precision.BF16, "nvfp4"),
        ("fp32", Precision.FP32, "float32"),
    ],
)
def test_precision(word: str, precision: Precision, products: str) -> None:
    found = software_of(run(precision=word))

    assert precision is found.precision
    assert products == found.matmul_dtype


def test_attention_by_the_framework_s_time() -> None:
    old = software_of(run(flash_attention=None, framework="Megatron-DeepSpeed"))

    assert not old.fused_attention
    assert software_of(run(flash_attention=None, framework="Composer+FSDP")).fused_attention
    assert not software_of(run(flash_attention=False)).fused_attention


def test_gradients_wait_for_the_last_backward_where_nothing_overlaps() -> None:
    waits = calibration_for(software_of(run(framework="Megatron-Core")), DEFAULTS)
    hides = calibration_for(software_of(run(framework="PyTorch FSDP")), DEFAULTS)

    assert 0.0 == waits.overlap_fraction
    assert DEFAULTS.overlap_fraction == hides.overlap_fraction
    assert 4 == waits.reduction_item_bytes


def test_a_fitted_figure_stays() -> None:
    fitted = DEFAULTS.with_figures(Origin.LEARNED, launch_scale=3.0)

    assert 3.0 == calibration_for(software_of(run()), fitted).launch_scale
    assert DEFAULTS.launch_scale < calibration_for(software_of(run()), DEFAULTS).launch_scale


def test_what_is_not_told_is_said() -> None:
    said = software_of(run(precision=None, recompute=None, zero_stage=None)).assumptions

    assert {"precision not told: bf16", "recompute not told: none", "ZeRO stage not told: 0"} <= {
        *said
    }


def test_vocabulary_is_padded_as_megatron_does() -> None:
    """50257 to a multiple of 128 x 8."""
    sizes, _ = sizes_of(run(vocab=None), pads_vocab_to=128)

    assert 51200 == sizes.vocab


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "vocab"),
    [
        ("Llama 3.1 405B", 126, 8, 128256),
        ("llama2-70b", 80, 8, 32000),
        ("Mixtral 8x7B", 32, 8, 32000),
    ],
)
def test_sizes_by_name(name: str, layers: int, kv_heads: int, vocab: int) -> None:
    empty: dict[str, Cell] = dict.fromkeys(
        ("layers", "hidden", "heads", "ffn_hidden", "vocab", "gated_mlp", "seq_len")
    )
    sizes, said = sizes_of(run(model_name=name, arch="llama", **empty), pads_vocab_to=1)

    assert (layers, kv_heads, vocab) == (sizes.layers, sizes.kv_heads, sizes.vocab)
    assert sizes.gated
    assert any("those of" in text for text in said)


def test_sizes_by_number_of_parameters() -> None:
    """12 layers hidden^2 within a tenth of what is told."""
    sizes, _ = sizes_of(run(layers=None, hidden=None, heads=None, params_b=20.0), pads_vocab_to=1)

    assert 20e9 == pytest.approx(12 * sizes.layers * sizes.hidden**2, rel=0.1)


def test_too_little_is_an_error() -> None:
    with pytest.raises(BadRequest, match="layers"):
        sizes_of(run(layers=None), pads_vocab_to=1)


def test_what_frameworks_keep_in_memory() -> None:
    core = calibration_for(software_of(run(framework="Megatron-Core")), DEFAULTS)
    titan = calibration_for(software_of(run(framework="torchtitan (FSDP2)")), DEFAULTS)

    assert (1, 0, 1) == (
        core.accumulates_in_place,
        core.parameter_item_bytes,
        core.shards_over_context,
    )
    assert (0, 4, 4) == (
        titan.accumulates_in_place,
        titan.parameter_item_bytes,
        titan.gradient_item_bytes,
    )
    assert titan.allocator_share > core.allocator_share


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("gpt/gpt3_mcore_te_tp1_pp2", True),
        ("gpt/gpt3_mcore_tp1_pp2", False),
        ("gpt/gpt3_mcore_tp2_uninstall_te", False),
        ("GPT 1.3B", True),
    ],
)
def test_attention_of_a_test_case_by_its_name(name: str, is_fused: bool) -> None:
    found = software_of(run(model_name=name, flash_attention=None))

    assert is_fused is found.fused_attention


def test_a_told_vocabulary_is_padded_where_the_framework_pads() -> None:
    sizes, said = sizes_of(run(vocab=131073.0, tp=4), pads_vocab_to=128)

    assert 132096 == sizes.vocab
    assert "vocabulary padded: 132096" in said


def test_gathers_of_the_first_deepspeed_wait() -> None:
    """Nothing is prefetched, and each byte costs 32 ps more; FSDP and Megatron prefetch."""
    old = software_of(run(framework="DeepSpeed ZeRO-3 (no model parallelism)", zero_stage=3))
    figures = calibration_for(old, DEFAULTS)

    assert (0.0, 32e-12) == (figures.gather_overlap, figures.gather_s_per_byte)
    for framework in ("PyTorch FSDP", "torchtitan", "Megatron-LM"):
        others = calibration_for(software_of(run(framework=framework)), DEFAULTS)

        assert (1.0, 0.0) == (others.gather_overlap, others.gather_s_per_byte)


@pytest.mark.parametrize(
    ("framework", "dp", "num_bytes"),
    [
        ("DeepSpeed ZeRO-3", 8, 5e8 * 2),
        ("Megatron-LM, overlap grad reduce", 8, 4e7 * 4),
        ("Megatron-LM, overlap grad reduce", 64, 6.4e7 * 4),
        ("PyTorch DDP", 8, 25 * 2**20),
    ],
)
def test_buckets_are_those_of_each_framework(framework: str, dp: int, num_bytes: float) -> None:
    zero_stage = 3 if "ZeRO" in framework else 0
    found = software_of(run(framework=framework, dp=dp, precision="bf16", zero_stage=zero_stage))

    assert num_bytes == found.bucket_bytes
