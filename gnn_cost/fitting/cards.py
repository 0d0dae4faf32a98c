"""Cards: what weights were fitted on, how they do on what was held out, how to make them again.

Each part of a model is ``NAME.safetensors`` with its own card ``NAME.json`` (``weights.py``), and
``card.json`` sums up all of them. Cards hold no date and no path: an equal fit gives equal cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from meshwright.gnn_cost.fitting.parts import FitData, FitSettings, PartResult, SplitError
from meshwright.records import Software, describe_software
from meshwright.strict_json import JsonValue
from meshwright.tracking import DataSource

__all__ = ["MODEL_CARD_VERSION", "ModelCard", "PartSummary", "model_card", "part_card"]

MODEL_CARD_VERSION = 1


class PartSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of the model."""

    files: dict[str, str]
    """SHA-256 by file name."""
    num_parameters: int
    is_cut: bool
    """The budget ended its training."""
    figures: dict[str, Any]
    splits: list[SplitError]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``card.json`` holds."""

    schema_version: int = MODEL_CARD_VERSION
    name: str = "meshwright cost model"
    settings: FitSettings
    data: list[DataSource]
    licenses: dict[str, str]
    """By ``source`` of the rows; what was not told is absent."""
    parts: dict[str, PartSummary]
    skipped: dict[str, str]
    """Parts that were not trained, and why."""
    software: Software
    reproduce: str
    """The command line; on one machine equal data give bit-equal weights, unless a part is cut."""


def part_card(
    result: PartResult, *, data: FitData, settings: FitSettings, reproduce: str
) -> dict[str, JsonValue]:
    """The card of one part, for ``save_weights``: what its predictions need stands on top."""
    told: dict[str, Any] = {
        "fit": msgspec.to_builtins(settings),
        "data": [msgspec.to_builtins(source) for source in data.sources],
        "licenses": dict(data.licenses),
        "splits": [msgspec.to_builtins(item) for item in result.splits],
        "figures": dict(result.figures),
        "is_cut": result.is_cut,
        "num_parameters": result.num_parameters,
        "software": msgspec.to_builtins(describe_software()),
        "reproduce": reproduce,
    }
    return {**told, **result.settings}


def model_card(
    parts: Mapping[str, PartResult],
    *,
    files: Mapping[str, Mapping[str, str]],
    skipped: Mapping[str, str],
    data: FitData,
    settings: FitSettings,
    reproduce: str,
) -> ModelCard:
    """The card of the whole model.

    Args:
        parts: by name.
        files: of each part, SHA-256 by file name.
        skipped: parts that were not trained, and why.
        data: what they learned from.
        settings: how.
        reproduce: the command line.
    """
    return ModelCard(
        settings=settings,
        data=list(data.sources),
        licenses=dict(data.licenses),
        parts={
            name: PartSummary(
                files=dict(files[name]),
                num_parameters=part.num_parameters,
                is_cut=part.is_cut,
                figures=dict(part.figures),
                splits=list(part.splits),
            )
            for name, part in parts.items()
        },
        skipped=dict(skipped),
        software=describe_software(),
        reproduce=reproduce,
    )
