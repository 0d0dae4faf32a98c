"""What was measured, and by what: Timing, Record, and the machine and software it ran on."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from meshwright.records.kinds import KINDS, Kind, KindKeys
from meshwright.strict_json import FieldError, check_schema_version

__all__ = [
    "RECORD_SCHEMA_VERSION",
    "Machine",
    "Record",
    "Scalar",
    "Software",
    "Timing",
    "describe_machine",
    "describe_software",
    "timing_of",
    "utc_now",
]

RECORD_SCHEMA_VERSION = 2

Scalar = str | int | float | bool | None

_KEYS: dict[str, KindKeys] = {str(kind): keys for kind, keys in KINDS.items()}
_PACKAGES = ("meshwright", "torch", "numpy", "transformers")


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one thing repeated; never a single time without its spread."""

    median_s: float
    p10_s: float
    p90_s: float
    num_repeats: int
    times_s: tuple[float, ...]
    """Every repeat, in the order they ran."""

    def __post_init__(self) -> None:
        if self.num_repeats != len(self.times_s) or self.num_repeats < 1:
            raise FieldError("num_repeats", f"is {self.num_repeats} for {len(self.times_s)} times")
        if not all(math.isfinite(time_s) and time_s >= 0 for time_s in self.times_s):
            raise FieldError("times_s", "holds a time that is negative or not finite")


