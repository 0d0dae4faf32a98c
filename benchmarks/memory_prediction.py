"""Claim: peak memory is predicted within 5 % (median), and what is said to fit fits.

    OMP_NUM_THREADS=1 python -m benchmarks.memory_prediction TABLE [-o FILE] [--write FOLDER]

``TABLE`` holds measured runs (docs/bench.md). Every run is priced with its own plan on data sheets
alone; memory needs no learned prices. Errors are of runs whose peak was measured, per source, and
of configurations too, where runs predicted alike count once, by the median of their peaks.

The margin is what a peak may exceed its prediction by once in a hundred times
(``bench.memory_margin``), learned from runs whose attention is told. ``left_out`` learns it from
the other sources, and from the other configurations of all sources, and says how many of those
left out stay within it. The confusion matrix counts runs by predicted and measured, without the
margin, with the one of all sources, with each source's own where it has one, and with the one of
all sources over the whole memory, in place of what is reserved. ``--write`` leaves the margin as
the ``memory.json`` of a folder of learned prices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heading import heading
from meshwright.bench.memory_margin import MeasuredPeak, figures_of, margins_of
from meshwright.bench.predict import Predictor, RunPrediction
from meshwright.bench.run_table import read_runs
from meshwright.bench.runs import MeasuredRun, Skipped
from meshwright.cli.fit_sources import read_sources
from meshwright.cost.calibration import DEFAULTS
from meshwright.tracking import DataSource

UNTOLD = ("flash attention not told: yes", "instead of interleaved", "seq_len not told")
"""What a row leaves open that decides its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run that was measured and predicted."""

    run: MeasuredRun
    predicted: RunPrediction

    @property
    def is_told(self) -> bool:
        """Whether the row leaves nothing open that decides its memory."""
        return not any(word in said for said in self.predicted.assumptions for word in UNTOLD)

    @property
    def peak(self) -> MeasuredPeak:
        """Of a run whose peak was measured."""
        assert self.run.peak_memory_bytes, "only runs with a peak are asked"
        return MeasuredPeak(
            source=self.run.source or "",
            measured_bytes=self.run.peak_memory_bytes,
            predicted_bytes=self.predicted.peak_memory_bytes,
        )


def priced(runs: Sequence[MeasuredRun]) -> tuple[list[Row], Counter[str]]:
    """Runs with what is predicted of them, and why others have none."""
    predictor = Predictor()
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    for run in sorted(runs, key=lambda one: one.job_key):
        found = predictor.predict(run)
        if isinstance(found, Skipped):
            skipped[f"{run.source}: {found.reason}"] += 1
        else:
            rows.append(Row(run=run, predicted=found))
    return rows, skipped


def errors(peaks: Sequence[MeasuredPeak]) -> dict[str, Any]:
    """Figures of relative errors, by run and by configuration."""
    error = np.array([peak.predicted_bytes / peak.measured_bytes - 1 for peak in peaks])
    alike: dict[int, list[float]] = {}
    for peak in peaks:
        alike.setdefault(round(peak.predicted_bytes), []).append(peak.measured_bytes)
    each = [predicted / float(np.median(measured)) - 1 for predicted, measured in alike.items()]
    return {
        "n": len(peaks),
        "median_ape": rounded(np.median(np.abs(error))),
        "p90_ape": rounded(np.quantile(np.abs(error), 0.9)),
        "bias": rounded(np.median(error)),
        "configurations": len(alike),
        "median_ape_of_configurations": rounded(np.median(np.abs(each))),
    }


def by_source(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors of each source, of all its rows and of those that leave nothing open."""
    found = {}
    for source in sorted({row.run.source or "" for row in rows}):
        own = [row for row in rows if row.run.source == source]
        told = [row.peak for row in own if row.is_told]
        found[source] = errors([row.peak for row in own])
        if told:
            found[source]["told"] = errors(told)
    return found


