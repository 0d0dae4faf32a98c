"""A measured machine as a cluster, in the words of a data sheet; needs no torch.

The cost model counts on a share of what a data sheet promises (``cost.roofline``,
``cost.calibration``). What was measured is what is reached, so the cluster holds
the measured rate over that share: predictions from it are then as fast as what was measured. Every
source says both.

Latency and bandwidth of the link are those with which the cost model's own formulas come nearest
to the collectives measured: least mean ``|log(predicted / measured)|``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Cluster, Device, GroupLevel, Host, Link
from meshwright.cost.calibration import DEFAULTS
from meshwright.cost.collectives import alternatives
from meshwright.cost.roofline import roofline_of
from meshwright.errors import MissingProfile
from meshwright.profiling.figures import Figure
from meshwright.profiling.sweeps import TORCH_NAMES
from meshwright.records.kinds import Kind
from meshwright.spmd.program import CollectiveKind
from meshwright.units import format_seconds

__all__ = ["LinkFit", "cluster_of", "fit_link"]

_KINDS = {
    "all_reduce": CollectiveKind.ALL_REDUCE,
    "all_gather": CollectiveKind.ALL_GATHER,
    "reduce_scatter": CollectiveKind.REDUCE_SCATTER,
    "all_to_all": CollectiveKind.ALL_TO_ALL,
    "send_recv": CollectiveKind.HALO,  # one message, priced as a send is
}
_LATENCIES_S = (1e-7, 1e-1)
_BANDWIDTHS = (1e6, 1e13)
"""Bytes/s; where the fit looks first."""
_FAIR_ERROR_FRACTION = 0.3
"""Mean error of a link's fit that is not warned of."""
_GRID = 49
_ZOOMS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """The link that explains measured collectives best."""

    latency_s: float
    bytes_per_s: float
    """As a data sheet would say; ``Calibration.link_efficiency`` of it is reached."""
    median_ratio: float
    """Of predicted over measured."""
    mean_error_fraction: float
    """``exp(mean |log(predicted / measured)|) - 1``."""
    num_figures: int

    @property
    def warning(self) -> str:
        """What to beware of; empty where the link explains the collectives well."""
        if self.mean_error_fraction <= _FAIR_ERROR_FRACTION:
            return ""
        return (
            "WARNING: latency and bandwidth explain these collectives with a mean error of "
            f"{100 * self.mean_error_fraction:.0f} %, and so coarse are predictions from them; "
            "measure again when nothing else runs, with a rank for each core at most"
        )

    @property
    def reached_bytes_per_s(self) -> float:
        """What large messages reach."""
        return self.bytes_per_s * DEFAULTS.link_efficiency


def fit_link(figures: Sequence[Figure]) -> LinkFit:
    """The link of ``figures``, collectives among ranks that one link joins.

    Raises:
        MissingProfile: there is none among them.
    """
    rows = [
        (float(figure.extra["bytes"] or 0), int(figure.extra["group_size"] or 0), figure)
        for figure in figures
        if figure.kind == Kind.COLLECTIVE and figure.name in _KINDS
    ]
    if not rows:
        raise MissingProfile(
            "no collective was measured, so the link is not known; run `meshwright profile "
            "machine` with a longer --budget"
        )
    measured_s = np.array([figure.median for _, _, figure in rows])
    costs = [_unit_costs(_KINDS[figure.name], size) for _, size, figure in rows]
    payload_bytes = [num_bytes for num_bytes, _, _ in rows]
    low = np.log([_LATENCIES_S[0], _BANDWIDTHS[0]])
    high = np.log([_LATENCIES_S[1], _BANDWIDTHS[1]])
    for _ in range(_ZOOMS):
        axes = [np.exp(np.linspace(low[i], high[i], _GRID)) for i in range(2)]
        error = _log_error(axes[0][:, None], axes[1][None, :], costs, payload_bytes, measured_s)
        place = np.unravel_index(int(np.argmin(error)), error.shape)
        best = np.log([axes[i][place[i]] for i in range(2)])
        reach = (high - low) / 8
        low, high = best - reach, best + reach
    latency_s, bytes_per_s = (float(value) for value in np.exp(best))
    predicted_s = [
        _price_s(latency_s, bytes_per_s, cost, num_bytes)
        for cost, num_bytes in zip(costs, payload_bytes, strict=True)
    ]
    return LinkFit(
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        median_ratio=statistics.median(
            float(said) / float(took) for said, took in zip(predicted_s, measured_s, strict=True)
        ),
        mean_error_fraction=math.expm1(float(error.min())),
        num_figures=len(rows),
    )


def _unit_costs(kind: CollectiveKind, num_ranks: int) -> tuple[tuple[float, float], ...]:
    """Hops and bytes over the link, per byte of payload, of each algorithm; prices are linear."""
    link = Link(name="unit", bytes_per_s=1.0, latency_s=1.0, source="a unit to count with")
    level = GroupLevel(level_index=0, link=link, group_sizes=(num_ranks,))
    return alternatives(kind, (level,), num_ranks)


