"""Meshwright from Python: ``plan`` a module, ``parallelize`` it, and what the verbs build on.

``plan`` decides and needs no accelerator; ``parallelize`` executes and is called in every process
that torchrun started::

    plan = meshwright.plan(model, inputs, cluster="cpu:4", job=JobSpec(global_batch=32))
    with meshwright.parallelize(model, plan, inputs) as parallel:
        for batch in batches:
            loss = parallel.step(batch)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.capture import CapturedModel, capture
from meshwright.capture.annotations import annotations_of, set_annotation
from meshwright.capture.references import resolve_model
from meshwright.cluster import Cluster, parse_cluster
from meshwright.cost.precision import check_units
from meshwright.cost.pricing import Pricing
from meshwright.errors import BadModel, BadRequest
from meshwright.gnn_cost.pretrained_pricing import usual_pricing
from meshwright.graph.opgraph import InputRole
from meshwright.plans import JobSpec, ParallelPlan
from meshwright.plans.runnable import check_job_runnable
from meshwright.runtime import RankSession, assemble_parameter, process_group, source_of
from meshwright.runtime.job import TORCH_DTYPES
from meshwright.runtime.mesh import layout_of
from meshwright.runtime.state import assemble
from meshwright.solvers.guided import Guided
from meshwright.solvers.planner import PlanningResult, plan_graph
from meshwright.space.pins import Pins, parse_pins
from meshwright.space.search import Progress, Proposer
from meshwright.spmd.prepared import lower_plan, prepare
from meshwright.tracking import file_sha256

__all__ = ["ParallelModel", "Planned", "annotate", "parallelize", "plan", "plan_reference"]

Module = TypeVar("Module", bound=nn.Module)

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""Positional arguments, keyword arguments, or both: ``(tuple, dict)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A planned model: the result of the search, and the program it is for."""

    result: PlanningResult
    captured: CapturedModel


def annotate(module: Module, **placement: str | int | bool | Sequence[str]) -> Module:
    """Decide in the model's code how a module is to be placed; every plan will respect it.

    What ``plan --fix "PATH:KEY=VALUE"`` says from outside, with the module instead of its path::

        annotate(layer.attention, tp="heads", recompute="full")
        annotate(self.experts, ep=("experts", "batch"), zero=3)

    Args:
        module: Any module of a model, also on ``meta``.
        placement: ``zero`` 0 to 3, ``recompute``, ``offload``, and mesh axes with the dimension
            classes they shard there.

    Returns:
        ``module``.

    Raises:
        BadRequest: a key or value that no module can be pinned to.
    """
    words = {key: _word(value) for key, value in placement.items()}
    parse_pins([f"module:{key}={word}" for key, word in words.items()])
    set_annotation(module, words)
    return module


def _word(value: str | int | bool | Sequence[str]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, (str, int)) else ",".join(value)


