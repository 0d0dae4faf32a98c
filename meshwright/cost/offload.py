"""Optimizer state in the host's memory: what it saves on the device and what it costs.

As ZeRO-Offload does (arXiv 2101.06840, section 4): moments and the copy the optimizer updates live
on the host and the host steps; gradients go there and parameters come back, each once a step in the
model's element type::

    device memory   - moments - copy - temporaries of the step
    time            (gradient + parameter) / host link + accesses of the step / host memory

The three parts are counted one after the other. That is an upper estimate: gradients can go while
the backward runs, and parameters come back while others are stepped. The host's capacity is not
checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import PlanRefused

if TYPE_CHECKING:
    from meshwright.cost.parameters import ParameterState

__all__ = ["HOST_BYTES_PER_S", "offload_time_s", "with_offload"]

HOST_BYTES_PER_S = 50e9
"""Host memory bandwidth a device's share of the CPUs reaches. Assumption: a DGX A100 has 16
channels of DDR4-3200, 410 GB/s for eight GPUs; newer hosts have more."""


def with_offload(state: ParameterState, is_offloaded: NDArray[np.bool_]) -> ParameterState:
    """``state`` with the optimizer state of some parameters on the host; mask by parameter."""
    moved = state.chunk_bytes * (state.gradient_bytes > 0)
    return replace(
        state,
        optimizer_bytes=np.where(is_offloaded, 0.0, state.optimizer_bytes),
        step_bytes=np.where(is_offloaded, 0.0, state.step_bytes),
        step_traffic_bytes=np.where(is_offloaded, 0.0, state.step_traffic_bytes),
        host_link_bytes=np.where(is_offloaded, 2 * moved, 0.0),
        host_step_bytes=np.where(is_offloaded, state.step_traffic_bytes, 0.0),
    )


def offload_time_s(
    link_bytes: NDArray[np.float64],
    step_bytes: NDArray[np.float64],
    *,
    link_bytes_per_s: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Seconds of the host's step and of what goes there and comes back; elementwise.

    Args:
        link_bytes: gradients and parameters.
        step_bytes: read and written by the step.
        link_bytes_per_s: of the way to the host, each direction; 0 where there is none.

    Raises:
        PlanRefused: bytes go where no way leads.
    """
    if ((link_bytes > 0) & (link_bytes_per_s <= 0)).any():
        raise PlanRefused(
            "$.segments: offload moves optimizer state to the host, but a device of the cluster "
            "has no to_host_bytes_per_s; give it one, or plan without offload"
        )
    way = np.where(link_bytes_per_s > 0, link_bytes_per_s, 1.0)
    return np.asarray(link_bytes / way + step_bytes / HOST_BYTES_PER_S)
