"""Peak memory of a step by accounting: every storage that operators make, until it is freed.

Works the same on any device, with real or fake tensors. Not counted: workspaces inside one
operator, buffers of the communication library, and what the allocator rounds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageTracker"]


class StorageTracker(TorchDispatchMode):
    """While entered, follows the bytes of storages made by operators.

    Storages that existed before (parameters, optimizer state, inputs) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        """Of storages made here and not yet freed."""
        self.peak_bytes = 0
        """Most ``live_bytes`` so far."""
        self._known: set[int] = set()
        self._finalizers: list[weakref.finalize[Any, Any]] = []

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._know(leaf, counts=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._know(leaf, counts=True)
        return result

    def _know(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        # torch keeps one Python object for a storage as long as the storage lives, so its id is
        # unique until the finalizer runs.
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes() if counts else 0
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        finalizer = weakref.finalize(storage, self._forget, key, num_bytes)
        finalizer.atexit = False
        self._finalizers.append(finalizer)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        for finalizer in self._finalizers:
            finalizer.detach()
        self._finalizers.clear()
