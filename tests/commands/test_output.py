"""The output of the commands has no control characters, and cannot make a run fail."""

from __future__ import annotations

import ast
import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Compose
from faults import SMALL
from filelock import Timeout
from omegaconf import OmegaConf
from report_runs import put_run
from tqdm import tqdm

import sskd.dashboard.__main__
import sskd.evaluate.__main__
import sskd.export.__main__
import sskd.report.__main__
import sskd.similarity.__main__
import sskd.transfer.__main__
from sskd import CONF
from sskd.commands.sweep import Job, Sweep
from sskd.errors import BusyError, UnfinishedError, UserError
from sskd.output import SteadyStream, complain, say, steady_output
from sskd.runs.checkpoint_file import save_checkpoint
from sskd.runs.folder import read_config_file
from sskd.runs.lock import FolderLock
from sskd.runs.run import Run
from sskd.training.progress import Progress

ROOT = CONF.parent
TINY = (*SMALL, "dataset.fraction=0.02", "schedule.epochs=1", "method=vanilla")
FAILURES = {
    "closed pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "lost terminal": OSError(errno.EIO, "Input/output error"),
    "closed file": ValueError("I/O operation on closed file"),
}
CODES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e"


class Broken(io.StringIO):
    """A stream that takes nothing, at once or from its ``good``-th write on."""

    def __init__(self, error: Exception, good: int = 0) -> None:
        super().__init__()
        self._error, self._good = error, good

    def write(self, text: str) -> int:
        self._good -= 1
        if self._good < 0:
            raise self._error
        return super().write(text)


def test_all_that_is_printed_passes_through_one_module() -> None:
    files = [*(ROOT / "sskd").rglob("*.py"), *ROOT.glob("hydra_plugins/*.py"), *ROOT.glob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "traceback.print_exc") or called.endswith(
                ("stdout.write", "stderr.write", "_bar.write", "tqdm.write")
            ):
                found.append(f"{path.name}:{node.lineno}")
    assert not found
    assert len(files) > 80


@pytest.mark.parametrize("speak", [say, complain])
def test_control_characters_do_not_reach_a_terminal(speak: Any, capsys: Any) -> None:
    speak(f"one{CODES}\ntwo\tthree é 中")
    out = "".join(capsys.readouterr())
    assert [line for line in out.splitlines() if not line.isprintable()] == []
    assert out.startswith("one?[2J?]0;title??31m???\n")
    assert out.endswith("é 中\n")


@pytest.mark.parametrize("speak", [say, complain])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("when", ["write", "flush"])
def test_what_cannot_be_said_is_dropped(
    monkeypatch: pytest.MonkeyPatch, speak: Any, failure: str, when: str
) -> None:
    def fail(*_: Any) -> None:
        raise FAILURES[failure]

    for name in ("stdout", "stderr"):
        stream = io.StringIO()
        monkeypatch.setattr(stream, when, fail)
        monkeypatch.setattr(sys, name, stream)
    speak("without a command")
    with steady_output():
        speak("in a command")
        speak("again")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    speak("without streams")


@pytest.mark.parametrize(
    ("stream", "failure", "mode"),
    [
        ("stdout", "closed pipe", []),
        ("stdout", "full disk", ["-m"]),
        ("stderr", "lost terminal", []),
        ("stderr", "closed file", ["-m"]),
    ],
)
def test_a_run_goes_on_when_nobody_reads_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, mode: list[str], failure: str, stream: str
) -> None:
    monkeypatch.setattr(sys, stream, Broken(FAILURES[failure]))
    status, out, err = command(*mode, *TINY)
    assert status == 0
    assert "Traceback" not in out + err
    assert "Logging error" not in out + err
    assert len(list(command.runs.rglob("result.json"))) == 1


