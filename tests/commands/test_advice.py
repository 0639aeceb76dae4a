"""The lines about words of the command line that Hydra refuses, and about W&B's variables."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import Command
from hydra import compose, initialize_config_dir

import train_teacher
from sskd import CONF
from sskd.commands.advice import about_quotes, refuse_invalid_choices
from sskd.config import read_config
from sskd.errors import UserError
from sskd.tracking.environment import check_environment, hide_foreign_variables, requested_mode
from sskd.tracking.session import choose_mode, open_run


def one_line(command: Command, *words: str) -> str:
    status, out, err = command(*words, "dataset=digits")
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert not command.runs.exists()
    return err.removeprefix("error: ").strip()


# ---- characters with a meaning in Hydra ----

UNQUOTED = [
    "teacher.checkpoint=a=b.pth",
    "dataset.root=~/x=y",
    "dataset.root=~/pictures",
    "runs=~user",
    "teacher.checkpoint=epoch=12-acc=70.ckpt",
    "teacher.checkpoint=model[1].pth",
    "dataset.root=my data (1)",
    "teacher.checkpoint=it's=mine.pth",
    "wandb.entity=a=$HOME",
    "runs=a=`b`!",
]


@pytest.mark.parametrize("word", UNQUOTED)
def test_the_advised_quotes_give_the_intended_value(word: str) -> None:
    (advised,) = shlex.split(about_quotes(word).partition("Hydra: ")[2])  # as a shell reads it
    key, _, value = word.partition("=")
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student", [advised])
    for part in key.split("."):
        composed = composed[part]
    assert composed == value


def assert_advises_quotes(line: str, word: str) -> None:
    key, _, value = word.partition("=")
    assert line.endswith(about_quotes(word))
    assert f"\"{key}='{value}'\"" in line


@pytest.mark.parametrize("word", UNQUOTED[:3])
def test_an_unquoted_value_is_one_line_with_the_quotes(command: Command, word: str) -> None:
    line = one_line(command, word)
    assert line.startswith(f"{word}: cannot be read as KEY=VALUE")
    assert_advises_quotes(line, word)


@pytest.mark.parametrize("word", ["kd", "optimizer.lr=[1", "method={a: 1", "dataset.root='a", "=3"])
def test_another_word_gets_no_quotes(word: str) -> None:
    assert about_quotes(word) == ""


@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize("word", ["=x", "", " ", "+=x", "~=x", "~", "++", "=", " =1,2", "=a\nb"])
def test_a_word_without_a_key_is_quoted(command: Command, sweep: list[str], word: str) -> None:
    line = one_line(command, *sweep, word)
    assert line == f"{word!r}: should be KEY=VALUE, such as seed=1"


@pytest.mark.parametrize("word", ["runs=/tmp/a,b", "wandb.tags=a,b", "dataset.root=my data,b"])
def test_a_comma_is_a_sweep_or_a_list_or_in_the_value(command: Command, word: str) -> None:
    line = one_line(command, word)
    assert line.startswith(f"{word}: has several values; add -m ")
    assert_advises_quotes(line, word)
    (as_list,) = shlex.split(line.partition("brackets: ")[2].partition("; a value")[0])
    assert as_list == "{}=[{}]".format(*word.split("=", 1))


def test_several_options_of_a_group_are_a_sweep_alone(command: Command) -> None:
    for word in ("method=kd,at", "arch@student=vgg8,vgg13"):
        line = f"{word}: has several values; add -m to sweep over them"
        assert one_line(command, word) == line


# ---- a plus that is missing, or too many ----


@pytest.fixture
def own_groups(tmp_path: Path) -> Path:
    """Return a folder with two groups of a user."""
    for group in ("experiment", "study"):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / "mine.yaml").write_text("# @package _global_\nseed: -5\n")
    return tmp_path / "own"


@pytest.mark.parametrize("group", ["experiment", "study", "experiment@more"])
def test_a_group_that_takes_a_plus(command: Command, own_groups: Path, group: str) -> None:
    line = one_line(command, "-cd", str(own_groups), f"{group}=mine")
    assert line.startswith(f"{group}: no option of this group is chosen yet; add it with a plus")
    assert line.endswith(f"+{group}=mine")


def test_with_the_plus_it_is_read(command: Command, own_groups: Path) -> None:
    line = one_line(command, "-cd", str(own_groups), "+experiment=mine")
    assert line == "seed: should be greater than or equal to 0 (got -5)"


@pytest.mark.parametrize("words", [
    ("arch@student=vgg8", "student.paraphraser_lr=0.1"),
    ("arch@teacher=vgg13", "teacher.paraphraser_lr=0.1"),
    ("arch@student=ShuffleV1", "student.paraphraser_lr=null"),
])  # fmt: skip
def test_a_setting_that_takes_a_plus(command: Command, words: tuple[str, ...]) -> None:
    key, word = words[-1].partition("=")[0], words[-1]
    assert one_line(command, *words) == (
        f"{key}: is not in the chosen files; add it with a plus: +{word}"
    )


@pytest.mark.parametrize("word", [
    "+optimizer.lr=0.1", "+seed=1", "+method.weights.kd=0.5", "+method=kd", "+pair=vgg13-vgg8",
    "++method=kd", "+schedule=short",
])  # fmt: skip
def test_a_plus_too_many(command: Command, word: str) -> None:
    line = one_line(command, word)
    assert line.endswith(f"; write it without a plus: {word.lstrip('+')}")


def test_a_setting_of_another_option_takes_no_plus(command: Command) -> None:
    line = one_line(command, "optimizer=adamw", "optimizer.momentum=0.9")
    assert line.startswith("optimizer.momentum: no such setting")
    assert "plus" not in line


@pytest.mark.parametrize("words", [
    ("kd_weight=0",), ("kd_weight=1", "method=at"), ("kd_weight=0.5",), ("-m", "kd_weight=0,1"),
    ("+kd_weight=1",), ("++kd_weight=0.5",), ("method.kd_weight=0",), ("+method.kd_weight=0",),
])  # fmt: skip
def test_a_setting_that_has_another_name_now(command: Command, words: tuple[str, ...]) -> None:
    key = words[-1].partition("=")[0].lstrip("+") if words[0] != "-m" else "kd_weight"
    key = "kd_weight" if "method=at" in words else key
    assert one_line(command, *words) == (
        f"{key}: no longer exists; use weighting=crd_benchmark for 0, weighting=common for 1, or "
        "method.weights.ce=1 method.weights.kd=VALUE for another value"
    )


@pytest.mark.parametrize("word", [
    "weighting=null", "weighting=0.1", "weighting=[sskd,common]", "~weighting", "weighting=[]",
    "method=[kd,at]", "optimizer=1", "schedule=true", "dataset={a: 1}", "arch@teacher=null",
    "arch@student=[vgg8,vgg13]", "~optimizer", "+method=[kd,at]", "pair=null",
])  # fmt: skip
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_the_choice_of_a_group_is_one_option(command: Command, sweep: list[str], word: str) -> None:
    line = one_line(command, *sweep, "seed=0", word)
    assert line.startswith(f"{word}: ")
    group = word.lstrip("+~").partition("=")[0]
    assert f"{group} needs one option (there are: " in line
    assert f"-m {group}=OPTION,OPTION" in line


def test_the_options_of_a_group_include_the_users_own(command: Command, tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("name: mine\n")
    line = one_line(command, "--config-dir", str(tmp_path), "method=[a]")
    assert ", luminet, mine, mlld, " in line


def test_a_group_of_the_user_may_replace_one() -> None:
    refuse_invalid_choices(["~method", "+method=mine", "~pair", "method=kd,at", "dataset=cifar100"])
    refuse_invalid_choices(
        ["hydra/launcher=joblib", "seed=1", "-m", "method.weights.ce=null", "x=[1]"]
    )


def test_train_teacher_names_the_command_with_the_group(command: Command) -> None:
    for word in ("weighting=common", "pair=vgg13-vgg8"):
        status, _, err = command("arch=vgg8", word, script=train_teacher)
        assert (status, err.count("\n")) == (1, 1)
        assert f"{word.partition('=')[0]}: is a group of train_student.py" in err


@pytest.mark.parametrize("method", ["kd", "sskd", "vanilla"])
@pytest.mark.parametrize("word", ["weighting=common", "weighting=sskd", "weighting.kd=0.5"])
def test_a_weighting_without_an_effect_is_reported(
    command: Command, method: str, word: str
) -> None:
    """A run that ends at once: its teacher, or the data of one without, is missing."""
    words = ("dataset=cifar100", "dataset.download=false", "dataset.root=/nonexistent")
    status, out, _ = command(*words, f"method={method}", word)
    assert status == 1
    (line,) = (line for line in out.splitlines() if "no effect" in line)
    assert line.startswith(
        f"{word}: has no effect on method={method}, which has weights of its own"
    )


def test_a_weighting_with_an_effect_is_not_reported(command: Command) -> None:
    words = ("dataset=cifar100", "dataset.download=false", "dataset.root=/nonexistent")
    for more in (["method=at", "weighting=common"], ["method=kd"], ["method=kd", "wandb.tags=[a]"]):
        status, out, _ = command(*words, *more)
        assert status == 1
        assert "no effect" not in out


def test_train_teacher_reports_a_plus_too(command: Command) -> None:
    status, _, err = command("arch=vgg8", "+seed=1", script=train_teacher)
    assert (status, err.count("\n")) == (1, 1)
    assert "seed: already exists; write it without a plus: seed=1" in err


# ---- W&B's variables ----

WRONG = [
    ("WANDB_MODE", "onlin", "should be 'online', 'offline', "),
    ("WANDB_BASE_URL", "garbage", "should be a valid URL"),
    ("WANDB_FINISH_TIMEOUT", "soon", "should be a number of seconds"),
    ("WANDB_FINISH_TIMEOUT", "nan", "should be a number of seconds"),
    ("WANDB_FINISH_TIMEOUT", "-3", "should be a number of seconds"),
    ("WANDB_FINISH_TIMEOUT", "1e300", "should be a number of seconds"),
    ("WANDB_PROJECT", "a/b", "cannot contain"),
    ("WANDB_RUN_ID", "a/b", "cannot contain"),
    ("WANDB_INIT_TIMEOUT", "abc", "should be a number of seconds"),
    ("WANDB_INIT_TIMEOUT", "-1", "should be a number of seconds"),
    ("WANDB_INIT_TIMEOUT", "0", "should be a number of seconds, 1 to"),
    ("WANDB_CONSOLE", "loud", "should be 'auto', 'off', "),
    ("WANDB_RESUME", "maybe", "should be 'allow', 'must', "),
    ("WANDB_SILENT", "perhaps", "should be a valid boolean"),
    ("WANDB_TAGS", "a,,b", "empty"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_variable_that_wandb_cannot_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_environment("auto")
    line = str(caught.value)
    assert line.startswith(f"{name}={value}: ")
    assert message in line
    assert "\n" not in line
    check_environment("disabled")  # what the line advises


def test_the_value_of_a_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, environ: dict[str, str]) -> None:
        if "WANDB_API_KEY" in environ:
            raise ValueError("should have 40 characters")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    monkeypatch.setattr(wandb.Settings, "update_from_env_vars", refuse)
    with pytest.raises(UserError, match=r"^WANDB_API_KEY: should have 40") as caught:
        check_environment("auto")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [WRONG[0][:2], WRONG[1][:2], WRONG[2][:2]])
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_it_is_reported_before_anything_is_trained(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sweep: list[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    words = ["arch@student=resnet8", "arch@teacher=resnet8", "teacher.train=true", "method=kd"]
    assert one_line(command, *sweep, *words).startswith(f"{name}={value}: ")


def test_the_environment_sets_how_long_wandb_may_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings: list[wandb.Settings] = []

    def init(**words: Any) -> None:
        settings.append(words["settings"])
        raise wandb.Error("stops here")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    with pytest.raises(UserError, match="stops here"):
        open_run("offline", tmp_path, "name")
    assert {(found.init_timeout, found.finish_timeout) for found in settings} == {(7, 3)}


EMPTY = ["MODE", "PROJECT", "ENTITY", "BASE_URL", "FINISH_TIMEOUT", "RUN_ID", "TAGS", "SILENT"]


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(f"WANDB_{name}", "")
    check_environment("auto")
    assert requested_mode("auto") == "auto"
    with hide_foreign_variables("auto", under_agent=False):
        assert f"WANDB_{name}" not in os.environ
        assert choose_mode("auto") == "offline"  # there is no login


def test_a_wrong_mode_in_the_configuration_is_its_error() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student", ["wandb.mode=onlin"])
    with pytest.raises(UserError, match=r"^wandb\.mode: should be "):
        read_config(composed)
