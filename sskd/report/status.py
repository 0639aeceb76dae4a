"""What the cells of a sweep are doing, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime

from sskd.report.cells import STATES, Cell


def render_status(cells: Iterable[Cell], width: int, now: datetime) -> str:
    """Return a line of counts, then each unfinished cell by state; finished ones are only counted.

    Times of day are those of ``now``'s zone.
    """
    cells = list(cells)
    lines = [count_states(cells) or "no runs yet"]
    for state in STATES[:-1]:
        here = [cell for cell in cells if cell.state == state]
        if here:
            lines += ["", state]
        for cell in here:
            lines += _cell_lines(cell, width, now)
    return "\n".join(lines) + "\n"


def count_states(cells: Iterable[Cell]) -> str:
    """Return how many cells are in each state that any is in."""
    counts = Counter(cell.state for cell in cells)
    return " · ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def describe_progress(cell: Cell) -> str:
    """Return the epochs done, the rate and the time left, as far as they are known."""
    return " · ".join(_progress(cell))


def _cell_lines(cell: Cell, width: int, now: datetime) -> Iterator[str]:
    details = list(_progress(cell))
    if cell.since:
        since = cell.since.astimezone(now.tzinfo)
        today = since.date() == now.date()
        details.append(f"since {since:%H:%M}" if today else f"since {since:%Y-%m-%d %H:%M}")
    if cell.host:
        details.append(f"on {cell.host}")
    line, rest = f"  {cell.name}", " · ".join(details)
    if rest and len(line) + len(rest) + 2 > width:
        yield line
        line, rest = "   ", rest
    yield f"{line}  {rest}".rstrip()
    if cell.error:
        indent = "     "
        yield from textwrap.wrap(cell.error, width, initial_indent=indent, subsequent_indent=indent)


def _progress(cell: Cell) -> Iterator[str]:
    if cell.total:
        yield f"{cell.done}/{cell.total} epochs, {cell.done / cell.total:.0%}"
    elif cell.done:
        yield f"{cell.done} {'epoch' if cell.done == 1 else 'epochs'}"
    if cell.rate is not None and cell.state == "running":
        yield f"{cell.rate:,.0f} images/s"
    if cell.seconds_left is not None:
        yield f"{_duration(cell.seconds_left)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