def test_a_reader_may_go_at_any_time(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Broken(FAILURES["closed pipe"], good=1)
    monkeypatch.setattr(sys, "stdout", stream)
    assert command(*TINY)[0] == 0
    assert stream.getvalue()
    assert list(command.runs.rglob("result.json"))


def test_an_error_is_still_an_error_when_nobody_reads(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(FAILURES["full disk"]))
    assert command(*TINY, "no.such=setting")[0] == 1


REPORTS: dict[str, Callable[[Path, pytest.MonkeyPatch], int]] = {
    "report": lambda runs, _: sskd.report.__main__.main([str(runs)]),
    "watch": lambda runs, _: sskd.report.__main__.main([str(runs), "--watch", "0.01"]),
    "evaluate": lambda _, patch: evaluated(patch),
    "dashboard": lambda _, patch: dashboard(patch),
    "transfer": lambda _, patch: measured(patch, sskd.transfer.__main__),
    "similarity": lambda _, patch: measured(patch, sskd.similarity.__main__),
    "export": lambda _, patch: exported(patch),
}


def measured(patch: pytest.MonkeyPatch, module: Any) -> int:
    patch.setattr(module, "_run", lambda _: say("a table"))
    status: int = module.main(["runs"])
    return status


def evaluated(patch: pytest.MonkeyPatch) -> int:
    patch.setattr(sskd.evaluate.__main__, "_run", lambda _: say("a checkpoint: top-1 1.00"))
    return sskd.evaluate.__main__.main(["some.pth"])


def dashboard(patch: pytest.MonkeyPatch) -> int:
    patch.setattr(sskd.dashboard.__main__, "_dashboard", lambda _: say("built"))
    return sskd.dashboard.__main__.main([])


def exported(patch: pytest.MonkeyPatch) -> int:
    patch.setattr(sskd.export.__main__, "_run", lambda _: say("wrote"))
    return sskd.export.__main__.main(["RUN", "--to", "onnx"])


@pytest.mark.parametrize("what", REPORTS)
def test_a_closed_pipe_ends_a_report_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    put_run(tmp_path, "a")
    monkeypatch.setattr(sys, "stdout", Broken(FAILURES["closed pipe"]))
    assert REPORTS[what](tmp_path, monkeypatch) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", sorted({*REPORTS} - {"watch"}))
def test_a_full_disk_is_an_error_of_what_only_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    put_run(tmp_path, "a")
    monkeypatch.setattr(sys, "stdout", Broken(FAILURES["full disk"]))
    assert REPORTS[what](tmp_path, monkeypatch) == 1
    line = "error: the output cannot be written (No space left on device)\n"
    assert capsys.readouterr().err == line


# Descriptors that are closed when Python starts can be shown in a new process only.
@pytest.mark.parametrize(
    "redirected",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "1</dev/null"],
)
def test_a_report_into_nothing_ends_well(tmp_path: Path, redirected: str) -> None:
    put_run(tmp_path, "a")
    line = f"'{sys.executable}' -m sskd.report '{tmp_path}' {redirected}"
    shell = ["bash", "-o", "pipefail", "-c", line]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_help_that_nobody_reads_ends_well() -> None:
    """Python flushes what is left at its end, in a process of its own only."""
    line = f"'{sys.executable}' train_teacher.py --help | true"
    shell = ["bash", "-o", "pipefail", "-c", line]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_run_without_streams_keeps_them_out_of_its_files(tmp_path: Path) -> None:
    """Descriptors 1 and 2 are free at the start, in a process of its own only."""
    words = " ".join([*TINY, f"runs={tmp_path}"])
    line = f"exec '{sys.executable}' train_student.py {words} <&- >&- 2>&-"
    environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment)
    assert found.returncode == 0
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    assert (
        Run(folder, read_config_file(folder / "config.yaml")).checkpoints.load_best(1) is not None
    )
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_lines_of_other_libraries_are_cleaned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, name, stream)
    with steady_output():
        handler = logging.StreamHandler(getattr(sys, name))
        handler.emit(logging.makeLogRecord({"msg": f"Hydra: {CODES[:-3]}\u202eé"}))
        warnings.showwarning(f"odd \x1b]0;title\x07 \x9b31m {name}", UserWarning, "a.py", 1)
        for code in ("\x1b[2K", "\x1b[1;1H", "\x1b[6n", "\x1b[3A", "\x1bc", "\x00", "\x1b"):
            getattr(sys, name).write(code)
        getattr(sys, name).writelines(["[2J", "\x1b]8;;http://x\x1b\\link"])
    written = stream.getvalue()
    assert "Hydra: ?[2J?]0;title??31m?" in written
    assert all(line.isprintable() for line in written.splitlines())


