"""Every rule of the house fails on a planted violation and passes the nearest clean code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.house import rules

Rule = Callable[[str], list[str]]

LONG_BODY = "\n".join(f"    x = {i}" for i in range(rules.MAX_FUNCTION_LINES))
LONG_DOCSTRING = "\n".join(f"    line {i}" for i in range(rules.MAX_FUNCTION_LINES))

PLANTED: list[tuple[Rule, str]] = [
    (rules.unitless_names, "class Link:\n    latency: float\n"),
    (rules.unitless_names, "class Link:\n    link_bandwidth: float | None = None\n"),
    (rules.unitless_names, "def send(num_bytes: int, *, hop_latency: float) -> None: ...\n"),
    (rules.unitless_names, "def step_time(n: int) -> float: ...\n"),
    (rules.unitless_names, "def send(duration): ...\n"),
    (rules.unitless_names, "TOTAL_MEMORY = 80\n"),
    (rules.too_many_lines, "x = 1\n" * (rules.MAX_FILE_LINES + 1)),
    (rules.long_functions, f"def f() -> None:\n{LONG_BODY}\n"),
    (rules.long_functions, f"class C:\n  async def f(self) -> None:\n{LONG_BODY}\n"),
    (rules.undocumented_names, "x = 1\n"),
    (rules.undocumented_names, '"""Doc."""\ndef f() -> None: ...\n'),
    (rules.undocumented_names, '"""Doc."""\nclass C:\n    """Doc."""\n    def f(self): ...\n'),
    (rules.missing_exports, "def f() -> None: ...\n"),
    (rules.missing_exports, "__all__ = ['f', 'g']\ndef f() -> None: ...\n"),
    (rules.calls_of_print, "def f() -> None:\n    print('x')\n"),
    (rules.global_statements, "x = 1\ndef f() -> None:\n    global x\n    x = 2\n"),
    (rules.marks_of_unfinished_work, "x = 1  # TO" + "DO later\n"),
    (rules.marks_of_unfinished_work, "# FIX" + "ME\n"),
    (rules.machine_paths, "path = '/ho" + "me/ada/model.json'\n"),
    (rules.machine_paths, "made in /wor" + "k/tree\n"),
    (rules.top_level_room_imports, "import env\n"),
    (rules.top_level_room_imports, "from runtime.step import run\n"),
    (rules.top_level_room_imports, "from . import step\n"),
    (rules.tests_without_assertion, "def test_it() -> None:\n    run()\n"),
]

CLEAN: list[tuple[Rule, str]] = [
    (rules.unitless_names, "class Link:\n    latency_s: float\n    memory: MemoryTable\n"),
    (rules.unitless_names, "def _time(latency_s: float) -> float: ...\n"),
    (rules.too_many_lines, "x = 1\n" * rules.MAX_FILE_LINES),
    (rules.long_functions, f'def f() -> None:\n    """Doc.\n\n{LONG_DOCSTRING}\n    """\n'),
    (rules.undocumented_names, '"""Doc."""\ndef _f() -> None: ...\n'),
    (rules.undocumented_names, ""),
    (rules.missing_exports, "__all__ = ['f']\nif True:\n    from a import f\n"),
    (rules.missing_exports, '"""Only a docstring."""\nfrom __future__ import annotations\n'),
    (rules.calls_of_print, "def f(console) -> None:\n    console.print('x')\n"),
    (rules.global_statements, "x = 1\n"),
    (rules.marks_of_unfinished_work, "# What is left to do is listed below.\n"),
    (rules.machine_paths, "see https://example.org/ho" + "me/page\n"),
    (rules.top_level_room_imports, "from meshwright.env import placement\nimport environs\n"),
    (rules.tests_without_assertion, "def test_it() -> None:\n    assert 1 == run()\n"),
    (rules.tests_without_assertion, "def test_it():\n    with pytest.raises(E): run()\n"),
    (rules.tests_without_assertion, "def test_it():\n    np.testing.assert_allclose(a, b)\n"),
]


@pytest.mark.parametrize(("rule", "source"), PLANTED)
def test_rule_catches_a_planted_violation(rule: Rule, source: str) -> None:
    assert 1 == len(rule(source))


@pytest.mark.parametrize(("rule", "source"), CLEAN)
def test_rule_passes_clean_code(rule: Rule, source: str) -> None:
    assert [] == rule(source)


def test_imported_distributions_knows_names_that_differ() -> None:
    source = "import os, yaml\nimport torch_geometric.nn\nfrom torch import nn\nimport meshwright\n"

    assert {"pyyaml", "torch", "torch-geometric"} == rules.imported_distributions(source)
