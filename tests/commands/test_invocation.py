"""Which commands a message names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sskd import SWEEPS
from sskd.invocation.names import (
    command_line,
    command_name,
    current_role,
    tool_command,
    with_packaged_sweeps,
)


@pytest.mark.parametrize(
    ("program", "teacher", "report"),
    [
        ("train_student.py", "python train_teacher.py", "python -m sskd.report"),
        ("/venv/bin/sskd-student", "sskd-teacher", "sskd-report"),
        ("/venv/bin/pytest", "python train_teacher.py", "python -m sskd.report"),
    ],
)
def test_messages_name_the_command_in_use(
    monkeypatch: pytest.MonkeyPatch, program: str, teacher: str, report: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line("teacher") == teacher
    assert command_name("teacher") == teacher.split()[-1]
    assert tool_command("report") == report


def test_an_installed_package_has_console_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process of a launcher has another program name."""
    monkeypatch.setattr("sskd.invocation.names.IN_CHECKOUT", False)
    monkeypatch.setattr(sys, "argv", ["/lib/submitit/core/_submit.py"])
    assert command_line("student") == "sskd-student"


@pytest.mark.parametrize(
    ("program", "role"),
    [
        ("train_teacher.py", "teacher"),
        ("/bin/sskd-teacher", "teacher"),
        ("train_student.py", "student"),
        ("/bin/sskd-student", "student"),
        ("-c", "student"),
    ],
)
def test_the_program_name_gives_the_role(
    monkeypatch: pytest.MonkeyPatch, program: str, role: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert current_role() == role


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-cd", "sweeps", "-cn", "grid"], ["-cd", str(SWEEPS), "-cn", "grid"]),
        (["--config-dir", "sweeps/"], ["--config-dir", str(SWEEPS)]),
        (["--config-dir=sweeps"], [f"--config-dir={SWEEPS}"]),
        (["-cd", "mine", "-cn", "sweeps"], ["-cd", "mine", "-cn", "sweeps"]),
        (["sweeps"], ["sweeps"]),
    ],
)
def test_the_packaged_sweeps_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_packaged_sweeps(words) == expected
    (tmp_path / "sweeps").mkdir()
    assert with_packaged_sweeps(words) == words
