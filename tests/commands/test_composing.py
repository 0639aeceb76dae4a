"""What the tests compose from memory (composing.py) equals what Hydra composes from the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import composing
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from sskd import CONF


@contextmanager
def nothing_kept() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing, "_state", lambda repo: None)
        yield


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("student", list(words), return_hydra_config=True)


@pytest.mark.parametrize(
    "words",
    [
        ("method=crd", "pair=vgg13-vgg8", "seed=3"),
        ("method=crd", "pair=vgg13-vgg8", "seed=4", "+new.key=1"),
        ("dataset=digits", "arch@student=resnet8", "~schedule.milestones", "weighting=sskd"),
    ],
)
def test_it_equals_what_hydra_composes(words: tuple[str, ...]) -> None:
    with nothing_kept():
        expected = composed(*words)
    for _ in range(2):
        found = composed(*words)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(found)
        with open_dict(found):
            found.method.changed = True  # must not change what is kept


@pytest.mark.parametrize("word", ["method=unknown", "weigthing=sskd", "+method=kd", "seed"])
def test_errors_are_those_of_hydra(word: str) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(HydraException) as raised:
            composed(word)
        messages.append(str(raised.value))
    with nothing_kept(), pytest.raises(HydraException) as raised:
        composed(word)
    assert messages == 2 * [str(raised.value)]


def test_a_folder_of_a_test_is_read_each_time(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    words = ("method=own", f"hydra.searchpath=[file://{tmp_path}]")
    for name in ("first", "second"):
        (tmp_path / "method/own.yaml").write_text(f"name: {name}\n")
        assert composed(*words).method.name == name
    (tmp_path / "method/own.yaml").unlink()
    with pytest.raises(ConfigCompositionException, match="method/own"):
        composed(*words)
