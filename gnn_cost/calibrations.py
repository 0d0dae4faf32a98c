"""Calibrations of devices as files: small JSON beside the weights, ``calibrations/DEVICE.json``.

A calibration belongs to the weights it was made with (by the SHA-256 of their model card): with
others it is left out, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from meshwright.cost.pricing import Pricing
from meshwright.errors import BadRequest, PlannerError
from meshwright.gnn_cost.calibrate import (
    MAX_OFFSET,
    CorrectedCollectives,
    CorrectedOperators,
    Offsets,
)
from meshwright.strict_json import (
    FieldError,
    convert,
    dump_json,
    load_json,
    read_source,
    write_text_atomically,
)
from meshwright.tracking import DataSource, bytes_sha256

__all__ = [
    "CALIBRATIONS_NAME",
    "DeviceCalibration",
    "Found",
    "calibrated",
    "load_calibrations",
    "read_calibration_of_device",
    "write_calibration_of_device",
]

_SCHEMA_VERSION = 1
CALIBRATIONS_NAME = "calibrations"
"""Folder beside the weights."""


class DeviceCalibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Offsets of one device, and where they come from."""

    schema_version: int = _SCHEMA_VERSION
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
        if self.schema_version != _SCHEMA_VERSION:
            raise FieldError(
                "schema_version",
                f"is {self.schema_version}, this Meshwright reads {_SCHEMA_VERSION}",
            )
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
    write_text_atomically(dump_json(calibration), path)
    return path


def read_calibration_of_device(path: Path) -> DeviceCalibration:
    """The calibration in a file.

    Raises:
        BadRequest: it cannot be read, or is none.
    """
    data, name = read_source(path, error=BadRequest, what="calibration")
    value = load_json(data, error=BadRequest, name=name)
    return convert(value, DeviceCalibration, error=BadRequest, name=name)


def load_calibrations(weights: Path, *, pricing_sha256: str) -> Found:
    """Calibrations in the folder of the ``weights`` that were made with them."""
    kept: list[DeviceCalibration] = []
    problems: list[str] = []
    for path in sorted((weights / CALIBRATIONS_NAME).glob("*.json")):
        try:
            one = read_calibration_of_device(path)
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
