"""Claim: a lowered program costs no more than the code a person would write for the same plan.

One process: the lowered program against plain eager PyTorch. Two gloo processes: against DDP, FSDP2
and hand-written Megatron tensor parallelism. Forward and backward with gradient reduction, no
optimizer; the two sides take turns in one run, and the ratio is taken pair by pair.

    python -m benchmarks.lowered_program [--sizes small,large] [--repeats 30] -o FILE
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.heading import heading
from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.plans.plan import (
    AXIS_NAMES,
    GraphReference,
    JobSpec,
    Mesh,
    ParallelPlan,
    Provenance,
    SegmentPlan,
    Stage,
)
from meshwright.runtime.mesh import layout_of
from meshwright.runtime.session import RankSession
from meshwright.runtime.verify import source_of
from meshwright.spmd.prepared import PreparedGraph, lower_plan, prepare

SIZES = {
    "small": ("gpt2?hidden=64&num_layers=4&num_heads=4&vocab_size=512&seq_len=32", 4),
    "large": ("gpt2?hidden=512&num_layers=4&num_heads=8&vocab_size=8192&seq_len=256", 8),
}
"""GPT of 4 layers; the global batch beside it."""
_TENSOR_PARALLEL = ("heads", "inner")


def hand_plan(
    prepared: PreparedGraph, *, reference: str, batch: int, mesh: Mesh, zero: int
) -> ParallelPlan:
    """A plan with the given mesh: batch over the data axes, Megatron's dims over ``tp``."""
    segments = []
    for segment in prepared.segmentation.representatives():
        names = prepared.labels.by_segment[segment.index]
        shard = {
            axis: ["batch"]
            if axis.startswith("dp")
            else [x for x in _TENSOR_PARALLEL if x in names]
            for axis, size in zip(AXIS_NAMES, mesh.stage_shape, strict=True)
            if size > 1
        }
        segments.append(
            SegmentPlan(
                segment_class=segment.segment_class, name=segment.name, shard=shard, zero_stage=zero
            )
        )
    count = len(prepared.segmentation.segments)
    return ParallelPlan(
        model=GraphReference(
            reference=reference,
            graph_sha256=prepared.sha256,
            num_parameters=prepared.graph.num_parameters,
            num_segments=count,
        ),
        cluster=f"cpu:{mesh.num_devices}",
        job=JobSpec(global_batch=batch),
        mesh=mesh,
        stages=[
            Stage(
                first_segment=0,
                last_segment=count - 1,
                first_device=0,
                num_devices=mesh.num_devices,
            )
        ],
        segments=segments,
        provenance=Provenance(meshwright_version="0", solver="hand", level="manual"),
    )


