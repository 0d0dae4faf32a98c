"""The zoo computes the models it names: sizes, equality with transformers, reproducibility."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.capture.references import BuiltinModel, builtin_models, resolve_model
from meshwright.capture.zoo import FAMILIES, FAMILY_OF_MODEL
from meshwright.capture.zoo.experts import ExpertLayer, Experts, Routing
from meshwright.capture.zoo.layers import RMSNorm
from meshwright.capture.zoo.t5 import PositionBias, T5Config

TINY = tuple(name for name in FAMILY_OF_MODEL if name.startswith("tiny-"))

# Exact counts are those of the published checkpoints without heads we leave out; the tolerance is
# half a unit of the last digit where only a rounded number is published.
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "bert-base": 109_514_298,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "clip-vit-b32": 151_277_313,
    "clip-vit-l14": 427_616_513,
    "resnet-50": 25_557_032,
    "resnet-101": 44_549_160,
    "resnet-152": 60_192_808,
    "unet-cifar10": 35_746_307,
}
ROUNDED = {
    # Paper's number, half its last digit as a fraction. GPT-3's own table rounds generously
    # (13.0B for 12.86B) and has a smaller vocabulary.
    "gpt3-175b": (175e9, 0.003),
    "gpt3-13b": (13.0e9, 0.012),
    "gpt3-6.7b": (6.7e9, 0.008),
    "gpt-1.3b": (1.3e9, 0.04),
    "gpt-2.6b": (2.6e9, 0.02),
    "gpt-6.7b": (6.7e9, 0.008),
    "gpt-15b": (15e9, 0.034),
    "gpt-39b": (39e9, 0.013),
    "gpt-moe-2.4b": (2.4e9, 0.021),
    "gpt-moe-10b": (10e9, 0.05),
    "gpt-moe-27b": (27e9, 0.019),
    "mixtral-8x22b": (141e9, 0.004),
    "bert-large": (335e6, 0.002),
    "vit-h14": (632e6, 0.001),
    "wide-resnet-50-250m": (250e6, 0.02),
    "wide-resnet-50-1b": (1e9, 0.05),
    "wide-resnet-50-2b": (2e9, 0.05),
    "wide-resnet-50-4b": (4e9, 0.05),
    "wide-resnet-50-6.8b": (6.8e9, 0.012),
    # Alpa prints 13B for 12.6B.
    "wide-resnet-101-13b": (13e9, 0.04),
    "unet-256": (114e6, 0.005),
    "dlrm-criteo-kaggle": (540e6, 0.002),
}


@pytest.fixture(scope="module")
def listed() -> tuple[BuiltinModel, ...]:
    return builtin_models()


@pytest.fixture(scope="module")
def counted(listed: tuple[BuiltinModel, ...]) -> dict[str, int]:
    return {model.name: model.num_parameters for model in listed}


def test_builtin_models_lists_names_families_and_sequences(
    listed: tuple[BuiltinModel, ...],
) -> None:
    lines = {model.name: (model.family, model.default_seq_len) for model in listed}

    assert list(FAMILY_OF_MODEL) == [model.name for model in listed]
    assert ("gpt", 1024) == lines["gpt2"]
    assert ("resnet", None) == lines["resnet-50"]


@pytest.mark.parametrize("name", EXACT)
def test_parameters_are_those_of_the_published_checkpoint(
    name: str, counted: dict[str, int]
) -> None:
    assert EXACT[name] == counted[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_round_to_the_published_number(name: str, counted: dict[str, int]) -> None:
    published, tolerance = ROUNDED[name]

    assert pytest.approx(published, rel=tolerance) == counted[name]


def test_every_model_has_a_name_of_its_own_and_every_family_a_tiny_one() -> None:
    num_names = sum(len(family.models) for family in FAMILIES)

    assert num_names == len(FAMILY_OF_MODEL)
    assert len(FAMILIES) == len(TINY)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_trains_in_fp64_and_repeats_bit_for_bit(name: str) -> None:
    source = resolve_model(name)
    losses = []
    for _ in range(2):
        model = source.build("float64", "cpu", seed=3)
        args, kwargs = source.example_inputs(4, device="cpu", seed=5, dtype="float64")
        result = model(*args, **kwargs)
        loss = result["loss"] if isinstance(result, dict) else result
        loss.backward()
        losses.append(loss.item())

        assert [] == [key for key, weight in model.named_parameters() if weight.grad is None]
    _, other = source.example_inputs(4, device="cpu", seed=6, dtype="float64")

    assert losses[0] == losses[1]
    assert not all(torch.equal(kwargs[key], other[key]) for key in kwargs)


@pytest.mark.parametrize("name", TINY)
def test_meta_and_real_agree_on_shapes_and_dim_0_is_the_batch(name: str) -> None:
    source = resolve_model(name)
    real, shapes = source.build("bfloat16", "cpu"), source.build("bfloat16", "meta")
    _, real_inputs = source.example_inputs(4, device="cpu", dtype="bfloat16")
    _, shape_inputs = source.example_inputs(4, device="meta", dtype="bfloat16")

    for given, expected in ((shapes.state_dict(), real.state_dict()), (shape_inputs, real_inputs)):
        assert list(expected) == list(given)
        for key, tensor in expected.items():
            assert (tensor.shape, tensor.dtype) == (given[key].shape, given[key].dtype)
            assert given[key].is_meta
    assert {4} == {tensor.size(0) for tensor in real_inputs.values()}


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    resolve_model("tiny-gpt").build(device="cpu", seed=9)

    assert torch.equal(before, torch.get_rng_state())


def test_gpt_ties_its_head_to_the_embedding_on_meta_too() -> None:
    model = resolve_model("tiny-gpt").build("bfloat16", "meta")

    assert model.get_parameter("embedding.token.weight") is model.get_parameter("head.weight")


def test_dropout_is_an_option() -> None:
    source = resolve_model("tiny-gpt?dropout=0.5")
    model = source.build(device="cpu")
    _, inputs = source.example_inputs(2, device="cpu")

    assert model(**inputs).item() != model(**inputs).item()
    assert model.eval()(**inputs).item() == model(**inputs).item()


def test_rms_norm_equals_torch() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(RMSNorm(8).double()(x), nn.RMSNorm(8, eps=1e-5).double()(x))


def _expert_layer(routing: Routing) -> ExpertLayer:
    torch.manual_seed(0)
    experts = Experts(routing.num_experts, 8, 16)
    return ExpertLayer(hidden=8, routing=routing, experts=experts).double()


def test_dense_dispatch_equals_a_loop_over_tokens_when_nothing_is_dropped() -> None:
    """Capacity factor E / K = 2 gives every expert room for a whole group of 6 tokens."""
    layer = _expert_layer(Routing(num_experts=4, top_k=2, capacity_factor=2.0, group_size=6))
    x_BSD = torch.randn(3, 12, 8, dtype=torch.float64)
    expected = torch.zeros_like(x_BSD)
    for batch in range(3):
        for position in range(12):
            token = x_BSD[batch, position]
            probability = torch.softmax(layer.router(token), dim=0)
            best = probability.topk(2)
            for weight, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
                parts = layer.experts
                inner = nn.functional.gelu(token @ parts.up[expert] + parts.up_bias[expert, 0])
                result = inner @ parts.down[expert] + parts.down_bias[expert, 0]
                expected[batch, position] += weight * result

    torch.testing.assert_close(layer(x_BSD), expected)


def test_an_expert_drops_what_exceeds_its_capacity() -> None:
    """Six equal tokens choose the same expert; it takes ceil(0.5 * 1 * 6 / 1) = 3 of them."""
    layer = _expert_layer(Routing(num_experts=1, top_k=1, capacity_factor=0.5, group_size=6))
    x_BSD = torch.ones(1, 6, 8, dtype=torch.float64)

    served = layer(x_BSD).abs().sum(dim=-1) > 0

    assert [[True, True, True, False, False, False]] == served.tolist()


def test_routing_groups_of_one_sequence_ignore_the_others() -> None:
    layer = _expert_layer(Routing(num_experts=4, top_k=2, capacity_factor=1.0, group_size=4))
    x_BSD = torch.randn(4, 8, 8, dtype=torch.float64)

    torch.testing.assert_close(layer(x_BSD)[:2], layer(x_BSD[:2]))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_equal_those_of_transformers(bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = T5Config(hidden=8, num_layers=1, num_heads=1, head_width=8, ffn=8)
    ours = PositionBias(config, bidirectional=bidirectional)
    distance = torch.arange(-300, 301)

    expected = t5.T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )

    assert expected.tolist() == ours._bucket(distance).tolist()
