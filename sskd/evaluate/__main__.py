"""Measure what trained networks reach and cost: ``python -m sskd.evaluate RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sskd.commands.process import run_tool
from sskd.errors import UserError, shortened
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_parser
from sskd.output import complain, say

if TYPE_CHECKING:
    from sskd.evaluate.evaluation import Evaluation, Options
    from sskd.trained import TrainedNetwork

_DESCRIPTION = """\
Measure trained networks on their test sets, in float32: top-1 and top-5, NLL and ECE (before and
after temperature scaling, if there are held-out images), accuracy by class, the most frequent
confusions, parameters, FLOPs and latency.
"""
_EXAMPLES = """
examples:
  {command} runs/cifar100/scratch/resnet56/seed0
  {command} resnet56_best.pth dataset.root=FOLDER
  {command} wrn.pth --arch wrn_40_2 dataset=cifar10 --device cuda
  {command} runs/cifar100/distill --out results/students
  {command} student.pth --holdout 0.5 --corruptions CIFAR-100-C

In a folder, the file with `best` in its name is used; the folder's ckpt/ is searched too. In a
folder of runs, every finished run is evaluated. The checkpoint may be one of this suite, of SSKD or
of the CRD benchmark; its architecture is recognised from its tensors. If the config.yaml of a run
is in the same folder, the dataset of that run is used, otherwise CIFAR-100.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the networks that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _run(given: argparse.Namespace) -> None:
    load_extensions()
    # Importing torch takes seconds, which --help should not.
    from sskd.evaluate.evaluation import Options

    networks = _find_networks(given)
    options = Options(given.device, given.holdout, given.corruptions, given.repeats)
    _evaluate_all(networks, options, given.out)


def _evaluate_all(networks: list[TrainedNetwork], options: Options, out: str | None) -> None:
    """Print the evaluation of each network, then a summary of several; write the files of ``out``.

    Mistakes that need no measurement are reported before the first one. ``networks`` is emptied,
    because each network keeps its images in memory.
    """
    from sskd.evaluate.evaluation import evaluate, refuse_second_holdout, subject_of
    from sskd.evaluate.files import SUFFIXES, refuse_other_files, write_evaluations
    from sskd.evaluate.render import as_text, summary_as_text
    from sskd.measuring.files import base_path

    for trained in networks:
        refuse_second_holdout(trained, options)
    base = None if out is None else base_path(out, SUFFIXES)
    subjects = [] if base is None else [subject_of(trained, options) for trained in networks]
    if base is not None:
        refuse_other_files(base, subjects)
    evaluations: list[Evaluation] = []
    while networks:
        trained = networks.pop(0)
        gap = "\n" * bool(evaluations)
        evaluations.append(evaluate(trained, options))
        say(gap + as_text(evaluations[-1]))
    if len(evaluations) > 1:
        say(f"\n{summary_as_text(evaluations)}")
    if base is not None:
        first, *others = write_evaluations(base, evaluations, subjects)
        say(f"\nwrote {first}, {', '.join(path.name for path in others)}")


def _find_networks(given: argparse.Namespace) -> list[TrainedNetwork]:
    """Return the networks that the command line names, each file once.

    The first word is a checkpoint. A later one with an equals sign is a choice of the dataset,
    unless there is a file or folder of that name.
    """
    from sskd.trained import TrainedNetwork

    first, *others = given.words
    overrides = [word for word in others if "=" in word and not Path(word).exists()]
    for word in overrides:
        if not word.startswith(("dataset=", "dataset.")):
            raise UserError(
                f"{shortened(word)} is neither a checkpoint nor a choice of the dataset, such as "
                "dataset=NAME or dataset.KEY=VALUE; options begin with dashes, such as --device"
            )
    checkpoints = [first, *(word for word in others if word not in overrides)]
    folders = [] if given.config_dir is None else [Path(given.config_dir)]
    found = [
        TrainedNetwork(path, arch=given.arch, overrides=overrides, folders=folders)
        for checkpoint in checkpoints
        for path in _runs_below(checkpoint) or [checkpoint]
    ]
    return list({trained.path: trained for trained in found}.values())


def _runs_below(checkpoint: str) -> list[Path]:
    """Return the folders of the finished runs below a folder that holds no checkpoint itself."""
    from sskd.files import expanded
    from sskd.models import find_checkpoint
    from sskd.report.results import read_results

    folder = expanded(checkpoint)
    if not folder.is_dir():
        return []
    try:
        find_checkpoint(folder)
    except UserError:
        runs = read_results(folder, lambda text: complain(f"warning: {text}"))
        return [run.folder for run in runs]
    return []


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("evaluate", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CHECKPOINT | dataset.KEY=VALUE",
        help="files, folders that hold one, or folders of runs; and choices of the dataset, as for"
        " the training commands",
    )
    parser.add_argument("--arch", help="the architecture; default: recognised from its tensors")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--config-dir", "-cd", help="a folder with dataset/NAME.yaml of your own")
    _add_measurements(parser)
    return parser


def _add_measurements(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is measured and written."""
    parser.add_argument(
        "--holdout",
        metavar="SHARE",
        type=_share,
        help="for a network without held-out images: fit the temperature on this share of each"
        " class's test images, and measure NLL and ECE on the others",
    )
    parser.add_argument(
        "--corruptions",
        metavar="FOLDER",
        help="also measure top-1 on CIFAR-100-C or CIFAR-10-C: the folder of its .npy files",
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=_count,
        default=50,
        help="timed forward passes for each batch size (default: 50); 0: no latency",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="also write all figures to PATH.json, the tables to PATH.md and plots to"
        " PATH-NAME.png",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, as 0.5 (got {shortened(text)})")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or int(text[:6]) > 10_000:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to 10000 (got {shortened(text)})"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
