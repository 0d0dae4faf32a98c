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
from meshwright.cost.calibration import DEFAULTS, Calibration
from meshwright.cost.pricing import OperatorPricer, Priced
from meshwright.cost.training_kernels import PLAIN, TrainingKernels, as_forward
from meshwright.cost.work import OperatorWork

__all__ = ["BoundPricer", "Roofline", "roofline_of"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundPricer:
    """A pricer bound to a type of device; equal to itself alone: times are remembered by it."""

    pricer: OperatorPricer
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What one device reaches at one element type."""

    flop_per_s: float
    """Reached, efficiency included."""
    peak_flop_per_s: float
    """Data sheet, of ``matmul_dtype`` where there is one; for utilization."""
    bytes_per_s: float
    """Reached, efficiency included."""
    launch_latency_s: float
    queue_runs_ahead: bool
    """Launches hide behind the device's work."""
    to_host_bytes_per_s: float = 0.0
    """Reached to and from the host's memory, efficiency included; 0: no way there."""
    pointwise_traffic: float = 1.0
    """Share of the traffic of element-wise operators that is left after fusion."""
    matmul_dtype: str = ""
    """What the products of linear layers are done in, where not as the job's precision says."""
    cast_speedup: float = 1.0
    """Rate of products in ``matmul_dtype`` over ``flop_per_s``."""
    kernels: TrainingKernels = PLAIN
    """What training adds to the price of an operator."""
    learned: BoundPricer | None = None
    """Prices operators in place of the rates above."""

    def device_time_s(
        self,
        flop: NDArray[np.float64],
        num_bytes: NDArray[np.float64],
        *,
        is_cast: NDArray[np.bool_] | bool = False,
    ) -> NDArray[np.float64]:
        """Time of each operator on the device, without its launch."""
        rate = self._flop_per_s(is_cast)
        return np.asarray(np.maximum(flop / rate, num_bytes / self.bytes_per_s))

    def _flop_per_s(self, is_cast: NDArray[np.bool_] | bool) -> NDArray[np.float64]:
        return np.where(is_cast, self.flop_per_s * self.cast_speedup, self.flop_per_s)

    def operators(self, work: OperatorWork, *, is_cast: NDArray[np.bool_]) -> Priced:
        """Learned prices of ``work`` as training runs it; only where ``learned``."""
        assert self.learned is not None, "a learned price"
        forward, times = as_forward(work)
        found = self.learned.pricer.operators(forward, self.learned.device)
        time_s = self.trained_s(found.time_s * times, work, is_cast=is_cast)
        return Priced(time_s=time_s, trust=found.trust)

    def trained_s(
        self, time_s: NDArray[np.float64], work: OperatorWork, *, is_cast: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """``time_s`` of ``work`` with what training adds (``cost.training_kernels``)."""
        return self.kernels.times_s(
            time_s,
            work,
            is_cast=is_cast,
            flop_per_s=self._flop_per_s(is_cast),
            bytes_per_s=self.bytes_per_s,
        )

    def exposed_launch_s(
        self, device_s: NDArray[np.float64], num_launches: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Time that launches add to runs of operators with these totals."""
        host_s = num_launches * self.launch_latency_s
        if self.queue_runs_ahead:
            return np.asarray(np.maximum(host_s - device_s, 0.0))
        return np.asarray(host_s)


def roofline_of(
    device: Device,
    dtype: str,
    *,
    calibration: Calibration = DEFAULTS,
    operators: OperatorPricer | None = None,
) -> Roofline:
    """The roofline of ``device`` for a torch dtype name.

    Args:
        device: by its data sheet.
        dtype: whose peak counts.
        calibration: efficiencies.
        operators: what prices operators; ``None``: the roofline itself.

    Raises:
        BadRequest: the device has no unit for ``dtype``, or for the type products are cast to.
    """
    is_cpu = device.name == "cpu"
    known = calibration
    plain_peak = device.peak_flop_per_s(dtype)
    peak = device.peak_flop_per_s(known.matmul_dtype or dtype)
    flop_share = known.cpu_flop_efficiency if is_cpu else known.flop_efficiency
    memory_share = known.cpu_memory_efficiency if is_cpu else known.memory_efficiency
    return Roofline(
        flop_per_s=plain_peak * flop_share,
        peak_flop_per_s=peak,
        bytes_per_s=device.memory_bytes_per_s * memory_share,
        launch_latency_s=device.launch_latency_s * known.launch_scale,
        queue_runs_ahead=not is_cpu,
        to_host_bytes_per_s=device.to_host_bytes_per_s * known.memory_efficiency,
        pointwise_traffic=known.pointwise_traffic,
        matmul_dtype=known.matmul_dtype,
        cast_speedup=peak / plain_peak,
        kernels=TrainingKernels(
            attention_forward=known.attention_forward_efficiency,
            attention_backward=known.attention_backward_efficiency,
            sustained=device.sustained_share,
            cast_bytes=known.cast_bytes,
        ),
        learned=None if operators is None else BoundPricer(pricer=operators, device=device),
    )
