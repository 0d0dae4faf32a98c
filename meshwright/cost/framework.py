"""What a training framework adds to a step beyond the work of devices and links.

::

    rest         = work + host_s_per_microbatch * micro-batches + host_s_per_step
    data loading = data_loading_share * rest
    stragglers   = straggler_share * log2(devices) * rest

Gradient clipping and the optimizer are work of the stages (``cost.stage_work``).
"""

from __future__ import annotations

import math

from meshwright.cost.calibration import Calibration
from meshwright.cost.columns import FloatArray

__all__ = ["framework_breakdown_s", "with_framework_s"]


def framework_breakdown_s(
    calibration: Calibration, work_s: float, *, num_microbatches: int, num_devices: int
) -> dict[str, float]:
    """Seconds by cause on top of ``work_s``: ``host``, ``data_loading`` and ``stragglers``."""
    host_s = _host_s(calibration, num_microbatches)
    rest_s = work_s + host_s
    return {
        "host": host_s,
        "data_loading": calibration.data_loading_share * rest_s,
        "stragglers": calibration.straggler_share * math.log2(num_devices) * rest_s,
    }


def with_framework_s(
    calibration: Calibration, work_s: FloatArray, *, num_microbatches: int, num_devices: int
) -> FloatArray:
    """(n,) seconds of steps whose work takes ``work_s``."""
    share = calibration.straggler_share * math.log2(num_devices) + calibration.data_loading_share
    return (work_s + _host_s(calibration, num_microbatches)) * (1 + share)


def _host_s(calibration: Calibration, num_microbatches: int) -> float:
    return num_microbatches * calibration.host_s_per_microbatch + calibration.host_s_per_step
