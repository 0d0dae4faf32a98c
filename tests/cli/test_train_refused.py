"""``meshwright train`` refuses what cannot be: one line, status 1, nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.records import RecordStore
from tests.cli.conftest import Run
from tests.cli.small_training import linear_of_t4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--traces", "nowhere"), "--traces: nowhere"),
        (("--traces", ".", "--finetune", "8xh100"), "give one of them"),
        (("--cluster", "8xh100"), "--cluster"),
        (("--instances", "0"), "--instances: 0"),
        (("--learning-rate", "-1"), "--learning-rate"),
        (("--init", "nowhere"), "nowhere"),
        (("--imitation", "0", "--ppo", "0", "--expert", "0"), "nothing to do"),
        (("--envs", "33"), "--envs: 33"),
        (("--finetune", "8xnothing"), "nothing"),
        (("--budget", "soon"), "soon"),
        (("--encoder", "transformer"), "'transformer' is not one of 'graph', 'mlp'"),
        (("--instances", "-3"), "--instances: -3"),
        (("--hidden", "many"), "--hidden"),
        (("--finetune", "nowhere.toml"), "nowhere.toml"),
        (("--cost-model", "nowhere"), "nowhere: holds no learned cost model"),
        (("--resume",), "p: holds no planner's training to go on with"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    train: Run, tmp_path: Path, words: tuple[str, ...], part: str
) -> None:
    answer = train("-o", "p", *words)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert part in answer.lines_of_error[0]
    assert not (tmp_path / "p").exists()


def test_a_store_without_jobs_is_refused(train: Run, tmp_path: Path) -> None:
    RecordStore(tmp_path / "store").append([linear_of_t4(512)])
    answer = train("-o", "p", "--traces", "store")

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "import a job trace" in answer.lines_of_error[0]
    assert not (tmp_path / "p").exists()


def test_a_folder_with_another_run_is_left_as_it_is(train: Run, tmp_path: Path) -> None:
    train("-o", "p", "--ppo", "0", "--imitation", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "p").rglob("*") if path.is_file()}
    answer = train("-o", "p", "--seed", "1")

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "p: holds a planner's training already; go on with it by --resume" in answer.err
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "p").rglob("*") if path.is_file()
    }


def test_a_file_is_no_folder_for_a_planner(train: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("precious")
    answer = train("-o", "p")

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert "precious" == (tmp_path / "p").read_text()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_there", "said"),
    [
        (False, ("holds no planner's training", "holds no planner's training")),
        (True, ("its run had other settings", "another rank ended first")),
    ],
)
def test_two_ranks_refuse_in_a_line_each(
    tmp_path: Path, is_there: bool, said: tuple[str, str]
) -> None:
    """What rank 0 alone finds out ends the other one in its barrier."""
    if is_there:
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "asked.json").write_text("{}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "meshwright.cli", "train", "--resume", "-o", "p", "--instances", "1"),
        ],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("meshwright:")]

    assert 0 != done.returncode
    assert 2 == len(lines)
    for part in said:
        assert [line for line in lines if part in line]
