"""The errors that a user can cause, each told in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right; the message is one line, for a person.

    It says what is wrong, where, and what to type instead. The commands print it
    without a traceback and end with its status, which is not 0.
    """

    status = 1

    def __str__(self) -> str:
        return mask_unprintable(super().__str__())  # names in files may hold anything


class BusyError(UserError):
    """Another process is at work on the run, so that this one leaves it alone."""

    status = os.EX_TEMPFAIL  # nothing is wrong: the same command later finds it finished


class CorruptFileError(Exception):
    """The file ``name`` does not have the content that was written; ``how`` says how that shows."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(f"{name} is corrupt: {how}")


class UnfinishedError(UserError):
    """Cells of a sweep have not finished, each of which has been told in a line of its own."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class CellError(UserError):
    """One cell of a sweep failed; the error was already reported."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)  # so that it can be pickled
        self.status = status

    def __str__(self) -> str:
        return mask_unprintable(str(self.args[0]))


def mask_unprintable(text: str) -> str:
    """Return ``text`` with a question mark for each sign that a terminal should not be sent."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


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

    def likeness(choice: str) -> tuple[float, int]:
        match = difflib.SequenceMatcher(None, word.lower(), choice.lower())
        start = next(iter(match.get_matching_blocks()))
        return match.ratio(), start.size if start.a == start.b == 0 else 0

    best = max(choices, key=likeness, default="")
    return f"; did you mean '{best}'?" if likeness(best)[0] > 0.5 else ""
