from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import RESULT, text_table, texts

from sskd.report.disambiguation import distinct_results
from sskd.report.groups import Entry
from sskd.report.render import render_text
from sskd.report.results import FinishedRun, read_results
from sskd.report.tables import Table, build_tables

PUBLISHED_ORDER = [
    *("teacher", "student", "KD", "FitNet", "AT", "SP", "VID"),
    *("RKD", "PKT", "AB", "FT", "CRD", "SSKD"),
]


def record(**changes: Any) -> dict[str, Any]:
    unmeasured = {"teacher_top1": None, "agreement": None, "kl": None, "seconds": 60.0}
    return RESULT | unmeasured | changes


def top1(last: float, best: float) -> dict[str, float]:
    return {"last": last, "best": best, "best_epoch": 1}


def scratch(student: str, **changes: Any) -> dict[str, Any]:
    return record(kind="scratch", teacher=None, student=student, method="vanilla", **changes)


def read(root: Path, *records: dict[str, Any]) -> list[FinishedRun]:
    for number, values in enumerate(records):
        folder = root / f"run{number:02d}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(values))
    warnings: list[str] = []
    results = distinct_results(read_results(root, warnings.append), warnings.append)
    assert warnings == []
    return results


def entries(tables: list[Table]) -> dict[tuple[str, str, str, str], Entry]:
    """Return the entries by (table, teacher, student, row)."""
    found = [entry for table in tables for entry in table.entries]
    return {(entry.table, entry.teacher, entry.student, entry.row): entry for entry in found}


def notes_of(tables: list[Table]) -> str:
    return " ".join(note for table in tables for note in table.notes)


def test_a_run_of_auto_is_shown_with_its_precision(tmp_path: Path) -> None:
    values = record(
        difference={"precision": "bf16"}, precision="bf16", run={"precision": "auto", "seed": 0}
    )
    named = values | {"run": {"precision": "bf16", "seed": 1}, "seed": 1}
    for result in read(tmp_path, values, named):
        assert result.settings == result.difference == (("precision", "bf16"),)


def test_mean_deviation_and_difference(tmp_path: Path) -> None:
    runs = [record(seed=seed, top1=top1(70.0 + seed, 75.0)) for seed in range(3)]
    results = read(tmp_path, *runs)
    last = entries(build_tables(results, "last"))["similar", "resnet56", "resnet20", "KD"]
    # 70, 71, 72: mean 71, squared deviations 1 + 0 + 1 over n - 1 = 2, so 1.
    assert (last.mean, last.std, last.n) == (71.0, 1.0, 3)
    assert last.published == 70.66
    assert last.difference == pytest.approx(0.34)
    best = entries(build_tables(results, "best"))["similar", "resnet56", "resnet20", "KD"]
    assert (best.mean, best.std, best.n) == (75.0, 0.0, 3)


def test_cells_show_count_published_value_and_difference(tmp_path: Path) -> None:
    runs = [record(seed=seed, top1=top1(70.0 + seed, 75.0)) for seed in range(3)]
    single = record(method="sskd", top1=top1(71.489, 72.0))
    table, cost = build_tables(read(tmp_path, *runs, single), "last")
    cells = {row[0].split("\n")[0]: row[1] for row in texts(table)}
    assert cells["KD"] == "71.00 ± 1.00 (3)\n70.66 +0.34"
    # 71.489 - 71.49 = -0.001, which must not become "-0.00".
    assert cells["SSKD"] == "71.49 (1)\n71.49 +0.00"
    assert cells["FitNet"] == ""
    assert table.title == "cifar100 · the recipe · similar · last epoch"
    assert texts(cost)[0][:4] == ("resnet56-resnet20", "KD", "71.00", "75.00")


def test_layout_follows_the_published_order(tmp_path: Path) -> None:
    pairs = [("vgg13", "vgg8"), ("wrn_40_2", "wrn_16_2"), ("vgg13", "MobileNetV2"), ("b", "a")]
    runs = [record(teacher=teacher, student=student) for teacher, student in pairs]
    runs += [record(teacher="vgg13", student="vgg8", method=m) for m in ("xyz", "nst", "sskd")]
    tables = build_tables(read(tmp_path, *runs), "best")
    names = [table.title.split(" · ")[2] for table in tables]
    assert names == ["similar", "cross", "other pairs", "cost and agreement, means over seeds"]
    similar, cross, other, _ = tables
    assert similar.header == ("teacher\nstudent", "wrn_40_2\nwrn_16_2", "vgg13\nvgg8")
    assert cross.header == ("teacher\nstudent", "vgg13\nMobileNetV2")
    labels = [row[0].split("\n")[0] for row in texts(similar)]
    assert labels == [*PUBLISHED_ORDER, "SSKD, FN8211/SSKD (1)", "NST", "XYZ"]
    assert [row[0].split("\n")[0] for row in texts(cross)] == PUBLISHED_ORDER
    assert texts(other) == (("KD", "71.00 (1)"),)
    assert similar.title.endswith("best epoch on the test set")


