"""Every operator family runs, forward, backward and update, and becomes a Record."""

from __future__ import annotations

import pytest
import torch

from meshwright.profiling.operators import FAMILIES, Candidate, Direction, DtypeName, OperatorBench
from meshwright.profiling.operators.candidate import key_of_record
from meshwright.profiling.operators.catalog import DIM_NAMES
from meshwright.profiling.operators.family import Maker
from meshwright.profiling.operators.running import (
    candidate_problem,
    compiler_problem,
    estimated_bytes,
    make_step,
    problem_within,
)
from meshwright.profiling.timer import Effort

TINY: dict[str, dict[str, int | bool | str]] = {
    "linear": {"m": 16, "n": 32, "k": 16},
    "bmm": {"b": 2, "m": 4, "n": 3, "k": 5},
    "grouped_mm": {"m": 16, "n": 8, "k": 8, "experts": 2},
    "sdpa": {
        "b": 1, "seq_q": 8, "seq_k": 8, "heads": 4, "kv_heads": 2, "head_dim": 8, "causal": True,
    },
    "rope": {"m": 4, "n": 16, "head_dim": 8},
    "embedding": {"m": 4, "n": 8, "k": 16},
    "lm_head_loss": {"m": 4, "n": 8, "k": 16},
    "sum": {"m": 4, "n": 6, "variant": "over_rows"},
    "conv2d": {
        "b": 1, "channels_in": 2, "channels_out": 4, "kernel": 3, "stride": 2, "height": 9,
        "width": 9, "groups": 1,
    },
    "batch_norm": {"b": 2, "channels_in": 3, "height": 4, "width": 4},
    "pool": {
        "b": 1, "channels_in": 2, "height": 8, "width": 8, "kernel": 3, "stride": 2,
        "variant": "max",
    },
    "copy": {"m": 4, "n": 6, "variant": "strided"},
    "cast": {"m": 4, "n": 6, "variant": "to_bf16"},
    "random": {"numel": 8, "variant": "bernoulli"},
    "adam": {"numel": 10, "num_tensors": 3, "variant": "fused"},
    "adamw": {"numel": 10, "num_tensors": 3, "variant": "foreach"},
    "sgd": {"numel": 10, "num_tensors": 3, "variant": "fused"},
}  # fmt: skip

CASES = [(name, direction) for name, family in FAMILIES.items() for direction in family.directions]
BENCH = OperatorBench(device="cpu", effort=Effort(budget_s=1e-3, min_repeat_s=1e-5, warmup_s=0.0))


def tiny(
    name: str, direction: Direction, dtype: DtypeName = DtypeName.FP32, *, compiled: bool = False
) -> Candidate:
    dims = TINY.get(name, {"m": 4, "n": 6})
    return FAMILIES[name].candidate(dims, direction, dtype, compiled=compiled)


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_every_family_runs_in_every_direction(name: str, direction: Direction) -> None:
    candidate = tiny(name, direction)
    record = BENCH.measure(candidate)

    assert record.median > 0
    assert candidate.key == key_of_record(record, DIM_NAMES)
    assert FAMILIES[name].work_of(candidate) == (record.extra["flops"], record.extra["bytes"])
    assert len(record.samples) == record.num_repeats
    assert ("cpu", "s") == (record.device, record.unit)


def test_conditions_stand_in_the_record() -> None:
    bench = OperatorBench(
        device="cpu", effort=Effort(budget_s=1e-3), flush_cache=True, processor_time=True
    )
    record = bench.measure(tiny("add", Direction.FWD))

    assert (True, "process_time", 1) == tuple(
        record.extra[name] for name in ("cache_flushed", "clock", "num_calls")
    )
    assert torch.get_num_threads() == record.extra["num_threads"]
    assert "cache flushed" in record.method


