"""Instances made of specifications, kept as files, and opened by progress."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.env.clusters import ClusterPart, ClusterSpec
from meshwright.env.curriculum import Curriculum, size_of
from meshwright.env.files import read_instance, write_instance
from meshwright.env.generator import InstanceSpec, context_of
from meshwright.env.instance import Instance
from meshwright.env.maker import Maker, why_trivial
from meshwright.env.models import ModelSpec, Programs
from meshwright.env.rooms import StoredRooms
from meshwright.env.toys import random_instance
from meshwright.errors import BadRequest
from meshwright.plans.plan import OptimizerName, Precision
from meshwright.solvers.reference import rule_time_s


def spec_of(model: str, hosts: int, device: str = "t4", batch: int = 16) -> InstanceSpec:
    return InstanceSpec(
        model=ModelSpec(reference=model, global_batch=batch, precision=Precision.BF16),
        cluster=ClusterSpec(
            parts=(ClusterPart(num_hosts=hosts, devices_per_host=2, device=device),)
        ),
        optimizer=OptimizerName.ADAMW,
        max_rows=24,
        max_plans=64,
    )


MLP = "tiny-mlp?hidden=512&num_layers=2"
SPECS = (spec_of(MLP, 2), spec_of("tiny-gpt", 1), spec_of(MLP, 1))


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(cache=tmp_path_factory.mktemp("cache"), reference=rule_time_s)


def assert_alike(one: Instance, other: Instance) -> None:
    assert one.name == other.name
    assert one.variants == other.variants
    assert one.group_classes == other.group_classes
    assert (one.num_cuts, one.reference_s) == (other.num_cuts, other.reference_s)
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.row_features, other.row_features)
    for name in ("node_type", "node_features", "edge_index", "edge_type"):
        np.testing.assert_array_equal(getattr(one.graph, name), getattr(other.graph, name))
    for row in range(len(one.rows)):
        np.testing.assert_array_equal(one.rooms.open(row).time_s, other.rooms.open(row).time_s)


def test_an_instance_is_what_a_planner_would_be_asked(maker: Maker) -> None:
    spec = SPECS[0]
    made = maker.make(spec)
    context = context_of(spec, Programs(maker.cache))

    assert made is not None
    assert f"{MLP}:16:2x2xt4" == spec.name == made.name == f"{MLP}:16:{context.cluster_name}"
    assert 4 == context.cluster.num_devices
    assert len(made.rows) <= spec.max_rows
    assert math.prod(made.room_shape) <= spec.max_plans
    assert rule_time_s(context) == pytest.approx(made.reference_s)


def test_what_is_made_is_read_the_next_time(maker: Maker) -> None:
    made = maker.make(SPECS[0])
    again = replace(maker, reference=_fails).make(SPECS[0])

    assert made is not None
    assert again is not None
    assert_alike(made, again)


def _fails(context: object) -> float:
    raise AssertionError("made again")


@pytest.mark.dist
def test_two_processes_make_the_same(maker: Maker, tmp_path: Path) -> None:
    said: list[str] = []
    other = replace(maker, cache=tmp_path)
    found = list(other.many(SPECS, num_processes=2, progress=said.append))

    assert [spec for spec in SPECS if maker.make(spec)] == [spec for spec, _ in found]
    assert "3 of 3 instances made" == said[-1]
    for spec, instance in found:
        made = maker.make(spec)
        assert made is not None
        assert_alike(made, instance)


def test_what_cannot_fit_leaves_a_note(maker: Maker) -> None:
    """AdamW keeps 16 bytes for each of 4.3e9 parameters; two T4 have 32 GB."""
    spec = spec_of("tiny-mlp?hidden=65536&num_layers=2", 1, batch=2)

    assert maker.make(spec) is None
    assert maker.is_made(spec)
    assert maker.ready(spec) is None
    assert spec.name in maker.path(spec).with_suffix(".txt").read_text(encoding="utf-8")


def test_a_damaged_file_is_made_anew(maker: Maker) -> None:
    made = maker.make(SPECS[0])
    path = maker.path(SPECS[0])
    path.write_bytes(path.read_bytes()[:-100])

    assert not maker.is_made(SPECS[0])
    again = maker.make(SPECS[0])
    assert made is not None
    assert again is not None
    assert_alike(made, again)


def test_a_damaged_graph_is_captured_anew(tmp_path: Path) -> None:
    model = SPECS[0].model
    first = Programs(tmp_path).get(model)
    path = Programs(tmp_path).path(model)
    path.write_bytes(b"no graph")

    assert first.sha256 == Programs(tmp_path).get(model).sha256
    assert b"no graph" != path.read_bytes()


def test_files_and_pickles_hold_all_of_an_instance(tmp_path: Path) -> None:
    instance = random_instance(np.random.default_rng(3))
    path = tmp_path / "instance.safetensors"
    write_instance(instance, path)

    assert_alike(instance, read_instance(path))
    assert_alike(instance, pickle.loads(pickle.dumps(instance)))


@pytest.mark.parametrize("content", [b"", b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_what_is_no_instance_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "instance.safetensors"
    path.write_bytes(content)

    with pytest.raises(BadRequest, match="make it again"):
        read_instance(path)


def with_plans(time_s: list[float]) -> Instance:
    instance = random_instance(np.random.default_rng(0))
    room = np.full(instance.room_shape, np.inf, dtype=np.float32)
    room.flat[: len(time_s)] = time_s
    empty = np.full(instance.room_shape, np.inf, dtype=np.float32)
    rooms = StoredRooms([room] + [empty] * (len(instance.rows) - 1))
    return replace(instance, rooms=rooms)


def test_instances_with_nothing_to_choose_are_worth_nothing() -> None:
    assert "only 15 plans fit" == why_trivial(with_plans([1.0, 2.0] * 7 + [1.0]))
    alike = "the slowest plan takes 1.04 times as long as the fastest"
    assert alike == why_trivial(with_plans([1.0, 1.04] * 8))
    assert "" == why_trivial(with_plans([1.0, 1.06] * 8))


# Curriculum -------------------------------------------------------------------------------------


def test_small_instances_come_first() -> None:
    instances = [random_instance(np.random.default_rng(seed)) for seed in range(20)]
    curriculum = Curriculum(instances, first_share=0.25, open_at=0.5)
    sizes = [size_of(instances[number]) for number in curriculum.active(1.0)]

    assert sorted(sizes) == sizes
    assert [5, 5, 12, 20, 20] == [len(curriculum.active(at)) for at in (-1, 0, 0.25, 0.5, 1)]
    assert set(range(20)) == set(curriculum.active(0.5).tolist())
    assert curriculum.active(1.0)[:5].tolist() == curriculum.active(0.0).tolist()


def test_the_size_counts_rows_and_devices() -> None:
    """Two rows, one of them on 8 devices: 1 + 3."""
    instance = random_instance(np.random.default_rng(0))
    rows = np.ones((2, instance.rows.shape[1]), dtype=np.int64)
    rows[1, 4] = 8

    assert 4.0 == size_of(replace(instance, rows=rows))
