"""``meshwright profile model``: the segments and the steps of one model on one device."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meshwright.cli.options import JsonOption, job_of, parse_duration_s
from meshwright.cli.output import Output, output_for
from meshwright.cli.profile_ranks import StoreOption, device_name, figure_document, open_store
from meshwright.cluster.detect import detect_gpus
from meshwright.errors import BadRequest
from meshwright.plans import OptimizerName, Precision
from meshwright.profiling.figures import Figure, Note, to_record
from meshwright.profiling.keeper import Keeper
from meshwright.units import format_seconds

__all__ = ["model"]

_VERB = "profile model"
_MOST_THREADS = 1024


def model(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL", help="Built-in name, package.module:callable, folder.")
    ],
    batch: Annotated[int, typer.Option(help="Samples of one step.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    precision: Annotated[Precision, typer.Option(help="Of parameters.")] = Precision.FP32,
    optimizer: Annotated[OptimizerName, typer.Option(help="What updates.")] = OptimizerName.ADAMW,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of the CPU; a rank of cpu:N has one.")] = 1,
    cpu_time: Annotated[
        bool, typer.Option(help="Count the processor's time: others count less. One thread only.")
    ] = False,
    budget: Annotated[str, typer.Option(help="Longest time to measure, such as 1m.")] = "30s",
    store: StoreOption = "meshwright-records",
    json_output: JsonOption = False,
) -> None:
    """Time a model's segments and whole steps on one device, and count their memory.

    The sum of the segments and the optimizer is compared with the step.
    """
    budget_s = parse_duration_s(budget)
    chosen = _device(device, threads, cpu_time)
    if batch < 1:
        raise BadRequest(f"--batch: {batch} samples; give a positive number")
    job = job_of(global_batch=batch, seq_len=seq_len, precision=precision, optimizer=optimizer)
    figures: list[Figure] = []
    with output_for(as_json=json_output) as out:
        import torch

        from meshwright.capture.references import resolve_model
        from meshwright.profiling.models import measure_model

        torch.set_num_threads(threads)
        name = device_name(chosen)
        resolve_model(reference)
        with Keeper(open_store(store)) as keeper:

            def emit(message: Figure | Note) -> None:
                if isinstance(message, Note):
                    out.progress(message.text)
                    return
                figures.append(message)
                keeper.keep(to_record(message, device=name, verb=_VERB))

            summary = measure_model(
                reference,
                job,
                device=chosen,
                budget_s=budget_s,
                emit=emit,
                processor_time=cpu_time,
            )
        _show(out, summary, figures, reference=reference, device=name, store=store)


def _device(device: str | None, threads: int, cpu_time: bool) -> str:
    """``cpu`` or ``cuda``, where this machine has it.

    Raises:
        BadRequest: it has not, or the options contradict each other.
    """
    num_gpus = len(detect_gpus())
    chosen = device or ("cuda" if num_gpus else "cpu")
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not num_gpus):
        raise BadRequest(f"--device: this machine has no device {chosen!r}; use cpu")
    if not 1 <= threads <= _MOST_THREADS:
        raise BadRequest(f"--threads: {threads} is not 1 to {_MOST_THREADS}")
    if cpu_time and (threads != 1 or chosen != "cpu"):
        raise BadRequest("--cpu-time: is right for one thread of the CPU; give --threads 1")
    return chosen


def _show(
    out: Output, summary: Any, figures: list[Figure], *, reference: str, device: str, store: str
) -> None:
    out.say(
        f"{summary.num_segments} segments of {summary.num_classes} kinds: "
        f"{format_seconds(summary.segments_s)}; optimizer {format_seconds(summary.update_s)}; "
        f"step {format_seconds(summary.step_s)}; segments and optimizer over step "
        f"{summary.ratio:.2f}"
    )
    out.say(f"{len(figures)} records go to {store}")
    out.document(
        {
            "model": reference,
            "device": device,
            "store": store,
            "segments_s": summary.segments_s,
            "update_s": summary.update_s,
            "step_s": summary.step_s,
            "ratio": summary.ratio,
            "figures": [figure_document(figure) for figure in figures],
        }
    )
