"""``docs/records.md`` says what the code does: kinds, keys, units and columns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from meshwright.records import KINDS, RECORD_SCHEMA_VERSION
from meshwright.records.export import TABLE_COLUMNS
from meshwright.records.kinds import COLLECTIVES, DIRECTIONS, DTYPES, RESULT_KEYS
from meshwright.records.layout import COLUMNS, ROWS_PER_GROUP, VERSION_KEY
from tests.house.tree import ROOT


def words(names: object) -> str:
    return ", ".join(f"`{name}`" for name in names)  # type: ignore[attr-defined]


def table_of_kinds() -> str:
    """The table of kinds, as it stands in the document."""
    rows = ["| kind | unit | required keys | other keys |", "| --- | --- | --- | --- |"]
    for kind, keys in KINDS.items():
        prefixes = [f"{prefix}*" if prefix else "any" for prefix in keys.prefixes]
        cells = (
            f"`{kind}`: {keys.says}",
            words(keys.units),
            words(keys.required) or "none",
            words((*keys.optional, *prefixes)) or "none",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_document_has_every_kind_key_and_column() -> None:
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")

    assert table_of_kinds() in text
    assert words(COLUMNS) in " ".join(text.split())
    assert words(TABLE_COLUMNS) in " ".join(text.split())
    assert words(sorted(RESULT_KEYS)) in " ".join(text.split())
    assert all(
        words(known) in " ".join(text.split()) for known in (DIRECTIONS, DTYPES, COLLECTIVES)
    )
    assert f"`{VERSION_KEY.decode()}` = {RECORD_SCHEMA_VERSION}" in text
    assert f"groups of {ROWS_PER_GROUP:,}" in text


def test_the_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program += "\nprint(len(records), problems, records[0].median)"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert 0 == ran.returncode, ran.stderr
    assert "1 [] 0.001\n" == ran.stdout


def test_importing_the_records_needs_no_pyarrow() -> None:
    program = "import sys, meshwright.records; print('pyarrow' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert "False\n" == ran.stdout
