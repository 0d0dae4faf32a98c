"""The captured program: one joint graph of forward and backward operators.

An ``OpGraph`` holds no tensor and needs no torch. Values are numbered; ``values[i]`` describes
value ``i``. Operators stand in execution order, all forward operators before all backward ones;
an operator names the values it reads inside its arguments (``Ref``) and the values it returns.
The operator's ``target`` is the ATen overload (``"aten.mm.default"``), so the graph can be run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "DTYPE_BYTES",
    "Arg",
    "GraphInput",
    "GraphOutput",
    "InputRole",
    "Literal",
    "Op",
    "OpGraph",
    "OutputRole",
    "Phase",
    "Ref",
    "TensorSpec",
    "contiguous_stride",
    "refs_in",
]

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Phase(StrEnum):
    """When an operator runs."""

    FORWARD = "forward"
    BACKWARD = "backward"


class InputRole(StrEnum):
    """What a graph input is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    DATA = "data"
    CONSTANT = "constant"
    """A tensor written into the user's code."""


class OutputRole(StrEnum):
    """What a graph output is."""

    LOSS = "loss"
    OUTPUT = "output"
    GRADIENT = "gradient"
    BUFFER_UPDATE = "buffer_update"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape, dtype (torch's name without ``torch.``) and element strides of one value."""

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of a dense tensor of this shape and dtype."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major element strides of ``shape``."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value with this number."""

    value: int


@dataclass(frozen=True, slots=True)
class Literal:
    """An argument that is a torch constant, by name: ``Literal("dtype", "float32")``."""

    kind: str
    """``dtype``, ``device``, ``layout`` or ``memory_format``."""
    name: str


Arg = Ref | Literal | int | float | bool | str | None | tuple["Arg", ...]


def refs_in(arg: Arg) -> Iterator[Ref]:
    """Every ``Ref`` in ``arg``, left to right, entering nested tuples."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_in(item)


def _append_values(arg: Arg, found: list[int]) -> None:
    """The values of ``refs_in(arg)``, without a generator for each tuple."""
    if isinstance(arg, Ref):
        found.append(arg.value)
    elif isinstance(arg, tuple):
        for item in arg:
            _append_values(item, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One ATen operator of the joint graph."""

    index: int
    """Position in ``OpGraph.ops``."""
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[int | None, ...]
    """Value of each tensor returned, in order; ``None`` where the operator returns no tensor."""
    phase: Phase
    forward_op: int | None = None
    """For a backward operator, the forward operator it differentiates (where known)."""
    module_path: str = ""
    """Where in the module tree it comes from, ``"layers.3.attention"``; backward operators
    carry their forward operator's path."""
    source: str = ""
    """``file.py:line`` in the user's code; may be empty."""
    flop: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    _inputs: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Values read, in argument order, with repetitions."""
        # Every pass over a graph asks for them, so they are found once.
        if self._inputs is None:
            found: list[int] = []
            _append_values(self.args, found)
            for _, arg in self.kwargs:
                _append_values(arg, found)
            object.__setattr__(self, "_inputs", tuple(found))
        assert self._inputs is not None
        return self._inputs

    @property
    def results(self) -> tuple[int, ...]:
        """Values written."""
        return tuple(value for value in self.outputs if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One input of the joint graph."""

    value: int
    name: str
    """Parameter or buffer path (``"layers.0.weight"``), or path of the data (``"args.0"``,
    ``"kwargs.tokens"``, ``"args.0.image"``)."""
    role: InputRole
    tied_names: tuple[str, ...] = ()
    """Further paths of the same parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOutput:
    """One output of the joint graph."""

    value: int
    name: str
    """Loss: ``"loss"``. Output: its path in what the module returns (``"logits"``, ``"1"``).
    Gradient and buffer update: the name of the parameter or buffer."""
    role: OutputRole


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """A whole training step up to the gradients; see the module docstring."""

    name: str
    values: tuple[TensorSpec, ...]
    inputs: tuple[GraphInput, ...]
    ops: tuple[Op, ...]
    outputs: tuple[GraphOutput, ...]

    def inputs_of(self, role: InputRole) -> tuple[GraphInput, ...]:
        """The inputs of one role, in order."""
        return tuple(item for item in self.inputs if item.role == role)

    def outputs_of(self, role: OutputRole) -> tuple[GraphOutput, ...]:
        """The outputs of one role, in order."""
        return tuple(item for item in self.outputs if item.role == role)

    @property
    def parameters(self) -> tuple[GraphInput, ...]:
        """Every distinct parameter; a tied one appears once."""
        return self.inputs_of(InputRole.PARAMETER)

    @property
    def num_parameters(self) -> int:
        """Elements of all distinct parameters."""
        return sum(self.values[item.value].num_elements for item in self.parameters)

    @property
    def num_flop(self) -> int:
        """Floating-point operations of one step, forward and backward."""
        return sum(op.flop for op in self.ops)
