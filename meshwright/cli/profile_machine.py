"""``meshwright profile machine``: this machine's own figures, as a cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import Output, output_for
from meshwright.cli.profile_ranks import (
    ClusterOption,
    RanksOption,
    StoreOption,
    device_name,
    figure_document,
    local_ranks,
    measure_ranks,
)
from meshwright.cluster import Cluster, Host, cluster_to_dict, cluster_to_toml, cpu_cluster
from meshwright.cluster.detect import cluster_of_gpus, detect_gpus
from meshwright.errors import BadRequest
from meshwright.profiling.figures import Figure, to_record
from meshwright.profiling.machine_file import LinkFit, cluster_of, fit_link
from meshwright.profiling.sweeps import (
    CollectiveSweep,
    MachineSweep,
    RankJob,
    Sweep,
    shapes_for,
)
from meshwright.records import RecordStore, utc_now
from meshwright.records.kinds import Kind
from meshwright.strict_json import write_text_atomically
from meshwright.units import format_bytes, format_seconds

__all__ = ["machine"]

_VERB = "profile machine"
_DEVICE_SHARE = 0.5
"""Of the budget; the links get the rest."""
_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
_SIZES_BYTES = (2**10, 2**14, 2**18, 2**22)


def machine(
    cluster: ClusterOption = None,
    ranks: RanksOption = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a cluster file (.toml) here."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Longest time to measure.")] = "50s",
    store: StoreOption = "meshwright-records",
    json_output: JsonOption = False,
) -> None:
    """Measure peaks, memory, launches and links of this machine, all ranks at the same time.

    The cluster file says of every figure that it was measured, how often and when.
    """
    budget_s = parse_duration_s(budget)
    if output is not None and Path(output).suffix != ".toml":
        raise BadRequest(f"-o: {output!r} must end in .toml, the form of cluster files written")
    num_ranks, device = local_ranks(cluster, ranks, None)
    sweeps: list[Sweep] = [MachineSweep(budget_s=budget_s * _DEVICE_SHARE)]
    if num_ranks > 1:
        sweeps.append(
            CollectiveSweep(
                ops=_OPS,
                sizes_bytes=_SIZES_BYTES,
                shapes=shapes_for(num_ranks),
                budget_s=budget_s * (1 - _DEVICE_SHARE),
                alone=False,
            )
        )
    job = RankJob(num_ranks=num_ranks, device=device, sweeps=tuple(sweeps))
    with output_for(as_json=json_output) as out:
        figures = measure_ranks(out, job, store=store, verb=_VERB)
        if figures is None:
            return
        fit = fit_link(figures) if num_ranks > 1 else None
        if fit is not None:
            figures += _keep_fit(fit, num_ranks, device, store)
        found = cluster_of(figures, _base(num_ranks, device), date=utc_now()[:10])
        if output is not None:
            write_text_atomically(cluster_to_toml(found), output)
        _show(out, figures, fit)
        out.say(f"{len(figures)} records are in {store}")
        if output is not None:
            out.say(f"cluster file: {output}; try `meshwright plan MODEL --cluster {output}`")
        out.document(
            {
                "device": device,
                "num_ranks": num_ranks,
                "store": store,
                "output": output,
                "cluster": cluster_to_dict(found),
                "figures": [figure_document(figure) for figure in figures],
            }
        )


def _base(num_ranks: int, device: str) -> Cluster:
    """What is known of this machine without measuring: the sizes of memories."""
    if device == "cpu":
        return cpu_cluster(num_ranks)
    gpus = cluster_of_gpus(detect_gpus())
    first = gpus.hosts[0]
    host = Host(device=first.device, num_devices=num_ranks, link=first.link)
    return Cluster(name=f"{num_ranks}x{first.device.name}", hosts=(host,), levels=())


def _keep_fit(fit: LinkFit, num_ranks: int, device: str, store: str) -> list[Figure]:
    """The link's figures, which are in ``store`` when this returns."""
    figures = [
        Figure(
            kind=Kind.MACHINE,
            name=name,
            unit=unit,
            values=(value,),
            method=f"fit to {fit.num_figures} collectives by the cost model's formulas, mean error "
            f"{100 * fit.mean_error_fraction:.0f} %",
            extra={"num_ranks": num_ranks},
        )
        for name, unit, value in (
            ("link_latency", "s", fit.latency_s),
            ("link_bandwidth", "bytes/s", fit.reached_bytes_per_s),
        )
    ]
    name = device_name(device)
    RecordStore(Path(store)).append(
        to_record(figure, device=name, verb=_VERB) for figure in figures
    )
    return figures


def _show(out: Output, figures: list[Figure], fit: LinkFit | None) -> None:
    for figure in figures:
        if figure.kind != Kind.MACHINE or figure.name.startswith("link_"):
            continue
        extra = figure.extra
        what = " ".join(str(extra[key]) for key in ("operator", "dtype") if key in extra)
        size = f", {format_bytes(float(extra['bytes'] or 0))}" if "bytes" in extra else ""
        value = (
            format_seconds(figure.median)
            if figure.unit == "s"
            else f"{figure.median / 1e9:,.4g} G{figure.unit}"
        )
        out.say(f"{figure.name} ({what}{size}): {value}")
    if fit is not None:
        out.say(
            f"link: {format_seconds(fit.latency_s)} a hop, {fit.reached_bytes_per_s / 1e9:.3g} "
            f"GB/s; explains {fit.num_figures} collectives with a mean error of "
            f"{100 * fit.mean_error_fraction:.0f} %"
        )
        if fit.warning:
            out.progress(fit.warning)
