"""The commands of ``benchmarks.gpu``, without a GPU: what they measure, write and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import starting
import torch
from faults import SMALL

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import graph_steps, runs, targets, worker
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rows import Command, RowFile, measure_rows, settings_of
from benchmarks.gpu.worker import Values, Worker
from sskd.errors import Interrupted, UserError
from sskd.methods import METHODS

# ---- rows ----


@pytest.fixture(autouse=True)
def _fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the workers, which would otherwise start a new Python."""
    monkeypatch.setattr(worker, "get_context", lambda method: get_context("fork"))


def fail() -> Values:
    raise UserError("no such pair")


def number(path: Path, value: int) -> Values:
    """Return a row, and note the call."""
    with path.open("a") as file:
        file.write(f"{value}\n")
    return {"value": value, "process": os.getpid()}


def command_of(measurements: dict[str, Any]) -> Command:
    return Command(
        lambda options: measurements.items(),
        lambda options: {},
        lambda found, options: list(found),
    )


def options_of(folder: Path, minutes: float = 1, *, retry: bool = False) -> Namespace:
    return Namespace(out=folder, minutes=minutes, retry=retry)


def rows_of(folder: Path, *, retry: bool = False) -> dict[str, Values]:
    return RowFile(folder / "test.jsonl", {}).read(retry=retry)


def test_finished_rows_are_not_computed_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    measurements: dict[str, Any] = {name: partial(number, calls, i) for i, name in enumerate("abc")}
    measurements["d"] = fail
    measure_rows("test", command_of({"b": measurements["b"]}), options_of(tmp_path), "title")
    for _ in "12":
        measure_rows("test", command_of(measurements), options_of(tmp_path), "title")
    assert calls.read_text().split() == ["1", "0", "2"]
    found = rows_of(tmp_path)
    assert [found[name].get("value") for name in "abcd"] == [0, 1, 2, None]
    assert found["d"]["error"] == "UserError: no such pair"
    assert list(rows_of(tmp_path, retry=True)) == ["b", "a", "c"]
    assert (tmp_path / "test.md").read_text().splitlines()[:2] == ["title", ""]


def test_a_failure_does_not_stop_the_command(tmp_path: Path, capsys: Any) -> None:
    calls = tmp_path / "calls"
    measurements = {
        "a": partial(number, calls, 1), "b": partial(os._exit, 3), "c": fail,
        "d": partial(number, calls, 2), "e": partial(number, calls, 3),
    }  # fmt: skip
    measure_rows("test", command_of(measurements), options_of(tmp_path), "title")
    found = rows_of(tmp_path)
    assert found["b"]["error"] == "the process ended with status 3"
    assert "error" in found["c"]
    assert found["a"]["process"] != found["d"]["process"] == found["e"]["process"]
    assert capsys.readouterr().out.splitlines()[-1] == "test: done"


def test_a_command_ends_at_its_limit(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    measurements = {"a": partial(number, calls, 1), "b": partial(time.sleep, 60)}
    started = time.monotonic()
    measure_rows("test", command_of(measurements), options_of(tmp_path, 0.5 / 60), "title")
    assert time.monotonic() - started < 10
    assert list(rows_of(tmp_path)) == ["a"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "test: 1 row is left; the same command continues"
    monkeypatch.setattr(worker, "LONGEST_SECONDS", 0.1)
    measure_rows("test", command_of(measurements), options_of(tmp_path), "title")
    assert rows_of(tmp_path)["b"]["error"] == "took more than 0.1 s"


# ---- the worker ----


def test_a_worker_that_was_killed_is_replaced(tmp_path: Path) -> None:
    made, one = Worker(), partial(number, tmp_path / "calls", 1)
    first = made.measure(one, 60)
    assert first is not None
    os.kill(first["process"], signal.SIGKILL)
    made._process.join()
    assert (made.measure(one, 60) or {})["value"] == 1
    made.end()


def test_a_worker_that_breaks_the_pipe_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_serve", Connection.close)  # as if it could not import torch
    made = Worker()
    made._start()
    made._process.join()
    monkeypatch.setattr(made._process, "is_alive", lambda: True)  # it ends just after the question
    assert made.measure(fail, 60) == {"error": "the process ended with status 0"}


def test_a_worker_ends_if_its_parent_has_ended(tmp_path: Path) -> None:
    connection, other = get_context("fork").Pipe()
    connection.send(partial(number, tmp_path / "calls", 1))
    connection.close()
    worker._serve(other)
    assert (tmp_path / "calls").read_text() == "1\n"


def interrupt() -> Values:
    os.kill(os.getpid(), signal.SIGINT)
    return {"interrupted": False}


def test_a_worker_ignores_ctrl_c() -> None:
    made, before = Worker(), signal.getsignal(signal.SIGINT)
    assert made.measure(interrupt, 60) == {"interrupted": False}
    assert signal.getsignal(signal.SIGINT) == before
    made.end()


# ---- the command line ----


def test_a_missing_gpu_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "agree"])
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: device=cuda: ")


