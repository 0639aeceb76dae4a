"""The errors that a user can cause, each told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right; the message is one line, for a person.

    It says what is wrong, where, and what to type instead. The commands print it
    without a traceback and end with a status that is not 0.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``word``, or an empty string."""

    def likeness(choice: str) -> tuple[float, int]:
        match = difflib.SequenceMatcher(None, word.lower(), choice.lower())
        start = next(iter(match.get_matching_blocks()))
        return match.ratio(), start.size if start.a == start.b == 0 else 0

    best = max(choices, key=likeness, default="")
    return f"; did you mean '{best}'?" if likeness(best)[0] > 0.5 else ""
