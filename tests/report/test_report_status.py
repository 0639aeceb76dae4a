"""The state of jobs, missing jobs, ``--status`` and ``--watch``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from report_runs import epoch_line, never, put_metrics, put_run, put_status

from sskd.report import __main__ as command
from sskd.report.render import render_status
from sskd.report.report import Report, read_report
from sskd.report.status import JobStatus, read_jobs
from sskd.runs.lock import FolderLock

DISTILL = "cifar100/distill/resnet56-resnet20"
Hold = Callable[[Path], None]
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Return a function that locks a folder as a running process does."""
    locks: list[FolderLock] = []

    def hold(folder: Path) -> None:
        locks.append(FolderLock(folder))
        locks[-1].acquire()

    yield hold
    for lock in locks:
        lock.release()


def only_job(root: Path) -> JobStatus:
    (job,) = read_jobs(root, never)
    return job


def test_jobs_are_sorted_by_state(tmp_path: Path, hold: Hold) -> None:
    for state in ("finished", "failed", "stopped", "queued"):
        put_status(tmp_path / state, state, error="a line")
    (tmp_path / "finished" / "result.json").write_text("{}")
    hold(put_status(tmp_path / "running", "running"))
    put_status(tmp_path / "dead", "running")
    jobs = read_jobs(tmp_path, never)
    assert [(job.name, job.state) for job in jobs] == [
        *((state, state) for state in ("running", "queued", "stopped")),
        ("dead", "interrupted"),
        ("failed", "failed"),
        ("finished", "finished"),
    ]
    # The error of an earlier failure is not shown after the job is queued again.
    assert [job.name for job in jobs if job.error] == ["failed"]


def test_folders_without_a_status(tmp_path: Path) -> None:
    put_run(tmp_path, "old")
    put_status(tmp_path / "fell over after its result", "failed")
    (tmp_path / "fell over after its result" / "result.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "last.pt").touch()
    (tmp_path / "nothing").mkdir()
    put_status(tmp_path / ".old" / "seed0-1", "failed")
    put_status(tmp_path.parent / "elsewhere", "failed")
    (tmp_path / "link").symlink_to(tmp_path.parent / "elsewhere")
    assert {job.name: job.state for job in read_jobs(tmp_path, never)} == {
        "old": "finished",
        "fell over after its result": "finished",
        "checkpoint": "stopped",
    }


def test_progress_counts_all_phases_and_the_time_left(tmp_path: Path, hold: Hold) -> None:
    epochs = {"ss_head": 2, "distill": 10}
    hold(put_status(tmp_path / "run", "running", epochs=epochs))
    lines = [epoch_line("ss_head", 1), epoch_line("ss_head", 2), epoch_line("distill", 3)]
    # Epochs end a minute apart; before the last one the run was interrupted for a night.
    lines += [epoch_line("distill", epoch) for epoch in (4, 5)]
    lines += [epoch_line("distill", 6, date="2026-11-25T11:00:00+00:00")]
    put_metrics(tmp_path / "run", lines)
    job = only_job(tmp_path)
    assert (job.done, job.total, job.rate) == (6, 12, 1234.0)
    assert job.seconds_left == pytest.approx(6 * 60)
    text = render_status([job], 100, NOW)
    assert "6/12 epochs, 50% · 1,234 images/s · 6 min left" in text


@pytest.mark.parametrize("since", ["soon", 3, None, "0001-01-01T00:00:00", "9999-12-31T23:59:59"])
def test_a_status_may_have_wrong_fields(tmp_path: Path, hold: Hold, since: object) -> None:
    epochs = {"a": -1, "b": [], "c": 10**4000}
    folder = put_status(tmp_path / "run", "running", since=since, host=3, epochs=epochs)
    hold(folder)
    (folder / "metrics.jsonl").write_text("{\n\xff\n[]\n" + '{"stage": "a", "epoch": 1e999}\n')
    warnings: list[str] = []
    (job,) = read_jobs(tmp_path, warnings.append)
    assert job == JobStatus(Path("run"), "running")
    assert len(warnings) == 1
    assert "4 of 4 lines" in warnings[0]


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"state": "odd"}', '{"state": []}', "\xff"])
def test_a_malformed_status_is_reported_and_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_bytes(text.encode("latin-1"))
    warnings: list[str] = []
    assert read_jobs(tmp_path, warnings.append) == []
    assert len(warnings) == 1
    (tmp_path / "run" / "last.pt").touch()
    assert [job.state for job in read_jobs(tmp_path, warnings.append)] == ["stopped"]


def test_pipes_and_links_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "status.json")
    secret = put_status(tmp_path / ".hidden", "failed", error="secret")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "status.json").symlink_to(secret / "status.json")
    (tmp_path / "link" / "last.pt").touch()
    (tmp_path / "link" / "metrics.jsonl").symlink_to(secret / "status.json")
    assert read_jobs(tmp_path, never) == [JobStatus(Path("link"), "stopped")]