@pytest.mark.parametrize("name", ["linear", "sdpa", "layer_norm", "embedding", "adamw"])
def test_bf16_runs_where_the_host_computes_in_it(name: str) -> None:
    direction = FAMILIES[name].directions[-1]

    assert "bf16" == BENCH.measure(tiny(name, direction, DtypeName.BF16)).extra["dtype"]


def test_backward_is_that_of_every_differentiable_input() -> None:
    """Y = x w': of all ones dx is the sum of w over rows, dw that of x; here with ones of y."""
    candidate = tiny("linear", Direction.BWD)
    built = FAMILIES["linear"].build(candidate.sizes, Maker(DtypeName.FP32, "cpu", 0))
    x, w = built.inputs
    step = make_step(FAMILIES["linear"], candidate, device="cpu", seed=0)
    dx, dw = step.call()  # type: ignore[misc]

    assert (x.shape, w.shape) == (dx.shape, dw.shape)
    # Both are products with the same gradient: <dx, x> = <dy, y> = <dw, w>.
    assert torch.allclose((dx * x).sum(), (dw * w).sum(), rtol=1e-4)


def test_inputs_depend_on_the_seed_alone() -> None:
    first, again, other = (Maker(DtypeName.FP32, "cpu", seed).normal(5) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_optimizer_steps_change_every_parameter_each_time() -> None:
    family = FAMILIES["adamw"]
    dims = {"numel": 10, "num_tensors": 3, "variant": "fused"}
    made: list[torch.Tensor] = []

    class Noting(Maker):
        def normal(self, *shape: int, grad: bool = True) -> torch.Tensor:
            made.append(super().normal(*shape, grad=grad))
            return made[-1]

    built = family.build(dims, Noting(DtypeName.FP32, "cpu"))
    before = [tensor.detach().clone() for tensor in made]
    built.call()

    assert [3, 3, 4] == [tensor.numel() for tensor in made]
    assert all(not torch.equal(old, new) for old, new in zip(before, made, strict=True))


@pytest.mark.parametrize(
    ("name", "direction", "dtype", "reason"),
    [
        ("linear", Direction.FWD, DtypeName.TF32, "the CPU has no TF32"),
        ("gelu", Direction.FWD, DtypeName.FP8, "gelu has no fp8"),
        ("linear", Direction.BWD, DtypeName.FP8, "fp8 is measured forward only"),
        ("cast", Direction.FWD, DtypeName.BF16, "a cast of bf16 to_bf16 does nothing"),
        ("linear", Direction.FWD, DtypeName.FP32, ""),
    ],
)
def test_what_cannot_be_measured_is_named(
    name: str, direction: Direction, dtype: DtypeName, reason: str
) -> None:
    assert reason == candidate_problem(tiny(name, direction, dtype), device="cpu")


def test_what_needs_too_much_memory_is_named() -> None:
    """Forward in fp32: (16x16 + 32x16 + 16x32) x 4 = 5120 bytes, counted twice for safety."""
    candidate = tiny("linear", Direction.FWD)

    assert 2 * 5120 == estimated_bytes(candidate)
    assert "" == problem_within("cpu", 2 * 5120)(candidate)
    assert "needs more than the" in problem_within("cpu", 2 * 5120 - 1)(candidate)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)

    assert "needs a C++ compiler, and there is none; install g++" in compiler_problem("cpu")


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_problem("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("direction", [Direction.FWD, Direction.BWD])
def test_compiled_operators_run_again_and_again(direction: Direction) -> None:
    record = BENCH.measure(tiny("gelu", direction, compiled=True))

    assert record.extra["compiled"] is True
    assert record.median > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_runs_on_a_gpu(name: str) -> None:
    bench = OperatorBench(device="cuda", effort=Effort(budget_s=0.01))
    for direction in FAMILIES[name].directions:
        for dtype in DtypeName:
            candidate = tiny(name, direction, dtype)
            if not candidate_problem(candidate, device="cuda"):
                assert 0 < bench.measure(candidate).median < 0.1
