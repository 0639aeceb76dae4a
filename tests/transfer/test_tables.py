"""The tables of transfer and similarity: rows, published values, and what is not comparable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import put_alone, put_run

from sskd.measuring.rows import Measured, Row, picture_labels, row_columns, rows_of, setting_notes
from sskd.measuring.selection import Chosen, choose_networks
from sskd.models import build_model
from sskd.report.figures import as_png
from sskd.report.render import render_markdown
from sskd.report.results import FinishedRun, read_results
from sskd.runs.names import WEIGHTS
from sskd.similarity import figure as similarity_figure
from sskd.similarity import table as similarity_table
from sskd.similarity.teachers import with_teacher
from sskd.trained import TrainedNetwork
from sskd.transfer import figure as transfer_figure
from sskd.transfer import table as transfer_table

TRANSFER = {"teacher": "wrn_40_2", "student": "ShuffleV1"}
SIMILAR = {"teacher": "vgg13", "student": "vgg8"}


def finished(root: Path, **changes: Any) -> FinishedRun:
    """Return a finished run with the published recipe and ``changes``."""
    put = put_alone if changes.get("kind") == "scratch" else put_run
    changes.pop("kind", None)
    put(root, "run", [70.0], **changes)
    (run,) = read_results(root, print)
    return run


@pytest.mark.parametrize(
    ("changes", "dataset", "expected"),
    [
        (TRANSFER, "stl10", 73.25),
        (TRANSFER, "tiny_imagenet", 32.05),
        (TRANSFER | {"method": "sskd"}, "stl10", 74.74),
        ({"kind": "scratch", "student": "ShuffleV1"}, "stl10", 71.58),
        ({"kind": "scratch", "student": "wrn_40_2"}, "tiny_imagenet", 27.74),
        (TRANSFER | {"method": "dkd"}, "stl10", None),
        (TRANSFER, "digits", None),
        (TRANSFER | {"difference": {"schedule.epochs": 24}}, "stl10", None),
        (TRANSFER | {"difference": {"method.temperature": 2.0}}, "stl10", None),
        (TRANSFER | {"dataset": "cifar10"}, "stl10", None),
        ({"kind": "scratch", "student": "vgg8"}, "stl10", None),
        (SIMILAR, "stl10", None),
    ],
)
def test_the_paper_has_a_transfer_of_the_same_experiment(
    changes: dict[str, Any], dataset: str, expected: float | None, tmp_path: Path
) -> None:
    assert transfer_table.published_value(finished(tmp_path, **changes), dataset) == expected
    assert transfer_table.published_value(None, dataset) is None


@pytest.mark.parametrize(
    ("changes", "dataset", "expected"),
    [
        (SIMILAR, "cifar100", {"kl": 6.91, "cka": 0.7003}),
        (SIMILAR | {"method": "sskd"}, "svhn", {"kl": 10.58, "cka": 0.7382}),
        (SIMILAR | {"difference": {"batch_size": 128}}, "cifar100", {}),
        (SIMILAR, "digits", {}),
        (TRANSFER, "cifar100", {}),
        ({"kind": "scratch", "student": "vgg8"}, "cifar100", {}),
    ],
)
def test_the_paper_has_a_similarity_of_the_same_experiment(
    changes: dict[str, Any], dataset: str, expected: dict[str, float], tmp_path: Path
) -> None:
    assert similarity_table.published_values(finished(tmp_path, **changes), dataset) == expected


def test_students_of_several_teacher_files_have_several_rows(tmp_path: Path) -> None:
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        difference = {"teacher.digest": digest}
        folder = put_run(tmp_path, name, [70.0], difference=difference, teacher_digest=digest)
        (folder / WEIGHTS).write_bytes(b"")
        # This one found its teacher by name: its difference lacks the digest.
        folder = put_run(tmp_path, f"{name}1", [70.0], seed=1, teacher_digest=digest)
        (folder / WEIGHTS).write_bytes(name.encode())
    several = choose_networks([str(tmp_path)], "last", print)
    rows = rows_of([(each, "") for each in several])
    assert [row.method for row in rows] == [
        *["KD (teacher.digest=11111111)"] * 2, *["KD (teacher.digest=22222222)"] * 2,
    ]  # fmt: skip
    assert [row.method for row in rows_of([(each, "") for each in several[:2]])] == ["KD", "KD"]


def test_a_network_alone_has_a_row_for_each_teacher(tmp_path: Path) -> None:
    alone = Chosen(tmp_path, "alone", finished(tmp_path, kind="scratch", student="resnet8"))
    teachers = []
    for name in ("a", "b"):
        torch.save({"state_dict": build_model("resnet8", 7).state_dict()}, tmp_path / name)
        teachers.append(TrainedNetwork(tmp_path / name))
    first, second = rows_of([(with_teacher(alone, each), "") for each in teachers])
    assert first.networks == second.networks == "resnet8-resnet8"
    assert first.method != second.method
    (only,) = rows_of([(with_teacher(alone, teachers[0]), "")])
    assert only.method == "alone"


def transfers(*last: float, best_epoch: int | None = 3) -> list[Measured]:
    row = Row("cifar100", "", "wrn_40_2-ShuffleV1", "KD")
    values = [{"last": top1, "best": top1 + 1, "best_epoch": best_epoch} for top1 in last]
    return [Measured("a", row, None, each) for each in values]


def test_a_transfer_is_a_mean_with_a_deviation() -> None:
    summaries = transfer_table.summarise(transfers(70.0, 72.0), "stl10", comparable=True)
    table = transfer_table.build_table(summaries, "stl10", "a protocol")
    assert table.header == ("networks", "row", "last", "best")
    assert [cell.text for cell in table.rows[0][2:]] == ["71.00 ± 1.41 (2)", "72.00 ± 1.41"]
    assert "a protocol." in render_markdown(table)
    (line,) = transfer_table.csv_lines(summaries)
    assert (line["mean"], line["std"], line["n"]) == (71, pytest.approx(2**0.5), 2)
    assert (line["mean_best"], line["published"]) == (72, None)


def test_rows_are_named_by_what_differs() -> None:
    rows = [Row(name, setting, "a-b", "KD") for name in ("cifar10", "cifar100") for setting in "xy"]
    columns = row_columns(rows)
    assert list(columns) == ["trained on", "setting", "networks", "row"]
    assert [cell.text for cell in columns["trained on"]] == [row.dataset for row in rows]
    assert len(set(picture_labels(rows, always=("method",)))) == 4
    assert setting_notes(rows, "networks") == []
    rows = [Row("cifar10", f"dataset.fraction={share}", "a-b", "KD") for share in (0.1, 0.2)]
    labels = picture_labels([*rows, Row("", "", "b", "file")], always=("method",))
    assert labels == ["a-b KD fraction=0.1", "a-b KD fraction=0.2", "b file"]
    rows = [Row("cifar10", "x", "a-b", "KD")]
    assert list(row_columns(rows[:1])) == ["networks", "row"]
    assert picture_labels(rows[:1], always=("method",)) == ["KD"]
    assert setting_notes(rows[:1], "networks") == ["The networks were trained with x."]


def test_a_protocol_without_epochs_has_no_best_one() -> None:
    measured = transfers(70.0, best_epoch=None)
    summaries = transfer_table.summarise(measured, "stl10", comparable=False)
    assert transfer_table.build_table(summaries, "stl10", "").header == ("networks", "row", "last")


def test_a_published_value_is_a_column_and_a_marker(tmp_path: Path) -> None:
    run = finished(tmp_path, **TRANSFER)
    measured = [Measured("a", each.row, run, each.values) for each in transfers(71)]
    for comparable in (True, False):
        summaries = transfer_table.summarise(measured, "stl10", comparable=comparable)
        table = transfer_table.build_table(summaries, "stl10", "")
        assert (table.header[-1] == "published") is comparable
        assert ("73.25" in render_markdown(table)) is comparable
        drawn = transfer_figure.draw_transfer("Linear transfer", summaries)
        (axes,) = drawn.axes
        markers = [line.get_xdata() for line in axes.lines if line.get_marker() == "D"]
        assert markers == [[73.25]] * comparable
    assert as_png(drawn).startswith(b"\x89PNG")


def similarities(seeds: int, difference: torch.Tensor | None) -> list[similarity_table.Similarity]:
    row = Row("cifar100", "", "vgg13-vgg8", "KD")
    values = [{"agreement": 70.0 + 2 * seed, "kl": 0.5, "cka": 0.7} for seed in range(seeds)]
    return [
        similarity_table.Similarity(
            "a", row, None, each, None if difference is None else difference * (seed + 1)
        )
        for seed, each in enumerate(values)
    ]


def test_a_similarity_is_a_mean_with_a_deviation(tmp_path: Path) -> None:
    summaries = similarity_table.summarise(
        similarities(2, torch.eye(4)), "cifar100", comparable=True
    )
    table = similarity_table.build_table(summaries, "cifar100")
    cells = dict(zip(table.header, (cell.text for cell in table.rows[0]), strict=True))
    assert (cells["n"], cells["agree %"]) == ("2", "71.00 ± 1.41")
    assert (cells["KL"], cells["CKA"]) == ("0.500 ± 0.000", "0.7000 ± 0.0000")
    assert cells["weights"] == "", "was not measured"
    assert not any("published" in name for name in table.header)
    assert summaries[0].difference is not None
    assert summaries[0].difference.diag().tolist() == [1.5] * 4
    run = finished(tmp_path, **SIMILAR)
    measured = [
        similarity_table.Similarity("a", each.row, run, each.values)
        for each in similarities(1, None)
    ]
    for comparable in (True, False):
        found = similarity_table.summarise(measured, "cifar100", comparable=comparable)
        table = similarity_table.build_table(found, "cifar100")
        assert ("published KL" in table.header) is comparable
        assert ([cell.text for cell in table.rows[0][-2:]] == ["6.910", "0.7003"]) is comparable


def test_the_panels_have_one_scale() -> None:
    maps = [torch.full((4, 4), 0.1), torch.rand(4, 4), torch.zeros(3, 3)]
    summaries = [
        similarity_table.summarise(similarities(1, each), "", comparable=False)[0] for each in maps
    ]
    without = similarity_table.summarise(similarities(1, None), "", comparable=False)
    drawn = similarity_figure.draw_differences("Weights", [*summaries, *without])
    images = [axes.images[0] for axes in drawn.axes if axes.images]
    assert len(images) == 3
    assert len({image.get_clim() for image in images}) == 1
    assert similarity_figure.as_small_png(drawn).startswith(b"\x89PNG")
