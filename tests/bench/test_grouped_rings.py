"""Rings of context parallelism pass on the heads of keys and values there are."""

from __future__ import annotations

import pytest

from meshwright.bench.predict import Predictor, PricedRun
from meshwright.spmd.program import CollectiveKind
from tests.bench.given_runs import Cell, run

LONG: dict[str, Cell] = {
    "arch": "llama", "gated_mlp": True, "hidden": 1024, "heads": 16, "seq_len": 2048, "tp": 2,
    "pp": 1, "dp": 2, "cp": 8, "gpus": 32, "hosts": 4, "layers": 2, "global_batch": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def priced_with(predictor: Predictor, **changes: Cell) -> PricedRun:
    return predictor.priced(run(**{**LONG, **changes}))


def ring_bytes(priced: PricedRun) -> float:
    found = priced.table.columns.collectives
    return sum(
        float(found.num_bytes[found.group == number].sum())
        for number, (kind, _) in enumerate(found.groups)
        if kind is CollectiveKind.RING
    )


@pytest.mark.parametrize("framework", ["Megatron-Core", "torchtitan"])
@pytest.mark.parametrize(
    ("kv_heads", "tp", "share"), [(16, 2, 1.0), (4, 2, 0.25), (2, 2, 0.125), (2, 4, 0.25)]
)
def test_bytes_of_a_ring_are_those_of_grouped_heads(
    predictor: Predictor, framework: str, kv_heads: int, tp: int, share: float
) -> None:
    """Of 16 heads; ranks beyond the groups hold one of them each."""
    cells: dict[str, Cell] = {"framework": framework, "tp": tp, "dp": 4 // tp}
    full = priced_with(predictor, **cells, kv_heads=16)
    grouped = priced_with(predictor, **cells, kv_heads=kv_heads)

    assert share == pytest.approx(ring_bytes(grouped) / ring_bytes(full))


def test_a_ring_of_grouped_heads_costs_less_and_hides_in_long_sequences(
    predictor: Predictor,
) -> None:
    """Attention grows with the square of the sequence, what goes around with the sequence."""

    def exposed_s(seq_len: int, kv_heads: int) -> float:
        links: dict[str, Cell] = {"gpus_per_host": 1, "gpus": 8, "hosts": 8, "inter_host_GBps": 10}
        sized: dict[str, Cell] = {"seq_len": seq_len, "kv_heads": kv_heads, "tp": 1, "dp": 1}
        return priced_with(predictor, **links, **sized).cost().breakdown_s["tp_communication"]

    # Besides rings, ranks add up the loss.
    assert exposed_s(16384, 16) == pytest.approx(4 * exposed_s(16384, 4), rel=0.2)
    assert exposed_s(2**19, 4) == exposed_s(2**19, 16) < exposed_s(16384, 4)
