"""``meshwright fit --calibrate``: correct the prices of the devices that were measured."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from meshwright.bench.run_calibration import part_of_reports, parts_of_runs
from meshwright.bench.run_table import read_runs
from meshwright.bench.runs import MeasuredRun
from meshwright.cli.fit_sources import Sources, read_sources
from meshwright.cli.output import Output
from meshwright.cluster import Cluster
from meshwright.cost.pricing import Pricing
from meshwright.errors import BadRequest
from meshwright.gnn_cost.calibrate import (
    MeasuredPart,
    collective_prediction,
    fit_offsets,
    held_out_error,
    operator_prediction,
    together,
)
from meshwright.gnn_cost.calibrations import (
    CALIBRATIONS_NAME,
    DeviceCalibration,
    write_calibration_of_device,
)
from meshwright.gnn_cost.collectives.samples import CollectiveSamples
from meshwright.gnn_cost.fitting.collectives import read_collectives
from meshwright.gnn_cost.fitting.operators import graphs_of
from meshwright.gnn_cost.operators.overheads import host_overhead_s
from meshwright.gnn_cost.operators.splits import take, with_rest
from meshwright.gnn_cost.pretrained_pricing import load_pricing, pretrained_folder
from meshwright.gnn_cost.samples import MeasuredGraphs
from meshwright.records import Kind, RecordStore
from meshwright.strict_json import one_line

__all__ = ["calibrate", "corrected_pricing", "measures_costs"]

_MAX_SHOWN = 8
_WEIGHTS = ("*.safetensors", "*.json")


def calibrate(
    out: Output,
    paths: Sequence[str],
    *,
    weights: Path | None,
    folder: Path,
    cluster: Cluster | None,
) -> None:
    """Write ``calibrations/DEVICE.json`` into ``folder`` for each device that was measured.

    Args:
        out: where to write.
        paths: record stores, tables, step reports.
        weights: whose prices are corrected; the package's by default.
        folder: gets a copy of the weights where it holds none.
        cluster: where collectives of records were measured.

    Raises:
        BadRequest: there is nothing learned to correct, or nothing measured to correct it by.
    """
    found, files, skipped = _written(paths, weights, folder, cluster, out.progress)
    if not found:
        said = "; ".join(f"{name}: {reason}" for name, reason in skipped[:_MAX_SHOWN])
        hint = "" if cluster else "; say by --cluster what records were measured on"
        raise BadRequest(
            f"--calibrate: nothing was measured that can be used: {one_line(said)}{hint}"
        )
    _show(out, found, skipped, folder)
    out.document(
        {
            "folder": str(folder),
            "calibrations": [_plain(one, file) for one, file in zip(found, files, strict=True)],
            "skipped": [{"what": name, "reason": reason} for name, reason in skipped],
        }
    )


def corrected_pricing(
    store: str,
    *,
    weights: Path | None,
    folder: Path,
    cluster: Cluster | None,
    devices: Collection[str] = (),
    say: Callable[[str], None],
) -> Pricing:
    """Learned prices, corrected in ``folder`` by the operators and collectives of a record store.

    As they are where the store holds neither. ``say`` is told, by device, what was corrected, and
    of which of ``devices`` nothing was measured; other arguments as for ``calibrate``.
    """
    if not measures_costs(store):
        say("the store measured no operator or collective; prices are as learned elsewhere")
        return load_pricing(weights)
    found, _, skipped = _written([store], weights, folder, cluster, say)
    for name, reason in skipped[:_MAX_SHOWN]:
        say(f"not used: {name}: {reason}")
    for one in found:
        say(
            f"prices of {one.device} are corrected by {one.num_samples} measurements: off by "
            f"{one.error_before:.1%} before, {one.error_after:.1%} now"
        )
    missing = sorted({*devices} - {one.device for one in found})
    if missing:
        say(f"nothing was measured on {', '.join(missing)}; its prices are as learned elsewhere")
    return load_pricing(folder) if found else load_pricing(weights)


def measures_costs(store: str) -> bool:
    """Whether a record store holds an operator or a collective."""
    kinds = (Kind.OPERATOR, Kind.COLLECTIVE)
    return any(RecordStore(Path(store)).query(kind=kind)[0] for kind in kinds)


def _written(
    paths: Sequence[str],
    weights: Path | None,
    folder: Path,
    cluster: Cluster | None,
    say: Callable[[str], None],
) -> tuple[list[DeviceCalibration], list[Path], list[tuple[str, str]]]:
    """The calibrations written into ``folder``, their files, and what cannot be used, why."""
    where = weights or (folder if (folder / "card.json").is_file() else None)
    pricing = load_pricing(where, with_calibrations=False)
    if not pricing.is_learned:
        raise BadRequest(
            "--calibrate: there are no learned prices to correct; give --weights, the folder of a "
            "`meshwright fit`"
        )
    sources = read_sources(paths, say)
    parts, skipped = _parts(sources, pricing, cluster)
    if not parts:
        return [], [], skipped
    _copy_weights(where or pretrained_folder(), folder)
    found = [
        _calibration(device, together(given), pricing, sources) for device, given in parts.items()
    ]
    return found, [write_calibration_of_device(one, folder) for one in found], skipped


def _plain(one: DeviceCalibration, file: Path) -> dict[str, Any]:
    return {
        "device": one.device,
        "num_samples": one.num_samples,
        "error_before": one.error_before,
        "error_after": one.error_after,
        "error_held_out": one.error_held_out,
        "factors": {name: float(np.exp(value)) for name, value in one.offsets.items()},
        "file": str(file),
    }


def _parts(
    sources: Sources, pricing: Pricing, cluster: Cluster | None
) -> tuple[dict[str, list[MeasuredPart]], list[tuple[str, str]]]:
    """Measurements by device, and what cannot be used, why."""
    parts: dict[str, list[MeasuredPart]] = {}
    skipped: list[tuple[str, str]] = []
    data = sources.fit_data(cluster)
    if pricing.operators is not None and (
        data.operators or any(record.kind == Kind.OPERATOR for record in data.records)
    ):
        graphs, dropped = graphs_of(data)
        skipped += [(f"{count} operators", reason) for reason, count in dropped.items()]
        for own in () if graphs is None else _by_device(graphs):
            predict = operator_prediction(pricing.operators, own)
            parts.setdefault(own.devices[0].name, []).append(
                MeasuredPart(predict=predict, measured_s=own.time_s)
            )
    has_collectives = any(record.kind == Kind.COLLECTIVE for record in data.records)
    if has_collectives and cluster is None:
        skipped.append(("collectives in records", "of which cluster is not told; give --cluster"))
    if pricing.collectives is not None and (data.collectives or (has_collectives and cluster)):
        samples, dropped = read_collectives(data)
        skipped += [(f"{count} collectives", reason) for reason, count in dropped.items()]
        for name in sorted({group.device.name for group in samples.groups}):
            mine = np.array([group.device.name == name for group in samples.groups])[samples.group]
            some: CollectiveSamples = samples.where(mine)
            predict = collective_prediction(pricing.collectives, some)
            parts.setdefault(name, []).append(MeasuredPart(predict=predict, measured_s=some.time_s))
    runs: list[MeasuredRun] = []
    for path in data.runs:
        table = read_runs(path)
        runs += table.runs
        skipped += [(item.run_id, item.reason) for item in table.skipped]
    for given in (parts_of_runs(runs, pricing), part_of_reports(sources.reports)):
        skipped += [(item.run_id, item.reason) for item in given.skipped]
        for name, part in given.parts.items():
            parts.setdefault(name, []).append(part)
    return parts, skipped


def _by_device(graphs: MeasuredGraphs) -> Iterator[MeasuredGraphs]:
    """The graphs of each device, with what measuring added to them told apart."""
    seen = np.ones(graphs.count, np.bool_)
    graphs = with_rest(graphs, host_overhead_s(graphs, seen=seen))
    for place, device in enumerate(graphs.devices):
        own = take(graphs, graphs.device == place)
        yield dataclasses.replace(own, devices=(device,), device=np.zeros(own.count, np.int64))


def _calibration(
    device: str, part: MeasuredPart, pricing: Pricing, sources: Sources
) -> DeviceCalibration:
    offsets = fit_offsets(part.predict, part.measured_s)

    def error_with(values: Any) -> float:
        return float(np.mean(np.abs(part.predict(values).time_s / part.measured_s - 1)))

    return DeviceCalibration(
        device=device,
        pricing_sha256=pricing.sha256,
        offsets=dict(offsets.values),
        deviations=dict(offsets.deviations),
        noise=offsets.noise,
        num_samples=offsets.num_samples,
        error_before=error_with({}),
        error_after=error_with(offsets.values),
        error_held_out=held_out_error(part.predict, part.measured_s),
        data=list(sources.data),
    )


def _copy_weights(source: Path, folder: Path) -> None:
    """The weights beside which calibrations stand, with those of other devices."""
    if source.resolve() == folder.resolve():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for pattern in _WEIGHTS for path in sorted(source.glob(pattern))]
        for path in files:
            target = folder / path.name
            if target.exists() and target.read_bytes() != path.read_bytes():
                raise BadRequest(
                    f"{one_line(str(folder))}: holds other weights ({path.name}); give another -o"
                )
        for path in files:
            if not (folder / path.name).exists():  # Another process may be reading it.
                shutil.copyfile(path, folder / path.name)
        for path in sorted(source.glob(f"{CALIBRATIONS_NAME}/*.json")):
            target = folder / CALIBRATIONS_NAME / path.name
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                shutil.copyfile(path, target)
    except OSError as error:
        raise BadRequest(
            f"{one_line(str(folder))}: cannot copy the weights there: {error.strerror or error}"
        ) from error


def _show(
    out: Output,
    found: Sequence[DeviceCalibration],
    skipped: Sequence[tuple[str, str]],
    folder: Path,
) -> None:
    fitted = "on the rows it was fitted to"
    table = Table("device", "measured", "error before", fitted, "held out", "factors")
    for one in found:
        factors = sorted(one.offsets.items(), key=lambda item: -abs(item[1]))
        table.add_row(
            one.device,
            str(one.num_samples),
            f"{one.error_before:.1%}",
            f"{one.error_after:.1%}",
            "" if one.error_held_out is None else f"{one.error_held_out:.1%}",
            ", ".join(f"{name} x{np.exp(value):.2f}" for name, value in factors[:4]),
        )
    out.show(table)
    for name, reason in skipped[:_MAX_SHOWN]:
        out.say(f"not used: {name}: {reason}")
    if len(skipped) > _MAX_SHOWN:
        out.say(f"not used: {len(skipped) - _MAX_SHOWN} more; --json lists all")
    out.say(f"written to {folder}; use it with `meshwright plan --cost-model {folder}`")
