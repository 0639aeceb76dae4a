"""Untrusted files in a folder of runs: limits, and one line about what exceeds them."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from report_runs import epoch_line, put_metrics, put_run
from torch import nn

import sskd.files
import sskd.report.metrics
import sskd.runs.names
import sskd.runs.status
from sskd.errors import CorruptFileError, UserError
from sskd.files import read_bounded, read_lines
from sskd.models import read_checkpoint
from sskd.report.metrics import read_metrics
from sskd.report.results import read_results
from sskd.report.status import read_jobs
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.folder import archive_run, read_config_file, read_result
from sskd.runs.result import RunResult
from sskd.runs.run import Run
from sskd.runs.status import Status, read_status, write_failure
from sskd.tracking.session import run_id

SECONDS = 5.0  # enough for a slow machine


def sparse(path: Path, size: int = 60 << 30) -> Path:
    """Create a file of ``size`` bytes that uses no space on the disk."""
    path.touch()
    os.truncate(path, size)
    return path


def only(warnings: list[str]) -> str:
    """Return the only warning, which is one line."""
    (line,) = warnings
    assert "\n" not in line
    return line


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Assert that the body takes less than ``SECONDS`` of CPU time.

    Without limits, most readers here would take minutes or exhaust the memory. Imports, commands
    and training do not belong into the body.
    """
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


YAML = {
    "flat": "\n".join(f"k{number}: 1" for number in range(20_000)),
    "list": f"a: [{'1,' * 100_000}1]",
    "words": f"a: [{'{},' * 70_000}1]",
    "text": f"a: {'x' * 200_000}",
    "comment": "#" * 200_000,
}


@pytest.mark.parametrize("kind", YAML)
def test_a_large_configuration_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAML[kind])
    message = r"config\.yaml: cannot be read \(it has more than 65536"
    with in_time(), pytest.raises(UserError, match=message):
        read_config_file(path)


@pytest.mark.parametrize("kind", YAML)
def test_the_largest_configuration_is_read_quickly(tmp_path: Path, kind: str) -> None:
    """A file of the largest size that is read, with any content."""
    path = tmp_path / "config.yaml"
    path.write_text(YAML[kind][: sskd.runs.names.MOST_CONFIG])
    with in_time(), contextlib.suppress(UserError):  # some are not YAML after the cut
        read_config_file(path)


def test_endless_files_are_named(tmp_path: Path) -> None:
    run = put_run(tmp_path, "a")
    for name in ("result.json", "metrics.jsonl", "config.yaml", "wandb_id"):
        sparse(run / name)
    with in_time():
        with pytest.raises(UserError, match=r"result\.json: is not a result"):
            read_result(run, RunResult)
        with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
            read_config_file(run / "config.yaml")
        with pytest.raises(UserError, match=r"metrics\.jsonl is corrupt: it has more than"):
            Run(run, {}).metrics.read()
        assert len(run_id(run, "name")) == 16
        for read in (read_results, read_jobs):
            warnings: list[str] = []
            read(tmp_path, warnings.append)
            assert all("more than" in line for line in warnings)
        warnings = []
        assert read_metrics(run, warnings.append) == []
    assert "it has more than" in only(warnings)


@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_a_report_names_an_endless_file(tmp_path: Path, name: str) -> None:
    sparse(tmp_path / name)
    warnings: list[str] = []
    with in_time():
        if name == "status.json":
            assert read_jobs(tmp_path, warnings.append) == []
            assert read_status(tmp_path) == Status()
        else:
            assert read_results(tmp_path, warnings.append) == []
    assert f"{tmp_path / name}: it has more than" in only(warnings)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "previous.pt"])
@pytest.mark.parametrize("end", [b"", b"PK\5\6" + bytes(18)])
def test_an_endless_checkpoint_is_corrupt(tmp_path: Path, name: str, end: bytes) -> None:
    with sparse(tmp_path / name).open("ab") as stream:
        stream.write(end)
    with in_time(), pytest.raises(CorruptFileError, match=r"bytes, the limit|cannot be read"):
        load_checkpoint(tmp_path / name)
    run = Run(tmp_path, {})
    if name == "best.pt":
        assert run.checkpoints.load_best(1) is None
    else:
        with pytest.raises(UserError, match=rf"{name} is corrupt"):
            run.checkpoints.load(["train"])


