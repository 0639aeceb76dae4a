"""README.md and docs/ against the code: commands, code blocks, links and measured tables."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import runpy
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from pages import (
    DOCS,
    LINKING_PAGES,
    PAGES,
    ROOT,
    anchors,
    code_blocks,
    commands,
    inline_code,
    links,
    page_of,
    read,
    shell_lines,
    table,
)

from sskd import CONF
from sskd.config import read_config
from sskd.methods import METHODS
from sskd.report.published import published_for

PAIRS = ("resnet56-resnet20", "wrn_40_2-wrn_16_2")
TOOL_MODULES = (
    *("sskd.report.__main__", "sskd.evaluate.__main__", "sskd.dashboard.__main__"),
    *("sskd.transfer.__main__", "sskd.similarity.__main__", "sskd.export.__main__"),
)
TOOL_NAMES = {
    *("sskd.report", "sskd.evaluate", "sskd.dashboard"),
    *("sskd.transfer", "sskd.similarity", "sskd.export"),
}
# Tests of these pages run their commands (commands/test_extending.py, test_library.py).
RUN_ELSEWHERE = {"docs/extending.md", "docs/library.md"}
EVERYWHERE = {
    " ".join(words): words
    for page in PAGES
    if page not in RUN_ELSEWHERE
    for words in commands(read(page))
}
TRAINING = {line: words for line, words in EVERYWHERE.items() if words[1] != "-m"}
TOOLS = {line: words for line, words in EVERYWHERE.items() if words[2] in TOOL_NAMES}
OTHERS = {line: words for line, words in EVERYWHERE.items() if line not in TRAINING | TOOLS}


def values_of(parsed: Override) -> Iterator[str]:
    """Yield the values of a sweep, and of an interval its two ends."""
    value = parsed.value()
    if isinstance(value, IntervalSweep):
        return iter([str(value.start), str(value.end)])
    return parsed.sweep_string_iterator()


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of each job of a sweep."""
    choices = [
        [f"{parsed.get_key_element()}={value}" for value in values_of(parsed)]
        if parsed.is_sweep_override()
        else [override]
        for override, parsed in zip(
            overrides, OverridesParser.create().parse_overrides(overrides), strict=True
        )
    ]
    for job in itertools.product(*choices):
        yield list(job)


def run_of(words: list[str]) -> frozenset[str]:
    """Return the overrides that identify the run of a job; the student alone has no teacher."""
    values = dict(word.split("=", 1) for word in words)
    if values.get("method") == "vanilla" and "pair" in values:
        values["pair"] = values["pair"].rpartition("-")[2]
    return frozenset(f"{key}={value}" for key, value in values.items())


@pytest.mark.parametrize("words", TRAINING.values(), ids=list(TRAINING))
def test_a_training_command_composes(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", action="store_true")
    parser.add_argument("-cd")
    parser.add_argument("-cn", default=words[1].removeprefix("train_").removesuffix(".py"))
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(words[2:])
    folder = CONF if given.cd is None else ROOT / given.cd
    several = list(jobs(given.overrides))
    assert given.m or given.cd or len(several) == 1, "Hydra refuses several values without -m"
    if any(word.startswith("hydra/launcher") for word in words):
        pytest.importorskip("submitit", reason="the extra [cluster] is not installed")
    if any(word.startswith("hydra/sweeper") for word in words):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="[optuna] is missing")
    with initialize_config_dir(str(folder), version_base=None):
        for overrides in several:
            read_config(compose(given.cn, [f"hydra.searchpath=['file://{CONF}']", *overrides]))


@pytest.mark.parametrize("words", TOOLS.values(), ids=list(TOOLS))
def test_a_tool_takes_its_arguments(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """In an empty folder it reports what is missing (1), not a wrong command line (2)."""

    def ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    watched = "--watch" in words
    if watched:  # only then: a module that is imported meanwhile may keep the replaced function
        monkeypatch.setattr(time, "sleep", ctrl_c)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words[2:])
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # an earlier test may have left it offline, which it warns about
    for module in TOOL_MODULES:  # other tests have imported them
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    assert stop.value.code == (130 if watched else 1)
    message = capsys.readouterr().err
    assert message == "\nstopped\n" if watched else message.startswith("error: "), message
    assert message.strip().count("\n") == 0


class ParsedError(BaseException):
    """Ends a command that has parsed its arguments."""


