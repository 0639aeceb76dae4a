"""Progress of a long phase: a bar on a terminal, plain lines elsewhere and for jobs in threads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from sskd.output import say
from sskd.runs.epoch_line import EpochLine
from sskd.turns import shares_process

# Seconds between two readings of the metrics; each copies from the device to the host.
_ON_TERMINAL = 1.0
_IN_LOG = 60.0

# A line shows the metrics whose names begin with one of these, and the accuracies in first phases
# and self-supervised tasks, such as joint_top1; metrics.jsonl has all.
_SHOWN = ("lr", "loss", "top1", "test/", "holdout/", "images_per_second")
_SHOWN_END = "_top1"


class Progress:
    """Shows the progress of a phase, its rate and time left, and the metrics of the running epoch.

    Args:
        title: the name of the phase.
        epochs: the number of epochs of the phase.
        size: images in an epoch.
        done: images that an earlier process has trained on.
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
            disable=True if shares_process() else None,  # None: show it on a terminal only
            dynamic_ncols=True,
            leave=False,
        )
        self._interval = _IN_LOG if self._bar.disable else _ON_TERMINAL
        self._start = self._shown = time.monotonic()
        self._done, self._first = done, done

    def advance(self, images: int) -> None:
        """Count ``images`` as done; show the metrics if it is time to."""
        epoch = self._done // self._size + 1
        self._done += images
        self._bar.update(images)
        if time.monotonic() - self._shown < self._interval:
            return
        shown = _rounded(self._metrics())
        self._shown = time.monotonic()
        self._bar.set_description(f"{self._title} {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            share = 100 * self._done / (self._epochs * self._size)
            self._report(f"epoch {epoch}/{self._epochs}", f"{share:.1f} %", shown, self._left())

    def epoch(self, line: EpochLine) -> None:
        """Print a line with the metrics of a finished epoch."""
        self._report(f"epoch {line.epoch}/{self._epochs}", _rounded(line.metrics), self._left())

    def line(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            say(f"{self._title}: {text}")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _report(self, *parts: str) -> None:
        self.line(", ".join(part for part in parts if part))

    def _left(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = self._epochs * self._size - self._done
        return f"{tqdm.format_interval(left / rate if rate else 0)} left"


def _rounded(metrics: Mapping[str, Any]) -> str:
    """Return the shown metrics as text, rounded."""
    shown = {k: v for k, v in metrics.items() if k.startswith(_SHOWN) or k.endswith(_SHOWN_END)}
    return ", ".join(f"{name} {value:{_format(value)}}" for name, value in shown.items())


def _format(value: float) -> str:
    return ".0f" if value >= 1000 else ".2f" if value >= 10 else ".4g"
