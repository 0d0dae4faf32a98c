"""Calibrations of devices as files: small JSON beside the weights, ``calibrations/DEVICE.json``.

A calibration belongs to the weights it was made with (by the SHA-256 of their model card): with
others it is left out, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from meshwright.cost.pricing import Pricing
from meshwright.errors import BadRequest, PlannerError
from meshwright.gnn_cost.calibrate import (
    MAX_OFFSET,
    CorrectedCollectives,
    CorrectedOperators,
    Offsets,
)
from meshwright.gnn_cost.document import Document
from meshwright.strict_json import FieldError, dump_json
from meshwright.tracking import DataSource, bytes_sha256

__all__ = [
    "CALIBRATIONS_NAME",
    "DeviceCalibration",
    "Found",
    "calibrated",
    "load_calibrations",
    "write_calibration_of_device",
]

CALIBRATIONS_NAME = "calibrations"
"""Folder beside the weights."""


class DeviceCalibration(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Offsets of one device, and where they come from."""

    what: ClassVar[str] = "calibration"

    device: str
    """By the catalog's name."""
    pricing_sha256: str
    """Of the model card of the weights; empty for the analytic prices."""
    offsets: dict[str, float]
    """Logarithms of factors, by name; see ``gnn_cost/calibrate.py``."""
    deviations: dict[str, float]
    noise: float
    num_samples: int
    error_before: float
    """Mean of |predicted / measured - 1| over the samples, without the offsets."""
    error_after: float
    """With them, on the very rows they were fitted to."""
    error_held_out: float | None = None
    """Of rows by offsets of the others, left out in turn; None for fewer than 4."""
    data: list[DataSource]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.offsets.items():
            if not abs(value) <= MAX_OFFSET:
                raise FieldError("offsets", f"holds {value} for {name!r}; at most {MAX_OFFSET:.3f}")

    def as_offsets(self) -> Offsets:
        """What corrects prices."""
        return Offsets(
            values=self.offsets,
            deviations=self.deviations,
            noise=self.noise,
            num_samples=self.num_samples,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Calibrations in a folder."""

    calibrations: tuple[DeviceCalibration, ...]
    problems: tuple[str, ...]
    """One line about each file that is left out."""


def write_calibration_of_device(calibration: DeviceCalibration, weights: Path) -> Path:
    """Write the file into the folder of the ``weights``; its path.

    Raises:
        BadRequest: it cannot be written.
    """
    folder = weights / CALIBRATIONS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{folder}: cannot make the folder: {error.strerror}") from error
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", calibration.device)
    path = folder / f"{safe.lstrip('.')}.json"
    calibration.write_to(path)
    return path


def load_calibrations(weights: Path, *, pricing_sha256: str) -> Found:
    """Calibrations in the folder of the ``weights`` that were made with them."""
    kept: list[DeviceCalibration] = []
    problems: list[str] = []
    for path in sorted((weights / CALIBRATIONS_NAME).glob("*.json")):
        try:
            one = DeviceCalibration.read(path)
        except PlannerError as error:
            problems.append(str(error))
            continue
        if one.pricing_sha256 == pricing_sha256:
            kept.append(one)
        else:
            problems.append(
                f"{path.name}: made with other weights; make it again with "
                f"`meshwright fit --calibrate`"
            )
    return Found(calibrations=tuple(kept), problems=tuple(problems))


def calibrated(pricing: Pricing, calibrations: tuple[DeviceCalibration, ...]) -> Pricing:
    """``pricing`` corrected for the devices of ``calibrations``; itself where there are none."""
    if not calibrations:
        return pricing
    offsets: Mapping[str, Offsets] = {one.device: one.as_offsets() for one in calibrations}
    text = pricing.sha256 + "".join(dump_json(one) for one in calibrations)
    return replace(
        pricing,
        sha256=bytes_sha256(text.encode("utf-8")),
        operators=pricing.operators and CorrectedOperators(pricing.operators, offsets),
        collectives=pricing.collectives and CorrectedCollectives(pricing.collectives, offsets),
    )
