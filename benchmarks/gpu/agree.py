"""Compare steps on a device with steps on the CPU, and a CUDA graph with eager steps.

The comparison with the CPU also reports where the host waits for the device.

The weights, the batches and the draws of both sides are the same, so rounding is the only
difference. Training amplifies it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.gpu.cpu_steps import compare_with_cpu
from benchmarks.gpu.graph_steps import compare_graph
from benchmarks.gpu.rows import settings_of
from benchmarks.gpu.steps import IMAGES
from benchmarks.gpu.teachers import compare_teacher
from benchmarks.gpu.worker import Measurement, Values
from benchmarks.launches import cases

TEACHERS = ["resnet56", "wrn_40_2", "vgg13", "resnet32x4", "ResNet50"]  # of the published pairs


def settings(options: argparse.Namespace) -> Values:
    """Return what decides the values of the rows beside their keys."""
    return settings_of(options, "agree_pair", "batch", "images")


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """Yield the comparisons of the teachers, then those of each method and phase."""
    for name in options.teachers:
        for precision in options.precisions:
            comparison = partial(compare_teacher, name, options.device, precision)
            yield f"teacher {name} {precision}", comparison
    for case, phase in cases(options.agree_pair, options):
        small = replace(case, images=min(case.images, IMAGES))
        key = f"{case.method} {phase} {case.precision}"
        yield f"cpu {key}", partial(compare_with_cpu, small, phase)
        yield f"graph {key}", partial(compare_graph, small, phase)
