"""The collector is asked less often for a while, and then as before."""

from __future__ import annotations

import gc

import pytest

from meshwright.cli.garbage import few_collections


def test_threshold_is_raised_within_and_restored() -> None:
    before = gc.get_threshold()
    with few_collections():
        within = gc.get_threshold()

    assert 100 * before[0] <= within[0]
    assert before == gc.get_threshold()


def test_threshold_is_restored_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="no"), few_collections():
        raise ValueError("no")

    assert before == gc.get_threshold()
