"""``meshwright models``: what is built in, or what one reference names."""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import output_for

__all__ = ["models"]


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
            facts = resolve_model(model).describe()
            shown = {key: value for key, value in facts.items() if key != "config"}
            shown["num_parameters"] = f"{facts['num_parameters']:,}"
            out.show(report.facts_table({**shown, **facts["config"]}))
            out.document(facts)
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
