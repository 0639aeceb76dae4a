"""A short run with what makes a step fast and one without, from the same seed: do they agree?

    python -m benchmarks.fast_path method=kd,sskd dataset.fraction=0.02 schedule.epochs=3 \\
      pair=resnet56-resnet20 teacher.checkpoint=FILE

Takes overrides of ``train_student.py``, several methods by commas. The plain run has the frozen
teacher's BatchNorms where they were, networks whose memory lies channels first, and PyTorch's
optimizer step without fusion; nothing is compiled. Both draw the same batches in float32, so what
differs is rounding, which training magnifies step by step. Prints each epoch's figures side by side
and keeps the runs in ``--runs``.
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

from sskd import CONF
from sskd.config import read_config
from sskd.errors import UserError
from sskd.optimizers import OPTIMIZERS
from sskd.runs.run import Run
from sskd.teachers.find import run_location
from sskd.train import train


@contextmanager
def plainly() -> Iterator[None]:
    """Train without what makes a step fast, while entered."""

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


def run(overrides: list[str], runs: Path) -> list[dict[str, Any]]:
    """Train a run under ``runs`` and return its epochs' figures, those of its stages in order."""
    with initialize_config_dir(str(CONF), version_base=None):
        words = [*overrides, f"runs={runs}", "precision=fp32", "compile=off"]
        config = read_config(compose("student", words))
    with redirect_stdout(sys.stderr):
        train(config)
    folder, _ = run_location(config)
    return Run(folder, {}).metrics.read()


def compare(method: str, overrides: list[str], runs: Path) -> Iterator[str]:
    """Yield a row for each epoch of both runs."""
    words = [*overrides, f"method={method}"]
    fast = run(words, runs / "fast")
    with plainly():
        plain = run(words, runs / "plain")
    for one, other in zip(fast, plain, strict=True):
        figures = [one["loss"], other["loss"], one.get("test/top1"), other.get("test/top1")]
        told = [f"{figure:.5g}" if figure is not None else "" for figure in figures]
        yield f"| {method} | {one['stage']} | {one['epoch']} | {' | '.join(told)} |"


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare a short run with a plain one.")
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, help="default: a temporary folder")
    given = parser.parse_intermixed_args()
    runs = given.runs or Path(tempfile.mkdtemp(prefix="fast-path-"))
    chosen = [word for word in given.overrides if word.startswith("method=")]
    methods = chosen[-1].removeprefix("method=").split(",") if chosen else ["kd"]
    overrides = [word for word in given.overrides if not word.startswith("method=")]
    heads = ["loss, fast", "loss, plain", "top-1, fast", "top-1, plain"]
    print(f"| method | stage | epoch | {' | '.join(heads)} |\n|---|---|--:|--:|--:|--:|--:|")
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
