"""Traces of real machines, where they are at hand: counts, shares and ranks that agree.

They lie in the folder ``MESHWRIGHT_TRACES``, else beside the checkout in ``shared/data/traces``.
"""

from __future__ import annotations

import csv
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from meshwright.profiling.traces.importing import import_traces
from tests.house.tree import ROOT

FOLDER = Path(os.environ.get("MESHWRIGHT_TRACES", ROOT.parent / "shared" / "data" / "traces"))
INDEX = FOLDER / "INDEX.csv"

pytestmark = pytest.mark.skipif(
    not INDEX.is_file(), reason="no real traces at hand; name their folder in MESHWRIGHT_TRACES"
)


def _listed() -> list[dict[str, str]]:
    if not INDEX.is_file():
        return []
    with INDEX.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


LISTED = _listed()
PROFILES = [row["file"] for row in LISTED if int(row["kernels"] or 0)]
GRAPHS = [row["file"] for row in LISTED if not int(row["kernels"] or 0)]


@cache
def _imported(name: str) -> list[Any]:
    return import_traces([FOLDER / name])


@pytest.mark.parametrize("name", PROFILES)
def test_counts_are_those_of_the_index(name: str) -> None:
    (row,) = (row for row in LISTED if row["file"] == name)
    ranks = [rank for one in _imported(name) for rank in one.summary["ranks"]]
    kernels = sum(device["num_kernels"] for rank in ranks for device in rank["devices"])
    collectives = sum(one["num_calls"] for rank in ranks for one in rank["collectives"])

    assert int(row["events"]) == sum(rank["num_events"] for rank in ranks)
    assert int(row["kernels"]) == kernels
    assert int(row["nccl_kernels"]) == collectives


@pytest.mark.parametrize("name", PROFILES)
def test_shares_sum_to_the_span_of_every_iteration(name: str) -> None:
    for one in _imported(name):
        for rank in one.summary["ranks"]:
            for device in rank["devices"]:
                assert device["iterations"]
                for share in device["iterations"]:
                    whole_s = (
                        share["compute_s"]
                        + share["communication_s"]
                        - share["overlap_s"]
                        + share["idle_s"]
                    )
                    assert whole_s == pytest.approx(share["span_s"], abs=1e-9)
                    assert 0 <= share["overlap_s"] <= share["compute_s"] + 1e-12
                    assert share["overlap_s"] <= share["communication_s"] + 1e-12
                    assert 0 <= share["idle_s"] <= share["span_s"]


@pytest.mark.parametrize("name", GRAPHS)
def test_execution_traces_are_read_and_say_what_they_lack(name: str) -> None:
    for one in _imported(name):
        assert one.summary["num_nodes"] > 0
        assert one.summary["num_operators"] > 0
        assert one.missing


def test_eight_ranks_agree_on_sizes_and_times() -> None:
    """All eight collectives of the step: equal sizes, ends within 10 us on all eight GPUs."""
    (found,) = _imported("param_dlrm_kineto.tar.gz")

    collectives = found.summary["set"]["collectives"]
    assert 8 == len(collectives)
    assert [] == found.summary["set"]["unmatched"]
    for one in collectives:
        assert (8, 8) == (one["num_ranks"], one["group_size"])
        assert one["sizes_equal_on_all_ranks"]
        assert one["sizes_agree"] is not False
        assert 0 < one["transfer_s"] <= one["longest_s"]
        assert one["end_skew_s"] < 10e-6
    assert [24576, 192, 1536, 13568, 1576964, 24576, 448, 907840] == [
        one["bytes"] for one in collectives
    ]


def test_execution_traces_find_their_ranks_again() -> None:
    found = import_traces(
        [FOLDER / "param_dlrm_kineto.tar.gz", FOLDER / "param_dlrm_pytorch_et.tar.gz"]
    )
    graphs = [one.summary for one in found if "linked_to" in one.summary]

    assert 8 == len({graph["linked_to"] for graph in graphs})
    assert {1633} == {graph["num_linked"] for graph in graphs}
    for graph in graphs:
        rank = graph["file"].rsplit("_", 1)[1].removesuffix(".json")
        assert f"worker{rank}_" in graph["linked_to"]


def test_sampled_ranks_that_cannot_be_matched_are_not() -> None:
    """Each of the two keeps other collectives; equal counts do not make them the same."""
    names = ("hta_sampled_rank-0.json.gz", "hta_sampled_rank-1.json.gz")

    (found,) = import_traces([FOLDER / name for name in names])

    assert [] == found.summary["set"]["collectives"]
    assert 2 == len(found.summary["set"]["unmatched"])


def test_both_forms_of_a_chakra_trace_say_the_same() -> None:
    (protobuf,) = _imported("chakra_feeder_tests_trace.tar.gz")
    plain = _imported("chakra_json_trace.tar.gz")[0]

    for key in ("num_nodes", "num_operators", "num_communication", "num_data_edges"):
        assert protobuf.summary[key] == plain.summary[key]
    assert protobuf.summary["device_s"] == pytest.approx(plain.summary["device_s"])
    assert protobuf.summary["host_s"] == pytest.approx(plain.summary["host_s"])
