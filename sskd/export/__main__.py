"""The command ``python -m sskd.export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sskd.commands.process import run_tool
from sskd.errors import UserError, did_you_mean
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_parser
from sskd.output import say

NAMES = ("onnx", "pt2", "torchscript", "hub")
DESCRIPTION = """\
Write a trained network to files that run without the suite: for ONNX Runtime, for
torch.export, as TorchScript, or as a folder for the Hugging Face Hub and torch.hub.
Each file takes images with values in [0, 1], in batches of any size, and has a model
card. A file is run on the test images, and is kept only if its logits agree with
those of the network.
"""
EXAMPLES = """\
examples:
  {command} RUN --to onnx               exports/NAME/onnx/model.onnx and its card
  {command} RUN --to onnx --int8        model_int8.onnx too, and what it costs
  {command} RUN --to pt2,hub --fold     without BatchNorms
  {command} resnet56.pth --to onnx dataset.root=FOLDER

RUN is the folder of a finished run, another folder with a checkpoint, or a checkpoint. If no run
belongs to the checkpoint, the dataset is CIFAR-100, unless dataset= names another.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the network that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _run(given: argparse.Namespace) -> None:
    formats = _formats(given.to)
    if given.int8 and "onnx" not in formats:
        raise UserError("--int8 quantises the ONNX file: add --to onnx")
    load_extensions()
    # Importing torch takes seconds, which --help should not.
    from sskd.device import choose_device, tune_device
    from sskd.export.export import Choices, export
    from sskd.export.formats import require_packages
    from sskd.export.subject import find_subject
    from sskd.files import expanded

    require_packages(formats)
    tune_device(choose_device("cpu"))
    subject = find_subject(
        given.checkpoint,
        epoch=given.epoch,
        arch=given.arch,
        overrides=given.overrides,
        folders=[] if given.config_dir is None else [Path(given.config_dir)],
    )
    out = expanded(given.out) if given.out else Path("exports", subject.name)
    choices = Choices(formats, fold=given.fold, int8=given.int8, force=given.force)
    for folder in export(subject, out, choices):
        say(f"wrote {folder}")


def _formats(given: Sequence[str]) -> list[str]:
    """Return the formats of ``--to``, each once.

    Raises:
        UserError: one of them is unknown.
    """
    names = [name.strip() for text in given for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise UserError(f"--to {name}: no such format ({known}){did_you_mean(name, NAMES)}")
    return list(dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("export", DESCRIPTION, EXAMPLES)
    parser.add_argument("checkpoint", metavar="RUN", help="the folder of a run, or a checkpoint")
    parser.add_argument(
        "--to",
        action="append",
        required=True,
        metavar="FORMAT",
        help=f"{', '.join(NAMES)}; several with commas",
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: exports/NAME of the run")
    parser.add_argument("--fold", action="store_true", help="fold BatchNorms into convolutions")
    parser.add_argument("--int8", action="store_true", help="write the ONNX file in int8 too")
    parser.add_argument(
        "--epoch",
        choices=("last", "best"),
        default="last",
        help="the weights of a run's last epoch, or of its best one on the test set",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--arch", help="the architecture; default: recognised from its tensors")
    parser.add_argument("--config-dir", "-cd", help="a folder with dataset/NAME.yaml of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="dataset.KEY=VALUE", help="as for the training commands"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
