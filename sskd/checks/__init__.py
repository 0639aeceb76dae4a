"""Properties that every method, network and dataset of the suite has, as checks of your own.

``python -m sskd.checks method dist`` runs them. Each check is a function that raises
``CheckError``; the suite's tests call the same functions.
"""

from __future__ import annotations


class CheckError(AssertionError):
    """A method, network or dataset lacks a property that the suite relies on."""


def require(condition: bool, message: str) -> None:
    """Raise CheckError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckError(message)
