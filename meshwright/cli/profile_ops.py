"""``meshwright profile ops``: time operators over sizes and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import Output, output_for
from meshwright.cli.profile_progress import sweep_progress
from meshwright.cli.profile_ranks import StoreOption, open_store, parse_bytes, parse_counts
from meshwright.errors import BadRequest
from meshwright.units import format_seconds

if TYPE_CHECKING:
    from meshwright.profiling.operators import Candidate, DtypeName, SweepResult
    from meshwright.profiling.operators.models import Uncovered
    from meshwright.records import RecordStore

__all__ = ["ops"]

_NUM_SHAPES = 32
_MEMORY_SHARE = 0.4
"""Of what is free on the device, that one operator may take."""
_EFFORT_S = (0.2, 1.0)
"""Seconds for one candidate, least and most."""
_INTERRUPTED = 130


class _DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


_DeviceOption = Annotated[
    _DeviceKind | None, typer.Option(help="Where; the GPU where there is one.")
]
_DtypeOption = Annotated[
    str | None,
    typer.Option(help="Of fp32,tf32,bf16,fp16,fp8; all the device has, by default."),
]
_OpOption = Annotated[
    str | None, typer.Option(help="Only these, such as linear,sdpa; all by default.")
]
_ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="Measure the sizes of this model; may be repeated.", metavar="MODEL"),
]
_SeqLenOption = Annotated[
    int | None, typer.Option(help="Tokens per sample; the model's own by default.")
]
_ShapesOption = Annotated[
    int | None, typer.Option(help="Sizes drawn for each operator; 32, or none with --model.")
]
_CompiledOption = Annotated[
    bool, typer.Option("--compiled", help="Measure through torch.compile beside eager.")
]
_FlushOption = Annotated[
    bool, typer.Option("--flush-cache", help="Overwrite the caches before each repeat.")
]
_CpuTimeOption = Annotated[
    bool,
    typer.Option(
        "--cpu-time", help="Count the processor's time: others count less. One thread only."
    ),
]
_MemoryOption = Annotated[str | None, typer.Option(help="Most memory of one operator, such as 2g.")]


def ops(
    store: StoreOption,
    device: _DeviceOption = None,
    budget: Annotated[str, typer.Option(help="Longest time to measure, such as 8m.")] = "2m",
    dtype: _DtypeOption = None,
    op: _OpOption = None,
    model: _ModelOption = None,
    tp: Annotated[
        str | None, typer.Option(help="Tensor-parallel degrees that cut the model; 1.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples of the model on one device.")] = 4,
    seq_len: _SeqLenOption = None,
    shapes: _ShapesOption = None,
    seed: Annotated[int, typer.Option(help="Of the sizes drawn.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; torch's own choice.")] = None,
    compiled: _CompiledOption = False,
    flush_cache: _FlushOption = False,
    cpu_time: _CpuTimeOption = False,
    memory: _MemoryOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time operators, forward and backward, over sizes where models live.

    What the store already holds of this machine and software is not measured again; Ctrl-C ends
    the sweep like the end of the budget, and nothing measured is lost.
    """
    budget_s = parse_duration_s(budget)
    degrees = parse_counts(tp, option="--tp") or (1,)
    _check_counts(batch=batch, shapes=shapes, threads=threads, seed=seed)
    max_bytes = None if memory is None else parse_bytes(memory, option="--memory")
    if tp is not None and not model:
        raise BadRequest("--tp: cuts a model; give --model too")
    with output_for(as_json=json_output) as out:
        bench = _Bench(
            device=device, threads=threads, flush_cache=flush_cache, cpu_time=cpu_time, seed=seed
        )
        dtypes = bench.dtypes(dtype)
        kept = open_store(store)
        uncovered: dict[str, Sequence[Uncovered]] = {}
        candidates: list[Candidate] = []
        for reference in model or ():
            found = _of_model(out, reference, degrees, batch, seq_len, dtypes)
            candidates.extend(found.candidates)
            uncovered[reference] = found.uncovered
        num_shapes = shapes if shapes is not None else 0 if model else _NUM_SHAPES
        candidates.extend(bench.drawn(dtypes, num_shapes))
        candidates = bench.chosen(candidates, op=op, compiled=compiled)
        result = bench.sweep(out, candidates, kept=kept, budget_s=budget_s, max_bytes=max_bytes)
        _say(out, result, uncovered, store)
        out.document(_document(result, uncovered, store, bench))
    if result.is_interrupted:
        raise typer.Exit(_INTERRUPTED)


