"""Transfer trained networks to another dataset: ``python -m sskd.transfer RUN dataset=NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sskd.commands.process import run_tool
from sskd.errors import UserError
from sskd.invocation.extensions import load_extensions
from sskd.measuring.command import epoch_of, new_parser, show, split_words, title_of
from sskd.measuring.selection import Chosen, choose_networks
from sskd.output import complain, say

if TYPE_CHECKING:
    from sskd.data import DatasetSettings, Images
    from sskd.measuring.files import Output
    from sskd.measuring.rows import Measured
    from sskd.trained import TrainedNetwork

PROTOCOL_NAMES = ("hsakd", "logistic")  # those of sskd.transfer.protocols, which imports torch
DESCRIPTION = """\
Train a linear classifier on the features of frozen networks, on another dataset, and show its
accuracy in one table: a row for each experiment, the mean over its seeds. What has been
measured before is not measured again.
"""
EXAMPLES = """\
examples:
  {command} runs dataset=stl10 dataset.root=FOLDER        all finished runs under runs/
  {command} runs/cifar100/distill/wrn_40_2-ShuffleV1 dataset=tiny_imagenet --out results/tiny
  {command} resnet56.pth dataset=digits --protocol logistic
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("transfer", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--protocol",
        choices=PROTOCOL_NAMES,
        default="hsakd",
        help="how the classifier is trained: by HSAKD's SGD (default), or by L-BFGS with a penalty "
        "that is chosen on held-out images",
    )
    return parser


def _run(given: argparse.Namespace) -> None:
    load_extensions()
    places, choices = split_words(given.words)
    folders = [] if given.config_dir is None else [Path(given.config_dir)]
    if not any(word.startswith("dataset=") for word in choices):
        raise UserError(
            "no dataset to transfer to; name one with dataset=NAME, such as dataset=digits"
        )
    epoch = epoch_of(given)
    chosen = choose_networks(places, epoch, lambda text: complain(f"warning: {text}"))
    # Importing torch takes seconds, which --help should not.
    from sskd.measuring.datasets import compose_dataset, dataset_text, load_for_measuring
    from sskd.measuring.files import Output
    from sskd.trained import TrainedNetwork

    settings = compose_dataset(choices, folders)
    dataset = dataset_text(settings, choices)
    about = {"command": "transfer", "dataset": dataset, "protocol": given.protocol}
    output = Output(given.out, about | {"epoch": epoch}, [each.name for each in chosen])
    networks = [TrainedNetwork(each.path, folders=folders) for each in chosen]
    images = load_for_measuring(settings, networks, given.device)
    measured = _measure(given, chosen, networks, (settings, images))
    _show(given, measured, settings, output)


def _measure(
    given: argparse.Namespace,
    chosen: Sequence[Chosen],
    networks: Sequence[TrainedNetwork],
    data: tuple[DatasetSettings, Images],
) -> list[Measured]:
    """Return the transfer of each network, with a line for each."""
    from sskd.measuring.rows import Measured, rows_of
    from sskd.measuring.store import stored
    from sskd.transfer.measure import measure_transfer, measurement_key

    settings, images = data
    rows = rows_of([(each, network.name) for each, network in zip(chosen, networks, strict=True)])
    measured = []
    for number, (each, network) in enumerate(zip(chosen, networks, strict=True)):
        title = title_of(number, chosen)
        values, before = stored(
            measurement_key(network, settings, images, given.protocol),
            partial(measure_transfer, network, images, given.protocol, title=title),
            again=given.again,
        )
        say(f"{title}: top-1 {values['last']:.2f}{' (measured before)' * before}")
        measured.append(Measured(each.name, rows[number], each.run, values))
    return measured


def _show(
    given: argparse.Namespace,
    measured: Sequence[Measured],
    settings: DatasetSettings,
    output: Output,
) -> None:
    """Print the table and write the files of ``--out``."""
    from sskd.measuring.rows import records
    from sskd.report.tables import EPOCH_TITLES
    from sskd.transfer.protocols import PROTOCOLS
    from sskd.transfer.table import build_table, csv_lines, summarise

    whole = settings.fraction == 1 and settings.label_noise == settings.holdout == 0
    comparable = given.protocol == "hsakd" and settings.size == 32 and whole
    summaries = summarise(measured, settings.source, comparable=comparable)
    dataset = f"{output.about['dataset']} · networks of the {EPOCH_TITLES[epoch_of(given)]}"
    table = build_table(summaries, dataset, PROTOCOLS[given.protocol].description)

    def draw() -> dict[str, bytes]:
        # Importing matplotlib takes a second.
        from sskd.report.figures import as_png, as_svg
        from sskd.transfer.figure import draw_transfer

        figure = draw_transfer(table.title, summaries)
        return {".png": as_png(figure), ".svg": as_svg(figure)}

    lines, networks = csv_lines(summaries), records(measured, "top1")
    show(table, output, lines=lines, networks=networks, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
