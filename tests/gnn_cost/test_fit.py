"""A fit is equal for equal seeds, goes on after any end, keeps to its budget, tells what it did."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright.errors import BadRequest
from meshwright.gnn_cost.fitting import FitData, FitResult, FitSettings, Part, fit
from meshwright.gnn_cost.fitting.cards import ModelCard
from meshwright.gnn_cost.weights import load_weights
from meshwright.tracking import LocalTracker, file_sha256, read_lines
from tests.gnn_cost.fit_parts import Line, line_data

ROOT = Path(__file__).parents[2]


def run(folder: Path, *parts: Part, data: FitData | None = None, **options: Any) -> FitResult:
    settings = options.pop("settings", FitSettings(seed=3))
    return fit(
        parts or [Line()],
        line_data() if data is None else data,
        settings,
        folder=folder,
        tracker=LocalTracker(folder),
        reproduce="meshwright fit --tables ops.parquet --seed 3",
        **options,
    )


def weights_of(folder: Path, name: str = "line") -> bytes:
    return (folder / f"{name}.safetensors").read_bytes()


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", settings=FitSettings(seed=4))

    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert (tmp_path / "a" / "card.json").read_text() == (tmp_path / "b" / "card.json").read_text()
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "c")


def test_cards_say_what_was_learned_from_and_how_well(tmp_path: Path) -> None:
    run(tmp_path)
    card = msgspec.json.decode((tmp_path / "card.json").read_bytes(), type=ModelCard)
    tensors, own = load_weights(
        tmp_path / "line.safetensors", kind="line", versions={"features_version": 1}
    )

    assert ["ops.parquet"] == [source.name for source in card.data]
    assert {"ours": "Apache-2.0"} == card.licenses
    assert ["largest"] == [item.split for item in card.parts["line"].splits]
    assert {"line.safetensors", "line.json", "line-notes.json"} == {*card.parts["line"].files}
    assert file_sha256(tmp_path / "line.json") == card.parts["line"].files["line.json"]
    assert {"epochs": 30} == json.loads((tmp_path / "line-notes.json").read_text())
    assert "meshwright fit --tables ops.parquet --seed 3" == card.reproduce == own["reproduce"]
    assert 1.8 < tensors["slope"][0] < 2.1


def test_the_index_tells_the_whole_story(tmp_path: Path) -> None:
    run(tmp_path)
    index, problems = read_lines(tmp_path / "index.jsonl")
    metrics, _ = read_lines(tmp_path / "metrics.jsonl")
    model = next(line for line in index if line["event"] == "artifact" and line["kind"] == "model")

    assert [] == problems
    assert [
        *("started", "config", "artifact", "table", "table", "summary"),
        *("artifact", "artifact", "finished"),
    ] == [line["event"] for line in index]
    assert "cost-model" in index[-2]["name"]
    assert "finished" == index[-1]["status"]
    assert [line_data().sources[0].sha256] == model["made_from"]
    assert ["line/splits", "line/worst"] == [
        line["name"] for line in index if line["event"] == "table"
    ]
    assert list(range(1, 31)) == [line["step"] for line in metrics]


@pytest.mark.parametrize("num_lines", [1, 3])
def test_goes_on_after_kill_9_to_bit_equal_weights(tmp_path: Path, num_lines: int) -> None:
    """Killed twice: right at the first line, and when the second part has begun or later."""
    program = [sys.executable, "-m", "tests.gnn_cost.fit_parts", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        with subprocess.Popen(
            program, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for _line in itertools.islice(process.stdout, num_lines):
                pass
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
    subprocess.run(program, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    run(tmp_path / "whole", Line(), Line(name="second"))
    index, problems = read_lines(tmp_path / "killed" / "index.jsonl")

    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "killed")
    assert weights_of(tmp_path / "whole", "second") == weights_of(tmp_path / "killed", "second")
    assert [] == problems
    assert 3 == len([line for line in index if line["event"] == "started"])
    assert 1 == len({line["run_id"] for line in index if line["event"] == "started"})


def test_an_interrupted_fit_says_so_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", Line(fail_at=12))
    assert "interrupted" == read_lines(tmp_path / "a" / "index.jsonl")[0][-1]["status"]
    run(tmp_path / "a", is_resumed=True)
    run(tmp_path / "b")
    steps = [line["step"] for line in read_lines(tmp_path / "a" / "metrics.jsonl")[0]]

    assert list(range(1, 31)) == steps
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_the_budget_ends_a_fit_with_the_best_so_far_and_resume_finishes_it(tmp_path: Path) -> None:
    """The clock ticks a second each time it is asked; the second part has three quarters."""
    ticks = itertools.count()
    cut = run(
        tmp_path / "a",
        Line(),
        Line(name="second", budget_weight=3.0, num_epochs=10),
        budget_s=60.0,
        now_s=lambda: float(next(ticks)),
    )
    said: list[str] = []
    whole = run(
        tmp_path / "a",
        Line(),
        Line(name="second", num_epochs=10),
        is_resumed=True,
        say=said.append,
    )
    run(tmp_path / "b")

    assert cut.is_cut
    assert [True, False] == [part.is_cut for part in cut.parts.values()]
    assert not whole.is_cut
    assert "second: done before" in said
    assert weights_of(tmp_path / "b") == weights_of(tmp_path / "a")


def test_what_was_trained_on_a_part_that_changed_is_trained_again(tmp_path: Path) -> None:
    ticks = itertools.count()
    run(
        tmp_path,
        Line(),
        Line(name="second", uses_others=True, num_epochs=2, budget_weight=9.0),
        budget_s=40.0,
        now_s=lambda: float(next(ticks)),
    )
    said: list[str] = []
    run(
        tmp_path,
        Line(),
        Line(name="second", uses_others=True, num_epochs=2),
        is_resumed=True,
        say=said.append,
    )

    assert [] == [line for line in said if "done before" in line]


def test_a_damaged_part_is_trained_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = weights_of(tmp_path)
    (tmp_path / "line.safetensors").write_bytes(before[:-1])
    run(tmp_path, is_resumed=True)

    assert before == weights_of(tmp_path)


def test_progress_says_how_long_still(tmp_path: Path) -> None:
    """Ten epochs of 2.2 s: the clock ticks a second each time it is asked. Told every 5 s."""
    ticks = itertools.count()
    said: list[str] = []
    run(tmp_path, Line(num_epochs=10), say=said.append, now_s=lambda: float(next(ticks)))

    assert "line: 40%, epoch 4, 8 s, about 12 s left" == said[1]
    assert "line: 100%, epoch 10, 23 s" == said[-2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "holds a fit already; go on with it by --resume"),
        ({"is_resumed": True, "settings": FitSettings(seed=9)}, "began with seed 3, not 9"),
        (
            {"is_resumed": True, "data": line_data(sha256="ba5")},
            "ops.parquet is new or has changed",
        ),
    ],
)
def test_goes_on_with_what_it_began_with_only(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run(tmp_path)

    with pytest.raises(BadRequest, match=message):
        run(tmp_path, **change)


def test_nothing_to_learn_from_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="nothing to learn from: line: no tables of operators"):
        run(tmp_path, data=FitData())


def test_a_tracker_that_fails_does_not_stop_the_fit(tmp_path: Path) -> None:
    """The folder of the index disappears under it."""
    from meshwright.tracking import Mirrored

    lost = LocalTracker(tmp_path / "lost")
    (tmp_path / "lost" / "index.jsonl").unlink()
    (tmp_path / "lost" / "index.jsonl").mkdir()
    said: list[str] = []
    result = fit(
        [Line()],
        line_data(),
        FitSettings(),
        folder=tmp_path / "fit",
        tracker=Mirrored([lost], complain=said.append),
        reproduce="",
    )

    assert 1 == len(said)
    assert "training goes on" in said[0]
    assert (result.folder / "line.safetensors").exists()
