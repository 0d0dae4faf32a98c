"""Compressed collectives and transfers: chosen exactly where the codec is faster than the link."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.compression import codec_of, is_worth
from meshwright.cost.step import StepCost
from meshwright.plans.plan import CommunicationOptions, Compression, Precision
from meshwright.space.search import SearchContext
from meshwright.space.uniform import UniformChoice, plan_of
from meshwright.spmd.program import CollectiveKind
from tests.cost.graphs import zoo
from tests.cost.plans import context_of, uniform_plan

LOSSY = (Compression.INT8, Compression.TOP_K)
EVERY = (Compression.FP16, Compression.BF16, *LOSSY)


@pytest.mark.parametrize(
    ("how", "item_bytes", "wire", "traffic"),
    [
        (Compression.FP16, 4, 1 / 2, 3.0),
        (Compression.BF16, 8, 1 / 4, 2.5),
        (Compression.INT8, 2, (1 + 1 / 256) / 2, 3 + (1 + 1 / 256)),
        (Compression.TOP_K, 4, 0.02, 10.0),
    ],
)
def test_what_a_codec_sends_and_reads(
    how: Compression, item_bytes: int, wire: float, traffic: float
) -> None:
    codec = codec_of(how, item_bytes)

    assert codec is not None
    assert wire == pytest.approx(codec.wire_fraction)
    assert traffic == pytest.approx(codec.traffic_fraction)


def test_nothing_gets_smaller_by_a_cast_to_the_same_size() -> None:
    assert codec_of(Compression.BF16, 2) is None
    assert codec_of(Compression.NONE, 4) is None


def test_top_k_of_many_ranks_is_gathered() -> None:
    """2 (n - 1) / n of the payload are (n - 1) times the compressed bytes."""
    codec = codec_of(Compression.TOP_K, 4)
    assert codec is not None

    for num_ranks in (2, 8):
        payload = float(codec.wire_bytes(CollectiveKind.ALL_REDUCE, 1000.0, num_ranks))
        assert 2 * (num_ranks - 1) / num_ranks * payload == pytest.approx((num_ranks - 1) * 20.0)


@given(
    st.sampled_from(EVERY),
    st.floats(1e3, 1e10),
    st.floats(1e8, 1e12),
    st.floats(1e11, 1e13),
)
def test_worth_it_where_the_link_is_slow(
    how: Compression, num_bytes: float, link: float, device: float
) -> None:
    """F saved, c read: worth it where c / device < (1 - f) / link, however many bytes."""
    codec = codec_of(how, 4)
    assert codec is not None
    expected = codec.traffic_fraction * link < (1 - codec.wire_fraction) * device

    assert expected == is_worth(
        codec, num_bytes, link_bytes_per_s=link, device_bytes_per_s=device
    ) or codec.traffic_fraction * link == pytest.approx((1 - codec.wire_fraction) * device)


def context_for(cluster: str, precision: Precision = Precision.FP32) -> SearchContext:
    dtype = "bfloat16" if precision is Precision.BF16 else "float32"
    reference = "tiny-gpt?num_layers=2&hidden=512&num_heads=8&vocab_size=512&seq_len=256"
    return context_of(zoo(reference, 16, dtype), cluster, 16, precision)


def cost_with(context: SearchContext, how: Compression, *, tp: int, pp: int) -> StepCost:
    plan = uniform_plan(context, tp=tp, pp=pp, num_microbatches=4)
    options = CommunicationOptions(tensor_parallel=how, pipeline=how)
    return context.model.cost(msgspec.structs.replace(plan, communication=options))


@pytest.mark.parametrize(
    ("cluster", "precision", "how", "gains"),
    [
        ("8xt4", Precision.FP32, Compression.FP16, True),
        ("8xt4", Precision.FP32, Compression.INT8, True),
        ("8xa100", Precision.BF16, Compression.INT8, False),
        ("8xa100", Precision.BF16, Compression.BF16, False),
    ],
)
def test_a_slow_link_gains_and_a_fast_one_stays(
    cluster: str, precision: Precision, how: Compression, gains: bool
) -> None:
    """PCIe 3 gains; NVLink moves bf16 sooner than A100s can encode it."""
    context = context_for(cluster, precision)
    before_s = cost_with(context, Compression.NONE, tp=4, pp=1).breakdown_s["tp_communication"]
    after_s = cost_with(context, how, tp=4, pp=1).breakdown_s["tp_communication"]

    assert after_s < 0.9 * before_s if gains else after_s == before_s


def test_stages_on_several_hosts_send_less() -> None:
    """Four stages on one T4 each: the transfers are those of half the bytes and a codec."""
    context = context_for("4xt4")
    plain = cost_with(context, Compression.NONE, tp=1, pp=4)
    packed = cost_with(context, Compression.FP16, tp=1, pp=4)

    assert packed.breakdown_s["pipeline_transfer"] < plain.breakdown_s["pipeline_transfer"]
    assert plain.breakdown_s["compute"] == pytest.approx(packed.breakdown_s["compute"])


def test_nothing_is_compressed_unless_asked() -> None:
    """Every rule proposes plans that send values as they are."""
    context = context_for("8xt4")
    plan = plan_of(context, UniformChoice(tp=4), solver="test")

    assert Compression.NONE is plan.communication.tensor_parallel
    assert Compression.NONE is plan.communication.pipeline
