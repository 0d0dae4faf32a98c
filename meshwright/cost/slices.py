"""What slices of a sequence take, each as an item of the pipeline (TeraPipe, arXiv 2102.07988).

A slice of l of T tokens with c before it takes of the work of a whole sequence

* ``l / T`` of what works token by token and of what its collectives carry,
* ``l (2 c + l) / T^2`` of causal attention, so that later slices take longer and all sum to 1,

and in full what does not shrink with it: the latency of collectives, what ZeRO gathers and reduces
for every function, and the host's launches, which show where the slice no longer covers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meshwright.cost.columns import FloatArray
from meshwright.cost.stage_work import StageWork

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
    found = []
    for phase, causes in (("forward", work.forward), ("backward", work.backward)):
        alone = work.parts[f"{phase}_attention"][:, None]
        compute = (causes["compute"][:, None] - alone) * tokens + alone * attention
        exposed = (work.parts[f"{phase}_host"][:, None] - compute) * work.parts["hides"][:, None]
        latency = work.parts[f"{phase}_latency"][:, None]
        carried = causes["tp_communication"][:, None] - latency
        found.append(
            {
                **{cause: each[:, None] + 0.0 * tokens for cause, each in causes.items()},
                "compute": compute,
                "launch": np.maximum(causes["launch"][:, None], exposed),
                "tp_communication": latency + carried * tokens,
            }
        )
    return found[0], found[1]


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
