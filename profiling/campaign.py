"""One measurement campaign of one device, shared out over a budget by what is known least.

First the device's own figures; then operators whose training times are published nowhere
(attention, normalization, softmax, embeddings, grouped matrix products and optimizers, forward and
backward); then steps and segments of models; then operators at the exact sizes of models, cut by
tensor parallelism; then all other operators for as long as there is time.
Everything goes into the store as it comes; a campaign taken up again leaves out what is there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from meshwright.errors import BadRequest, PlannerError
from meshwright.plans import JobSpec, OptimizerName, OptimizerSpec, Precision
from meshwright.profiling.figures import Figure, Note, to_record
from meshwright.profiling.keeper import Keeper
from meshwright.profiling.models import measure_model
from meshwright.profiling.operators import (
    FAMILIES,
    Candidate,
    DtypeName,
    Limits,
    OperatorBench,
    SweepPlan,
    measured_here,
    run_sweep,
    sampled_candidates,
)
from meshwright.profiling.operators.models import model_operators
from meshwright.profiling.operators.running import free_bytes, problem_within
from meshwright.profiling.ranks import run_on_local_ranks
from meshwright.profiling.sweeps import MachineSweep, RankJob
from meshwright.profiling.timer import Effort
from meshwright.records import (
    Kind,
    Record,
    RecordStore,
    describe_machine,
    describe_software,
    writer_name,
)
from meshwright.strict_json import one_line
from meshwright.units import format_bytes, format_seconds

__all__ = ["CampaignResult", "ModelRun", "PartResult", "model_runs", "run_campaign"]

VERB = "profile campaign"

RARE_OPERATORS = (
    "sdpa", "adam", "adamw", "layer_norm", "rms_norm", "softmax", "embedding", "grouped_mm",
)  # fmt: skip
"""Those whose times in training, backward and on new devices, are published nowhere."""
_MANY_SHAPES = ("sdpa", "linear")
_MACHINE_SHARE = 0.06
_SHARES = {"cpu": (0.22, 0.44, 0.18), "cuda": (0.32, 0.26, 0.2)}
"""Of the budget: rare operators, models (a step takes a CPU seconds), operators of models."""
_MOST_MACHINE_S = 30.0
_MEMORY_SHARE = 0.4
"""Of what is free on the device, that one operator may take."""
_FATAL = ("CUDA error", "device-side assert")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """One model to measure."""

    reference: str
    batch: int
    seq_len: int | None = None
    precision: Precision = Precision.FP32
    least_s: float = 3.0
    """What capture, memory and one step take at least; it is not begun with less time left."""


@dataclass(slots=True, kw_only=True)
class PartResult:
    """What one part of the campaign did."""

    name: str
    seconds: float = 0.0
    num_records: int = 0
    num_left: int = 0
    """For which there was no time."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reasons, and how often."""

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that was not measured."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignResult:
    """What a campaign did."""

    device: str
    parts: tuple[PartResult, ...]
    seconds: float
    stopped_by: str
    """Why it ended before its time; empty where it did not."""

    @property
    def num_records(self) -> int:
        """Records added to the store."""
        return sum(part.num_records for part in self.parts)


_LLAMA_100M = (
    "tiny-llama?hidden=768&num_heads=12&num_kv_heads=4&ffn=2048&vocab_size=16000&seq_len=128"
)
"""With 12 layers it has 100 million parameters."""

_EXACT: dict[str, tuple[tuple[ModelRun, tuple[int, ...]], ...]] = {
    "cpu": (
        (ModelRun(reference="gpt2?num_layers=1", batch=1, seq_len=128), (4, 2, 1)),
        (ModelRun(reference=f"{_LLAMA_100M}&num_layers=1", batch=1), (4, 2, 1)),
        (ModelRun(reference="bert-base?num_layers=1", batch=1, seq_len=128), (4, 2)),
        (ModelRun(reference="resnet-50", batch=1), (1,)),
    ),
    "cuda": tuple(
        (ModelRun(reference=name, batch=batch), degrees)
        for name, batch, degrees in (
            ("gpt2-xl?num_layers=4", 8, (1, 2, 4)),
            ("llama3-8b?num_layers=2", 1, (1, 2, 4, 8)),
            ("bert-large", 32, (1, 2, 4)),
            ("vit-l16", 64, (1, 2)),
            ("resnet-50", 64, (1,)),
        )
    ),
}
"""Models whose operators are measured at their exact sizes, and the tensor-parallel degrees."""


