"""The errors of the suite, and what their messages are made of.

::

    Exception
    ├── UserError                the user can fix it; its message is one line
    │   ├── BusyError            another process works on the run
    │   ├── UnfinishedError      jobs of a sweep have not finished
    │   ├── JobError             one job of a sweep failed
    │   ├── FirstRankError       the first rank failed (sskd.distributed.ranks)
    │   └── NotFiniteError       a network's outputs are not finite
    ├── CheckError               a method, network or dataset lacks a property
    └── CorruptFileError         a file is not what was written
    KeyboardInterrupt
    └── Interrupted              a signal stopped the run, which saved its state

Any other exception is a fault of the suite and is shown with its traceback.
"""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix; its message is a single readable line.

    It says what is wrong, where, and what to type instead. The commands print it without a
    traceback and end with ``status``.
    """

    status = 1

    def __str__(self) -> str:
        return mask_unprintable(super().__str__())  # names in files may hold anything


class BusyError(UserError):
    """Another process works on the run, so that this one leaves it alone."""

    status = os.EX_TEMPFAIL  # nothing is wrong: the same command later finds it finished


class CheckError(Exception):
    """A method, network or dataset lacks a property that the suite relies on."""


class CorruptFileError(Exception):
    """The file ``name`` lacks the content that was written; ``how`` describes the damage."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(f"{name} is corrupt: {how}")


class UnfinishedError(UserError):
    """Jobs of a sweep have not finished; a line about each was printed."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class JobError(UserError):
    """One job of a sweep failed; the error was already reported."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)  # so that it can be pickled
        self.status = status

    def __str__(self) -> str:
        return mask_unprintable(str(self.args[0]))


class NotFiniteError(UserError):
    """Logits are not finite, so accuracy, agreement and divergence are meaningless."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal and has saved its state.

    A KeyboardInterrupt, so that it ends a whole sweep and not only one of its jobs.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)  # the arguments of the call, so that it can be pickled
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


def exit_status(error: Exception) -> int:
    """Return the status with which a command ends after ``error``."""
    return error.status if isinstance(error, UserError) else UserError.status


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def mask_unprintable(text: str) -> str:
    """Return ``text`` with a question mark for each character that could control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shortened(value: object, most: int = 60) -> str:
    """Return ``repr(value)`` with its middle left out if it is longer than ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python converts no integer of more than some thousand digits
        return "a number of thousands of digits"
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``word``, or an empty string."""
    best = nearest(word, choices)
    return f"; did you mean '{best}'?" if best else ""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice nearest to ``word``; None if they have too little in common."""

    def likeness(choice: str) -> tuple[float, int]:
        match = difflib.SequenceMatcher(None, word.lower(), choice.lower())
        start = next(iter(match.get_matching_blocks()))
        return match.ratio(), start.size if start.a == start.b == 0 else 0

    best = max(choices, key=likeness, default="")
    return best if likeness(best)[0] > 0.5 else None
