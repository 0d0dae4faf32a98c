"""What ``meshwright bench ops`` says: one document, tables and a plot."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from meshwright.bench.metrics import Errors, relative_errors, relative_errors_of
from meshwright.bench.operators import OperatorsEvaluation
from meshwright.bench.plots import scatter
from meshwright.bench.pricings import FITTED_ON_THIS
from meshwright.report.tables import plain_table
from meshwright.strict_json import one_line
from meshwright.units import format_seconds

__all__ = ["LONG_S", "OperatorsReport"]

IntArray = NDArray[np.int64]

LONG_S = 100e-6
"""From here on what a host adds to a measurement is small."""
_UNLIKE = 0.5
"""Trust below which a row counts as unlike the training data."""
_MOST_WORST = 50
_SHOWN_WORST = 10
_SHOWN_KINDS = 24


class OperatorsReport:
    """Figures of evaluated operators or collectives: overall and by each label."""

    def __init__(self, evaluation: OperatorsEvaluation) -> None:
        self.evaluation = evaluation
        self.name = next(iter(evaluation.predicted_s))
        self._errors = {
            name: relative_errors(predicted_s, evaluation.measured_s)
            for name, predicted_s in evaluation.predicted_s.items()
        }
        self._figures = {name: self._all_figures(name) for name in evaluation.predicted_s}

    def document(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        evaluation = self.evaluation
        return {
            "table": evaluation.table,
            "sha256": evaluation.sha256,
            "what": evaluation.what,
            "num_rows": evaluation.num_rows,
            "cost_model": evaluation.names[self.name],
            "is_in_sample": self.name in evaluation.in_sample,
            **self._figures[self.name],
            "worst": self._worst(),
            "skipped": [
                {"reason": reason, "rows": count, "first_row": first}
                for reason, (count, first) in evaluation.skipped.items()
            ],
            "compared": {
                name: {
                    "cost_model": evaluation.names[name],
                    "is_in_sample": name in evaluation.in_sample,
                    **figures,
                }
                for name, figures in self._figures.items()
                if name != self.name
            },
            "seconds": evaluation.seconds,
        }

    def headline(self) -> str:
        """Rows and what became of them, in one line."""
        evaluation = self.evaluation
        skipped = sum(count for count, _ in evaluation.skipped.values())
        return (
            f"{evaluation.table}: {evaluation.num_rows:,} {evaluation.what}, "
            f"{len(evaluation.row):,} predicted by {evaluation.names[self.name]} in "
            f"{format_seconds(evaluation.seconds)}, {skipped:,} left out"
            + (f"; {FITTED_ON_THIS}" if self.name in evaluation.in_sample else "")
        )

    def tables(self) -> list[Table]:
        """For a terminal."""
        found = []
        if len(self.evaluation.row):
            found += [self._table(), self._worst_table()]
        if self.evaluation.skipped:
            table = plain_table(("rows left out", "right"), ("first row", "right"), ("why", "left"))
            for reason, (count, first) in self.evaluation.skipped.items():
                table.add_row(f"{count:,}", str(first), one_line(reason))
            found.append(table)
        return found

    def scatter(self) -> str:
        """Predicted against measured times, as SVG."""
        overall = self._figures[self.name]["overall"]
        said = (
            "nothing predicted"
            if overall["mape"] is None
            else f"{overall['n']:,} {self.evaluation.what}, mean error {overall['mape']:.1%}, "
            f"median {overall['median_ape']:.1%}"
        )
        gpus = self.evaluation.labels["gpu"]
        return scatter(
            self.evaluation.measured_s,
            self.evaluation.predicted_s[self.name],
            gpus.tolist(),
            names=[f"row {row + 1}" for row in self.evaluation.row.tolist()],
            title=f"Times of {self.evaluation.table}, {self.evaluation.names[self.name]}",
            subtitle=said,
        )

    def _all_figures(self, name: str) -> dict[str, Any]:
        """``overall``, then ``by_LABEL`` for each label."""
        found: dict[str, Any] = {
            "overall": self._figures_of(name, np.arange(len(self._errors[name])))
        }
        for label, values in self.evaluation.labels.items():
            kinds, inverse = np.unique(values, return_inverse=True)
            order = np.argsort(inverse.reshape(-1), kind="stable")
            ends = np.cumsum(np.bincount(inverse.reshape(-1), minlength=len(kinds)))
            by_kind = {
                one_line(kind).strip() or "unknown": self._figures_of(name, places)
                for kind, places in zip(
                    kinds.tolist(), np.split(order, ends[:-1]) if len(kinds) else [], strict=True
                )
            }
            # Numbers by size, not by their first digit.
            ordered = sorted(by_kind, key=lambda kind: (kind.isdigit() and len(kind), kind))
            found[f"by_{label}"] = {kind: by_kind[kind] for kind in ordered}
        return found

    def _figures_of(self, name: str, places: IntArray) -> dict[str, Any]:
        errors: Errors = relative_errors_of(self._errors[name][places])
        measured_s = self.evaluation.measured_s[places]
        trust = self.evaluation.trust[name][places]
        is_long = measured_s >= LONG_S
        long = relative_errors_of(self._errors[name][places][is_long])
        plain: dict[str, Any] = msgspec.to_builtins(errors)
        return plain | {
            "learned_share": float(trust @ measured_s / measured_s.sum()) if len(places) else None,
            "out_of_distribution_share": float(np.mean(trust < _UNLIKE)) if len(places) else None,
            "long": {"n": long.n, "mape": long.mape, "bias": long.bias},
        }

    def _table(self) -> Table:
        table = plain_table(
            (self.evaluation.what, "left"), ("n", "right"), ("MAPE", "right"), ("median", "right"),
            ("p90", "right"), ("bias", "right"), (f"MAPE, {LONG_S * 1e6:g} us on", "right"),
            ("learned", "right"), ("unlike training", "right"),
            title="times, predicted against measured",
        )  # fmt: skip
        for name, figures in self._figures.items():
            table.add_row(*_line(f"all, {name}", figures["overall"]))
        for label in ("op", "direction", "dtype", "gpu", "source", "fabric", "group_size"):
            kinds = self._figures[self.name].get(f"by_{label}", {})
            if len(kinds) < 2:
                continue
            table.add_section()
            for kind, found in list(kinds.items())[:_SHOWN_KINDS]:
                table.add_row(*_line(f"{label} {kind}", found))
        return table

    def _worst(self) -> list[dict[str, Any]]:
        evaluation = self.evaluation
        predicted_s = evaluation.predicted_s[self.name]
        wrong = np.abs(np.log(predicted_s / evaluation.measured_s))
        return [
            {
                "row": int(evaluation.row[place]) + 1,
                **{name: one_line(str(v[place])) for name, v in evaluation.labels.items()},
                "measured_s": float(evaluation.measured_s[place]),
                "predicted_s": float(predicted_s[place]),
                "trust": float(evaluation.trust[self.name][place]),
            }
            for place in np.argsort(-wrong, kind="stable")[:_MOST_WORST].tolist()
        ]

    def _worst_table(self) -> Table:
        table = plain_table(
            ("worst row", "right"), ("what", "left"), ("measured", "right"),
            ("predicted", "right"), ("ratio", "right"), ("trust", "right"),
        )  # fmt: skip
        names = ("op", "direction", "dtype", "gpu", "source", "group_size")
        for one in self._worst()[:_SHOWN_WORST]:
            table.add_row(
                str(one["row"]), " ".join(one[name] for name in names if one.get(name)),
                format_seconds(one["measured_s"]), format_seconds(one["predicted_s"]),
                f"{one['predicted_s'] / one['measured_s']:.2f}", f"{one['trust']:.2f}",
            )  # fmt: skip
        return table


def _line(name: str, found: dict[str, Any]) -> list[str]:
    figures = (
        found["mape"], found["median_ape"], found["p90_ape"], found["bias"],
        found["long"]["mape"], found["learned_share"], found["out_of_distribution_share"],
    )  # fmt: skip
    texts = ["-" if value is None else f"{value:.1%}" for value in figures]
    return [name, f"{found['n']:,}", *texts]
