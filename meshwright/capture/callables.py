"""Models of the user's own: ``package.module:callable``.

The callable takes no argument (or those given as overrides) and returns one of

- an ``nn.Module`` with a method ``example_inputs(batch_size, seq_len)``;
- ``(module, function)``, the function with the arguments of that method;
- ``(module, inputs)`` with inputs of a fixed batch, a tuple of positional arguments or a dict of
  keyword arguments.

The method and the function return a tensor, a tuple of positional arguments, a dict of keyword
arguments, or ``(tuple, dict)`` of both. ``seq_len`` is the job's, or None. The callable is called
with ``torch.device(device)`` in force; what it cannot build on ``meta`` is built on the CPU and
then reduced to shapes.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.capture.containers import map_tensors, tensor_leaves
from meshwright.capture.source import (
    ExampleInputs,
    checked_batch_size,
    num_parameters,
    seeded,
    torch_dtype,
)
from meshwright.errors import BadModel, BadRequest, PlannerError

__all__ = ["CallableSource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableSource:
    """A model made by the user's callable, a ``ModelSource``."""

    reference: str
    function: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def find(cls, reference: str, name: str, overrides: dict[str, str]) -> CallableSource:
        """Import ``package.module:callable``; modules of the working directory are found too.

        Raises BadModel where there is no such thing, or where it does not take the overrides.
        """
        module_name, _, attribute = name.partition(":")
        if not module_name or not attribute:
            raise BadModel(f"cannot read {name!r}; write package.module:callable")
        if module_name.partition(".")[0] in sys.stdlib_module_names:
            # A plan file names its model; it must not become a way to call subprocess or os.
            raise BadModel(
                f"{name} is in Python's standard library, which makes no models; name a callable "
                "of your own module"
            )
        found: Any = _import(module_name, reference)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise BadModel(f"module {module_name!r} has no {attribute!r}; check {reference!r}")
            found = getattr(found, part)
        if getattr(found, "__module__", module_name).partition(".")[0] in sys.stdlib_module_names:
            raise BadModel(
                f"{name} comes from Python's standard library; name a callable of your own"
            )
        if not callable(found) or isinstance(found, nn.Module):
            raise BadModel(f"{name} is not a callable that makes a model; wrap it in a function")
        arguments = {key: _literal(text) for key, text in overrides.items()}
        try:
            inspect.signature(found).bind(**arguments)
        except TypeError as error:
            raise BadModel(
                f"{name} cannot be called with {arguments or 'nothing'}: {error}"
            ) from None
        return cls(reference=reference, function=found, arguments=tuple(arguments.items()))

    @property
    def family(self) -> str:
        """``"user"``: nothing is known of the architecture."""
        return "user"

    @property
    def default_seq_len(self) -> int | None:
        """None: the callable decides."""
        return None

    def build(
        self,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
    ) -> nn.Module:
        """The module in training mode, its floating-point tensors cast to ``dtype``."""
        module, _ = self._call(device, seed)
        if torch.device(device).type == "meta":
            module = _without_storage(module)
        return module.to(torch_dtype(dtype)).train()

    def example_inputs(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: str | torch.device = "meta",
        *,
        seed: int = 0,
        dtype: str | torch.dtype = "float32",
    ) -> ExampleInputs:
        """What the user's function returns; BadRequest if its first tensor has another batch."""
        checked_batch_size(batch_size)
        _, inputs = self._call(device, seed)
        if callable(inputs):
            with seeded(seed, device):
                made = self._guarded(lambda: inputs(batch_size, seq_len), "its example inputs")
        else:
            made = inputs
        args, kwargs = self._as_call(made)
        self._check_batch((args, kwargs), batch_size)
        floating = torch_dtype(dtype)

        def place(_: str, tensor: Tensor) -> Tensor:
            wanted = floating if tensor.is_floating_point() else tensor.dtype
            if torch.device(device).type == "meta":
                return torch.empty_like(tensor, dtype=wanted, device="meta")
            return tensor.to(device=device, dtype=wanted)

        return map_tensors(args, place), map_tensors(kwargs, place)

    def describe(self) -> dict[str, Any]:
        """Reference, family, number of parameters, default sequence length, configuration."""
        return {
            "reference": self.reference,
            "family": self.family,
            "num_parameters": num_parameters(self.build()),
            "default_seq_len": None,
            "config": dict(self.arguments),
        }

    def _call(self, device: str | torch.device, seed: int) -> tuple[nn.Module, Any]:
        """Module and its inputs, as a function of (batch size, sequence length) or as given."""

        def make() -> Any:
            try:
                with seeded(seed, device):
                    return self.function(**dict(self.arguments))
            except (RuntimeError, NotImplementedError):
                # Some constructors read values (``torch.linspace(...).tolist()``).
                if torch.device(device).type != "meta":
                    raise
                with seeded(seed, "cpu"):
                    return self.function(**dict(self.arguments))

        result = self._guarded(make, "it")
        if isinstance(result, nn.Module):
            inputs = getattr(result, "example_inputs", None)
            if not callable(inputs):
                raise BadModel(
                    f"{self.reference} returned a {type(result).__name__} without example_inputs("
                    f"batch_size, seq_len); add the method or return (module, example_inputs)"
                )
            return result, inputs
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
            return result
        raise BadModel(
            f"{self.reference} returned {type(result).__name__}; return an nn.Module with "
            f"example_inputs(batch_size, seq_len), or (module, example_inputs)"
        )

    def _guarded(self, make: Callable[[], Any], what: str) -> Any:
        try:
            return make()
        except PlannerError:
            raise
        except (Exception, SystemExit) as error:
            # The user's code may raise anything; the message keeps what it said.
            said = " ".join(str(error).split())[:300]
            raise BadModel(
                f"{self.reference}: calling {what} failed with {type(error).__name__}: {said}"
            ) from error

    def _as_call(self, made: Any) -> ExampleInputs:
        if isinstance(made, Tensor):
            return (made,), {}
        if isinstance(made, dict):
            return (), made
        if isinstance(made, tuple | list):
            both = (
                len(made) == 2 and isinstance(made[0], tuple | list) and isinstance(made[1], dict)
            )
            return (tuple(made[0]), made[1]) if both else (tuple(made), {})
        raise BadModel(
            f"{self.reference}: example inputs are {type(made).__name__}; give a tensor, a tuple "
            f"of positional arguments, a dict of keyword arguments, or (tuple, dict)"
        )

    def _check_batch(self, call: ExampleInputs, batch_size: int) -> None:
        sizes = [tensor.size(0) for _, tensor in tensor_leaves(call) if tensor.dim() > 0]
        if not sizes:
            raise BadModel(f"{self.reference}: example inputs hold no tensor with a batch dim")
        if sizes[0] != batch_size:
            raise BadRequest(
                f"{self.reference}: example inputs have batch {sizes[0]} but {batch_size} is "
                f"needed; use that batch size, or return a function (batch_size, seq_len)"
            )


def _import(module_name: str, reference: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        # As `python -m` does; stays, because the module may import its neighbors later.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise BadModel(
            f"cannot import {missing!r} for {reference!r}; install it, or run where it is found"
        ) from error
    except (Exception, SystemExit) as error:
        # Importing runs the user's code, which may raise anything.
        said = " ".join(str(error).split())[:300]
        raise BadModel(
            f"importing {module_name!r} failed with {type(error).__name__}: {said}"
        ) from error


def _literal(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _without_storage(module: nn.Module) -> nn.Module:
    """``module`` with every parameter and buffer on ``meta``; tied ones stay tied."""
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                moved = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                child._parameters[name] = parameters.setdefault(id(parameter), moved)
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                moved_buffer = torch.empty_like(buffer, device="meta")
                child._buffers[name] = buffers.setdefault(id(buffer), moved_buffer)
    return module