@pytest.mark.parametrize("words", OTHERS.values(), ids=list(OTHERS))
def test_another_module_takes_its_arguments(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Benchmarks take minutes, so they end as soon as they have parsed their arguments."""

    def stop_after(parse: Any) -> Any:
        def parse_and_stop(*arguments: Any, **named: Any) -> NoReturn:
            parse(*arguments, **named)
            raise ParsedError

        return parse_and_stop

    parser = argparse.ArgumentParser
    monkeypatch.setattr(parser, "parse_args", stop_after(parser.parse_args))
    monkeypatch.setattr(parser, "parse_intermixed_args", stop_after(parser.parse_intermixed_args))
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.delitem(sys.modules, words[2], raising=False)
    with pytest.raises(ParsedError):
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)


def test_commands_were_found() -> None:
    """The tests above would pass if they found no command."""
    assert {"train_teacher.py", "train_student.py"} == {words[1] for words in TRAINING.values()}
    assert {words[2] for words in TOOLS.values()} == TOOL_NAMES
    assert any("-cd" in words for words in TRAINING.values())
    swept = list(jobs(["seed=range(2)", "method=kd,at", "batch_size=8"]))
    assert len(swept) == 4
    assert swept[-1] == ["seed=1", "method=at", "batch_size=8"]


@pytest.mark.parametrize("page", sorted(set(PAGES) - RUN_ELSEWHERE))
def test_a_page_has_no_unknown_shell_command(page: str) -> None:
    """The other tests cover ``python``, ``make`` and ``pip``."""
    known = {"python", "make", "pip", "git", "source", "find", "torchrun"}
    assert {words[0] for words in shell_lines(read(page))} <= known


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_the_make_targets_of_a_page_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    text = read(page)
    spans = [span.split() for span in inline_code(text)] + shell_lines(text)
    assert {words[1] for words in spans if words[0] == "make" and len(words) == 2} <= targets


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_what_a_page_installs_exists(page: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    text = read(page)
    lines = [" ".join(words) for words in shell_lines(text)] + inline_code(text)
    for line in (line for line in lines if line.startswith("pip install")):
        assert set(re.findall(r"\.\[(\w+)\]", line)) <= set(project["optional-dependencies"])
        assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", line))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_blocks_of_a_page_parse(page: str) -> None:
    parsers = {
        "python": lambda text: compile(text, page, "exec"),
        "yaml": yaml.safe_load,
        "json": json.loads,
        "toml": tomllib.loads,
    }
    unparsed = {"", "bash", "bibtex", "diff", "text"}
    for language, content in code_blocks(read(page)):
        if language not in unparsed:
            parsers[language](content)


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for target in links(read(page)):
        path, anchor = page_of(target, page)
        assert path.exists(), f"{page}: {target}: no such file"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_front_page_links_every_page() -> None:
    linked = {page_of(target, "README.md")[0] for target in links(read("README.md"))}
    assert {ROOT / page for page in DOCS} <= linked


def test_the_front_page_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 200


def test_anchors_are_those_of_github() -> None:
    text = "# A *first*\n\n```bash\n# comment\n```\n## Weights & Biases\n### `make test`, in_all\n"
    assert anchors(text) == {"a-first", "weights--biases", "make-test-in_all"}


def test_the_front_page_lists_every_method() -> None:
    _, *rows = table("README.md", "Methods")
    assert {row[0].strip("`") for row in rows} == set(METHODS)


def test_the_front_page_has_the_measured_costs() -> None:
    """A method's cost is the cost of its last phase. The files list the phases in order."""
    cost: dict[tuple[str, str], str] = {}
    pair = ""
    # In the order in which a later file replaces what an earlier one has of KD.
    names = ("method_cost_later", "method_cost_logits", "method_cost")
    for line in "".join(read(f"results/{name}.md") for name in names).splitlines():
        pair = line.split("**")[1] if line.startswith("**") else pair
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        cost[pair, cells[0]] = cells[4] if len(cells) > 4 else ""
    _, *rows = table("README.md", "Methods")
    for row in rows:
        # A method that has not been measured has an empty cell.
        measured = [cost.get((pair, row[0].strip("`")), "") for pair in PAIRS]
        assert row[-1] == ", ".join(filter(None, measured)), row[0]


def test_the_front_page_has_the_measured_speed() -> None:
    rates: dict[tuple[str, str, str], list[str]] = {}
    for line in read("results/throughput.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 6:
            rates[cells[0], cells[1], cells[2]] = cells[3:6]
    _, *rows = table("README.md", "Speed")
    for name, conventional, *suite in rows:
        method, pair = name.lower().split(", ")
        for precision, rate, factor in zip(("fp32", "bf16"), suite[::2], suite[1::2], strict=True):
            measured = rates[method, pair, precision]
            assert [conventional, rate] == measured[:2]
            assert float(factor.strip("* x")) == pytest.approx(float(measured[2]), abs=0.0501)


def test_the_page_of_performance_has_the_counted_launches() -> None:
    phases = {"KD": "kd distill", "CRD": "crd distill", "SSKD": "sskd distill"}
    phases["SSKD's first phase"] = "sskd ss_head"
    _, *rows = table("docs/performance.md", "Steps on a GPU")
    for name, *counts in rows:
        label, pair = name.split(", ")
        found = []
        for precision in ("fp32", "bf16"):
            for source in ("results/launches_before.md", "results/launches.md"):
                block = read(source).split(f"**{pair}**")[1].split("**")[0]
                start = f"| {' | '.join(phases[label].split())} | {precision} |"
                (line,) = (each for each in block.splitlines() if each.startswith(start))
                found.append(line.split("|")[7].strip())
        assert counts == found, name


def test_the_front_page_has_the_published_row() -> None:
    header, _, row = table("README.md", "Measured so far")
    top1 = published_for("cifar100")[0].top1
    names = ["student" if name == "alone" else name for name in header[1:]]
    assert row[1:] == [f"{top1['resnet56', 'resnet20', name]:.2f}" for name in names]


def axes_of(name: str) -> dict[str, object]:
    """Return the axes of a sweep: its own, or those of the sweep that it extends."""
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "hydra" not in sweep:
        return axes_of(sweep["defaults"][0])
    axes: dict[str, object] = sweep["hydra"]["sweeper"]["params"]
    return axes


def test_the_page_of_sweeps_lists_every_sweep() -> None:
    _, *rows = table("docs/sweeps.md", "The sweep files")
    listed = {
        name.strip("`"): int(count)
        for names, counts, _ in rows
        for name, count in zip(names.split(", "), counts.split(", "), strict=True)
    }
    counted = {}
    for path in (ROOT / "sweeps").glob("*.yaml"):
        found = jobs([f"{key}={value}" for key, value in axes_of(path.stem).items()])
        counted[path.stem] = len({run_of(words) for words in found})
    assert listed == counted
