"""The report's files: the page, CSV, LaTeX, and their names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import never, put_alone, put_run, put_status, texts

from sskd.report.__main__ import main
from sskd.report.figures import as_svg, draw_figures
from sskd.report.page import render_page
from sskd.report.render import render_latex
from sskd.report.report import Report, read_report

VOID = {"meta", "br", "input", "link", "img", "hr"}
MADE = datetime(2026, 11, 25, 12, 30, tzinfo=UTC)


class Page(HTMLParser):
    """The tags and the text of a page; its tags must balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text_of(self, tag: str) -> str:
        return " ".join(data for name, data in self.text if name == tag)


def page(report: Report) -> Page:
    drawn = draw_figures(report, never)
    figures = {name: (figure.get_suptitle(), as_svg(figure)) for name, figure in drawn.items()}
    return Page(render_page(report, figures, MADE))


def some_runs(root: Path) -> Report:
    put_alone(root, "alone", [60.0, 69.0])
    put_run(root, "kd", [60.0, 71.66])
    put_run(root, "sskd", [60.0, 66.49], method="sskd", peak_memory_mib=1234.5)
    put_run(root, "crd", [60.0, 70.0], method="at", difference={"teacher.epoch": "last"})
    put_run(root, "short", [50.0, 51.0], difference={"schedule.epochs": 2})
    put_alone(root, "short alone", [49.0, 49.0], difference={"schedule.epochs": 2})
    put_status(root / "cifar100/distill/vgg13-vgg8/at/seed0", "failed", error="it broke")
    return read_report(root, never)


def test_the_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    report = some_runs(tmp_path)
    found = page(report)
    titles = found.text_of("h3")
    for table in [*report.tables("last"), *report.tables("best")]:
        assert titles.count(table.title) == 1
        for row in texts(table):
            for cell in row:
                assert all(
                    line.strip() in " ".join(text for _, text in found.text)
                    for line in cell.split("\n")
                )
    assert len(found.of("svg")) == len(draw_figures(report, never)) > 3
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(key) or "#").startswith("#"), (tag, attributes)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    # All references within the page have a target.
    whole = json.dumps(found.tags)
    references = {*re.findall(r"url\(#([^)]*)\)", whole), *re.findall(r'href": "#([^"]*)', whole)}
    assert references <= set(ids)
    styles = found.text_of("style")
    assert not re.search(r"url\(|@import", styles)
    policy = found.of("meta")[2]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_the_page_shows_its_folder_and_commits(tmp_path: Path) -> None:
    put_run(tmp_path, "a", commit="abc123")
    put_run(tmp_path, "b", seed=1, commit="abc123")
    put_run(tmp_path, "c", seed=2, commit=None)
    found = page(read_report(tmp_path, never))
    assert found.text_of("title") == "Distillation results, 2026-11-25 12:30 UTC"
    assert str(tmp_path) in found.text_of("code")
    text = " ".join(found.text_of("p").split())
    assert "3 finished runs" in text
    assert "(2 runs)" in text
    assert "abc123" in found.text_of("code")
    assert "not recorded" in found.text_of("code")


def shades(found: Page) -> dict[float, tuple[str | None, float]]:
    """Return the direction and the strength of each cell's colour by the value of the cell."""
    return {
        float(cell["data-value"] or ""): (
            cell["data-direction"],
            float((cell["style"] or "").removeprefix("--shade: ")),
        )
        for cell in found.of("td")
        if "data-direction" in cell
    }


def test_colours_are_differences_from_published_values(tmp_path: Path) -> None:
    put_run(tmp_path, "kd", [71.66])
    put_run(tmp_path, "sskd", [66.49], method="sskd")
    put_run(tmp_path, "nst", [60.0], method="nst")
    found = page(read_report(tmp_path, never))
    # KD 70.66 and SSKD 71.49 are published: 1 point of 2 above, and 5 below; NST is not.
    assert shades(found)[71.66] == ("up", 0.5)
    assert shades(found)[66.49] == ("down", 1.0)
    assert 60.0 not in shades(found)
    assert "measured - published" in found.text_of("p")


def test_colours_are_gains_if_nothing_is_published(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [50.0], dataset="digits")
    put_run(tmp_path, "kd", [54.0], dataset="digits")
    put_run(tmp_path, "at", [49.0], dataset="digits", method="at")
    found = page(read_report(tmp_path, never))
    # The largest gain is 4 points: full; a loss of 1 point is a quarter of that.
    assert shades(found) == {54.0: ("up", 1.0), 49.0: ("down", 0.25)}
    assert "gain over the student alone" in found.text_of("p")


def test_tables_can_be_sorted_with_a_keyboard(tmp_path: Path) -> None:
    found = page(some_runs(tmp_path))
    heads = [head for head in found.of("th") if head.get("scope") == "col"]
    assert heads
    assert all(head["aria-sort"] == "none" for head in heads)
    buttons = found.of("button")
    assert len(buttons) == len(heads)
    assert all(button["type"] == "button" for button in buttons)
    script = found.text_of("script")
    assert "addEventListener" in script
    assert "aria-sort" in script
    scrolling = [box for box in found.of("div") if box.get("class") == "scroll"]
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in scrolling)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to check the script with")
def test_the_script_is_valid_javascript(tmp_path: Path) -> None:
    (tmp_path / "page.js").write_text(page(some_runs(tmp_path)).text_of("script"))
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