class _FullError(Exception):
    """The records have reached the size they may have."""


class _FatalError(Exception):
    """After this nothing runs on the device any more."""


def model_runs(device: str) -> tuple[ModelRun, ...]:
    """GPT-2, Llama-like, BERT, ViT and ResNet at sizes that suit ``"cpu"`` or ``"cuda"``."""
    if device != "cuda":
        return (
            ModelRun(reference="gpt2", batch=1, seq_len=128, least_s=28.0),
            ModelRun(reference="bert-base", batch=1, seq_len=128, least_s=28.0),
            ModelRun(reference="vit-b16", batch=1, least_s=30.0),
            ModelRun(reference="resnet-50", batch=1, least_s=25.0),
            ModelRun(reference=f"{_LLAMA_100M}&num_layers=12", batch=1, least_s=28.0),
            ModelRun(
                reference="gpt2", batch=1, seq_len=128, precision=Precision.BF16, least_s=28.0
            ),
            *(
                ModelRun(reference=f"tiny-{name}", batch=8, precision=precision)
                for precision in (Precision.FP32, Precision.BF16)
                for name in ("gpt", "llama", "bert", "vit", "resnet")
            ),
        )
    both = (Precision.BF16, Precision.FP32)
    small = tuple(
        ModelRun(reference=name, batch=batch, seq_len=seq_len, precision=precision, least_s=least_s)
        for name, batch, seq_len, least_s in (
            ("gpt2", 8, 1024, 8.0),
            ("bert-base", 32, 512, 8.0),
            ("vit-b16", 64, None, 8.0),
            ("resnet-50", 64, None, 8.0),
            ("llama2-7b?num_layers=2", 2, 2048, 10.0),
        )
        for precision in both
    )
    return small + tuple(
        ModelRun(reference=name, batch=batch, seq_len=seq_len, precision=Precision.BF16, least_s=20)
        for name, batch, seq_len in (
            ("gpt2-xl", 4, 1024),
            ("llama3-8b?num_layers=4", 1, 4096),
            ("bert-large", 32, 512),
            ("vit-l16", 64, None),
            ("resnet-152", 64, None),
            ("gpt2-medium", 8, 1024),
        )
    )


def run_campaign(
    store: RecordStore,
    *,
    device: str,
    device_name: str,
    budget_s: float,
    max_bytes: int,
    processor_time: bool = False,
    num_shapes: int = 24,
    seed: int = 0,
    say: Callable[[str], None],
) -> CampaignResult:
    """Measure this machine for ``budget_s`` seconds; Ctrl-C ends it like the budget does.

    Args:
        store: Where everything goes, as it comes.
        device: ``"cpu"`` or ``"cuda"``.
        device_name: By the catalog's name.
        budget_s: For everything; a measurement begun is ended.
        max_bytes: Of all Records together, as JSON; in the store they take less.
        processor_time: On one thread of a CPU others use too: count the processor's time.
        num_shapes: Sizes drawn for each family of operators.
        seed: Of these and of data.
        say: Told what is done, in lines.

    Raises:
        BadRequest: the store cannot be written or read.
    """
    campaign = _Campaign(
        store=store,
        device=device,
        device_name=device_name,
        deadline_s=time.monotonic() + budget_s,
        left_bytes=max_bytes,
        processor_time=processor_time,
        num_shapes=num_shapes,
        seed=seed,
        say=say,
    )
    begin_s = time.monotonic()
    stopped_by = ""
    with Keeper(store) as keeper:
        campaign.keeper = keeper
        try:
            campaign.run(budget_s)
        except KeyboardInterrupt:
            stopped_by = "interrupted"
        except _FullError:
            stopped_by = f"{format_bytes(max_bytes)} of records"
        except _FatalError as error:
            stopped_by = str(error)
    return CampaignResult(
        device=device_name,
        parts=tuple(campaign.parts),
        seconds=time.monotonic() - begin_s,
        stopped_by=stopped_by,
    )


