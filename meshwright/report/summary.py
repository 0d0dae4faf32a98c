"""The demo's short Markdown summary; every measured figure in it comes from a StepReport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.plans import ParallelPlan
from meshwright.records import Machine, Software, StepReport
from meshwright.report.words import mesh_words, prediction_words, schedule_words
from meshwright.units import format_bytes, format_seconds

__all__ = ["DemoRun", "DemoSummary", "demo_markdown", "speed_up_words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """A plan and what its run measured."""

    title: str
    plan: ParallelPlan
    report: StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSummary:
    """Everything the demo found."""

    models: tuple[tuple[str, str, str, tuple[DemoRun, ...]], ...]
    """What it is, its reference, why its plan was chosen, and its runs: the chosen plan, then
    plain data parallelism, or where that was chosen, the best plan of another kind."""
    large: ParallelPlan
    """The plan for a cluster we do not have."""
    large_planning_s: float
    """Seconds to capture and plan it."""
    seconds: float
    """Of the whole demo."""


def demo_markdown(summary: DemoSummary) -> str:
    """The summary as a Markdown document."""
    first = summary.models[0][3][0].report
    lines = [
        "# Meshwright demo",
        "",
        f"Made by `meshwright demo` in {summary.seconds:.0f} s; measured {first.measured_utc} on "
        f"{_machine_words(first.machine)}, {_software_words(first.software)}.",
        "",
        "Predictions are made from data-sheet figures and estimates, not from measurements of this "
        "machine. Times are medians with [p10, p90] of n steps; differences are the largest "
        "relative ones from one process, over three optimizer steps.",
    ]
    for title, reference, reason, runs in summary.models:
        lines += ["", f"## {title}", "", f"`{reference}`. Chosen: {reason}.", ""]
        lines += _runs_table(runs)
        lines += ["", speed_up_words(runs)]
    assert summary.large.prediction is not None, "a plan just made has a prediction"
    lines += [
        "",
        f"## {summary.large.model.reference} on {summary.large.cluster}",
        "",
        f"Captured and planned here in {summary.large_planning_s:.1f} s: "
        f"{mesh_words(summary.large)}; {schedule_words(summary.large)}. Predicted, not measured: "
        f"{prediction_words(summary.large.prediction)}.",
        "",
    ]
    return "\n".join(lines)


def speed_up_words(runs: Sequence[DemoRun]) -> str:
    """What the chosen plan gains over the second one, as measured."""
    if len(runs) == 1:
        return "Nothing was found to compare the chosen plan with."
    chosen, other = (run.report.step_time.median_s for run in runs[:2])
    return f"Measured: {runs[0].title} is {other / chosen:.2f} times as fast as {runs[1].title}."


def _runs_table(runs: Sequence[DemoRun]) -> list[str]:
    lines = [
        "| plan | predicted step | measured step | predicted memory | measured memory | "
        "loss | gradients | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        report, predicted = run.report, run.report.predicted
        timing, verified = report.step_time, report.verified
        cells = [
            f"{run.title}: {mesh_words(run.plan)}",
            "-" if predicted is None else format_seconds(predicted.step_time_s),
            f"{format_seconds(timing.median_s)} [{format_seconds(timing.p10_s)}, "
            f"{format_seconds(timing.p90_s)}], n = {timing.num_repeats}",
            "-" if predicted is None else format_bytes(predicted.peak_memory_bytes),
            format_bytes(report.peak_memory_bytes),
        ]
        differences: tuple[float | None, ...] = (None, None, None)
        if verified is not None:
            differences = (verified.loss, verified.gradients, verified.parameters)
        cells += ["-" if value is None else f"{value:.1e}" for value in differences]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _machine_words(machine: Machine) -> str:
    return f"{machine.processor} ({machine.num_cores} cores, {format_bytes(machine.memory_bytes)})"


def _software_words(software: Software) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in software.packages.items())
    return f"Python {software.python}, {packages}"
