"""Device hours of the whole grid, 11 methods on 11 pairs, by the suite and conventionally.

    python -m benchmarks.grid --out results/grid

The steps of KD and SSKD are measured on every pair by both pipelines, as in
benchmarks/throughput.py. The step of CRD is measured on one pair. The time that it adds to the
step of KD counts on every pair, because the size of CRD's banks does not depend on the pair. The
other eight methods count as KD, although their steps take a few percent longer
(benchmarks/methods.py). The hours are those of 240 epochs of 50,000 images of each distillation,
without first phases, evaluation and teachers.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from benchmarks import harness
from benchmarks.throughput import IMAGES_PER_RUN, Row, Turns, add_turns, compare, title_of
from benchmarks.workload import case_of
from sskd.report.published import published_for

KD_LIKE = 9  # KD, FitNet, AT, SP, VID, RKD, PKT, AB and FT
DISTILLATIONS = KD_LIKE + 2  # of a pair: with CRD and SSKD
COLUMNS = (
    "pair", "KD, conventional, images/s", "fp32", "bf16", "SSKD, conventional", "fp32", "bf16",
    "11 methods, conventional, hours", "fp32", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Seconds:
    """Seconds an image on a pair: conventional, then the suite in fp32 and in bf16."""

    pair: str
    kd: tuple[float, ...]
    sskd: tuple[float, ...]

    def hours(self, crd: tuple[float, ...]) -> list[float]:
        """Return the hours of 11 distillations; ``crd`` is what CRD adds to the seconds of KD."""
        pipelines = zip(self.kd, self.sskd, crd, strict=True)
        seconds = [KD_LIKE * kd + (kd + extra) + sskd for kd, sskd, extra in pipelines]
        return [IMAGES_PER_RUN * each / 3600 for each in seconds]


def main() -> None:
    """Measure every pair; print and write the table."""
    options = parse_options()
    turns = Turns(options.rounds, options.steps, options.precisions, flops=False)

    def seconds(work: str, pair: str) -> tuple[float, ...]:
        return seconds_an_image(compare(work, case_of(options, pair=pair), turns))

    kd, crd = (seconds(work, options.crd_pair) for work in ("kd", "crd"))
    extra = tuple(slow - fast for slow, fast in zip(crd, kd, strict=True))
    title = title_of(options, harness.machine_of(options))
    found: list[Seconds] = []
    print("\n".join(harness.table_head(COLUMNS, text_columns=1)), flush=True)
    for pair in options.pairs:
        found.append(Seconds(pair, seconds("kd", pair), seconds("sskd", pair)))
        print(pair_row(found[-1], extra), flush=True)
        measured = {"seconds": [asdict(each) for each in found], "crd": extra}
        harness.write_results(options, measured, table(title, found, extra))
    print(total_row(found, extra))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = harness.new_parser(__doc__)
    tables = published_for("cifar100")[0].tables.values()
    pairs = ["-".join(pair) for table in tables for pair in table]
    parser.add_argument("--pairs", nargs="+", default=pairs, metavar="TEACHER-STUDENT")
    add_turns(parser, rounds=1, steps=1)
    parser.set_defaults(precisions=["fp32", "bf16"])
    return harness.parse(parser)


def seconds_an_image(rows: list[Row]) -> tuple[float, ...]:
    """Return the seconds an image of the conventional pipeline and of the suite."""
    return tuple(1 / side.rate for side in (rows[0].baseline, *(row.suite for row in rows)))


def table(title: str, found: list[Seconds], crd: tuple[float, ...]) -> list[str]:
    """Return the lines of the table."""
    rows = [pair_row(pair, crd) for pair in found]
    return [title, "", *harness.table_head(COLUMNS, text_columns=1), *rows, total_row(found, crd)]


def pair_row(found: Seconds, crd: tuple[float, ...]) -> str:
    """Return the row of a pair."""
    rates = [f"{1 / each:,.0f}" for each in (*found.kd, *found.sskd)]
    return harness.table_row([found.pair, *rates, *(f"{each:,.0f}" for each in found.hours(crd))])


def total_row(found: list[Seconds], crd: tuple[float, ...]) -> str:
    """Return the last row, the sum over the pairs."""
    hours = [sum(each) for each in zip(*(pair.hours(crd) for pair in found), strict=True)]
    name = f"**{DISTILLATIONS * len(found)} distillations**"
    return harness.table_row([name, *[""] * 6, *(f"**{each:,.0f}**" for each in hours)])


if __name__ == "__main__":
    main()
