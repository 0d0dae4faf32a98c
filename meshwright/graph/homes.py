"""Which modules a segment's work and parameters belong to.

A segment is cut where few tensors cross, not where a module ends: the attention half of a layer
holds a norm and an addition beside ``layers.0.attention``. Work is flop, or bytes moved where there
are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.graph.opgraph import InputRole, Op, OpGraph

__all__ = ["SegmentHome", "home_path", "segment_homes"]

_NEARLY_ALL = 0.9
"""Of the work: what a segment is named after."""

_MOST = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHome:
    """The modules of one segment, each with its share; paths as in ``Op.module_path``."""

    work: Mapping[str, float]
    """Sums to 1, or empty."""
    parameters: Mapping[str, float]
    """Of the elements of parameters that the segment reads first; sums to 1, or empty."""

    def is_mostly(self, paths: set[str]) -> bool:
        """Whether at least half of the work or of the parameters lies directly in ``paths``."""
        return any(
            bool(shares) and sum(shares.get(path, 0.0) for path in paths) >= _MOST - 1e-9
            for shares in (self.work, self.parameters)
        )


def home_path(ops: Iterable[Op]) -> str:
    """The deepest module path that all of ``ops`` but a tenth of their work lie under.

    It extends what their paths have in common; those at the root of the model say nothing.
    """
    work = _work(ops)
    path = _common_path([module for module in work if module])
    total = sum(work.values())
    while total:
        depth = path.count(".") + 2 if path else 1
        below: Counter[str] = Counter()
        for module, amount in work.items():
            parts = module.split(".") if module else []
            if len(parts) >= depth and (not path or module.startswith(f"{path}.")):
                below[".".join(parts[:depth])] += amount
        if not below or below.most_common(1)[0][1] < _NEARLY_ALL * total:
            break
        path = below.most_common(1)[0][0]
    return path


def segment_homes(
    graph: OpGraph, forward_ops: Iterable[tuple[int, ...]]
) -> tuple[SegmentHome, ...]:
    """One for each segment, from its forward operators."""
    size = {
        item.value: (item.name.rpartition(".")[0], graph.values[item.value].num_elements)
        for item in graph.inputs_of(InputRole.PARAMETER)
    }
    found = []
    for numbers in forward_ops:
        ops = [graph.ops[number] for number in numbers]
        parameters: Counter[str] = Counter()
        for value in dict.fromkeys(value for op in ops for value in op.inputs):
            if value in size:
                module, amount = size.pop(value)
                parameters[module] += amount
        found.append(SegmentHome(work=_shares(_work(ops)), parameters=_shares(parameters)))
    return tuple(found)


def _work(ops: Iterable[Op]) -> Counter[str]:
    flop: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for op in ops:
        flop[op.module_path] += op.flop
        moved[op.module_path] += op.bytes_read + op.bytes_written
    return flop if any(flop.values()) else moved


def _shares(amounts: Mapping[str, int]) -> dict[str, float]:
    total = sum(amounts.values())
    return {path: amount / total for path, amount in amounts.items()} if total else {}


def _common_path(paths: list[str]) -> str:
    parts = [path.split(".") for path in paths]
    if not parts:
        return ""
    common = parts[0]
    for path in parts[1:]:
        length = 0
        while length < min(len(common), len(path)) and common[length] == path[length]:
            length += 1
        common = common[:length]
    return ".".join(common)
