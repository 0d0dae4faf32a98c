"""Accounting of storages over a few operators."""

from __future__ import annotations

import torch

from meshwright.runtime.memory import StorageTracker


def test_peak_and_live_bytes_by_hand() -> None:
    """Two of 400 bytes are alive together, then b goes; views and in-place cost nothing."""
    outside = torch.zeros(1000)
    with StorageTracker() as tracker:
        a = torch.ones(100)
        b = a + 1
        a.view(10, 10).add_(1)
        outside.add_(1)
        view = outside[:5]
        del b

        assert 400 == tracker.live_bytes
        assert 800 == tracker.peak_bytes
        tracker.reset_peak()
        c = torch.cat([a, a])

        assert 400 + 800 == tracker.peak_bytes
    assert view.numel() + c.numel() == 205


def test_memory_freed_after_the_end_is_not_followed() -> None:
    with StorageTracker() as tracker:
        kept = torch.ones(10)
    del kept

    assert 40 == tracker.live_bytes
