"""What ``meshwright bench plans`` says: one document, tables, and the same to a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from rich.table import Table

from meshwright.agents.evaluation import EXACT
from meshwright.bench.plans import WAYS, GapFigures, JudgedInstance, JudgedPlanner
from meshwright.report.tables import plain_table
from meshwright.strict_json import JsonValue
from meshwright.tracking import Tracker, used
from meshwright.units import format_seconds

__all__ = ["BEST_METRICS", "PlansReport", "Told", "is_in_sample"]

BEST_METRICS: Mapping[str, str] = MappingProxyType(
    {
        **{f"evaluation/{way}_gap_mean": "min" for way in WAYS},
        **{f"evaluation/{way}_gap_p95": "min" for way in WAYS},
        **{f"evaluation/{way}_exact_share": "max" for way in WAYS},
        **{f"instance/{way}_gap": "mean" for way in WAYS},
    }
)
"""Which value of a metric sums up a run, for ``tracking.open_mirror``."""

_SHOWN_WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What was judged with what."""

    set_name: str
    """Of a frozen set, or of a trace's folder."""
    set_sha256: str
    """Of its specifications, those asked for."""
    num_asked: int
    """Instances, those worth nothing included."""
    planner: str
    planner_sha256: str
    is_in_sample: bool
    """The planner learned on these instances or was chosen by them; of a trace: it may have."""
    cost_model: str
    """Label of what prices the instances."""
    cost_model_sha256: str
    """Empty where it has none."""
    records_sha256: str = ""
    """Of the store of a trace."""


def is_in_sample(card: Mapping[str, JsonValue], set_name: str, *, is_trace: bool = False) -> bool:
    """Whether a planner was made with the instances; of a trace, whether it may have been.

    Of a trace a card tells neither which jobs were learned nor what the planner went on from was
    made with, so every planner of a trace, and all that went on from another, may have learned it.

    Args:
        card: of the planner.
        set_name: of a frozen set, or of a trace.
        is_trace: the instances are jobs of a trace.
    """
    told = card.get("instances")
    instances = told if isinstance(told, dict) else {}
    is_of_kind = instances.get("name") == ("traces" if is_trace else "general")
    is_known = is_of_kind or bool(card.get("started_from"))
    return is_known and (is_trace or set_name in ("train", "validation"))


