"""The limits of CONTRIBUTING.md: lines of a class or function, positional arguments of a call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sskd import CONF

ROOT = CONF.parent
MOST_CLASS_LINES = 120
MOST_FUNCTION_LINES = 40
MOST_POSITIONAL = 4
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, ast.Module]:
    paths = [
        *sorted(ROOT.glob("*.py")),
        *(path for place in ("sskd", "hydra_plugins", "benchmarks") for path in python(place)),
    ]
    assert len(paths) > 100
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in paths}


def python(place: str) -> list[Path]:
    return sorted((ROOT / place).rglob("*.py"))


def too_long(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        most = MOST_FUNCTION_LINES if isinstance(node, Function) else MOST_CLASS_LINES
        if isinstance(node, Function | ast.ClassDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > most:
                yield f"{node.name}: {lines} lines"


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """The suite's own functions and classes, without those that pass on any arguments."""
    return {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, Function) and node.args.vararg is None)
    }


def crowded_calls(tree: ast.Module, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in own:
                yield f"{node.lineno}: {name}"


def test_no_class_and_no_function_is_too_long() -> None:
    found = {name: long for name, tree in modules().items() if (long := list(too_long(tree)))}
    assert not found


def test_no_call_has_many_positional_arguments() -> None:
    trees = modules()
    own = own_names(trees)
    found = {
        name: calls for name, tree in trees.items() if (calls := list(crowded_calls(tree, own)))
    }
    assert not found


@pytest.mark.parametrize(
    ("code", "long", "crowded"),
    [
        ("def f(a, b, c, d, e):\n    return a\nf(1, 2, 3, 4, 5)", 0, 1),
        ("def f(a, b, c, d, e):\n    return a\nf(1, 2, 3, 4, e=5)", 0, 0),
        ("def f(*a):\n    return a\nf(1, 2, 3, 4, 5)", 0, 0),
        ("def f():\n" + "    g()\n" * 40, 1, 0),
        ("def f():\n" + "    g()\n" * 39, 0, 0),
        ("class A:\n" + "    a = 1\n" * 120, 1, 0),
        ("class A:\n" + "    a = 1\n" * 119, 0, 0),
    ],
)
def test_the_limits_are_noticed(code: str, long: int, crowded: int) -> None:
    tree = ast.parse(code)
    assert len(list(too_long(tree))) == long
    assert len(list(crowded_calls(tree, own_names({"": tree})))) == crowded
