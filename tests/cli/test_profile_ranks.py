"""``meshwright profile collectives|model|machine``: what they print, keep and refuse."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from meshwright.cli.profile_ranks import parse_bytes, parse_counts
from meshwright.cluster import read_cluster_file
from meshwright.errors import BadRequest
from meshwright.records import RecordStore
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("collectives", "--op", "gossip"), "--op: no collective 'gossip'; use one of all_reduce"),
        (("collectives", "--ranks", "4", "--groups", "3"), "groups of 3 do not split 4 ranks"),
        (("collectives", "--ranks", "1"), "groups do not split 1 ranks"),
        (("collectives", "--ranks", "0"), "--ranks: 0 processes on one machine; give 1 to 256"),
        (("collectives", "--max-bytes", "much"), "--max-bytes: 'much' is no size above zero"),
        (("collectives", "--strides", "1;2"), "--strides: '1;2' is no list of numbers above zero"),
        (("collectives", "--cluster", "2x8xh100"), "has 2 hosts; start the verb with torchrun"),
        (("collectives", "--cluster", "cpu:2", "--ranks", "2"), "give one of them"),
        (("collectives", "--dtype", "fp7"), "--dtype: no element type 'fp7'; use fp32, bf16"),
        (("collectives", "--backend", "smoke"), "--backend: no backend 'smoke'; use gloo or nccl"),
        (
            ("collectives", "--ranks", "4", "--op", "send_recv", "--groups", "4"),
            "is between two ranks; give --groups 2",
        ),
        (("machine", "-o", "machine.json"), "-o: 'machine.json' must end in .toml"),
        (("model", "tiny-mlp", "--device", "abacus"), "this machine has no device 'abacus'"),
        (("model", "tiny-mlp", "--batch", "0"), "--batch: 0 samples"),
        (("model", "tiny-mlp", "--cpu-time", "--threads", "2"), "--cpu-time: is right for one"),
        (("model", "no-such-model"), "no built-in model 'no-such-model'"),
    ],
)
def test_bad_options_are_one_line(meshwright: Run, words: tuple[str, ...], said: str) -> None:
    answer = meshwright("profile", *words)

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert said in answer.lines_of_error[0]
    assert "" == answer.out


@pytest.mark.parametrize(
    "words",
    [
        ("model", "tiny-mlp"),
        ("collectives", "--ranks", "2"),
        ("machine", "--ranks", "2"),
        ("ops", "--device", "cpu"),
        ("campaign", "--device", "cpu"),
    ],
)
def test_a_store_that_cannot_be_written_is_told_before_measuring(
    meshwright: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """With every way to measure broken, the one line is still about the store."""
    for place in (
        "meshwright.cli.profile_ranks.run_on_local_ranks",
        "meshwright.profiling.models.measure_model",
        "meshwright.profiling.operators.run_sweep",
        "meshwright.profiling.campaign.run_campaign",
    ):
        monkeypatch.setattr(place, None)
    taken = tmp_path / "taken"
    taken.write_text("not a folder", encoding="utf-8")
    answer = meshwright(
        "profile", *words, "-o" if words[0] == "campaign" else "--store", taken, "--json"
    )

    assert 1 == answer.status
    assert 1 == len(answer.lines_of_error)
    assert f"{taken}: cannot add records" in answer.lines_of_error[0]
    assert "not a folder" == taken.read_text(encoding="utf-8")


def test_sizes_are_binary() -> None:
    assert 64 * 2**10 == parse_bytes("64k", option="")
    assert 3 * 2**20 == parse_bytes("3 MiB", option="")
    assert 7 == parse_bytes("7", option="")


@pytest.mark.parametrize("text", ["0", "0k", "-1k", "1.5k", "k", ""])
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is no size above zero"):
        parse_bytes(text, option="--max-bytes")


def test_counts_are_numbers_with_commas() -> None:
    assert (2, 4) == parse_counts("2, 4", option="")
    assert None is parse_counts(None, option="")


@pytest.mark.dist
def test_collectives_of_two_processes(meshwright: Run, tmp_path: Path) -> None:
    words = ("--ranks", "2", "--op", "all_reduce", "--min-bytes", "1k", "--max-bytes", "2k")
    answer = meshwright(
        "profile", "collectives", *words, "--no-overlap", "--budget", "10s", "--json",
        "--store", tmp_path / "store",
    )  # fmt: skip
    records, problems = RecordStore(tmp_path / "store").read()

    assert 0 == answer.status
    assert [1024, 2048] == [figure["extra"]["bytes"] for figure in answer.document["figures"]]
    assert [1024, 2048] == sorted(record.extra["bytes"] for record in records)
    assert [] == problems


def test_a_model_is_measured_into_the_store(meshwright: Run, tmp_path: Path) -> None:
    answer = meshwright(
        "profile", "model", "tiny-mlp", "--batch", "4", "--budget", "1s", "--json",
        "--store", tmp_path / "store",
    )  # fmt: skip
    records, _ = RecordStore(tmp_path / "store").read()

    assert 0 == answer.status
    assert {"segment_time", "step_time", "memory", "operator"} == {item.kind for item in records}
    assert len(answer.document["figures"]) == len(records)
    assert 0 < answer.document["ratio"]


@pytest.mark.dist
def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a long sweep: status 130, and every figure so far is stored."""
    store = tmp_path / "store"
    words = ("profile", "collectives", "--ranks", "2", "--no-overlap", "--budget", "5m")
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright.cli", *words, "--store", str(store)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    heard = ""
    for line in process.stderr:
        heard += line
        if re.search(r"\d+/\d+ all_", line):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    records, problems = RecordStore(store).read()

    assert 130 == process.returncode
    assert f"{len(records)} figures go to" in rest
    assert 1 <= len(records), heard + rest
    assert [] == problems


@pytest.mark.dist
@pytest.mark.slow
def test_a_machine_becomes_a_cluster_file(meshwright: Run, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    measured = meshwright(
        "profile", "machine", "--ranks", "2", "-o", path, "--json", "--store", tmp_path / "store"
    )
    planned = meshwright("plan", "tiny-mlp", "--cluster", path, "--global-batch", "8", "--json")
    shown = meshwright("clusters", path)

    assert (0, 0, 0) == (measured.status, planned.status, shown.status)
    assert 2 == read_cluster_file(path).num_devices
    assert str(path) == planned.document["plan"]["cluster"]
    assert "measured by meshwright profile machine, n=" in shown.out