class PlansReport:
    """Gaps of a judged planner: overall and by instance."""

    def __init__(self, judged: JudgedPlanner, told: Told) -> None:
        self.judged = judged
        self.told = told
        self.figures: Mapping[str, GapFigures] = judged.figures()

    def document(self) -> dict[str, JsonValue]:
        """Everything, for ``--json``; what is not finite is null."""
        judged = self.judged
        overall: dict[str, JsonValue] = {way: asdict(one) for way, one in self.figures.items()}
        return {
            **asdict(self.told),
            "n": len(judged.instances),
            "num_samples": judged.num_samples,
            "temperature": judged.temperature,
            "max_evaluations": judged.max_evaluations,
            "seed": judged.seed,
            "seconds": judged.seconds,
            "overall": overall,
            "rows": [_row(one) for one in judged.instances],
        }

    def headline(self) -> str:
        """What was judged on what, in one line."""
        told, judged = self.told, self.judged
        count = len(judged.instances)
        left_out = told.num_asked - count
        words = f"{told.set_name}: {count:,} {'instance' if count == 1 else 'instances'}"
        words += f" ({left_out:,} more are worth nothing)" if left_out else ""
        words += f" planned by {told.planner} in {format_seconds(judged.seconds)}"
        words += f", priced by {told.cost_model}"
        if told.is_in_sample:
            how = "may have learned these" if told.records_sha256 else "was made with these very"
            words += f"; it {how} instances, so that gaps elsewhere may be larger"
        return words

    def tables(self) -> tuple[Table, ...]:
        """Figures by way, and the instances it plans worst."""
        table = plain_table(
            ("plans", "left"), ("mean gap", "right"), ("95 % interval", "right"),
            ("95th percentile", "right"), ("worst", "right"), ("best found", "right"),
            ("95 % interval", "right"),
        )  # fmt: skip
        for way, one in self.figures.items():
            table.add_row(
                self._words(way), _percent(one.mean), _interval(one.mean_interval),
                _percent(one.p95), _percent(one.worst), f"{one.exact_share:.1%}",
                _interval(one.exact_share_interval),
            )  # fmt: skip
        worst = self._worst()
        if not worst:
            return (table,)
        shown = plain_table(
            ("instance", "left"), ("gap", "right"), ("plan", "left"), ("best plan", "left"),
            title="largest gaps after local search",
        )  # fmt: skip
        for judged in worst:
            shown.add_row(
                judged.name, f"{judged.gap('searched'):.2%}", judged.plan, judged.best_plan
            )
        return table, shown

    def _words(self, way: str) -> str:
        extra = {
            "sampled": f" ({self.judged.num_samples})",
            "searched": f" ({self.judged.max_evaluations} plans looked up)",
        }
        return WAYS[way] + extra.get(way, "")

    def _worst(self) -> list[JudgedInstance]:
        order = np.argsort(-self.judged.gaps("searched"), kind="stable")[:_SHOWN_WORST]
        worst = [self.judged.instances[number] for number in order.tolist()]
        return [one for one in worst if one.gap("searched") > EXACT]

    # Tracking ----------------------------------------------------------------------------------

    def tell_inputs(self, tracker: Tracker) -> None:
        """Configuration, and what was given, by hash."""
        told, judged = self.told, self.judged
        tracker.config(
            {
                **asdict(told),
                "num_samples": judged.num_samples,
                "temperature": judged.temperature,
                "max_evaluations": judged.max_evaluations,
                "seed": judged.seed,
            }
        )
        tracker.artifact(
            f"instances-{told.set_sha256[:12]}",
            kind="dataset",
            files=(),
            metadata={
                "name": told.set_name,
                "sha256": told.set_sha256,
                "evaluation": told.num_asked,
            },
        )
        used(tracker, "planner", told.planner_sha256)
        if told.cost_model_sha256:
            used(tracker, "cost-model", told.cost_model_sha256)
        if told.records_sha256:
            used(tracker, "records", told.records_sha256)

    def tell_outcome(self, tracker: Tracker, file: Path) -> None:
        """Gaps and plans; ``file`` holds the document."""
        instances = self.judged.instances
        for step, one in enumerate(instances):
            gaps = {f"{way}_gap": one.gap(way) for way in WAYS}
            tracker.metrics("instance", _finite_only(gaps), step=step)
        overall = _finite_only(
            {
                f"{way}_{name}": float("nan") if value is None else value
                for way, one in self.figures.items()
                for name, value in (
                    ("gap_mean", one.mean),
                    ("gap_p95", one.p95),
                    ("exact_share", one.exact_share),
                )
            }
        )
        tracker.metrics("evaluation", overall, step=0)
        rows = [_row(one) for one in instances]
        for name, columns in (("gaps", _GAP_COLUMNS), ("plans", _PLAN_COLUMNS)):
            tracker.table(
                f"evaluation/{name}", columns, [[row[key] for key in columns] for row in rows]
            )
        tracker.summary(dict(overall))
        told = self.told
        sources = (told.set_sha256, told.planner_sha256, told.cost_model_sha256)
        tracker.artifact(
            "meshwright-evaluation",
            kind="evaluation",
            files=[file],
            metadata=dict(overall),
            made_from=[item for item in sources if item],
        )


_GAP_COLUMNS = ("instance", *(f"{way}_gap" for way in WAYS), "optimum_s", "rule_s")
_PLAN_COLUMNS = ("instance", "searched_s", "plan", "optimum_s", "best_plan")


def _row(one: JudgedInstance) -> dict[str, JsonValue]:
    return {
        "instance": one.name,
        "optimum_s": one.optimum_s,
        **{f"{way}_s": _or_none(one.time_s[way]) for way in WAYS},
        **{f"{way}_gap": _or_none(one.gap(way)) for way in WAYS},
        "evaluations": one.evaluations,
        "plan": one.plan,
        "best_plan": one.best_plan,
    }


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _finite_only(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _percent(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2%}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2%} to {ends[1]:.2%}"