@dataclass(slots=True, kw_only=True)
class _Campaign:
    """The state of one campaign."""

    store: RecordStore
    device: str
    device_name: str
    deadline_s: float
    left_bytes: int
    processor_time: bool
    num_shapes: int
    seed: int
    say: Callable[[str], None]
    keeper: Keeper | None = None
    parts: list[PartResult] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def run(self, budget_s: float) -> None:
        rare_share, model_share, exact_share = _SHARES[self.device]
        rare = [name for name in FAMILIES if name in RARE_OPERATORS]
        others = [name for name in FAMILIES if name not in RARE_OPERATORS]
        self._part("machine", self._machine, min(_MOST_MACHINE_S, _MACHINE_SHARE * budget_s))
        self._part(
            "rare operators",
            lambda part, s: self._operators(part, s, self._drawn(rare)),
            rare_share * budget_s,
        )
        self._part("models", self._models, model_share * budget_s)
        self._part("operators of models", self._exact, exact_share * budget_s)
        self._part(
            "other operators",
            lambda part, s: self._operators(part, s, self._drawn(others)),
            self.left_s,
        )

    def _part(self, name: str, run: Callable[[PartResult, float], None], part_s: float) -> None:
        part = PartResult(name=name)
        self.parts.append(part)
        part_s = min(part_s, self.left_s)
        if part_s <= 0:
            return
        self.say(f"{name}: {format_seconds(part_s)}")
        begin_s = time.monotonic()
        try:
            run(part, part_s)
        finally:
            part.seconds = time.monotonic() - begin_s
            self.say(
                f"{name}: {part.num_records} records in {format_seconds(part.seconds)}"
                + (f", {part.num_left} left for want of time" if part.num_left else "")
            )

    def _keep(self, part: PartResult, record: Record) -> None:
        assert self.keeper is not None, "the campaign runs inside its keeper"
        self.left_bytes -= len(msgspec.json.encode(record))
        if self.left_bytes < 0:
            raise _FullError
        self.keeper.keep(record)
        part.num_records += 1

    def _emit(self, part: PartResult, message: Figure | Note) -> None:
        if isinstance(message, Figure):
            self._keep(part, to_record(message, device=self.device_name, verb=VERB))

    def _machine(self, part: PartResult, part_s: float) -> None:
        """With the threads given; on a CPU with all cores too."""
        counts = {torch.get_num_threads()}
        if self.device == "cpu":
            counts.add(describe_machine().num_cores)
        for num_threads in sorted(counts):
            job = RankJob(
                num_ranks=1,
                device=self.device,
                sweeps=(MachineSweep(budget_s=part_s / len(counts)),),
                num_threads=num_threads,
            )
            try:
                run_on_local_ranks(job, lambda message: self._emit(part, message))
            except BadRequest as error:
                part.skip(one_line(str(error)))
                self.say(str(error))

    def _operators(self, part: PartResult, part_s: float, candidates: Sequence[Candidate]) -> None:
        bench = OperatorBench(
            device=self.device,
            effort=Effort(budget_s=0.3, relative_half_width_fraction=0.02),
            processor_time=self.processor_time,
            seed=self.seed,
        )
        stored, _ = self.store.query(kind=Kind.OPERATOR)
        result = run_sweep(
            SweepPlan(
                candidates=candidates,
                measure=lambda candidate: msgspec.structs.replace(
                    bench.measure(candidate), writer=writer_name(VERB)
                ),
                sink=lambda record: self._keep(part, record),
                device=self.device,
                budget_s=part_s,
                known=measured_here(
                    stored,
                    candidates,
                    device=bench.device_name,
                    machine=describe_machine(),
                    software=describe_software(),
                    conditions=bench.conditions,
                ),
                problem=problem_within(self.device, int(_MEMORY_SHARE * free_bytes(self.device))),
            )
        )
        part.num_left += result.num_left
        for item in result.skipped:
            part.skip(f"{item.candidate.op}: {item.reason}")
        if result.stopped_by:
            raise _FatalError(result.stopped_by)
        if result.is_interrupted:
            raise KeyboardInterrupt

    def _drawn(self, names: Sequence[str]) -> list[Candidate]:
        dtypes = [DtypeName.BF16, DtypeName.FP32]
        limits = Limits.of_device(self.device)
        if self.device == "cuda":
            dtypes.append(DtypeName.TF32)
        else:
            limits = Limits(flop=limits.flop / 16, bytes=limits.bytes / 16)
        found: list[Candidate] = []
        for name in names:
            found += sampled_candidates(
                [name],
                dtypes,
                num_shapes=self.num_shapes * (3 if name in _MANY_SHAPES else 1),
                limits=limits,
                seed=self.seed,
            )
        return found

    def _exact(self, part: PartResult, part_s: float) -> None:
        """Operators of models at the sizes one device sees, an equal share of the time for each."""
        end_s = time.monotonic() + part_s
        waiting = list(_EXACT["cuda" if self.device == "cuda" else "cpu"])
        while waiting:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                part.num_left += len(waiting)
                return
            own_end_s = time.monotonic() + left_s / len(waiting)
            run, degrees = waiting.pop(0)
            self.say(f"operators of {run.reference}")
            try:
                found = model_operators(
                    run.reference,
                    tensor_parallel=degrees,
                    batch=run.batch,
                    seq_len=run.seq_len,
                    dtypes=[DtypeName.BF16, DtypeName.FP32],
                )
            except PlannerError as error:
                part.skip(f"{run.reference}: {error}")
                continue
            self._operators(part, own_end_s - time.monotonic(), found.candidates)

    def _models(self, part: PartResult, part_s: float) -> None:
        end_s = time.monotonic() + part_s
        waiting = [run for run in model_runs(self.device) if not self._is_known(run)]
        while waiting:
            run = waiting.pop(0)
            left_s = end_s - time.monotonic()
            if left_s < run.least_s:
                part.num_left += 1
                continue
            taken_s = run.least_s + sum(other.least_s for other in waiting)
            self._model(part, run, budget_s=max(1.0, (left_s - taken_s) / (len(waiting) + 1)))

    def _model(self, part: PartResult, run: ModelRun, *, budget_s: float) -> None:
        job = JobSpec(
            global_batch=run.batch,
            seq_len=run.seq_len,
            precision=run.precision,
            optimizer=OptimizerSpec(name=OptimizerName.ADAMW),
        )
        self.say(f"{run.reference}, batch {run.batch}, {run.precision}")
        try:
            measure_model(
                run.reference,
                job,
                device=self.device,
                budget_s=budget_s,
                emit=lambda message: self._emit(part, message),
                processor_time=self.processor_time,
            )
        except (PlannerError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            said = one_line(str(error))
            part.skip(f"{run.reference}: {said}")
            self.say(f"{run.reference}: {said}")
            if any(word in said for word in _FATAL):
                raise _FatalError(said) from error
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _is_known(self, run: ModelRun) -> bool:
        """Whether the store holds a step of the same model on the same device and software."""
        stored, _ = self.store.query(kind=Kind.STEP_TIME)
        software, machine = describe_software(), describe_machine()
        return any(
            record.name == run.reference
            and record.device == self.device_name
            and record.extra.get("batch") == run.batch
            and record.extra.get("precision") == str(run.precision)
            and record.machine.processor == machine.processor
            and record.software.packages.get("torch") == software.packages.get("torch")
            for record in stored
        )