def test_a_file_of_line_ends_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n" * 100_001)
    with in_time(), pytest.raises(ValueError, match="more than 100000 lines"):
        list(read_lines(path, 10**6, 100_000))
    monkeypatch.setattr(sskd.report.metrics, "MOST_EPOCHS", 1000)
    warnings: list[str] = []
    assert read_metrics(tmp_path, warnings.append) == []
    assert "more than 1000 lines" in only(warnings)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.mkdir(), (OSError, ValueError)),
        (os.mkfifo, ValueError),
        (lambda path: path.symlink_to("/etc/passwd"), OSError),
        (lambda path: path.symlink_to("/dev/zero"), OSError),
        (lambda path: None, FileNotFoundError),
        (lambda path: path.write_bytes(bytes(11)), ValueError),
    ],
)
def test_only_a_regular_file_is_read(
    tmp_path: Path, make: Callable[[Path], Any], error: Any
) -> None:
    make(tmp_path / "file")
    with in_time(), pytest.raises(error):
        read_bounded(tmp_path / "file", 10)


@pytest.mark.parametrize("follow", [False, True])
def test_a_file_that_grows_is_read_up_to_its_old_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    path, status_of = tmp_path / "file", os.fstat
    path.write_bytes(b"0123456789")

    def grow(descriptor: int) -> os.stat_result:
        status = status_of(descriptor)
        with path.open("ab") as stream:
            stream.write(b"more" * 1000)
        return status

    monkeypatch.setattr(sskd.files.os, "fstat", grow)
    assert read_bounded(path, 10, follow=follow) == b"0123456789"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="more than 10 bytes, the limit for such a file"):
        read_bounded(path, 10, follow=follow)


def test_a_link_is_followed_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"01")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 10, follow=True) == b"01"
    with pytest.raises(OSError, match="symbolic links"):
        read_bounded(tmp_path / "link", 10)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_bounded(tmp_path / "zero", 10, follow=True)


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bounded(tmp_path / "file", 10) == b"0123456789"


def test_the_suite_writes_no_status_above_the_limit(tmp_path: Path) -> None:
    """An error can list all tensors of a network, and its traceback is kept too."""
    try:
        raise ValueError("x" * 10**6) from RuntimeError("\u4e2d" * 10**6)
    except ValueError as error:
        write_failure(tmp_path, error)
    assert (tmp_path / "status.json").stat().st_size < sskd.runs.status.MOST
    assert read_status(tmp_path).state == "failed"


def test_the_weights_of_another_size_are_corrupt(tmp_path: Path) -> None:
    import sskd.teachers.phases

    sparse(tmp_path / "model.safetensors")
    with in_time(), pytest.raises(UserError, match=r"model\.safetensors: is corrupt"):
        sskd.teachers.phases._load_weights(nn.Linear(2, 2), tmp_path / "model.safetensors", None)


@pytest.mark.parametrize(
    "odd", ["\u00b2", "\u2460", "1\u00b3", "\u0be7", "-1", "1.5", "0x1", "1e3", "", " 1", "one"]
)
def test_odd_digits_in_archived_names_do_not_break_force(tmp_path: Path, odd: str) -> None:
    """Archived runs may have superscript, circled or non-Latin digits in their names."""
    folder = tmp_path / "seed0"
    folder.mkdir()
    save_checkpoint(folder / "last.pt", {"stage": "train"})
    (tmp_path / ".old" / f"seed0-{odd}").mkdir(parents=True)
    archive_run(folder)
    moved = list((tmp_path / ".old").rglob("last.pt"))
    assert len(moved) == 1
    assert moved[0].parent.name.removeprefix("seed0-").isdecimal()


