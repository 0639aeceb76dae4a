"""Progress of a long phase: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from sskd.output import say

# Seconds between two looks at the figures; each look is a copy from the device to the host.
_ON_TERMINAL = 1.0
_IN_LOG = 60.0

# What a line tells, of all that metrics.jsonl holds.
_TOLD = ("lr", "loss", "top1", "contrastive_top1", "test/", "holdout/", "images_per_second")


class Progress:
    """Shows how far a phase is, its rate and time left, and the figures of the running epoch.

    Args:
        title: what is being trained.
        epochs: of the whole phase.
        size: images an epoch.
        done: images that an earlier start has trained.
        metrics: called at most once a second; returns the epoch's metrics so far.
    """

    def __init__(
        self,
        title: str,
        epochs: int,
        size: int,
        *,
        done: int,
        metrics: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._title, self._epochs, self._size = title, epochs, size
        self._metrics = metrics
        self._bar = tqdm(
            total=epochs * size,
            initial=done,
            unit=" images",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
            leave=False,
        )
        self._interval = _IN_LOG if self._bar.disable else _ON_TERMINAL
        self._start = self._shown = time.monotonic()
        self._done, self._first = done, done

    def advance(self, images: int) -> None:
        """Count ``images`` as trained; look at the figures if it is time to."""
        epoch = self._done // self._size + 1
        self._done += images
        self._bar.update(images)
        if time.monotonic() - self._shown < self._interval:
            return
        told = _tell(self._metrics())
        self._shown = time.monotonic()
        self._bar.set_description(f"{self._title} {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(told)
        if self._bar.disable:
            share = 100 * self._done / (self._epochs * self._size)
            self._report(f"epoch {epoch}/{self._epochs}", f"{share:.1f} %", told, self._left())

    def epoch(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Tell the figures of a finished epoch in a line of their own."""
        self._report(f"epoch {epoch}/{self._epochs}", _tell(figures), self._left())

    def line(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            say(f"{self._title}: {text}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _report(self, *parts: str) -> None:
        self.line(", ".join(part for part in parts if part))

    def _left(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = self._epochs * self._size - self._done
        return f"{tqdm.format_interval(left / rate if rate else 0)} left"


def _tell(figures: Mapping[str, Any]) -> str:
    """Return the figures that a person follows, rounded."""
    told = {k: v for k, v in figures.items() if k.startswith(_TOLD)}
    return ", ".join(f"{name} {value:{_format(value)}}" for name, value in told.items())


def _format(value: float) -> str:
    return ".0f" if value >= 1000 else ".2f" if value >= 10 else ".4g"
