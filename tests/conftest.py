"""What all tests share: the order of the rooms, and skipping where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

# Rooms that need no torch come first, so that a slip in the core shows within seconds.
_ROOM_ORDER = (
    "house",
    "graph",
    "cluster",
    "plans",
    "records",
    "spmd",
    "cost",
    "solvers",
    "report",
    "capture",
    "cli",
    "profiling",
    "gnn_cost",
    "env",
    "agents",
    "runtime",
    "packaging",
    "e2e",
)
_TESTS = Path(__file__).parent


def _rank(item: pytest.Item) -> int:
    room = item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""
    return _ROOM_ORDER.index(room) if room in _ROOM_ORDER else -1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by room and skip what needs a GPU where there is none."""
    items.sort(key=_rank)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