def test_bars_and_colours_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tqdm writes of two bars is the same through the stream as without it."""
    kept = "\x1b[31mred\x1b[0m \x1b[1;32mgreen\x1b[m\ttab\r\n"
    plain, steady = Terminal(), Terminal()
    for terminal, stream in ((plain, plain), (steady, SteadyStream(steady))):
        bars = [
            tqdm(total=2, position=k, file=stream, colour="green", miniters=1, bar_format="{bar:9}")
            for k in range(2)
        ]
        for bar in bars:
            bar.update(1)
            bar.close()
        stream.write(kept)
        assert "\x1b[A" in terminal.getvalue()
    assert steady.getvalue() == plain.getvalue()
    assert steady.getvalue().endswith(kept)


def test_streams_are_as_before_after_a_command() -> None:
    before = sys.stdout, sys.stderr
    with steady_output():
        assert isinstance(sys.stdout, SteadyStream)
        outer = sys.stdout
        with steady_output():
            assert sys.stdout is outer
    assert (sys.stdout, sys.stderr) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_still_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with steady_output():
        progress = Progress("train", 1, 100, done=0, metrics=dict)
        progress.line(f"starts in {CODES}")
        progress.advance(50)
        progress._bar.refresh()
        progress.close()
    assert "\r" in terminal.getvalue()
    assert "50.0/100" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()


def lease(folder: Path) -> None:
    """Put a lease of a living process of another node into ``folder``, named with codes."""
    path, lock = folder / ".lease", FolderLock(folder)
    lock.acquire()
    lines = path.read_text().splitlines()
    lock.release()
    named = [f"host=odd{CODES[:-3]}" if line.startswith("host=") else line for line in lines]
    path.write_text("\n".join(named) + "\n")


def test_an_untrusted_lock_is_shown_clean(tmp_path: Path, capsys: Any) -> None:
    lease(tmp_path)
    os.utime(tmp_path / ".lease", (0, 0))
    messages = ""
    for wait in (True, False):
        lock = FolderLock(tmp_path)
        lock._lease.acquire = _refuses_once(lock._lease.acquire)  # type: ignore[method-assign]
        try:
            lock.acquire(wait=wait)
        except (BusyError, Timeout) as error:
            messages += str(error) * isinstance(error, BusyError)
    out = capsys.readouterr().out
    assert "waiting for" in out
    assert "waiting to see whether" in out
    assert all(line.isprintable() for line in (out + messages).splitlines())


def _refuses_once(acquire: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``acquire`` that does not wait for a lease to run out."""

    def short(timeout: float = 0, **_: Any) -> Any:
        return acquire(timeout=0)

    return short


@pytest.mark.parametrize("field", ["state", "error"])
def test_an_untrusted_status_is_shown_clean(
    composed: Compose, tmp_path: Path, capsys: Any, field: str
) -> None:
    status = {"state": "failed", "error": "none", field: f"odd{CODES}"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    sweep = Sweep([], compose=lambda _: OmegaConf.create())
    sweep.jobs = [Job([], "", composed("method=vanilla"), tmp_path)]
    with pytest.raises(UnfinishedError):
        sweep.report_unfinished()
    out, err = capsys.readouterr()
    # An unknown state is ignored.
    assert ("not started; " if field == "state" else "odd?") in err
    assert all(line.isprintable() for line in (out + err).splitlines())


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_an_untrusted_checkpoint_is_shown_clean(tmp_path: Path, capsys: Any, name: str) -> None:
    odd = {"stage": CODES, "epoch": CODES, "lines": 0}
    save_checkpoint(tmp_path / name, odd)
    save_checkpoint(tmp_path / "previous.pt", {"stage": "train", "lines": 0})
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with Run(tmp_path, {"seed": 1}).open() as run:
        if name == "last.pt":
            run.checkpoints.load(["train"])
        else:
            run.checkpoints.load_best(1)
    err = capsys.readouterr().err
    assert f"{name} is corrupt" in err
    assert all(line.isprintable() for line in err.splitlines())


def test_an_untrusted_configuration_is_shown_clean(tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(tmp_path / "last.pt", {"stage": "train", "lines": 0})
    for text in ('odd: "\\e[2J\\x9b"', '"\\e[2J": 1', "odd: !\x1b[2J 1", "\x1b[2J"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            Run(tmp_path, {"seed": 1}).open()
        complain(f"error: {error.value}")
    err = capsys.readouterr().err
    assert err.count("error: ") == 4
    assert all(line.isprintable() for line in err.splitlines())
