"""Peak memory of one call, byte for byte where it can be counted by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from meshwright.profiling.peak import PeakMemory, measure_peak_memory, saved_for_backward_bytes


def test_a_result_and_a_temporary() -> None:
    """X + 1 is there while twice it is made: 2 x 4000 bytes, 4000 kept."""
    x = torch.ones(1000)
    found = measure_peak_memory(lambda: (x + 1).mul(2), device="cpu")

    assert PeakMemory(peak_bytes=8000, kept_bytes=4000) == _without_scalars(found)
    assert 4000 == _without_scalars(found).workspace_bytes


def _without_scalars(found: PeakMemory) -> PeakMemory:
    """A number that becomes a tensor takes a few bytes of its own."""
    return PeakMemory(
        peak_bytes=found.peak_bytes // 100 * 100, kept_bytes=found.kept_bytes // 100 * 100
    )


def test_in_place_takes_nothing() -> None:
    x = torch.ones(1000)

    assert 0 == _without_scalars(measure_peak_memory(lambda: x.neg_(), device="cpu")).peak_bytes


def test_saved_for_backward_leaves_weights_out() -> None:
    """A product saves its two operands: the input of 20 x 10 and the weight."""
    x = torch.ones(20, 10, requires_grad=True)
    w = torch.ones(5, 10, requires_grad=True)

    def step() -> object:
        return torch.nn.functional.linear(x, w)

    assert 800 == saved_for_backward_bytes(step, weights=(w,))
    assert 800 + 200 == saved_for_backward_bytes(step, weights=())


@pytest.mark.parametrize("keeps", [True, False])
def test_memory_that_was_freed_is_kept(keeps: bool) -> None:
    """In a process of its own, told to give every block back: 10 times 8 MB of fresh pages."""
    program = (
        "import resource, sys, torch\n"
        "from meshwright.profiling.allocator import keep_freed_memory\n"
        "print(keep_freed_memory() if sys.argv[1] == 'True' else True)\n"
        "torch.set_num_threads(1)\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.ones(2_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "print(faults())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(keeps)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    works, num_faults = done.stdout.split()
    if works != "True":
        pytest.skip("the C library is not glibc")

    assert (int(num_faults) < 1000) == keeps
