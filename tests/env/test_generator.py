"""Specifications: the same for a seed, within what their split may hold."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import numpy as np
import pytest

from meshwright.cluster.catalog import find_device
from meshwright.env.clusters import (
    DEVICES,
    HELD_OUT_DEVICES,
    ClusterPart,
    ClusterSpec,
    cluster_of,
    draw_cluster,
    num_devices,
)
from meshwright.env.frozen import FrozenSet, freeze, frozen_sets, frozen_specs, specs_sha256
from meshwright.env.generator import SPLITS, InstanceSpec, draw, models_of, state_bytes
from meshwright.env.models import (
    HELD_OUT_FAMILIES,
    TRAINING_FAMILIES,
    ModelSpec,
    family_of,
    parameters_of,
)
from meshwright.errors import BadRequest
from meshwright.plans.plan import OptimizerName, Precision

SEEDS = range(12)


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_one_instance_and_json_holds_it(split: str) -> None:
    specs = [draw(seed, split) for seed in SEEDS]

    assert specs == [draw(seed, split) for seed in SEEDS]
    assert len(specs) == len({spec.sha256 for spec in specs})
    text = msgspec.json.encode(specs)
    assert specs == list(msgspec.json.decode(text, type=tuple[InstanceSpec, ...]))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_only_what_it_may(split: str) -> None:
    may = SPLITS[split]

    for spec in (draw(seed, split) for seed in SEEDS):
        cluster = cluster_of(spec.cluster)
        memory_bytes = sum(host.device.memory_bytes * host.num_devices for host in cluster.hosts)
        assert family_of(spec.model.reference) in may.families
        assert {part.device for part in spec.cluster.parts} <= set(may.devices)
        assert may.sizes[0] <= cluster.num_devices <= may.sizes[1]
        assert cluster.num_devices == num_devices(spec.cluster)
        assert memory_bytes > state_bytes(spec.model, spec.optimizer)


def test_what_is_held_out_is_not_trained_on() -> None:
    trained = models_of(SPLITS["train"])
    tested = [name for name in SPLITS if name not in ("train", "any")]

    assert set() == set(TRAINING_FAMILIES) & set(HELD_OUT_FAMILIES)
    assert set() == set(DEVICES) & set(HELD_OUT_DEVICES)
    assert set() == set(trained) & {model for name in tested for model in models_of(SPLITS[name])}
    assert set(TRAINING_FAMILIES) == {family_of(model.reference) for model in trained}
    assert (128, 512) == (SPLITS["test-size-2x"].sizes[0], SPLITS["test-size-8x"].sizes[0])
    assert 64 == SPLITS["train"].sizes[1]


def test_no_model_of_a_test_is_one_seen_before_with_another_batch() -> None:
    """Weights are chosen by ``validation``, so that counts as seen."""
    seen = {
        model.reference for name in ("train", "validation") for model in models_of(SPLITS[name])
    }
    tests = [name for name in SPLITS if name.startswith("test-")]

    assert ["test-in", "test-family", "test-gpu", "test-size-2x", "test-size-8x"] == tests
    for name in tests:
        assert set() == seen & {model.reference for model in models_of(SPLITS[name])}, name


def test_every_held_out_family_is_tested_on() -> None:
    families = Counter(family_of(model.reference) for model in models_of(SPLITS["test-family"]))
    specs = frozen_specs("test-family")

    assert {"t5": 9, "clip": 3, "unet": 2, "dlrm": 2} == families
    assert set(HELD_OUT_FAMILIES) == {family_of(spec.model.reference) for spec in specs}


def test_all_devices_are_in_the_catalog() -> None:
    names = (*DEVICES, *HELD_OUT_DEVICES)

    assert names == tuple(find_device(name, where="test").device.name for name in names)


def test_clusters_have_many_shapes() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_cluster(rng, DEVICES, sizes=(1, 16384)) for _ in range(300)]
    specs = [spec for spec in drawn if spec is not None]
    clusters = [cluster_of(spec) for spec in specs]
    sizes = [cluster.num_devices for cluster in clusters]

    assert min(sizes) <= 4
    assert max(sizes) >= 8192
    assert any(size & (size - 1) for size in sizes)
    assert {1, 2, 4, 8, 16} <= {host.num_devices for c in clusters for host in c.hosts}
    assert {0, 1, 2} == {len(cluster.levels) for cluster in clusters}
    assert any(len(spec.parts) == 2 for spec in specs)


def test_a_cluster_is_what_its_specification_says() -> None:
    """Four hosts of two V100 behind PCIe, in racks of two; racks share a quarter of 10 Gb/s."""
    spec = ClusterSpec(
        parts=(ClusterPart(num_hosts=4, devices_per_host=2, device="v100-sxm2-16gb"),),
        host_link="pcie3",
        network="ethernet-10g",
        rack_hosts=2,
    )
    cluster = cluster_of(spec)

    assert "4x2xv100-sxm2-16gb,pcie3,ethernet-10g,racks of 2" == spec.name == cluster.name
    assert [2, 2, 2, 2] == [host.num_devices for host in cluster.hosts]
    assert {"pcie3"} == {host.link.name for host in cluster.hosts}
    assert [(2, 1.25e9), (4, 0.3125e9)] == [(n, link.bytes_per_s) for n, link in cluster.levels]


def test_too_much_memory_gives_no_cluster() -> None:
    rng = np.random.default_rng(0)

    assert draw_cluster(rng, ("t4",), sizes=(1, 8), least_memory_bytes=1e12) is None


@pytest.mark.parametrize(
    ("precision", "optimizer", "bytes_of_one"),
    [("bf16", "adamw", 16), ("fp16", "sgd", 8), ("fp32", "adamw", 16), ("fp32", "sgd", 8)],
)
def test_state_of_a_parameter(precision: str, optimizer: str, bytes_of_one: int) -> None:
    """bf16: 2 + 2 and a master of 4; AdamW two moments of 4 more."""
    model = ModelSpec(reference="tiny-mlp", global_batch=8, precision=Precision(precision))

    expected = bytes_of_one * parameters_of("tiny-mlp")
    assert expected == state_bytes(model, OptimizerName(optimizer))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(BadRequest, match="no split 'tests'; use one of train, "):
        draw(0, "tests")


# Frozen sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", frozen_sets())
def test_a_frozen_set_is_drawn_again_as_it_was(name: str) -> None:
    frozen = frozen_sets()[name]
    specs = frozen_specs(name)

    assert frozen.count == len(specs)
    assert frozen.sha256 == specs_sha256(specs)


def test_enough_is_frozen_to_test_on() -> None:
    counts = {name: item.count for name, item in frozen_sets().items()}

    assert {name for name in SPLITS if name != "any"} == set(counts)
    assert counts["test-in"] >= 500


def test_another_specification_is_another_hash() -> None:
    specs = [draw(seed, "train") for seed in range(3)]
    hashes = [specs_sha256(found) for found in itertools.permutations(specs)]

    assert 6 == len(set(hashes))


def test_a_set_that_is_drawn_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = freeze("mine", "train", first_seed=0, count=2)
    moved = msgspec.structs.replace(good, first_seed=1)
    sets: dict[str, FrozenSet] = {"mine": good}
    monkeypatch.setattr("meshwright.env.frozen.frozen_sets", lambda: sets)

    assert (draw(0, "train"), draw(1, "train")) == frozen_specs("mine")
    assert (draw(0, "train"),) == frozen_specs("mine", 1)
    sets["mine"] = moved
    with pytest.raises(BadRequest, match=r"set 'mine' was frozen as .* freeze it anew"):
        frozen_specs("mine")
    with pytest.raises(BadRequest, match="no set 'other'; use one of mine"):
        frozen_specs("other")
