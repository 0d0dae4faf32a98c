"""What ``meshwright bench runs`` says: one document, tables, and the files of a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from rich.table import Table

from meshwright.bench.evaluation import Evaluation
from meshwright.bench.outcomes import Choices, Outcome, Summary, summarize
from meshwright.bench.plots import Bar, regret_bars, scatter
from meshwright.bench.pricings import FITTED_ON_THIS
from meshwright.bench.regret import RULES
from meshwright.bench.run_table import RunTable
from meshwright.errors import BadRequest
from meshwright.report.tables import plain_table
from meshwright.strict_json import one_line
from meshwright.units import format_bytes, format_seconds

__all__ = ["RunsReport"]

_MOST_KINDS = 40
"""Lines of a table of summaries; the document holds all."""
_MOST_WORST = 8
_MOST_REASONS = 12
_RULE_WORDS = {
    "random": "random choice",
    "most_data_parallel": "most data parallel",
    "megatron": "Megatron's rule",
}


class RunsReport:
    """Figures of an evaluated table: overall, by source, by GPU and by one column more.

    Args:
        table: that was read.
        evaluation: of it; its first cost model is the one that is judged.
        by: a column of the table, or None.

    Raises:
        BadRequest: the table has no such column.
    """

    def __init__(self, table: RunTable, evaluation: Evaluation, *, by: str | None = None) -> None:
        if by is not None and by not in table.columns:
            has = one_line(", ".join(table.columns))
            raise BadRequest(f"--by: {table.name} has no column {one_line(by)!r}; it has {has}")
        self.table = table
        self.evaluation = evaluation
        self.by = by
        self.name = next(iter(evaluation.outcomes))
        self.summaries = {
            name: _summaries(outcomes, by) for name, outcomes in evaluation.outcomes.items()
        }

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Of the cost model that is judged."""
        return self.evaluation.outcomes[self.name]

    @property
    def overall(self) -> Summary:
        """Of all rows, by the cost model that is judged."""
        return self.summaries[self.name]["overall"][""]

    def document(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        plain = {
            name: {key: _of_kind(key, found) for key, found in by_kind.items()}
            for name, by_kind in self.summaries.items()
        }
        return {
            "table": self.table.name,
            "sha256": self.table.sha256,
            "num_rows": self.table.num_rows,
            "unknown_columns": list(self.table.unknown),
            "cost_model": self.evaluation.labels[self.name],
            "is_in_sample": self.name in self.evaluation.in_sample,
            "rows": [_row(one) for one in self.outcomes],
            "skipped": [
                {"run_id": one.run_id, "reason": one.reason} for one in self.evaluation.skipped
            ],
            **plain[self.name],
            "compared": {
                name: {
                    "cost_model": self.evaluation.labels[name],
                    "is_in_sample": name in self.evaluation.in_sample,
                    **figures,
                }
                for name, figures in plain.items()
                if name != self.name
            },
            "seconds": self.evaluation.seconds,
        }

    def tables(self) -> list[Table]:
        """For a terminal: figures by kind, choices, memory, the worst rows, what is left out."""
        if not self.outcomes:
            return [self._reasons()] if self.evaluation.skipped else []
        found = [self._errors(), self._regrets(), self._memory(), self._worst()]
        if self.evaluation.skipped:
            found.append(self._reasons())
        return found

    def headline(self) -> str:
        """Rows and what became of them, in one line."""
        skipped = len(self.evaluation.skipped)
        return (
            f"{self.table.name}: {self.table.num_rows:,} rows, {len(self.outcomes):,} predicted "
            f"by {self.evaluation.labels[self.name]}, {skipped:,} left out"
            + (f"; {FITTED_ON_THIS}" if self.name in self.evaluation.in_sample else "")
        )

    def scatter(self) -> str:
        """Predicted against measured step times, as SVG."""
        timed = [one for one in self.outcomes if one.measured_s is not None]
        gpus, sources = {one.gpu for one in timed}, {one.source for one in timed}
        overall = self.overall
        said = (
            f"{overall.n:,} runs, mean error {overall.mape:.1%}, bias {overall.bias:+.1%}"
            if overall.mape is not None and overall.bias is not None
            else "no run with a step time"
        )
        return scatter(
            [one.measured_s or 0.0 for one in timed],
            [one.predicted_s for one in timed],
            [one.gpu if len(gpus) > len(sources) else one.source for one in timed],
            names=[one.run_id for one in timed],
            title=f"Step times of {self.table.name}, {self.evaluation.labels[self.name]}",
            subtitle=said,
        )

    def bars(self) -> str:
        """Regret of the cost models and of rules of thumb, as SVG."""
        bars = [
            Bar(
                name=name,
                top1_mean=choices.regret_top1_mean,
                top1_p95=choices.regret_top1_p95 or 0.0,
                top3_mean=choices.regret_top3_mean or 0.0,
            )
            for name, choices in self._choices()
            if choices.regret_top1_mean is not None
        ]
        subtitle = f"mean over {self.overall.groups:,} jobs of two or more measured plans"
        return regret_bars(bars, title=f"Regret, {self.table.name}", subtitle=subtitle)

    def _choices(self) -> list[tuple[str, Choices]]:
        found = [
            (
                name,
                Choices(
                    regret_top1_mean=by_kind["overall"][""].regret_top1_mean,
                    regret_top1_p95=by_kind["overall"][""].regret_top1_p95,
                    regret_top3_mean=by_kind["overall"][""].regret_top3_mean,
                ),
            )
            for name, by_kind in self.summaries.items()
        ]
        baselines = self.overall.baselines
        return found + [(_RULE_WORDS[rule], baselines[rule]) for rule in reversed(RULES)]

    def _errors(self) -> Table:
        table = plain_table(
            ("runs of", "left"), ("n", "right"), ("MAPE", "right"), ("median", "right"),
            ("p90", "right"), ("bias", "right"), ("in interval", "right"), ("jobs", "right"),
            ("rank corr.", "right"), ("regret", "right"), ("p95", "right"), ("top 3", "right"),
            title="step time, predicted against measured",
        )  # fmt: skip
        lines = [
            (name, kind, summary)
            for name, by_kind in self.summaries.items()
            for key, found in by_kind.items()
            for kind, summary in list(found.items())[:_MOST_KINDS]
            if key == "overall" or name == self.name
        ]
        lines.sort(key=lambda line: line[0] != self.name)
        for name, kind, one in lines:
            first = kind or (f"all, {name}" if len(self.summaries) > 1 else "all")
            table.add_row(
                first, str(one.n), _percent(one.mape), _percent(one.median_ape),
                _percent(one.p90_ape), _percent(one.bias, signed=True),
                _percent(one.interval_coverage), str(one.groups),
                "-" if one.spearman_in_group is None else f"{one.spearman_in_group:.3f}",
                _percent(one.regret_top1_mean), _percent(one.regret_top1_p95),
                _percent(one.regret_top3_mean),
            )  # fmt: skip
        return table

    def _regrets(self) -> Table:
        table = plain_table(
            ("choice by", "left"), ("regret, mean", "right"), ("p95", "right"), ("top 3", "right"),
            title=f"time over the best measured plan, {self.overall.groups} jobs",
        )  # fmt: skip
        for name, one in self._choices():
            table.add_row(
                name,
                _percent(one.regret_top1_mean),
                _percent(one.regret_top1_p95),
                _percent(one.regret_top3_mean),
            )
        return table

    def _memory(self) -> Table:
        table = plain_table(
            ("memory", "left"), ("ran", "right"), ("out of memory", "right"),
            title=f"peak memory of {self.overall.memory_n} runs: median error "
            f"{_percent(self.overall.memory_median_error)}, bias "
            f"{_percent(self.overall.memory_bias, signed=True)}",
        )  # fmt: skip
        for words, key in (("predicted to fit", "fits"), ("predicted not to fit", "oom")):
            counts = [
                self.overall.oom_confusion[f"predicted_{key}_{end}"] for end in ("ran", "oom")
            ]
            table.add_row(words, *map(str, counts))
        return table

    def _worst(self) -> Table:
        table = plain_table(
            ("worst rows", "left"), ("measured", "right"), ("predicted", "right"),
            ("error", "right"), ("largest part", "left"), ("memory", "right"),
        )  # fmt: skip
        timed = [one for one in self.outcomes if one.measured_s]
        for one in sorted(timed, key=_badness, reverse=True)[:_MOST_WORST]:
            part = max(one.breakdown, key=lambda cause: one.breakdown[cause], default="-")
            table.add_row(
                one.run_id, format_seconds(one.measured_s or 0.0),
                format_seconds(one.predicted_s), f"{one.error or 0.0:+.0%}", part,
                format_bytes(one.predicted_bytes),
            )  # fmt: skip
        return table

    def _reasons(self) -> Table:
        table = plain_table(("rows left out", "right"), ("first", "left"), ("why", "left"))
        reasons = Counter(_without_row(one.reason) for one in self.evaluation.skipped)
        first = {_without_row(one.reason): one.run_id for one in reversed(self.evaluation.skipped)}
        for reason, count in reasons.most_common(_MOST_REASONS):
            table.add_row(str(count), first[reason], reason)
        if len(reasons) > _MOST_REASONS:
            rest = sum(reasons.values()) - sum(n for _, n in reasons.most_common(_MOST_REASONS))
            table.add_row(str(rest), "", "other reasons; --json lists every row")
        return table


def _summaries(outcomes: Sequence[Outcome], by: str | None) -> dict[str, dict[str, Summary]]:
    """By what is grouped (``overall``, ``by_source``...), then by its value."""
    keys: dict[str, Callable[[Outcome], str]] = {
        "by_source": lambda one: one.source,
        "by_gpu": lambda one: one.gpu,
    }
    if by is not None:
        keys[f"by_{by}"] = lambda one: one.labels.get(by, "unknown")
    found = {"overall": {"": summarize(outcomes)}}
    for name, key_of in keys.items():
        members: dict[str, list[Outcome]] = {}
        for one in outcomes:
            members.setdefault(key_of(one), []).append(one)
        found[name] = {key: summarize(members[key]) for key in sorted(members)}
    return found


def _of_kind(key: str, found: Mapping[str, Summary]) -> Any:
    """Overall there is one; else by value."""
    plain = msgspec.to_builtins(found)
    return plain[""] if key == "overall" else plain


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "run_id": one.run_id,
        "source": one.source,
        "gpu": one.gpu,
        "group": one.group,
        "plan": one.plan,
        "measured": one.measured_s,
        "predicted": one.predicted_s,
        "error": one.error,
        "interval": list(one.interval_s),
        "memory": {
            "measured_bytes": one.measured_bytes,
            "predicted_bytes": one.predicted_bytes,
            "capacity_bytes": one.capacity_bytes,
            "fits": one.fits,
            "ran": one.ran,
            "breakdown": dict(one.memory_breakdown),
        },
        "breakdown": dict(one.breakdown),
        "trust": list(one.trust),
        "assumptions": list(one.assumptions),
    }


def _badness(one: Outcome) -> float:
    """A tenth of the time is as bad as ten times the time."""
    ratio = one.predicted_s / (one.measured_s or one.predicted_s)
    return max(ratio, 1.0 / ratio)


def _without_row(reason: str) -> str:
    head, _, rest = reason.partition(": ")
    return rest if rest and head.startswith("row ") and head[4:].isdigit() else reason


def _percent(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.1%}"