def plan(
    model: nn.Module,
    inputs: Inputs,
    *,
    cluster: str | Cluster,
    job: JobSpec,
    level: str = "O1",
    fix: Sequence[str] = (),
    allow_unrunnable: bool = False,
    rule: str | None = None,
    pricing: Pricing | None = None,
    planner: str | None = None,
) -> ParallelPlan:
    """The fastest plan found for training ``model`` that fits ``cluster``.

    Args:
        model: Any module whose result is, or holds, a scalar loss; may be on ``meta``.
        inputs: Example inputs of one step with the *global* batch: a tuple of positional arguments,
            a dict of keyword arguments, or ``(tuple, dict)``. Only shapes are used.
        cluster: Shorthand (``"8xh100"``, ``"cpu:4"``), the path of a file, or a ``Cluster``.
        job: Batch, precision and optimizer.
        level: ``"O1"`` answers quickly, ``"O2"`` searches more.
        fix: Decisions every plan must respect, such as ``"tp=8"`` or ``"layers.*:recompute=full"``;
            ``meshwright.space.pins`` lists them. What ``annotate`` said of modules comes first.
        allow_unrunnable: A plan the runtime cannot carry yet may win.
        rule: Ask only this rule of thumb: ``"data-parallel"``, ``"zero3"``, ``"megatron"`` or
            ``"naive-layers"``.
        pricing: What plans are priced with. By default learned prices where there are accelerators,
            and data sheets on CPUs.
        planner: Learned planner that is asked too: ``"none"``, ``"pretrained"`` (the package's), or
            the folder of a ``meshwright train``. By default the package's at ``"O2"``, and none at
            ``"O1"``, where it takes longer than it gains.

    Raises:
        CaptureFailed: the module's step is not one fixed graph.
        BadRequest: inputs and job do not agree.
        NoFeasiblePlan: nothing fits.
    """
    args, kwargs = _as_call(inputs)
    reference = f"{type(model).__module__}:{type(model).__qualname__}"
    captured = capture(model, args, kwargs, name=reference, dtype=TORCH_DTYPES[job.precision])
    result = _plan_captured(
        captured,
        reference=reference,
        cluster=cluster,
        job=job,
        level=level,
        pins=_pins(model, fix),
        allow_unrunnable=allow_unrunnable,
        rule=rule,
        pricing=pricing,
        planner=planner,
    )
    return result.plan


def plan_reference(
    reference: str,
    *,
    cluster: str | Cluster,
    job: JobSpec,
    level: str = "O1",
    top: int = 5,
    budget_s: float | None = None,
    fix: Sequence[str] = (),
    allow_unrunnable: bool = False,
    seed: int = 0,
    rule: str | None = None,
    pricing: Pricing | None = None,
    planner: str | None = None,
    progress: Progress | None = None,
) -> Planned:
    """Plan the model a reference names, without memory for any of its tensors.

    Args:
        reference: As ``meshwright.capture.references.resolve_model`` takes it.
        cluster: As ``plan``.
        job: As ``plan``.
        level: As ``plan``.
        top: How many plans to keep, the chosen one included.
        budget_s: Seconds after which the search returns what it has.
        fix: As ``plan``.
        allow_unrunnable: A plan the runtime cannot carry yet may win.
        seed: Of searches that draw lots.
        rule: As ``plan``.
        pricing: As ``plan``.
        planner: As ``plan``.
        progress: Told in one line what is being done.

    Raises:
        BadModel: the reference names nothing.
        PlannerError: as ``plan``.
    """
    # Read first: a slip in it should not cost the time of a capture.
    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    parse_pins(fix)
    check_units(where, job.precision)
    check_job_runnable(job, allow_unrunnable=allow_unrunnable)
    source = resolve_model(reference)
    dtype = TORCH_DTYPES[job.precision]
    if progress is not None:
        progress(f"capturing {reference}")
    args, kwargs = source.example_inputs(job.global_batch, job.seq_len, "meta", dtype=dtype)
    model = source.build(dtype)
    pins = _pins(model, fix)
    captured = capture(model, args, kwargs, name=reference)
    result = _plan_captured(
        captured,
        reference=reference,
        cluster=where,
        job=job,
        level=level,
        cluster_name=cluster if isinstance(cluster, str) else None,
        top=top,
        budget_s=budget_s,
        pins=pins,
        allow_unrunnable=allow_unrunnable,
        seed=seed,
        rule=rule,
        pricing=pricing,
        planner=planner,
        progress=progress,
    )
    return Planned(result=result, captured=captured)


def _pins(model: nn.Module, fix: Sequence[str]) -> Pins:
    """What the model's modules are annotated with, and what was asked for."""
    return parse_pins(tuple(dict.fromkeys((*annotations_of(model), *fix))))