def _check_counts(*, batch: int, shapes: int | None, threads: int | None, seed: int) -> None:
    for name, value, least in (
        ("--batch", batch, 1),
        ("--shapes", shapes, 0),
        ("--threads", threads, 1),
        ("--seed", seed, 0),
    ):
        if value is not None and value < least:
            raise BadRequest(f"{name}: {value} is too small; give {least} or more")


def _of_model(
    out: Output,
    reference: str,
    degrees: Sequence[int],
    batch: int,
    seq_len: int | None,
    dtypes: Sequence[DtypeName],
) -> Any:
    from meshwright.profiling.operators.models import model_operators

    out.progress(f"capturing {reference}")
    return model_operators(
        reference, tensor_parallel=degrees, batch=batch, seq_len=seq_len, dtypes=dtypes
    )


class _Bench:
    """The device, and what it can measure."""

    def __init__(
        self,
        *,
        device: _DeviceKind | None,
        threads: int | None,
        flush_cache: bool,
        cpu_time: bool,
        seed: int,
    ) -> None:
        import torch

        has_cuda = torch.cuda.is_available()
        if device is _DeviceKind.CUDA and not has_cuda:
            raise BadRequest("--device: torch sees no CUDA device; use --device cpu")
        self.device = str(device or (_DeviceKind.CUDA if has_cuda else _DeviceKind.CPU))
        if threads is not None:
            torch.set_num_threads(threads)
        self.num_threads = torch.get_num_threads() if self.device == "cpu" else None
        self.flush_cache = flush_cache
        self.cpu_time = cpu_time
        self.seed = seed
        if cpu_time and self.num_threads != 1:
            raise BadRequest("--cpu-time: is right for one thread of the CPU; give --threads 1")

    def dtypes(self, given: str | None) -> list[DtypeName]:
        """Those asked for; by default all the device has, of a CPU those it is fast in."""
        from meshwright.profiling.operators import DtypeName
        from meshwright.profiling.operators.running import dtype_problem

        if given is None:
            if self.device == "cpu":
                return [DtypeName.FP32, DtypeName.BF16]
            return [name for name in DtypeName if not dtype_problem(name, self.device)]
        words = [word.strip().lower() for word in given.split(",")]
        for word in words:
            if word not in list(DtypeName):
                raise BadRequest(f"--dtype: no dtype {word!r}; use {', '.join(DtypeName)}")
            if problem := dtype_problem(DtypeName(word), self.device):
                raise BadRequest(f"--dtype: {word}: {problem}")
        return [DtypeName(word) for word in words]

    def drawn(self, dtypes: Sequence[DtypeName], num_shapes: int) -> list[Candidate]:
        """Candidates with sizes drawn where models live."""
        from meshwright.profiling.operators import FAMILIES, Limits, sampled_candidates

        return sampled_candidates(
            list(FAMILIES),
            dtypes,
            num_shapes=num_shapes,
            limits=Limits.of_device(self.device),
            seed=self.seed,
        )

    def chosen(
        self, candidates: Sequence[Candidate], *, op: str | None, compiled: bool
    ) -> list[Candidate]:
        """Those of the operators asked for, compiled ones beside them where asked for."""
        import dataclasses

        from meshwright.profiling.operators import FAMILIES
        from meshwright.profiling.operators.running import compiler_problem

        names = list(FAMILIES) if op is None else [word.strip() for word in op.split(",")]
        for name in names:
            if name not in FAMILIES:
                raise BadRequest(f"--op: no operator {name!r}; use {', '.join(FAMILIES)}")
        found = [candidate for candidate in candidates if candidate.op in names]
        if compiled:
            if problem := compiler_problem(self.device):
                raise BadRequest(f"--compiled: {problem}")
            found.extend([dataclasses.replace(item, compiled=True) for item in found])
        return found

    def sweep(
        self,
        out: Output,
        candidates: Sequence[Candidate],
        *,
        kept: RecordStore,
        budget_s: float,
        max_bytes: int | None,
    ) -> SweepResult:
        """Measure what the store does not hold yet."""
        from meshwright.profiling.operators import (
            OperatorBench,
            SweepPlan,
            measured_here,
            run_sweep,
        )
        from meshwright.profiling.operators.running import free_bytes, problem_within
        from meshwright.profiling.timer import Effort
        from meshwright.records import Kind, describe_machine, describe_software

        records, problems = kept.query(kind=Kind.OPERATOR)
        for problem in problems:
            out.progress(problem)
        bench = OperatorBench(
            device=self.device,
            effort=Effort(budget_s=_effort_s(budget_s, len(candidates))),
            flush_cache=self.flush_cache,
            processor_time=self.cpu_time,
            keep_memory=True,
            seed=self.seed,
        )
        known = measured_here(
            records,
            candidates,
            device=bench.device_name,
            machine=describe_machine(),
            software=describe_software(),
            conditions=bench.conditions,
        )
        most_bytes = max_bytes or int(_MEMORY_SHARE * free_bytes(self.device))
        with sweep_progress(budget_s=budget_s) as progress:
            return run_sweep(
                SweepPlan(
                    candidates=candidates,
                    measure=bench.measure,
                    sink=lambda record: kept.append([record]),
                    device=self.device,
                    budget_s=budget_s,
                    known=known,
                    problem=problem_within(self.device, most_bytes),
                    progress=progress,
                )
            )


