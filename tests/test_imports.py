"""The import graph of the package."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from sskd import CONF

ROOT = CONF.parent


def imports() -> dict[str, set[str]]:
    """Return for each module the modules of the package that it imports, in functions too."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "sskd").rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        graph[module] = names & set(paths) - {module}
    return graph


def test_the_import_graph_has_no_circle() -> None:
    graph = imports()
    assert "sskd.methods" in graph["sskd.config"]
    TopologicalSorter(graph).prepare()  # raises CycleError
