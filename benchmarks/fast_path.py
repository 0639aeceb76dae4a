"""Train short runs with the optimisations of a step and without them, from the same seed.

    python -m benchmarks.fast_path method=kd,sskd dataset.fraction=0.02 schedule.epochs=3 \\
      pair=resnet56-resnet20 teacher.checkpoint=FILE

Takes overrides of ``train_student.py``; ``method`` may list several methods. The plain run keeps
the BatchNorms of the frozen teacher, stores the networks channels first and uses the optimizer
without fusion. Neither run compiles. Both draw the same batches and compute in float32, so they
differ by rounding, which training amplifies step by step. Prints the metrics of each epoch side by
side and keeps the runs in ``--runs``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from benchmarks.harness import table_head, table_row
from sskd import CONF
from sskd.config import read_config
from sskd.errors import UserError
from sskd.optimizers import OPTIMIZERS
from sskd.runs.epoch_line import EpochLine
from sskd.runs.run import Run
from sskd.teachers.find import run_location
from sskd.train import train

COLUMNS = (
    "method", "phase", "epoch", "loss, fast", "loss, plain", "top-1, fast", "top-1, plain",
)  # fmt: skip


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Train without the optimisations of a step inside this context."""

    def to_device(module: nn.Module, device: torch.device) -> None:
        module.to(device)

    with ExitStack() as stack:
        stack.enter_context(patch("sskd.train.fold_teacher", lambda *_: None))
        stack.enter_context(patch("sskd.train.to_device", to_device))
        for name, choice in list(OPTIMIZERS.items()):
            unfused = choice._replace(build=partial(_without_fusion, choice.build))
            stack.enter_context(patch.dict(OPTIMIZERS, {name: unfused}))
        yield


def _without_fusion(build: Any, *arguments: Any, fused: bool, **settings: Any) -> Any:
    return build(*arguments, **settings)


def run(overrides: list[str], runs: Path) -> list[EpochLine]:
    """Train a run under ``runs`` and return its epochs, phase after phase."""
    with initialize_config_dir(str(CONF), version_base=None):
        settings = [*overrides, f"runs={runs}", "precision=fp32", "compile=off"]
        config = read_config(compose("student", settings))
    with redirect_stdout(sys.stderr):
        train(config)
    folder, _ = run_location(config)
    return Run(folder, {}).metrics.read()


def compare(method: str, overrides: list[str], runs: Path) -> Iterator[str]:
    """Yield a row of the table for each epoch of both runs."""
    settings = [*overrides, f"method={method}"]
    fast = run(settings, runs / "fast")
    with without_fast_path():
        plain = run(settings, runs / "plain")
    for one, other in zip(fast, plain, strict=True):
        values = [each.metrics.get(key) for key in ("loss", "test/top1") for each in (one, other)]
        numbers = [f"{value:.5g}" if value is not None else "" for value in values]
        yield table_row([method, one.phase, one.epoch, *numbers])


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Compare the metrics of a short run with the optimisations and without them."
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, help="default: a temporary folder")
    options = parser.parse_intermixed_args()
    runs = options.runs or Path(tempfile.mkdtemp(prefix="fast-path-"))
    chosen = [each for each in options.overrides if each.startswith("method=")]
    methods = chosen[-1].removeprefix("method=").split(",") if chosen else ["kd"]
    overrides = [each for each in options.overrides if not each.startswith("method=")]
    print("\n".join(table_head(COLUMNS, text_columns=2)))
    try:
        for method in methods:
            for row in compare(method, overrides, runs):
                print(row, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
