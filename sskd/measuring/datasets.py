"""The dataset on which networks are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sskd.config import read_config
from sskd.data import DatasetSettings, Images, load_images
from sskd.device import choose_device, tune_device
from sskd.errors import UserError
from sskd.invocation.composition import compose_config
from sskd.trained import TrainedNetwork

# Settings of a dataset that do not change its images.
PLACES = ("root", "name", "download", "packed", "workers", "in_memory_gib")


def compose_dataset(overrides: Sequence[str], folders: Sequence[Path] = ()) -> DatasetSettings:
    """Return the settings of the dataset that ``overrides`` choose.

    Raises:
        UserError: one of them is no choice of a dataset.
    """
    for word in overrides:
        if not word.startswith(("dataset=", "dataset.")):
            raise UserError(
                f"'{word}': is neither a trained network nor a choice of the dataset; give "
                "networks first, then dataset=NAME and dataset.KEY=VALUE"
            )
    composed = compose_config("student", ["method=vanilla", *overrides], folders)
    settings: DatasetSettings = read_config(composed).dataset
    return settings


def choose_dataset(
    networks: Sequence[TrainedNetwork], overrides: Sequence[str], folders: Sequence[Path] = ()
) -> DatasetSettings:
    """Return the dataset that ``overrides`` choose, or else that of the training of ``networks``.

    Raises:
        UserError: they choose none, and the networks were trained on several.
    """
    if any(word.startswith("dataset=") for word in overrides):
        return compose_dataset(overrides, folders)
    first, *others = networks
    for each in others:
        if _images_of(each.dataset) != _images_of(first.dataset):
            raise UserError(
                f"{each.path} was trained on {each.dataset.name}, {first.path} on "
                f"{first.dataset.name}; name the dataset to measure on with dataset=NAME"
            )
    return TrainedNetwork(first.path, overrides=overrides, folders=folders).dataset


def dataset_text(settings: DatasetSettings, overrides: Sequence[str]) -> str:
    """Return the dataset's name and, in parentheses, how ``overrides`` change its images."""
    changes = [word.removeprefix("dataset.") for word in overrides if word.startswith("dataset.")]
    shown = sorted(word for word in changes if word.partition("=")[0] not in PLACES)
    return f"{settings.name} ({', '.join(shown)})" if shown else settings.name


def _images_of(settings: DatasetSettings) -> tuple[str, str, int, str]:
    return settings.source, settings.name, settings.size, settings.crop


def normalised_for(network: TrainedNetwork, images: Images) -> Images:
    """Return ``images`` with the normalisation that ``network`` was trained with."""
    mean, std = network.normalisation
    return replace(images, mean=mean, std=std)


def load_for_measuring(
    settings: DatasetSettings, networks: Sequence[TrainedNetwork], device: str
) -> Images:
    """Return the images of ``settings`` on ``device``.

    Each of ``networks`` is loaded first, so that a wrong file ends a command before long work.

    Raises:
        UserError: a network or the dataset cannot be loaded, or there is no such device.
    """
    chosen = choose_device(device)
    tune_device(chosen)
    for each in networks:
        each.network  # noqa: B018
    return load_images(settings).to(chosen)
