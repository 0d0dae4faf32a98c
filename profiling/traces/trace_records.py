"""Records of what profiler traces tell; what they do not tell is in no Record."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Sequence

from meshwright.profiling.traces.families import operator_identity, parse_dims
from meshwright.profiling.traces.published import UNKNOWN, device_name
from meshwright.profiling.traces.rank_analysis import RankAnalysis
from meshwright.profiling.traces.rank_sets import RankSet
from meshwright.records import Kind, Machine, Record, Software, make_record, timing_of
from meshwright.records.kinds import COLLECTIVES
from meshwright.records.record import Scalar
from meshwright.strict_json import one_line

__all__ = ["records_of_ranks"]

_VERB = "traces import"
_MAX_SAMPLES = 100
_MAX_NAME_CHARACTERS = 200
_Identity = tuple[str, str, tuple[tuple[str, Scalar], ...]]
"""Device, name and extra of a Record."""


def records_of_ranks(
    ranks: Sequence[RankAnalysis], rank_set: RankSet | None, *, model: str, source: str
) -> tuple[Record, ...]:
    """The Records of one job: steps, collectives, operators and peaks of memory."""
    maker = _Maker(ranks, source=source, model=model or UNKNOWN)
    found = [record for rank in ranks if rank.marked for record in maker.steps(rank)]
    found += maker.collectives(ranks, rank_set)
    found += maker.operators(ranks)
    found += [record for rank in ranks for record in maker.peaks(rank)]
    return tuple(found)


class _Maker:
    def __init__(self, ranks: Sequence[RankAnalysis], *, source: str, model: str) -> None:
        self._source = source
        self._model = model
        names = {device.name for rank in ranks for device in rank.devices if device.name}
        versions = {name: text for rank in ranks for name, text in rank.versions.items()}
        self._driver = versions.pop("cuda_driver", "")
        self._machine = Machine(
            processor=UNKNOWN,
            num_cores=0,
            memory_bytes=0,
            accelerators=tuple(one_line(name)[:100] for name in sorted(names)),
            system=UNKNOWN,
            driver=f"cuda {self._driver}" if self._driver else "",
        )
        self._software = Software(python=UNKNOWN, packages=versions)
        self._measured_utc = _utc(min(rank.zero_ns for rank in ranks))

    def steps(self, rank: RankAnalysis) -> Iterable[Record]:
        device = rank.main_device
        assert device is not None, "a trace has a device or its host stands in"
        for iteration, share in zip(rank.iterations, device.shares, strict=True):
            yield self._record(
                Kind.STEP_TIME,
                self._model,
                _device(device.name, host=device.device < 0),
                [share.span_s],
                f"span of an iteration by the profiler ({rank.iterations_by}); shares: unions of "
                "intervals of the device's work within it",
                {
                    "precision": UNKNOWN,
                    "rank": rank.rank,
                    "iteration": iteration.number,
                    "compute_s": share.compute_s,
                    "communication_s": share.communication_s,
                    "overlap_s": share.overlap_s,
                    "idle_s": share.idle_s,
                    "peak_memory_bytes": rank.peak_memory_bytes.get(device.device),
                },
            )

    def peaks(self, rank: RankAnalysis) -> Iterable[Record]:
        names = {one.device: one.name for one in rank.devices}
        for device, num_bytes in sorted(rank.peak_memory_bytes.items()):
            yield self._record(
                Kind.MEMORY,
                self._model,
                _device(names.get(device, ""), host=False),
                [float(num_bytes)],
                "largest total allocated among the profiler's memory events",
                {"cause": "peak allocated", "rank": rank.rank},
                unit="bytes",
            )

    def collectives(
        self, ranks: Sequence[RankAnalysis], rank_set: RankSet | None
    ) -> Iterable[Record]:
        """Of the set where every rank of the group is in it, else of each rank for itself."""
        times: dict[_Identity, list[float]] = defaultdict(list)
        device = _main_device(ranks[0])
        backend = ranks[0].backend.split(":")[-1] or "nccl"
        whole = rank_set.collectives if rank_set is not None else ()
        complete = [one for one in whole if one.group_size == len(one.ranks)]
        for one in complete:
            if (
                one.num_bytes
                and len(one.ranks) > 1
                and one.sizes_agree is not False
                and one.name in COLLECTIVES
            ):
                extra = _collective_extra(one.num_bytes, one.group_size, one.dtype, backend)
                times[device, one.name, extra].append(one.transfer_s)
        for identity, seconds in times.items():
            yield self._collective(
                identity,
                seconds,
                "device time of the rank that came last, the least of all ranks of the group",
            )
        if complete:
            return
        for rank in ranks:
            alone: dict[_Identity, list[float]] = defaultdict(list)
            device = _main_device(rank)
            for call in rank.calls:
                if call.num_bytes and (call.group_size or 0) > 1 and call.name in COLLECTIVES:
                    extra = _collective_extra(call.num_bytes, call.group_size, call.dtype, backend)
                    extra += (("rank", rank.rank),) if rank.rank is not None else ()
                    alone[device, call.name, extra].append(call.time_s)
            for identity, seconds in alone.items():
                yield self._collective(
                    identity,
                    seconds,
                    "device time of one rank, waiting for the others included: their traces were "
                    "not given",
                )

    def _collective(self, identity: _Identity, seconds: list[float], method: str) -> Record:
        device, name, extra = identity
        return self._record(Kind.COLLECTIVE, name, device, seconds, method, dict(extra))

    def operators(self, ranks: Sequence[RankAnalysis]) -> Iterable[Record]:
        """Calls of the same operator with the same shapes count together, over ranks too."""
        times: dict[_Identity, list[float]] = defaultdict(list)
        on_device = all(rank.operators.on_device for rank in ranks)
        for rank in ranks:
            device = _main_device(rank)
            for group in rank.operators.groups:
                parsed = parse_dims(group.dims, group.types) if group.dims else None
                if parsed is None or parsed[1] is None or not group.total_s:
                    continue
                name, sizes = operator_identity(group.name, parsed[0], direction=group.direction)
                extra = {"direction": group.direction, "dtype": parsed[1], **sizes}
                times[device, name, tuple(extra.items())] += group.times_s
        method = (
            "sum of the times of the kernels one call launched"
            if on_device
            else "time of one call on the host without that of the operators in it"
        )
        for (device, name, identity), seconds in times.items():
            yield self._record(
                Kind.OPERATOR, name, device, seconds, f"profiler: {method}", dict(identity)
            )

    def _record(
        self,
        kind: Kind,
        name: str,
        device: str,
        values: list[float],
        method: str,
        extra: dict[str, Scalar],
        *,
        unit: str = "s",
    ) -> Record:
        timing = timing_of(values)
        return make_record(
            kind=kind,
            name=one_line(name)[:_MAX_NAME_CHARACTERS],
            device=device,
            verb=_VERB,
            method=method,
            unit=unit,
            median=timing.median_s,
            p10=timing.p10_s,
            p90=timing.p90_s,
            num_repeats=len(values),
            samples=values if len(values) <= _MAX_SAMPLES else (),
            extra=extra,
            source=self._source,
            machine=self._machine,
            software=self._software,
            measured_utc=self._measured_utc,
        )


def _collective_extra(
    num_bytes: int, group_size: int | None, dtype: str | None, backend: str
) -> tuple[tuple[str, Scalar], ...]:
    return (
        ("bytes", num_bytes),
        ("group_size", group_size),
        ("dtype", dtype),
        ("backend", backend),
    )


def _device(driver_name: str, *, host: bool) -> str:
    if host:
        return "cpu"
    return device_name(driver_name)[:100]


def _main_device(rank: RankAnalysis) -> str:
    device = rank.main_device
    return UNKNOWN if device is None else _device(device.name, host=device.device < 0)


def _utc(time_ns: int) -> str:
    """ISO 8601 of nanoseconds since 1970; empty where the clock had another zero."""
    year_2012_s, year_2100_s = 1_325_376_000, 4_102_444_800
    if not year_2012_s < time_ns // 10**9 < year_2100_s:
        return ""
    moment = datetime.datetime.fromtimestamp(time_ns // 10**9, tz=datetime.UTC)
    return moment.isoformat(timespec="seconds")