def test_status_fits_the_width_and_shows_errors(tmp_path: Path) -> None:
    since = NOW - timedelta(hours=2)
    long = JobStatus(
        Path("d" * 60), "failed", since=since, host="node1", error="an error of words " * 9
    )
    day = JobStatus(Path("short"), "stopped", since=since - timedelta(days=1), host="node2")
    text = render_status([long, day, JobStatus(Path("x"), "finished")], 80, NOW)
    assert text.startswith("1 stopped · 1 failed · 1 finished\n")
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("an error of words") == text.count("an error")
    assert "since 10:00 · on node1" in text
    assert "short  since 2026-11-24 10:00 · on node2" in text
    # Finished jobs are counted, not listed.
    assert "\n  x" not in text


def test_control_characters_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_status(tmp_path / "a\x1b[31m", "failed", error="\x1b]0;title\x07\n\nline", host="\x9b1m")
    assert command.main([str(tmp_path), "--status"]) == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_status_needs_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(tmp_path / "run", "queued")
    assert command.main([str(tmp_path)]) == 1
    assert command.main([str(tmp_path), "--status"]) == 0
    assert capsys.readouterr().out == "1 queued\n\nqueued\n  run\n"
    assert command.main([str(tmp_path / "none"), "--status"]) == 1


def test_tables_end_with_the_number_of_unfinished_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_run(tmp_path, "run")
    assert command.main([str(tmp_path)]) == 0
    assert "--status" not in capsys.readouterr().out
    put_status(tmp_path / "other", "failed", error="reason")
    assert command.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 failed · 1 finished (--status lists them)" in out
    assert "reason" not in out


def test_missing_cells_are_published_cells_without_runs(tmp_path: Path) -> None:
    put_run(tmp_path, f"{DISTILL}/kd/seed0")
    put_status(tmp_path / DISTILL / "sskd" / "seed0", "failed")
    put_status(tmp_path / "cifar100/scratch/resnet20/seed0", "queued")
    put_status(tmp_path / "cifar100/distill/vgg13-vgg8/at/seed3-01234567", "stopped")
    missing = read_report(tmp_path, never).missing()
    # The accuracy of the teacher is known from a run of its student.
    here = [cell.row for cell in missing if cell.teacher == "resnet56"]
    assert here == ["FitNet", "AT", "SP", "VID", "RKD", "PKT", "AB", "FT", "CRD"]
    # Pairs and sources without a student have no missing cells.
    assert {(c.table, c.teacher, c.student) for c in missing} == {
        ("similar", "resnet56", "resnet20")
    }
    # A folder inside contains the same runs.
    assert read_report(tmp_path / "cifar100", never).missing() == missing


def test_unpublished_datasets_have_no_missing_cells(tmp_path: Path) -> None:
    put_run(tmp_path, "run", dataset="digits")
    assert read_report(tmp_path, never).missing() == []


def ticks(monkeypatch: pytest.MonkeyPatch, *between: object) -> list[float]:
    """Replace sleep by calls of ``between``, one each time, and then by Ctrl-C."""
    slept: list[float] = []
    steps = iter(between)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        assert callable(step)
        step()

    monkeypatch.setattr(command.time, "sleep", sleep)
    return slept


def test_watch_shows_changes_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_status(tmp_path / "other", "queued")
    slept = ticks(monkeypatch, lambda: put_run(tmp_path, "run"))
    out = tmp_path / "made" / "grid"
    assert command.main([str(tmp_path), "--watch", "7", "--out", str(out)]) == 130
    assert slept == [7.0, 7.0]
    shown = capsys.readouterr()
    assert shown.err == "\nstopped\n"
    first, second, _ = shown.out.split("Ctrl-C ends\n")
    assert "1 queued\n" in first
    assert "similar" not in first
    assert "wrote" not in first
    assert "1 queued · 1 finished\n" in second
    assert "similar · last epoch" in second
    assert "wrote" in second
    assert out.with_suffix(".html").exists()
    # Without a terminal there are no control characters.
    assert "\x1b" not in shown.out


def test_watch_clears_the_terminal_and_writes_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_run(tmp_path, "run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True)
    written: list[str] = []

    def write(report: Report, out: str, *others: object) -> list[Path]:
        written.append(out)
        return [Path("x.md")]

    monkeypatch.setattr(command, "write_files", write)
    ticks(monkeypatch, lambda: None)
    assert command.main([str(tmp_path), "--status", "--watch", "--out", "x"]) == 130
    shown = capsys.readouterr()
    assert shown.out.count("\x1b[H\x1b[2J") == 2
    assert written == ["x"]
    # Each warning is printed once, and --status shows no tables.
    assert shown.err.count("warning") == 1
    assert "similar" not in shown.out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9", "soon"])
def test_watch_refuses_invalid_times(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["--watch", seconds])
    assert exit_.value.code == 2
    assert "--watch" in capsys.readouterr().err


def test_watch_reports_that_it_needs_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--watch", "x"])
    assert "--watch: should be a number of seconds (got 'x')" in capsys.readouterr().err
