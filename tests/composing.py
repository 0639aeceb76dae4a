"""Composing the suite's own configuration in a fifth of the usual time.

Hydra reads about twenty files for each composition, and the tests compose thousands of times. The
same choices of groups give the same files in the same order, so that only the values that a test
sets are applied again. What Hydra composes from a folder of a test is never kept.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal import config_loader_impl as loading
from hydra._internal import defaults_list as listing
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, base

from sskd import CONF

OWN_FOLDERS = (CONF, CONF.parent / "sweeps")
Compose = Callable[..., DictConfig]


def install() -> None:
    """Let this process merge the suite's files once for each choice of groups from now on."""
    loader = loading.ConfigLoaderImpl
    ConfigRepository.load_config = _read_once(  # type: ignore[method-assign]
        ConfigRepository.load_config
    )
    listing._create_interpolation_map = _if_needed(listing._create_interpolation_map)
    loading.create_defaults_list = _ordered_once(loading.create_defaults_list)
    loader._compose_config_from_defaults_list = _merged_once(  # type: ignore[method-assign]
        loader._compose_config_from_defaults_list
    )
    base.parse = cache(base.parse)  # the same interpolations are in all configurations
    base.Metadata.__deepcopy__ = _copy_of_metadata  # type: ignore[attr-defined]
    # Each composition would copy all that is stored, though a reader of an entry gets a copy.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def _read_once(read: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``read``, which reads a file, with a memory of its results."""
    known: dict[str, Any] = {}

    def reads(repo: Any, config_path: str) -> Any:
        state = _state(repo)
        if state is None:
            return read(repo, config_path)
        key = repr((state, config_path))
        if key not in known:
            known[key] = read(repo, config_path)
        return copy.deepcopy(known[key])

    return reads


def _if_needed(map_choices: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Return ``map_choices``, whose result only an interpolation in a list of defaults reads."""

    def mapped(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
        if any("$" in str(vars(each)) for each in defaults_list):
            return map_choices(overrides, defaults_list, self_added)
        return DictConfig({})

    return mapped


def _ordered_once(
    order: Callable[..., listing.DefaultsList],
) -> Callable[..., listing.DefaultsList]:
    """Return ``order``, which finds the files to merge, with a memory of its results."""
    known: dict[str, listing.DefaultsList] = {}

    def ordered(
        repo: Any, config_name: str | None, overrides_list: list[Any], **flags: bool
    ) -> listing.DefaultsList:
        given = {"repo": repo, "config_name": config_name, **flags}
        state = _state(repo)
        if state is None:
            return order(overrides_list=overrides_list, **given)
        overrides = listing.Overrides(repo=repo, overrides_list=overrides_list)
        values, overrides.config_overrides = overrides.config_overrides, []
        key = repr((state, config_name, flags, vars(overrides)))
        if key not in known:
            groups = [each for each in overrides_list if all(each is not own for own in values)]
            known[key] = order(overrides_list=groups, **given)
        found = copy.copy(known[key])
        found.config_overrides = values
        return found

    return ordered


def _merged_once(merge: Compose) -> Compose:
    """Return ``merge``, which merges the files in their order, with a memory of its results."""
    known: dict[str, DictConfig] = {}

    def merged(loader: Any, defaults: list[Any], repo: Any) -> DictConfig:
        state = _state(repo)
        if state is None:
            return merge(loader, defaults=defaults, repo=repo)
        key = repr((state, defaults))
        if key not in known:
            known[key] = merge(loader, defaults=defaults, repo=repo)
        return copy.deepcopy(known[key])

    return merged


def _copy_of_metadata(metadata: base.Metadata, memo: dict[int, Any]) -> base.Metadata:
    """Return a deep copy; ``copy.deepcopy`` takes ten times as long, and each node has metadata."""
    copied = object.__new__(type(metadata))
    vars(copied).update(vars(metadata))
    copied.flags = None if metadata.flags is None else dict(metadata.flags)
    if metadata.resolver_cache:
        copied.resolver_cache = copy.deepcopy(metadata.resolver_cache, memo)
    else:
        copied.resolver_cache = defaultdict(dict)
    return copied


def _state(repo: Any) -> str | None:
    """Return what identifies all that Hydra reads; None if that may change during the tests."""
    if not all(_is_constant(source) for source in repo.get_sources()):
        return None
    return repr((repo.get_sources(), list(_names(ConfigStore.instance().repo)), version.getbase()))


def _is_constant(source: Any) -> bool:
    if source.scheme() == "file":
        return Path(source.path) in OWN_FOLDERS
    return source.scheme() == "structured" or source.path.partition(".")[0] == "hydra"


def _names(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the entries that plugins and tests have stored, by group."""
    for name, entry in stored.items():
        yield name
        if isinstance(entry, dict):
            yield from _names(entry)
