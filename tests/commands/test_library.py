"""docs/library.md against the code: its script, its tables of fields, the functions it names."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from starting import ROOT, run

from sskd.data import Batch, Images
from sskd.models import Features

PAGE = (ROOT / "docs/library.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
LOSSES = re.findall(r"`(\w+)\.(\w+)\(([^`]*)\)`", PAGE.partition("## Losses")[2].partition("##")[0])


def test_the_script_of_the_library_page_distils(tmp_path: Path) -> None:
    (script,) = SCRIPTS
    assert len(script.splitlines()) <= 60
    assert "hydra" not in script
    for more, fewer in (("epochs=6", "epochs=3"), ("epochs=10", "epochs=6")):
        assert script.count(more) == 1
        script = script.replace(more, fewer)
    (tmp_path / "distil_digits.py").write_text(script, encoding="utf-8")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import few_digits, runpy; few_digits.install()\n"
        "runpy.run_path('distil_digits.py', run_name='__main__')"
    )
    finished = run("-c", code, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    losses: dict[str, list[float]] = {}
    for phase, loss in re.findall(r"^(.*), epoch \d+: loss (.*)$", finished.stdout, re.M):
        losses.setdefault(phase, []).append(float(loss))
    assert list(losses) == ["vanilla, train", "sskd, ss_head", "sskd, distill"]
    assert all(found[-1] < found[0] for found in losses.values())
    reached = re.findall(r"^(\w+): top-1 (.*)$", finished.stdout, re.M)
    assert [network for network, _ in reached] == ["teacher", "student"]
    assert all(float(top1) > 10 for _, top1 in reached)  # percent, of ten classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Features", Features._fields),
        ("Batch", Batch._fields),
        ("Images", tuple(field.name for field in fields(Images))),
    ],
)
def test_every_field_is_in_a_table(name: str, expected: tuple[str, ...]) -> None:
    table = PAGE.partition(f"| field of `{name}` |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert tuple(re.findall(r"`(\w+)`", " ".join(rows))) == expected


@pytest.mark.parametrize(("module", "name", "parameters"), LOSSES)
def test_a_loss_of_the_page_has_these_parameters(module: str, name: str, parameters: str) -> None:
    function = getattr(importlib.import_module(f"sskd.methods.{module}"), name)
    listed = [text.partition("=")[0] for text in parameters.split(", ")]
    assert listed == list(inspect.signature(function).parameters)


def test_the_page_lists_the_losses() -> None:
    assert len(LOSSES) == 36
