"""The folder of a run: its name, its configuration, and links in its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from faults import SMALL
from image_folders import write_images

from sskd.config import Config
from sskd.errors import UserError
from sskd.runs.folder import read_config_file, run_folder
from sskd.runs.recipe import diff_from_recipe
from sskd.runs.run import Run
from sskd.teachers.find import run_location
from sskd.train import train


def folder_of(config: Config) -> str:
    return str(run_folder(config, diff_from_recipe(config)).relative_to(config.runs))


def test_the_configuration_decides_the_folders_name(composed: Compose) -> None:
    sskd_run = folder_of(composed("pair=vgg13-vgg8", "seed=2"))
    assert sskd_run == "cifar100/distill/vgg13-vgg8/sskd/seed2"
    assert folder_of(composed("arch=vgg8", primary="teacher")) == "cifar100/scratch/vgg8/seed0"
    # Settings that do not decide the result do not change the name.
    same = composed("pair=vgg13-vgg8", "seed=2", "device=cuda:1", "wandb.mode=disabled")
    assert folder_of(same) == sskd_run
    others = {
        folder_of(composed("pair=vgg13-vgg8", "seed=2", change))
        for change in ("optimizer.lr=0.1", "optimizer.lr=0.2", "method.weights.tf=3.0",
                       "schedule=short", "dataset.fraction=0.5", "teacher.epoch=last",
                       "optimizer=adamw", "batch_size=128", "precision=bf16")
    }  # fmt: skip
    assert len(others | {sskd_run}) == 10
    assert all(name.startswith(f"{sskd_run}-") for name in others)


def test_the_command_line_overrides_a_pair(composed: Compose) -> None:
    pair = composed("pair=vgg13-MobileNetV2")
    assert (pair.teacher and pair.teacher.name, pair.student.name) == ("vgg13", "MobileNetV2")
    assert pair.optimizer.lr == 0.01
    assert composed("pair=vgg13-MobileNetV2", "arch@student=vgg8").student.name == "vgg8"


def test_both_commands_give_a_lone_network_the_same_run(composed: Compose) -> None:
    as_student = composed("method=vanilla", "arch@student=vgg8", "schedule=short")
    as_teacher = composed("arch=vgg8", "schedule=short", primary="teacher")
    assert as_student.model_dump() == as_teacher.model_dump()


def test_a_run_from_before_paraphraser_lr_is_the_same_run(
    composed: Compose, tmp_path: Path
) -> None:
    config = composed(*SMALL, "method=kd")
    result = train(config)
    (folder,) = tmp_path.glob("runs/digits/distill/*/kd/*")
    kept = (folder / "config.yaml").read_text()
    text = "".join(line for line in kept.splitlines(True) if "paraphraser_lr" not in line)
    assert text != kept
    (folder / "config.yaml").write_text(text)
    assert train(config) == result
    assert folder_of(composed(*SMALL, "method=kd", "student.paraphraser_lr=0.5")) == folder_of(
        config
    )


def test_the_error_names_the_settings_that_differ(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=vanilla")
    train(config)
    (path,) = (tmp_path / "runs").rglob("config.yaml")
    path.write_text(path.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    with pytest.raises(UserError, match=r"optimizer\.momentum \(0\.8 there, 0\.9 here\)"):
        train(config)


def test_a_tilde_in_runs_is_the_home_folder(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(composed(*SMALL, "method=vanilla", "runs='~/mine'"))  # each test has its HOME
    assert len(list((tmp_path / "mine").rglob("result.json"))) == 1
    assert not (tmp_path / "~").exists()


def test_only_one_process_works_on_a_run(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=vanilla")
    folder = run_folder(config, diff_from_recipe(config))
    with (
        Run(folder, config.model_dump()).open(),
        pytest.raises(UserError, match="another process"),
    ):
        Run(folder, config.model_dump()).open()


def test_a_file_that_disappears_is_not_taken_for_a_pipe(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that tries to lock the same folder leaves files for a moment."""
    iterdir = Path.iterdir

    def with_missing_file(path: Path) -> Any:
        yield path / ".lease.break.1.2"
        yield from iterdir(path)

    monkeypatch.setattr(Path, "iterdir", with_missing_file)
    train(composed(*SMALL, "method=vanilla", "schedule.epochs=1"))


@pytest.mark.parametrize("levels_up", [0, 1, 2, 3])
def test_a_link_below_the_runs_folder_is_refused(
    composed: Compose, tmp_path: Path, levels_up: int
) -> None:
    config = composed(*SMALL, "method=vanilla")
    folder, _ = run_location(config)
    link = [folder, *folder.parents][levels_up]
    link.parent.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".last.pt.1.part").write_text("precious")
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"{link}: is a symbolic link, which may point outside of"):
        train(config)
    assert [path.name for path in elsewhere.iterdir()] == [".last.pt.1.part"]


def test_the_runs_folder_itself_may_be_a_link(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    train(composed(*SMALL, "method=vanilla"))
    assert list((tmp_path / "elsewhere").rglob("result.json"))
    (tmp_path / "elsewhere/digits/scratch/resnet8/.old").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"\.old: is a symbolic link"):
        train(composed(*SMALL, "method=vanilla", "force=true"))


def test_a_runs_folder_that_cannot_be_written_is_named(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/runs.*cannot be written.*runs=FOLDER"):
        train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'file' / 'runs'}"))


def test_two_folders_of_images_never_share_a_run(composed: Compose, tmp_path: Path) -> None:
    arguments = ["schedule.epochs=1", "arch@student=resnet8", "arch@teacher=resnet14"]

    def config(root: Path, *more: str) -> Config:
        return composed(*arguments, "dataset=folder", f"dataset.root={root}", *more)

    one, other = write_images(tmp_path / "a", 0), write_images(tmp_path / "b", 255, count=5)
    train(config(one, "method=vanilla"))
    train(config(one, "method=vanilla", "arch@student=resnet14"))
    assert (tmp_path / "runs/photos/scratch/resnet8").is_dir()
    with pytest.raises(UserError, match=r"dataset\.digest"):
        train(config(other, "method=vanilla"))
    with pytest.raises(UserError, match=r"teacher of another configuration: dataset\.digest"):
        train(config(other, "method=kd"))
    train(config(other, "method=vanilla", "dataset.name=other_photos"))
    train(config(one, "method=kd"))


def test_a_configuration_too_long_to_be_read_again_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    longest = {"wandb": {"tags": ["a" * 100] * 600}}
    with Run(folder, longest).open():
        assert read_config_file(folder / "config.yaml") == longest
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"has \d+ bytes, but at most 65536 are read; .*wandb.tags"):
        Run(other, {"wandb": {"tags": ["a" * 100] * 700}}).open()
    assert not (other / "config.yaml").exists()
