"""What the user has decided: pins that every plan must respect.

A pin is ``KEY=VALUE`` for the whole plan or ``MODULE:KEY=VALUE`` for the segments of some modules::

    tp=8                     size of a mesh axis: pp, dp, dp_replicate, dp_shard, cp, ep, tp
    no-pipeline              the same as pp=1
    microbatches=16          schedule=1f1b
    zero=3                   recompute=full            sequence-parallel=no
    compress-tp=int8         compress-pp=bf16          values along tp, and between stages
    layers.*.mlp:recompute=full        a pattern of module paths; * stands for anything
    layers.*.mlp:tp=inner              dimension classes an axis shards there; tp= for none
    layers.0-15:zero=3                 a range of numbers in a path
    segment.7:offload=yes              a segment by its number, counted from 0
    stage.0:host=2                     the first stage stays on that host, counted from 0

``dp`` is ``dp_replicate x dp_shard``. A module pin also matches everything inside the module
(``solvers.module_pins``). A pin that needs an axis asks for it: what is sharded along ``tp``,
``sequence-parallel=yes`` for ``tp`` of 2 or more, ``zero=1`` to ``3`` for ``dp_shard``, a schedule
or a stage's host for stages. Compression changes numbers, so nothing but a pin asks for it; what it
makes no faster is still sent as it is (``cost.compression``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from meshwright.cluster.model import Cluster
from meshwright.errors import BadRequest
from meshwright.plans.plan import (
    AXIS_NAMES,
    CommunicationOptions,
    Compression,
    ParallelPlan,
    Recompute,
    ScheduleName,
)
from meshwright.space.decision import Skeleton, Strategy

__all__ = ["NO_PINS", "ModulePin", "Pins", "parse_pins"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Kind = TypeVar("_Kind", bound=StrEnum)

_SIZES = ("pp", "dp", *AXIS_NAMES)
_ALIASES = {"no-pipeline": "pp=1", "no-tensor-parallel": "tp=1", "no-zero": "zero=0"}
_YES, _NO = frozenset({"yes", "true", "1", "on"}), frozenset({"no", "false", "0", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePin:
    """A decision for the segments of some modules."""

    text: str
    """As the user wrote it."""
    pattern: str
    zero_stage: int | None = None
    recompute: Recompute | None = None
    offload: bool | None = None
    labels: tuple[str, tuple[str, ...]] | None = None
    """An axis and what it shards."""

    def matches(self, name: str) -> bool:
        """Whether the module of this path, or one around it, is meant."""
        return any(
            _matches(self.pattern, ".".join(name.split(".")[:depth]))
            for depth in range(1, name.count(".") + 2)
        )

    @property
    def changes(self) -> dict[str, object]:
        """What it decides but for labels: fields of a ``Strategy`` and of a ``SegmentPlan``."""
        fields = ("zero_stage", "recompute", "offload")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @property
    def decides(self) -> dict[str, object]:
        """All it decides: ``changes``, and axes to labels."""
        return self.changes | (dict([self.labels]) if self.labels else {})

    @property
    def needs(self) -> str | None:
        """The mesh axis that must be 2 or more for the pin to say anything."""
        if self.labels is not None and self.labels[1]:
            return self.labels[0]
        return "dp_shard" if self.zero_stage else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """All pins of a search."""

    texts: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    num_microbatches: int | None = None
    schedule: ScheduleName | None = None
    zero_stage: int | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None
    tensor_compression: Compression = Compression.NONE
    pipeline_compression: Compression = Compression.NONE
    modules: tuple[ModulePin, ...] = ()
    hosts: tuple[tuple[int, int], ...] = ()
    """Stage and the host it stays on."""

    @property
    def needs(self) -> dict[str, str]:
        """Mesh axes, ``pp`` among them, that must be 2 or more, and a pin that says so."""
        found = {pin.needs: pin.text for pin in reversed(self.modules) if pin.needs}
        if self.zero_stage:
            found["dp_shard"] = f"zero={self.zero_stage}"
        if self.sequence_parallel:
            found["tp"] = "sequence-parallel=yes"
        if self.tensor_compression is not Compression.NONE:
            found["tp"] = f"compress-tp={self.tensor_compression}"
        if self.pipeline_compression is not Compression.NONE:
            found["pp"] = f"compress-pp={self.pipeline_compression}"
        if any(stage for stage, _ in self.hosts):
            found["pp"] = "the host of a later stage"
        if self.schedule is not None:
            found["pp"] = f"schedule={self.schedule}"
        return found

    @property
    def communication(self) -> CommunicationOptions:
        """How values travel."""
        return CommunicationOptions(
            tensor_parallel=self.tensor_compression, pipeline=self.pipeline_compression
        )

    def asks_for(self, axis: str) -> bool:
        """Whether the size of the axis is pinned, or must be 2 or more."""
        return axis in dict(self.sizes) or axis in self.needs

    @property
    def keeps_shards(self) -> bool:
        """Whether ``dp_shard`` and ``dp_replicate`` are told apart, so that some ZeRO is needed."""
        is_told = {"dp_shard", "dp_replicate"} & dict(self.sizes).keys()
        return bool(is_told) and not any(pin.zero_stage for pin in self.modules)

    def allows_sizes(self, sizes: Mapping[str, int], *, num_stages: int) -> bool:
        """Whether a mesh inside a stage, and the number of stages, are as pinned."""
        have = {
            **{axis: sizes.get(axis, 1) for axis in AXIS_NAMES},
            "pp": num_stages,
            "dp": sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        }
        if any(have[axis] == 1 for axis in self.needs):
            return False
        if any(stage >= num_stages for stage, _ in self.hosts):
            return False
        return all(have[axis] == size for axis, size in self.sizes)

    def allows_skeleton(self, skeleton: Skeleton) -> bool:
        """Whether plans on the skeleton can respect the pins, under some schedule."""
        if not self.allows_sizes(skeleton.sizes, num_stages=skeleton.num_stages):
            return False
        if self.schedule is ScheduleName.INTERLEAVED and (
            skeleton.num_microbatches % skeleton.num_stages
        ):
            return False
        return self.num_microbatches in (None, skeleton.num_microbatches)

    def allows_schedule(self, skeleton: Skeleton) -> bool:
        """Whether the skeleton's schedule is the one pinned."""
        return skeleton.num_stages == 1 or self.schedule in (None, skeleton.schedule)

    def allows_strategy(self, strategy: Strategy) -> bool:
        """Whether segments without a pin of their own may use the strategy."""
        return self.zero_stage in (None, strategy.zero_stage) and self.recompute in (
            None,
            strategy.recompute,
        )

    def allows_plan(self, plan: ParallelPlan) -> bool:
        """Whether the plan respects every pin but those of hosts and modules.

        Where pins of modules decide something else, all of its segments may differ in it:
        ``ModulePins.allows_plan`` knows which do.
        """
        mesh = plan.mesh
        sizes = dict(zip(AXIS_NAMES, mesh.stage_shape, strict=True))
        if not self.allows_sizes(sizes, num_stages=mesh.pp):
            return False
        if self.num_microbatches not in (None, plan.num_microbatches):
            return False
        if plan.communication != self.communication:
            return False
        if mesh.pp > 1 and self.schedule not in (None, plan.schedule):
            return False
        fixed = {key for pin in self.modules for key in pin.decides}
        for key, wanted in (("zero_stage", self.zero_stage), ("recompute", self.recompute)):
            if key not in fixed and any(
                wanted not in (None, getattr(segment, key)) for segment in plan.segments
            ):
                return False
        if self.sequence_parallel is None or "tp" in fixed:
            return True
        has = any("sequence" in segment.shard.get("tp", ()) for segment in plan.segments)
        return has == self.sequence_parallel

    def allows_hosts(self, plan: ParallelPlan, cluster: Cluster) -> bool:
        """Whether pinned stages lie on their hosts."""
        for number, host in self.hosts:
            if number >= len(plan.stages):
                return False
            devices = plan.stages[number].devices
            if {cluster.host_of(device) for device in devices} != {host}:
                return False
        return True

    def check(self, cluster: Cluster) -> None:
        """Refuse pins that contradict one another or that the cluster cannot meet.

        Raises:
            BadRequest: a host does not exist, sizes do not divide the devices, a pin needs an axis
                that another rules out, or devices cannot offload.
        """
        sizes = dict(self.sizes)
        product = 1
        for axis, size in self.sizes:
            if axis == "dp" or ("dp" not in sizes or not axis.startswith("dp_")):
                product *= size
        if self.sizes and cluster.num_devices % product:
            raise BadRequest(
                f"--fix: {' '.join(f'{a}={s}' for a, s in self.sizes)} needs a multiple of "
                f"{product} devices but {cluster.name} has {cluster.num_devices}; pin other sizes"
            )
        for axis, text in self.needs.items():
            for name in (axis, "dp") if axis == "dp_shard" else (axis,):
                if sizes.get(name) == 1:
                    raise BadRequest(
                        f"--fix {text}: needs {axis} of 2 or more, but {name}=1 is pinned; keep "
                        "one of them"
                    )
        if self.zero_stage == 0 and sizes.get("dp_shard", 1) > 1 and self.keeps_shards:
            raise BadRequest(
                f"--fix dp_shard={sizes['dp_shard']}: shards nothing under zero=0; pin dp instead"
            )
        for stage, host in self.hosts:
            if host >= len(cluster.hosts):
                raise BadRequest(
                    f"--fix stage.{stage}:host={host}: {cluster.name} has hosts 0 to "
                    f"{len(cluster.hosts) - 1}"
                )
        if any(host.device.to_host_bytes_per_s <= 0 for host in cluster.hosts):
            for pin in self.modules:
                if pin.offload:
                    raise BadRequest(
                        f"--fix {pin.text}: devices of {cluster.name} have no way to their host's "
                        "memory that we know of; describe it in the cluster's file"
                    )


