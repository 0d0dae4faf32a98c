"""Plans as files: one JSON document that a person can read, diff and edit.

``read_plan`` takes nothing on trust (``meshwright.strict_json``) and ends with
``checks.check_structure``, so whoever holds a plan that was read holds one that agrees with
itself. ``write_plan`` writes nothing that ``read_plan`` would refuse.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import msgspec

from meshwright.errors import BadPlanFile
from meshwright.plans import checks
from meshwright.plans.plan import SCHEMA_VERSION, ParallelPlan
from meshwright.strict_json import (
    convert,
    dump_json,
    load_json,
    one_line,
    read_source,
    write_text_atomically,
)

__all__ = ["plan_json_schema", "plan_sha256", "plan_text", "read_plan", "write_plan"]


def read_plan(path_or_text: str | os.PathLike[str]) -> ParallelPlan:
    """The plan in a file, or in the text itself (a ``str`` that starts with ``{``).

    Raises:
        BadPlanFile: the file cannot be read, is no strict JSON, does not follow the schema, or
            describes a plan that contradicts itself.
    """
    data, name = read_source(path_or_text, error=BadPlanFile, what="plan")
    value = load_json(data, error=BadPlanFile, name=name)
    if not isinstance(value, dict):
        raise BadPlanFile(f"{name}: $: a plan is a JSON object; make one with `meshwright plan`")
    if "schema_version" not in value:
        raise BadPlanFile(f"{name}: $.schema_version: the key is missing; add it")
    version = value["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BadPlanFile(
            f"{name}: $.schema_version: this Meshwright reads version {SCHEMA_VERSION}, got "
            f"{one_line(repr(version))[:40]}; make the plan again with `meshwright plan`"
        )
    plan = convert(value, ParallelPlan, error=BadPlanFile, name=name)
    try:
        checks.check_structure(plan)
    except BadPlanFile as exc:
        raise BadPlanFile(f"{name}: {exc}") from None
    return plan


def plan_text(plan: ParallelPlan) -> str:
    """``plan`` as the text of its file; equal plans give equal text.

    Raises:
        BadPlanFile: ``read_plan`` would refuse it.
    """
    text = dump_json(plan)
    read_plan(text)
    return text


def write_plan(plan: ParallelPlan, path: str | os.PathLike[str]) -> None:
    """Write ``plan`` to ``path``, whole or not at all.

    Raises:
        BadPlanFile: ``read_plan`` would refuse it.
        BadRequest: the file cannot be written.
    """
    write_text_atomically(plan_text(plan), path)


def plan_sha256(plan: ParallelPlan) -> str:
    """Hash of what the plan decides, in hexadecimal.

    Left out is what changes no execution: the prediction, the provenance, what the runtime cannot
    carry yet, the name the user gave the model (its graph is hashed) and the names of segments.
    """
    plain: dict[str, Any] = msgspec.to_builtins(plan)
    del plain["prediction"], plain["provenance"], plain["model"]["reference"], plain["unrunnable"]
    for segment in plain["segments"]:
        del segment["name"]
    return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()


def plan_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a plan file, for editors and other programs.

    It holds types, bounds and keys; ``checks`` holds what a schema cannot say.
    """
    schema = msgspec.json.schema(ParallelPlan)
    plan = schema["$defs"]["ParallelPlan"]
    plan["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    plan["required"] = ["schema_version", *plan["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Meshwright parallel plan, schema version {SCHEMA_VERSION}",
        **schema,
    }