def test_settings_have_tables_and_variants_have_rows(tmp_path: Path) -> None:
    results = read(
        tmp_path,
        record(top1=top1(70.0, 70.0)),
        record(top1=top1(60.0, 60.0), difference={"schedule.epochs": 24}),
        record(top1=top1(50.0, 50.0), difference={"method.weights.kd": 0.5}),
        record(top1=top1(40.0, 40.0), difference={"teacher.digest": "0123456789abcdef"}),
        record(top1=top1(30.0, 30.0), difference={"teacher.digest": "0123456789abcdee"}),
    )
    tables = build_tables(results, "last")
    pair_tables = [table for table in tables if table.entries]
    settings = [table.title.split(" · ")[1] for table in pair_tables]
    assert settings == ["the recipe", "schedule.epochs=24"]
    recipe, short = ([(e.row, e.mean, e.n) for e in table.entries] for table in pair_tables)
    assert recipe == [
        ("KD", 70.0, 1),
        ("KD (method.weights.kd=0.5)", 50.0, 1),
        ("KD (teacher.digest=01234567)", 30.0, 1),
        ("KD (teacher.digest=01234567)", 40.0, 1),
    ]
    assert short == [("KD", 60.0, 1)]
    # Neither a variant nor a teacher of unknown accuracy is the published experiment.
    published = [entry.published for table in pair_tables for entry in table.entries]
    assert published == [70.66, None, None, None, None]


@pytest.mark.parametrize(
    ("setting", "compared"),
    [
        ({}, True),
        ({"precision": "bf16"}, True),
        ({"schedule.epochs": 16}, False),
        ({"dataset.fraction": 0.2, "precision": "bf16"}, False),
        ({"dataset.label_noise": 0.3}, False),
        ({"batch_size": 128}, False),
        ({"optimizer.lr": 0.1}, False),
    ],
)
def test_published_values_need_the_same_experiment(
    tmp_path: Path, setting: dict[str, Any], compared: bool
) -> None:
    results = read(
        tmp_path,
        record(difference=setting),
        scratch("resnet20", difference=setting),
        scratch("resnet8x4", difference=setting),
        record(difference=setting | {"teacher.epoch": "last"}, top1=top1(60.0, 61.0)),
    )
    tables = build_tables(results, "last")
    found = [entry for table in tables for entry in table.entries]
    assert len(found) == 5  # KD and the student in the tables of both sources, and a network
    assert all((entry.published is not None) == compared for entry in found)
    text = " ".join(cell for table in tables for row in texts(table) for cell in row)
    assert ("published" in text) == compared
    notes = " ".join(note for table in tables for note in table.notes)
    assert ("would mean nothing" in notes) != compared
    assert ("Xu et al." in notes) == compared


def crd(**changes: Any) -> dict[str, Any]:
    """Return a run with the settings of the CRD benchmark: no KD term, the teacher's last epoch."""
    weights = {"method.weights.ce": 1.0, "method.weights.kd": 0.0}
    return record(difference={"teacher.epoch": "last"} | weights, **changes)


def runs_of_both_sources(root: Path) -> list[Table]:
    """Return the tables of runs with the settings of SSKD, of the CRD benchmark, and of neither."""
    results = read(
        root,
        scratch("resnet56", top1=top1(72.0, 73.0)),
        scratch("resnet20", top1=top1(69.0, 70.0)),
        record(method="at", top1=top1(71.0, 71.5)),
        crd(method="at", top1=top1(70.0, 70.5)),
        crd(method="cc", top1=top1(69.5, 69.75)),
        record(difference={"teacher.epoch": "last"}, top1=top1(70.75, 71.0)),
        crd(method="at", teacher="resnet110", top1=top1(70.25, 71.0)),
        crd(method="fsp", teacher="vgg13", student="MobileNetV2"),
        record(method="at", difference={"teacher.epoch": "last"}, top1=top1(60.0, 60.0)),
        crd(method="at", teacher="a", student="b"),
    )
    return build_tables(results, "last")


SIMILAR, CROSS, OTHER = (
    f"the CRD benchmark, {name}" for name in ("similar", "cross", "other pairs")
)


