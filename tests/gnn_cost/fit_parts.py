"""A part of a fit that learns a line in many small steps; run as a program it can be killed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from meshwright.gnn_cost.fitting import (
    FitData,
    FitSettings,
    PartContext,
    PartResult,
    SplitError,
    WorstCases,
    fit,
)
from meshwright.strict_json import write_bytes_atomically
from meshwright.tracking import DataSource, LocalTracker


@dataclass(frozen=True, kw_only=True)
class Line:
    """Fits ``y = a x`` by stochastic gradient descent, with a checkpoint after each epoch."""

    name: str = "line"
    num_epochs: int = 30
    pause_s: float = 0.0
    budget_weight: float = 1.0
    uses_others: bool = False
    fail_at: int | None = None

    def reason_to_skip(self, data: FitData) -> str:
        return "" if data.operators else "no tables of operators"

    def fit(self, data: FitData, context: PartContext) -> PartResult:
        x = np.linspace(0.5, 1.5, 8)
        y = 2.0 * x + np.sin(np.arange(8.0)) / 10
        file = context.folder / "checkpoint.safetensors"
        state = load(file.read_bytes()) if file.exists() else {}
        slope = state.get("slope", np.zeros(1))
        epoch = int(state["epoch"][0]) if state else 0
        while epoch < self.num_epochs and context.left_s() > 0:
            if epoch == self.fail_at:
                raise KeyboardInterrupt
            rng = np.random.default_rng([context.settings.seed, epoch])
            for index in rng.permutation(len(x)):
                slope = slope + 0.01 * x[index] * (y[index] - slope * x[index])
            epoch += 1
            write_bytes_atomically(save({"slope": slope, "epoch": np.array([epoch])}), file)
            loss = float(np.mean((y - slope * x) ** 2))
            context.tracker.metrics(self.name, {"loss": loss}, step=epoch)
            context.progress(epoch / self.num_epochs, f"epoch {epoch}")
            time.sleep(self.pause_s)
        error = float(np.mean(np.abs(slope * x / y - 1)))
        return PartResult(
            tensors={"slope": slope},
            settings={"features_version": 1},
            documents={f"{self.name}-notes.json": {"epochs": epoch}},
            splits=(
                SplitError(split="largest", group="all", num_samples=4, mape=error, bias=-error),
            ),
            worst=WorstCases(columns=("x", "error"), rows=((1.0, error),)),
            is_cut=epoch < self.num_epochs,
        )


def line_data(*, sha256: str = "f00") -> FitData:
    """Told to be a file with this hash; ``Line`` knows its points itself."""
    source = DataSource(
        name="ops.parquet", kind="operators", num_bytes=1, sha256=sha256, num_rows=8
    )
    return FitData(
        operators=(Path("ops.parquet"),), sources=(source,), licenses={"ours": "Apache-2.0"}
    )


def main() -> None:
    """``fit_parts.py FOLDER``: fit or go on, saying each epoch on stdout."""
    folder = Path(sys.argv[1])

    def say(text: str) -> None:
        print(text, flush=True)

    fit(
        [Line(pause_s=0.02), Line(name="second", pause_s=0.02)],
        line_data(),
        FitSettings(seed=3),
        folder=folder,
        tracker=LocalTracker(folder),
        reproduce="meshwright fit",
        is_resumed=True,
        say=say,
    )


if __name__ == "__main__":
    main()