class _Copy(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _Reduce(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ReducedLinear(nn.Module):
    """Row-parallel linear: partial product, all-reduce, then the bias once."""

    def __init__(self, linear: nn.Linear, columns: slice) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, columns].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _Reduce.apply(nn.functional.linear(x, self.weight)) + self.bias


def hand_tensor_parallel(model: nn.Module, rank: int, ways: int) -> nn.Module:
    """Attention and feed-forward of a zoo GPT split by hand; embedding and head left whole."""
    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        for name, module in list(attention.named_children()):
            if not isinstance(module, nn.Linear):
                continue
            rows = module.weight.shape[0] // ways
            own = slice(rank * rows, (rank + 1) * rows)
            if name == "output":
                columns = module.weight.shape[1] // ways
                own = slice(rank * columns, (rank + 1) * columns)
                setattr(attention, name, _ReducedLinear(module, own))
            else:
                module.weight = nn.Parameter(module.weight.detach()[own].clone())
                module.bias = nn.Parameter(module.bias.detach()[own].clone())
        attention.num_heads //= ways
        first, second = (m for m in feed_forward.children() if isinstance(m, nn.Linear))
        names = [n for n, m in feed_forward.named_children() if isinstance(m, nn.Linear)]
        rows = first.weight.shape[0] // ways
        own = slice(rank * rows, (rank + 1) * rows)
        first.weight = nn.Parameter(first.weight.detach()[own].clone())
        first.bias = nn.Parameter(first.bias.detach()[own].clone())
        setattr(feed_forward, names[1], _ReducedLinear(second, own))
        for owner in (attention, feed_forward):
            owner.register_forward_pre_hook(lambda _module, args: (_Copy.apply(args[0]), *args[1:]))
    return model


def _eager_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(*args, **kwargs).backward()

    return step


def _pairs(ours: Callable[[], None], theirs: Callable[[], None], *, repeats: int) -> dict[str, Any]:
    """Times in turns A B A B, after warm-up; ratio ours / theirs pair by pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for side, step in enumerate((ours, theirs)):
            if dist.get_world_size() > 1:
                dist.barrier()
            start = time.perf_counter()
            step()
            if dist.get_world_size() > 1:
                dist.barrier()
            if turn >= 2:
                times[side].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    return {
        "ours_median_s": statistics.median(times[0]),
        "baseline_median_s": statistics.median(times[1]),
        "ratio_of_medians": statistics.median(times[0]) / statistics.median(times[1]),
        "ratio_median": statistics.median(ratios),
        "ratio_p10": ratios[len(ratios) // 10],
        "ratio_p90": ratios[-1 - len(ratios) // 10],
        "n": repeats,
    }


def _work(rank: int, world: int, port: int, size: str, repeats: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    reference, batch = SIZES[size]
    source = resolve_model(reference)
    model = source.build("float32", "cpu", seed=0)
    args, kwargs = source.example_inputs(batch, None, "cpu", seed=1)
    captured = capture(model, args, kwargs, name=reference)
    prepared = prepare(captured.graph)
    data = captured.flatten_data(args, kwargs)
    local_args, local_kwargs = source.example_inputs(batch // world, None, "cpu", seed=1)

    def ours(mesh: Mesh, zero: int = 0) -> Callable[[], None]:
        plan = hand_plan(prepared, reference=reference, batch=batch, mesh=mesh, zero=zero)
        session = RankSession(
            lower_plan(prepared, plan, stage=0)[0],
            layout_of(plan),
            source_of(model, captured.constants),
            rank=rank,
            schedule=plan.schedule,
            num_microbatches=1,
            optimizer=plan.job.optimizer,
            device=torch.device("cpu"),
        )
        local = session.local_batch(data)
        return lambda: session.step(local, update=False) and None

    comparisons: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    if world == 1:
        eager = _eager_step(copy.deepcopy(model), args, kwargs)
        comparisons["eager, one process"] = (ours(Mesh()), eager)
    else:
        ddp = DistributedDataParallel(copy.deepcopy(model))
        comparisons["DDP"] = (
            ours(Mesh(dp_replicate=world)),
            _eager_step(ddp, local_args, local_kwargs),
        )
        sharded = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (world,))
        for block in sharded.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        comparisons["FSDP2"] = (
            ours(Mesh(dp_shard=world), zero=3),
            _eager_step(sharded, local_args, local_kwargs),
        )
        by_hand = hand_tensor_parallel(copy.deepcopy(model), rank, world)
        comparisons["hand-written TP"] = (
            ours(Mesh(tp=world)),
            _eager_step(by_hand, args, kwargs),
        )
    rows = {
        name: _pairs(mine, theirs, repeats=repeats) for name, (mine, theirs) in comparisons.items()
    }
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("-o", "--output", default="benchmarks/results/lowered_program.json")
    options = parser.parse_args()
    results: dict[str, Mapping[str, Any]] = {}
    for size in options.sizes.split(","):
        for world in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "rows.json")
                port = 29500 + os.getpid() % 1000 + world
                mp.spawn(
                    _work, args=(world, port, size, options.repeats, out), nprocs=world, join=True
                )
                for name, row in json.loads(Path(out).read_text()).items():
                    results[f"{size}: {name}"] = row
                    print(
                        f"{size:6} {name:22} ratio {row['ratio_median']:.3f} "
                        f"[{row['ratio_p10']:.3f}, {row['ratio_p90']:.3f}]  "
                        f"ours {row['ours_median_s'] * 1e3:.1f} ms, "
                        f"theirs {row['baseline_median_s'] * 1e3:.1f} ms"
                    )
    document = {
        **heading("lowered program / baseline, forward and backward, pair by pair"),
        "rows": results,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
