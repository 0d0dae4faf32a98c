"""Time of passing values between stages of different meshes.

Between stages of one mesh every rank sends what it holds to its peer. Between stages of different
meshes the elements of a value go over the slow link once (Alpa's local all-gather, arXiv
2201.12023, section 6): the ranks of the smaller mesh share them out evenly, and where the receiving
layout holds more on a rank than came to it, neighboring receivers gather the rest among
themselves::

    time = latency + W / min(n_source, n_target) / bandwidth + all-gather of b_target

with the W bytes of the whole value, n ranks of each stage and b_target bytes each receiver needs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import BACKWARD, FORWARD, IntArray
from meshwright.cost.compression import Codec
from meshwright.cost.table import CostTable, Split
from meshwright.spmd.program import CollectiveKind

__all__ = ["StagePlace", "crossing_of", "resharding_time_s", "transfer_time_s"]

_TOLERANCE = 1.01


StagePlace = tuple[int, int]
"""First device and number of devices of a stage."""


def transfer_time_s(
    prices: CollectivePrices,
    *,
    source: StagePlace,
    target: StagePlace,
    num_bytes: float,
    whole_bytes: float | None,
    codec: Codec | None,
    device_bytes_per_s: float,
) -> float:
    """Seconds to pass a micro-batch's values from one stage to another, encoded where sooner.

    Args:
        prices: of the cluster.
        source: who sends.
        target: who receives.
        num_bytes: what each receiver needs.
        whole_bytes: of the values as one device would hold them, where the meshes differ.
        codec: what may be used; ``None``: values travel as they are.
        device_bytes_per_s: memory bandwidth that encoding reaches.
    """

    def sent_s(share: float) -> float:
        if whole_bytes is None:
            return prices.send_time_s(share * num_bytes, source[0], target[0])
        return resharding_time_s(
            prices,
            source=source,
            target=target,
            whole_bytes=share * whole_bytes,
            target_bytes=share * num_bytes,
        )

    if codec is None:
        return sent_s(1.0)
    codec_s = float(codec.codec_s(num_bytes, device_bytes_per_s=device_bytes_per_s))
    return min(sent_s(1.0), sent_s(codec.wire_fraction) + codec_s)


def resharding_time_s(
    prices: CollectivePrices,
    *,
    source: StagePlace,
    target: StagePlace,
    whole_bytes: float,
    target_bytes: float,
) -> float:
    """Seconds to pass values of ``whole_bytes`` from one stage to another of a different mesh.

    Args:
        prices: of the cluster.
        source: who sends.
        target: who receives.
        whole_bytes: of the values as one device would hold them.
        target_bytes: what each receiver needs.
    """
    if whole_bytes <= 0:
        return 0.0
    each = whole_bytes / min(source[1], target[1])
    seconds = prices.send_time_s(each, source[0], target[0])
    came = whole_bytes / target[1]
    if target_bytes > _TOLERANCE * came:
        ways = min(max(round(target_bytes / came), 2), target[1])
        ranks = range(target[0], target[0] + ways)
        seconds += prices.time_of_ranks_s(CollectiveKind.ALL_GATHER, target_bytes, ranks)
    return seconds


def crossing_of(
    table: CostTable, split: Split, stage_of: IntArray, *, relays: bool
) -> Mapping[tuple[int, int, int], float]:
    """Bytes of one micro-batch by (phase, source stage, target stage), for one rank.

    With ``relays`` every value goes from neighbor to neighbor, once over each cut it passes, and
    every stage waits for the one before it.
    """
    num_stages = int(stage_of.max()) + 1
    if num_stages == 1:
        return {}
    if not relays:
        return table.crossing_bytes(split, stage_of)
    found: dict[tuple[int, int, int], float] = {}
    for stage in range(num_stages - 1):
        ends = (stage, stage + 1)
        found[FORWARD, stage, stage + 1] = found[BACKWARD, stage + 1, stage] = 0.0
        cut = table.crossing_bytes(split, (stage_of > stage).astype(np.int64))
        for (phase, source, target), num_bytes in cut.items():
            found[phase, ends[source], ends[target]] = num_bytes
    return found