def timing_of(times_s: Sequence[float]) -> Timing:
    """Timing of repeats that took ``times_s``, at least one.

    Percentiles are interpolated linearly between the two nearest ranks, as numpy does.
    """
    ordered = sorted(times_s)
    return Timing(
        median_s=_quantile(ordered, 0.5),
        p10_s=_quantile(ordered, 0.1),
        p90_s=_quantile(ordered, 0.9),
        num_repeats=len(ordered),
        times_s=tuple(times_s),
    )


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    assert ordered, "a timing needs at least one repeat"
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host a measurement ran on; holds nothing that names its owner."""

    processor: str
    num_cores: int
    """That this process may use."""
    memory_bytes: int
    """0 where the system does not say."""
    accelerators: tuple[str, ...]
    """Model names, one for each accelerator the driver lists."""
    system: str
    """Operating system and architecture, ``"Linux x86_64"``."""
    driver: str = ""
    """Of the accelerators, with its version; empty where there is none or it is not known."""
    clocks_hz: dict[str, float] = {}
    """By clock (``"cpu_max"``, ``"sm_max"``, ``"memory_max"``), where the system says."""


class Software(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ran."""

    python: str
    packages: dict[str, str]
    """Version by distribution; those that are not installed are absent."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement with its machine, software, method, n and spread."""

    schema_version: int = RECORD_SCHEMA_VERSION
    kind: str
    """What sort of thing was measured; ``meshwright.records.kinds`` lists them, with their keys."""
    name: str
    """Which one: ``linear``, ``all_reduce``, a model..."""
    device: str
    """What it ran on, by the catalog's name (``h100-sxm-80gb``, ``cpu``); as its source names it
    where the catalog does not know it."""
    writer: str
    """Who wrote it: ``"meshwright 0.1.0 profile ops"``, ``"meshwright 0.1.0 traces import"``."""
    source: str = ""
    """Where an imported figure stood: file name and sha256; empty where it was measured here."""
    machine: Machine
    software: Software
    method: str
    """How, in words: ``"perf_counter around the step, barrier before and after"``."""
    num_repeats: Annotated[int, Meta(ge=1)]
    median: float
    p10: float
    p90: float
    unit: str
    """Of the three values: ``s``, ``bytes``..."""
    samples: tuple[float, ...] = ()
    """Every repeat in the order they ran, outliers too, where they were kept."""
    measured_utc: str
    """ISO 8601, UTC; empty where an imported figure does not say."""
    extra: dict[str, Scalar] = {}
    """What identifies the measurement: shapes, dtype, degrees... by the keys of its kind."""

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version, RECORD_SCHEMA_VERSION)
        if not (math.isfinite(self.median) and self.p10 <= self.median <= self.p90):
            raise FieldError("median", f"{self.median} is not between {self.p10} and {self.p90}")
        if not (math.isfinite(self.p10) and math.isfinite(self.p90)):
            raise FieldError("p90", f"and p10 must be finite, got {self.p10} and {self.p90}")
        if self.num_repeats < 1:
            raise FieldError("num_repeats", f"is {self.num_repeats}; a measurement has at least 1")
        if self.samples:
            self._check_samples()
        self._check_kind()

    def _check_samples(self) -> None:
        if not all(map(math.isfinite, self.samples)):
            raise FieldError("samples", "holds a value that is not finite")
        if len(self.samples) != self.num_repeats:
            raise FieldError("samples", f"holds {len(self.samples)} of {self.num_repeats} repeats")

    def _check_kind(self) -> None:
        """That the unit and the keys of ``extra`` are those of the kind."""
        keys = _KEYS.get(self.kind)
        if keys is None:
            raise FieldError("kind", f"is {self.kind!r}; known: {', '.join(Kind)}")
        if self.unit not in keys.units:
            raise FieldError(
                "unit", f"is {self.unit!r}; {self.kind} is measured in {' or '.join(keys.units)}"
            )
        for key, value in self.extra.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FieldError("extra", f"holds {value} for {key!r}; leave out what is not known")
            if not keys.allows(key):
                raise FieldError("extra", f"holds {key!r}, which is no key of {self.kind}")
        for key in keys.required:
            if self.extra.get(key) is None:
                raise FieldError("extra", f"lacks {key!r}, which every {self.kind} needs")
        self._check_words(keys)

    def _check_words(self, keys: KindKeys) -> None:
        """That the name and ``extra`` use the words of the kind, for one query to find all."""
        if keys.names and self.name not in keys.names:
            raise FieldError("name", f"is {self.name!r}; known: {', '.join(keys.names)}")
        for key, known in keys.values.items():
            value = self.extra.get(key)
            if value is not None and value not in known:
                raise FieldError("extra", f"holds {key} {value!r}; known: {', '.join(known)}")
        if self.kind == Kind.COLLECTIVE:
            size, least = self.extra["group_size"], 1 if self.name == "send_recv" else 2
            if not isinstance(size, int) or size < least:
                raise FieldError(
                    "extra", f"holds group_size {size!r}; {self.name} needs {least} or more ranks"
                )


def describe_machine() -> Machine:
    """This host, from the standard library and the kernel; needs no torch."""
    return Machine(
        processor=_processor(),
        num_cores=_num_cores(),
        memory_bytes=_memory_bytes(),
        accelerators=_accelerators(),
        system=f"{platform.system()} {platform.machine()}",
        driver=_driver(),
        clocks_hz=_clocks_hz(),
    )


def describe_software() -> Software:
    """Python and the packages results depend on, from their metadata; imports none of them."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Software(python=platform.python_version(), packages=packages)


def utc_now() -> str:
    """Now, as ISO 8601 in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _accelerators() -> tuple[str, ...]:
    """Models the NVIDIA driver lists; other vendors' are filled in by who measured on them."""
    names: list[str] = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        names += [
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model")
        ]
    return tuple(names)


def _driver() -> str:
    """``"nvidia 580.82.07"``, from the kernel module's own words."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    version = re.search(r"Kernel Module\D*?(\d+(?:\.\d+)+)", text)
    return f"nvidia {version[1]}" if version else ""


def _clocks_hz() -> dict[str, float]:
    """Highest clock the kernel allows the first core; others are added by who can read them."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    try:
        return {"cpu_max": int(path.read_text(encoding="ascii")) * 1e3}
    except (OSError, ValueError):
        return {}