def _plan_captured(
    captured: CapturedModel,
    *,
    reference: str,
    cluster: str | Cluster,
    job: JobSpec,
    pricing: Pricing | None,
    planner: str | None,
    **options: Any,
) -> PlanningResult:
    if isinstance(cluster, str):
        options["cluster_name"] = cluster
        cluster = parse_cluster(cluster)
    learned = None if options["rule"] else _learned_planner(planner, options["level"])
    result = plan_graph(
        captured.graph,
        reference=reference,
        cluster=cluster,
        job=job,
        pricing=usual_pricing(cluster) if pricing is None else pricing,
        proposers=() if learned is None else (learned[0],),
        **options,
    )
    return result if learned is None else _made_with(result, *learned)


def _learned_planner(name: str | None, level: str) -> tuple[Proposer, str] | None:
    """The planner ``plan(planner=name)`` means, and the hash of its weights."""
    if name == "none" or (name is None and level == "O1"):
        return None
    from meshwright.agents.planner import PRETRAINED, PolicyDecider, planner_file  # takes seconds

    if name is None and not PRETRAINED.exists():
        return None
    path = PRETRAINED if name is None else planner_file(name)
    return Guided(PolicyDecider.pretrained(path)), file_sha256(path)


def _made_with(result: PlanningResult, planner: Proposer, planner_sha256: str) -> PlanningResult:
    """Plans name the planner where it had one of its own to compare with."""
    told = (solver for solver in result.search.solvers if solver.name == planner.name)
    if all(solver.best_s is None for solver in told):
        return result

    def marked(plan: ParallelPlan) -> ParallelPlan:
        provenance = msgspec.structs.replace(plan.provenance, planner=planner_sha256[:12])
        return msgspec.structs.replace(plan, provenance=provenance)

    others = tuple(replace(one, plan=marked(one.plan)) for one in result.alternatives)
    return replace(result, plan=marked(result.plan), alternatives=others)


def _as_call(inputs: Inputs | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple):
        raise BadRequest(
            f"inputs are {type(inputs).__name__}; give a tuple of positional arguments, a dict of "
            "keyword arguments, or (tuple, dict)"
        )
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return inputs[0], dict(inputs[1])
    return inputs, {}


