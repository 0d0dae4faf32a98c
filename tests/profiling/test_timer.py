"""The timer: how often it runs what, and what it says."""

from __future__ import annotations

import contextlib
import sys
import time
import types

import pytest

from meshwright.errors import BadRequest
from meshwright.profiling import timer


def test_warmup_is_not_measured_and_every_run_is_bracketed() -> None:
    calls: list[str] = []
    timing = timer.measure(
        lambda: calls.append("step"),
        warmup=1,
        repeats=2,
        synchronize=lambda: calls.append("wait"),
    )

    assert ["step", "wait", "step", "wait", "wait", "step", "wait"] == calls
    assert 2 == timing.num_repeats == len(timing.times_s)


def test_work_done_in_synchronize_counts() -> None:
    """A step that only enqueues is over when the synchronization after it is."""
    timing = timer.measure(lambda: None, warmup=0, repeats=3, synchronize=lambda: time.sleep(0.005))

    assert timing.p10_s >= 0.005


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 0), (-1, 1)])
def test_counts_that_make_no_sense_are_refused(warmup: int, repeats: int) -> None:
    with pytest.raises(BadRequest, match="timer: needs repeats >= 1"):
        timer.measure(lambda: None, warmup=warmup, repeats=repeats)


@pytest.fixture
def device_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called on a stand-in for torch.cuda, in order; its events are 2 ms apart."""
    calls: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, stop: Event) -> float:
            return 2.0 if stop is not self else 0.0

    def enter(device: str) -> contextlib.nullcontext[None]:
        calls.append(device)
        return contextlib.nullcontext()

    def spin(num_cycles: int) -> None:
        calls.append("spin")
        assert num_cycles > 0

    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Event=Event,
        synchronize=lambda: calls.append("synchronize"),
        device=enter,
        _sleep=spin,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return calls


def test_on_cuda_events_bracket_the_step(device_calls: list[str]) -> None:
    timing = timer.measure(
        lambda: device_calls.append("step"), warmup=0, repeats=1, device="cuda:1"
    )

    assert ["cuda:1", "synchronize", "record", "step", "record", "synchronize"] == device_calls
    assert 0.002 == timing.median_s


def test_a_spinning_kernel_holds_the_queue_as_soon_as_launching_is_known(
    device_calls: list[str],
) -> None:
    clock = timer.CudaClock("cuda", hold_queue=True)

    def step() -> None:
        device_calls.append("step")

    first_s = clock.time_s(step, num_calls=2, before=None)
    first = list(device_calls)
    device_calls.clear()
    second_s = clock.time_s(step, num_calls=2, before=lambda: device_calls.append("flush"))

    assert ["cuda", "synchronize", "record", "step", "step", "record", "synchronize"] == first
    assert [
        "cuda", "synchronize", "flush", "spin", "record", "step", "step", "record", "synchronize",
    ] == device_calls  # fmt: skip
    assert (0.002, 0.002) == (first_s, second_s)


@pytest.mark.gpu
def test_cuda_events_time_the_device() -> None:
    """A step returns at once; the events see the milliseconds the device works on it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix = torch.ones(8192, 8192, device="cuda")
    timing = timer.measure(lambda: matrix @ matrix, warmup=2, repeats=5, device="cuda")

    assert timing.median_s > 1e-3


@pytest.mark.gpu
def test_a_held_queue_hides_launching() -> None:
    """Adding to 1,000 numbers takes the device some microseconds, and the host more to launch."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numbers = torch.ones(1000, device="cuda")
    found = {
        held: timer.Timer(timer.CudaClock("cuda", hold_queue=held)).measure(lambda: numbers.add_(1))
        for held in (False, True)
    }

    assert found[True].timing.median_s < found[False].timing.median_s
    assert 1e-7 < found[True].timing.median_s < 1e-5
