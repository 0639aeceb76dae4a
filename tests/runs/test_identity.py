"""Which settings make another run, and which are only another way to write the same run."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Compose, SmallTeacher
from crashes import CrashError, at_step, crash
from faults import SMALL
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sskd import CONF
from sskd.commands.sweep import Sweep
from sskd.config import Config
from sskd.data import Images
from sskd.models import build_model
from sskd.runs.comparison import explain_difference
from sskd.runs.folder import run_folder
from sskd.runs.identity import decides_result, full_config
from sskd.runs.recipe import diff_from_recipe, earlier_diffs_from_recipe
from sskd.teachers.find import missing_teacher, run_location
from sskd.train import train
from sskd.training.result import _circumstances

WITHOUT_TEACHER_RUN = [item for item in SMALL if not item.startswith("teacher.train")]


def folder_of(config: Config) -> Path:
    return run_location(config)[0]


@pytest.mark.parametrize(
    ("words", "setting"),
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
def test_a_default_that_is_typed_changes_nothing(
    composed: Compose, words: list[str], setting: str
) -> None:
    without, given = composed(*words), composed(*words, setting)
    assert diff_from_recipe(given) == diff_from_recipe(without)
    assert folder_of(given) == folder_of(without)
    one, other = missing_teacher(given), missing_teacher(without)
    assert one
    assert other
    assert one.model_dump() == other.model_dump()


@pytest.mark.parametrize(
    "setting",
    ["teacher.epochs=24", "teacher.precision=bf16", "teacher.epoch=last", "teacher.seed=1",
     "teacher.fraction=0.5", "teacher.label_noise=0.1", "teacher.base_lr=0.1"],
)  # fmt: skip
def test_another_teacher_run_makes_another_student_run(composed: Compose, setting: str) -> None:
    key, _, value = setting.partition("=")
    changed = diff_from_recipe(composed(setting))
    assert list(changed) == [key]
    assert str(changed[key]) == value
    assert earlier_diffs_from_recipe(composed(setting)) == [changed]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("best", "last"):
        torch.save(build_model("resnet14", 10).state_dict(), folder / f"{name}.pth")
    return str(folder / "best.pth")


@pytest.mark.parametrize(
    "setting",
    ["teacher.epoch=last", "teacher.epochs=5", "teacher.precision=bf16", "teacher.seed=3",
     "teacher.fraction=0.5", "teacher.label_noise=0.1", "teacher.base_lr=0.3"],
)  # fmt: skip
def test_teacher_settings_beside_a_file_do_not_count(
    composed: Compose, checkpoint: str, setting: str
) -> None:
    words = [*WITHOUT_TEACHER_RUN, "method=kd", f"teacher.checkpoint={checkpoint}"]
    assert run_location(composed(*words, setting)) == run_location(composed(*words))
    assert list(run_location(composed(*words))[1])[-1] == "teacher.digest"


def test_the_epoch_chooses_the_file_in_a_teacher_folder(composed: Compose, checkpoint: str) -> None:
    words = [*WITHOUT_TEACHER_RUN, "method=kd", f"teacher.checkpoint={Path(checkpoint).parent}"]
    best, last = (
        run_location(composed(*words, f"teacher.epoch={epoch}")) for epoch in ("best", "last")
    )
    assert best != last
    assert best[1].keys() == last[1].keys()
    of_file = [*WITHOUT_TEACHER_RUN, "method=kd", f"teacher.checkpoint={checkpoint}"]
    assert run_location(composed(*of_file)) == best


# ``seed0-`` and 8 hex digits of {"teacher.epochs": 240}, as earlier versions named the folder.
EARLIER = "seed0-575746df"


def write_config(folder: Path, config: Config) -> None:
    """Write ``config.yaml`` into ``folder``, as a run of ``config`` does when it starts."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(full_config(config, "0" * 64)))


