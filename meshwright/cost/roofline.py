"""Time of operators by roofline: the slower of arithmetic and memory, over an efficiency.

::

    t(op) = max(flop / (peak * flop_efficiency), bytes / (bandwidth * memory_efficiency))

The runtime runs operators one by one, so nothing is fused: every operator reads its operands from
memory and writes its results there. A compiler that fuses pointwise chains makes this an upper
bound. Views are free.

Starting an operator takes the host ``launch_latency_s``. An accelerator works through a queue that
the host fills ahead, so of the launches only what exceeds the device's own time shows; on a CPU
they add up. Both are taken segment by segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device

__all__ = ["Roofline", "roofline_of"]

_GPU_FLOP_EFFICIENCY = 0.7
"""Share of the dense peak that large matrix products reach. Assumption: cuBLAS bf16 on A100 and
H100 reaches about 0.65 to 0.8 of the data sheet at the sizes of large transformers."""

_GPU_MEMORY_EFFICIENCY = 0.8
"""Share of the memory bandwidth that streaming kernels reach. Assumption (BabelStream: 0.85-0.92;
strided and reducing kernels less)."""

_CPU_FLOP_EFFICIENCY = 0.5
_CPU_MEMORY_EFFICIENCY = 0.7
"""Assumptions; the CPU's peak is itself an upper estimate (``cluster.cpu``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What one device reaches at one element type."""

    flop_per_s: float
    """Reached, efficiency included."""
    peak_flop_per_s: float
    """Data sheet; for utilization."""
    bytes_per_s: float
    """Reached, efficiency included."""
    launch_latency_s: float
    queue_runs_ahead: bool
    """Launches hide behind the device's work."""
    to_host_bytes_per_s: float = 0.0
    """Reached to and from the host's memory, efficiency included; 0: no way there."""

    def device_time_s(
        self, flop: NDArray[np.float64], num_bytes: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Time of each operator on the device, without its launch."""
        return np.asarray(np.maximum(flop / self.flop_per_s, num_bytes / self.bytes_per_s))

    def exposed_launch_s(
        self, device_s: NDArray[np.float64], num_launches: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Time that launches add to runs of operators with these totals."""
        host_s = num_launches * self.launch_latency_s
        if self.queue_runs_ahead:
            return np.asarray(np.maximum(host_s - device_s, 0.0))
        return np.asarray(host_s)


def roofline_of(device: Device, dtype: str) -> Roofline:
    """The roofline of ``device`` for a torch dtype name.

    Raises:
        BadRequest: the device has no unit for ``dtype``.
    """
    is_cpu = device.name == "cpu"
    peak = device.peak_flop_per_s(dtype)
    return Roofline(
        flop_per_s=peak * (_CPU_FLOP_EFFICIENCY if is_cpu else _GPU_FLOP_EFFICIENCY),
        peak_flop_per_s=peak,
        bytes_per_s=device.memory_bytes_per_s
        * (_CPU_MEMORY_EFFICIENCY if is_cpu else _GPU_MEMORY_EFFICIENCY),
        launch_latency_s=device.launch_latency_s,
        queue_runs_ahead=not is_cpu,
        to_host_bytes_per_s=device.to_host_bytes_per_s * _GPU_MEMORY_EFFICIENCY,
    )
