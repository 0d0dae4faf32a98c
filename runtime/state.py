"""What a rank holds between steps: parameters, optimizer state, buffers, data.

Held for each parameter, by ZeRO stage:

    0       ``local``, which the optimizer updates in place
    1, 2    ``local`` and, for the optimizer, a chunk of it in memory of its own
    3       the chunk

In bf16 and fp16 the optimizer updates an fp32 copy of what it would update otherwise, and for
ZeRO 1 and 2 that copy replaces the chunk, which exists only while it is published. With offload the
optimizer updates a copy in the host's memory in the same way, in fp32 or the parameter's own type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import TensorSpec
from meshwright.plans.plan import OptimizerSpec
from meshwright.runtime.kernels import zero_shard
from meshwright.runtime.mesh import Coordinate
from meshwright.runtime.stepping import SlicedOptimizer
from meshwright.spmd.program import DataSlot, ParameterSlot, ShardSpec, StageProgram

__all__ = [
    "RankState",
    "assemble",
    "assemble_parameter",
    "local_shape",
    "slice_data",
    "slice_tensor",
]

TensorSource = Callable[[str], Tensor]
"""Gives the full tensor of a name."""

ZERO_AXES = ("dp_shard",)
_LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})


def _factored_view(full: Tensor, shard: ShardSpec, coordinate: Coordinate, name: str) -> Tensor:
    """The block of ``full`` at ``coordinate``, one dim for each factor; a view."""
    if len(shard.factors) != full.ndim:
        raise PlanRefused(
            f"{name}: sharding names {len(shard.factors)} dims of {full.ndim}; plan the model again"
        )
    sizes: list[int] = []
    split: list[tuple[int, tuple[str, ...]]] = []
    for size, factors in zip(full.shape, shard.factors, strict=True):
        if factors and math.prod(part for part, _ in factors) != size:
            raise PlanRefused(
                f"{name}: factors {factors} do not multiply to {size}; plan the model again"
            )
        split += factors or ((size, ()),)
    sizes = [size for size, _ in split]
    view = full.view(sizes) if full.is_contiguous() else full.contiguous().view(sizes)
    for dim, (size, axes) in enumerate(split):
        num_ranks = coordinate.size(axes)
        if size % num_ranks:
            raise PlanRefused(
                f"{name}: {size} rows do not divide among {num_ranks} ranks along {axes}; "
                "choose mesh sizes that divide the model"
            )
        rows = size // num_ranks
        view = view.narrow(dim, coordinate.position(axes) * rows, rows)
    return view


def local_shape(
    full_shape: Sequence[int], shard: ShardSpec, coordinate: Coordinate
) -> tuple[int, ...]:
    """Shape of one rank's block."""
    return tuple(
        math.prod(part // coordinate.size(axes) for part, axes in factors) if factors else size
        for size, factors in zip(full_shape, shard.factors, strict=True)
    )


def slice_tensor(full: Tensor, shard: ShardSpec, coordinate: Coordinate, name: str = "") -> Tensor:
    """One rank's block of ``full``; may be a view.

    Raises:
        PlanRefused: if the block is not the same size on every rank; ``name`` is for the message.
    """
    block = _factored_view(full, shard, coordinate, name)
    return block.reshape(local_shape(full.shape, shard, coordinate))


def assemble(
    full_shape: Sequence[int], shard: ShardSpec, blocks: Iterable[tuple[Coordinate, Tensor]]
) -> Tensor:
    """The full tensor from the blocks of every coordinate; the inverse of ``slice_tensor``."""
    full: Tensor | None = None
    for coordinate, block in blocks:
        if full is None:
            full = block.new_zeros(tuple(full_shape))
        target = _factored_view(full, shard, coordinate, "assemble")
        target.copy_(block.reshape(target.shape))
    assert full is not None, "assemble needs at least one block"
    return full


def assemble_parameter(slot: ParameterSlot, pieces: Iterable[tuple[Coordinate, Tensor]]) -> Tensor:
    """A full parameter (or gradient) from each rank's ``optimized``-shaped tensor."""
    held = list(pieces)
    if slot.zero is None:
        return assemble(slot.full.shape, slot.shard, held)
    dim = slot.zero.dim
    chunks: dict[tuple[int, ...], dict[int, Tensor]] = {}
    owner: dict[tuple[int, ...], Coordinate] = {}
    for coordinate, chunk in held:
        first = coordinate.peers(ZERO_AXES)[0]
        chunks.setdefault(first.index, {})[coordinate.position(ZERO_AXES)] = chunk
        owner[first.index] = first
    blocks = []
    for index, by_position in chunks.items():
        joined = torch.cat([by_position[p] for p in sorted(by_position)], dim=dim)
        rows = local_shape(slot.full.shape, slot.shard, owner[index])[dim]
        blocks.append((owner[index], joined.narrow(dim, 0, rows)))
        # Blocks of peers along the ZeRO axes are the same block: the sharding does not use them.
    return assemble(slot.full.shape, slot.shard, blocks)


def slice_data(
    slots: Iterable[DataSlot], coordinate: Coordinate, full: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's part of a global batch, for every data slot.

    Raises:
        PlanRefused: if an input is missing or has another shape than was captured.
    """
    local: dict[str, Tensor] = {}
    for slot in slots:
        if slot.role != "data":
            continue
        if slot.name not in full:
            raise PlanRefused(f"input {slot.name} is missing; give every input of the model")
        _check_shape(slot.name, full[slot.name], slot.full)
        local[slot.name] = slice_tensor(full[slot.name], slot.shard, coordinate, slot.name)
    return local


def _check_shape(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    if tuple(tensor.shape) != spec.shape:
        raise PlanRefused(
            f"{name}: shape {tuple(tensor.shape)} but the plan was made for {spec.shape}; "
            "plan for this shape"
        )


class RankState:
    """The tensors one rank holds; ``held`` maps program values to them."""

    def __init__(
        self,
        program: StageProgram,
        coordinate: Coordinate,
        source: TensorSource,
        *,
        optimizer: OptimizerSpec,
        device: torch.device,
    ) -> None:
        """``source`` gives full parameters, buffers and constants by name; asked one by one."""
        self.program = program
        self.coordinate = coordinate
        self._device = device
        self.held: dict[int, Tensor] = {}
        self._updated: dict[str, Tensor] = {}
        for slot in program.parameters:
            self._place(slot, source, device)
        for data in program.inputs:
            if data.role != "data":
                full = source(data.name)
                _check_shape(data.name, full, data.full)
                local = slice_tensor(full, data.shard, coordinate, data.name)
                self._hold(data, _own(local, data.full.dtype, device))
        self._optimizer = SlicedOptimizer(optimizer, self._updated)

    def _hold(self, slot: DataSlot, local: Tensor) -> None:
        """Keep a buffer or constant; one with a batch dim is cut anew for each micro-batch."""
        self.held[slot.batch_value] = local
        if slot.batch_dim is None:
            self.held[slot.value] = local

    def _place(self, slot: ParameterSlot, source: TensorSource, device: torch.device) -> None:
        full = source(slot.name)
        _check_shape(slot.name, full, slot.full)
        local = _own(
            slice_tensor(full, slot.shard, self.coordinate, slot.name), slot.full.dtype, device
        )
        has_copy = slot.offload or local.dtype in _LOW_PRECISION
        if slot.zero is None:
            self.held[slot.local] = self.held[slot.stored] = self.held[slot.optimized] = local
            updated = local
        else:
            index = self.coordinate.position(ZERO_AXES)
            chunk = zero_shard(local, slot.zero.dim, slot.zero.chunk, index)
            chunk = chunk.clone(memory_format=torch.contiguous_format)
            if slot.zero_stage >= 3:
                self.held[slot.stored] = self.held[slot.optimized] = chunk
            else:
                self.held[slot.local] = self.held[slot.stored] = local
                if not has_copy:
                    self.held[slot.optimized] = chunk
            updated = chunk
        if has_copy:
            dtype = torch.float32 if local.dtype in _LOW_PRECISION else local.dtype
            place = torch.device("cpu") if slot.offload else device
            updated = updated.to(place, dtype, copy=True)
        self._updated[slot.name] = updated

    def optimizer_step(self, gradients: Mapping[str, Tensor]) -> None:
        """Update ``optimized`` values with ``gradients``, by parameter name.

        A parameter without a gradient stays as it is, as in ``torch.optim``.
        """
        self._optimizer.step(gradients)
        for slot in self.program.parameters:
            held = self.held.get(slot.optimized)
            if held is not None and held is not self._updated[slot.name]:
                held.copy_(self._updated[slot.name])

    def to_publish(self) -> dict[int, Tensor]:
        """The ``optimized`` values of ZeRO 1 and 2, in the model's element type."""
        return {
            slot.optimized: self._updated[slot.name].to(
                self._device, getattr(torch, slot.full.dtype)
            )
            for slot in self.program.parameters
            if slot.zero is not None and slot.zero_stage < 3
        }

    def set_published(self, name: str, local: Tensor) -> None:
        """Take over the new ``local`` value of a parameter."""
        for slot in self.program.parameters:
            if slot.name == name:
                self.held[slot.local] = self.held[slot.stored] = local

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Take over the new value of a buffer."""
        for slot in self.program.inputs:
            if slot.name == name:
                self._hold(slot, value)

    def optimized(self, name: str) -> Tensor:
        """What the optimizer updates for parameter ``name``: its own copy, where it has one."""
        return self._updated[name]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters held in the model's element type."""
        values = {slot.stored for slot in self.program.parameters}
        return _num_bytes(self.held[value] for value in values)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes the optimizer needs beside the parameters: chunks, fp32 copies, its state.

        The scalar step counters of ``torch.optim`` are left out, and what is offloaded.
        """
        stored = {id(self.held[slot.stored]) for slot in self.program.parameters}
        names = [slot.name for slot in self.program.parameters if not slot.offload]
        own = [self._updated[name] for name in names]
        extra = [tensor for tensor in own if id(tensor) not in stored]
        return _num_bytes(extra) + self._optimizer.state_bytes(names)


def _own(tensor: Tensor, dtype: str, device: torch.device) -> Tensor:
    """A contiguous copy that shares no memory with ``tensor``."""
    copy = torch.empty(tensor.shape, dtype=getattr(torch, dtype), device=device)
    return copy.copy_(tensor.detach())


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
