"""Checks that a method, network or dataset of your own has the properties of those in the suite.

``sskd-checks method dist`` runs them. Each check is a function that raises ``CheckError``; the
suite's tests call the same functions.
"""

from __future__ import annotations

from sskd.errors import CheckError


def require(condition: bool, message: str) -> None:
    """Raise CheckError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckError(message)
