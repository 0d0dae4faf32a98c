"""Scaled dot-product attention and rotary embeddings."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, Work
from meshwright.profiling.operators.family import (
    FLOATS,
    Built,
    Family,
    Maker,
    doubled,
    log_int,
    size,
)

__all__ = ["ATTENTION"]

_BOTH = (Direction.FWD, Direction.BWD)


def _sdpa(dims: Dims, make: Maker) -> Built:
    b, heads, kv_heads = size(dims, "b"), size(dims, "heads"), size(dims, "kv_heads")
    head_dim, causal = size(dims, "head_dim"), bool(dims["causal"])
    shape_kv = (b, kv_heads, size(dims, "seq_k"), head_dim)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=heads != kv_heads
        )

    query = make.normal(b, heads, size(dims, "seq_q"), head_dim)
    return Built(call=call, inputs=(query, make.normal(*shape_kv), make.normal(*shape_kv)))


def _sdpa_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """Two products over the pairs of a query and a key it sees.

    Backward: four products (a kernel that makes the scores again does five), and of traffic q, k,
    v, the result and its gradient read, three gradients written: twice the forward's of both.
    """
    seq_q, seq_k = size(dims, "seq_q"), size(dims, "seq_k")
    pairs = _causal_pairs(seq_q, seq_k) if dims["causal"] else seq_q * seq_k
    per_pair = size(dims, "b", "heads", "head_dim")
    queries, keys = seq_q * size(dims, "heads"), seq_k * size(dims, "kv_heads")
    moved = size(dims, "b", "head_dim") * (2 * queries + 2 * keys)
    return doubled(Work(4 * per_pair * pairs, moved * item_bytes), direction)


def _causal_pairs(seq_q: int, seq_k: int) -> int:
    """Query i sees keys 0 to i, as torch aligns them: sum of min(i + 1, seq_k)."""
    diagonal = min(seq_q, seq_k)
    return diagonal * (diagonal + 1) // 2 + (seq_q - diagonal) * seq_k


def _sample_sdpa(rng: np.random.Generator) -> Dims:
    heads = int(rng.choice([4, 8, 12, 16, 20, 25, 32, 40, 64, 96]))
    shared = [ways for ways in (1, 1, 1, 4, 8) if heads % ways == 0]
    length = log_int(rng, 64, 16384, 64)
    return {
        "b": log_int(rng, 1, 64),
        "seq_q": length,
        "seq_k": length,
        "heads": heads,
        "kv_heads": heads // int(rng.choice(shared)),
        "head_dim": int(rng.choice([32, 64, 64, 80, 96, 128, 128])),
        "causal": bool(rng.random() < 0.6),
    }


def _rope(dims: Dims, make: Maker) -> Built:
    """Positions of heads that lie beside each other; halves of a head rotated in pairs."""
    m, head_dim = size(dims, "m"), size(dims, "head_dim")
    heads = size(dims, "n") // head_dim
    cos_MD, sin_MD = (
        make.normal(m, 1, head_dim, grad=False),
        make.normal(m, 1, head_dim, grad=False),
    )

    def call(x_MHD: Tensor) -> Tensor:
        first, second = x_MHD.chunk(2, dim=-1)
        return x_MHD * cos_MD + torch.cat((-second, first), dim=-1) * sin_MD

    return Built(call=call, inputs=(make.normal(m, heads, head_dim),))


def _rope_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    numel = size(dims, "m", "n")
    return Work((2 if direction is Direction.BWD else 1) * 6 * numel, 2 * numel * item_bytes)


def _sample_rope(rng: np.random.Generator) -> Dims:
    head_dim = int(rng.choice([64, 80, 96, 128]))
    heads = log_int(rng, 2, 128)
    return {"m": log_int(rng, 64, 65536, 64), "n": heads * head_dim, "head_dim": head_dim}


ATTENTION = (
    Family(
        name="sdpa",
        dims=("b", "causal", "head_dim", "heads", "kv_heads", "seq_k", "seq_q"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_sdpa,
        work=_sdpa_work,
        sample=_sample_sdpa,
        note="whichever kernel torch chooses",
    ),
    Family(
        name="rope",
        dims=("head_dim", "m", "n"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_rope,
        work=_rope_work,
        sample=_sample_rope,
        note="angles are not counted; eager, it is six operators",
    ),
)
