"""The command ``python -m sskd.report``: its input, errors, output and files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sskd.report.__main__ import main
from sskd.report.disambiguation import distinct_results
from sskd.report.results import read_results

RESULT = """{
  "kind": "distill", "dataset": "cifar100", "teacher": "resnet56", "student": "resnet20",
  "method": "kd", "seed": 0, "difference": {},
  "top1": {"last": 70.16, "best": 71.0, "best_epoch": 200}, "holdout_top1": null,
  "teacher_top1": 73.44, "agreement": 80.1, "kl": 0.5,
  "seconds": 123.4, "images_per_second": 900.0, "parameters": 278324, "commit": "unknown",
  "recipe": 2
}"""


def put(root: Path, folder: str, text: str = RESULT, **changes: Any) -> Path:
    path = root / folder / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(json.loads(text) | changes) if changes else text)
    return path


def read(root: Path) -> tuple[list[int], list[str]]:
    """Return the seeds that were read, and the warnings."""
    warnings: list[str] = []
    results = distinct_results(read_results(root, warnings.append), warnings.append)
    return [result.seed for result in results], warnings


def without(key: str) -> str:
    return json.dumps({name: value for name, value in json.loads(RESULT).items() if name != key})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (without("seed"), "'seed'"),
        (without("agreement"), "'agreement'"),
        (RESULT.replace("70.16", "NaN"), "'last'"),
        (RESULT.replace("70.16", "101"), "'last'"),
        (RESULT.replace("70.16", '"70.16"'), "'last'"),
        (RESULT.replace("70.16", "true"), "'last'"),
        (RESULT.replace("123.4", "1e999"), "'seconds'"),
        (RESULT.replace("123.4", "1" + "0" * 400), "'seconds'"),
        (RESULT.replace('"kl": 0.5', '"kl": NaN'), "'kl'"),
        (RESULT.replace('"seed": 0', '"seed": 0.5'), "'seed'"),
        (RESULT.replace('"distill"', '"other"'), "'kind'"),
        (RESULT.replace('"distill"', '"scratch"'), "'teacher'"),
        (RESULT.replace('"resnet56"', "null"), "'teacher'"),
        (RESULT.replace('"kd"', '"k\\u001b[31md"'), "'method'"),
        (RESULT.replace('"difference": {}', '"difference": []'), "'difference'"),
    ],
)
def test_a_broken_file_is_named_and_skipped(tmp_path: Path, text: str, reason: str) -> None:
    broken = put(tmp_path, "broken", text)
    put(tmp_path, "good", seed=5)
    seeds, warnings = read(tmp_path)
    assert seeds == [5]
    assert len(warnings) == 1
    assert str(broken) in warnings[0]
    assert reason in warnings[0]


def test_binary_files_are_skipped(tmp_path: Path) -> None:
    put(tmp_path, "binary").write_bytes(b"\xff\xfe\x00{")
    seeds, warnings = read(tmp_path)
    assert (seeds, len(warnings)) == ([], 1)


def test_hidden_folders_and_links_are_skipped(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    put(runs, "a/b/c", seed=1)
    put(runs, ".hidden/run", seed=2)
    put(runs, "a/.trash", seed=3)
    outside = put(tmp_path, "elsewhere/run", seed=4)
    (runs / "linked").symlink_to(outside.parent.parent)
    (runs / "file").mkdir()
    (runs / "file" / "result.json").symlink_to(outside)
    (runs / "folder" / "result.json").mkdir(parents=True)
    os.mkfifo(runs / "result.json")
    assert read(runs) == ([1], [])


def test_a_hidden_root_is_read(tmp_path: Path) -> None:
    put(tmp_path / ".runs", "run", seed=1)
    assert read(tmp_path / ".runs") == ([1], [])


def test_a_copied_run_is_not_counted_twice(tmp_path: Path) -> None:
    put(tmp_path, "a")
    copy = put(tmp_path, "b")
    seeds, warnings = read(tmp_path)
    assert seeds == [0]
    assert str(copy) in warnings[0]


def test_the_command_prints_the_chosen_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "run")
    assert main([str(tmp_path)]) == 0
    last = capsys.readouterr().out
    assert main([str(tmp_path), "--best"]) == 0
    best = capsys.readouterr().out
    # The paper has 70.66 for KD and this pair.
    assert "last epoch" in last
    assert "70.66 -0.50" in last
    assert "best epoch on the test set" in best
    assert "70.66 +0.34" in best


@pytest.mark.parametrize("folder", ["empty", "missing", "broken"])
def test_without_runs_the_error_is_one_line(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "broken", "run\n1", "{")
    assert main([str(tmp_path / folder)]) == 1
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert lines[-1].startswith("error: ")
    assert str(tmp_path / folder) in lines[-1]
    assert "python train_teacher.py" in lines[-1]
    warnings = lines[:-1]
    assert len(warnings) == (folder == "broken")
    assert all(line.startswith("warning: ") for line in warnings)


def test_runs_default_to_the_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "runs", "run", method="sskd")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "SSKD" in capsys.readouterr().out


def test_out_writes_markdown_and_the_values_of_both_epochs(tmp_path: Path) -> None:
    put(tmp_path / "runs", "run0")
    put(tmp_path / "runs", "run1", seed=1, top1={"last": 72.16, "best": 73.0})
    for out in ("made/grid", "grid.md", "grid.csv", "grid.v1"):
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / out)]) == 0
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*grid*")}
    assert names == {
        f"{base}.{kind}"
        for base in ("made/grid", "grid", "grid.v1")
        for kind in ("md", "csv", "tex", "html")
    }
    assert "| KD<br>  published | 71.16 ± 1.41 (2)<br>70.66 +0.50 |" in (
        tmp_path / "grid.md"
    ).read_text(encoding="utf-8")
    lines = (tmp_path / "grid.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        "dataset,setting,table,teacher,student,row,metric,epoch,mean,std,n,published,difference"
    )
    pair = "cifar100,the recipe,similar,resnet56,resnet20"
    # 70.16 and 72.16, then 71 and 73: the deviation is sqrt(2) both times.
    assert lines[1:] == [
        f"{pair},teacher,top1,last,73.44,,1,73.44,0.0",
        f"{pair},KD,top1,last,71.16,1.4142,2,70.66,0.5",
        f"{pair},teacher,top1,best,73.44,,1,73.44,0.0",
        f"{pair},KD,top1,best,72.0,1.4142,2,70.66,1.34",
    ]


def test_names_in_csv_cannot_become_formulas(tmp_path: Path) -> None:
    names = {"dataset": "=1+1", "teacher": "+a", "student": "-b", "method": " @sum(a1)"}
    put(tmp_path, "run", **names, difference={"=key": "value"})
    assert main([str(tmp_path), "--out", str(tmp_path / "grid")]) == 0
    with (tmp_path / "grid.csv").open(encoding="utf-8", newline="") as file:
        line = list(csv.reader(file))[2]
    assert line[:7] == ["'=1+1", "'=key=value", "pairs", "'+a", "'-b", "' @SUM(A1)", "top1"]
    # A negative difference is a number and gets no apostrophe.
    put(tmp_path / "numbers", "run")
    assert main([str(tmp_path / "numbers"), "--out", str(tmp_path / "grid")]) == 0
    assert ",70.66,-0.5\n" in (tmp_path / "grid.csv").read_text(encoding="utf-8")


def test_out_must_be_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    put(tmp_path, "run")
    for out in ("", str(tmp_path / "run"), str(tmp_path / "file" / "grid")):
        assert main([str(tmp_path), "--out", out]) == 1
        assert capsys.readouterr().err.startswith("error: --out ")
    assert (tmp_path / "file").read_text() == "kept"


def test_unknown_options_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--bset"])
    assert exit_.value.code == 2
    assert "--bset" in capsys.readouterr().err


def test_it_starts_without_torch_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    put(tmp_path, "run")
    code = (
        "import sys, sskd.report.__main__ as command; assert 'torch' not in sys.modules;"
        "sys.stdin.read(); sys.exit(command.main(sys.argv[1:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # It prints after its input has ended, when the other end of its output is closed.
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