def test_a_folder_that_an_earlier_version_named_is_found(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("teacher.epochs=240")
    earlier = folder_of(config).parent / EARLIER
    write_config(earlier, config)
    assert folder_of(config) == earlier
    folder_of(composed("seed=1")).parent.joinpath("seed0").mkdir()
    assert folder_of(config).name == "seed0"

    given = composed(*SMALL, "method=kd", "teacher.epochs=3")
    result = train(composed(*SMALL, "method=kd"))
    (named,) = earlier_diffs_from_recipe(given)
    older = run_folder(given, named)
    folder_of(given).rename(older)
    config_file = older / "config.yaml"
    text = config_file.read_text()
    config_file.write_text(text.replace("  epochs: null\n", "  epochs: 3\n", 1))
    assert config_file.read_text() != text
    capsys.readouterr()
    assert result.threads == torch.get_num_threads()
    assert train(given) == result
    assert f"{older}: already finished" in capsys.readouterr().out


BENCHMARK = ("weighting=crd_benchmark", "teacher.epoch=last")


# The difference from CE + KD (1, 1), of whose hash earlier versions made the folder's name.
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("method=fitnet", "weighting=common"), ""),
        (("method=ab", "method.weights.ce=1", "method.weights.kd=1"), ""),
        (("method=crd", *BENCHMARK), '{"method.weights.kd": 0.0, "teacher.epoch": "last"}'),
        (("method=nst", *BENCHMARK), '{"method.weights.kd": 0.0, "teacher.epoch": "last"}'),
        (("method=fsp", "weighting=common", "teacher.epochs=240"), '{"teacher.epochs": 240}'),
        (("method=vid",), '{"method.weights.ce": 0.1, "method.weights.kd": 0.9}'),
    ],
)
def test_a_run_of_the_first_recipe_is_found(
    composed: Compose, words: tuple[str, ...], named: str
) -> None:
    config = composed(*words)
    today = folder_of(config)
    digits = f"-{hashlib.sha256(named.encode()).hexdigest()[:8]}" if named else ""
    older = today.parent / f"seed0{digits}"
    assert older != today
    write_config(older, config)
    assert run_location(config) == (older, diff_from_recipe(config))
    today.mkdir()
    assert folder_of(config) == today


@pytest.mark.parametrize("content", ["weighting=sskd", "method.weights.fitnet=50", "{", ""])
def test_an_earlier_name_may_belong_to_another_run(composed: Compose, content: str) -> None:
    config = composed("method=fitnet", "weighting=common")
    today = folder_of(config)
    older = today.parent / "seed0"
    write_config(older, composed("method=fitnet", content) if "=" in content else config)
    if "=" not in content:
        (older / "config.yaml").write_text(content)
    assert folder_of(config) == today


def test_a_link_with_an_earlier_name_is_ignored(composed: Compose, tmp_path: Path) -> None:
    config = composed("method=fitnet", "weighting=common")
    today = folder_of(config)
    write_config(tmp_path / "elsewhere", config)
    today.parent.mkdir(parents=True)
    (today.parent / "seed0").symlink_to(tmp_path / "elsewhere")
    assert folder_of(config) == today


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_of_the_first_recipe_is_not_trained_again(
    composed: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_teacher: SmallTeacher,
    stopped: bool,
) -> None:
    small_teacher.put(tmp_path / "runs")
    config = composed(*SMALL, "method=at", "weighting=common", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        if stopped:
            at_step(patch, 7, crash)
        with pytest.raises(CrashError) if stopped else nullcontext():
            train(config)
    today = folder_of(config)
    # In the first recipe, CE + KD (1, 1) was the default.
    without_weights = {k: v for k, v in diff_from_recipe(config).items() if "weights" not in k}
    older = today.rename(run_folder(config, without_weights))
    capsys.readouterr()
    train(config)
    out = capsys.readouterr().out
    assert f"{older}: {'last top-1' if stopped else 'already finished'}" in out
    assert ("resumes in" in out) == stopped
    assert not today.exists()


@pytest.mark.parametrize("order", [("sskd", "common"), ("common", "sskd")])
def test_a_sweep_of_both_weightings_keeps_both_jobs(
    composed: Compose, tmp_path: Path, order: tuple[str, str]
) -> None:
    config = composed("method=fitnet", "weighting=common")
    write_config(folder_of(config).parent / "seed0", config)
    with initialize_config_dir(str(CONF), version_base=None):
        words = [f"runs={tmp_path / 'runs'}", "method=fitnet"]
        jobs = Sweep(
            [[f"weighting={name}"] for name in order],
            lambda overrides: compose("student", [*words, *overrides], return_hydra_config=True),
        ).jobs
    assert [job.config.model_dump()["method"]["weights"]["kd"] for job in jobs] == [
        {"sskd": 0.9, "common": 1.0}[name] for name in order
    ]


@pytest.mark.parametrize("more", [0, 1])
def test_the_number_of_threads_is_in_the_result(few_images: Images, more: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + more)
    try:
        assert _circumstances(few_images)["threads"] == threads + more
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "found",
    [
        {"batch_size": "x" * 50_000},
        {"batch_size": 1 << 20_000},
        {"x" * 50_000: 1},
        {f"k{number}": 1 for number in range(10_000)},
    ],
)
def test_a_long_difference_is_shortened(found: dict[str, object]) -> None:
    message = explain_difference(found, {"batch_size": 64})
    assert "batch_size (" in message
    assert len(message) < 1000


def test_a_digest_that_differs_is_not_shortened() -> None:
    one, other = (hashlib.sha256(text).hexdigest() for text in (b"one", b"other"))
    message = explain_difference({"dataset": {"digest": one}}, {"dataset": {"digest": other}})
    assert message == f"dataset.digest ('{one}' there, '{other}' here)"


def test_some_settings_do_not_decide_a_result() -> None:
    keys = ("wandb.mode", "dataset.root", "device", "dataset", "dataset.fraction", "precision")
    assert [key for key in keys if decides_result(key)] == [*keys[3:]]
