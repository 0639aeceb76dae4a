"""Names in the report: none becomes markup, a formula, a command, or a sign for the terminal."""

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


def test_markdown_escapes_each_sign_of_markup() -> None:
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
def test_no_emojis_name_is_left_in_one_piece(name: str) -> None:
    """GitHub looks for them in the text of the page, in which a backslash has had its effect."""
    text = render_markdown(as_table([name])).replace("\\", "")
    assert re.search(r":[\w+-]+:", re.sub(r"\n\| :?---.*", "", text)) is None
    assert name in text.replace("<!-- -->", "")


@pytest.mark.skipif(shutil.which("cmark-gfm") is None, reason="no cmark-gfm, GitHub's own renderer")
def test_github_shows_each_name_as_it_is() -> None:
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
def test_no_cell_of_csv_begins_as_a_formula(tmp_path: Path, name: str, place: str) -> None:
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
    # What is left are our own numbers.
    assert all(re.fullmatch(r"-?\d+\.\d+", cell) for cell in shown), shown


@pytest.mark.parametrize("name", NAMES)
def test_latex_has_no_command_of_a_name(name: str) -> None:
    known = r"(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}"
    text = render_latex([as_table([f"{name}\\input{{x}}"])])
    (line,) = (line for line in text.splitlines() if line.startswith(r"\noindent"))
    content = line.removeprefix(r"\noindent ").removesuffix(r"\par")
    left = re.sub(rf"\\{known}|\\[&%$#_{{}}]|\{{[\[*-]\}}|\{{\}}", "", content)
    assert not set(left) & set("\\&%$#_{}~^|<>"), left


SIGNS = {
    "an escape code": "\x1b[31mred\x1b[0m",
    "a title of the terminal": "\x1b]0;title\x07",
    "a C1 code": "\x9b31m",
    "a carriage return": "a\rb",
    "a change of direction": "a\u202eb",
    "a zero width": "a\u200bb",
    "a backspace": "a\x08b",
}


@pytest.mark.parametrize("kind", SIGNS)
def test_nothing_that_is_printed_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    sign = SIGNS[kind]
    runs = tmp_path / f"runs {sign}"
    put_run(runs, f"a {sign}", difference={"key": sign})
    put_run(runs, f"b {sign}", method=sign)
    put_run(runs, f"c {sign}", commit=sign, seed=1, difference={"key": sign})
    put_run(runs, f"d {sign}", recipe=sign)
    put_run(runs, f"e {sign}", difference={"key": sign})
    (put_status(runs / f"f {sign}", "x") / "status.json").write_text(json.dumps({"state": sign}))
    put_status(runs / f"g {sign}", "failed", error=sign, host=sign, command=sign)
    for arguments in ([], ["--status"], ["--best", "--out", str(tmp_path / f"out {sign}" / "all")]):
        assert main([str(runs), *arguments]) == 0
        out, err = capsys.readouterr()
        for line in (out + err).split("\n"):
            assert line == mask_unprintable(line)
        assert "warning: " in err
    page = (tmp_path / f"out {sign}" / "all.html").read_text(encoding="utf-8")
    assert sign not in page


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_a_folder_whose_name_is_no_text_has_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / os.fsdecode(b"runs \xff")
    put_run(runs, os.fsdecode(b"kd \xe9"))
    put_status(runs / os.fsdecode(b"at \xe9"), "failed")
    out = tmp_path / os.fsdecode(b"out \xff")
    assert main([str(runs), "--out", str(out)]) == 0
    assert "wrote " in capsys.readouterr().out
    assert "runs ?" in Path(f"{out}.html").read_text(encoding="utf-8")


def test_text_tables_show_names_as_they_are() -> None:
    text = render_text(as_table(NAMES), 500)
    assert all(name in text for name in NAMES)
