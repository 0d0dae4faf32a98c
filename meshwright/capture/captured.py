"""Capturing: from an ``nn.Module`` and example inputs to a ``CapturedModel``."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from meshwright.capture.canonical import canonical
from meshwright.capture.containers import constant_leaves, map_tensors, tensor_leaves
from meshwright.capture.convert import to_opgraph
from meshwright.capture.failure import as_capture_failed, quiet_torch
from meshwright.capture.fold import Captured, capture_folded
from meshwright.capture.forward_log import forward_log
from meshwright.capture.standins import StandIns, fake_like, stand_ins
from meshwright.capture.trace import export_step, trace_joint
from meshwright.errors import BadRequest, CaptureFailed, PlannerError
from meshwright.graph.opgraph import InputRole, OpGraph, OutputRole

__all__ = ["CapturedModel", "capture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A captured training step, and what running it on real tensors needs."""

    graph: OpGraph
    constants: Mapping[str, Tensor]
    """Tensors written into the user's code, by the name of their graph input."""
    fixed_arguments: tuple[tuple[str, Any], ...]
    """Path and value of every argument that is not a tensor; the graph holds for these only."""

    @property
    def data_names(self) -> tuple[str, ...]:
        """Names of the data inputs in graph order."""
        return tuple(item.name for item in self.graph.inputs_of(InputRole.DATA))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the module's results other than the loss, in graph order."""
        return tuple(item.name for item in self.graph.outputs_of(OutputRole.OUTPUT))

    def flatten_data(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of one real call by input name, in graph order.

        Raises BadRequest where the call differs from the captured one in structure, shape,
        dtype or in an argument that is not a tensor. Floating tensors may have another dtype than
        captured; they are cast to it.
        """
        call = _call(args, kwargs)
        given = dict(tensor_leaves(call))
        wanted = {item.name: item.value for item in self.graph.inputs_of(InputRole.DATA)}
        if set(given) != set(wanted):
            missing = ", ".join(sorted(set(wanted) - set(given))) or "none"
            unknown = ", ".join(sorted(set(given) - set(wanted))) or "none"
            raise BadRequest(
                f"the inputs differ from those captured (missing: {missing}; unknown: {unknown}); "
                f"call with the same arguments"
            )
        fixed, passed = dict(self.fixed_arguments), dict(constant_leaves(call))
        for path in {**fixed, **passed}:
            if fixed.get(path) != passed.get(path):
                raise BadRequest(
                    f"argument {path} is {passed.get(path)!r} but {fixed.get(path)!r} was "
                    f"captured; capture again for another value"
                )
        return {name: self._checked(name, value, given[name]) for name, value in wanted.items()}

    def graph_inputs(
        self, model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> dict[int, Tensor]:
        """Every input of the graph by value number, taken from a real ``model`` and call."""
        named: dict[str, Tensor] = {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
            **self.constants,
            **self.flatten_data(args, kwargs),
        }
        return {item.value: named[item.name].detach() for item in self.graph.inputs}

    def _checked(self, name: str, value: int, tensor: Tensor) -> Tensor:
        spec = self.graph.values[value]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if tuple(tensor.shape) != spec.shape:
            raise BadRequest(
                f"input {name} has shape {list(tensor.shape)} but {list(spec.shape)} was captured; "
                f"capture again for another shape"
            )
        if tensor.dtype != dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            raise BadRequest(f"input {name} has dtype {tensor.dtype} but {dtype} was captured")
        return tensor.to(dtype)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    dtype: torch.dtype | None = None,
    fold: bool = True,
) -> CapturedModel:
    """One training step of ``model``, up to the gradients, as a graph of ATen operators.

    ``model`` and the tensors in ``args`` and ``kwargs`` may be real, fake or on ``meta``; only
    their shapes are used, no memory is taken for them, and ``model`` is left as it was. Inputs may
    be nested in mappings, sequences, named tuples and dataclasses; anything in them that is not a
    tensor is fixed. ``dtype``, where given, replaces every floating dtype of parameters, buffers
    and inputs.

    Long runs of equal layers are captured at a small depth and written out (see ``fold``), where
    that is sure to give the same graph; ``fold=False`` always traces every layer.

    The loss is the result called ``loss`` (key or attribute), else a floating scalar that
    is returned alone, first in a tuple, or as the only one.

    Raises CaptureFailed, with the operator and the line of the model, where the step is not one
    fixed graph.
    """
    if not isinstance(model, nn.Module):
        raise CaptureFailed(f"expected an nn.Module, got {type(model).__name__}")
    real_call = _call(args, kwargs)

    def whole() -> Captured:
        with _tracing(model, real_call, dtype) as (mode, call, found):
            step = export_step(model, call)
            trace = trace_joint(step, found, list(tensor_leaves(call)), mode)
            graph, constants = to_opgraph(trace, name=name or type(model).__name__)
            return canonical(graph), constants

    def log() -> OpGraph:
        with _tracing(model, real_call, dtype) as (mode, call, found):
            return forward_log(model, call, found, mode)

    try:
        with _without_overhead():
            folded = capture_folded(model, whole, log) if fold else None
            graph, constants = folded or whole()
    except PlannerError:
        raise
    except Exception as error:
        # Whatever the user's forward or torch's tracer raises is a failed capture.
        raise as_capture_failed(error) from error
    return CapturedModel(
        graph=graph,
        constants=MappingProxyType(dict(constants)),
        fixed_arguments=tuple(constant_leaves(real_call)),
    )


@contextmanager
def _tracing(
    model: nn.Module, real_call: Any, dtype: torch.dtype | None
) -> Iterator[tuple[FakeTensorMode, Any, StandIns]]:
    """Everything fake, for one pass through ``model``: the mode, the call, and the tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Without oneDNN a recurrent layer is written out in ordinary operators instead of one that
    # only a CPU has.
    plain = torch.backends.mkldnn.flags(enabled=False)
    with quiet_torch(), _on_cpu(), torch.enable_grad(), plain:
        call = map_tensors(
            real_call,
            lambda path, tensor: fake_like(tensor, mode, dtype=dtype, what=f"input {path}"),
        )
        with stand_ins(model, mode, dtype=dtype) as found:
            yield mode, call, found


@contextmanager
def _without_overhead() -> Iterator[None]:
    """Leaves out work that tracing does not need.

    Nearly all objects it makes live on, so collecting among them finds nothing; and the Python
    code of the graphs on the way, a tenth of the time for GPT-3, is never run.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Factory functions make CPU tensors even inside ``with torch.device("meta")``."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of one call as one tree, whose paths are the names of the data inputs."""
    return {"args": tuple(args), "kwargs": dict(kwargs or {})}
