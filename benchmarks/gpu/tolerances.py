"""The tables of the comparisons: the differences, and which of them exceed their tolerance.

The losses have the largest relative difference over the steps. The weights have the norm of the
difference of both updates, divided by the norm of the update. The tolerances of bf16 and TF32 are
rough.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.gpu.worker import Values
from benchmarks.harness import table_head, table_row

# Of losses, and of weights after a few steps, by precision.
TOLERANCES = {"fp32": (0.001, 0.05), "tf32": (0.02, 0.15), "bf16": (0.15, 0.7)}
TEACHER_TOLERANCE = 1e-3  # beside twice the difference of the plain network
GRAPH_TOLERANCE = 1e-2  # of losses and weights; cuDNN's deterministic algorithms should give 0
COLUMNS = (
    "method", "phase", "precision", "losses", "weights", "waits", "graph: losses", "weights",
    "moved", "verdict",
)  # fmt: skip
TEACHER_COLUMNS = (
    "teacher", "precision", "folded and fused", "plain", "fused convolutions", "verdict",
)  # fmt: skip


def table(found: Mapping[str, Values], options: argparse.Namespace) -> list[str]:
    """Return the lines of both tables."""
    names = [key.split(" ", 1)[1] for key in found if not key.startswith("teacher ")]
    steps = [step_row(name, found) for name in dict.fromkeys(names)]
    teachers = [teacher_row(key, found[key]) for key in found if key.startswith("teacher ")]
    return [
        *(f"**{options.agree_pair}**", "", *table_head(COLUMNS, text_columns=3), *steps, ""),
        *(*table_head(TEACHER_COLUMNS, text_columns=2), *teachers),
    ]


def step_row(name: str, found: Mapping[str, Values]) -> str:
    """Return the row of a method, phase and precision, of both comparisons."""
    cpu, graph = found.get(f"cpu {name}", {}), found.get(f"graph {name}", {})
    precision = name.split()[-1]
    limits = dict(zip(("losses", "weights"), TOLERANCES[precision], strict=True))
    faults = [f"CPU: {fault}" for fault in faults_of(cpu, limits)]
    exact = dict.fromkeys(limits, GRAPH_TOLERANCE)
    faults += [f"graph: {fault}" for fault in faults_of(graph, exact)]
    numbers = [*shown(cpu, limits), "yes" if cpu.get("wait") else "no" if cpu else ""]
    more = [*shown(graph, exact), len(graph["moved"]) if "moved" in graph else ""]
    verdict = "; ".join(faults) or ("agree" if cpu and graph else "")
    return table_row([*name.split(), *numbers, *more, verdict])


def teacher_row(key: str, values: Values) -> str:
    """Return the row of a teacher in a precision."""
    _, name, precision = key.split()
    limits = {"features": 2 * values.get("plain", 0.0) + TEACHER_TOLERANCE}
    verdict = "; ".join(faults_of(values, limits)) or "agree"
    numbers = [*shown(values, ["features", "plain"]), values.get("fused", "")]
    return table_row([name, precision, *numbers, verdict])


def faults_of(values: Values, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield what is wrong with a comparison."""
    if "error" in values:
        yield values["error"]
    for key, limit in limits.items():
        if key in values and not (values[key] <= limit and math.isfinite(values[key])):
            yield f"{key} above {limit:g}"
    if values.get("wait"):
        yield values["wait"]
    if values.get("moved"):
        yield f"moved: {', '.join(values['moved'][:3])}"


def shown(values: Values, keys: Sequence[str] | Mapping[str, float]) -> list[str]:
    """Return the numbers of a comparison; "" for one that is missing."""
    return [f"{values[key]:.1e}" if key in values else "" for key in keys]
