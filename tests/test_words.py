"""The glossary of CONTRIBUTING.md: words that code and pages do not use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sskd import CONF

ROOT = CONF.parent
PLACES = (
    *("sskd", "hydra_plugins", "benchmarks", "conf", "sweeps", "docs"),
    *("README.md", "CONTRIBUTING.md", "SECURITY.md"),
)
SUFFIXES = {".py", ".yaml", ".md", ".html", ".css", ".js"}
# Write instead: report, state; resume, continue; again, from scratch; expected; archive; combine;
# student and teacher.
WORDS = (
    *("told", "tells?", "telling", "go(?:es)? on", "going on", "went on", "gone on"),
    *("anew", "afresh", "wanted", "wants a", "ours", "theirs", "whoever", "thereof"),
    *("put aside", "puts? together", "made whole", "gone astray", "of so many", "no epoch's"),
    *("of its own accord",),
)
# A word may be a part of a name: ``plain_ours``.
FORBIDDEN = re.compile(rf"(?<![a-z])(?:{'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
ALLOWED = re.compile(
    r"""
    still_ours             # an argument of functions that write to a run's folder
    | \.tell\(             # the method of files
    | \*ours\*|\*theirs\*  # the glossary itself
    """,
    re.VERBOSE,
)


def files() -> Iterator[Path]:
    for place in PLACES:
        path = ROOT / place
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        assert found, f"{place} is missing"
        yield from (each for each in found if each.suffix in SUFFIXES)


def forbidden_words(text: str) -> list[str]:
    """Return the line number and the word of each forbidden word in ``text``."""
    return [
        f"{number}: {match[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        for match in FORBIDDEN.finditer(ALLOWED.sub("", line))
    ]


def test_code_and_pages_use_the_words_of_the_glossary() -> None:
    found = {
        str(path.relative_to(ROOT)): words
        for path in files()
        if (words := forbidden_words(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize("text", ["It Goes on.", "def f(plain_ours)", "a: told", "told_at = 1"])
def test_a_forbidden_word_is_found(text: str) -> None:
    assert forbidden_words(text)


@pytest.mark.parametrize("text", ["hours", "still_ours()", "stream.tell()", "go one", "unwanted"])
def test_other_words_are_allowed(text: str) -> None:
    assert not forbidden_words(text)
