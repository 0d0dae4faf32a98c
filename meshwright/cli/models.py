"""``meshwright models``: what is built in, or what one reference names."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import output_for

if TYPE_CHECKING:
    from meshwright.capture.source import ModelSource
    from meshwright.graph.coverage import RuleCoverage

__all__ = ["models"]


_BATCH = 8
"""Samples of the step whose operators are counted; most meshes divide it."""


def models(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Describe this one only.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """List the built-in models, or describe one model."""
    from rich.table import Table

    from meshwright import report
    from meshwright.capture.references import builtin_models, resolve_model

    with output_for(as_json=json_output) as out:
        if model is not None:
            source = resolve_model(model)
            facts = source.describe()
            coverage = _coverage(source)
            shown = {key: value for key, value in facts.items() if key != "config"}
            shown["num_parameters"] = f"{facts['num_parameters']:,}"
            shown["operators with a rule"] = f"{100 * coverage.covered_fraction:.1f} %"
            if coverage.without_rule:
                shown["replicated"] = ", ".join(coverage.without_rule)
            out.show(report.facts_table({**shown, **facts["config"]}))
            out.document({**facts, "coverage": asdict(coverage)})
            return
        found = builtin_models()
        table = Table(box=None, pad_edge=False)
        for name in ("model", "family"):
            table.add_column(name)
        for name in ("parameters", "sequence"):
            table.add_column(name, justify="right")
        for item in found:
            length = "-" if item.default_seq_len is None else str(item.default_seq_len)
            table.add_row(item.name, item.family, f"{item.num_parameters:,}", length)
        out.show(table)
        out.document(
            {
                "models": [
                    {
                        "name": item.name,
                        "family": item.family,
                        "num_parameters": item.num_parameters,
                        "default_seq_len": item.default_seq_len,
                    }
                    for item in found
                ]
            }
        )


def _coverage(source: ModelSource) -> RuleCoverage:
    """What the factor rules make of a training step of the model."""
    from meshwright.capture import capture
    from meshwright.graph.analyzed import analyze_graph
    from meshwright.graph.coverage import rule_coverage
    from meshwright.graph.simplify import with_explicit_factories

    args, kwargs = source.example_inputs(_BATCH)
    taken = capture(source.build(), args, kwargs, name=source.reference)
    found = analyze_graph(with_explicit_factories(taken.graph))
    return rule_coverage(found.analysis, found.segmentation, found.labels)
