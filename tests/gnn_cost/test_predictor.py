"""Predictions: bounds, sizes, trust, intervals, and the files they come from."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from meshwright.cluster.catalog import find_device, known_devices
from meshwright.cost.work import EdgeKind, Family, OperatorWork
from meshwright.errors import BadRequest
from meshwright.gnn_cost.ensemble import FittedEnsemble, GraphEnsemble, fit_ensemble
from meshwright.gnn_cost.features import ideal_time_s
from meshwright.gnn_cost.operators.splits import take
from meshwright.gnn_cost.operators.typical import typical_times_s
from meshwright.gnn_cost.predictor import (
    LARGEST_OVER_TYPICAL,
    WEIGHTS_KIND,
    LearnedOperators,
    load_operators,
    pretrained,
)
from meshwright.gnn_cost.weights import load_weights, save_weights
from tests.gnn_cost.grown import growing_dims, resized
from tests.gnn_cost.learned import DEVICES, measured, random_work, small_ensemble, work_of

A100 = DEVICES[0]


@cache
def fitted() -> FittedEnsemble:
    return fit_ensemble(small_ensemble(), measured(800))


def random_model(seed: int) -> LearnedOperators:
    """The fitted model with its networks' weights replaced by random ones."""
    rng = np.random.default_rng(seed)
    tensors = dict(fitted().tensors)
    for name, tensor in tensors.items():
        if name.endswith(("_weight", "_bias")):
            noise = rng.normal(0, 10 ** rng.uniform(-1, 1), tensor.shape).astype(np.float32)
            is_positive = name in ("one_weight", "two_weight", "out_weight", "skip_weight")
            tensors[name] = np.abs(noise) if is_positive else noise
    return LearnedOperators(tensors=tensors)


def chained(work: OperatorWork) -> OperatorWork:
    first = np.arange(work.count - 1)
    return replace(
        work,
        edges=np.stack([first, first + 1]),
        edge_kind=np.full(len(first), int(EdgeKind.DATA)),
    )


def test_the_ensemble_predicts_what_it_was_not_shown() -> None:
    model, other = GraphEnsemble(small_ensemble()), measured(300, seed=7)
    model.fit(measured(800))

    assert np.median(np.abs(model.predict(other) / other.time_s - 1)) < 0.15


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_random_weights_stay_within_bounds(seed: int) -> None:
    """Never below the ideal time, never above all bounds together, always a number."""
    work = chained(random_work(50, np.random.default_rng(seed)))
    ideal_s = ideal_time_s(work, (A100,), np.zeros(50, np.int64))

    priced = random_model(seed).operators(work, A100)

    assert np.isfinite(priced.time_s).all()
    assert (priced.time_s >= ideal_s * (1 - 1e-9)).all()
    assert (priced.time_s <= 1.5 * (2001 * ideal_s + 1e-4)).all()
    assert ((priced.trust >= 0) & (priced.trust <= 1)).all()


@given(seed=st.integers(0, 10**6), dim=st.integers(0, 3), factor=st.floats(1.0, 64.0))
@settings(max_examples=40, deadline=None)
def test_random_weights_never_predict_a_larger_operator_faster(
    seed: int, dim: int, factor: float
) -> None:
    """By construction, where all of the learned correction counts."""
    work = random_work(50, np.random.default_rng(seed))
    model = replace(random_model(seed), uses_trust=False)
    grows = growing_dims(work)[:, dim]

    before = model.operators(work, A100).time_s[grows]
    after = model.operators(resized(work, dim, factor), A100).time_s[grows]

    assert (after >= before * (1 - 1e-4)).all()


@pytest.mark.parametrize("what", ["flop", "num_bytes", "both"])
def test_more_work_is_never_faster_with_the_weights_of_the_package(what: str) -> None:
    work = random_work(3000, np.random.default_rng(1))
    more = replace(
        work,
        flop=work.flop * (1 if what == "num_bytes" else 1.7),
        num_bytes=work.num_bytes * (1 if what == "flop" else 1.7),
    )
    for name in ("a100-sxm-80gb", "h100-sxm-80gb", "v100"):
        device = find_device(name, where="test").device

        ratio = pretrained().operators(more, device).time_s
        ratio /= pretrained().operators(work, device).time_s

        assert ratio.min() > 0.98


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("factor", [1.0 + 1e-9, 1.13, 2.0, 7.0])
def test_larger_is_never_faster_with_the_weights_of_the_package(dim: int, factor: float) -> None:
    work = random_work(2000, np.random.default_rng(2))
    grows = growing_dims(work)[:, dim]
    for name in ("a100-sxm-80gb", "h100-sxm-80gb", "v100"):
        device = find_device(name, where="test").device
        before = pretrained().operators(work, device).time_s[grows]
        after = pretrained().operators(resized(work, dim, factor), device).time_s[grows]

        assert (after / before).min() > 0.98


