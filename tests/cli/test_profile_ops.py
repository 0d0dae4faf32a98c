"""``meshwright profile ops`` from the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.records import RecordStore
from tests.cli.conftest import Run

ONE = ("--device", "cpu", "--op", "add", "--shapes", "1", "--dtype", "fp32", "--memory", "64m")


def test_measures_once_and_knows_it_the_second_time(meshwright: Run, tmp_path: Path) -> None:
    store = tmp_path / "records"
    first = meshwright("profile", "ops", "--store", store, "--budget", "60s", *ONE, "--json")
    second = meshwright("profile", "ops", "--store", store, "--budget", "60s", *ONE, "--json")
    records, problems = RecordStore(store).read()

    assert (0, 1, 0) == (first.status, first.document["measured"], first.document["known"])
    assert (0, 0, 1) == (second.status, second.document["measured"], second.document["known"])
    assert [] == problems
    assert ["add"] == [record.name for record in records]
    assert "profile ops" in records[0].writer


def test_operators_no_family_covers_are_named(meshwright: Run, tmp_path: Path) -> None:
    answer = meshwright(
        "profile", "ops", "--store", tmp_path / "records", "--model", "tiny-mlp", "--op", "gelu",
        "--device", "cpu", "--budget", "10s",
    )  # fmt: skip

    assert 0 == answer.status
    assert "tiny-mlp: operators no family covers" in answer.out
    assert "aten." in answer.out


def test_the_budget_is_said_to_have_ended_it(meshwright: Run, tmp_path: Path) -> None:
    answer = meshwright(
        "profile", "ops", "--store", tmp_path / "records", "--op", "linear", "--shapes", "8",
        "--device", "cpu", "--dtype", "fp32", "--budget", "50ms", "--json",
    )  # fmt: skip

    assert 0 < answer.document["left"]
    assert "budget" == answer.document["stopped_by"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--dtype", "fp7"), "--dtype: no dtype 'fp7'; use fp32"),
        (("--dtype", "tf32", "--device", "cpu"), "--dtype: tf32: the CPU has no TF32"),
        (("--op", "gemm"), "--op: no operator 'gemm'; use linear"),
        (("--tp", "2", "--op", "linear"), "--tp: cuts a model; give --model too"),
        (("--tp", "two"), "--tp: 'two' is no list of numbers"),
        (("--batch", "0"), "--batch: 0 is too small"),
        (("--seed", "-1"), "--seed: -1 is too small"),
        (("--budget", "soon"), "--budget: 'soon' is no time"),
        (("--memory", "lots"), "--memory: 'lots' is no size"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--cpu-time", "--threads", "2", "--device", "cpu"), "--cpu-time: is right for one"),
    ],
)
def test_slips_are_one_line(
    meshwright: Run, tmp_path: Path, words: tuple[str, ...], part: str
) -> None:
    answer = meshwright("profile", "ops", "--store", tmp_path / "records", *words)

    assert 1 == answer.status
    assert part in answer.lines_of_error[-1]
    assert 1 == len(answer.lines_of_error)


@pytest.mark.dist
def test_ctrl_c_ends_the_sweep_and_keeps_the_records(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "meshwright.cli", "profile", "ops", "--store", str(tmp_path),
        "--op", "gelu,relu", "--device", "cpu", "--budget", "4m",
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " measured, " in line and not line.startswith("0 "):
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    records, problems = RecordStore(tmp_path).read()

    assert 130 == process.returncode
    assert "interrupted; run it again to go on" in out
    assert [] == problems
    assert f"{len(records)} measured in " in out


def test_help_shows_an_example_and_imports_no_torch(meshwright: Run) -> None:
    answer = meshwright("profile", "ops", "--help")
    program = (
        "import sys; from meshwright.cli.main import main; main(['profile', 'ops', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)

    assert 0 == answer.status
    assert "Example: meshwright profile ops" in answer.out
    assert 0 == alone.returncode
