"""A model's segments and steps: all of the graph is timed, and the figures say what they are."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from meshwright.capture import capture, execute
from meshwright.capture.references import resolve_model
from meshwright.errors import BadModel, DoesNotFit
from meshwright.plans.plan import JobSpec, OptimizerName, OptimizerSpec, Precision
from meshwright.profiling import models
from meshwright.profiling.figures import Figure, Note, to_record
from meshwright.profiling.models import measure_model
from meshwright.profiling.segments import SHARED, PieceTiming, pieces_of, time_pieces
from meshwright.profiling.timer import Effort, Timer, clock_of
from meshwright.records.kinds import Kind
from meshwright.spmd.prepared import prepare

GPT = "tiny-gpt?hidden=32&num_layers=3&seq_len=8&vocab_size=64"
QUICK = Effort(budget_s=0.01, min_repeats=1, max_repeats=1, warmup_calls=1, warmup_s=0)


@pytest.mark.parametrize("reference", [GPT, "tiny-clip", "tiny-mlp"])
def test_the_pieces_cover_the_graph(reference: str) -> None:
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(2, None)
    prepared = prepare(capture(source.build(), args, kwargs).graph)
    pieces = pieces_of(prepared.graph, prepared.segmentation)

    counted = Counter[object]()
    for piece in pieces:
        counted[piece.phase] += piece.multiplicity * len(piece.ops)
    assert Counter(op.phase for op in prepared.graph.ops) == counted
    assert all({prepared.graph.ops[i].phase for i in p.ops} == {p.phase} for p in pieces)
    classes = {piece.segment_class for piece in pieces} - {SHARED}
    assert set(range(prepared.segmentation.num_classes)) == classes


def test_every_piece_is_timed_once_and_the_graph_is_left_whole() -> None:
    """The operators run again for the Timer draw on values that the walk has to keep till then."""
    source = resolve_model(GPT)
    args, kwargs = source.example_inputs(2, None, "cpu", seed=0)
    captured = capture(source.build(), *source.example_inputs(2, None))
    prepared = prepare(captured.graph)
    inputs = captured.graph_inputs(source.build(device="cpu", seed=0), args, kwargs)
    pieces = pieces_of(prepared.graph, prepared.segmentation)
    before = execute(prepared.graph, inputs)
    timed: list[PieceTiming] = []
    time_pieces(
        prepared.graph, pieces, inputs, Timer(clock_of("cpu"), effort=QUICK), on_piece=timed.append
    )

    assert Counter(pieces) == Counter(timing.piece for timing in timed)
    assert all(timing.measured.timing.median_s > 0 for timing in timed)
    assert any(timing.peak_bytes > 0 for timing in timed)
    torch.testing.assert_close(before.loss, execute(prepared.graph, inputs).loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [(Precision.FP32, OptimizerName.ADAMW), (Precision.BF16, OptimizerName.SGD)],
)
def test_a_model_gives_segments_a_step_and_memory(
    precision: Precision, optimizer: OptimizerName
) -> None:
    figures: list[Figure] = []

    def emit(message: Figure | Note) -> None:
        if isinstance(message, Figure):
            figures.append(message)

    job = JobSpec(global_batch=2, precision=precision, optimizer=OptimizerSpec(name=optimizer))
    summary = measure_model(GPT, job, device="cpu", budget_s=0.5, emit=emit)
    records = [to_record(figure, device="cpu", verb="profile model") for figure in figures]
    segments = [record for record in records if record.kind == Kind.SEGMENT_TIME]
    (step,) = (record for record in records if record.kind == Kind.STEP_TIME)
    causes = {record.extra["cause"] for record in records if record.kind == Kind.MEMORY}

    total_s = sum(float(item.median) * int(item.extra["multiplicity"] or 0) for item in segments)
    assert pytest.approx(total_s) == summary.segments_s
    assert {"fwd", "bwd"} == {record.extra["direction"] for record in segments}
    assert str(precision) == step.extra["precision"]
    assert summary.step_s == step.median
    assert {"parameter", "gradient", "optimizer", "peak"} == causes
    assert 0.05 < summary.ratio < 20


def test_memory_of_a_step_is_at_least_that_of_the_gradients() -> None:
    """fp32 and AdamW: as many bytes of gradients as of parameters, twice as many of state."""
    held: dict[str, float] = {}  # the step's come before those of segments

    def emit(message: Figure | Note) -> None:
        if isinstance(message, Figure) and "cause" in message.extra:
            held.setdefault(str(message.extra["cause"]), message.median)

    measure_model(GPT, JobSpec(global_batch=2), device="cpu", budget_s=0.1, emit=emit)

    assert held["parameter"] == held["gradient"]
    assert 2 * held["parameter"] <= held["optimizer"] < 2.1 * held["parameter"]
    assert held["peak"] >= held["gradient"]


def test_a_model_that_cannot_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(DoesNotFit, match=r"gpt3-175b needs at least 1\.\d TiB"):
        measure_model(
            "gpt3-175b",
            JobSpec(global_batch=1, seq_len=16),
            device="cpu",
            budget_s=1,
            emit=lambda message: None,
        )


def test_a_model_nobody_knows_is_refused() -> None:
    with pytest.raises(BadModel, match="no built-in model 'no-such-model'"):
        measure_model(
            "no-such-model",
            JobSpec(global_batch=1),
            device="cpu",
            budget_s=1,
            emit=lambda message: None,
        )


def test_ctrl_c_in_the_step_keeps_memory_and_the_repeats_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps before the Timer, its first and one to warm up; the 21st is interrupted."""
    calls = 0
    run_step = models._Step.__call__

    def step(self: models._Step) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        run_step(self)

    patient = partial(
        Effort, min_repeats=100, min_repeat_s=1e-9, warmup_calls=1, warmup_s=0, max_calls=1
    )
    monkeypatch.setattr(models._Step, "__call__", step)
    monkeypatch.setattr(models, "Effort", patient)
    figures: list[Figure] = []

    def emit(message: Figure | Note) -> None:
        if isinstance(message, Figure):
            figures.append(message)

    with pytest.raises(KeyboardInterrupt):
        measure_model(GPT, JobSpec(global_batch=2), device="cpu", budget_s=60.0, emit=emit)

    assert [Kind.MEMORY] * 4 + [Kind.STEP_TIME] == [figure.kind for figure in figures]
    assert 16 == len(figures[-1].values)
    assert "interrupted" in figures[-1].method
