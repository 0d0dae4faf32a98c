"""Messages between the ranks of different stages.

Every message has a tag of its own, so that transfers may overtake one another. Sends never block
and are awaited at the end of the step. NCCL ignores tags and orders messages by communicator, so
there each transfer has a communicator of its own, on which order of sending is order of use.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.graph.opgraph import TensorSpec
from meshwright.runtime.mesh import Coordinate, Layout
from meshwright.spmd.program import StageProgram, TiedExchange, Transfer

__all__ = ["ProcessTransport", "Transport"]

_TIED_TAGS = 2**30
"""Tags of tied exchanges start here; those of transfers stay below."""


class Transport(Protocol):
    """Moves tensors to and from the ranks of equal coordinate on other stages."""

    def send(self, transfer: Transfer, microbatch: int, tensor: Tensor) -> None:
        """Start sending."""

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """Start receiving, if that has not happened."""

    def receive(self, transfer: Transfer, microbatch: int) -> Tensor:
        """Wait for the tensor sent."""

    def exchange(self, exchange: TiedExchange, tensor: Tensor) -> None:
        """Start sending to, and receiving from, every other stage of ``exchange``."""

    def exchanged(self, exchange: TiedExchange) -> dict[int, Tensor]:
        """Wait for what the other stages sent; by stage."""

    def finish(self) -> None:
        """Wait for every send."""


class ProcessTransport:
    """A transport over the default process group."""

    def __init__(
        self,
        program: StageProgram,
        layout: Layout,
        coordinate: Coordinate,
        *,
        num_microbatches: int,
        device: torch.device,
    ) -> None:
        """Makes communicators where the backend needs them; all ranks must come here together."""
        self._program = program
        self._layout = layout
        self._coordinate = coordinate
        self._num_microbatches = num_microbatches
        self._device = device
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self._receives: dict[int, tuple[dist.Work, Tensor, torch.dtype]] = {}
        self._tied: dict[tuple[str, int], tuple[dist.Work, Tensor]] = {}
        self._groups: dict[int, dist.ProcessGroup] = {}
        if device.type != "cpu":
            for transfer in sorted(
                (*program.incoming, *program.outgoing), key=lambda item: item.tag
            ):
                ranks = [
                    layout.rank_of(stage, coordinate)
                    for stage in (transfer.source_stage, transfer.target_stage)
                ]
                self._groups[transfer.tag] = dist.new_group(
                    sorted(ranks), use_local_synchronization=True
                )

    def send(self, transfer: Transfer, microbatch: int, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until ``finish``."""
        peer = self._layout.rank_of(transfer.target_stage, self._coordinate)
        self._send(tensor, peer, self._tag(transfer, microbatch), self._groups.get(transfer.tag))

    def _send(
        self, tensor: Tensor, peer: int, tag: int, group: dist.ProcessGroup | None = None
    ) -> None:
        wire = _wire(tensor.contiguous())
        work = dist.isend(wire, peer, group=group, tag=tag)
        assert work is not None, f"isend to rank {peer} gave no work"
        self._sends.append((work, wire))

    def _tag(self, transfer: Transfer, microbatch: int) -> int:
        return transfer.tag * self._num_microbatches + microbatch

    def expect(self, transfer: Transfer, microbatch: int) -> None:
        """Start receiving, if that has not happened."""
        tag = self._tag(transfer, microbatch)
        if tag in self._receives:
            return
        spec = self._program.values[transfer.target_value]
        tensor = _empty(spec, self._device)
        peer = self._layout.rank_of(transfer.source_stage, self._coordinate)
        group = self._groups.get(transfer.tag)
        work = dist.irecv(_wire(tensor), peer, group=group, tag=tag)
        assert work is not None, f"irecv from rank {peer} gave no work"
        self._receives[tag] = (work, tensor, tensor.dtype)

    def receive(self, transfer: Transfer, microbatch: int) -> Tensor:
        """Wait for the tensor sent; contiguous."""
        self.expect(transfer, microbatch)
        work, tensor, _ = self._receives.pop(self._tag(transfer, microbatch))
        work.wait()
        return tensor

    def exchange(self, exchange: TiedExchange, tensor: Tensor) -> None:
        """Start sending to, and receiving from, every other stage of ``exchange``."""
        # Messages between two ranks with one tag arrive in order, so that two names of equal
        # hash would still be told apart: both sides go through exchanges by name.
        tag = _TIED_TAGS + zlib.crc32(exchange.name.encode()) % _TIED_TAGS
        for stage in exchange.stages:
            if stage == self._program.stage:
                continue
            peer = self._layout.rank_of(stage, self._coordinate)
            self._send(tensor, peer, tag)
            other = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            work = dist.irecv(other, peer, tag=tag)
            assert work is not None, f"irecv from rank {peer} gave no work"
            self._tied[exchange.name, stage] = (work, other)

    def exchanged(self, exchange: TiedExchange) -> dict[int, Tensor]:
        """Wait for what the other stages sent; by stage."""
        received = {}
        for stage in exchange.stages:
            if stage != self._program.stage:
                work, tensor = self._tied.pop((exchange.name, stage))
                work.wait()
                received[stage] = tensor
        return received

    def finish(self) -> None:
        """Wait for every send."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()


def _wire(tensor: Tensor) -> Tensor:
    """The same memory as an element type every backend sends."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def _empty(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
