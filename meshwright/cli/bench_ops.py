"""``meshwright bench ops``: measured operators or collectives against predictions."""

from __future__ import annotations

from pathlib import Path

from meshwright.cli.bench_runs import CostModelOption, FileArgument
from meshwright.cli.options import CompareOption, JsonOption, PlotOption
from meshwright.cli.output import output_for
from meshwright.strict_json import write_text_atomically

__all__ = ["ops"]


def ops(
    file: FileArgument,
    plot: PlotOption = None,
    cost_model: CostModelOption = "learned",
    compare: CompareOption = None,
    json_output: JsonOption = False,
) -> None:
    """Predict every measured operator, or collective, of a table; error by kind and device.

    What the table holds is told by its columns. Rows that cannot be predicted are counted by
    reason. The columns and every figure are explained in docs/bench.md.
    """
    with output_for(as_json=json_output) as out:
        from meshwright.bench.operator_report import OperatorsReport
        from meshwright.bench.operators import evaluate_operators
        from meshwright.bench.pricings import names_of

        evaluation = evaluate_operators(file, names_of(cost_model, compare), tell=out.progress)
        report = OperatorsReport(evaluation)
        if plot is not None:
            write_text_atomically(report.scatter(), Path(plot))
        out.say(report.headline())
        out.show(*report.tables())
        if plot is not None:
            out.say(f"written to {plot}")
        out.document(report.document())
