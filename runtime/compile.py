"""A ``Function`` of a program as code that a rank runs: ATen calls and functional collectives.

The code is an fx graph with the boxed calling convention: it takes its inputs in one list, empties
the list, and drops every value after its last use, so that saved activations die while the
backward runs. A collective starts where the program has it and is awaited just before its first
use, or at the end where the result only leaves the function.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import Literal, Ref, TensorSpec
from meshwright.runtime import adapter
from meshwright.runtime.kernels import resolve_target
from meshwright.runtime.mesh import Axes, Coordinate, Group
from meshwright.spmd.program import (
    Collective,
    CollectiveKind,
    Compute,
    CoordinateInt,
    Function,
    LocalArg,
)

__all__ = ["CompiledFunction", "compile_function", "concrete", "returns_one_tensor"]

_KERNELS_WITH_SEVERAL_RESULTS = frozenset(
    {"meshwright.unpack", "meshwright.unpack_gathered", "meshwright.nll_forward_shard"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFunction:
    """Code of one function for one rank."""

    function: Function
    module: fx.GraphModule
    """Readable form (``module.code``), also callable."""
    run: Callable[[list[Tensor]], tuple[Tensor, ...]]
    """Call with a list of the inputs, which is emptied; returns the outputs in order."""


def concrete(arg: LocalArg, coordinate: Coordinate, device: torch.device) -> Any:
    """``arg`` with coordinates and literals replaced by what they mean on one rank."""
    if isinstance(arg, CoordinateInt):
        return arg.offset + arg.scale * coordinate.position(arg.axes)
    if isinstance(arg, Literal):
        return device if arg.kind == "device" else getattr(torch, arg.name)
    if isinstance(arg, tuple):
        return tuple(concrete(item, coordinate, device) for item in arg)
    return arg


def returns_one_tensor(target: str, op: Any) -> bool:
    """Whether a call gives one bare tensor, not a sequence.

    Raises:
        PlanRefused: if the operator mixes lists of tensors with other results.
    """
    if target.startswith("meshwright."):
        return target not in _KERNELS_WITH_SEVERAL_RESULTS
    returns = [str(item.type) for item in op._schema.returns]
    if len(returns) > 1 and any(kind.startswith("List") for kind in returns):
        raise PlanRefused(f"operator {target}: returns a list among other results; not supported")
    return returns == ["Tensor"]


def compile_function(
    function: Function,
    *,
    values: tuple[TensorSpec, ...],
    coordinate: Coordinate,
    groups: Mapping[Axes, Group],
    device: torch.device,
) -> CompiledFunction:
    """Code of ``function`` for the rank at ``coordinate``; ``values`` are the program's.

    Raises:
        PlanRefused: if an operator does not exist, or a value is read before it is made.
    """
    writer = _Writer(function, values=values, coordinate=coordinate, groups=groups, device=device)
    for item in function.body:
        if isinstance(item, Compute):
            writer.compute(item)
        else:
            writer.collective(item)
    module, run = adapter.boxed_callable(writer.finish())
    return CompiledFunction(function=function, module=module, run=run)


class _Writer:
    """Writes one function into an fx graph."""

    def __init__(
        self,
        function: Function,
        *,
        values: tuple[TensorSpec, ...],
        coordinate: Coordinate,
        groups: Mapping[Axes, Group],
        device: torch.device,
    ) -> None:
        self._function = function
        self._values = values
        self._coordinate = coordinate
        self._groups = groups
        self._device = device
        self._graph = fx.Graph()
        self._node: dict[int, fx.Node] = {}
        self._unawaited: set[int] = set()
        self._num_uses = Counter(
            itertools.chain(function.outputs, *(_values_read(item) for item in function.body))
        )
        self._maker: dict[int, Compute] = {
            value: item
            for item in function.body
            if isinstance(item, Compute)
            for value in item.outputs
            if value is not None
        }
        for value in function.inputs:
            self._node[value] = self._graph.placeholder(f"v{value}")

    def compute(self, item: Compute) -> None:
        """One operator; its results become values."""
        op = resolve_target(item.target)
        args = tuple(self._argument(arg) for arg in item.args)
        kwargs = {name: self._argument(arg) for name, arg in item.kwargs}
        call = self._graph.call_function(op, args, kwargs)
        if returns_one_tensor(item.target, op):
            results: Iterator[tuple[int | None, Any]] = zip(item.outputs, (call,), strict=True)
            for value, node in results:
                if value is not None:
                    self._define(value, node)
            return
        for position, value in enumerate(item.outputs):
            if value is not None:
                getitem = self._graph.call_function(_getitem, (call, position))
                self._define(value, getitem)

    def collective(self, item: Collective) -> None:
        """One collective, started here and awaited where its result is first read."""
        if item.axes not in self._groups:
            raise PlanRefused(
                f"function {self._function.name}: no process group along {item.axes}; "
                "this is a mistake of the lowering, please report it"
            )
        group = self._groups[item.axes]
        operand = self._read(item.input)
        if group.size == 1:
            self._define(item.output, operand)
            return
        operand = self._graph.call_function(torch.ops.aten.contiguous.default, (operand,))
        self._define(item.output, self._start(item, operand, group))
        self._unawaited.add(item.output)

    def _start(self, item: Collective, operand: fx.Node, group: Group) -> fx.Node:
        call = self._graph.call_function
        if item.kind is CollectiveKind.ALL_REDUCE:
            # In place spares the clone, but only where nobody else can see the operand.
            name = "all_reduce_" if self._is_private(item.input) else "all_reduce"
            op = adapter.functional_collective(name)
            return call(op, (operand, item.reduction, group.name))
        if item.kind is CollectiveKind.ALL_GATHER:
            op = adapter.functional_collective("all_gather_into_tensor")
            return call(op, (operand, group.size, group.name))
        if item.kind is CollectiveKind.REDUCE_SCATTER:
            op = adapter.functional_collective("reduce_scatter_tensor")
            return call(op, (operand, item.reduction, group.size, group.name))
        splits = [self._values[item.input].shape[0] // group.size] * group.size
        op = adapter.functional_collective("all_to_all_single")
        return call(op, (operand, splits, splits, group.name))

    def _is_private(self, value: int) -> bool:
        """Whether the value's memory was made here for this one use."""
        maker = self._maker.get(value)
        if maker is None or self._num_uses[value] != 1:
            return False
        if maker.target == "meshwright.pack":
            packed = [ref for ref in _refs(maker.args[0])]
            return len(packed) > 1 or self._is_private(packed[0].value)
        if maker.target.startswith("meshwright."):
            return False
        op = resolve_target(maker.target)
        return returns_one_tensor(maker.target, op) and not adapter.returns_alias(op)

    def finish(self) -> fx.Graph:
        """Await what is left, return the outputs."""
        self._graph.output(tuple(self._read(value) for value in self._function.outputs))
        return self._graph

    def _define(self, value: int, node: fx.Node) -> None:
        self._node[value] = node

    def _read(self, value: int) -> fx.Node:
        if value not in self._node:
            raise PlanRefused(
                f"function {self._function.name}: value {value} is read before it is made; "
                "this is a mistake of the lowering, please report it"
            )
        if value in self._unawaited:
            self._unawaited.remove(value)
            self._node[value] = self._graph.call_function(
                adapter.wait_tensor(), (self._node[value],)
            )
        return self._node[value]

    def _argument(self, arg: LocalArg) -> Any:
        if isinstance(arg, Ref):
            return self._read(arg.value)
        if isinstance(arg, tuple):
            return tuple(self._argument(item) for item in arg)
        return concrete(arg, self._coordinate, self._device)


def _getitem(results: Any, position: int) -> Any:
    return results[position]


def _refs(arg: LocalArg) -> Iterator[Ref]:
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from _refs(item)


def _values_read(item: Compute | Collective) -> Iterator[int]:
    if isinstance(item, Collective):
        yield item.input
        return
    for arg in (*item.args, *(arg for _, arg in item.kwargs)):
        for ref in _refs(arg):
            yield ref.value