def test_the_crd_benchmark_has_separate_tables(tmp_path: Path) -> None:
    tables = runs_of_both_sources(tmp_path)
    names = [table.title.split(" · ")[2] for table in tables if table.epoch]
    assert names == ["similar", SIMILAR, CROSS, OTHER]
    (table,) = (table for table in tables if f" {SIMILAR} " in table.title)
    assert [row[0].split("\n")[0] for row in texts(table)] == [
        *("teacher", "student", "KD", "FitNet", "AT", "SP", "CC", "VID"),
        *("RKD", "PKT", "AB", "FT", "FSP", "NST", "CRD"),
    ]
    assert "compare with the last epoch" in notes_of(tables)


def test_each_source_has_its_published_values(tmp_path: Path) -> None:
    found = entries(runs_of_both_sources(tmp_path))
    here = ("resnet56", "resnet20")
    # The values of Tian et al., table 1, and of Xu et al., table 1, for this pair.
    assert found[(SIMILAR, *here, "teacher")].published == 72.34
    assert found[("similar", *here, "teacher")].published == 73.44
    assert found[(SIMILAR, *here, "student")].published == 69.06
    assert found[("similar", *here, "student")].published == 69.63
    assert found[(SIMILAR, *here, "teacher")].mean == found[("similar", *here, "teacher")].mean
    at = found[(SIMILAR, *here, "AT")]
    assert (at.mean, at.published) == (70.0, 70.55)
    assert found[("similar", *here, "AT")].published == 71.78
    assert found[(SIMILAR, *here, "CC")].published == 69.63
    assert found[(SIMILAR, *here, "KD")].published == 70.66
    assert found[SIMILAR, "resnet110", "resnet20", "AT"].published == 70.22
    # Nobody has published AT with KD's term and the teacher's last epoch.
    assert found[("similar", *here, "AT (teacher.epoch=last)")].published is None
    # The benchmark has neither FSP for two families nor the other pair.
    assert found[CROSS, "vgg13", "MobileNetV2", "FSP"].published is None
    assert found[OTHER, "a", "b", "AT"].published is None


def test_a_single_teacher_file_makes_no_extra_row(tmp_path: Path) -> None:
    from_file = {"teacher.digest": "0123456789abcdef"}
    results = read(
        tmp_path,
        record(top1=top1(70.0, 70.0), difference=from_file),
        record(top1=top1(72.0, 72.0), difference=from_file, seed=1),
        record(top1=top1(50.0, 50.0), difference=from_file | {"method.weights.kd": 0.5}),
    )
    entries = [entry for table in build_tables(results, "last") for entry in table.entries]
    assert [(entry.row, entry.mean, entry.n) for entry in entries] == [
        ("KD", 71.0, 2),
        ("KD (method.weights.kd=0.5)", 50.0, 1),
    ]


def test_teacher_and_student_rows(tmp_path: Path) -> None:
    results = read(
        tmp_path,
        scratch("resnet56", top1=top1(73.0, 74.0)),
        scratch("resnet20", top1=top1(69.0, 69.5)),
        scratch("resnet20", difference={"method.weights.ce": 2}),
        scratch("vgg13", top1=top1(10.0, 10.0), difference={"schedule.epochs": 24}),
        record(teacher_top1=99.0),
        *(
            record(teacher="vgg13", student="vgg8", method=method, teacher_top1=value)
            for method, value in {"kd": 74.0, "at": 74.0, "sp": 75.0}.items()
        ),
    )
    found = entries(build_tables(results, "last"))
    assert {key[3] for key in found if key[0] == "networks"} == {
        "resnet20 (method.weights.ce=2)",
        "vgg13",
    }
    assert found["similar", "resnet56", "resnet20", "teacher"].mean == 73.0
    assert found["similar", "resnet56", "resnet20", "student"].mean == 69.0
    # No run of vgg13 in this setting: its distinct measured accuracies are 74 and 75.
    teacher = found["similar", "vgg13", "vgg8", "teacher"]
    assert (teacher.mean, teacher.n) == (74.5, 2)
    assert teacher.std == pytest.approx(0.5**0.5)
    assert ("similar", "vgg13", "vgg8", "student") not in found
    assert found["networks", "", "vgg13", "vgg13"].setting == "schedule.epochs=24"