@pytest.mark.parametrize(
    ("stop", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM: the finished rows are written; "),
    ],
)
def test_a_signal_ends_the_command(
    stop: BaseException, status: int, line: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def measure(*arguments: Any) -> None:
        raise stop

    monkeypatch.setattr(gpu, "measure_rows", measure)
    command = ["gpu", "agree", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == status
    assert capsys.readouterr().err.startswith(line)


ADVICE = "use the earlier values, or another folder: --out FOLDER"


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ("agree --batch 8", "--batch 64 (now 8)"),
        ("agree --agree-pair vgg13-vgg8", "--agree-pair resnet56-resnet20 (now vgg13-vgg8)"),
        ("agree --images 8 --methods kd", "--images 50000 (now 8)"),
        ("agree --methods kd --teachers vgg8 --precisions fp32 --steps 9 --set seed=1", ""),
        ("throughput --steps 9 --rounds 2", "--rounds 5 (now 2), --steps 40 (now 9)"),
        ("throughput --workers 3", "--workers 2 (now 3)"),
        ("throughput --pairs vgg13-vgg8 --grid-pairs --works kd --modes eager --jobs 2", ""),
        ("train --set precision=bf16 seed=1", "--set nothing (now precision=bf16 seed=1)"),
        ("train --set dataset.root=data wandb.mode=offline device=cpu --batch 8", ""),
    ],
)
def test_rows_of_other_settings_are_refused(
    words: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    name, *more = words.split()
    common = ["gpu", name, "--device", "cpu", "--out", str(tmp_path), "--workers", "2"]
    settings = gpu.COMMANDS[name].settings
    command = replace(command_of({"a": fail}), settings=settings, measure=lambda *given: {})
    monkeypatch.setitem(gpu.COMMANDS, name, command)
    for given, status in ((common, 0), ([*common, *more], 1 if other else 0)):
        monkeypatch.setattr(sys, "argv", given)
        assert main() == status
    file = tmp_path / f"{name}.jsonl"
    error = f"error: {file}: its rows were measured with {other}; {ADVICE}\n" if other else ""
    assert capsys.readouterr().err == error


def test_rows_of_another_device_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    options, found = options_of(tmp_path), {"a": {"error": "an error"}}
    options.device = "cuda"
    for number, name in enumerate(("NVIDIA A100", "NVIDIA H100")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        file = RowFile(tmp_path / "test.jsonl", settings_of(options, "minutes"))
        if number == 0:
            file.write(found)
            assert file.read(retry=False) == found
    with pytest.raises(UserError, match=r"with device NVIDIA A100 \(now NVIDIA H100\); use the"):
        file.read(retry=False)
    assert file.read(retry=True) == {}


# ---- throughput ----


def test_the_commands_write_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["agree", "throughput", "--device", "cpu", "--out", str(tmp_path), "--batch", "2"]
    pair = ["--agree-pair", "resnet8-resnet8", "--pairs", "resnet8-resnet8", "--grid-pairs"]
    chosen = ["--methods", "kd", "--teachers", "resnet8", "--works", "kd", "--modes", "graph"]
    small = ["--precisions", "bf16", "--jobs", "2", "--images", "8", "--workers", "1"]
    few = ["--rounds", "1", "--steps", "1"]
    monkeypatch.setattr(graph_steps, "STEPS", 6)
    for minutes in ("0", "2"):
        command = ["gpu", *words, *pair, *chosen, *small, *few, "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", command)
        assert main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "agree: 3 rows are left; the same command continues"
    assert said[1] == "throughput: 5 rows are left; the same command continues"
    assert said[-1] == "throughput: done"
    lines = (tmp_path / "throughput.jsonl").read_text().splitlines()
    found = {row["key"]: row for row in map(json.loads, lines)}
    networks = "resnet8-resnet8 kd"
    assert list(found) == [
        *("evaluation resnet8-resnet8", "checkpoint resnet8-resnet8", f"{networks} graph bf16 1"),
        *(f"{networks} conventional fp32 1", f"{networks} graph bf16 2"),
    ]
    assert all(row["seconds"] > 0 for row in found.values())
    assert found[f"{networks} graph bf16 1"]["settings"] == {
        "batch": 2, "images": 8, "rounds": 1, "steps": 1, "workers": 1, "device": "cpu",
    }  # fmt: skip
    assert "| resnet8-resnet8 | kd | graph | bf16 | 2 |" in (tmp_path / "throughput.md").read_text()
    (row,) = (line for line in (tmp_path / "agree.md").read_text().splitlines() if "| kd |" in line)
    assert row.endswith("| agree |")


def targets_of(milliseconds: dict[str, float]) -> dict[str, list[str]]:
    """Return the other cells of each target."""
    found = {key: {"seconds": value / 1000} for key, value in milliseconds.items()}
    options = Namespace(
        batch=64, jobs=[1, 8], grid_pairs=["a-b"], device="cpu", images=50_000, compile="off",
        graph="auto", precompute=False,
    )  # fmt: skip
    measured = targets.Measurements(found, options)
    return {
        target.text: targets.target_row(target, target.measure(measured))
        .strip("| ")
        .split(" | ")[1:]
        for target in targets.TARGETS
    }


def test_the_targets_follow_from_the_steps() -> None:
    pair, other = "wrn_40_2-wrn_16_2", "resnet56-resnet20"
    milliseconds = {
        f"evaluation {pair}": 50, f"checkpoint {pair}": 30,
        f"{pair} kd graph bf16 1": 1.5, f"{pair} kd conventional fp32 1": 15,
        f"{pair} sskd graph bf16 1": 4, f"{pair} sskd conventional fp32 1": 20,
        f"{pair} ss_head graph bf16 1": 2, f"{pair} kd graph bf16 8": 0.3,
        f"{pair} sskd graph bf16 8": 2, f"{other} kd graph bf16 8": 0.5,
        f"{other} crd graph bf16 8": 1.1, "a-b kd graph bf16 8": 0.4, "a-b sskd graph bf16 8": 3,
    }  # fmt: skip
    found = list(targets_of(milliseconds).values())
    # 240 epochs of SSKD and 60 of its first phase, in batches of 64 of 50,000 images.
    minutes = (782 * (240 * 0.004 + 60 * 0.002) + 240 * 0.08) / 60
    # 10 methods as KD, one of them with what CRD adds, and SSKD; 11 evaluated runs.
    hours = (50_000 / 64 * 240 * (10 * 0.0004 + 0.0006 + 0.003) + 11 * 240 * 0.08) / 3600
    assert found == [
        ["1.50", "yes"], ["4.00", "no"], ["10.00", "yes"], ["5.00", "no"], ["5.00", "yes"],
        ["2.00", "no"], [f"{minutes:.2f}", "no"], [f"{hours:.2f}", "yes"],
    ]  # fmt: skip
    for key in milliseconds:
        fewer = targets_of({name: value for name, value in milliseconds.items() if name != key})
        assert any("not measured" in cells[-1] for cells in fewer.values())


# ---- train ----


class Stopped(starting.Started):
    """A command for which the time is up as soon as it has saved its state."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None or "seed=1" in self.args or timeout == runs.SAVE_SECONDS:
            return super().wait(timeout)
        folder = next(word.removeprefix("runs=") for word in self.args if word.startswith("runs="))
        while len(list(Path(folder).rglob("last.pt"))) < 2:
            assert self.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_runs_are_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [word for word in SMALL if not word.startswith(("arch", "teacher", "schedule"))]
    first, stopped = "seed=1 schedule.epochs=1", "schedule.epochs=12"
    lines = [f"teacher arch=resnet8 {words}" for words in (first, stopped)] + ["teacher arch=no"]
    (tmp_path / "list").write_text("\n\n".join(lines))
    options = options_of(tmp_path)
    options.runs, options.set, options.device = tmp_path / "list", small, "cpu"
    command = gpu.COMMANDS["train"]
    for kind in (Stopped, starting.Started):
        start = partial(start_as, kind)
        monkeypatch.setattr(runs, "start", start)
        measure_rows("train", command, options, "title")
        found = RowFile(tmp_path / "train.jsonl", runs.settings(options)).read(retry=False)
        assert [found.get(line, {}).get("state") for line in lines] == [
            "finished", None if kind is Stopped else "finished", None,
        ]  # fmt: skip
    assert "arch=no: no such arch" in found[lines[2]]["error"]
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 2
    log = (tmp_path / "train.log").read_text()
    assert "stopped by SIGTERM: the state is saved" in log
    assert "resumes in" in log
    assert f"| {lines[1]} | finished |" in (tmp_path / "train.md").read_text()


def start_as(kind: type[starting.Started], words: list[str], output: Any) -> starting.Started:
    """Fork a command from a process that has imported torch."""
    return kind(*words, stdout=output.fileno(), stderr=starting.STDOUT)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('error: ü\\n'); exit(1)", "error: ü"),
        ("exit(3)", "ended with status 3"),
        ("import os; print('epoch 1', flush=True); os.abort()", "killed by SIGABRT"),
    ],
)
def test_the_error_of_a_run_is_its_own(code: str, error: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of an earlier run, ü\n", encoding="utf-8")
    assert runs.train(["-c", code], log, 60) == {"error": error}


def test_a_list_with_an_unknown_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("pupil arch=vgg8\n")
    options = Namespace(runs=tmp_path / "list", out=tmp_path, set=[], device="cpu")
    with pytest.raises(UserError, match="'pupil arch=vgg8' should begin with teacher or student"):
        list(runs.measurements(options))


def test_the_default_list_begins_with_the_teachers() -> None:
    lines = runs.default_lines()
    assert lines[:4] == [
        "teacher arch=wrn_40_2", "teacher arch=resnet56",
        "student pair=wrn_40_2-wrn_16_2 method=kd", "student pair=resnet56-resnet20 method=kd",
    ]  # fmt: skip
    assert len(set(lines)) == len(lines) == 2 * (1 + len(METHODS))
