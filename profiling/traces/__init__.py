"""Importers of what other programs measured, and diagnosis of what ranks did."""

from __future__ import annotations

from meshwright.profiling.traces.diagnosis import Diagnosis, diagnose
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.jobs import JobMixture
from meshwright.profiling.traces.step_files import read_step_table

__all__ = ["Diagnosis", "JobMixture", "diagnose", "import_traces", "read_step_table"]
