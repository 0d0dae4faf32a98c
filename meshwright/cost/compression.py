"""Values made smaller before they are sent: what is saved, and what making them smaller costs.

A codec passes over the values at the device's memory bandwidth ``m``; ``N`` elements of ``e`` bytes
become ``N f e`` bytes::

              f e                    memory traffic of both ends
    fp16      2                      2 N (e + 2)          read, write small; read small, write
    bf16      2                      2 N (e + 2)
    int8      1 + 4 / 1024           N (3 e + 2)          twice read: the largest of a row, then all
    top-k     (e + 4) / 100          N 10 e               residual added, kept and chosen by radix

The passes of top-k are an assumption (four reads to find the hundredth largest, as in a radix
select); rows of int8 are taken as 1,024 long. A cast is summed by the collective itself. Sums of
int8 are not: an all-reduce exchanges and decodes blocks, adds, and gathers the encoded sum (two
codecs), as a reduce-scatter and an all-gather. Sums of top-k have other places on each rank, so
every rank gathers all of them (arXiv 2301.02654, section 3)::

    wire of an all-reduce on n ranks      2 (n - 1) / n f B      top-k: (n - 1) f B

It is worth it only where ``codec < saved bytes / bandwidth``: on slow links. All of them change
numbers, int8 and top-k by far more than rounding, so nothing is compressed unless the user asks for
it; then a collective or transfer is compressed where that is faster, and sent as it is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.plans.plan import Compression
from meshwright.spmd.program import CollectiveKind

__all__ = ["Codec", "codec_of", "is_worth"]

_ROW = 1024
_INT8_PASSES = 3
_TOP_K_PASSES = 10
_KEPT = 0.01
_INDEX_BYTES = 4
_CASTS = {Compression.FP16: 2, Compression.BF16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One way of making values smaller, at one element size."""

    how: Compression
    wire_fraction: float
    """Bytes sent over bytes given; 1 or more: nothing is saved."""
    traffic_fraction: float
    """Bytes that encoding and decoding read and write, over bytes given."""

    def codec_s(self, num_bytes: ArrayLike, *, device_bytes_per_s: float) -> NDArray[np.float64]:
        """Seconds of encoding and decoding; elementwise."""
        traffic = np.asarray(num_bytes, dtype=np.float64) * self.traffic_fraction
        return np.asarray(traffic / device_bytes_per_s)

    def wire_bytes(
        self, kind: CollectiveKind, num_bytes: ArrayLike, num_ranks: int
    ) -> NDArray[np.float64]:
        """Payload of a collective that sends as long as the compressed one; elementwise."""
        payload = np.asarray(num_bytes, dtype=np.float64) * self.wire_fraction
        if self.how is Compression.TOP_K and kind is CollectiveKind.ALL_REDUCE:
            # 2 (n - 1) / n of this payload are (n - 1) of the compressed one.
            return np.asarray(payload * num_ranks / 2)
        return np.asarray(payload)

    def num_codecs(self, kind: CollectiveKind) -> int:
        """How often values are encoded and decoded in one collective."""
        twice = self.how is Compression.INT8 and kind is CollectiveKind.ALL_REDUCE
        return 2 if twice else 1


def codec_of(how: Compression, item_bytes: int) -> Codec | None:
    """The codec for elements of ``item_bytes``; ``None`` where nothing would get smaller."""
    if how in _CASTS:
        wire = _CASTS[how] / item_bytes
        traffic = 2 * (1 + wire)
    elif how is Compression.INT8:
        wire = (1 + _INDEX_BYTES / _ROW) / item_bytes
        traffic = _INT8_PASSES + 2 * wire
    elif how is Compression.TOP_K:
        wire = _KEPT * (item_bytes + _INDEX_BYTES) / item_bytes
        traffic = float(_TOP_K_PASSES)
    else:
        return None
    if wire >= 1:
        return None
    return Codec(how=how, wire_fraction=wire, traffic_fraction=traffic)


def is_worth(
    codec: Codec, num_bytes: float, *, link_bytes_per_s: float, device_bytes_per_s: float
) -> bool:
    """Whether one message is sooner there encoded: codec time below saved bytes over bandwidth."""
    saved_s = num_bytes * (1 - codec.wire_fraction) / link_bytes_per_s
    return float(codec.codec_s(num_bytes, device_bytes_per_s=device_bytes_per_s)) < saved_s