NO_PINS = Pins()


def parse_pins(texts: Sequence[str]) -> Pins:
    """Read what the user wrote after ``--fix``; see the module docstring.

    Raises:
        BadRequest: a pin cannot be read, or two pins disagree.
    """
    fields: dict[str, object] = {}
    sizes: dict[str, int] = {}
    modules: list[ModulePin] = []
    hosts: dict[int, int] = {}
    for text in texts:
        scope, _, rest = _ALIASES.get(text, text).strip().rpartition(":")
        key, equals, value = rest.partition("=")
        if not equals:
            raise BadRequest(f"--fix {text}: write KEY=VALUE, such as tp=8 or layers.*:zero=3")
        key = key.strip().replace("_", "-") if key.strip() not in _SIZES else key.strip()
        if re.fullmatch(r"stage\.\d+", scope):
            _set(hosts, int(scope.split(".")[1]), _host(text, key, value), text)
        elif scope:
            modules.append(_module_pin(text, scope, key, value.strip()))
        elif key in _SIZES:
            _set(sizes, key, _number(text, value, at_least=1), text)
        else:
            name, read = _field(text, key)
            _set(fields, name, read(value.strip()), text)
    return Pins(
        texts=tuple(texts),
        sizes=tuple(sizes.items()),
        modules=tuple(modules),
        hosts=tuple(hosts.items()),
        **fields,  # type: ignore[arg-type]
    )