def test_every_row_of_the_cost_table_names_its_pair(tmp_path: Path) -> None:
    report = some_runs(tmp_path)
    rows = page(report).text_of("th").count("resnet56-resnet20")
    costs = [row for table in report.tables("last") if not table.epoch for row in texts(table)]
    missing = {(c.table, c.setting) for c in report.missing() if c.teacher == "resnet56"}
    assert rows == len(costs) + len(missing)


def test_the_page_lists_what_is_unfinished_and_missing(tmp_path: Path) -> None:
    found = page(some_runs(tmp_path))
    assert "cifar100/distill/vgg13-vgg8/at/seed0" in found.text_of("th")
    assert "failed" in found.text_of("td")
    assert "it broke" in found.text_of("td")
    assert "FitNet, AT, SP, VID" in found.text_of("td")


HOSTILE = '</td><script>alert("x")</script><img src=//e.vil/x onerror=y>&amp;\'{{ 7*7 }}'


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    keys = ("dataset", "teacher", "student", "method")
    names: dict[str, Any] = dict.fromkeys(keys, HOSTILE) | {"dataset_source": "folder"}
    put_run(tmp_path, "run", **names, difference={HOSTILE: HOSTILE}, commit=HOSTILE)
    put_run(tmp_path, "kd", **(names | {"method": "kd"}))
    data = {"dataset": HOSTILE, "dataset_source": "folder"}
    put_alone(tmp_path, "alone", [1.0], student=HOSTILE, **data)
    put_status(tmp_path / "<b>", "failed", error=HOSTILE, host=HOSTILE, command=HOSTILE)
    found = page(read_report(tmp_path, never))
    assert len(found.of("script")) == 1
    assert found.of("img") == found.of("b") == []
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert found.text_of("td").count(HOSTILE) == 2
    assert "49" not in found.text_of("h3")


def test_out_writes_the_page_the_tables_and_the_plots(tmp_path: Path) -> None:
    some_runs(tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out" / "grid.html")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"grid.md", "grid.csv", "grid.tex", "grid.html"} <= written
    plots = written - {"grid.md", "grid.csv", "grid.tex", "grid.html"}
    names = draw_figures(read_report(tmp_path / "runs", never), never)
    assert plots == {f"grid-{name}.{kind}" for name in names for kind in ("svg", "png")}
    Page((tmp_path / "out" / "grid.html").read_text(encoding="utf-8"))


def test_files_need_no_torch_and_tables_no_matplotlib(tmp_path: Path) -> None:
    put_run(tmp_path / "runs", "run")
    code = (
        "import sys; from sskd.report.__main__ import main; runs, out = sys.argv[1:];"
        "assert main([runs]) == 0; assert 'matplotlib' not in sys.modules;"
        "assert main([runs, '--out', out]) == 0; assert 'matplotlib' in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), str(tmp_path / "grid")]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)


def test_csv_has_the_values_of_both_epochs(tmp_path: Path) -> None:
    lines = some_runs(tmp_path).csv().splitlines()
    assert "cifar100,the recipe,similar,resnet56,resnet20,KD,top1,last,71.66,,1,70.66,1.0" in lines
    assert len(lines) == 1 + 2 * len([line for line in lines if ",last," in line])


def test_latex_has_every_value_and_escapes_characters(tmp_path: Path) -> None:
    put_run(tmp_path, "kd", [69.66])
    put_run(tmp_path, "kd1", [71.66], seed=1)
    put_run(tmp_path, "wrn", [70.0], student="wrn_16_2", teacher="wrn_40_2", method="crd")
    text = render_latex(read_report(tmp_path, never).tables("last"))
    assert r"teacher & wrn\_40\_2 & resnet56 \\" in text
    assert r"KD &  & 70.66 $\pm$ 1.41 (2) \\" in text
    assert r"  published &  & 70.66 +0.00 \\" in text
    # The paper has 76.04 for CRD and this pair.
    assert r"  published & 76.04 $-$6.04 &  \\" in text
    assert r"\usepackage{booktabs}" in text.splitlines()[1]
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2


NASTY = r"a\b{c}$d$%e#f_g~h^i&[j*k<l>|é--\input{/etc/passwd}"


def hostile_latex(root: Path) -> str:
    put_run(root, "run", dataset=NASTY, teacher="[x", student="*", method=f"[{NASTY}")
    return render_latex(read_report(root, never).tables("last"))


def test_no_name_of_a_run_is_a_latex_command(tmp_path: Path) -> None:
    text = hostile_latex(tmp_path)
    assert text.isascii()
    name = (
        r"a\textbackslash{}b\{c\}\$d\$\%e\#f\_g\textasciitilde{}h\textasciicircum{}i\&{[}j{*}k"
        r"\textless{}l\textgreater{}\textbar{}?-{}-\textbackslash{}input\{/etc/passwd\}"
    )
    assert rf"\caption{{{name} $\cdot$ the recipe" in text
    # A bracket or a star after a line break would be its argument.
    assert not re.search(r"\\\\\s*[\[*]", text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_latex_compiles_with_the_packages_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "all.tex").write_text(hostile_latex(tmp_path / "runs"))
    packages = r"\usepackage{booktabs}\usepackage{graphicx}"
    document = (
        rf"\documentclass{{article}}{packages}\begin{{document}}\input{{all}}\end{{document}}"
    )
    (tmp_path / "main.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
