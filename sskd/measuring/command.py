"""The command line that the commands for trained networks share."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sskd.invocation.names import tool_parser
from sskd.measuring.selection import Chosen
from sskd.output import say
from sskd.report.results import Epoch

if TYPE_CHECKING:
    from sskd.measuring.files import Output
    from sskd.report.tables import Table


def new_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all such commands take."""
    parser = tool_parser(name, description, examples)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN",
        help="trained networks: folders of runs, one run or a checkpoint; then choices of the "
        "dataset, dataset=NAME and dataset.KEY=VALUE, as for the training commands",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="take the weights of the best epoch on the test set, not those of the last epoch",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--config-dir", "-cd", help="a folder with dataset/NAME.yaml of your own")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="also write the table to PATH.md, its numbers to PATH.csv, the values of each network "
        "to PATH.json and a picture to PATH.png and PATH.svg",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again what has been measured before"
    )
    return parser


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the places of networks and the choices of the dataset among ``words``."""
    choices = [word for word in words if "=" in word and not Path(word).exists()]
    return [word for word in words if word not in choices], choices


def epoch_of(given: argparse.Namespace) -> Epoch:
    """Return whose weights the command line asks for."""
    return "best" if given.best else "last"


def title_of(number: int, chosen: Sequence[Chosen]) -> str:
    """Return how progress names the network ``number``, counted from 0."""
    return f"{number + 1}/{len(chosen)} {chosen[number].name}"


def show(
    table: Table,
    output: Output,
    *,
    lines: Sequence[Mapping[str, Any]],
    networks: Sequence[Mapping[str, Any]],
    draw: Callable[[], Mapping[str, bytes]],
) -> None:
    """Print ``table``, and write the files of ``--out`` if there are any, as ``Output.write``."""
    from sskd.report.render import render_text

    say("\n" + render_text(table, shutil.get_terminal_size().columns).removesuffix("\n"))
    if paths := output.write(table, lines, networks, draw):
        say(f"\nwrote {paths[0]}, {', '.join(path.suffix for path in paths[1:])}")
