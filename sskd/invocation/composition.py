"""Composing configurations inside a command, from the suite's files and the user's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sskd import CONF
from sskd.overrides import as_override

_SEARCH_PATH = "hydra.searchpath"


def compose_config(
    primary: str, overrides: Iterable[str], folders: Iterable[Path] = ()
) -> DictConfig:
    """Return the configuration ``primary`` (``student`` or ``teacher``) with ``overrides``.

    Inside a training command, its ``--config-dir`` and ``hydra.searchpath`` are searched too.

    Args:
        folders: more folders of configuration files.
    """
    paths = [f"file://{folder.absolute()}" for folder in folders]
    if HydraConfig.initialized():
        paths.extend(HydraConfig.get().searchpath)
    words = [*overrides, *([as_override(_SEARCH_PATH, paths)] if paths else [])]
    if GlobalHydra.instance().is_initialized():
        return compose(primary, words)
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(primary, words)


def search_path_words() -> list[str]:
    """Return the words of this command that add folders of configuration files."""
    if not HydraConfig.initialized():
        return []
    words, added = [], []
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            words += ["-cd", source.path]
        elif source.provider == f"{_SEARCH_PATH} in command-line":
            added.append(f"{source.schema}://{source.path}")
    return [*words, *([as_override(_SEARCH_PATH, added)] if added else [])]
