"""Trained networks: the weights of a run or of any file, and the dataset of their training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from sskd import CONF
from sskd.config import read_config
from sskd.data import SOURCES, DatasetSettings, Images, load_images
from sskd.errors import UserError
from sskd.files import safe_join
from sskd.invocation.composition import compose_config
from sskd.models import build_model, find_checkpoint, load_weights, read_checkpoint, recognise
from sskd.output import complain
from sskd.overrides import as_override, flatten
from sskd.runs.folder import read_config_file
from sskd.runs.names import CONFIG
from sskd.teachers.assembly import assemble


class TrainedNetwork:
    """A trained network and its dataset, each read when it is first asked for.

    If the folder of the checkpoint contains a run's config.yaml, the dataset is that of the run,
    else CIFAR-100.

    Args:
        checkpoint: a file, or a folder that holds one.
        arch: the name of its architecture; None: recognised by its tensors.
        overrides: choices of the dataset, as for the training commands.
        folders: folders with configuration files in addition to those of the suite.

    Attributes:
        path: the file of the weights.
        dataset: the settings of its dataset.

    Raises:
        UserError: there is no such checkpoint, its run's config.yaml is not one of this suite, or
            the run was trained on another dataset than the one chosen.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        arch: str | None = None,
        overrides: Sequence[str] = (),
        folders: Sequence[Path] = (),
    ) -> None:
        self.path = find_checkpoint(str(checkpoint))
        self._arch, self._folders = arch, folders
        choices = ["method=vanilla", *_dataset_of_run(self.path, overrides), *overrides]
        self.dataset: DatasetSettings = read_config(
            compose_config("student", choices, folders)
        ).dataset

    @cached_property
    def images(self) -> Images:
        """The images of its dataset, on the CPU."""
        images = load_images(self.dataset)
        if _recorded_dataset(self.path).get("digest") not in (None, images.digest):
            complain(
                f"warning: {self.path}: the images in {self.dataset.root} may not be those of the "
                "training: config.yaml states another dataset.digest; set dataset.root to the "
                "folder of those images"
            )
        return images

    @property
    def held_out_by_run(self) -> bool:
        """Whether its run left the images of ``dataset.holdout`` out of its training."""
        recorded = _recorded_dataset(self.path)
        chosen = (self.dataset.holdout, self.dataset.seed)
        return (recorded.get("holdout"), recorded.get("seed")) == chosen and chosen[0] > 0

    @cached_property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and the standard deviation of its inputs, for each channel, in [0, 1].

        Images are only read if the settings of the dataset do not have them.
        """
        mean, std = self.dataset.mean, self.dataset.std
        if mean is not None and std is not None:
            return tuple(mean), tuple(std)
        return self.images.mean, self.images.std

    @property
    def name(self) -> str:
        """What the network is: its architecture, or which student and method deploy it."""
        return self._built.name

    @property
    def network(self) -> nn.Module:
        """The network with its weights, in eval mode; its forward returns ``Features``."""
        return self._built.network

    @property
    def classes(self) -> int:
        """The number of its logits."""
        return self._built.classes

    @property
    def stated(self) -> float | None:
        """The accuracy in percent that the file states, if it does."""
        return self._built.stated

    def require_own_classes(self) -> None:
        """Raise UserError if the dataset has another number of classes than the network."""
        if self.classes != self.images.num_classes:
            found, needed = self.images.num_classes, self.classes
            raise UserError(
                f"{self.path} holds a {self.name} with {needed} classes, but {self.images.name} "
                f"has {found}: name a dataset with {needed} classes"
            )

    @cached_property
    def _built(self) -> _Built:
        name, network, classes = self._build()
        stated = load_weights(network, self.path).accuracy
        return _Built(name, network.eval(), classes, stated)

    def _build(self) -> tuple[str, nn.Module, int]:
        """Return the name, the network without its weights, and its classes."""
        if self._arch:
            classes = self.images.num_classes
            return self._arch, build_model(self._arch, classes, self.dataset.size), classes
        if recognised := recognise(read_checkpoint(self.path).state):
            name, classes = recognised
            return name, build_model(name, classes, self.dataset.size), classes
        if choices := _assembly_of_run(self.path):
            config = read_config(compose_config("student", choices, self._folders))
            name = f"{config.student.name} as method={config.method.name} deploys it"
            return name, assemble(config, self.images).deployed, self.images.num_classes
        raise UserError(
            f"{self.path}: its architecture is not recognised; give its name with --arch NAME"
        )


class _Built(NamedTuple):
    name: str
    network: nn.Module
    classes: int
    stated: float | None


def _assembly_of_run(checkpoint: Path) -> list[str]:
    """Return overrides that choose the networks and the method of a student's run.

    ``checkpoint`` is in the folder of the run; the list is empty if it is not. The run may be
    untrusted: its settings are checked like those of a command line.
    """
    path = checkpoint.parent / CONFIG
    values = read_config_file(path) if path.exists() else {}
    groups = {key: values[key] for key in ("student", "teacher", "method") if key in values}
    named = {key: each["name"] for key, each in groups.items() if _has_name(each)}
    if len(named) < 3:
        return []
    settings = flatten({"method": groups["method"]})
    del settings["method.name"]
    if not all(map(_is_plain, settings.values())):
        raise UserError(f"{path}: the settings of the method are not plain values")
    words = [f"arch@{role}={named[role]}" for role in ("student", "teacher")]
    words += [f"method={named['method']}"]
    return [*words, *(as_override(key, value) for key, value in settings.items())]


def _has_name(group: object) -> TypeGuard[dict[str, Any]]:
    """Return whether ``group`` is a part of a configuration with a name that needs no quotes."""
    name = group.get("name") if isinstance(group, dict) else None
    return isinstance(name, str) and re.fullmatch(r"\w+", name) is not None


# A run that may be untrusted must not choose where files are written.
_NOT_TAKEN = ("digest", "download", "packed")


def _dataset_of_run(checkpoint: Path, overrides: Sequence[str]) -> list[str]:
    """Return overrides that choose the dataset of the run whose folder holds ``checkpoint``.

    They come before those of the user, ``overrides``.

    The run may be untrusted, so nothing is downloaded to its root and no interpolation resolved.
    Empty if the folder is not a run's folder.

    Raises:
        UserError: its config.yaml chooses no dataset of this suite, or the user another one.
    """
    path = checkpoint.parent / CONFIG
    if not path.exists():
        return []
    dataset = read_config_file(path).get("dataset")
    if not isinstance(dataset, dict) or dataset.get("source") not in list(SOURCES):
        raise UserError(f"{path}: names no dataset; it is not a run's configuration")
    for override in overrides:
        if override.startswith("dataset=") and _source_of(override) != dataset["source"]:
            raise UserError(
                f"{path}: the run was trained on {dataset['source']}, and {override} names other "
                "data; leave it out, or copy the checkpoint out of the run's folder"
            )
    settings = {key: value for key, value in dataset.items() if key not in _NOT_TAKEN}
    for key, value in settings.items():
        if key not in DatasetSettings.model_fields or not _is_plain(value):
            raise UserError(f"{path}: dataset.{key} is not a setting of a run's dataset")
    # With two pluses, because the dataset's YAML file may lack a setting that has a default.
    values = [as_override(f"++dataset.{key}", value) for key, value in settings.items()]
    return [f"dataset={dataset['source']}", "dataset.download=false", *values]


def _recorded_dataset(checkpoint: Path) -> dict[str, Any]:
    """Return the dataset in the configuration of the run of ``checkpoint``; empty without one."""
    path = checkpoint.parent / CONFIG
    dataset = read_config_file(path).get("dataset") if path.exists() else None
    return dataset if isinstance(dataset, dict) else {}


def _source_of(override: str) -> str:
    """Return the source of the data that ``dataset=NAME`` chooses."""
    name = override.partition("=")[2]
    path = safe_join(CONF / "dataset", f"{name}.yaml")
    return str(read_config_file(path).get("source")) if path.is_file() else name


def _is_plain(value: object) -> bool:
    """Return whether ``value`` is a plain value, not an interpolation."""
    parts = value if isinstance(value, list) else [value]
    plain = all(part is None or isinstance(part, bool | int | float | str) for part in parts)
    return plain and "${" not in str(value)
