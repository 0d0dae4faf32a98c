"""Fake CPU tensors in the place of a module's own, so that capturing allocates nothing.

The stand-ins live on (fake) CPU wherever the module lives: exported on ``meta``, factory
operators would carry ``device='meta'`` and attention would decompose.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from meshwright.capture.remembered import bare_fake
from meshwright.errors import CaptureFailed

__all__ = ["StandIns", "fake_like", "stand_ins"]

_CPU = torch.device("cpu")


class StandIns:
    """The fake parameters and buffers of one module, by name; tied ones appear once."""

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.canonical: dict[str, str] = {}
        """From every name of a parameter or buffer to its first name."""
        self.fake_by_id: dict[int, Tensor] = {}
        self._further: defaultdict[str, list[str]] = defaultdict(list)

    def tied_names(self, name: str) -> tuple[str, ...]:
        """Further names of the parameter or buffer ``name``."""
        return tuple(self._further.get(name, ()))

    def add_name(self, name: str, first: str) -> None:
        """``name`` stands for the tensor first called ``first``."""
        self.canonical[name] = first
        if name != first:
            self._further[first].append(name)


def fake_like(
    tensor: Tensor,
    mode: FakeTensorMode,
    *,
    dtype: torch.dtype | None,
    what: str,
    parameter: bool = False,
) -> Tensor:
    """A fake CPU tensor with the shape and strides of ``tensor``.

    ``dtype``, where given, replaces a floating type. As a ``parameter`` it is one and requires a
    gradient where ``tensor`` does. Raises CaptureFailed for a tensor that is
    not dense or has no shape yet; ``what`` names it there.
    """
    if nn.parameter.is_lazy(tensor):
        raise CaptureFailed(f"{what} has no shape yet; run the lazy module once before capture")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CaptureFailed(f"{what} is a {tensor.layout} tensor; use a dense one")
    cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return bare_fake(
        mode,
        tensor.shape,
        tensor.stride(),
        cast,
        _CPU,
        parameter=parameter,
        requires_grad=parameter and tensor.requires_grad,
    )


@contextmanager
def stand_ins(
    model: nn.Module, mode: FakeTensorMode, *, dtype: torch.dtype | None
) -> Iterator[StandIns]:
    """Puts fake tensors into ``model`` for the duration of the block.

    Afterwards every attribute of every module is what it was, even those ``forward`` assigned, and
    so is what their lists, dictionaries and sets hold.
    """
    found = StandIns()
    _make_fakes(model, mode, dtype, found)
    before = [
        (holder, dict(holder))
        for module in model.modules()
        for holder in (vars(module), module._parameters, module._buffers)
    ]
    contents = [
        (value, copy.copy(value))
        for module in model.modules()
        for value in vars(module).values()
        if type(value) in (list, dict, set)
    ]
    try:
        for path, module in model.named_modules():
            for holder in (module._parameters, module._buffers, vars(module)):
                _swap(holder, found.fake_by_id, path)
        yield found
    finally:
        for holder, content in before:
            holder.clear()
            holder.update(content)
        for container, elements in contents:
            container.clear()
            if isinstance(container, list):
                container.extend(elements)
            else:
                container.update(elements)


def _make_fakes(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None, found: StandIns
) -> None:
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in first_name:
            first_name[id(parameter)] = name
            found.parameters[name] = fake_like(
                parameter, mode, dtype=dtype, what=f"parameter {name}", parameter=True
            )
            found.fake_by_id[id(parameter)] = found.parameters[name]
        found.add_name(name, first_name[id(parameter)])
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) not in first_name:
            first_name[id(buffer)] = name
            found.buffers[name] = fake_like(buffer, mode, dtype=dtype, what=f"buffer {name}")
            found.fake_by_id[id(buffer)] = found.buffers[name]
        found.add_name(name, first_name[id(buffer)])


def _swap(holder: dict[str, Any], fake_by_id: dict[int, Tensor], path: str) -> None:
    """Replaces tensors of ``holder`` by their stand-ins.

    Lists of tensors are entered too: ``nn.LSTM`` keeps its weights in one a second time.
    """
    for key, value in list(holder.items()):
        if isinstance(value, Tensor):
            fake = fake_by_id.get(id(value))
            name = f"{path}.{key}".lstrip(".")
            holder[key] = fake if fake is not None else _plain_attribute(value, name)
        elif isinstance(value, list | tuple) and any(id(item) in fake_by_id for item in value):
            holder[key] = type(value)(fake_by_id.get(id(item), item) for item in value)


def _plain_attribute(value: Tensor, name: str) -> Tensor:
    """A tensor that is neither parameter nor buffer becomes a constant: it needs its values."""
    if value.is_meta or isinstance(value, FakeTensor):
        raise CaptureFailed(
            f"attribute {name} is a tensor without values (meta or fake) and neither parameter "
            f"nor buffer; register it with register_buffer"
        )
    return value if value.device.type == "cpu" else value.detach().cpu()
