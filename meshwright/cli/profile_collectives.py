"""``meshwright profile collectives``: time what ranks tell one another, and its overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import Output, output_for
from meshwright.cli.profile_ranks import (
    ClusterOption,
    RanksOption,
    StoreOption,
    figure_document,
    local_ranks,
    measure_ranks,
    parse_bytes,
    parse_counts,
)
from meshwright.errors import BadRequest
from meshwright.profiling.figures import Figure
from meshwright.profiling.sweeps import (
    COLLECTIVES,
    DTYPES,
    CollectiveSweep,
    GroupShape,
    OverlapSweep,
    RankJob,
    Sweep,
    shapes_for,
    sizes_between,
)
from meshwright.records.kinds import Kind
from meshwright.records.record import Scalar
from meshwright.units import format_bytes, format_seconds

__all__ = ["collectives"]

_OVERLAP_SHARE = 0.3
"""Of the budget."""
_OVERLAP_EVERY = 4
"""Overlap is measured at every fourth power of two."""
_OVERLAPPING = ("all_reduce", "all_gather", "reduce_scatter")
"""What training runs beside compute."""


def collectives(
    cluster: ClusterOption = None,
    ranks: RanksOption = None,
    backend: Annotated[
        str | None, typer.Option(help="gloo (CPU) or nccl (GPU); as the devices are unless given.")
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one; may be repeated: {', '.join(COLLECTIVES)}."),
    ] = None,
    min_bytes: Annotated[str, typer.Option(help="Smallest payload.")] = "1k",
    max_bytes: Annotated[str, typer.Option(help="Largest payload.")] = "16m",
    groups: Annotated[str | None, typer.Option(help="Sizes of groups, such as 2,4; all.")] = None,
    strides: Annotated[
        str | None, typer.Option(help="Distances between the ranks of a group, such as 1,2; all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    overlap: Annotated[bool, typer.Option(help="Measure compute beside it too.")] = True,
    budget: Annotated[str, typer.Option(help="Longest time to measure, such as 4m.")] = "4m",
    store: StoreOption = "meshwright-records",
    json_output: JsonOption = False,
) -> None:
    """Time collectives over sizes, groups and axes, and compute beside them.

    Starts processes on this machine; under torchrun it measures with those that are there.
    """
    budget_s = parse_duration_s(budget)
    num_ranks, device = local_ranks(cluster, ranks, backend)
    if dtype not in DTYPES:
        raise BadRequest(f"--dtype: no element type {dtype!r}; use {', '.join(DTYPES)}")
    shapes = shapes_for(
        num_ranks,
        sizes=parse_counts(groups, option="--groups"),
        strides=parse_counts(strides, option="--strides"),
    )
    ops = _known(op or list(COLLECTIVES), shapes)
    sizes = sizes_between(
        parse_bytes(min_bytes, option="--min-bytes"), parse_bytes(max_bytes, option="--max-bytes")
    )
    sweeps = _sweeps(ops, sizes, shapes, dtype, overlap, budget_s)
    job = RankJob(num_ranks=num_ranks, device=device, sweeps=sweeps)
    with output_for(as_json=json_output) as out:
        figures = measure_ranks(out, job, store=store, verb="profile collectives")
        if figures is None:
            return
        _show(out, figures)
        out.say(f"{len(figures)} records are in {store}")
        out.document(
            {
                "device": device,
                "num_ranks": num_ranks,
                "store": store,
                "figures": [figure_document(figure) for figure in figures],
            }
        )


def _known(ops: Sequence[str], shapes: tuple[GroupShape, ...]) -> tuple[str, ...]:
    for op in ops:
        if op not in COLLECTIVES:
            raise BadRequest(f"--op: no collective {op!r}; use one of {', '.join(COLLECTIVES)}")
    if set(ops) == {"send_recv"} and all(shape.size != 2 for shape in shapes):
        raise BadRequest("--op send_recv: is between two ranks; give --groups 2")
    return tuple(dict.fromkeys(ops))


def _sweeps(
    ops: tuple[str, ...],
    sizes: tuple[int, ...],
    shapes: tuple[GroupShape, ...],
    dtype: str,
    overlap: bool,
    budget_s: float,
) -> tuple[Sweep, ...]:
    """Collectives, and compute beside some of them at some sizes, the largest among these."""
    overlapping = tuple(name for name in _OVERLAPPING if name in ops) if overlap else ()
    share = _OVERLAP_SHARE if overlapping else 0.0
    collective_sweep = CollectiveSweep(
        ops=ops, sizes_bytes=sizes, shapes=shapes, dtype=dtype, budget_s=budget_s * (1 - share)
    )
    if not overlapping:
        return (collective_sweep,)
    overlap_sweep = OverlapSweep(
        ops=overlapping,
        sizes_bytes=tuple(sorted(sizes[::-_OVERLAP_EVERY])),
        shape=max(shapes, key=lambda shape: (-shape.stride, shape.size)),
        dtype=dtype,
        budget_s=budget_s * share,
    )
    return (collective_sweep, overlap_sweep)


def _show(out: Output, figures: list[Figure]) -> None:
    """For each collective and group its smallest and largest payload; then the slow-downs."""
    rows: dict[tuple[Scalar, ...], list[Figure]] = {}
    for figure in figures:
        if figure.kind == Kind.COLLECTIVE:
            extra = figure.extra
            key: tuple[Scalar, ...] = (
                figure.name,
                *(extra[name] for name in ("group_size", "stride", "num_groups")),
            )
            rows.setdefault(key, []).append(figure)
    table = Table(box=None, pad_edge=False)
    table.add_column("collective")
    for name in ("group of", "stride", "at a time", "payload", "time", "payload", "time", "GB/s"):
        table.add_column(name, justify="right")
    for key, found in sorted(rows.items(), key=lambda item: tuple(map(str, item[0]))):
        small, large = (choose(found, key=_payload_bytes) for choose in (min, max))
        table.add_row(
            *map(str, key),
            format_bytes(_payload_bytes(small)),
            format_seconds(small.median),
            format_bytes(_payload_bytes(large)),
            format_seconds(large.median),
            f"{_payload_bytes(large) / large.median / 1e9:.3g}",
        )
    out.show(table)
    for figure in figures:
        if figure.kind == Kind.OVERLAP:
            out.say(
                f"{figure.extra['collective']} {format_bytes(_payload_bytes(figure))} beside "
                f"products: {figure.name} takes {figure.median:.2f} times as long"
            )


def _payload_bytes(figure: Figure) -> float:
    return float(figure.extra["bytes"] or 0)
