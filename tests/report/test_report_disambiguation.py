"""Runs of one name that must not be averaged: other data, teachers or epochs, and copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Compose
from PIL import Image
from report_runs import never, put_alone, put_run

from sskd.data import SOURCES
from sskd.report.figures import draw_figures
from sskd.report.groups import Entry
from sskd.report.report import Report, read_report
from sskd.report.results import FIXED_SOURCES, read_origin
from sskd.runs.names import CONFIG
from sskd.train import train

A, B = "a" * 64, "b" * 64
PUBLISHED_KD = 70.66  # resnet56-resnet20, in SSKD's table


def entries(report: Report, row: str = "KD") -> dict[str, Entry]:
    """Return the entry of a row by the name of the dataset."""
    found = [entry for table in report.tables("last") for entry in table.entries]
    return {entry.dataset: entry for entry in found if entry.row == row}


def read(root: Path) -> tuple[Report, list[str]]:
    warnings: list[str] = []
    return read_report(root, warnings.append), warnings


def data(source: str | None, digest: str | None = None, name: str = "mine") -> dict[str, Any]:
    return {"dataset": name, "dataset_source": source, "dataset_digest": digest}


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        (
            data("folder", A),
            data("folder", B),
            ["mine (folder aaaaaaaa)", "mine (folder bbbbbbbb)"],
        ),
        (data("folder", A), data("npz", A), ["mine (folder aaaaaaaa)", "mine (npz aaaaaaaa)"]),
        (data("folder", A), data(None), ["mine (folder aaaaaaaa)", "mine (unknown data)"]),
        (data("folder", A), data("folder"), ["mine (folder aaaaaaaa)", "mine (folder)"]),
        (data("cifar10"), data("cifar100"), ["mine (cifar10)", "mine (cifar100)"]),
        (data("cifar10"), data(None), ["mine (cifar10)", "mine (unknown data)"]),
        (
            data("cifar100", name="cifar100"),
            data("folder", A, name="cifar100"),
            ["cifar100", "cifar100 (folder aaaaaaaa)"],
        ),
        (
            data(None, name="digits"),
            data("folder", A, name="digits"),
            ["digits (unknown data)", "digits (folder aaaaaaaa)"],
        ),
        (
            data("folder", A),
            data("folder", A[:-1] + "b"),
            [f"mine (folder {A})", f"mine (folder {A[:-1]}b)"],
        ),
    ],
)
def test_different_data_of_one_name_is_not_averaged(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], labels: list[str]
) -> None:
    put_run(tmp_path, "a", [0.0], seed=0, **one)
    put_run(tmp_path, "b", [100.0], seed=1, **other)
    report, warnings = read(tmp_path)
    found = entries(report)
    assert {name: (entry.mean, entry.n) for name, entry in found.items()} == {
        labels[0]: (0.0, 1),
        labels[1]: (100.0, 1),
    }
    # Both names are in the warning and in the titles of the tables.
    assert len(warnings) == 1
    assert all(f"'{label}' (1)" in warnings[0] for label in labels)
    titles = [table.title for table in report.tables("last")]
    assert all(any(title.startswith(f"{label} ·") for title in titles) for label in labels)


@pytest.mark.parametrize(
    "same",
    [
        [data("folder", A), data("folder", A)],
        [data("npz", B, name="mine"), data("npz", B, name="mine")],
        [data("cifar100", name="cifar100"), data(None, name="cifar100")],
        [data("cifar10"), data("cifar10")],
    ],
)
def test_the_same_data_is_averaged_without_a_warning(
    tmp_path: Path, same: list[dict[str, Any]]
) -> None:
    for seed, record in enumerate(same):
        put_run(tmp_path, f"run{seed}", [70.0 + seed], seed=seed, **record)
    (entry,) = entries(read_report(tmp_path, never)).values()
    assert (entry.dataset, entry.mean, entry.n) == (same[0]["dataset"], 70.5, 2)


@pytest.mark.parametrize(
    ("record", "label"),
    [
        (data("folder", A, name="cifar100"), "cifar100 (folder aaaaaaaa)"),
        (data("cifar10", name="cifar100"), "cifar100 (cifar10)"),
        (data("npz", B, name="cifar100"), "cifar100 (npz bbbbbbbb)"),
        (data("folder", None, name="cifar100"), "cifar100 (folder)"),
    ],
)
def test_a_borrowed_name_gets_no_published_value(
    tmp_path: Path, record: dict[str, Any], label: str
) -> None:
    put_run(tmp_path, "run", **record)
    (entry,) = entries(read_report(tmp_path, never)).values()
    assert (entry.dataset, entry.published) == (label, None)


def test_fixed_sources_equal_those_of_the_suite() -> None:
    fixed = {name for name, reader in SOURCES.items() if reader.digest.__name__ == "no_digest"}
    assert fixed == FIXED_SOURCES


def test_teachers_are_matched_by_their_data(tmp_path: Path) -> None:
    for number, (digest, top1) in enumerate(((A, 10.0), (B, 90.0))):
        origin = data("folder", digest)
        put_alone(tmp_path, f"teacher{number}", [top1], student="resnet56", **origin)
        put_alone(tmp_path, f"student{number}", [top1 - 5], **origin)
        put_run(tmp_path, f"kd{number}", [top1 - 1], **origin)
    report, _ = read(tmp_path)
    assert [entry.mean for entry in entries(report, "teacher").values()] == [10.0, 90.0]
    assert [entry.mean for entry in entries(report, "student").values()] == [5.0, 85.0]
    # Each figure of gains, curves and losses shows one dataset.
    assert len(draw_figures(report, never)) == 6


def config_file(folder: Path, dataset: dict[str, Any], teacher: dict[str, Any] | None) -> None:
    config = {"student": {"name": "digest"}, "teacher": teacher, "dataset": dataset, "seed": 0}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def test_older_results_take_their_data_from_the_config(tmp_path: Path) -> None:
    for number, digest in enumerate((A, B, A)):
        folder = put_run(tmp_path, f"run{number}", [50.0 + number], seed=number, dataset="mine")
        teacher = {"name": "resnet56", "digest": "c" * 64}
        config_file(folder, {"source": "folder", "name": "mine", "digest": digest}, teacher)
    put_run(tmp_path, "new", [60.0], seed=4, **data("folder", B))
    report, warnings = read(tmp_path)
    assert {name: (entry.mean, entry.n) for name, entry in entries(report).items()} == {
        "mine (folder aaaaaaaa)": (51.0, 2),
        "mine (folder bbbbbbbb)": (55.5, 2),
    }
    assert len(warnings) == 1
    assert report.results[1].origin.teacher == "c" * 64


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"dataset: folder\n",
        b"dataset:\n  source: !!python/object/apply:os.system [id]\n",
        b"dataset:\n  source: \x1b[31mred\n",
        b"x: &x [a]\ndataset:\n  <<: *x\n",
        b"[" * 60_000,
        b"dataset:\n" + b"  a: b\n" * 20_000,
        b"dataset:\n  source: folder\n" + b"#" * 70_000,
    ],
)
def test_a_malformed_configuration_has_no_origin(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    assert read_origin(tmp_path).source is None


def test_a_configuration_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / CONFIG).open("wb") as file:
        file.write(b"dataset:\n  source: folder\n")
        file.truncate(2**40)
    assert read_origin(tmp_path).source is None


@pytest.mark.parametrize("value", ["", 3, ["folder"], "a\nb", "\x1b[2J", True])
@pytest.mark.parametrize(
    "key", ["dataset_source", "dataset_digest", "teacher_digest", "teacher_epoch"]
)
def test_a_malformed_origin_is_named_and_skipped(tmp_path: Path, key: str, value: Any) -> None:
    put_run(tmp_path, "run", **{key: value})
    report, warnings = read(tmp_path)
    assert report.results == []
    assert len(warnings) == 1
    assert f"'{key}'" in warnings[0]


def rows(report: Report) -> dict[str, tuple[float, int]]:
    found = [entry for table in report.tables("last") for entry in table.entries]
    return {entry.row: (entry.mean, entry.n) for entry in found if entry.row != "teacher"}


def test_a_retrained_teacher_is_another_teacher(tmp_path: Path) -> None:
    for seed, digest in enumerate((A, A, B)):
        put_run(tmp_path, f"kd{seed}", [60.0 + 10 * seed], seed=seed, teacher_digest=digest)
    put_run(tmp_path, "at", [50.0], method="at", teacher_digest=B)
    put_run(tmp_path, "older", [99.0], seed=7)
    assert rows(read_report(tmp_path, never)) == {
        "KD (teacher.digest=aaaaaaaa)": (65.0, 2),
        "KD (teacher.digest=bbbbbbbb)": (80.0, 1),
        "KD (teacher.digest=unknown)": (99.0, 1),
        "AT": (50.0, 1),
    }
    # Each has the published value, and no cell of the pair's KD is missing.
    report = read_report(tmp_path, never)
    found = [entry for table in report.tables("last") for entry in table.entries]
    taught = [entry.published for entry in found if entry.row.startswith("KD (teacher.digest=")]
    assert taught == [PUBLISHED_KD] * 3
    assert "KD" not in {cell.row for cell in report.missing()}


@pytest.mark.parametrize(
    ("record", "marked", "published"),
    [
        ({}, False, PUBLISHED_KD),
        ({"difference": {"precision": "bf16"}}, False, PUBLISHED_KD),
        ({"difference": {"batch_size": 32}}, False, None),
        (data("cifar10", name="cifar10"), True, None),
        (data("folder", A), True, None),
        (data("folder", A, name="cifar100"), True, None),
    ],
)
def test_runs_of_different_lengths_are_shown_separately(
    tmp_path: Path, record: dict[str, Any], marked: bool, published: float | None
) -> None:
    """The published number of epochs is not added: one other run must not hide its values."""
    for seed, epochs in enumerate((240, 240, 200)):
        put_run(tmp_path, f"kd{seed}", [60.0 + 10 * seed], seed=seed, epoch=epochs, **record)
    report, warnings = read(tmp_path)
    found = {
        ("epochs=200" in entry.setting, entry.mean, entry.n, entry.published)
        for table in report.tables("last")
        for entry in table.entries
        if entry.row == "KD"
    }
    assert found == {(True, 80.0, 1, None), (False, 65.0, 2, published)}
    settings = {entry.setting for table in report.tables("last") for entry in table.entries}
    assert any("epochs=240" in setting for setting in settings) == marked
    assert sum("200 or 240 epochs" in line for line in warnings) == 1


def test_copies_are_found_despite_missing_fields(tmp_path: Path) -> None:
    origin = data("cifar100", name="cifar100")
    original = put_run(tmp_path, "a", [70.0], teacher_digest=A, **origin)
    shutil.copytree(original, tmp_path / "copy")
    older = put_run(tmp_path, "older", [70.0], dataset="cifar100")
    assert "dataset_source" not in json.loads((older / "result.json").read_text())
    again = put_run(tmp_path, "trained again", [72.0], teacher_digest=A, **origin)
    put_run(tmp_path, "other teacher", [74.0], teacher_digest=B, **origin)
    report, warnings = read(tmp_path)
    assert sorted(run.folder.name for run in report.results) == ["a", "other teacher"]
    assert len(warnings) == 3
    assert all(f"same configuration and seed as {original}" in line for line in warnings)
    # The warning shows a difference of the results.
    (warning,) = (line for line in warnings if str(again) in line)
    assert "last top-1 70.00, here 72.00" in warning


def test_means_over_several_commits_have_a_note(tmp_path: Path) -> None:
    commits = ["0" * 40, "1" * 40 + "-dirty", None]
    for seed, commit in enumerate(commits):
        put_run(tmp_path, f"kd{seed}", seed=seed, commit=commit)
    put_run(tmp_path, "at", method="at", commit="2" * 40)
    put_run(tmp_path / "single", "short", commit="3" * 40, difference={"schedule.epochs": 2})
    notes = [note for table in read_report(tmp_path, never).tables("last") for note in table.notes]
    assert [note for note in notes if "commits" in note] == [
        "Some means are over runs of different commits of the suite: 000000000000,"
        " 111111111111-dirty, not recorded."
    ]


def test_curves_with_lost_epochs_have_a_warning(tmp_path: Path) -> None:
    put_run(tmp_path, "kd0", [10.0, 20.0, 30.0])
    folder = put_run(tmp_path, "kd1", [10.0, 20.0, 30.0], seed=1)
    put_run(tmp_path, "at", [10.0], method="at")
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    warnings: list[str] = []
    draw_figures(read_report(tmp_path, never), warnings.append)
    assert len(warnings) == 1
    assert "resnet56-resnet20, KD: its runs have 2 or 3 epochs" in warnings[0]


def images(root: Path) -> Path:
    for part in ("train", "test"):
        for number, name in enumerate(("one", "two")):
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                colour = (0, 100 * number, 20 * index)
                Image.new("RGB", (32, 32), colour).save(root / part / name / f"{index}.png")
    return root


def test_a_run_records_its_data_and_its_teacher(composed: Compose, tmp_path: Path) -> None:
    data = ("dataset=folder", f"dataset.root={images(tmp_path / 'mine')}", "batch_size=4")
    networks = ("arch@teacher=resnet8", "arch@student=resnet8", "teacher.train=true")
    train(composed(*data, *networks, "schedule.epochs=1", "method=kd", "device=cpu"))
    digits = ("dataset=digits", "dataset.fraction=0.05", "schedule.epochs=1", "device=cpu")
    train(composed(*digits, "arch=resnet8", primary="teacher"))
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    runs = {(result["dataset"], result["kind"]): result for result in results}
    student, teacher = runs["mine", "distill"], runs["mine", "scratch"]
    alone = runs["digits", "scratch"]
    assert (alone["dataset_source"], alone["dataset_digest"]) == ("digits", None)
    assert student["dataset_source"] == teacher["dataset_source"] == "folder"
    assert student["dataset_digest"] == teacher["dataset_digest"]
    assert student["teacher_digest"] == teacher["digest"]["best"]
    assert teacher["teacher_digest"] is None
    assert (student["teacher_epoch"], teacher["teacher_epoch"]) == ("best", None)
    # The configuration, from which older results take their origin, records the same.
    report = read_report(tmp_path / "runs", never)
    assert len(report.results) == 3
    assert all(read_origin(run.folder) == run.origin for run in report.results)


# ---- a default that was changed in conf, which the difference from it does not show ----

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "student": {"name": "resnet20", "base_lr": 0.05},
    "teacher": {"name": "resnet56", "digest": A},
    "method": {"name": "kd", "temperature": 4.0, "weights": {"ce": 0.1, "kd": 0.9}},
    "dataset": {"source": "cifar100", "name": "cifar100", "digest": None},
    "optimizer": {"name": "sgd", "weight_decay": 0.0005},
    "schedule": {"epochs": 240},
}


def named(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the recorded settings of a run: SETTINGS, with ``group__key`` changed."""
    values = json.loads(json.dumps(SETTINGS | {"seed": seed}))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return {"run": values, "seed": seed}


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"optimizer__weight_decay": 0.3}, "optimizer.weight_decay=0.3"),
        ({"optimizer__nesterov": True, "optimizer__weight_decay": 0.1}, "weight_decay=0.1"),
        ({"student__base_lr": 0.01}, "student.base_lr=0.01"),
    ],
)
def test_runs_with_a_changed_default_are_shown_separately(
    tmp_path: Path, change: dict[str, Any], label: str
) -> None:
    put_run(tmp_path, "seed0", [70.0], **named(0))
    put_run(tmp_path, "seed1", [72.0], **named(1))
    put_run(tmp_path, "seed2", [30.0], **named(2, **change))
    report, warnings = read(tmp_path)
    found = {
        e.setting: (e.mean, e.n) for t in report.tables("last") for e in t.entries if e.row == "KD"
    }
    assert len(found) == 2
    assert {value for key, value in found.items() if label in key} == {(30.0, 1)}
    assert {value for key, value in found.items() if label not in key} == {(71.0, 2)}
    assert any(label.partition("=")[0] in line for line in warnings)


