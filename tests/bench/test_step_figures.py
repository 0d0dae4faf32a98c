"""Figures for everyone are those that help sources nobody fitted on."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.bench.step_figures import FIGURES, TimedRuns, chosen_figures, fit_figures, joined


def runs(source: str, *, seed: int, count: int = 30, **figures: float) -> TimedRuns:
    """Measured as ``figures`` would have it, the others at their defaults; 1 % noise."""
    rng = np.random.default_rng(seed)
    plain = TimedRuns(
        other_s=rng.uniform(0.05, 1.0, count),
        optimizer_s=rng.uniform(0.01, 0.2, count),
        num_microbatches=2.0 ** rng.integers(0, 6, count),
        num_devices=2.0 ** rng.integers(0, 6, count),
        measured_s=np.ones(count),
        source=np.full(count, source),
        gpu=np.full(count, "a100"),
        job=np.char.add(source, (np.arange(count) % 5).astype(np.str_)),
        run_id=np.arange(count).astype(np.str_),
    )
    values = {name: figures.get(name, mean) for name, (mean, _) in FIGURES.items()}
    measured_s = plain.predicted_s(np.array(list(values.values())))
    columns = {name: getattr(plain, name) for name in TimedRuns.__slots__}
    noise = np.exp(0.01 * rng.standard_normal(count))
    return TimedRuns(**{**columns, "measured_s": measured_s * noise})


def test_what_all_sources_share_is_learned() -> None:
    shared = {"optimizer_traffic": 0.4}
    found = chosen_figures(joined(runs(one, seed=i, **shared) for i, one in enumerate("abc")))

    assert "optimizer_traffic" in found.names
    assert found.fit.values["optimizer_traffic"] < 0.6
    assert all(one["chosen"] < one["default"] for one in found.errors.values())
    assert 0.9 < found.interval[0] <= 1 <= found.interval[1] < 1.1


def test_what_one_source_does_is_not_put_on_the_others() -> None:
    found = chosen_figures(
        joined([
            runs("odd", seed=0, data_loading_share=0.4, optimizer_traffic=0.2),
            runs("b", seed=1), runs("c", seed=2),
        ])
    )  # fmt: skip

    assert () == found.names
    assert {name: mean for name, (mean, _) in FIGURES.items()} == found.fit.values


def test_only_named_figures_move() -> None:
    fitted = fit_figures(runs("a", seed=0, optimizer_traffic=0.4), ("data_loading_share",))

    assert 1.0 == fitted.values["optimizer_traffic"]
    assert 0.0 == fitted.values["host_s_per_step"]


def test_to_json_says_what_was_compared() -> None:
    document = chosen_figures(runs("a", seed=0)).to_json()

    assert {"a"} == set(document["mape_of_source_left_out"])  # type: ignore[arg-type]
    assert pytest.approx(0.0, abs=0.05) == document["mape_of_source_left_out"]["a"]["default"]  # type: ignore[call-overload, index]
