"""Writing the body of a local function: values, instructions, glue."""

from __future__ import annotations

from meshwright.graph.opgraph import Literal, Ref, TensorSpec, contiguous_stride
from meshwright.spmd.program import (
    Collective,
    CollectiveKind,
    Compute,
    Instruction,
    LocalArg,
)

__all__ = ["Body", "ValueTable"]


class ValueTable:
    """The values of a stage's program, numbered."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []

    def new(self, spec: TensorSpec) -> int:
        """Number of a new value."""
        self.specs.append(spec)
        return len(self.specs) - 1


class Body:
    """Instructions of one function under construction."""

    def __init__(self, values: ValueTable) -> None:
        self.values = values
        self.instructions: list[Instruction] = []
        self.segment = -1

    def spec(self, value: int) -> TensorSpec:
        """Local spec of a value."""
        return self.values.specs[value]

    def compute(
        self,
        target: str,
        args: tuple[LocalArg, ...],
        results: tuple[TensorSpec | None, ...],
        *,
        kwargs: tuple[tuple[str, LocalArg], ...] = (),
        op_index: int = -1,
        flop: int = 0,
    ) -> tuple[int | None, ...]:
        """Append an operator; returns its result values."""
        outputs = tuple(None if spec is None else self.values.new(spec) for spec in results)
        self.instructions.append(
            Compute(
                target=target,
                args=args,
                kwargs=kwargs,
                outputs=outputs,
                op_index=op_index,
                segment=self.segment,
                flop=flop,
            )
        )
        return outputs

    def one(
        self,
        target: str,
        args: tuple[LocalArg, ...],
        shape: tuple[int, ...],
        dtype: str,
        *,
        kwargs: tuple[tuple[str, LocalArg], ...] = (),
        op_index: int = -1,
    ) -> int:
        """Append an operator with one dense result."""
        spec = TensorSpec(shape=shape, dtype=dtype, stride=contiguous_stride(shape))
        (value,) = self.compute(target, args, (spec,), kwargs=kwargs, op_index=op_index)
        assert value is not None
        return value

    def reshape(self, value: int, shape: tuple[int, ...]) -> int:
        """``value`` in another shape; nothing where it has it already."""
        spec = self.spec(value)
        if spec.shape == shape:
            return value
        return self.one("aten.reshape.default", (Ref(value), shape), shape, spec.dtype)

    def permute(self, value: int, order: tuple[int, ...]) -> int:
        """``value`` with its dims in another order, made dense."""
        if order == tuple(range(len(order))):
            return value
        spec = self.spec(value)
        shape = tuple(spec.shape[dim] for dim in order)
        moved = self.one("aten.permute.default", (Ref(value), order), shape, spec.dtype)
        dense = (("memory_format", Literal("memory_format", "contiguous_format")),)
        return self.one("aten.clone.default", (Ref(moved),), shape, spec.dtype, kwargs=dense)

    def collective(
        self,
        kind: CollectiveKind,
        value: int,
        *,
        axes: tuple[str, ...],
        ways: int,
        cause: str,
        reduction: str = "",
    ) -> int:
        """Append a collective along dim 0; returns its result."""
        spec = self.spec(value)
        shape = spec.shape
        if kind == CollectiveKind.ALL_GATHER:
            shape = (shape[0] * ways, *shape[1:])
        elif kind == CollectiveKind.REDUCE_SCATTER:
            assert shape[0] % ways == 0
            shape = (shape[0] // ways, *shape[1:])
        result = self.values.new(
            TensorSpec(shape=shape, dtype=spec.dtype, stride=contiguous_stride(shape))
        )
        payload = max(spec.num_bytes, self.spec(result).num_bytes)
        self.instructions.append(
            Collective(
                kind=kind,
                axes=axes,
                reduction=reduction,
                input=value,
                output=result,
                num_bytes=payload,
                segment=self.segment,
                cause=cause,
            )
        )
        return result

    def all_reduce(
        self, value: int, *, axes: tuple[str, ...], ways: int, cause: str, reduction: str = "sum"
    ) -> int:
        """Append an all-reduce."""
        return self.collective(
            CollectiveKind.ALL_REDUCE, value, axes=axes, ways=ways, cause=cause, reduction=reduction
        )

    def add(self, first: int, second: int) -> int:
        """Sum of two values of one shape."""
        spec = self.spec(first)
        return self.one("aten.add.Tensor", (Ref(first), Ref(second)), spec.shape, spec.dtype)

    def scaled(self, value: int, factor: float) -> int:
        """``value`` times a number."""
        spec = self.spec(value)
        return self.one("aten.mul.Scalar", (Ref(value), factor), spec.shape, spec.dtype)
