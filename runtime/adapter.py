"""The one module that touches private torch APIs.

Everything here works on the torch pinned in the lock file; the adapter's own test says at once
what a new torch broke. Private names used: ``torch._C._AutoDispatchBelowAutograd``,
``torch.fx.graph._BoxedCodeGen``, ``torch.ops._c10d_functional``, ``OpOverload._op``,
``FakeTensorMode`` and the ``fake`` process group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the fake kernels of the collectives
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import _BoxedCodeGen

__all__ = [
    "COLLECTIVE_OPS",
    "below_autograd",
    "boxed_callable",
    "fake_mode",
    "fake_process_group",
    "functional_collective",
    "op_returns",
    "returns_alias",
    "wait_tensor",
]

_FUNCTIONAL = torch.ops._c10d_functional

COLLECTIVE_OPS: dict[Any, str] = {
    _FUNCTIONAL.all_reduce.default: "all_reduce",
    _FUNCTIONAL.all_reduce_.default: "all_reduce",
    _FUNCTIONAL.all_gather_into_tensor.default: "all_gather",
    _FUNCTIONAL.reduce_scatter_tensor.default: "reduce_scatter",
    _FUNCTIONAL.all_to_all_single.default: "all_to_all",
}
"""Dispatched operator to the kind of collective it is."""


def functional_collective(name: str) -> Any:
    """The operator ``_c10d_functional.NAME``."""
    return getattr(_FUNCTIONAL, name).default


def wait_tensor() -> Any:
    """The operator that makes a collective's result readable."""
    return _FUNCTIONAL.wait_tensor.default


def below_autograd() -> AbstractContextManager[Any]:
    """Runs operators without the autograd dispatch keys.

    Cheaper than ``no_grad``; results are ordinary tensors, unlike under ``inference_mode``.
    """
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def op_returns(op: Any) -> tuple[bool, ...]:
    """For each value ``op`` returns, whether it is one tensor."""
    return tuple(str(item.type) == "Tensor" for item in op._schema.returns)


def returns_alias(op: Any) -> bool:
    """Whether any result of ``op`` may share storage with an argument."""
    return any(item.alias_info is not None for item in op._schema.returns)


def boxed_callable(graph: fx.Graph) -> tuple[fx.GraphModule, Callable[[list[Tensor]], Any]]:
    """The graph as a module and as a bare function, both called with one list that they empty.

    The bare function binds each operator once (``OpOverload._op`` skips a Python frame per call),
    which the module's own code, kept readable, does not.
    """
    graph.set_codegen(_BoxedCodeGen())
    module = fx.GraphModule(torch.nn.Module(), graph)
    code = graph.python_code("self")
    bound: dict[str, Any] = {}

    def bind(match: re.Match[str]) -> str:
        namespace, packet, overload = match.group(1).split(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        name = f"_op_{namespace}_{packet}_{overload}"
        bound[name] = op._op
        return f"{name}("

    source = re.sub(r"torch\.ops\.(\w+\.\w+\.\w+)\(", bind, code.src)
    scope: dict[str, Any] = {**code.globals, **bound, "torch": torch}
    exec(compile(source, f"<meshwright {id(graph):x}>", "exec"), scope)
    forward = scope["forward"]

    def call(arguments: list[Tensor]) -> Any:
        return forward(None, arguments)

    return module, call


def fake_mode() -> FakeTensorMode:
    """A mode under which tensors have shape and device but no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_process_group(*, rank: int, world_size: int) -> Iterator[None]:
    """A process group of any size inside this process, impersonating ``rank``; nothing is sent.

    The default group must not exist yet.
    """
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
