"""What mixture of jobs clusters really run, from Records of their jobs; and mixtures like it.

The mixture is empirical: a sampled job is one that ran, with its number of GPUs, duration and type
together, for large jobs run longer. Jobs of which nobody knows how long they ran count for numbers
of GPUs and arrivals as all others (they may be the large ones); one that is sampled gets the
duration of a job of about as many GPUs. Gaps between arrivals are those of one cluster at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import BadRequest
from meshwright.profiling.traces.published import UNKNOWN
from meshwright.records import Kind, Record
from meshwright.units import format_seconds

__all__ = ["Job", "JobMixture", "SampledJob"]

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_MAX_TYPES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job that ran."""

    num_gpus: int
    duration_s: float | None
    """None where it is not known."""
    submit_s: float | None
    """From the cluster's own zero; None where it is not known."""
    cluster: str
    gpu_type: str
    """``unknown`` where it is not known, as the model."""
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledJob:
    """One job of a sampled mixture."""

    arrival_s: float
    """From the first job's; rising."""
    num_gpus: int
    duration_s: float
    """Its own or, where that is not known, that of a job of about as many GPUs."""
    gpu_type: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMixture:
    """The jobs of one or more clusters."""

    jobs: tuple[Job, ...]
    gaps_s: NDArray[np.float64]
    """Between one arrival and the next in the same cluster."""

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> JobMixture:
        """The mixture of all Records of kind ``job``; others are passed over.

        A job whose number of GPUs is not known, or 0, is left out: it tells nothing of training.

        Raises:
            BadRequest: there is no job.
        """
        jobs: list[Job] = []
        for record in records:
            extra = record.extra
            gpus, submit_s = extra.get("gpus"), extra.get("submit_s")
            if record.kind != Kind.JOB or not isinstance(gpus, int) or gpus < 1:
                continue
            jobs.append(
                Job(
                    num_gpus=gpus,
                    duration_s=record.median if record.unit == "s" else None,
                    submit_s=float(submit_s) if isinstance(submit_s, int | float) else None,
                    cluster=str(extra.get("cluster") or ""),
                    gpu_type=record.device,
                    model=record.name,
                )
            )
        if not jobs:
            raise BadRequest(
                "job mixture: no Record of a job with GPUs; import a job trace with "
                "`meshwright traces import`"
            )
        return cls(jobs=tuple(jobs), gaps_s=_gaps_s(jobs))

    def sample(
        self,
        rng: np.random.Generator,
        num_jobs: int,
        *,
        max_gpus: int | None = None,
        by_gpu_time: bool = False,
    ) -> tuple[SampledJob, ...]:
        """``num_jobs`` jobs, in order of arrival; the first arrives at 0.

        Args:
            rng: What draws them.
            num_jobs: How many.
            max_gpus: Only jobs that need no more.
            by_gpu_time: Draw in proportion to GPUs x duration, as who looks into the cluster at
                some time sees them, and not each job alike.

        Raises:
            BadRequest: no job needs so few GPUs, or no duration of any job is known.
        """
        known_s = _durations_by_size(self.jobs)
        if not known_s:
            raise BadRequest(
                "job mixture: of no job is known how long it ran; import a trace of such"
            )
        fitting = [job for job in self.jobs if max_gpus is None or job.num_gpus <= max_gpus]
        if not fitting:
            least = min(job.num_gpus for job in self.jobs)
            raise BadRequest(f"job mixture: no job runs on {max_gpus} GPUs; the least is {least}")
        weights = None
        if by_gpu_time:
            gpu_s = np.array(
                [
                    job.num_gpus
                    * (
                        float(_like(job.num_gpus, known_s).mean())
                        if job.duration_s is None
                        else job.duration_s
                    )
                    for job in fitting
                ]
            )
            weights = gpu_s / gpu_s.sum() if gpu_s.sum() > 0 else None
        drawn = rng.choice(len(fitting), size=num_jobs, p=weights)
        gaps_s = rng.choice(self.gaps_s, size=num_jobs) if len(self.gaps_s) else np.zeros(num_jobs)
        arrivals_s = np.cumsum(gaps_s) - (gaps_s[0] if num_jobs else 0.0)
        return tuple(
            SampledJob(
                arrival_s=float(arrival_s),
                num_gpus=fitting[index].num_gpus,
                duration_s=_drawn_s(fitting[index], known_s, rng),
                gpu_type=fitting[index].gpu_type,
                model=fitting[index].model,
            )
            for arrival_s, index in zip(arrivals_s, drawn.tolist(), strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """Histogram of GPUs, quantiles of durations and gaps, types; as JSON."""
        durations_s = np.array([_nan_if_none(job.duration_s) for job in self.jobs])
        gpus = np.array([job.num_gpus for job in self.jobs])
        timed = ~np.isnan(durations_s)
        gpu_s = np.where(timed, gpus * durations_s, 0.0)
        histogram = {}
        for size in sorted(set(gpus.tolist())):
            of_size = gpus == size
            known_s = durations_s[of_size & timed]
            histogram[str(size)] = {
                "num_jobs": int(of_size.sum()),
                "num_jobs_of_known_duration": len(known_s),
                "jobs_fraction": float(of_size.mean()),
                "gpu_time_fraction": float(gpu_s[of_size].sum() / max(gpu_s.sum(), 1e-300))
                if len(known_s)
                else None,
                "median_duration_s": float(np.median(known_s)) if len(known_s) else None,
            }
        return {
            "num_jobs": len(self.jobs),
            "num_jobs_of_known_duration": int(timed.sum()),
            "clusters": dict(Counter(job.cluster or UNKNOWN for job in self.jobs).most_common()),
            "by_num_gpus": histogram,
            "duration_quantiles_s": _quantiles(durations_s[timed]),
            "gap_quantiles_s": _quantiles(self.gaps_s),
            "gap_variation": _variation(self.jobs),
            "by_gpu_type": dict(Counter(job.gpu_type for job in self.jobs).most_common()),
            "by_model": dict(Counter(job.model for job in self.jobs).most_common()),
        }

    def lines(self) -> tuple[str, ...]:
        """The summary for a person."""
        found = self.summary()
        sizes = ", ".join(
            f"{size}: {part['jobs_fraction']:.1%} ({_share(part['gpu_time_fraction'])} of GPU time)"
            for size, part in found["by_num_gpus"].items()
            if part["jobs_fraction"] >= 0.001
        )
        lines = [f"{len(self.jobs)} jobs of {len(found['clusters'])} clusters; by GPUs {sizes}"]
        num_timed = found["num_jobs_of_known_duration"]
        if num_timed < len(self.jobs):
            untimed = [job.num_gpus for job in self.jobs if job.duration_s is None]
            lines.append(
                f"how long they ran is known of {num_timed} of {len(self.jobs)}; durations and GPU "
                f"time are of these alone. The others had {min(untimed)} to {max(untimed)} GPUs, "
                f"{sum(untimed) / len(untimed):.3g} on average, and count for GPUs and arrivals"
            )
        for key, what in (
            ("duration_quantiles_s", "durations"),
            ("gap_quantiles_s", "gaps of arrival"),
        ):
            if found[key]:
                shown = ", ".join(
                    f"{share} {format_seconds(seconds)}" for share, seconds in found[key].items()
                )
                lines.append(f"{what}: {shown}")
        if found["gap_variation"] is not None:
            lines.append(
                f"gaps of arrival in a cluster vary {found['gap_variation']:.2g} times as much as "
                "random ones (median of the clusters)"
            )
        models = list(found["by_model"].items())[:_MAX_TYPES_SHOWN]
        shown = ", ".join(f"{name} {count}" for name, count in models)
        lines.append(f"models: {shown}{', ...' if len(found['by_model']) > len(models) else ''}")
        return tuple(lines)


def _nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else value


def _share(fraction: float | None) -> str:
    return "unknown share" if fraction is None else f"{fraction:.1%}"


def _durations_by_size(jobs: Iterable[Job]) -> dict[int, NDArray[np.float64]]:
    """The known durations by number of GPUs."""
    found: dict[int, list[float]] = defaultdict(list)
    for job in jobs:
        if job.duration_s is not None:
            found[job.num_gpus].append(job.duration_s)
    return {size: np.array(durations_s) for size, durations_s in found.items()}


def _like(num_gpus: int, known_s: dict[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Durations of jobs whose number of GPUs is nearest by ratio, of two the larger."""
    return known_s[min(known_s, key=lambda size: (abs(np.log(size / num_gpus)), -size))]


def _drawn_s(job: Job, known_s: dict[int, NDArray[np.float64]], rng: np.random.Generator) -> float:
    if job.duration_s is not None:
        return job.duration_s
    return float(rng.choice(_like(job.num_gpus, known_s)))


def _gaps_by_cluster(jobs: Iterable[Job]) -> list[NDArray[np.float64]]:
    by_cluster: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if job.submit_s is not None:
            by_cluster[job.cluster].append(job.submit_s)
    return [np.diff(np.sort(np.array(times))) for times in by_cluster.values() if len(times) > 1]


def _gaps_s(jobs: Iterable[Job]) -> NDArray[np.float64]:
    gaps = _gaps_by_cluster(jobs)
    return np.concatenate(gaps) if gaps else np.zeros(0)


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, _QUANTILES).tolist()
    return {f"p{round(100 * share)}": at for share, at in zip(_QUANTILES, found, strict=True)}


def _variation(jobs: Iterable[Job]) -> float | None:
    """Standard deviation over mean of the gaps of a cluster, median over clusters.

    1 for arrivals at random, above it they come in bursts. Clusters of different rates are not
    thrown together, for that alone would look like bursts.
    """
    found = [
        float(gaps_s.std() / gaps_s.mean()) for gaps_s in _gaps_by_cluster(jobs) if gaps_s.any()
    ]
    return float(np.median(found)) if found else None
