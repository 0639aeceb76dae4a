"""The pages of the documentation as the tests read them: sections, commands, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from torch.distributed.run import parse_args

from sskd import CONF

ROOT = CONF.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# The pages whose commands and code blocks are checked, and further pages whose links are.
PAGES = ["README.md", *DOCS]
LINKING_PAGES = [
    *PAGES,
    "CONTRIBUTING.md",
    "SECURITY.md",
    "results/README.md",
    "results/archive.md",
]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def read(page: str) -> str:
    """Return the text of a page; "" if there is no such page."""
    path = ROOT / page
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def section(page: str, heading: str) -> str:
    """Return the text beneath ``heading``, up to the next heading of its level or above."""
    text = read(page)
    outline = _BLOCK.sub(lambda block: block[0].replace("#", " "), text)  # of the same length
    found = re.search(rf"^(#+) {re.escape(heading)}$", outline, re.M)
    assert found is not None, f"{page} has no heading '{heading}'"
    end = re.compile(rf"^#{{1,{len(found[1])}}} ", re.M).search(outline, found.end())
    return text[found.end() : end.start() if end else len(text)]


def table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table beneath ``heading``, without the line of dashes."""
    lines = section(page, heading).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each fenced block."""
    return [(block[1], block[2]) for block in _BLOCK.finditer(text)]


def inline_code(text: str) -> list[str]:
    """Return the content of each inline code span."""
    spans = _INLINE.findall(_BLOCK.sub("", text))
    return [" ".join(span.split()) for span in spans]


def shell_lines(text: str) -> list[list[str]]:
    """Return the words of each command in the ``bash`` blocks."""
    blocks = [content for language, content in code_blocks(text) if language == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(text: str) -> list[list[str]]:
    """Return the words of each Python command, in ``bash`` blocks and in inline code.

    A script that torchrun starts takes the same words.
    """
    inline = [shlex.split(span) for span in inline_code(text) if span.startswith("python ")]
    found = [words for words in shell_lines(text) + inline if words[0] in ("python", "torchrun")]
    return [_without_torchrun(words) if words[0] == "torchrun" else words for words in found]


def _without_torchrun(words: list[str]) -> list[str]:
    options = parse_args(words[1:])
    return ["python", options.training_script, *options.training_script_args]


def links(text: str) -> list[str]:
    """Return the targets of the links and images that are inside the repository."""
    targets = _LINK.findall(_BLOCK.sub("", text))
    return [target for target in targets if not target.startswith(("http:", "https:"))]


def anchors(text: str) -> set[str]:
    """Return the anchor that GitHub gives to each heading."""
    headings = _HEADING.findall(_BLOCK.sub("", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def page_of(target: str, page: str) -> tuple[Path, str]:
    """Return the file and the anchor to which a link on ``page`` leads."""
    path, _, anchor = target.partition("#")
    return ((ROOT / page).parent / path if path else ROOT / page).resolve(), anchor
