"""From a captured model to the sizes of its operators on one device."""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling.operators import Candidate, Direction, DtypeName
from meshwright.profiling.operators.models import ModelOperators, model_operators


@pytest.fixture(scope="module")
def gpt() -> ModelOperators:
    """4 layers of 64 with 4 heads, 128 tokens in a vocabulary of 256; batch 4 of 32 tokens."""
    return model_operators(
        "tiny-gpt", tensor_parallel=(1, 2, 4), batch=4, seq_len=None, dtypes=[DtypeName.FP32]
    )


def sizes(found: ModelOperators, op: str, tp: int, **more: object) -> list[dict[str, object]]:
    return [
        dict(candidate.sizes)
        for candidate in found.candidates
        if candidate.op == op
        and candidate.tp == tp
        and all(getattr(candidate, name) == value for name, value in more.items())
    ]


def test_attention_has_its_share_of_heads(gpt: ModelOperators) -> None:
    whole = {
        "b": 4, "seq_q": 32, "seq_k": 32, "heads": 4, "kv_heads": 4, "head_dim": 16, "causal": True,
    }  # fmt: skip

    for tp in (1, 2, 4):
        local = {**whole, "heads": 4 // tp, "kv_heads": 4 // tp}
        assert [local, local] == sizes(gpt, "sdpa", tp)


def test_layers_are_cut_by_columns_then_rows(gpt: ModelOperators) -> None:
    """Megatron's pair: up 64 -> 256 by columns, down 256 -> 64 by rows, two ways each."""
    up = {"m": 128, "n": 128, "k": 64}
    down = {"m": 128, "n": 64, "k": 128}
    found = sizes(gpt, "linear", 2, direction=Direction.FWD)

    assert up in found
    assert down in found
    assert {"m": 128, "n": 256, "k": 64} in sizes(gpt, "linear", 1, direction=Direction.FWD)


def test_every_forward_operator_is_measured_backward_too(gpt: ModelOperators) -> None:
    def keys(direction: Direction) -> set[tuple[str, object]]:
        return {(c.op, c.dims) for c in gpt.candidates if c.direction is direction}

    one_way = {"add", "add_scalar", "sum", "copy"}
    forward = {key for key in keys(Direction.FWD) if key[0] not in one_way}

    assert forward == keys(Direction.BWD)


def test_parameters_are_updated_by_their_share(gpt: ModelOperators) -> None:
    """218,496 parameters; of a half of each layer's cut matrices and biases fewer remain."""
    whole = sizes(gpt, "adamw", 1, role="all parameters")
    half = sizes(gpt, "adamw", 2, role="all parameters")

    assert [218_496] * 2 == [dims["numel"] for dims in whole]
    assert {"fused", "foreach"} == {dims["variant"] for dims in whole}
    assert all(218_496 / 2 < int(str(dims["numel"])) < 218_496 * 0.6 for dims in half)


def test_what_no_family_covers_is_named_with_its_traffic(gpt: ModelOperators) -> None:
    targets = {row.target for row in gpt.uncovered}

    assert "aten.arange.default" in targets
    assert sum(row.traffic_fraction for row in gpt.uncovered) < 0.001
    assert not targets & {"aten.mm.default", "aten.view.default", "aten.gelu_backward.default"}


def test_a_degree_that_cuts_nothing_is_refused() -> None:
    with pytest.raises(BadRequest, match="--tp 7: nothing of tiny-mlp can be cut 7 ways"):
        model_operators(
            "tiny-mlp", tensor_parallel=(7,), batch=4, seq_len=None, dtypes=[DtypeName.FP32]
        )


@pytest.mark.parametrize(
    ("reference", "op", "dims"),
    [
        (
            "tiny-resnet",
            "conv2d",
            {
                "b": 2, "channels_in": 3, "channels_out": 8, "kernel": 7, "stride": 2,
                "height": 32, "width": 32, "groups": 1,
            },
        ),
        (
            "tiny-resnet",
            "pool",
            {
                "b": 2, "channels_in": 8, "height": 16, "width": 16, "kernel": 3, "stride": 2,
                "variant": "max",
            },
        ),
        ("tiny-llama", "silu_mul", {"m": 64, "n": 128}),
        ("tiny-llama", "cross_entropy", {"m": 64, "n": 256}),
    ],
)  # fmt: skip
def test_families_of_other_models(reference: str, op: str, dims: dict[str, object]) -> None:
    found = of_model(reference)

    assert dims in sizes(found, op, 1)
    assert all(_is_of(candidate, reference) for candidate in found.candidates)


@cache
def of_model(reference: str) -> ModelOperators:
    return model_operators(
        reference, tensor_parallel=(1,), batch=2, seq_len=None, dtypes=[DtypeName.BF16]
    )


def _is_of(candidate: Candidate, reference: str) -> bool:
    return (candidate.model, candidate.dtype) == (reference, DtypeName.BF16)
