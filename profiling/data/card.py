"""The data card: how the packaged measurements were made, on what, when, with what spread."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
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

On one device of one machine, a budget is shared out: the device's own figures; operators that are
published nowhere in training (attention, normalization, softmax, embedding, grouped products,
optimizers; forward and backward); steps and segments of models; operators at the exact sizes of
models, cut by tensor parallelism or whole (`model` and `tp` in `extra`); other operators. What came
of each is counted below. Other sizes are drawn log-uniformly where models live, from a seed; the
sweep measures next what is farthest from what it has. Each figure is warmed up and repeated until
the 95 % confidence interval of the median is within 2 % of it, or its share of the budget is spent,
so `num_repeats` differs; every repeat is kept, outliers too (`samples`). `method` says it for each
Record; `extra.clock` is `process_time` where the processor's time of one thread was counted instead
of the wall's.
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
- Where `clock` is `process_time` others used the machine: time in which they held the core is left
  out, but caches and memory were shared with them, so figures bound by cache or memory are
  pessimistic by an unknown amount. The machine's own figures (kind `machine`) are of the wall's
  time all the same, measured by themselves afterwards, four times; the run kept is the one
  least disturbed by other processes, chosen after looking, and its `method` ends with the load. One
  thread gave 64 to 87 GFLOP/s in fp32 over the four. All-core figures above 1 MB are left out.
"""

_NO_GPU = """\
- No GPU was at hand. The same command measures one in 9 minutes and 64 MB:
  `meshwright profile campaign --budget 9min --max-bytes 64m -o records`, then
  `python -m meshwright.profiling.data records`.
"""


def card(records: Sequence[Record]) -> str:
    """The card of ``records`` as Markdown."""
    parts = [_HEAD, "## On what, and when\n", *_machines(records), "## What there is\n"]
    parts += [
        *_contents(records),
        *_counts(records),
        _COLUMNS,
        *_keys(records),
        "",
        _WEAK.rstrip("\n"),
    ]
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


def _counts(records: Sequence[Record]) -> Iterable[str]:
    """What a reader would otherwise have to count."""
    operators = [record for record in records if record.kind == Kind.OPERATOR]
    degrees = Counter(record.extra["tp"] for record in operators if record.extra.get("tp"))
    yield "- operators at the sizes of a model by tensor-parallel degree: " + (
        ", ".join(f"{degrees[tp]} of {tp}" for tp in sorted(degrees, key=str)) or "none"
    )
    for kind in (Kind.MACHINE, Kind.OPERATOR, Kind.STEP_TIME):
        threads = Counter(
            record.extra["num_threads"]
            for record in records
            if record.kind == kind and record.extra.get("num_threads")
        )
        if threads:
            each = ", ".join(f"{threads[count]} of {count}" for count in sorted(threads, key=str))
            yield f"- Records of kind {kind} by number of threads: {each}"
    for kind in (Kind.OPERATOR, Kind.SEGMENT_TIME, Kind.STEP_TIME):
        members = [record for record in records if record.kind == kind]
        if members:
            few = sum(record.num_repeats < 3 for record in members)
            least = min(record.num_repeats for record in members)
            yield f"- {kind}: {few} of {len(members)} with fewer than 3 repeats; least {least}"
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
