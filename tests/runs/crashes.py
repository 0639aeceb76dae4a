"""Crashing a run at a chosen training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sskd.training.progress import Progress


class CrashError(Exception):
    """Simulates a process that ends without notice."""


def at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]
) -> Callable[[], int]:
    """Call ``action`` after the ``number``-th training step from now; return a step counter."""
    original, count = Progress.advance, 0

    def advance(self: Progress, images: int) -> None:
        nonlocal count
        original(self, images)
        count += 1
        if count == number:
            action()

    monkeypatch.setattr(Progress, "advance", advance)
    return lambda: count


def crash() -> None:
    raise CrashError
