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

from meshwright.cost.collectives import CollectivePrices, collective_time_s
from meshwright.spmd.program import CollectiveKind

__all__ = ["StagePlace", "resharding_time_s"]

_TOLERANCE = 1.01


StagePlace = tuple[int, int]
"""First device and number of devices of a stage."""


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
        seconds += collective_time_s(
            CollectiveKind.ALL_GATHER, target_bytes, cluster=prices.cluster, ranks=ranks
        )
    return seconds
