"""Tables for a terminal; each function returns something ``rich`` can print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from meshwright.plans import ParallelPlan, Prediction, Recompute
from meshwright.records import StepReport
from meshwright.report.words import (
    cause_words,
    mesh_words,
    schedule_words,
    shard_words,
    source_of,
)
from meshwright.units import format_bytes, format_seconds

__all__ = [
    "alternatives_table",
    "breakdown_tables",
    "facts_table",
    "measured_table",
    "plain_table",
    "plans_table",
    "segments_table",
]

_RECOMPUTE_ORDER = list(Recompute)


def plain_table(*columns: tuple[str, str], title: str | None = None) -> Table:
    """An empty table; each column has a name and ``left`` or ``right``."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def plans_table(plans: Sequence[ParallelPlan]) -> Table:
    """Plans that fit and plans that do not, one a line, in the order given."""
    table = plain_table(
        ("#", "right"),
        ("step", "right"),
        ("memory", "right"),
        ("fits", "left"),
        ("mesh", "left"),
        ("micro-batches", "left"),
        ("ZeRO", "right"),
        ("recompute", "left"),
        ("by", "left"),
    )
    for number, plan in enumerate(plans, start=1):
        prediction = plan.prediction
        recomputes = sorted({s.recompute for s in plan.segments}, key=_RECOMPUTE_ORDER.index)
        table.add_row(
            str(number),
            "?" if prediction is None else format_seconds(prediction.step_time_s),
            "?" if prediction is None else format_bytes(prediction.peak_memory_bytes),
            "?" if prediction is None else ("yes" if prediction.fits else "no"),
            mesh_words(plan),
            schedule_words(plan),
            "-".join(str(stage) for stage in sorted({s.zero_stage for s in plan.segments})),
            ", ".join(recomputes),
            plan.provenance.solver,
        )
    return table


def alternatives_table(alternatives: Iterable[tuple[ParallelPlan, str]]) -> Table:
    """Plans that were not chosen, and why."""
    table = plain_table(("plan", "left"), ("step", "right"), ("why not", "left"))
    for plan, reason in alternatives:
        prediction = plan.prediction
        table.add_row(
            f"{plan.provenance.solver}: {mesh_words(plan)}; {schedule_words(plan)}",
            "?" if prediction is None else format_seconds(prediction.step_time_s),
            reason,
        )
    return table


def breakdown_tables(prediction: Prediction) -> tuple[Table, Table]:
    """Where the time and where the memory go, largest first, what is nothing left out.

    Each line says where its figure comes from.
    """
    times = _shares(
        prediction, prediction.breakdown, "time of a step", lambda seconds: format_seconds(seconds)
    )
    memory = _shares(
        prediction,
        prediction.memory_breakdown,
        "memory of the fullest device",
        lambda num_bytes: format_bytes(int(num_bytes)),
    )
    return times, memory


def _shares(
    prediction: Prediction,
    amounts: Mapping[str, float],
    title: str,
    text_of: Callable[[float], str],
) -> Table:
    table = plain_table(
        ("", "left"), ("", "right"), ("share", "right"), ("from", "left"), title=title
    )
    total = sum(amounts.values())
    for cause, amount in sorted(amounts.items(), key=lambda item: -item[1]):
        if amount:
            source = source_of(prediction, cause)
            table.add_row(cause_words(cause), text_of(amount), f"{amount / total:.1%}", source)
    table.add_section()
    table.add_row("sum", text_of(total), "", ", ".join(prediction.source))
    return table


def segments_table(plan: ParallelPlan, multiplicity: Sequence[int] = ()) -> Table:
    """What equal segments do; ``multiplicity`` says how many each of ``plan.segments`` is for."""
    table = plain_table(("segments", "left"), ("times", "right"), ("what it does", "left"))
    for index, segment in enumerate(plan.segments):
        count = str(multiplicity[index]) if index < len(multiplicity) else "?"
        name = segment.name or f"class {segment.segment_class}"
        table.add_row(name, count, shard_words(plan, segment))
    return table


def facts_table(facts: Mapping[str, object]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def measured_table(report: StepReport) -> Table:
    """Predicted against measured: step time and peak memory of the fullest rank."""
    table = plain_table(
        ("", "left"), ("predicted", "right"), ("measured", "right"), ("ratio", "right")
    )
    timing, predicted = report.step_time, report.predicted
    table.add_row(
        f"step, median [p10, p90] of {timing.num_repeats}",
        "-" if predicted is None else format_seconds(predicted.step_time_s),
        f"{format_seconds(timing.median_s)} "
        f"[{format_seconds(timing.p10_s)}, {format_seconds(timing.p90_s)}]",
        "-" if predicted is None else f"{timing.median_s / predicted.step_time_s:.2f}",
    )
    peak_bytes = report.peak_memory_bytes
    table.add_row(
        "memory of the fullest rank",
        "-" if predicted is None else format_bytes(predicted.peak_memory_bytes),
        format_bytes(peak_bytes),
        "-" if not predicted else f"{peak_bytes / max(1, predicted.peak_memory_bytes):.2f}",
    )
    return table