def test_every_known_device_is_priced_by_the_weights_of_the_package() -> None:
    """All families and dtypes, above the ideal time and below a hundredth of a second here."""
    families, dtypes = np.meshgrid([*Family], np.arange(8))
    dims = np.tile([[4.0, 256.0, 256.0, 64.0]], (families.size, 1))
    work = replace(work_of(families.ravel(), dims), dtype=dtypes.ravel())
    for entry in known_devices():
        priced = pretrained().operators(work, entry.device)
        least = ideal_time_s(work, (entry.device,), np.zeros(work.count, np.int64))

        assert (priced.time_s >= least * (1 - 1e-9)).all()
        assert np.isfinite(priced.time_s).all()


def test_parts_can_be_switched_off() -> None:
    model, work = fitted().model, chained(random_work(40, np.random.default_rng(3)))
    alone = replace(model, uses_ensemble=False).operators(work, A100).time_s
    sure = replace(model, uses_trust=False).operators(work, A100)

    assert not np.array_equal(alone, model.operators(work, A100).time_s)
    assert 1.0 == sure.trust.min()
    unjoined = replace(work, edges=np.zeros((2, 0), np.int64), edge_kind=np.zeros(0, np.int64))
    np.testing.assert_array_equal(
        model.operators(unjoined, A100).time_s,
        replace(model, uses_messages=False).operators(work, A100).time_s,
    )


def test_trust_falls_with_distance_to_what_was_measured() -> None:
    """Trained on sizes up to 2^13; at 2^26 nothing is alike."""
    family = np.full(4, int(Family.MATMUL))
    dims = np.array([[1, 2.0**size, 2.0**size, 2.0**size] for size in (10, 14, 18, 26)])

    trust = fitted().model.operators(work_of(family, dims), A100).trust

    assert 1.0 == trust[0]
    assert (np.diff(trust) < 0).all()
    assert trust[-1] < 0.1


def test_an_element_width_never_measured_is_not_trusted_wholly() -> None:
    """All was measured in 16 bits, on this device too."""
    half = work_of(np.array([Family.MATMUL]), np.full((1, 4), [1.0, 1024, 1024, 1024]))
    single = replace(half, dtype=np.array([1]), num_bytes=2 * half.num_bytes)

    assert 1.0 == fitted().model.operators(half, A100).trust[0]
    assert fitted().model.operators(single, A100).trust[0] < 0.5


def test_intervals_are_wider_on_a_device_that_was_not_measured() -> None:
    """Of the very same data sheet: only its name tells."""
    work = work_of(np.array([Family.MATMUL]), np.full((1, 4), [1.0, 1024, 1024, 1024]))
    model = fitted().model
    unseen = replace(model, device_names=frozenset({"h100-sxm-80gb"}))

    low, high = model.intervals(work, A100)
    unseen_low, unseen_high = unseen.intervals(work, A100)

    assert A100.name in model.device_names
    assert unseen_low < low < high < unseen_high
    assert model.operators(work, A100).time_s == unseen.operators(work, A100).time_s


def test_devices_of_a_maker_never_measured_are_not_trusted() -> None:
    """MI300X and MI250X are near measured devices by data sheet; their maker tells them apart."""
    work = work_of(np.array([Family.MATMUL]), np.array([[1.0, 4096, 4096, 4096]]))
    model = pretrained()
    trust = {}
    for name in ("h100-sxm-80gb", "h200-sxm-141gb", "mi300x", "mi250x"):
        device = find_device(name, where="test").device
        trust[name] = model.operators(work, device).trust[0]
        same_s = replace(model, makers=frozenset()).operators(work, device).time_s
        if device.name.startswith("h"):
            np.testing.assert_array_equal(same_s, model.operators(work, device).time_s)

    assert frozenset({"NVIDIA"}) == model.makers == fitted().model.makers
    assert min(trust["h100-sxm-80gb"], trust["h200-sxm-141gb"]) > 0.9
    assert max(trust["mi300x"], trust["mi250x"]) < 0.1


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_weights_are_not_slower_than_what_is_typical_allows(seed: int) -> None:
    model, work = random_model(seed), random_work(64, np.random.default_rng(seed))
    ideal_s = ideal_time_s(work, (A100,), np.zeros(work.count, np.int64))

    time_s = model.operators(work, A100).time_s

    typical_s = typical_times_s(model.tensors, ideal_s, work.family)
    assert (time_s <= (LARGEST_OVER_TYPICAL * typical_s + 8e-5) * (1 + 1e-6)).all()