def _price_s(
    latency_s: float | NDArray[np.float64],
    bytes_per_s: float | NDArray[np.float64],
    cost: tuple[tuple[float, float], ...],
    num_bytes: float,
) -> NDArray[np.float64]:
    times = [hops * latency_s + share * num_bytes / bytes_per_s for hops, share in cost]
    return np.asarray(np.minimum.reduce(np.broadcast_arrays(*times)))


def _log_error(
    latency_s: NDArray[np.float64],
    bytes_per_s: NDArray[np.float64],
    costs: Sequence[tuple[tuple[float, float], ...]],
    payload_bytes: Sequence[float],
    measured_s: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean ``|log(predicted / measured)|`` for every pair of latency and bandwidth."""
    total = np.zeros(np.broadcast_shapes(latency_s.shape, bytes_per_s.shape))
    for cost, num_bytes, took_s in zip(costs, payload_bytes, measured_s, strict=True):
        total += np.abs(np.log(_price_s(latency_s, bytes_per_s, cost, num_bytes) / took_s))
    return total / len(costs)


def cluster_of(figures: Sequence[Figure], base: Cluster, *, date: str) -> Cluster:
    """``base``, one host of one kind of device, with the figures measured in place of its own.

    What was not measured (the memory's size, rates of element types without a kernel) stays, and
    the source says so.

    Raises:
        MissingProfile: a figure that every device needs was not measured.
    """
    host = base.hosts[0]
    ranks = f"{host.num_devices} ranks at the same time"
    repeats = [len(figure.values) for figure in figures if not figure.name.startswith("link_")]
    counts = f"n={min(repeats)} to {max(repeats)}"
    origin = f"measured by meshwright profile machine, {counts}, {date}, {ranks}"
    device = _device_of(figures, host.device, origin)
    link = host.link
    if host.num_devices > 1:
        fit = fit_link(figures)
        link = Link(
            name=link.name,
            bytes_per_s=fit.bytes_per_s,
            latency_s=fit.latency_s,
            source=(
                f"{origin}: {fit.num_figures} collectives give {format_seconds(fit.latency_s)} a "
                f"hop and {fit.reached_bytes_per_s / 1e9:.3g} GB/s, mean error "
                f"{100 * fit.mean_error_fraction:.0f} %; written over the "
                f"{DEFAULTS.link_efficiency:g} of a "
                "data sheet that the cost model counts on"
                + (f"; {fit.warning}" if fit.warning else "")
            ),
        )
    return Cluster(
        name=f"measured {base.name}",
        hosts=(Host(device=device, num_devices=host.num_devices, link=link),),
        levels=(),
    )


def _device_of(figures: Sequence[Figure], base: Device, origin: str) -> Device:
    peaks = {
        TORCH_NAMES.get(dtype := str(figure.extra["dtype"]), dtype): figure.median
        for figure in figures
        if figure.name == "matmul_peak"
    }
    memory = _median_of(figures, "memory_bandwidth", operator="triad")
    latency_s = _median_of(figures, "launch_latency")
    if "float32" not in peaks or memory is None or latency_s is None:
        raise MissingProfile(
            "launches, float32 products and memory were not all measured; run `meshwright profile "
            "machine` with a longer --budget"
        )
    copies = [figure.median for figure in figures if figure.name == "host_copy_bandwidth"]
    kept = {dtype: rate for dtype, rate in base.flop_per_s.items() if dtype not in peaks}
    if base.name == "cpu":
        kept = {}  # estimates for cores of another speed; without them float32 counts
    roofline = roofline_of(base, "float32")
    flop_share = roofline.flop_per_s / roofline.peak_flop_per_s
    memory_share = roofline.bytes_per_s / base.memory_bytes_per_s
    copy_share = (
        roofline.to_host_bytes_per_s / base.to_host_bytes_per_s
        if base.to_host_bytes_per_s
        else memory_share
    )
    return dataclasses.replace(
        base,
        memory_bytes_per_s=memory / memory_share,
        flop_per_s={**kept, **{dtype: rate / flop_share for dtype, rate in peaks.items()}},
        launch_latency_s=latency_s,
        to_host_bytes_per_s=min(copies) / copy_share if copies else base.to_host_bytes_per_s,
        source=_device_source(
            origin, peaks, memory, (flop_share, memory_share), sorted(kept), base
        ),
    )


def _device_source(
    origin: str,
    peaks: Mapping[str, float],
    memory_bytes_per_s: float,
    shares: tuple[float, float],
    kept: Sequence[str],
    base: Device,
) -> str:
    products = ", ".join(f"{dtype} {rate / 1e9:.4g}" for dtype, rate in peaks.items())
    words = (
        f"{origin}: products {products} Gflop/s, triad {memory_bytes_per_s / 1e9:.3g} GB/s; "
        f"written over the shares of a data sheet ({shares[0]:g} and {shares[1]:g}) that the cost "
        "model counts on; size of memory not measured"
    )
    if kept:
        words += f"; {', '.join(kept)} not measured: {base.source}"
    return words


def _median_of(figures: Sequence[Figure], name: str, **extra: str) -> float | None:
    for figure in figures:
        if figure.name == name and extra.items() <= figure.extra.items():
            return figure.median
    return None
