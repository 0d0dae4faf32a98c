from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.calibration import DEFAULTS, Calibration, Origin
from meshwright.errors import BadRequest

BOUNDS = Calibration.bounds()


def test_defaults_are_assumptions_within_their_bounds() -> None:
    for name, bounds in BOUNDS.items():
        assert bounds.low <= getattr(DEFAULTS, name) <= bounds.high
        assert Origin.ASSUMPTION is DEFAULTS.origin_of(name)


def test_the_documents_list_every_figure() -> None:
    """Name, default, bounds and unit of each row of the table, in order."""
    text = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.partition("## Calibration")[2].splitlines()]
    units = {"1": "ratio", "": "flag", "B": "bytes", "s": "s", "s/B": "s/B"}

    assert [
        [
            f"| `{name}`",
            f"{getattr(DEFAULTS, name):.12g}",
            f"{b.low:.12g} to {b.high:.12g}",
            units[b.unit],
        ]
        for name, b in BOUNDS.items()
    ] == [row[:4] for row in rows if row[0].startswith("| `")]


@given(
    st.dictionaries(st.sampled_from(sorted(BOUNDS)), st.floats(0, 1)),
    st.sampled_from(["", "float8_e4m3fn", "nvfp4"]),
)
def test_figures_survive_json(shares: dict[str, float], dtype: str) -> None:
    figures: dict[str, float | str] = {"matmul_dtype": dtype}
    for name, share in shares.items():
        bounds = BOUNDS[name]
        value = bounds.low + share * (bounds.high - bounds.low)
        is_whole = isinstance(getattr(DEFAULTS, name), int)
        figures[name] = int(value) if is_whole else min(value, bounds.high)
    found = DEFAULTS.with_figures(Origin.LEARNED, **figures)

    text = json.dumps(found.to_json())

    assert found == Calibration.from_json(json.loads(text), where="here")
    assert Origin.LEARNED is found.origin_of("matmul_dtype")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ('{"overlap_fraction": {"value": 1.5}}', "overlap_fraction is 1.5; it must be 0 to 1"),
        ('{"speed": {"value": 1}}', "there is no figure 'speed'"),
        ('{"overlap_fraction": {"value": "much"}}', "overlap_fraction.value is of another type"),
        ('{"reserved_bytes": {"value": 1.5}}', "reserved_bytes.value is of another type"),
        ('{"matmul_dtype": {"value": "float7"}}', "matmul_dtype is 'float7'; use one of"),
        ('{"overlap_fraction": {"value": 0.5, "origin": "guess"}}', "origin"),
        ('{"overlap_fraction": 0.5}', "overlap_fraction"),
    ],
)
def test_a_bad_figure_is_an_error_of_one_line(figures: str, message: str) -> None:
    raw = json.loads(f'{{"schema_version": 1, "figures": {figures}}}')

    with pytest.raises(BadRequest, match=message) as error:
        Calibration.from_json(raw, where="bad.json")

    assert "\n" not in str(error.value)
    assert "bad.json" in str(error.value)


@pytest.mark.parametrize("raw", [[], {}, {"schema_version": 2, "figures": {}}])
def test_a_document_of_another_form_is_refused(raw: Any) -> None:
    with pytest.raises(BadRequest) as error:
        Calibration.from_json(raw, where="bad.json")

    assert "\n" not in str(error.value)