def test_a_family_never_measured_takes_the_analytic_price() -> None:
    """0.8 of the bandwidth and 3 us, as no convolution or pool was measured."""
    work = work_of(np.array([Family.POOL]), np.array([[1.0, 4096, 4096, 2]]))
    model = fitted().model

    priced = model.operators(work, A100)

    assert [0.0] == priced.trust.tolist()
    ideal_s = ideal_time_s(work, (A100,), np.zeros(1, np.int64))
    np.testing.assert_allclose(3e-6 + ideal_s / 0.8, priced.time_s, rtol=1e-6)
    typical = typical_times_s(model.tensors, ideal_s, work.family)
    np.testing.assert_allclose(typical, priced.time_s)


def test_intervals_cover_what_is_measured_elsewhere() -> None:
    """Of 90 % intervals: other draws of the same kind; near enough for 600 of them."""
    other = take(measured(1200, seed=11), np.arange(600))
    here = other.device == 0
    rows = other.device[other.graph] == 0
    work = other.work
    own = OperatorWork(
        family=work.family[rows],
        dtype=work.dtype[rows],
        dims=work.dims[rows],
        flop=work.flop[rows],
        num_bytes=work.num_bytes[rows],
        edges=np.zeros((2, 0), np.int64),
        edge_kind=np.zeros(0, np.int64),
    )

    low_s, high_s = fitted().model.intervals(own, A100)

    covered = (low_s <= other.time_s[here]) & (other.time_s[here] <= high_s)
    assert 0.8 < covered.mean() <= 1.0
    assert (low_s < high_s).all()


def test_weights_come_back_from_their_files(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    save_weights(path, fitted().tensors, kind=WEIGHTS_KIND, card={**fitted().card, "note": "test"})
    work = random_work(30, np.random.default_rng(5))

    loaded = load_operators(path).operators(work, A100)

    np.testing.assert_array_equal(fitted().model.operators(work, A100).time_s, loaded.time_s)
    _, card = load_weights(path, kind=WEIGHTS_KIND, versions={})
    assert "test" == card["note"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features_version": 0}, "features_version is 0"),
        ({"kind": "cats"}, "kind is 'cats'"),
    ],
)
def test_weights_of_another_kind_or_version_are_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "operators.safetensors"
    card = {**fitted().card, **change}
    kind = str(card.pop("kind", WEIGHTS_KIND))
    save_weights(path, fitted().tensors, kind=kind, card=card)  # type: ignore[arg-type]

    with pytest.raises(BadRequest, match=said):
        load_operators(path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    with pytest.raises(BadRequest, match="cannot be read"):
        load_operators(path)

    for name, bad in (("out_weight", np.float32(-1)), ("one_weight", np.float32(np.nan))):
        tensors = {key: one.copy() for key, one in fitted().tensors.items()}
        tensors[name].flat[0] = bad
        save_weights(path, tensors, kind=WEIGHTS_KIND, card=fitted().card)
        with pytest.raises(BadRequest, match="fit the weights again"):
            load_operators(path)

    tensors = {key: one for key, one in fitted().tensors.items() if key != "trust_mean"}
    save_weights(path, tensors, kind=WEIGHTS_KIND, card=fitted().card)
    with pytest.raises(BadRequest, match="trust_mean"):
        load_operators(path)
    path.write_bytes(save({"other": np.zeros(3)}))
    with pytest.raises(BadRequest, match="not the file its card describes"):
        load_operators(path)


def test_no_operators_cost_nothing() -> None:
    none = random_work(0, np.random.default_rng(0))

    assert 0 == len(fitted().model.operators(none, A100).time_s)
