"""Measure the accuracy of any checkpoint: ``python -m sskd.evaluate CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sskd.commands.process import run_tool
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_command
from sskd.output import say

_EXAMPLES = """
examples:
  {command} runs/cifar100/scratch/resnet56/seed0
  {command} resnet56_best.pth dataset.root=FOLDER
  {command} wrn.pth --arch wrn_40_2 dataset=cifar10 --device cuda

In a folder, the file with `best` in its name is used; the folder's ckpt/ is searched too. The
checkpoint may be one of this suite, of SSKD or of the CRD benchmark; its architecture is recognised
from its tensors. Beside a run's config.yaml the dataset of that run is used, else CIFAR-100.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the checkpoint that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _run(given: argparse.Namespace) -> None:
    load_extensions()
    say(evaluate(**vars(given)))


def _parser() -> argparse.ArgumentParser:
    command = tool_command("evaluate")
    parser = argparse.ArgumentParser(
        prog=command,
        description="Measure the top-1 accuracy of a checkpoint on a test set, in float32.",
        epilog=_EXAMPLES.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file, or a folder that holds one")
    parser.add_argument("--arch", help="the architecture; default: recognised from its tensors")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--config-dir", "-cd", help="a folder with dataset/NAME.yaml of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="dataset.KEY=VALUE", help="as for the training commands"
    )
    return parser


def evaluate(
    checkpoint: str,
    *,
    arch: str | None,
    device: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
) -> str:
    """Return one line with the accuracy of ``checkpoint``.

    Args:
        checkpoint: a file, or a folder that holds one.
        arch: the name of its architecture; None: recognised by its tensors.
        device: as the setting ``device``.
        overrides: choices of the dataset, as for the training commands.
        config_dir: a folder with configuration files beside those of the suite.
    """
    # Importing torch takes seconds, which --help should not.
    from sskd.device import choose_device, to_device, tune_device
    from sskd.trained import TrainedNetwork
    from sskd.training.evaluation import accuracy, predict

    folders = [] if config_dir is None else [Path(config_dir)]
    trained = TrainedNetwork(checkpoint, arch=arch, overrides=overrides, folders=folders)
    trained.require_own_classes()
    chosen = choose_device(device)
    tune_device(chosen)
    images, network = trained.images.to(chosen), trained.network
    to_device(network, chosen)
    of = f"{trained.path}: {trained.name}, {images.name} test set"
    top1 = accuracy(predict(network, images.test, images, of), images.test.labels)
    note = "" if trained.stated is None else f" (the file states {trained.stated:.2f})"
    return f"{of}: top-1 {top1:.2f}{note}"


if __name__ == "__main__":
    sys.exit(main())
