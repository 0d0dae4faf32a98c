"""What ``meshwright train`` says of a run: the command that makes it again, ranks, instances."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import msgspec
import pytest

from meshwright.agents import syllabus
from meshwright.cli import train_job
from meshwright.cli.main import _VERBS, main
from meshwright.cli.train import Asked
from meshwright.env.generator import InstanceSpec
from meshwright.tracking import file_sha256, read_lines
from tests.cli.conftest import Run
from tests.cli.small_training import SETS, SMALL

SHORT = ("--ppo", "0", "--imitation", "1")
README = Path(__file__).parents[2] / "README.md"
CLUSTER = "[[hosts]]\ncount = 2\ndevice = 't4'\nnum_devices = 2\n"


@pytest.fixture
def asked_by(meshwright: Run, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What every command line asks for from here on; nothing is trained."""
    asked: list[Asked] = []
    monkeypatch.setattr(train_job, "run_training", lambda one, out: asked.append(one))
    return asked


def test_examples_of_readme_and_help_make_the_package_s_planner(
    meshwright: Run, asked_by: list[Asked]
) -> None:
    (line,) = (
        line
        for line in README.read_text(encoding="utf-8").splitlines()
        if line.startswith("meshwright train") and "comes with the package" in line
    )
    for words in (line.split("#")[0].split()[1:], _VERBS["train"].split(), ["train"]):
        assert 0 == meshwright(*words).status

    assert ["meshwright train --seed 0"] * 3 == [
        train_job._command(asked, num_ranks=1) for asked in asked_by
    ]
    assert [None] * 3 == [asked.end_s for asked in asked_by]


def test_the_command_holds_no_path_and_the_ranks(
    meshwright: Run, asked_by: list[Asked], tmp_path: Path
) -> None:
    folder = tmp_path / "alice" / "secret"
    folder.mkdir(parents=True)
    (folder / "rack.toml").write_text(CLUSTER)
    rack, inside = folder / "rack.toml", ("--init", ".", "--cost-model", f"{folder}/")
    lines = (
        ("--finetune", rack, *inside, "--encoder", "mlp"),
        ("--traces", folder, "--cluster", rack),
        ("--finetune", "2x2xt4", "--cost-model", "learned"),
    )
    for words in lines:
        answer = meshwright("train", *words)
        assert 0 == answer.status, answer.err
    found = [train_job._command(asked, num_ranks=1) for asked in asked_by]

    assert [
        f"meshwright train --seed 0 --finetune rack.toml --init {tmp_path.name} "
        "--cost-model secret --encoder mlp",
        "meshwright train --seed 0 --traces secret --cluster rack.toml",
        "meshwright train --seed 0 --finetune 2x2xt4 --cost-model learned",
    ] == found
    assert (
        "torchrun --nproc-per-node 4 -m meshwright.cli train --seed 0 --traces secret "
        "--cluster rack.toml"
    ) == train_job._command(asked_by[1], num_ranks=4)


def test_the_encoder_is_that_of_the_planner_gone_on_with(train: Run, tmp_path: Path) -> None:
    train("-o", "p", *SHORT, "--encoder", "mlp")
    same = train("-o", "q", *SHORT, "--init", "p")
    other = train("-o", "r", *SHORT, "--init", "p", "--encoder", "graph")
    wider = train("-o", "r", *SHORT, "--init", "p", "--hidden", "16")
    cards = [json.loads((tmp_path / name / "planner.json").read_text()) for name in "pq"]

    assert ["mlp", "mlp"] == [card["settings"]["encoder"] for card in cards]
    assert "--encoder mlp" in cards[0]["reproduce"]
    assert 0 == same.status, same.err
    assert (1, 1) == (other.status, wider.status)
    assert "--encoder: graph is not what the planner that is gone on with has, mlp" in other.err
    assert "--hidden: 16 is not what the planner that is gone on with has, 8" in wider.err
    assert not (tmp_path / "r").exists()


def test_the_data_set_holds_the_specifications(train: Run, tmp_path: Path) -> None:
    """Whoever reads can make the instances again, and check them."""
    train("-o", "p", *SHORT)
    index, _ = read_lines(tmp_path / "p" / "index.jsonl")
    (told,) = (line for line in index if line.get("kind") == "dataset")
    (file,) = told["files"]
    lines = (tmp_path / "p" / "specs.jsonl").read_bytes().splitlines(keepends=True)
    specs = [msgspec.json.decode(line, type=InstanceSpec) for line in lines]
    facts = told["metadata"]
    parts = {"train": lines[: facts["train"]], "validation": lines[facts["train"] :]}

    assert "specs.jsonl" == file["name"]
    assert file_sha256(tmp_path / "p" / "specs.jsonl") == file["sha256"]
    assert [*SETS["train"], *SETS["validation"]] == specs
    for name, found in parts.items():
        assert len(found) == facts[name]
        assert hashlib.sha256(b"".join(found)).hexdigest() == facts[f"{name}_sha256"]
    both = f"{facts['train_sha256']} {facts['validation_sha256']} "
    assert hashlib.sha256(both.encode()).hexdigest() == facts["sha256"]


def test_one_rank_stands_on_the_card(train: Run, tmp_path: Path) -> None:
    train("-o", "p", *SHORT)

    assert 1 == json.loads((tmp_path / "p" / "planner.json").read_text())["num_ranks"]


def rank(number: int, port: int, folder: str, cache: str) -> None:
    """One of two, as torchrun would start them."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    syllabus._of_frozen = lambda name, count: SETS[name][:count]
    os._exit(main(["train", "-o", folder, "--cache", cache, *SMALL, *SHORT]))


@pytest.mark.dist
def test_two_ranks_stand_on_the_card(tmp_path: Path, instances_cache: Path) -> None:
    """Their weights are others than those of one, so the card is another too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = (port, str(tmp_path / "p"), str(instances_cache))
    processes = [context.Process(target=rank, args=(number, *arguments)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    card = json.loads((tmp_path / "p" / "planner.json").read_text())

    assert [0, 0] == [process.exitcode for process in processes]
    assert 2 == card["num_ranks"]
    assert card["reproduce"].startswith(
        "torchrun --nproc-per-node 2 -m meshwright.cli train --seed 0 --instances 2"
    )