OPTIONS = [
    ("--multirun", "--run"),
    ("-m", "--cfg", "job"),
    ("--cfg", "job", "--info", "all"),
    ("--resolve",),
    ("--run", "--shell-completion", "install=bash"),
    ("--shell-completion", "odd=bash"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_exclude_each_other_are_an_error(
    command: Command, options: tuple[str, ...]
) -> None:
    status, out, err = command(*options)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    assert not command.runs.exists()


VALUES = [
    "interval(1,4)",
    "interval(0.5,2.5)",
    "int(interval(1,4))",
    "tag(fast,interval(0,1))",
    "range(1,4,0)",
    "range(0,nan)",
    "choice(1,choice(2,3))",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["seed", "optimizer.lr"])
def test_a_grid_refuses_values_that_cannot_be_counted(
    command: Command, key: str, value: str
) -> None:
    status, out, err = command("-m", "dataset=digits", "method=vanilla", f"{key}={value}")
    assert (status, out) == (1, "")
    assert err == (
        f"error: {key}={value}: a grid needs a finite list of values, such as {key}=1,2,3 or "
        f"'{key}=range(1,4)'\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=range(3,0)"], "seed=range(3,0): has no values"),
        (["method=glob(no*)"], "method=glob(no*): has no values"),
        (["seed=range(0,inf)"], "more than 100000 jobs"),
        (["seed=shuffle(range(0,1000000000))"], "more than 100000 jobs"),
        (["seed=range(1000)", "batch_size=range(1,1000)"], "(1000 of seed x 999 of batch_size)"),
    ],
)
def test_an_empty_or_endless_grid_is_refused(
    command: Command, words: list[str], message: str
) -> None:
    status, out, err = command("-m", "dataset=digits", *words)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


def make_deep(top: Path, levels: int) -> Path:
    """Create ``levels`` nested folders, too many for a recursive reader; return the deepest."""
    path = top.joinpath(*["d"] * levels)
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("levels", [60, 500, 900, 100_000])
def test_a_deeply_nested_result_is_one_line(tmp_path: Path, levels: int) -> None:
    """Python's JSON parser accepts more levels than a recursive function may have."""
    run = put_run(tmp_path, "a")
    (run / "result.json").write_text('{"run": ' + '{"a":' * levels + "1" + "}" * levels + "}")
    with pytest.raises(UserError, match=r"result\.json: is not a result \(nested too deeply\)"):
        Run(run, {"seed": 1}).finished(RunResult)
    warnings: list[str] = []
    assert read_results(tmp_path, warnings.append) == []
    assert "nested too deeply" in only(warnings)


def test_a_run_too_deep_for_the_report_is_one_warning(tmp_path: Path) -> None:
    deepest = make_deep(tmp_path, 64)
    put_run(deepest.parent, "at the limit")
    for name in ("a", "b", "c"):
        put_run(deepest, name)
        make_deep(deepest / name, 100)
    for read in (read_results, read_jobs):
        warnings: list[str] = []
        assert len(read(tmp_path, warnings.append)) == 1
        line = only(warnings)
        assert " and 2 more: more than 64 folders below " in line
        assert len(line) < 400


def test_a_tree_too_deep_for_the_stack_breaks_no_report(tmp_path: Path) -> None:
    """Without a limit, ``os.walk`` needs a stack frame for each level."""
    make_deep(tmp_path, 400)
    put_run(tmp_path, "run")
    warnings: list[str] = []
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)
    try:
        assert len(read_results(tmp_path, warnings.append)) == 1
    finally:
        sys.setrecursionlimit(limit)
    assert "left out" in only(warnings)


def test_an_epoch_of_thousands_of_losses_is_left_out(tmp_path: Path) -> None:
    """A curve and a legend entry for each loss would take the report minutes."""
    few, many = ({f"loss/t{number}": 1.0 for number in range(most)} for most in (50, 4000))
    others = [{f"loss/{line}/{number}": 1.0 for number in range(100)} for line in range(30)]
    epochs = [few, many, few, *others]
    put_metrics(tmp_path, [epoch_line("distill", k, **more) for k, more in enumerate(epochs, 1)])
    warnings: list[str] = []
    lines = read_metrics(tmp_path, warnings.append)
    assert [line.epoch for line in lines] == [1, 3, 4]
    assert "30 of 33 lines are malformed; left out" in only(warnings)


def test_a_large_file_that_is_no_checkpoint_is_not_read(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.pth", 3 << 29)
    tracemalloc.start()
    try:
        with in_time(), pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
