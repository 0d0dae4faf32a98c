"""Tensors inside nested containers: what a module takes and what it returns.

A leaf's path joins keys, positions and field names with dots: ``"0.image"``, ``"loss"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["constant_leaves", "map_tensors", "tensor_leaves"]


def tensor_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Path and tensor of every tensor in ``tree``, in the order of its containers.

    Containers are mappings, sequences, named tuples and dataclasses; anything else that is not
    a tensor is passed over.
    """
    if isinstance(tree, Tensor):
        yield path, tree
    for key, item in _items(tree) or ():
        yield from tensor_leaves(item, f"{path}.{key}" if path else key)


def constant_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and object of everything in ``tree`` that is neither a tensor nor a container."""
    items = _items(tree)
    if items is None and not isinstance(tree, Tensor):
        yield path, tree
    for key, item in items or ():
        yield from constant_leaves(item, f"{path}.{key}" if path else key)


def map_tensors(tree: Any, replace: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """A copy of ``tree`` with every tensor replaced by ``replace(path, tensor)``.

    Mappings of a type that cannot be built from a ``dict`` become a plain ``dict``.
    """
    if isinstance(tree, Tensor):
        return replace(path, tree)
    items = _items(tree)
    if items is None:
        return tree
    mapped = {
        key: map_tensors(item, replace, f"{path}.{key}" if path else key) for key, item in items
    }
    if isinstance(tree, Mapping):
        by_key = dict(zip(tree, mapped.values(), strict=True))
        kind: Any = type(tree)
        return kind(by_key) if kind.__init__ is dict.__init__ else by_key
    if dataclasses.is_dataclass(tree):
        return dataclasses.replace(tree, **mapped)  # type: ignore[type-var]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*mapped.values())
    return type(tree)(mapped.values())


def _items(tree: Any) -> list[tuple[str, Any]] | None:
    """Named children of a container; ``None`` for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), item) for key, item in tree.items()]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return [(name, getattr(tree, name)) for name in tree._fields]
    if isinstance(tree, list | tuple):
        return [(str(index), item) for index, item in enumerate(tree)]
    return None
