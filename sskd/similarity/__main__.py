"""Compare students with their teachers: ``python -m sskd.similarity RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sskd.commands.process import run_tool
from sskd.invocation.extensions import load_extensions
from sskd.measuring.command import epoch_of, new_parser, show, split_words, title_of
from sskd.measuring.selection import Chosen, choose_networks
from sskd.output import complain, say

if TYPE_CHECKING:
    from sskd.data import DatasetSettings, Images
    from sskd.measuring.files import Output
    from sskd.measuring.rows import Row
    from sskd.similarity.measure import Pair
    from sskd.similarity.table import Similarity

DESCRIPTION = """\
Compare students with their teachers on the test images of a dataset, by default that of their
training: agreement and KL divergence of the predictions, CKA of the features, correlations of the
classifiers' weights. One table: a row for each experiment, the mean over its seeds. A network
trained alone is compared with the teacher of the students of its architecture. What has been
measured before is not measured again.
"""
EXAMPLES = """\
examples:
  {command} runs/cifar100                                 all finished students
  {command} runs/cifar100 dataset=svhn --out results/svhn     on images of another dataset
  {command} vgg8.pth --teacher vgg13.pth                  two files
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the students that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("similarity", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        help="the teacher's checkpoint, for files, for networks trained without a teacher, and for "
        "runs whose teacher cannot be found",
    )
    return parser


def _run(given: argparse.Namespace) -> None:
    load_extensions()
    places, choices = split_words(given.words)
    folders = [] if given.config_dir is None else [Path(given.config_dir)]
    epoch = epoch_of(given)
    chosen = choose_networks(places, epoch, lambda text: complain(f"warning: {text}"))
    # Importing torch takes seconds, which --help should not.
    from sskd.measuring.datasets import choose_dataset, dataset_text, load_for_measuring
    from sskd.measuring.files import Output
    from sskd.similarity.measure import load_pairs
    from sskd.similarity.teachers import pairs_of

    students = pairs_of(chosen, given.teacher)
    pairs = load_pairs([(each.path, teacher) for each, teacher in students], folders)
    for pair in pairs:
        pair.require_same_classes()
    settings = choose_dataset([pair.student for pair in pairs], choices, folders)
    dataset = dataset_text(settings, choices)
    about = {"command": "similarity", "dataset": dataset, "epoch": epoch}
    output = Output(given.out, about, [each.name for each, _ in students])
    networks = [network for pair in pairs for network in (pair.student, pair.teacher)]
    images = load_for_measuring(settings, networks, given.device)
    measured = _measure(given, [each for each, _ in students], pairs, (settings, images))
    _show(given, measured, settings, output)


def _measure(
    given: argparse.Namespace,
    chosen: Sequence[Chosen],
    pairs: Sequence[Pair],
    data: tuple[DatasetSettings, Images],
) -> list[Similarity]:
    """Return the similarity of each pair, with a line for each."""
    from sskd.measuring.store import stored
    from sskd.similarity.classifiers import mean_difference
    from sskd.similarity.measure import (
        TeacherOutputs,
        measure_similarity,
        measurement_key,
        weight_difference,
    )
    from sskd.similarity.table import Similarity

    settings, images = data
    teachers, measured = TeacherOutputs(), []
    rows = _rows(chosen, pairs)
    for number, (each, pair) in enumerate(zip(chosen, pairs, strict=True)):
        title = title_of(number, chosen)
        values, before = stored(
            measurement_key(pair, settings, images),
            partial(measure_similarity, pair, images, title, teachers),
            again=given.again,
        )
        difference = weight_difference(pair, images)
        if difference is not None:
            values["weights"] = mean_difference(difference)
        shown = f"{title}: agreement {values['agreement']:.2f}, KL {values['kl']:.3f}"
        say(shown + " (measured before)" * before)
        measured.append(
            Similarity(each.name, rows[number], each.run, values, difference=difference)
        )
    return measured


def _rows(chosen: Sequence[Chosen], pairs: Sequence[Pair]) -> list[Row]:
    """Return the row of each pair; a network alone has the names of its teacher's students."""
    from sskd.measuring.rows import ALONE_ROW, STUDENT_ALONE, rows_of
    from sskd.similarity.teachers import with_teacher

    compared = [
        (with_teacher(each, pair.teacher), f"{pair.teacher.name}-{pair.student.name}")
        for each, pair in zip(chosen, pairs, strict=True)
    ]
    return [
        row._replace(method=row.method.replace(ALONE_ROW, STUDENT_ALONE, 1))
        if each.run and each.run.teacher is None
        else row
        for each, row in zip(chosen, rows_of(compared), strict=True)
    ]


def _show(
    given: argparse.Namespace,
    measured: Sequence[Similarity],
    settings: DatasetSettings,
    output: Output,
) -> None:
    """Print the table and write the files of ``--out``."""
    from sskd.measuring.rows import records
    from sskd.report.tables import EPOCH_TITLES
    from sskd.similarity.table import build_table, csv_lines, summarise

    summaries = summarise(measured, settings.source, comparable=settings.size == 32)
    dataset = f"{output.about['dataset']} · students of the {EPOCH_TITLES[epoch_of(given)]}"
    table = build_table(summaries, dataset)

    def draw() -> dict[str, bytes]:
        # Importing matplotlib takes a second.
        from sskd.report.figures import as_svg
        from sskd.similarity.figure import as_small_png, draw_differences

        if all(each.difference is None for each in summaries):
            return {}
        names = " · ".join(dict.fromkeys(each.row.networks for each in summaries))
        title = f"Weight correlations of the classes: |student - teacher| · {names}"
        figure = draw_differences(title, summaries)
        return {".png": as_small_png(figure), ".svg": as_svg(figure)}

    lines, networks = csv_lines(summaries), records(measured, "values")
    show(table, output, lines=lines, networks=networks, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