def test_a_changed_default_of_a_method_makes_another_row(tmp_path: Path) -> None:
    put_run(tmp_path, "seed0", [70.0], **named(0))
    put_run(tmp_path, "seed1", [50.0], **named(1, method__temperature=2.0))
    put_run(tmp_path, "at", [60.0], method="at", **named(0, method__temperature=1.0))
    report, _ = read(tmp_path)
    rows = {e.row: e.mean for t in report.tables("last") for e in t.entries if e.row != "teacher"}
    assert rows == {
        "KD (method.temperature=2.0)": 50.0,
        "KD (method.temperature=4.0)": 70.0,
        "AT": 60.0,
    }


@pytest.mark.parametrize(
    "change",
    [{"teacher__digest": B}, {"dataset__digest": B}, {"dataset__name": "other"}],
)
def test_digests_and_names_are_not_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    put_run(tmp_path, "seed0", [70.0], **named(0))
    put_run(tmp_path, "seed1", [72.0], **named(1, **change))
    put_run(tmp_path, "older", [74.0], seed=2)  # does not record its settings
    report, warnings = read(tmp_path)
    assert warnings == []
    (entry,) = (e for t in report.tables("last") for e in t.entries if e.row == "KD")
    assert (entry.mean, entry.n) == (72.0, 3)


def test_students_may_differ_in_their_learning_rates(tmp_path: Path) -> None:
    put_run(tmp_path, "one", [70.0], **named(optimizer__lr=0.05))
    other = named(optimizer__lr=0.01, student__name="ShuffleV1", student__base_lr=0.01)
    put_run(tmp_path, "other", [72.0], student="ShuffleV1", **other)
    report, warnings = read(tmp_path)
    assert warnings == []
    assert {run.difference for run in report.results} == {()}


def test_runs_of_unknown_data_are_averaged_with_a_warning(tmp_path: Path) -> None:
    for seed in range(2):
        put_run(tmp_path, f"seed{seed}", [10.0 + 80 * seed], seed=seed, **data(None, name="pets"))
    report, warnings = read(tmp_path)
    assert entries(report)["pets"].n == 2
    (line,) = warnings
    assert "runs of 'pets' do not record their data" in line
