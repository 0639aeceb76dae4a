"""What a training step asks of a GPU: kernels, waits and copies, counted without a GPU.

    python -m benchmarks.launches --out results/launches
    python -m benchmarks.launches --methods sskd --pairs wrn_40_2-wrn_16_2 --kernels

A step is the whole of it: next batch, augmentation, teacher, student, losses, backward pass,
optimizer and meter. It runs on ``benchmarks.stand_in``, on which this command starts itself again.
A library call is a convolution or a matrix product, which starts one kernel or more. The counts are
those of a step after the first few, in which the optimizer and cuDNN set themselves up.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import harness, stand_in
from benchmarks.stand_in.process import run_python
from benchmarks.workload import Case, case_of, loader_of, noise, phase_names, training_step
from sskd.data import Images
from sskd.device import tune_device
from sskd.errors import UserError
from sskd.methods import METHODS

PRECISIONS = ["fp32", "bf16"]
COLUMNS = (
    "method", "phase", "precision", "kernels", "library calls", "memsets", "all work", "waits",
    "copies to host", "copies to device", "copies on device",
)  # fmt: skip
# In the arguments of a kernel's template: words that do not say what it computes.
_PLUMBING = re.compile(
    r"at|native|c10|std|detail|internal|binary_internal|templates|cuda|anonymous|namespace|const|array"
    r"|OpaqueType|gpu_kernel_impl\w*|gpu_index_kernel|\w*UnaryFunctor|BinaryFunctor|ReduceOp"
    r"|func_wrapper_t|TensorListMetadata|distribution_nullary_kernel|true|false|unsigned|char|short"
    r"|int|long|float|double|bool|BFloat16|Half|u|Var"
)
_ELEMENT = re.compile(r"\b(?:unsigned char|long|float|double|bool|BFloat16|Half|int)\b")


@dataclass(frozen=True)
class Launches:
    """What one step of a phase asked of the device; ``kernels`` counts the launches by name."""

    pair: str
    method: str
    phase: str
    precision: str
    counts: stand_in.Counts
    kernels: dict[str, int]

    @property
    def work(self) -> int:
        """What the host queues: kernels, library calls, memsets and copies."""
        counts = self.counts
        copies = counts.host_to_device + counts.device_to_host + counts.device_to_device
        return counts.launches + counts.library_calls + counts.memsets + copies


def main() -> None:
    """Count and print row by row; write the tables if the options name a path."""
    options = parse_options()
    machine = harness.machine_of(options)
    images = noise(options.images, torch.device("cpu"))
    tune_device(torch.device(options.device))
    found: list[Launches] = []
    for pair in options.pairs:
        print("\n" + "\n".join(heading(pair, options, machine)), flush=True)
        for case, phase in cases(pair, options):
            found.append(count(case, images, phase))
            print("\n".join(lines_of(found[-1], options)), flush=True)
            measured = {"launches": [recorded(each, options) for each in found]}
            harness.write_results(options, measured, tables(found, options, machine))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line, in a process on the stand-in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=["resnet56-resnet20", "wrn_40_2-wrn_16_2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--kernels", action="store_true", help="list the launches by kernel")
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    parser.set_defaults(device="cuda", compile="off", graph="off", precompute=False)
    options = parser.parse_args()
    if not stand_in.is_active():
        try:
            run_python(["-m", "benchmarks.launches", *sys.argv[1:]])
        except UserError as error:
            sys.exit(f"error: {error}")
    return options


def cases(pair: str, options: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    """Yield the requested methods, phases and precisions; skip methods the pair cannot have."""
    for method in options.methods:
        for precision in options.precisions:
            case = case_of(options, pair=pair, method=method, precision=precision)
            phases = phase_names(case)
            if not phases:
                break
            for phase in phases:
                yield case, phase


def count(case: Case, images: Images, phase: str) -> Launches:
    """Return what a step of a phase asks of the device."""
    step = stepper(case, images, phase)
    for _ in range(harness.WARMUP):
        step()
    stand_in.reset()
    step()
    counts, kernels = stand_in.counts(), by_operation(stand_in.kernels())
    return Launches(case.pair, case.method, phase, case.precision, counts=counts, kernels=kernels)


def stepper(case: Case, images: Images, name: str) -> Callable[[], int]:
    """Return a function that takes one whole training step of the phase ``name``.

    ``images`` must be on the CPU: building a method reads tensors, which the stand-in does not
    compute.
    """
    loader = loader_of(case, images.to(case.device))
    # Kernels that are not executed leave garbage, which never agrees.
    with patch("sskd.models.fusing._agree", return_value=True):
        step = training_step(case.config, images, loader, name)
    return step.take


def by_operation(kernels: Mapping[str, int]) -> dict[str, int]:
    """Return how often each operation is launched, the most frequent first."""
    found: Counter[str] = Counter()
    for name, number in kernels.items():
        found[operation(name)] += number
    return dict(found.most_common())


def operation(name: str) -> str:
    """Return a kernel's template, what it computes and the type, of its ``name`` in C++.

    The name of a kernel of PyTorch has hundreds of characters; most of its elementwise kernels are
    one template, whose argument is what they compute.
    """
    if "<" not in name:
        return name
    template, arguments = name.split("<", 1)
    words = re.finditer(r"[A-Za-z_]\w*", arguments)
    computed = next((word for word in words if not _PLUMBING.fullmatch(word[0])), None)
    element = _ELEMENT.search(arguments, computed.end() if computed else 0)
    parts = [template.rpartition("::")[2], computed and computed[0], element and element[0]]
    return " ".join(part for part in parts if part)


def heading(pair: str, options: argparse.Namespace, machine: str) -> list[str]:
    """Return the lines above the rows of a pair."""
    title = f"**{pair}**, one training step, batch {options.batch}, {machine}"
    return [title, "", *harness.table_head(COLUMNS, text_columns=3)]


def row(launches: Launches) -> str:
    """Return a row of the table."""
    counts = launches.counts
    work = (counts.launches, counts.library_calls, counts.memsets, launches.work)
    copies = (counts.device_to_host, counts.host_to_device, counts.device_to_device)
    names = (launches.method, launches.phase, launches.precision)
    return harness.table_row([*names, *work, counts.syncs, *copies])


def lines_of(launches: Launches, options: argparse.Namespace) -> list[str]:
    """Return a row and, if the options ask for them, its kernels, the most frequent first."""
    if not options.kernels:
        return [row(launches)]
    listed = (f"{number:6} {name}" for name, number in launches.kernels.items())
    return [row(launches), "", *listed, ""]


def recorded(launches: Launches, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the file of results holds of a row: its kernels only if they are listed."""
    values = asdict(launches)
    return values if options.kernels else {**values, "kernels": {}}


def tables(found: Sequence[Launches], options: argparse.Namespace, machine: str) -> list[str]:
    """Return the lines of a table for each pair."""
    blocks = []
    for pair in dict.fromkeys(each.pair for each in found):
        rows = [row(each) for each in found if each.pair == pair]
        blocks.append("\n".join([*heading(pair, options, machine), *rows]))
    return "\n\n".join(blocks).splitlines()


if __name__ == "__main__":
    main()
