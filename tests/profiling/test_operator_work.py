"""Operations and bytes of every operator family against figures worked out by hand."""

from __future__ import annotations

import pytest

from meshwright.profiling.operators import FAMILIES, Direction

FWD, BWD, UPDATE = Direction.FWD, Direction.BWD, Direction.UPDATE

ROWS = {"m": 3, "n": 10}
CONV = {
    "b": 2, "channels_in": 4, "channels_out": 8, "kernel": 3, "stride": 2,
    "height": 9, "width": 9, "groups": 2,
}  # fmt: skip
SDPA = {
    "b": 2, "seq_q": 4, "seq_k": 4, "heads": 6, "kv_heads": 2, "head_dim": 8, "causal": True,
}  # fmt: skip

KNOWN = [
    # 2 x 2x3x4 products; 2x4 read, 3x4 weights, 2x3 written, 4 bytes each
    ("linear", {"m": 2, "n": 3, "k": 4}, FWD, 4, 48, (8 + 12 + 6) * 4),
    ("linear", {"m": 2, "n": 3, "k": 4}, BWD, 4, 96, 2 * (8 + 12 + 6) * 4),
    # fp8: 1 byte read, 2 written
    ("linear", {"m": 16, "n": 32, "k": 16}, FWD, 1, 16384, 256 + 512 + 2 * 512),
    ("bmm", {"b": 5, "m": 2, "n": 3, "k": 4}, FWD, 2, 5 * 48, 5 * 26 * 2),
    ("bmm", {"b": 5, "m": 2, "n": 3, "k": 4}, BWD, 2, 5 * 96, 5 * 52 * 2),
    # 6 rows over 2 experts of 4 x 3
    ("grouped_mm", {"m": 6, "n": 3, "k": 4, "experts": 2}, FWD, 2, 144, (24 + 24 + 18) * 2),
    ("grouped_mm", {"m": 6, "n": 3, "k": 4, "experts": 2}, BWD, 2, 288, 2 * 66 * 2),
    # 1 + 2 + 3 + 4 = 10 pairs, 2 products of 2 operations, 2 x 6 x 8 for each pair
    ("sdpa", SDPA, FWD, 2, 10 * 4 * 96, 2 * 8 * (2 * 24 + 2 * 8) * 2),
    ("sdpa", SDPA, BWD, 2, 2 * 10 * 4 * 96, 2 * 2 * 8 * (2 * 24 + 2 * 8) * 2),
    ("sdpa", SDPA | {"causal": False}, FWD, 2, 16 * 4 * 96, 2048),
    # causal, longer queries than keys: 1 + 2 + 3 + 4 + 4 + 4
    ("sdpa", SDPA | {"seq_q": 6}, FWD, 2, 18 * 4 * 96, 2 * 8 * (2 * 36 + 2 * 8) * 2),
    ("rope", {"m": 3, "n": 16, "head_dim": 8}, FWD, 2, 6 * 48, 2 * 48 * 2),
    ("rope", {"m": 3, "n": 16, "head_dim": 8}, BWD, 2, 12 * 48, 2 * 48 * 2),
    ("add", ROWS, FWD, 4, 30, 3 * 30 * 4),
    ("mul", ROWS, BWD, 4, 60, 5 * 30 * 4),
    ("div", ROWS, FWD, 2, 30, 3 * 30 * 2),
    ("add_scalar", ROWS, FWD, 4, 30, 2 * 30 * 4),
    ("mul_scalar", ROWS, BWD, 4, 60, 2 * 30 * 4),
    ("neg", ROWS, FWD, 4, 30, 2 * 30 * 4),
    ("pow", ROWS, BWD, 4, 60, 3 * 30 * 4),
    ("rsqrt", ROWS, FWD, 4, 60, 2 * 30 * 4),
    ("relu", ROWS, BWD, 4, 60, 3 * 30 * 4),
    ("tanh", ROWS, FWD, 4, 150, 2 * 30 * 4),
    ("gelu", ROWS, FWD, 4, 240, 2 * 30 * 4),
    ("gelu_tanh", ROWS, BWD, 4, 480, 3 * 30 * 4),
    ("silu", ROWS, FWD, 4, 150, 2 * 30 * 4),
    ("silu_mul", ROWS, FWD, 2, 180, 3 * 30 * 2),
    ("silu_mul", ROWS, BWD, 2, 360, 5 * 30 * 2),
    # one byte of mask for each element
    ("dropout", ROWS, FWD, 2, 60, 30 * (2 * 2 + 1)),
    ("dropout", ROWS, BWD, 2, 120, 30 * (2 * 2 + 1)),
    ("softmax", ROWS, FWD, 4, 150, 2 * 30 * 4),
    ("softmax", ROWS, BWD, 4, 300, 3 * 30 * 4),
    # rows read and written, weight and bias of 260 read once
    ("layer_norm", {"m": 144, "n": 260}, FWD, 4, 299520, 299520 + 2 * 260 * 4),
    ("layer_norm", {"m": 80, "n": 192}, FWD, 2, 122880, 61440 + 2 * 192 * 2),
    # backward reads the weight and writes the gradients of weight and bias
    ("layer_norm", ROWS, BWD, 4, 480, (3 * 30 + 3 * 10) * 4),
    ("rms_norm", {"m": 1, "n": 4096}, FWD, 2, 24576, 16384 + 4096 * 2),
    ("rms_norm", ROWS, BWD, 2, 360, (3 * 30 + 2 * 10) * 2),
    ("sum", ROWS | {"variant": "over_rows"}, FWD, 4, 30, (30 + 10) * 4),
    ("sum", ROWS | {"variant": "over_columns"}, FWD, 4, 30, (30 + 3) * 4),
    # 3 indices of 8 bytes; backward writes the table of 50 rows
    ("embedding", ROWS | {"k": 50}, FWD, 2, 0, 2 * 30 * 2 + 24),
    ("embedding", ROWS | {"k": 50}, BWD, 2, 30, (30 + 500) * 2 + 24),
    ("cross_entropy", ROWS, FWD, 4, 150, 30 * 4 + 24),
    ("cross_entropy", ROWS, BWD, 4, 300, 2 * 30 * 4 + 24),
    # 2 x 3x10x4 and the loss; 12 + 40 + 30 elements and the loss's
    ("lm_head_loss", ROWS | {"k": 4}, FWD, 2, 240 + 150, 82 * 2 + 30 * 2 + 24),
    ("lm_head_loss", ROWS | {"k": 4}, BWD, 2, 480 + 300, 2 * 82 * 2 + 2 * 30 * 2 + 24),
    # 9 with padding 1 and stride 2 makes 5; a window reads 4 / 2 x 9 = 18; 2 x 8 x 25 results
    ("conv2d", CONV, FWD, 4, 2 * 400 * 18, (2 * 4 * 81 + 8 * 18 + 400) * 4),
    ("conv2d", CONV, BWD, 4, 4 * 400 * 18, 2 * (648 + 144 + 400) * 4),
    # patches: kernel 4, stride 4 tile 8 x 8 without padding
    (
        "conv2d",
        CONV | {"kernel": 4, "stride": 4, "height": 8, "width": 8, "groups": 1},
        FWD,
        4,
        2 * (2 * 8 * 4) * (4 * 16),
        (2 * 4 * 64 + 8 * 4 * 16 + 64) * 4,
    ),
    ("batch_norm", {"b": 2, "channels_in": 3, "height": 4, "width": 5}, FWD, 4, 960, (240 + 6) * 4),
    (
        "batch_norm",
        {"b": 2, "channels_in": 3, "height": 4, "width": 5},
        BWD,
        4,
        1920,
        (360 + 9) * 4,
    ),
]

