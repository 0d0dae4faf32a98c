"""Rows of measured runs, small enough to predict in a moment."""

from __future__ import annotations

from typing import Any

from meshwright.bench.runs import MeasuredRun, run_of_row

Cell = str | float | bool | None

SMALL: dict[str, Any] = {
    "run_id": "small-1",
    "source": "made up",
    "arch": "gpt",
    "layers": 4.0,
    "hidden": 256.0,
    "heads": 4.0,
    "ffn_hidden": 1024.0,
    "gated_mlp": False,
    "vocab": 1024.0,
    "seq_len": 128.0,
    "gpu": "a100_sxm_80gb",
    "gpus_per_host": 8.0,
    "hosts": 1.0,
    "gpus": 8.0,
    "precision": "bf16",
    "global_batch": 32.0,
    "micro_batch": 2.0,
    "dp": 2.0,
    "tp": 2.0,
    "pp": 2.0,
    "schedule": "1f1b",
    "framework": "Megatron-Core",
    "flash_attention": True,
    "step_time_s": 0.5,
}


def row(**changes: Cell) -> dict[str, Any]:
    """The small row with some cells changed."""
    return {**SMALL, **changes}


def run(**changes: Cell) -> MeasuredRun:
    """The run of the small row with some cells changed."""
    return run_of_row(row(**changes))
