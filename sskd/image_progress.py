"""Progress of passes over many images: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from sskd.output import complain

_IN_LOG = 60.0  # seconds between two lines


class ImageProgress:
    """Shows how many of ``total`` images are done, on standard error; a context manager.

    An earlier process has ``done`` some of them.
    """

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self._title, self._total = title, total
        self._done = self._first = done
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=" images",
            disable=None,  # show it on a terminal only
            dynamic_ncols=True,
            leave=False,
        )
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Count ``count`` images as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._shown >= _IN_LOG:
            self._shown = now
            each = (now - self._start) / (self._done - self._first)
            left = (self._total - self._done) * each
            complain(
                f"{self._title}: {self._done:,} of {self._total:,} images,"
                f" {tqdm.format_interval(left)} left"
            )
