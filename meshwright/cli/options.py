"""Options that several verbs share, and what they are read as."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from meshwright.errors import BadRequest
from meshwright.plans import JobSpec, OptimizerName, OptimizerSpec, Precision
from meshwright.strict_json import FieldError

__all__ = [
    "CompareOption",
    "CostModelOption",
    "FixOption",
    "JsonOption",
    "PlanArgument",
    "PlannerOption",
    "PlotOption",
    "RuleOption",
    "job_of",
    "parse_duration_s",
    "parse_level",
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, the rest on stderr.")
]
FixOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Decide something yourself: tp=8, no-pipeline, layers.*.mlp:zero=3; repeatable.",
        metavar="PIN",
    ),
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        help="Ask one rule of thumb only: data-parallel, zero3, megatron or naive-layers.",
        metavar="NAME",
    ),
]
CostModelOption = Annotated[
    str | None,
    typer.Option(
        help="Price with this: analytic, learned (the package's, usual for accelerators) or the "
        "folder of a fit.",
        metavar="NAME|DIR",
    ),
]
PlannerOption = Annotated[
    str | None,
    typer.Option(
        help="Ask this learned planner too: none (usual at -O1), pretrained (the package's, usual "
        "at -O2), the folder of a training, or its weights.",
        metavar="NAME|DIR|FILE",
    ),
]
PlanArgument = Annotated[
    str, typer.Argument(metavar="PLAN", help="A plan file, made by `meshwright plan`.")
]

_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|sec|m|min|h|)")
_SECONDS = {"ms": 1e-3, "": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_LEVELS = ("O1", "O2")
_LARGEST_BATCH = 2**24
"""Samples; the numbers of elements of all tensors must fit 64 bits."""


def job_of(
    *,
    global_batch: int,
    seq_len: int | None,
    precision: Precision,
    optimizer: OptimizerName,
) -> JobSpec:
    """The job the options describe.

    Raises:
        BadRequest: a number is out of its range.
    """
    if global_batch > _LARGEST_BATCH:
        raise BadRequest(f"--global-batch: {global_batch} is above {_LARGEST_BATCH}; give less")
    try:
        return JobSpec(
            global_batch=global_batch,
            seq_len=seq_len,
            precision=precision,
            optimizer=OptimizerSpec(name=optimizer),
        )
    except FieldError as error:
        option = f"--{error.key.replace('_', '-')}"
        raise BadRequest(f"{option}: {error.problem}; give a positive number") from error


def parse_duration_s(text: str) -> float:
    """Seconds of ``"10s"``, ``"500ms"``, ``"2min"``; a plain number is seconds.

    Raises:
        BadRequest: no duration, or not above zero.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise BadRequest(f"--budget: {text!r} is no time above zero; write it like 10s or 2min")
    return seconds


def parse_level(text: str) -> str:
    """``"O1"`` or ``"O2"``, from what follows ``-O``.

    Raises:
        BadRequest: there is no such level.
    """
    level = f"O{text.strip().upper().removeprefix('O')}"
    if level not in _LEVELS:
        raise BadRequest(f"-O: no level {text!r}; use -O1 (quick) or -O2 (search everything)")
    return level


PlotOption = Annotated[
    str | None,
    typer.Option(metavar="FILE.svg", help="Write predicted against measured to this file."),
]
CompareOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Judge these too, between commas; none for none. Without it: analytic.",
    ),
]
