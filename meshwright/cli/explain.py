"""``meshwright explain``: why a plan is as it is, and what it would take to change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from meshwright.cli.checks import check_against, pricing_of_plan
from meshwright.cli.options import CostModelOption, JsonOption, PlanArgument
from meshwright.cli.output import Output, output_for
from meshwright.cluster import Cluster, Device, Link
from meshwright.cost.pricing import MemoryMargin
from meshwright.plans import ParallelPlan, Prediction, read_plan
from meshwright.units import format_bytes, format_seconds

__all__ = ["explain", "sensitivity"]


def explain(
    plan: PlanArgument,
    allow_unrunnable: Annotated[
        bool, typer.Option(help="Compare with plans the runtime cannot carry yet.")
    ] = False,
    cost_model: CostModelOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say where time and memory go, what was second best, and what the plan is sensitive to."""
    stored = read_plan(plan)
    from meshwright.api import plan_reference

    with output_for(as_json=json_output) as out:
        planned = plan_reference(
            stored.model.reference,
            cluster=stored.cluster,
            job=stored.job,
            level="O2" if stored.provenance.level == "O2" else "O1",
            fix=stored.provenance.pins,
            allow_unrunnable=allow_unrunnable or _could_not_run(stored),
            seed=stored.provenance.seed,
            pricing=pricing_of_plan(stored, cost_model),
            progress=out.progress,
        )
        result = planned.result
        model = result.context.model
        check_against(
            stored,
            cluster=model.cluster,
            segmentation=model.segmentation,
            graph_sha256=result.plan.model.graph_sha256,
        )
        predicted = model.predict(stored)
        others = [
            (runner_up.plan, runner_up.reason)
            for runner_up in result.alternatives
            if not _same(runner_up.plan, stored)
        ]
        is_first = _same(result.plan, stored)
        if not is_first:
            others.insert(0, (result.plan, f"would be chosen now: {result.search.reason}"))
        explanation = _Explanation(
            plan=stored,
            predicted=predicted,
            reason=result.search.reason if is_first else None,
            others=tuple(others),
            changes=sensitivity(stored, model),
            memory=model.pricing.memory,
            multiplicity=_multiplicity(stored, model.segment_classes),
        )
        _show(out, explanation)
        out.document(_document(explanation))


def _could_not_run(plan: ParallelPlan) -> bool:
    """Whether the plan was made where unrunnable plans could win."""
    return plan.provenance.allow_unrunnable or bool(plan.unrunnable)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Explanation:
    """What there is to say of a plan."""

    plan: ParallelPlan
    predicted: Prediction
    reason: str | None
    """Why planning chose it; ``None`` where planning again chooses another."""
    others: tuple[tuple[ParallelPlan, str], ...]
    """Plans that were not chosen, and why."""
    changes: list[dict[str, Any]]
    memory: MemoryMargin | None
    """What measured peaks say of predicted ones."""
    multiplicity: tuple[int, ...]
    """How many segments each entry of the plan is for."""


def _multiplicity(plan: ParallelPlan, segment_classes: Sequence[int]) -> tuple[int, ...]:
    entries = plan.segment_plans(segment_classes)
    return tuple(sum(own is entry for own in entries) for entry in plan.segments)


def _show(out: Output, found: _Explanation) -> None:
    from meshwright import report

    plan = found.plan
    out.say(
        f"{plan.model.reference} on {plan.cluster}: {report.mesh_words(plan)}; "
        f"{report.schedule_words(plan)}; chosen by {plan.provenance.solver}"
    )
    out.say(report.prediction_words(found.predicted))
    if correction := report.correction_words(found.predicted):
        out.say(correction)
    if found.memory is not None:
        out.say(report.memory_margin_words(found.predicted, found.memory))
    if found.reason is None:
        out.say("Planning again chooses another plan; it is the first of the other plans below.")
    else:
        out.say(f"Why: {found.reason}.")
    for reason in plan.unrunnable:
        out.say(f"Cannot run yet: {reason}.")
    out.show(report.segments_table(plan, found.multiplicity))
    out.show(*report.breakdown_tables(found.predicted))
    out.show("other plans", report.alternatives_table(found.others))
    out.show("were things otherwise, this plan would take")
    out.show(report.facts_table({item["change"]: item["effect"] for item in found.changes}))