POOL = {"b": 2, "channels_in": 3, "height": 8, "width": 8}
KNOWN_2 = [
    # 8 with padding 1 and stride 2 makes 4: 96 results of 9; an index of 8 bytes for each
    ("pool", POOL | {"kernel": 3, "stride": 2, "variant": "max"}, FWD, 4, 864, 480 * 4 + 768),
    ("pool", POOL | {"kernel": 3, "stride": 2, "variant": "max"}, BWD, 4, 1728, 480 * 4 + 768),
    ("pool", POOL | {"kernel": 8, "stride": 8, "variant": "avg"}, FWD, 4, 6 * 64, (384 + 6) * 4),
    ("copy", ROWS | {"variant": "strided"}, FWD, 2, 0, 2 * 30 * 2),
    ("copy", ROWS | {"variant": "host_to_device"}, FWD, 2, 0, 30 * 2),
    ("cast", ROWS | {"variant": "to_bf16"}, FWD, 4, 0, 30 * 6),
    ("random", {"numel": 7, "variant": "normal"}, FWD, 4, 0, 28),
    ("adam", {"numel": 11, "num_tensors": 2, "variant": "fused"}, UPDATE, 4, 143, 7 * 44),
    ("adamw", {"numel": 11, "num_tensors": 2, "variant": "foreach"}, UPDATE, 2, 154, 7 * 22),
    ("sgd", {"numel": 11, "num_tensors": 1, "variant": "fused"}, UPDATE, 4, 44, 5 * 44),
]


@pytest.mark.parametrize(
    ("name", "dims", "direction", "item_bytes", "flops", "num_bytes"),
    KNOWN + KNOWN_2,
    ids=[f"{row[0]}-{row[2]}-{index}" for index, row in enumerate(KNOWN + KNOWN_2)],
)
def test_work_worked_out_by_hand(
    name: str,
    dims: dict[str, int | bool | str],
    direction: Direction,
    item_bytes: int,
    flops: int,
    num_bytes: int,
) -> None:
    assert (flops, num_bytes) == tuple(FAMILIES[name].work(dims, direction, item_bytes))


def test_every_family_has_a_figure_above() -> None:
    assert sorted(FAMILIES) == sorted({row[0] for row in KNOWN + KNOWN_2})


def test_causal_attention_counts_what_published_tables_count() -> None:
    """Batch 4, 16,384 tokens, 96 heads of 128: a row of a published table of measurements."""
    dims = {
        "b": 4, "seq_q": 16384, "seq_k": 16384, "heads": 96, "kv_heads": 2, "head_dim": 128,
        "causal": True,
    }  # fmt: skip

    assert (26389889679360, 3288334336) == tuple(FAMILIES["sdpa"].work(dims, FWD, 2))
