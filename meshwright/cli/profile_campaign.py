"""``meshwright profile campaign``: one command that measures a machine for a budget."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import output_for
from meshwright.cli.profile_ranks import device_name, open_store, parse_bytes
from meshwright.cluster.detect import detect_gpus
from meshwright.errors import BadRequest
from meshwright.units import format_seconds

__all__ = ["campaign"]

_INTERRUPTED = 130


def campaign(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Store of the records.")
    ],
    budget: Annotated[str, typer.Option(help="Longest time, such as 9min.")] = "9min",
    max_bytes: Annotated[
        str, typer.Option(help="Largest size of all records, such as 64m.")
    ] = "64m",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 1,
    cpu_time: Annotated[
        bool, typer.Option(help="Count the processor's time: others count less. One thread only.")
    ] = False,
    shapes: Annotated[int, typer.Option(help="Sizes drawn for each operator.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the sizes drawn.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Measure this machine: its peaks, operators forward and backward, steps of models.

    The budget is shared out by what is known least; Ctrl-C ends it early and loses nothing.
    """
    budget_s = parse_duration_s(budget)
    size_bytes = parse_bytes(max_bytes, option="--max-bytes")
    num_gpus = len(detect_gpus())
    chosen = device or ("cuda" if num_gpus else "cpu")
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not num_gpus):
        raise BadRequest(f"--device: this machine has no device {chosen!r}; use cpu")
    if not 1 <= threads <= 1024 or shapes < 1 or seed < 0:
        raise BadRequest("--threads, --shapes and --seed: give positive numbers")
    if cpu_time and (chosen != "cpu" or threads != 1):
        raise BadRequest("--cpu-time: is right for one thread of the CPU; give --threads 1")
    with output_for(as_json=json_output) as out:
        import torch

        from meshwright.profiling.campaign import run_campaign

        torch.set_num_threads(threads)
        result = run_campaign(
            open_store(output),
            device=chosen,
            device_name=device_name(chosen),
            budget_s=budget_s,
            max_bytes=size_bytes,
            processor_time=cpu_time,
            num_shapes=shapes,
            seed=seed,
            say=out.progress,
        )
        for part in result.parts:
            out.say(f"{part.name}: {part.num_records} records in {format_seconds(part.seconds)}")
            for reason, count in part.skipped.items():
                out.say(f"  not measured, {count}: {reason}")
        out.say(f"{result.num_records} records of {result.device} in {output}")
        if result.stopped_by:
            out.say(f"stopped by {result.stopped_by}")
        out.document({**dataclasses.asdict(result), "store": output})
    if result.stopped_by == "interrupted":
        raise typer.Exit(_INTERRUPTED)
