"""Names in the report become no markup, formula, command or control character."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_runs import never, put_run, put_status, text_table

from sskd.errors import mask_unprintable
from sskd.report.__main__ import main
from sskd.report.render import render_csv, render_latex, render_markdown, render_text
from sskd.report.report import read_report
from sskd.report.tables import Table

NAMES = [
    *("a|b", "<script>alert(1)</script>", "`x`", "[x](javascript:alert(1))", "*b*", "**b**"),
    *("_x_", "__x__", "x_", "~~s~~", "~s~", "&lt;b&gt;", "&#124;", "![i](//e.vil/x)", "$x$"),
    *("https://e.vil/x", "HTTP://e.vil", "ftp://e.vil", "www.e.vil", "WWW.e.vil", "<//e.vil>"),
    *("a@e.vil", "mailto:a@e.vil", "xmpp:a@e.vil/x", "[^1]", "[x]: //e.vil", "<!--", "a\\|b\\"),
    *(":skull:", "a:+1:b", ":_x_:", "a:b"),
    *("wrn_40_2", "a_*_b_", "# x", "- x", "1. x", "> x", "---", "x #", "\\"),
]


def as_table(names: list[str]) -> Table:
    rows = [(name, "1.00") for name in names]
    notes = tuple(f"Of {name}" for name in names)
    return text_table(" ".join(names), ("row", names[0]), *rows, align=">", notes=notes)


def test_markdown_escapes_all_markup_characters() -> None:
    rows = (("a|b\nc", "<img> [x](y) `z` \\|"), ("_x_ ~y~ &amp; $z$", "wrn_40_2 www.x"))
    table = text_table("a *b*", ("row", "top"), *rows, align=">")
    assert render_markdown(table) == (
        "## a \\*b\\*\n\n"
        "| row | top |\n"
        "| :--- | ---: |\n"
        "| a\\|b<br>c | \\<img> \\[x\\](y) \\`z\\` \\\\\\| |\n"
        "| \\_x\\_ \\~y\\~ \\&amp; \\$z\\$ | wrn_40_2 www\\.x |\n"
    )


@pytest.mark.parametrize("name", [":skull:", "a :+1:", ":flag_de:", ":_x_:", ":x-y:"])
def test_names_cannot_become_emojis(name: str) -> None:
    """GitHub looks for emojis after it has interpreted backslashes."""
    text = render_markdown(as_table([name])).replace("\\", "")
    assert re.search(r":[\w+-]+:", re.sub(r"\n\| :?---.*", "", text)) is None
    assert name in text.replace("<!-- -->", "")


@pytest.mark.skipif(shutil.which("cmark-gfm") is None, reason="no cmark-gfm, GitHub's renderer")
def test_github_shows_names_unchanged() -> None:
    extensions = ("table", "autolink", "strikethrough", "footnotes", "tasklist")
    command = ["cmark-gfm", "--unsafe", *(word for name in extensions for word in ("-e", name))]
    markdown = render_markdown(as_table(NAMES))
    done = subprocess.run(command, input=markdown, text=True, capture_output=True, check=True)
    page = done.stdout.replace("<!-- -->", "")
    tags = set(re.findall(r"</?(\w+)", page))
    assert tags == {"h2", "table", "thead", "tbody", "tr", "th", "td", "p"}
    cells = re.findall(r"<tr>\n<td[^>]*>(.*)</td>", page)
    assert [html.unescape(cell) for cell in cells] == NAMES


@pytest.mark.parametrize(
    "name",
    [
        *(
            "=cmd|' /C calc'!A0",
            "+1",
            "-1",
            "@SUM(A1)",
            " =1",
            "kd;=1",
            "a; +1",
            "\uff1d1",
            "\uff0b1",
        ),
        *("\uff0d1", "\uff20SUM(A1)", "x;\uff1d1", '=HYPERLINK("//e.vil")', "==", "-"),
    ],
)
@pytest.mark.parametrize("place", ["dataset", "student", "method", "difference"])
def test_no_field_of_csv_is_a_formula(tmp_path: Path, name: str, place: str) -> None:
    changes: dict[str, Any] = {place: {name: name} if place == "difference" else name}
    put_run(tmp_path, "run", **changes)
    entries = [
        entry for table in read_report(tmp_path, never).tables("last") for entry in table.entries
    ]
    lines = list(csv.reader(io.StringIO(render_csv(entries))))
    cells = [part for line in lines for cell in line for part in cell.split(";")]
    shown = [
        cell for cell in cells if cell.strip().startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20"))
    ]
    # The others are numbers of the report.
    assert all(re.fullmatch(r"-?\d+\.\d+", cell) for cell in shown), shown


@pytest.mark.parametrize("name", NAMES)
def test_names_cannot_become_latex_commands(name: str) -> None:
    known = r"(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}"
    text = render_latex([as_table([f"{name}\\input{{x}}"])])
    (line,) = (line for line in text.splitlines() if line.startswith(r"\noindent"))
    content = line.removeprefix(r"\noindent ").removesuffix(r"\par")
    left = re.sub(rf"\\{known}|\\[&%$#_{{}}]|\{{[\[*-]\}}|\{{\}}", "", content)
    assert not set(left) & set("\\&%$#_{}~^|<>"), left


CONTROL_CHARACTERS = {
    "an escape code": "\x1b[31mred\x1b[0m",
    "a title of the terminal": "\x1b]0;title\x07",
    "a C1 code": "\x9b31m",
    "a carriage return": "a\rb",
    "a change of direction": "a\u202eb",
    "a zero width": "a\u200bb",
    "a backspace": "a\x08b",
}


@pytest.mark.parametrize("kind", CONTROL_CHARACTERS)
def test_no_output_controls_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text = CONTROL_CHARACTERS[kind]
    runs = tmp_path / f"runs {text}"
    put_run(runs, f"a {text}", difference={"key": text})
    put_run(runs, f"b {text}", method=text)
    put_run(runs, f"c {text}", commit=text, seed=1, difference={"key": text})
    put_run(runs, f"d {text}", recipe=text)
    put_run(runs, f"e {text}", difference={"key": text})
    (put_status(runs / f"f {text}", "x") / "status.json").write_text(json.dumps({"state": text}))
    put_status(runs / f"g {text}", "failed", error=text, host=text, command=text)
    for arguments in ([], ["--status"], ["--best", "--out", str(tmp_path / f"out {text}" / "all")]):
        assert main([str(runs), *arguments]) == 0
        out, err = capsys.readouterr()
        for line in (out + err).split("\n"):
            assert line == mask_unprintable(line)
        assert "warning: " in err
    page = (tmp_path / f"out {text}" / "all.html").read_text(encoding="utf-8")
    assert text not in page


@pytest.mark.skipif(os.name != "posix", reason="names are text on other systems")
def test_folders_may_have_names_that_are_not_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / os.fsdecode(b"runs \xff")
    put_run(runs, os.fsdecode(b"kd \xe9"))
    put_status(runs / os.fsdecode(b"at \xe9"), "failed")
    out = tmp_path / os.fsdecode(b"out \xff")
    assert main([str(runs), "--out", str(out)]) == 0
    assert "wrote " in capsys.readouterr().out
    assert "runs ?" in Path(f"{out}.html").read_text(encoding="utf-8")


def test_text_tables_show_names_unchanged() -> None:
    text = render_text(as_table(NAMES), 500)
    assert all(name in text for name in NAMES)
