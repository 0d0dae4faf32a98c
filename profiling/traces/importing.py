"""Files of outsiders to Records: what each is, and who reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from meshwright.profiling.traces.formats import (
    ImportOptions,
    TraceFormat,
    TraceImport,
    detect_format,
)
from meshwright.profiling.traces.job_tables import import_job_tables
from meshwright.profiling.traces.measured_tables import (
    import_collective_tables,
    import_operator_tables,
    import_run_tables,
)
from meshwright.profiling.traces.nccl_tests import import_nccl_tests
from meshwright.profiling.traces.profiles import PROFILE_FORMATS, import_profiles
from meshwright.records import Record, RecordStore

__all__ = ["Importer", "import_traces", "without_stored"]

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")

Importer = Callable[[Sequence[Path], ImportOptions], list[TraceImport]]
"""Files of one format to what they yielded."""

_IMPORTERS: dict[TraceFormat, Importer] = {
    TraceFormat.NCCL_TESTS: import_nccl_tests,
    TraceFormat.RUN_TABLE: import_run_tables,
    TraceFormat.OPERATOR_TABLE: import_operator_tables,
    TraceFormat.COLLECTIVE_TABLE: import_collective_tables,
    TraceFormat.JOB_TRACE: import_job_tables,
}


def import_traces(paths: Sequence[Path], options: ImportOptions | None = None) -> list[TraceImport]:
    """What the files tell; those of one format are read together, as ranks of one job may be.

    Raises:
        BadRequest: one of them cannot be read; then nothing is returned of any.
    """
    by_format: dict[TraceFormat, list[Path]] = {}
    for path in dict.fromkeys(paths):
        by_format.setdefault(detect_format(path), []).append(path)
    options = options or ImportOptions()
    profiles = {one: by_format.pop(one) for one in PROFILE_FORMATS if one in by_format}
    found = import_profiles(profiles, options)
    for format_, members in by_format.items():
        found += _IMPORTERS[format_](members, options)
    return found


def without_stored(records: Iterable[Record], store: RecordStore) -> tuple[list[Record], int]:
    """The Records of files ``store`` holds no Record of, and how many others were left out.

    Files are told by the SHA-256 in ``source``, whatever they are called; Records of several files
    are left out where the store has Records of all of them.

    Raises:
        BadRequest: the store cannot be read.
    """
    stored = {sha256 for source in store.sources() for sha256 in _SHA256.findall(source)}
    is_new: dict[str, bool] = {}
    kept, num_left_out = [], 0
    for record in records:
        if record.source not in is_new:
            found = _SHA256.findall(record.source)
            is_new[record.source] = not found or not stored.issuperset(found)
        if is_new[record.source]:
            kept.append(record)
        else:
            num_left_out += 1
    return kept, num_left_out
