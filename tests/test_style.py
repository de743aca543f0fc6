"""Limits that ruff has no rule for."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("examples", "kernels", "molora", "tests", "train")
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 59


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(text: str, limit: int) -> list[str]:
    """`name (lines)` of every function, methods and nested ones too, of more than `limit` lines.

    Counted from `def` to the last line of the body, the docstring included, decorators not.
    """
    sizes = [(f.name, (f.end_lineno or 0) - f.lineno + 1) for f in functions(ast.parse(text))]
    return [f"{name} ({size})" for name, size in sizes if size > limit]


def test_there_are_sources():
    folders = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert {"kernels", "molora", "tests"} <= folders


def test_no_file_is_long():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_no_function_is_long():
    found = {
        str(path.relative_to(ROOT)): long_functions(path.read_text(), MAX_FUNCTION_LINES)
        for path in sources()
    }
    assert {name: functions for name, functions in found.items() if functions} == {}


@pytest.mark.parametrize("indent", ["", "    "], ids=["function", "method"])
def test_the_count_is_from_def_to_the_last_line(indent: str):
    body = "".join(f"{indent}    x = {i}\n" for i in range(3))
    text = ("class C:\n" if indent else "") + f"{indent}def f():\n{body}"
    assert long_functions(text, limit=4) == []
    assert long_functions(text, limit=3) == ["f (4)"]


def test_no_script_is_named_like_something_it_imports():
    # train/ is sys.path[0] of its scripts: a train/datasets.py would hide the library of that name
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    scripts = {path.stem for path in (ROOT / "train").glob("*.py")}
    assert scripts & taken == set()
