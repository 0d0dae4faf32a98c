"""``meshwright traces diagnose``: slow ranks and idle waves, from per-rank times alone."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import output_for
from meshwright.errors import BadRequest
from meshwright.profiling.traces.diagnosis import diagnose as find_trouble
from meshwright.profiling.traces.phase_plot import diagnosis_page, sentences
from meshwright.profiling.traces.sources import DEFAULT_MAX_BYTES
from meshwright.profiling.traces.step_files import read_step_table
from meshwright.strict_json import write_text_atomically

__all__ = ["diagnose"]


def diagnose(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...|DIR",
            help="CSV, Parquet or JSON with rank, iteration and two of step_s, wait_s, compute_s; "
            "traces of the ranks; or a record store.",
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE.html", help="Page with plots.")
    ] = None,
    min_share: Annotated[
        float, typer.Option(help="Share of a step by which a slow rank is slower, at least.")
    ] = 0.03,
    source: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Of several jobs the one whose source holds this, or of this model.",
        ),
    ] = "",
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Refuse a file that holds more than this, decompressed.")
    ] = DEFAULT_MAX_BYTES,
    json_output: JsonOption = False,
) -> None:
    """Say which ranks are slow, since when and by how much, and how delays travel."""
    if not 0 < min_share < 1:
        raise BadRequest(f"--min-share: {min_share} is no share; give one between 0 and 1")
    with output_for(as_json=json_output) as out:
        table = read_step_table(files, max_bytes=max_bytes, source=source)
        found = find_trouble(table, min_share=min_share)
        if output is not None:
            write_text_atomically(diagnosis_page(table, found), output)
        for line in sentences(found):
            out.say(line)
        if output is not None:
            out.say(f"written to {output}")
        document: dict[str, Any] = msgspec.to_builtins(found)
        out.document(
            {
                **document,
                "healthy": found.healthy,
                "is_conclusive": found.is_conclusive,
                "page": output,
            }
        )
