"""Capture of a deep module in the time of a shallow one.

Long runs of equal layers (``repeats``) are shortened to 4 and to 3 units, both are captured, and
the graph of 4 is written out for the whole depth (``expand``). The result is used only if all of
this holds:

1. The forward pass of the whole module, logged operator by operator (``forward_log``), is
   that of the module with 4 units written out: no layer does anything of its own, and
   nothing depends on the number of layers.
2. The same with 3 units.
3. The captured graph with 3 units is that with 4 written out for 3: the backward pass and all that
   export does grow with the depth as ``expand`` says.
4. Tensors written into the code are the same with 3 and 4 units, and so by (1) with all.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meshwright.capture.expand import NUM_KEPT, NotPeriodic, expand
from meshwright.capture.layout import Layout
from meshwright.capture.repeats import find_runs, shortened
from meshwright.graph.opgraph import GraphInput, InputRole, OpGraph, TensorSpec

__all__ = ["Captured", "capture_folded"]

Captured = tuple[OpGraph, Mapping[str, Tensor]]
"""A graph and its constants by name."""

_NUM_CHECKED = NUM_KEPT - 1
"""Units in the module that checks the expansion."""


def capture_folded(
    model: nn.Module, whole: Callable[[], Captured], log: Callable[[], OpGraph]
) -> Captured | None:
    """What ``whole`` returns, from calling it on a shortened ``model``; None where it cannot be.

    ``whole`` captures ``model`` as it is, ``log`` gives its ``forward_log``. Afterwards ``model``
    and the state of the random generators are as they were.
    """
    try:
        layout = find_runs(model)
        return _fold(model, layout, whole, log) if layout.runs else None
    except Exception:
        # A shortened module may fail in any way (an index out of range); the whole one decides.
        return None


def _fold(
    model: nn.Module, layout: Layout, whole: Callable[[], Captured], log: Callable[[], OpGraph]
) -> Captured:
    units = tuple(run.num_units for run in layout.runs)
    checked_units = (_NUM_CHECKED,) * len(units)
    with _same_random_numbers():
        whole_log = log()
    logs = {}
    for num_units in (NUM_KEPT, _NUM_CHECKED):
        with shortened(model, layout, num_units), _same_random_numbers():
            logs[num_units] = log()
    _require_expanded(logs[NUM_KEPT], layout, units, whole_log)
    _require_expanded(logs[NUM_KEPT], layout, checked_units, logs[_NUM_CHECKED])
    with shortened(model, layout, NUM_KEPT), _same_random_numbers():
        graph, constants = whole()
    with shortened(model, layout, _NUM_CHECKED), _same_random_numbers():
        checked, checked_constants = whole()
    _require_expanded(graph, layout, checked_units, checked)
    _require_equal_tensors(constants, checked_constants)
    inputs, specs = _inputs_of_whole(whole_log, graph)
    return expand(graph, layout, units, inputs, specs), constants


def _require_expanded(
    graph: OpGraph, layout: Layout, units: Sequence[int], expected: OpGraph
) -> None:
    """Raises NotPeriodic unless ``graph``, written out for ``units``, is ``expected``."""
    specs = [expected.values[item.value] for item in expected.inputs]
    written = expand(graph, layout, units, expected.inputs, specs)
    # Arguments that are equal may still be of different types (1 and True).
    if repr(written) != repr(expected):
        raise NotPeriodic("the module with another number of layers is another one")


def _require_equal_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    for name in {**left, **right}:
        one, two = left.get(name), right.get(name)
        if one is None or two is None or one.dtype != two.dtype or not torch.equal(one, two):
            raise NotPeriodic(f"{name} depends on the number of layers")


def _inputs_of_whole(log: OpGraph, short: OpGraph) -> tuple[list[GraphInput], list[TensorSpec]]:
    """Parameters and buffers of the whole module, then what else the short graph reads."""
    tensors = [*log.inputs_of(InputRole.PARAMETER), *log.inputs_of(InputRole.BUFFER)]
    specs = [log.values[item.value] for item in tensors]
    inputs = list(tensors)
    for item in short.inputs:
        if item.role not in (InputRole.PARAMETER, InputRole.BUFFER):
            specs.append(short.values[item.value])
            inputs.append(
                GraphInput(
                    value=len(inputs), name=item.name, role=item.role, tied_names=item.tied_names
                )
            )
    return inputs, specs


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Random choices in the block are made anew by whatever comes after it."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