def left_out(peaks: Sequence[MeasuredPeak]) -> dict[str, Any]:
    """Margins learned without what they are tested on."""
    found: dict[str, Any] = {"sources": {}, "level": 0.99}
    for source in sorted({peak.source for peak in peaks}):
        margin = margins_of([peak for peak in peaks if peak.source != source]).general
        own = [peak for peak in peaks if peak.source == source]
        found["sources"][source] = {
            "margin": rounded(margin),
            "n": len(own),
            "within": share_within(own, [margin] * len(own)),
        }
    keys = sorted({(peak.source, round(peak.predicted_bytes)) for peak in peaks})
    margin_of = {
        key: margins_of(
            [one for one in peaks if (one.source, round(one.predicted_bytes)) != key]
        ).general
        for key in keys
    }
    margins = [margin_of[peak.source, round(peak.predicted_bytes)] for peak in peaks]
    found["configurations"] = {
        "configurations": len(keys),
        "n": len(peaks),
        "within": share_within(peaks, margins),
    }
    return found


def share_within(peaks: Sequence[MeasuredPeak], margins: Sequence[float]) -> float:
    """Share of peaks at most their prediction and the margin."""
    return rounded(
        np.mean(
            [
                peak.measured_bytes <= peak.predicted_bytes * (1 + margin)
                for peak, margin in zip(peaks, margins, strict=True)
            ]
        )
    )


def confusion(rows: Sequence[Row], margin_of: Callable[[str], float]) -> dict[str, Any]:
    """Runs by what is predicted with the margin of their source and what happened."""
    found: dict[str, Any] = {}
    for source in ["all", *sorted({row.run.source or "" for row in rows})]:
        own = [row for row in rows if source in ("all", row.run.source)]
        margins = [margin_of(row.run.source or "") for row in own]
        fits = np.array([row.predicted.fullness for row in own]) * (1 + np.array(margins)) <= 1
        oom = np.array([bool(row.run.oom) for row in own])
        found[source] = {
            "fits_ran": int((fits & ~oom).sum()),
            "fits_oom": int((fits & oom).sum()),
            "oom_ran": int((~fits & ~oom).sum()),
            "oom_oom": int((~fits & oom).sum()),
            "fits_that_does_not": rounded((fits & oom).sum() / max(fits.sum(), 1)),
        }
    return found


def rounded(value: Any) -> float:
    """To 4 digits after the point."""
    return round(float(value), 4)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    document = heading(
        "peak memory within 5 % (median); fits that does not, at most 0.5 %",
        table_sha256=hashlib.sha256(options.table.read_bytes()).hexdigest(),
    )
    rows, skipped = priced(read_runs(options.table).runs)
    weighed = [row for row in rows if row.run.peak_memory_bytes]
    told = [row.peak for row in weighed if row.is_told]
    margins = margins_of(told)
    document |= {
        "rows": len(rows),
        "skipped": dict(skipped.most_common()),
        "peak_memory": by_source(weighed),
        "margin": {
            "general": rounded(margins.general),
            "by_source": {name: rounded(value) for name, value in margins.by_source.items()},
            "configurations": dict(margins.configurations),
            "n": len(told),
        },
        "left_out": left_out(told),
        "confusion": {
            "reserved_alone": confusion(rows, lambda _: 0.0),
            "with_the_margin": confusion(rows, lambda _: margins.general),
            "with_the_margin_for_the_reserve": confusion(
                rows,
                lambda _: max((1 + margins.general) * (1 - DEFAULTS.reserved_fraction) - 1, 0.0),
            ),
            "with_own_margins": confusion(
                rows, lambda source: margins.by_source.get(source, margins.general)
            ),
        },
    }
    if options.write is not None:
        within = document["left_out"]["configurations"]["within"]
        source = DataSource(
            name=options.table.name,
            kind="runs",
            num_bytes=options.table.stat().st_size,
            sha256=document["table_sha256"],
            num_rows=len(read_runs(options.table).runs),
        )
        licenses = read_sources([options.table], print).licenses
        figures_of(told, within_left_out=within, data=source, licenses=licenses).write(
            options.write
        )
    text = json.dumps(document, indent=1)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