def _document(found: _Explanation) -> dict[str, Any]:
    from meshwright import report

    return {
        "plan": found.plan,
        "predicted": found.predicted,
        "sources": {
            cause: report.source_of(found.predicted, cause)
            for cause in (*found.predicted.breakdown, *found.predicted.memory_breakdown)
        },
        "memory_margin": None if found.memory is None else dataclasses.asdict(found.memory),
        "is_still_best": found.reason is not None,
        "reason": found.reason,
        "segments": [
            {
                "segment_class": segment.segment_class,
                "name": segment.name,
                "multiplicity": count,
                "words": report.shard_words(found.plan, segment),
            }
            for segment, count in zip(found.plan.segments, found.multiplicity, strict=True)
        ],
        "alternatives": [
            {"plan": plan, "predicted": plan.prediction, "reason": reason}
            for plan, reason in found.others
        ],
        "sensitivity": found.changes,
    }


def _same(left: ParallelPlan, right: ParallelPlan) -> bool:
    """Equal decisions, whoever made them and whatever was predicted."""
    decisions = (
        "mesh",
        "num_microbatches",
        "schedule",
        "stages",
        "segments",
        "token_slices",
        "communication",
    )
    return all(getattr(left, name) == getattr(right, name) for name in decisions)


def sensitivity(plan: ParallelPlan, model: Any) -> list[dict[str, Any]]:
    """What ``plan`` would cost on changed hardware, by ``model``, a ``StepCostModel``.

    Each entry has ``change`` and ``effect`` in words, ``step_time_s``, ``peak_memory_bytes``,
    ``memory_capacity_bytes`` and ``fits``. The decisions stay: another plan may do better there.
    """
    from meshwright.cost.corrected import corrected
    from meshwright.cost.model import StepCostModel, choice_of

    cluster: Cluster = model.cluster
    table = model.table_of_plan(plan)
    choice = choice_of(plan, model.segment_classes)
    before = model.corrected(plan, model.cost(plan))
    found = []
    for change, changed in _changes(cluster):
        varied = StepCostModel(
            model.analysis,
            model.segmentation,
            model.labels,
            cluster=changed,
            job=plan.job,
            pricing=model.pricing,
        )
        cost = varied.pricer.price(table, choice)
        cost = corrected(varied.pricer, [table] * len(choice.starts), choice, cost)
        prediction = varied.prediction(cost, plan.mesh.num_devices)
        needs = format_bytes(prediction.peak_memory_bytes)
        has = format_bytes(prediction.memory_capacity_bytes)
        effect = (
            f"{format_seconds(cost.time_s)} ({cost.time_s / before.time_s - 1:+.1%})"
            if cost.fits
            else f"does not fit: {needs} of {has}"
        )
        found.append(
            {
                "change": change,
                "effect": effect,
                "step_time_s": prediction.step_time_s,
                "peak_memory_bytes": prediction.peak_memory_bytes,
                "memory_capacity_bytes": prediction.memory_capacity_bytes,
                "fits": prediction.fits,
            }
        )
    return found


def _changes(cluster: Cluster) -> list[tuple[str, Cluster]]:
    """Hardware a little different from ``cluster``, with what is different in words."""
    changes = []
    if cluster.levels:
        slower = tuple((size, _slower(link)) for size, link in cluster.levels)
        changes.append(
            ("links between hosts half as fast", dataclasses.replace(cluster, levels=slower))
        )
    if any(host.num_devices > 1 for host in cluster.hosts):
        hosts = tuple(dataclasses.replace(host, link=_slower(host.link)) for host in cluster.hosts)
        changes.append(
            ("links inside hosts half as fast", dataclasses.replace(cluster, hosts=hosts))
        )
    for change, name, factor in (
        ("devices twice as fast at arithmetic", "flop_per_s", 2.0),
        ("memory of devices twice as fast", "memory_bytes_per_s", 2.0),
        ("memory of devices half as large", "memory_bytes", 0.5),
    ):
        hosts = tuple(
            dataclasses.replace(host, device=_scaled(host.device, name, factor))
            for host in cluster.hosts
        )
        changes.append((change, dataclasses.replace(cluster, hosts=hosts)))
    return changes


def _slower(link: Link) -> Link:
    return dataclasses.replace(link, bytes_per_s=link.bytes_per_s / 2)


def _scaled(device: Device, name: str, factor: float) -> Device:
    if name == "flop_per_s":
        rates = {dtype: rate * factor for dtype, rate in device.flop_per_s.items()}
        return dataclasses.replace(device, flop_per_s=rates)
    if name == "memory_bytes":
        return dataclasses.replace(device, memory_bytes=int(device.memory_bytes * factor))
    return dataclasses.replace(device, memory_bytes_per_s=device.memory_bytes_per_s * factor)
