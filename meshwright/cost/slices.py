"""What slices of a sequence take, each as an item of the pipeline (TeraPipe, arXiv 2102.07988).

A slice of l of T tokens with c before it takes

* of operators that work token by token, and of collectives, what as many rows of samples take: the
  weights are read and latencies paid for every slice;
* of causal attention the share ``l (2 c + l) / T^2``, so that later slices take longer and all sum
  to 1;
* in full what ZeRO gathers and reduces for every function, and the host's launches, which show
  where the slice no longer covers them.

What works token by token is known for some shares of a sequence and taken as linear between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meshwright.cost.columns import FloatArray
from meshwright.cost.stage_work import StageWork
from meshwright.cost.table import SLICE_SHARES

__all__ = ["attention_shares", "slice_time_s", "sliced_transfers_s", "sliced_work", "token_shares"]


def token_shares(lengths: Sequence[int]) -> FloatArray:
    """(slices,) share of the tokens."""
    return np.asarray(lengths, dtype=np.float64) / sum(lengths)


def attention_shares(lengths: Sequence[int]) -> FloatArray:
    """(slices,) share of causal attention."""
    share = token_shares(lengths)
    before = np.cumsum(share) - share
    return np.asarray(share * (2 * before + share))


def sliced_work(
    work: StageWork, lengths: Sequence[int]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Forward and backward by cause as in ``StageWork``, but (stages, slices)."""
    return _sliced(work, token_shares(lengths), attention_shares(lengths))


def slice_time_s(work: StageWork, length: FloatArray, before: FloatArray) -> FloatArray:
    """(stages, slices) seconds of forward and backward of single slices.

    ``length`` and ``before`` are shares of the sequence, (slices,): the slice and what precedes it.
    """
    forward, backward = _sliced(work, length, length * (2 * before + length))
    return np.asarray(np.sum([*forward.values(), *backward.values()], axis=0))


def _sliced(
    work: StageWork, tokens: FloatArray, attention: FloatArray
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    parts, found = work.parts, []
    for phase, causes in (("forward", work.forward), ("backward", work.backward)):
        alone = parts[f"{phase}_attention"]
        last = parts[f"{phase}_compute_{len(SLICE_SHARES) - 1}"]
        # What belongs to no segment is linear.
        rest = np.maximum(causes["compute"] - alone - last, 0.0)
        compute = _between(parts, f"{phase}_compute", tokens)
        compute += rest[:, None] * tokens + alone[:, None] * attention
        exposed = (parts[f"{phase}_host"][:, None] - compute) * parts["hides"][:, None]
        found.append(
            {
                **{cause: each[:, None] + 0.0 * tokens for cause, each in causes.items()},
                "compute": compute,
                "launch": np.maximum(causes["launch"][:, None], exposed),
                "tp_communication": _between(parts, f"{phase}_communication", tokens),
            }
        )
    return found[0], found[1]


def _between(parts: Mapping[str, FloatArray], name: str, tokens: FloatArray) -> FloatArray:
    """(stages, slices) seconds at shares ``tokens``, linear between the known ones and below."""
    known = np.array([parts[f"{name}_{number}"] for number in range(len(SLICE_SHARES))])
    shares = np.array(SLICE_SHARES)
    place = np.clip(np.searchsorted(shares, tokens), 1, len(shares) - 1)
    low, high = shares[place - 1], shares[place]
    weight = (tokens - low) / (high - low)
    seconds = known[place - 1] + (known[place] - known[place - 1]) * weight[:, None]
    return np.asarray(np.maximum(seconds, 0.0).T)


def sliced_transfers_s(
    transfers_s: Mapping[tuple[int, int], float],
    lengths: Sequence[int],
    latency_s: Mapping[tuple[int, int], float],
) -> dict[tuple[int, int], list[float]]:
    """Seconds of each slice: the latency each, and its share of the rest."""
    tokens = token_shares(lengths)
    found = {}
    for edge, seconds in transfers_s.items():
        fixed = min(latency_s[edge], seconds)
        found[edge] = (fixed + (seconds - fixed) * tokens).tolist()
    return found