def _set(found: dict[_Key, _Value], key: _Key, value: _Value, text: str) -> None:
    if key in found and found[key] != value:
        raise BadRequest(f"--fix {text}: {key} is pinned to {found[key]} too; keep one of them")
    found[key] = value


def _field(text: str, key: str) -> tuple[str, Callable[[str], object]]:
    fields: dict[str, tuple[str, Callable[[str], object]]] = {
        "microbatches": ("num_microbatches", lambda v: _number(text, v, at_least=1)),
        "schedule": ("schedule", lambda v: _member(text, v, ScheduleName)),
        "zero": ("zero_stage", lambda v: _number(text, v, at_least=0, at_most=3)),
        "recompute": ("recompute", lambda v: _member(text, v, Recompute)),
        "sequence-parallel": ("sequence_parallel", lambda v: _flag(text, v)),
        "compress-tp": ("tensor_compression", lambda v: _member(text, v, Compression)),
        "compress-pp": ("pipeline_compression", lambda v: _member(text, v, Compression)),
    }
    if key not in fields:
        known = ", ".join([*_SIZES, *fields])
        raise BadRequest(f"--fix {text}: cannot pin {key!r}; pin one of {known}")
    return fields[key]


def _module_pin(text: str, pattern: str, key: str, value: str) -> ModulePin:
    if key in AXIS_NAMES:
        labels = tuple(label.strip() for label in value.split(",") if label.strip())
        return ModulePin(text=text, pattern=pattern, labels=(key, labels))
    if key == "zero":
        stage = _number(text, value, at_least=0, at_most=3)
        return ModulePin(text=text, pattern=pattern, zero_stage=stage)
    if key == "recompute":
        chosen = _member(text, value, Recompute)
        return ModulePin(text=text, pattern=pattern, recompute=chosen)
    if key == "offload":
        return ModulePin(text=text, pattern=pattern, offload=_flag(text, value))
    known = ", ".join([*AXIS_NAMES, "zero", "recompute", "offload"])
    raise BadRequest(f"--fix {text}: cannot pin {key!r} for a module; pin one of {known}")


def _host(text: str, key: str, value: str) -> int:
    if key != "host":
        raise BadRequest(f"--fix {text}: a stage can be pinned to a host only: stage.0:host=1")
    return _number(text, value, at_least=0)


def _number(text: str, value: str, *, at_least: int, at_most: int | None = None) -> int:
    digits = value.strip()
    number = int(digits) if re.fullmatch(r"\d{1,9}", digits) else -1
    if number < at_least or (at_most is not None and number > at_most):
        bounds = f"from {at_least} to {at_most}" if at_most is not None else f"from {at_least} on"
        raise BadRequest(f"--fix {text}: {value!r} is no whole number {bounds}")
    return number


def _member(text: str, value: str, kinds: type[_Kind]) -> _Kind:
    try:
        return kinds(value.lower())
    except ValueError as error:
        known = ", ".join(kind.value for kind in kinds)
        raise BadRequest(f"--fix {text}: {value!r} is not one of {known}") from error


def _flag(text: str, value: str) -> bool:
    if value.lower() not in _YES | _NO:
        raise BadRequest(f"--fix {text}: {value!r} is neither yes nor no")
    return value.lower() in _YES


def _matches(pattern: str, path: str) -> bool:
    """Whether a module path fits a pattern of names, ``*`` and ranges of numbers."""
    wanted, parts = pattern.split("."), path.split(".")
    if len(wanted) != len(parts):
        return fnmatch.fnmatchcase(path, pattern)
    for want, part in zip(wanted, parts, strict=True):
        span = re.fullmatch(r"(\d+)-(\d+)", want)
        if span and part.isdecimal():
            if not int(span[1]) <= int(part) <= int(span[2]):
                return False
        elif not fnmatch.fnmatchcase(part, want):
            return False
    return True
