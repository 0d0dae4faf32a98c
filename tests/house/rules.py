"""The habits of this code base as functions: source text in, violations out.

Each returns one line per violation and an empty list for clean code, so that a test can show both
that the tree is clean and that the rule catches what it is for.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

__all__ = [
    "MAX_FILE_LINES",
    "MAX_FUNCTION_LINES",
    "calls_of_print",
    "global_statements",
    "imported_distributions",
    "long_functions",
    "machine_paths",
    "marks_of_unfinished_work",
    "missing_exports",
    "tests_without_assertion",
    "too_many_lines",
    "top_level_room_imports",
    "undocumented_names",
    "unitless_names",
]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
"""Without the docstring."""

_QUANTITY_WORDS = {
    "bandwidth",
    "duration",
    "elapsed",
    "flops",
    "latency",
    "memory",
    "speed",
    "throughput",
    "time",
}
_NUMBER_TYPE = re.compile(r"\b(int|float|Tensor|ndarray|NDArray)\b")
_ROOMS_AT_ROOT = {"agents", "env", "gnn_cost", "profiling", "runtime"}
# Written in two parts so that this file keeps its own rules.
_UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
_MACHINE_PATH = re.compile(r"(?<![\w.~-])/(wor" + r"k|far" + r"m|roo" + r"t|hom" + r"e)/\w")
_DISTRIBUTION_OF = {
    "sklearn": "scikit-learn",
    "torch_geometric": "torch-geometric",
    "yaml": "pyyaml",
}

_Definition = ast.FunctionDef | ast.AsyncFunctionDef
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def unitless_names(source: str) -> list[str]:
    """Public numbers whose name ends in a quantity and not in its unit (``latency``)."""
    tree = ast.parse(source)
    return [
        f"line {line}: {name} needs a unit suffix (_s, _bytes, _flop, _bytes_per_s)"
        for name, annotation, line in _named_numbers(tree)
        if not name.startswith("_")
        and name.lower().split("_")[-1] in _QUANTITY_WORDS
        and (annotation is None or _NUMBER_TYPE.search(ast.unparse(annotation)))
    ]


def _named_numbers(tree: ast.Module) -> Iterator[tuple[str, ast.expr | None, int]]:
    """Name, annotation and line of fields, constants, arguments and functions."""
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            if node.returns is not None:
                yield node.name, node.returns, node.lineno
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield argument.arg, argument.annotation, argument.lineno
        elif isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id, statement.annotation, statement.lineno
                elif isinstance(statement, ast.Assign) and _is_number(statement.value):
                    for target in statement.targets:
                        if isinstance(target, ast.Name):
                            yield target.id, None, statement.lineno


def _is_number(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def too_many_lines(source: str) -> list[str]:
    """One line when the file is longer than ``MAX_FILE_LINES``."""
    num_lines = len(source.splitlines())
    return [f"{num_lines} lines, {MAX_FILE_LINES} allowed"] if num_lines > MAX_FILE_LINES else []


def long_functions(source: str) -> list[str]:
    """Functions over ``MAX_FUNCTION_LINES``, docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DEFINITIONS):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                num_lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                found.append(f"line {node.lineno}: {node.name} has {num_lines} lines")
    return found


def undocumented_names(source: str) -> list[str]:
    """The module, and its public classes, functions and methods, without a docstring."""
    tree = ast.parse(source)
    if not tree.body:
        return []
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | _Definition) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None and not _is_overload(node):
                    found.append(f"line {node.lineno}: {prefix}{node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return found


def _is_overload(node: ast.ClassDef | _Definition) -> bool:
    return any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)


def missing_exports(source: str) -> list[str]:
    """No ``__all__`` in a module that defines something, or names in it that do not exist."""
    tree = ast.parse(source)
    bound = _bound_names(tree)
    if not bound:
        return []
    listed: list[str] | None = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = list(ast.literal_eval(node.value))
    if listed is None:
        return ["the module has no __all__"]
    return [f"__all__ names {name}, which does not exist" for name in listed if name not in bound]


def _bound_names(tree: ast.Module) -> set[str]:
    """Names the top level of a module defines or imports, also under an ``if``."""
    bound: set[str] = set()
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef | _Definition):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if getattr(node, "module", "") != "__future__":
                bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            bound |= {
                name.id
                for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return bound


def calls_of_print(source: str) -> list[str]:
    """Calls of the builtin ``print``."""
    return [
        f"line {node.lineno}: print"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def global_statements(source: str) -> list[str]:
    """``global`` statements."""
    return [
        f"line {node.lineno}: global {', '.join(node.names)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Global)
    ]


def marks_of_unfinished_work(source: str) -> list[str]:
    """Lines with one of the usual marks for work put off."""
    return _matching_lines(_UNFINISHED, source)


def machine_paths(text: str) -> list[str]:
    """Lines that name an absolute path of somebody's machine."""
    return _matching_lines(_MACHINE_PATH, text)


def _matching_lines(pattern: re.Pattern[str], text: str) -> list[str]:
    return [
        f"line {number}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def top_level_room_imports(source: str) -> list[str]:
    """Imports of a room under its folder's name (``import env``), and relative imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        found += [
            f"line {node.lineno}: import of {name}; write meshwright.{name.lstrip('.')}"
            for name in names
            if name.split(".")[0] in _ROOMS_AT_ROOT or name.startswith(".")
        ]
    return found


def tests_without_assertion(source: str) -> list[str]:
    """Test functions that cannot fail: no assert, no ``pytest.raises``, no call of a check."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _DEFINITIONS) or not node.name.startswith("test_"):
            continue
        if not any(_can_fail(inner) for inner in ast.walk(node)):
            found.append(f"line {node.lineno}: {node.name} asserts nothing")
    return found


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).split(".")[-1]
    return name in ("fail", "raises", "warns", "check", "_check") or name.startswith(
        ("assert_", "check_", "_check_", "require_")
    )


def imported_distributions(source: str) -> set[str]:
    """Distributions, by their name on the package index, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "meshwright"}
    return {_DISTRIBUTION_OF.get(name, name.replace("_", "-")) for name in found}
