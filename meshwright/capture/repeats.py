"""Which children of a module repeat, and the module with fewer of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meshwright.capture.layout import Layout, ModuleRun

__all__ = ["find_runs", "shortened"]

_MIN_UNITS = 12
"""Shorter runs are captured as they are: to fold a longer one costs about ten units."""
_MAX_PERIOD = 6
_INDEX_NAME = re.compile(r"(^|_)(i|idx|index|id|number|num|no|depth|position)$")
"""Attributes that may differ between repetitions, such as ``layer_idx``."""


def find_runs(model: nn.Module) -> Layout:
    """The long runs of children that are built alike, outermost ones only.

    Alike are class, mode, plain attributes (but for those named like a position), and shapes,
    dtypes and ``requires_grad`` of parameters and buffers, all the way down. Children that share
    a tensor with anything else are in no run. Whether they also run alike is not known from this.
    """
    layout = Layout(runs=tuple(_runs_below(model, "", set())))
    shared = _shared_runs(model, layout)
    return Layout(runs=tuple(run for run in layout.runs if run not in shared))


@contextmanager
def shortened(model: nn.Module, layout: Layout, num_units: int) -> Iterator[None]:
    """``model`` with only the first ``num_units`` units of every run, for this block."""
    lists = {run.list_path: model.get_submodule(run.list_path) for run in layout.runs}
    before = {path: dict(holder._modules) for path, holder in lists.items()}
    try:
        for path, holder in lists.items():
            children = list(before[path].values())
            for run in reversed(layout.runs):
                if run.list_path == path:
                    first_dropped = run.first + num_units * run.period
                    del children[first_dropped : run.first + run.num_units * run.period]
            holder._modules.clear()
            holder._modules.update({str(number): child for number, child in enumerate(children)})
        yield
    finally:
        for path, holder in lists.items():
            holder._modules.clear()
            holder._modules.update(before[path])


def _runs_below(module: nn.Module, path: str, seen: set[int]) -> Iterator[ModuleRun]:
    if id(module) in seen:
        return
    seen.add(id(module))
    inside: set[int] = set()
    children = list(module._modules.items())
    if isinstance(module, nn.ModuleList | nn.Sequential) and [
        str(number) for number in range(len(children))
    ] == [name for name, _ in children]:
        keys = [_structure(child) for _, child in children]
        for first, period, num_units in _repetitions(keys):
            inside.update(range(first, first + period * num_units))
            yield ModuleRun(list_path=path, first=first, period=period, num_units=num_units)
    for position, (name, child) in enumerate(children):
        if child is not None and position not in inside:
            yield from _runs_below(child, f"{path}.{name}".lstrip("."), seen)


def _repetitions(keys: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """First position, period and number of units of every long repetition, from the left."""
    position = 0
    while position < len(keys):
        for period in range(1, _MAX_PERIOD + 1):
            stop = position + period
            while stop < len(keys) and keys[stop] == keys[stop - period]:
                stop += 1
            num_units = (stop - position) // period
            if num_units >= _MIN_UNITS:
                yield position, period, num_units
                position += num_units * period
                break
        else:
            position += 1


def _structure(module: nn.Module | None) -> Hashable:
    """How a child is built."""
    if module is None:
        return None
    return (
        type(module),
        module.training,
        tuple((name, _shape(tensor)) for name, tensor in module._parameters.items()),
        tuple((name, _shape(tensor)) for name, tensor in module._buffers.items()),
        tuple(
            (name, type(value), value)
            for name, value in vars(module).items()
            if not name.startswith("_")
            and isinstance(value, bool | int | float | str | torch.dtype | None)
            and not _INDEX_NAME.search(name)
        ),
        tuple((name, _structure(child)) for name, child in module._modules.items()),
    )


def _shape(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad


def _shared_runs(model: nn.Module, layout: Layout) -> set[ModuleRun]:
    """Runs with a tensor that has more than one name."""
    units = tuple(run.num_units for run in layout.runs)
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    num_names = Counter(id(tensor) for _, tensor in named)
    found = (layout.split(name, units) for name, tensor in named if num_names[id(tensor)] > 1)
    return {layout.runs[path.run] for path in found if path is not None}
