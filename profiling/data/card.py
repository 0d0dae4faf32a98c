"""The data card: how the packaged measurements were made, on what, when, with what spread."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from meshwright.records import Kind, Record
from meshwright.records.kinds import KINDS
from meshwright.units import format_bytes, format_seconds

__all__ = ["card"]

_HEAD = """\
# Measurements that come with Meshwright

Records of `meshwright profile campaign`, as Parquet files of the record store (`docs/records.md`);
`meshwright.profiling.data.packaged_records()` reads them. This card is written from them by
`python -m meshwright.profiling.data`, and a test compares the two.

## How they were measured

One command on one device of one machine, shared out over its budget: the device's own figures, then
operators that are published nowhere in training (attention, normalization, softmax, embedding,
grouped matrix products, optimizers; forward and backward), then steps and segments of models, then
operators at the exact sizes of models cut by tensor parallelism (`model` and `tp` in `extra`), then
other operators. Sizes otherwise are drawn log-uniformly where models live, from a seed; the sweep
measures next what is farthest from what it has. Each figure is warmed up and repeated until the
95 % confidence interval of the median is within 2 % of it, or its share of the budget is spent;
every repeat is kept, outliers too (`samples`). `method` says it for each Record; `extra.clock` is
`process_time` where the processor's time of one thread was counted instead of the wall's, because
others used the machine.
"""

_COLUMNS = """\
## What a Record holds

`kind`, `name`, `device`, `unit`, `median`, `p10`, `p90`, `num_repeats`, `samples`, `method`,
`measured_utc`, `writer`, `machine`, `software`, and in `extra`, here:
"""

_WEAK = """\
## Weak points

- One machine of each device: nothing tells how much another of the same model differs.
- Caches are warm: every repeat works on the same tensors, as in a loop and unlike in a step.
- Sizes are sparse; where the budget ended, families have fewer of them than others.
- Backward passes run by `torch.autograd.grad` over a kept graph; in a training step gradients are
  added up and memory is freed meanwhile, which steps of models show and operators do not.
"""

_ON_CPU = """\
- CPU Records are of one thread. Where `clock` is `process_time` the machine was busy with other
  work: time in which others held the core is left out, but caches and memory were shared with them,
  so figures bound by cache or memory are pessimistic by an unknown amount. The machine's own
  figures (kind `machine`) are of the wall's time all the same, and the most pessimistic.
"""

_NO_GPU = """\
- No GPU was at hand. The same command measures one in 9 minutes and 64 MB:
  `meshwright profile campaign --budget 9min --max-bytes 64m -o records`, then
  `python -m meshwright.profiling.data records`.
"""


def card(records: Sequence[Record]) -> str:
    """The card of ``records`` as Markdown."""
    parts = [_HEAD, "## On what, and when\n", *_machines(records), "## What there is\n"]
    parts += [*_contents(records), _COLUMNS, *_keys(records), "", _WEAK.rstrip("\n")]
    devices = {record.device for record in records}
    if "cpu" in devices:
        parts.append(_ON_CPU.rstrip("\n"))
    if devices <= {"cpu"}:
        parts.append(_NO_GPU.rstrip("\n"))
    return "\n".join(parts) + "\n"


def _machines(records: Iterable[Record]) -> Iterable[str]:
    by_machine: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        machine, packages = record.machine, record.software.packages
        key = (
            record.device,
            machine.processor,
            f"{machine.num_cores} cores, {format_bytes(machine.memory_bytes)}",
            ", ".join((*machine.accelerators, machine.driver)) if machine.accelerators else "none",
            f"{machine.system}, Python {record.software.python}, torch {packages.get('torch')}",
        )
        by_machine[key].append(record)
    for (device, processor, size, accelerators, software), members in by_machine.items():
        days = sorted(record.measured_utc for record in members)
        clocks = sorted({str(record.extra.get("clock") or "wall") for record in members})
        yield f"- `{device}`: {processor}, {size}; accelerators: {accelerators}; {software};"
        yield f"  {len(members)} Records from {days[0]} to {days[-1]}; clock: {', '.join(clocks)}"
    yield ""


def _contents(records: Iterable[Record]) -> Iterable[str]:
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.device, record.kind, record.name].append(record)
    yield "| device | kind | name | Records | dtypes, directions | medians | n | spread |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for (device, kind, name), members in sorted(groups.items()):
        words = sorted(
            {
                str(record.extra[key])
                for record in members
                for key in ("dtype", "precision", "direction")
                if key in record.extra
            }
        )
        repeats = statistics.median(record.num_repeats for record in members)
        spreads = [
            (record.p90 - record.p10) / record.median for record in members if record.median > 0
        ]
        spread = f"{statistics.median(spreads):.1%}" if spreads else "-"
        yield (
            f"| {device} | {kind} | {name} | {len(members)} | {', '.join(words)} | "
            f"{_span(members)} | {repeats:g} | {spread} |"
        )
    yield ""
    yield "n: median number of repeats. Spread: median of (p90 - p10) / median."
    yield ""


def _span(members: Sequence[Record]) -> str:
    values = sorted(record.median for record in members)
    units = {record.unit for record in members}
    if units == {"s"}:
        ends = [format_seconds(values[0]), format_seconds(values[-1])]
    elif units == {"bytes"}:
        ends = [format_bytes(values[0]), format_bytes(values[-1])]
    else:
        ends = [f"{value:.3g} {' or '.join(sorted(units))}" for value in (values[0], values[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _keys(records: Iterable[Record]) -> Iterable[str]:
    used: dict[str, set[str]] = defaultdict(set)
    for record in records:
        used[record.kind] |= record.extra.keys()
    for kind in Kind:
        if kind in used:
            yield f"- {kind} ({KINDS[kind].says}): {', '.join(sorted(used[kind]))}"
