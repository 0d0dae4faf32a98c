"""Results of operators on fake tensors, worked out once for operands of one kind.

A fake tensor has a shape and no content, so what an operator returns depends on the shapes,
strides and types of its operands alone. In a deep module nearly every call has been seen in an
earlier layer; its results are then made anew from their description, at a fifth of the time of
``FakeTensorMode``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["RememberedResults", "bare_fake"]


@dataclass(frozen=True, slots=True)
class _Described:
    """One tensor an operator returned."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage_offset: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What a call returned."""

    tensors: tuple[_Described, ...]
    sequence: Callable[[list[FakeTensor]], Any] | None
    """Type of a result of several tensors; None for one alone."""
    viewed: int | None
    """The argument whose memory the results show."""


class RememberedResults:
    """Results of operators under one ``FakeTensorMode``."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._results: dict[Hashable, _Remembered] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns, with every tensor new."""
        key = self._key_of_call(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = self._results.get(key)
        if known is not None:
            return self._made_anew(known, args)
        result = func(*args, **kwargs)
        described = self._described(func, args, result)
        if described is not None:
            self._results[key] = described
        return result

    def _key_of_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hashable | None:
        """All that decides the result; None where that is more than can be compared."""
        if not _has_no_effects(func):
            return None
        key: list[Hashable] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        for item in args:
            part = self._key(item)
            if part is None:
                return None
            key.append(part)
        for name, item in kwargs.items():
            part = self._key(item)
            if part is None:
                return None
            key.append((name, part))
        return tuple(key)

    def _key(self, item: Any) -> Hashable | None:
        kind = type(item)
        if kind is FakeTensor:
            return self._key_of_tensor(item)
        if kind in _COMPARABLE:
            return kind, item
        if kind is float:
            return repr(item)  # 0.0 and -0.0 are equal.
        if kind is list or kind is tuple:
            parts = [self._key(part) for part in item]
            return None if None in parts else (kind, *parts)
        return None

    def _key_of_tensor(self, tensor: FakeTensor) -> Hashable | None:
        if tensor.fake_mode is not self._mode or not _is_plain(tensor):
            return None
        return (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.storage_offset(),
            tensor.requires_grad,
            tensor.fake_device,
        )

    def _described(self, func: Any, args: tuple[Any, ...], result: Any) -> _Remembered | None:
        """The description of a result; None where a new tensor would not do in its place."""
        tensors = result if isinstance(result, list | tuple) else (result,)
        viewed: int | None = None
        if func.is_view:
            places = [place for place, item in enumerate(args) if isinstance(item, Tensor)]
            if len(places) != 1:
                return None
            viewed = places[0]
        for tensor in tensors:
            if (
                type(tensor) is not FakeTensor
                or tensor.fake_mode is not self._mode
                or not _is_plain(tensor)
                or any(tensor is item for item in args)
                or (viewed is None and tensor.storage_offset() != 0)
            ):
                return None
        return _Remembered(
            tensors=tuple(
                _Described(
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                    tensor.storage_offset(),
                    tensor.fake_device,
                )
                for tensor in tensors
            ),
            sequence=type(result) if isinstance(result, list | tuple) else None,
            viewed=viewed,
        )

    def _made_anew(self, known: _Remembered, args: tuple[Any, ...]) -> Any:
        base = None if known.viewed is None else args[known.viewed]
        made = []
        for item in known.tensors:
            fake = bare_fake(self._mode, item.shape, item.stride, item.dtype, item.device)
            if base is not None:
                with torch._C._DisableTorchDispatch():
                    fake.set_(base.untyped_storage(), item.storage_offset, item.shape, item.stride)
            made.append(fake)
        return made[0] if known.sequence is None else known.sequence(made)


def bare_fake(
    mode: FakeTensorMode,
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    parameter: bool = False,
    requires_grad: bool = False,
) -> FakeTensor:
    """A fake tensor of ``mode``, made without asking ``mode`` or any other that is active."""
    with torch._C._DisableTorchDispatch():
        content = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, content, device, requires_grad=requires_grad, _is_param=parameter)


@lru_cache(maxsize=4096)
def _has_no_effects(func: Any) -> bool:
    """Whether an operator does nothing but return tensors, of a shape that its operands decide."""
    return (
        isinstance(func, OpOverload)
        and func.namespace == "aten"
        and not func._schema.is_mutable
        and not _DECIDED_OTHERWISE.intersection(func.tags)
        and func not in FakeTensorMode.lift_fns
    )


_DECIDED_OTHERWISE = frozenset(
    {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.inplace_view,
    }
)
_COMPARABLE = frozenset(
    {
        int,
        bool,
        str,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    }
)


def _is_plain(tensor: FakeTensor) -> bool:
    """Whether shape, stride and type say all about it."""
    return (
        tensor.constant is None
        and tensor.layout is torch.strided
        and not tensor.dtype.is_complex
        and not tensor.is_neg()
    )