def test_networks_trained_from_scratch_have_a_table(tmp_path: Path) -> None:
    runs = [scratch("resnet20", seed=seed, top1=top1(69.0 + seed, 71.0)) for seed in range(2)]
    (table,) = build_tables(read(tmp_path, *runs, scratch("resnet8", parameters=7)), "last")
    # 69 and 70: deviation sqrt(0.5). The paper has 69.63 for the student resnet20.
    assert texts(table) == (
        ("resnet20", "69.50 ± 0.71 (2)", "278,324", "69.63 -0.13"),
        ("resnet8", "70.00 (1)", "7", ""),
    )


def test_cost_and_agreement_are_means_over_seeds(tmp_path: Path) -> None:
    results = read(
        tmp_path,
        record(agreement=80.0, kl=0.25, seconds=60.0, images_per_second=1e3, peak_memory_mib=200),
        record(agreement=82.0, kl=0.75, seconds=180.0, images_per_second=2e3, peak_memory_mib=400)
        | {"seed": 1},
        record(agreement=None, kl=None, method="at", passes=960)
        | {"departures": {"optimizer.nesterov": True}},
    )
    cost = build_tables(results, "last")[-1]
    kd = ("70.00", "71.00", "1.00", "81.00", "0.500", "", "1,500", "300", "0.033")
    assert texts(cost) == (
        ("resnet56-resnet20", "KD", *kd),
        ("", "AT", "70.00", "71.00", "1.00", "", "", "960", "1,000", "", "0.017"),
    )
    assert cost.notes[-1].endswith(
        "replaces in the recipe. AT: optimizer.nesterov=true (resnet56-resnet20)."
    )


def test_cells_have_the_numbers_that_they_show(tmp_path: Path) -> None:
    results = read(
        tmp_path,
        record(method="sskd", top1=top1(71.489, 72.0), teacher="vgg13", student="vgg8", kl=0.12345),
        scratch("resnet20", top1=top1(69.126, 71.0), parameters=278324),
        scratch("resnet20", top1=top1(69.126, 71.0), parameters=7, seed=1),
    )
    pairs, cost, networks = build_tables(results, "last")
    (sskd,) = (row for row in pairs.rows if row[1].entry)
    assert (sskd[0].value, sskd[1].value, sskd[1].entry) == (None, 71.489, pairs.entries[0])
    (rerun,) = (row for row in pairs.rows if "re-run" in row[0].text)
    assert (rerun[1].text, rerun[1].value, rerun[1].entry) == ("\n74.53", 74.53, None)
    empty = next(row[1] for row in pairs.rows if row[0].text == "KD")
    assert (empty.text, empty.value) == ("", None)
    # Rounded as shown, so that rows that look equal keep their order; agreement was not measured.
    assert [cell.value for cell in cost.rows[0]] == [
        *(None, None, 71.49, 72.0, 0.51, None, 0.123, None, 1000.0, None, 0.017),
    ]
    assert [cell.value for cell in networks.rows[0]] == [None, 69.13, 7.0, 69.63]


def test_a_dataset_without_published_values(tmp_path: Path) -> None:
    table, cost = build_tables(read(tmp_path, record(dataset="digits", method="sskd")), "last")
    assert table.title == "digits · the recipe · pairs · last epoch"
    assert texts(table) == (("SSKD", "70.00 (1)"),)
    assert "CRD" not in notes_of([table, cost])
    cifar100 = build_tables(read(tmp_path / "cifar100", record()), "last")
    assert "digit for digit" in notes_of(cifar100)
    # Each note is beneath the values that it explains, not at the end of the page.
    assert "digit for digit" in " ".join(cifar100[0].notes)
    assert "peak memory" in " ".join(cifar100[1].notes)


def test_other_methods_follow_in_alphabetical_order(tmp_path: Path) -> None:
    methods = ("srrl", "wttm", "simkd", "luminet", "sskd")
    runs = [record(dataset="digits", method=method) for method in methods]
    table, _ = build_tables(read(tmp_path, *runs), "last")
    assert [row[0] for row in texts(table)] == ["SSKD", "LumiNet", "SimKD", "SRRL", "WTTM"]


def test_wide_tables_repeat_the_labels_in_each_block() -> None:
    rows = (("KD\n  published", "1.00 (1)\n2.00 -1.00", ""), ("AT", "", "3.00 (1)"))
    header = ("row", "first", "second")
    table = text_table("title", header, *rows, align="<", notes=("note",))
    assert render_text(table, 25) == (
        "title\n=====\n"
        "row          first\n"
        "-----------  ----------\n"
        "KD           1.00 (1)\n"
        "  published  2.00 -1.00\n"
        "AT\n\n"
        "row          second\n"
        "-----------  --------\n"
        "KD\n"
        "AT           3.00 (1)\n\n"
        "note\n"
    )
    assert render_text(table, 80).count("row") == 1
