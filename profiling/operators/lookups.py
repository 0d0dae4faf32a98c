"""Embeddings, cross-entropy, and the output layer with its loss."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from meshwright.profiling.operators.candidate import Dims, Direction, Work
from meshwright.profiling.operators.family import FLOATS, Built, Family, Maker, log_int, size

__all__ = ["LOOKUPS"]

_BOTH = (Direction.FWD, Direction.BWD)
_INDEX_BYTES = 8
_VOCABULARIES = (8192, 16384, 30522, 32000, 50257, 51200, 65536, 128256, 151936)


def _embedding(dims: Dims, make: Maker) -> Built:
    ids_M = make.indices(size(dims, "m"), below=size(dims, "k"))
    table_KN = make.normal(size(dims, "k"), size(dims, "n"))
    return Built(call=lambda table: F.embedding(ids_M, table), inputs=(table_KN,))


def _embedding_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """The rows looked up are read and written; backward writes a gradient of the whole table."""
    m, rows = size(dims, "m"), size(dims, "m", "n")
    if direction is Direction.BWD:
        return Work(rows, (rows + size(dims, "k", "n")) * item_bytes + m * _INDEX_BYTES)
    return Work(0, 2 * rows * item_bytes + m * _INDEX_BYTES)


def _sample_embedding(rng: np.random.Generator) -> Dims:
    return {
        "m": log_int(rng, 64, 65536, 64),
        "n": log_int(rng, 128, 12288, 64),
        "k": int(rng.choice(_VOCABULARIES)),
    }


def _cross_entropy(dims: Dims, make: Maker) -> Built:
    targets_M = make.indices(size(dims, "m"), below=size(dims, "n"))
    logits_MN = make.normal(size(dims, "m"), size(dims, "n"))
    return Built(call=lambda logits: F.cross_entropy(logits, targets_M), inputs=(logits_MN,))


def _cross_entropy_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """Forward reads the logits; backward reads them (or their log-softmax) and writes as many."""
    m, numel = size(dims, "m"), size(dims, "m", "n")
    ways = 2 if direction is Direction.BWD else 1
    return Work(ways * 5 * numel, ways * numel * item_bytes + m * _INDEX_BYTES)


def _sample_cross_entropy(rng: np.random.Generator) -> Dims:
    return {"m": log_int(rng, 16, 32768, 16), "n": int(rng.choice(_VOCABULARIES))}


def _lm_head_loss(dims: Dims, make: Maker) -> Built:
    m, n, k = size(dims, "m"), size(dims, "n"), size(dims, "k")
    targets_M = make.indices(m, below=n)

    def call(x_MK: Tensor, w_NK: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_MK, w_NK), targets_M)

    return Built(call=call, inputs=(make.normal(m, k), make.normal(n, k)))


def _lm_head_loss_work(dims: Dims, direction: Direction, item_bytes: int) -> Work:
    """The linear layer's and the loss's together; logits are written and read."""
    m, n, k = size(dims, "m"), size(dims, "n"), size(dims, "k")
    ways = 2 if direction is Direction.BWD else 1
    loss = _cross_entropy_work({"m": m, "n": n}, direction, item_bytes)
    moved = ways * (m * k + n * k + m * n) * item_bytes
    return Work(ways * 2 * m * n * k + loss.flop, moved + loss.bytes)


def _sample_lm_head_loss(rng: np.random.Generator) -> Dims:
    return {**_sample_cross_entropy(rng), "k": log_int(rng, 256, 12288, 64)}


LOOKUPS = (
    Family(
        name="embedding",
        dims=("k", "m", "n"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_embedding,
        work=_embedding_work,
        sample=_sample_embedding,
        note="m tokens, n hidden, k rows of the table; a dense gradient",
    ),
    Family(
        name="cross_entropy",
        dims=("m", "n"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_cross_entropy,
        work=_cross_entropy_work,
        sample=_sample_cross_entropy,
        note="m tokens, n classes",
    ),
    Family(
        name="lm_head_loss",
        dims=("k", "m", "n"),
        directions=_BOTH,
        dtypes=FLOATS,
        build=_lm_head_loss,
        work=_lm_head_loss_work,
        sample=_sample_lm_head_loss,
        note="m tokens, n vocabulary, k hidden: output layer and cross-entropy",
    ),
)
