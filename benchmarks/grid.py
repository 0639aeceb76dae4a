"""Device hours of the whole grid, 11 methods on 11 pairs, beside the conventional pipeline's.

    python -m benchmarks.grid --out results/grid

KD's and SSKD's steps are measured on every pair, by both pipelines as benchmarks/throughput does
it. CRD adds to KD's step what it takes longer on one pair: its banks are as large on all of them.
The other nine methods count as KD, beside which their steps take a few percent more
(benchmarks/methods). Counted are the 240 epochs of 50,000 images of each distillation, without
first phases, evaluation and teachers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from benchmarks.methods import add_shared_options
from benchmarks.throughput import CELL, Row, add_turns, compare, resolve, title
from sskd.report.published import published_for

LIKE_KD = 9  # KD, FitNet, AT, SP, VID, RKD, PKT, AB and FT
METHODS = LIKE_KD + 2

HEADER = """\
| pair | KD, conventional, images/s | fp32 | bf16 | SSKD, conventional | fp32 | bf16 | \
11 methods, conventional, hours | fp32 | bf16 |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True)
class Seconds:
    """Seconds an image, in the order conventional, fp32, bf16."""

    pair: str
    kd: tuple[float, ...]
    sskd: tuple[float, ...]

    def hours(self, crd: tuple[float, ...]) -> list[float]:
        """Return the hours of 11 distillations; ``crd`` is what CRD adds to KD's seconds."""
        each = zip(self.kd, self.sskd, crd, strict=True)
        return [CELL * (LIKE_KD * kd + kd + more + sskd) / 3600 for kd, sskd, more in each]


def main() -> None:
    """Measure every pair; print and write the table."""
    options = parse_options()
    kd, crd = (seconds(compare(work, options.crd_pair, options)) for work in ("kd", "crd"))
    more = tuple(slow - fast for slow, fast in zip(crd, kd, strict=True))
    found: list[Seconds] = []
    print(HEADER, flush=True)
    for pair in options.pairs:
        rows = {work: compare(work, pair, options) for work in ("kd", "sskd")}
        found.append(Seconds(pair, seconds(rows["kd"]), seconds(rows["sskd"])))
        print(tell(found[-1], more), flush=True)
        if options.out:
            write(options, found, more)
    print(total(found, more))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = published_for("cifar100")[0].tables.values()
    pairs = ["-".join(pair) for table in tables for pair in table]
    parser.add_argument("--pairs", nargs="+", default=pairs, metavar="TEACHER-STUDENT")
    add_turns(parser, rounds=1, steps=1)
    add_shared_options(parser)
    options = resolve(parser.parse_args())
    options.precisions, options.ceiling = ["fp32", "bf16"], False
    return options


def seconds(rows: list[Row]) -> tuple[float, ...]:
    """Return the seconds an image of both pipelines."""
    return tuple(1 / side.rate for side in (rows[0].theirs, *(row.ours for row in rows)))


def tell(found: Seconds, crd: tuple[float, ...]) -> str:
    """Return a pair as a row of the table."""
    rates = [f"{1 / each:,.0f}" for each in (*found.kd, *found.sskd)]
    hours = [f"{each:,.0f}" for each in found.hours(crd)]
    return f"| {found.pair} | " + " | ".join(rates + hours) + " |"


def total(found: list[Seconds], crd: tuple[float, ...]) -> str:
    """Return the last row: all pairs together."""
    hours = [sum(each) for each in zip(*(pair.hours(crd) for pair in found), strict=True)]
    name = f"| **{METHODS * len(found)} distillations** |"
    return name + " |" * 6 + " " + " | ".join(f"**{each:,.0f}**" for each in hours) + " |"


def write(options: argparse.Namespace, found: list[Seconds], crd: tuple[float, ...]) -> None:
    """Write the table as markdown and every figure as JSON."""
    rows = [tell(pair, crd) for pair in found]
    lines = [title(options), "", *HEADER.splitlines(), *rows, total(found, crd)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    told = {key: value for key, value in vars(options).items() if key != "out"}
    figures = {"options": told, "seconds": [asdict(pair) for pair in found], "crd": crd}
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