def _effort_s(budget_s: float, num_candidates: int) -> float:
    """Seconds for one candidate: twice its share of the budget, for many are done before."""
    least_s, most_s = _EFFORT_S
    return min(most_s, max(least_s, 2 * budget_s / max(1, num_candidates)))


def _reasons(result: SweepResult) -> list[tuple[str, int, list[str]]]:
    """Why candidates were skipped: reason, how many, which operators."""
    counts: Counter[str] = Counter(item.reason for item in result.skipped)
    names: dict[str, set[str]] = {}
    for item in result.skipped:
        names.setdefault(item.reason, set()).add(item.candidate.op)
    return [(reason, count, sorted(names[reason])) for reason, count in counts.most_common()]


def _say(
    out: Output, result: SweepResult, uncovered: dict[str, Sequence[Uncovered]], store: str
) -> None:
    words = f"{result.num_measured} measured in {format_seconds(result.seconds)}"
    if result.num_known:
        words += f", {result.num_known} known from before"
    if result.num_left:
        words += f", {result.num_left} left for another time"
    out.say(f"{words}; records in {store}")
    for line in _skipped_lines(result):
        out.say(line)
    for reference, rows in uncovered.items():
        share = sum(row.traffic_fraction for row in rows)
        out.say(f"{reference}: operators no family covers, {100 * share:.2f} % of the traffic:")
        for row in rows:
            where = f"{row.count} in the {row.phase} pass"
            out.say(f"  {row.target}: {where}, {100 * row.traffic_fraction:.2f} %")
    if result.is_interrupted:
        out.say("interrupted; run it again to go on")
    elif result.stopped_by:
        out.say(f"stopped: {result.stopped_by}; run it again to go on")


def _stopped_by(result: SweepResult) -> str | None:
    """Why the sweep ended before everything was measured; None where it did not."""
    if result.is_interrupted:
        return "interrupted"
    return result.stopped_by or ("budget" if result.num_left else None)


def _skipped_lines(result: SweepResult) -> Iterator[str]:
    for reason, count, names in _reasons(result):
        yield f"skipped {count} ({', '.join(names)}): {reason}"


def _document(
    result: SweepResult, uncovered: dict[str, Sequence[Uncovered]], store: str, bench: _Bench
) -> dict[str, Any]:
    import dataclasses

    return {
        "store": store,
        "device": bench.device,
        "num_threads": bench.num_threads,
        "measured": result.num_measured,
        "known": result.num_known,
        "left": result.num_left,
        "seconds": result.seconds,
        "interrupted": result.is_interrupted,
        "stopped_by": _stopped_by(result),
        "skipped": [
            {"reason": reason, "count": count, "ops": names}
            for reason, count, names in _reasons(result)
        ],
        "uncovered": {
            reference: [dataclasses.asdict(row) for row in rows]
            for reference, rows in uncovered.items()
        },
    }
