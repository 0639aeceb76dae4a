"""What makes a run another run, and what is only said in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Compose
from faults import SMALL

from sskd.config import Config
from sskd.data import Images
from sskd.identity import difference, earlier_difference, run_folder
from sskd.models import build_model
from sskd.results import _circumstances
from sskd.teachers import locate, missing_teacher
from train_student import train

OWN_TEACHER = [item for item in SMALL if not item.startswith("teacher.train")]


def folder_of(config: Config) -> Path:
    return locate(config)[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule=paper"], "teacher.epochs=240"),
        (["schedule=short"], "teacher.epochs=24"),
        (["schedule.epochs=7"], "teacher.epochs=7"),
        (["precision=bf16"], "teacher.precision=bf16"),
        ([], "teacher.precision=fp32"),
        ([], "teacher.seed=0"),
        ([], "teacher.epoch=best"),
        (["dataset.fraction=0.5"], "teacher.fraction=1.0"),
    ],
)
def test_a_default_that_is_given_is_no_variant(
    composed: Compose, words: list[str], said: str
) -> None:
    without, given = composed(*words), composed(*words, said)
    assert difference(given) == difference(without)
    assert folder_of(given) == folder_of(without)
    one, other = missing_teacher(given), missing_teacher(without)
    assert one
    assert other
    assert one.model_dump() == other.model_dump()


@pytest.mark.parametrize(
    "said",
    ["teacher.epochs=24", "teacher.precision=bf16", "teacher.epoch=last", "teacher.seed=1",
     "teacher.fraction=0.5", "teacher.label_noise=0.1", "teacher.base_lr=0.1"],
)  # fmt: skip
def test_another_teacher_of_the_suite_is_a_variant(composed: Compose, said: str) -> None:
    key, _, value = said.partition("=")
    changed = difference(composed(said))
    assert list(changed) == [key]
    assert str(changed[key]) == value
    assert difference(composed(said)) == earlier_difference(composed(said))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("best", "last"):
        torch.save(build_model("resnet14", 10).state_dict(), folder / f"{name}.pth")
    return str(folder / "best.pth")


@pytest.mark.parametrize(
    "said",
    ["teacher.epoch=last", "teacher.epochs=5", "teacher.precision=bf16", "teacher.seed=3",
     "teacher.fraction=0.5", "teacher.label_noise=0.1", "teacher.base_lr=0.3"],
)  # fmt: skip
def test_settings_beside_a_file_make_no_variant(
    composed: Compose, checkpoint: str, said: str
) -> None:
    words = [*OWN_TEACHER, "method=kd", f"teacher.checkpoint={checkpoint}"]
    assert locate(composed(*words, said)) == locate(composed(*words))
    assert list(locate(composed(*words))[1])[-1] == "teacher.digest"


def test_beside_a_folder_the_epoch_chooses_the_file(composed: Compose, checkpoint: str) -> None:
    words = [*OWN_TEACHER, "method=kd", f"teacher.checkpoint={Path(checkpoint).parent}"]
    best, last = (locate(composed(*words, f"teacher.epoch={epoch}")) for epoch in ("best", "last"))
    assert best != last
    assert best[1].keys() == last[1].keys()
    file = [*OWN_TEACHER, "method=kd", f"teacher.checkpoint={checkpoint}"]
    assert locate(composed(*file)) == best


# ``seed0-`` and 8 hex digits of {"teacher.epochs": 240}, as earlier versions named the folder.
EARLIER = "seed0-575746df"


def test_a_run_that_an_earlier_version_named_is_found(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("teacher.epochs=240")
    earlier = folder_of(config).parent / EARLIER
    earlier.mkdir(parents=True)
    assert folder_of(config) == earlier
    folder_of(composed("seed=1")).parent.joinpath("seed0").mkdir()
    assert folder_of(config).name == "seed0"

    given = composed(*SMALL, "method=kd", "teacher.epochs=3")
    result = train(composed(*SMALL, "method=kd"))
    older = run_folder(given, earlier_difference(given))
    folder_of(given).rename(older)
    config_file = older / "config.yaml"
    text = config_file.read_text()
    config_file.write_text(text.replace("  epochs: null\n", "  epochs: 3\n", 1))
    assert config_file.read_text() != text
    capsys.readouterr()
    assert result["threads"] == torch.get_num_threads()
    assert train(given) == result
    assert f"{older}: finished already" in capsys.readouterr().out


@pytest.mark.parametrize("more", [0, 1])
def test_the_number_of_threads_is_in_the_result(few_images: Images, more: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + more)
    try:
        assert _circumstances(few_images)["threads"] == threads + more
    finally:
        torch.set_num_threads(threads)