def parallelize(
    model: nn.Module,
    plan: ParallelPlan,
    inputs: Inputs | None = None,
    *,
    device: str | None = None,
) -> ParallelModel:
    """This process's share of training ``model`` as ``plan`` says.

    Call it in every process that torchrun started, with equal arguments; starts the process group
    where there is none yet.

    Args:
        model: The module the plan was made for, with real values, alike in every process. It is
            left as it is; ``load_state_dict(parallel.state_dict())`` brings the result back.
        plan: From ``meshwright.plan`` or ``read_plan``.
        inputs: Example inputs of the global batch, as for ``plan``; may be left out for a model
            that ``plan.model.reference`` names.
        device: ``"cpu"`` or ``"cuda"``; CUDA where there is any, unless given.

    Raises:
        BadRequest: outside torchrun.
        BadModel: the model is on ``meta``.
        PlanRefused: the plan is for another program or number of processes, or cannot be carried.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        raise BadModel("the model is on meta and has no values; build it on the CPU")
    dtype = TORCH_DTYPES[plan.job.precision]
    if inputs is None:
        source = resolve_model(plan.model.reference)
        args, kwargs = source.example_inputs(
            plan.job.global_batch, plan.job.seq_len, "meta", dtype=dtype
        )
    else:
        args, kwargs = _as_call(inputs)
    captured = capture(model, args, kwargs, name=plan.model.reference, dtype=dtype)
    return ParallelModel(model, plan, captured, device=_device(device))


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


class ParallelModel:
    """One process of a distributed model; made by ``parallelize``.

    Methods are collective: every process calls them in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ParallelPlan,
        captured: CapturedModel,
        *,
        device: torch.device,
    ) -> None:
        """Lowers the plan for this process and takes its part of the parameters."""
        prepared = prepare(captured.graph)
        layout = layout_of(plan)
        self._captured = captured
        self._resources = ExitStack()
        if not dist.is_initialized():
            self._resources.enter_context(process_group(device))
        rank = dist.get_rank()
        stage, _ = layout.locate(rank % layout.num_ranks)
        self._session = RankSession(
            lower_plan(prepared, plan, stage=stage)[0],
            layout,
            source_of(model, captured.constants),
            rank=rank,
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
            optimizer=plan.job.optimizer,
            device=device,
        )
        has_loss = torch.tensor(
            rank if self._session.program.loss is not None else -1, device=device
        )
        dist.all_reduce(has_loss, dist.ReduceOp.MAX)
        self._loss_rank = int(has_loss)

    @property
    def session(self) -> RankSession:
        """What runs underneath."""
        return self._session

    def step(self, batch: Inputs) -> Tensor:
        """One optimizer step on a global batch, the same in every process.

        Returns:
            The loss before the step, a scalar, in every process.
        """
        args, kwargs = _as_call(batch)
        local = self._session.local_batch(self._captured.flatten_data(args, kwargs))
        result = self._session.step(local)
        loss = result.loss
        if loss is None:
            spec = self._captured.graph.values[self._loss_value()]
            loss = torch.zeros((), dtype=getattr(torch, spec.dtype), device=self._session.device)
        loss = loss.detach().reshape(()).clone()
        dist.broadcast(loss, src=self._loss_rank)
        return loss

    def _loss_value(self) -> int:
        return next(
            output.value for output in self._captured.graph.outputs if output.role == "loss"
        )

    def parameters(self) -> Iterator[Tensor]:
        """Full parameters in the model's order, gathered; every process gets all of them."""
        names = [item.name for item in self._captured.graph.parameters]
        gathered = self._gathered_parameters()
        return iter([gathered[name] for name in names])

    def state_dict(self) -> dict[str, Tensor]:
        """Full parameters and buffers by name, gathered on the CPU; every process gets all.

        Tied parameters stand under each of their names. Parameters have the precision of the job;
        buffers are those the program reads.
        """
        state = self._gathered_parameters()
        for item in self._captured.graph.inputs_of(InputRole.PARAMETER):
            for name in item.tied_names:
                if item.name in state:
                    state[name] = state[item.name]
        state.update(self._gathered_buffers())
        return state

    def _gathered_parameters(self) -> dict[str, Tensor]:
        session = self._session
        own = [
            (slot, session.coordinate, session.state.optimized(slot.name).detach().cpu().clone())
            for slot in session.program.parameters
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (session.program.stage, own))
        pieces: dict[str, dict[int, tuple[Any, list[Any]]]] = {}
        for stage, held in everyone:
            for slot, coordinate, tensor in held:
                by_stage = pieces.setdefault(slot.name, {})
                by_stage.setdefault(stage, (slot, []))[1].append((coordinate, tensor))
        # A parameter on several stages is equal on all of them; one suffices.
        full = {}
        for name, by_stage in pieces.items():
            slot, held = next(iter(by_stage.values()))
            full[name] = assemble_parameter(slot, held).to(getattr(torch, slot.full.dtype))
        return full

    def _gathered_buffers(self) -> dict[str, Tensor]:
        session = self._session
        own = [
            (slot, session.coordinate, session.state.held[slot.batch_value].detach().cpu().clone())
            for slot in session.program.inputs
            if slot.role == "buffer"
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (session.program.stage, own))
        pieces: dict[tuple[str, int], tuple[Any, list[Any]]] = {}
        for stage, held in everyone:
            for slot, coordinate, tensor in held:
                pieces.setdefault((slot.name, stage), (slot, []))[1].append((coordinate, tensor))
        return {
            name: assemble(slot.full.shape, slot.shard, held)
            for (name, _), (slot, held) in pieces.items()
        }

    def close(self) -> None:
        """End the process group, if this object started it."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
