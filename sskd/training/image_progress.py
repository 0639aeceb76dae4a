"""Progress of passes over many images: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from sskd.output import complain

_IN_LOG = 60.0  # seconds between two lines


class ImageProgress:
    """Shows how many of ``total`` images are done, on standard error; a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._bar = tqdm(
            total=total,
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
            left = (self._total - self._done) * (now - self._start) / self._done
            complain(
                f"{self._title}: {self._done:,} of {self._total:,} images,"
                f" {tqdm.format_interval(left)} left"
            )
