"""What ``meshwright fit`` is given, recognized by what it is: stores, tables by their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshwright.cluster import Cluster
from meshwright.errors import BadRequest
from meshwright.gnn_cost.fitting import FitData
from meshwright.profiling.traces.tables import column_names, is_parquet, read_cells
from meshwright.records import Kind, Record, RecordStore, StepReport, read_step_report
from meshwright.strict_json import one_line
from meshwright.tracking import DataSource, source_of

__all__ = ["Sources", "given_licenses", "read_sources"]

_TABLES = {
    "runs": ("run_id", "gpu"),
    "collectives": ("gpu", "collective", "group_size", "bytes", "time_s"),
    "operators": ("gpu", "op", "dtype", "time_s"),
}
_KINDS = (Kind.OPERATOR, Kind.COLLECTIVE)


@dataclass(slots=True, kw_only=True)
class Sources:
    """Everything that was given."""

    operators: list[Path] = field(default_factory=list)
    collectives: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    data: list[DataSource] = field(default_factory=list)
    licenses: dict[str, str] = field(default_factory=dict)

    def fit_data(self, cluster: Cluster | None) -> FitData:
        """For a fit."""
        return FitData(
            operators=tuple(self.operators),
            collectives=tuple(self.collectives),
            runs=tuple(self.runs),
            records=tuple(self.records),
            cluster=cluster,
            sources=tuple(self.data),
            licenses=dict(sorted(self.licenses.items())),
        )


def read_sources(paths: Iterable[str], say: Callable[[str], None]) -> Sources:
    """Look at every path: a folder is a record store, JSON a step report, all else a table.

    Args:
        paths: in any order; one that is named twice counts once.
        say: told what is wrong with files of stores.

    Raises:
        BadRequest: one cannot be read, or is none of these.
    """
    found = Sources()
    for text in dict.fromkeys(paths):
        path = Path(text)
        if path.is_dir():
            _add_store(found, path, say)
        elif path.suffix == ".json":
            found.reports.append(read_step_report(path))
            found.data.append(source_of(path, kind="report", num_rows=1))
        else:
            _add_table(found, path)
    return found


def _add_store(found: Sources, path: Path, say: Callable[[str], None]) -> None:
    store, before = RecordStore(path), len(found.records)
    for kind in _KINDS:
        records, problems = store.query(kind=kind)
        found.records.extend(records)
        for problem in problems:
            say(problem)
    num_rows = len(found.records) - before
    if not num_rows:
        raise BadRequest(
            f"{one_line(str(path))}: holds no measured operators or collectives; measure some "
            f"with `meshwright profile`"
        )
    found.data.append(source_of(path, kind="records", num_rows=num_rows))


def _add_table(found: Sources, path: Path) -> None:
    columns = column_names(path)
    kind = next((kind for kind, needed in _TABLES.items() if set(needed) <= set(columns)), None)
    if kind is None:
        raise BadRequest(
            f"{one_line(str(path))}: no table of operators, collectives or runs: it has the "
            f"columns {one_line(', '.join(columns))}; docs/tables.md lists those needed"
        )
    getattr(found, kind).append(path)
    num_rows = _num_rows(path)
    found.data.append(source_of(path, kind=kind, num_rows=num_rows))
    if {"source", "licence"} <= set(columns):
        table, _ = read_cells(path)
        pairs = table.select(["source", "licence"]).group_by(["source", "licence"]).aggregate([])
        for row in pairs.to_pylist():
            if row["source"] and row["licence"]:
                found.licenses[one_line(str(row["source"]))] = one_line(str(row["licence"]))


def _num_rows(path: Path) -> int:
    if is_parquet(path):
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    return int(read_cells(path)[0].num_rows)


def given_licenses(texts: Sequence[str]) -> dict[str, str]:
    """Licenses by source, of ``SOURCE=LICENSE`` each.

    Raises:
        BadRequest: one has another form.
    """
    found = {}
    for text in texts:
        source, equals, name = text.partition("=")
        if not equals or not source.strip() or not name.strip():
            raise BadRequest(f"--license: {one_line(text)!r} is not SOURCE=LICENSE")
        found[source.strip()] = name.strip()
    return found
