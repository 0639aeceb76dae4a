"""The settings of datasets, the digits, and the selection of a part of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Compose
from pydantic import ValidationError
from sklearn.datasets import load_digits

from sskd.data import SOURCES, DatasetSettings, Images, LabelledImages, Split, load_images
from sskd.data.images import add_label_noise, channel_statistics, hold_out, keep_fraction
from sskd.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
COUNTS = [40, 25, 10, 3]
CLASSES = ("a", "b", "c", "d")


def settings(name: str, **changes: Any) -> DatasetSettings:
    """Return the settings in the real YAML file, with changes."""
    return DatasetSettings(**{**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **changes})


def settings_of(name: str) -> set[str]:
    """Return the settings that have an effect on a dataset."""
    crops = SOURCES[name].crops
    other = set() if "resized" in crops else {"crop", "packed", "workers"}
    if len(crops) < 2:
        other.add("in_memory_gib")
    return set(DatasetSettings.model_fields) - other


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_yaml_shows_every_setting(name: str) -> None:
    shown = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert shown["source"] == name
    assert set(shown) == settings_of(name)
    DatasetSettings(**shown)


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"label_noise": 1.0},
        {"label_noise": -0.1},
        {"holdout": 1.0},
        {"size": 31},
        {"size": 257},
        {"mean": [0.5, 0.5]},
        {"std": [0.5, 0.5, 0.0]},
        {"std": [0.5, 0.5, float("nan")]},
        {"seed": -1},
        {"seed": "0"},
        {"download": "yes"},
        {"fractoin": 0.5},
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        settings("digits", **change)


def train_split() -> Split:
    """Return images that hold their position in a pixel; the classes differ in size."""
    labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels), dtype=torch.uint8)
    return Split(images, labels)


def positions(split: LabelledImages) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def class_counts(split: LabelledImages) -> list[int]:
    return torch.bincount(split.labels, minlength=len(COUNTS)).tolist()


def test_a_fraction_keeps_the_balance_and_the_order() -> None:
    train = train_split()
    kept = keep_fraction(train, 4, 0.3, seed=0)
    assert class_counts(kept) == [12, 8, 3, 1]  # of 40, 25, 10, 3; 7.5 is rounded to even
    assert positions(kept) == sorted(positions(kept))
    assert torch.equal(kept.labels, train.labels[positions(kept)])
    assert class_counts(keep_fraction(train, 4, 0.001, seed=0)) == [1, 1, 1, 1]
    assert keep_fraction(train, 4, 1.0, seed=0) is train


def test_smaller_fractions_are_subsets_of_larger_ones() -> None:
    train = train_split()
    half = positions(keep_fraction(train, 4, 0.5, seed=0))
    assert half == positions(keep_fraction(train, 4, 0.5, seed=0))
    assert half != positions(keep_fraction(train, 4, 0.5, seed=1))
    assert set(positions(keep_fraction(train, 4, 0.25, seed=0))) < set(half)


def test_the_holdout_is_balanced_and_not_trained_on() -> None:
    train = train_split()
    rest, held = hold_out(train, CLASSES, 0.2, seed=0)
    assert held is not None
    assert class_counts(held) == [8, 5, 2, 1]
    assert sorted(positions(rest) + positions(held)) == [*range(len(train))]
    for part in (rest, held):
        assert positions(part) == sorted(positions(part))
        assert torch.equal(part.labels, train.labels[positions(part)])
    _, other = hold_out(train, CLASSES, 0.2, seed=1)
    assert other is not None
    assert positions(other) != positions(held)
    assert hold_out(train, CLASSES, 0.0, seed=0) == (train, None)


def test_a_holdout_of_a_whole_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"all 3 training images of class 'd'.*dataset\.holdout"):
        hold_out(train_split(), CLASSES, 0.9, seed=0)


def test_label_noise_replaces_its_share_of_each_class() -> None:
    train = train_split()
    noisy = add_label_noise(train, 4, 0.3, seed=0)
    changed = noisy.labels != train.labels
    by_class = [int(changed[train.labels == label].sum()) for label in range(4)]
    assert by_class == [12, 8, 3, 1]
    assert noisy.images is train.images
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() < 4
    assert torch.equal(train.labels, train_split().labels), "the clean labels do not change"


def test_label_noise_is_symmetric() -> None:
    labels = torch.arange(5).repeat_interleave(1000)
    train = Split(torch.zeros(5000, 3, 1, 1, dtype=torch.uint8), labels)
    noisy = add_label_noise(train, 5, 0.8, seed=0).labels
    for label in range(5):
        counts = torch.bincount(noisy[labels == label], minlength=5)
        assert counts[label] == 200
        others = counts[torch.arange(5) != label]
        # 800 draws among 4 classes: mean 200, standard deviation 12.2; the limit is five of them.
        assert (others - 200).abs().max() < 61


def test_more_label_noise_extends_smaller_noise() -> None:
    train = train_split()
    less = add_label_noise(train, 4, 0.2, seed=0).labels
    more = add_label_noise(train, 4, 0.5, seed=0).labels
    assert torch.equal(less, add_label_noise(train, 4, 0.2, seed=0).labels)
    assert not torch.equal(less, add_label_noise(train, 4, 0.2, seed=1).labels)
    changed = less != train.labels
    assert torch.equal(more[changed], less[changed])


def test_label_noise_needs_a_second_class() -> None:
    train = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long())
    with pytest.raises(UserError, match=r"second class.*dataset\.label_noise=0"):
        add_label_noise(train, 1, 0.5, seed=0)


def test_the_three_selections_are_independent() -> None:
    train = train_split()
    kept = set(positions(keep_fraction(train, 4, 0.2, seed=0)))
    _, held = hold_out(train, CLASSES, 0.2, seed=0)
    changed = add_label_noise(train, 4, 0.2, seed=0).labels != train.labels
    assert held is not None
    selections = [kept, set(positions(held)), set(changed.nonzero()[:, 0].tolist())]
    assert selections[0] != selections[1] != selections[2] != selections[0]


def test_a_mean_or_a_std_can_be_given_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = load_images(settings("digits"))
    given = load_images(settings("digits", mean=[0.0, 0.2, 0.3]))
    assert (given.mean, given.std) == ((0.0, 0.2, 0.3), computed.std)
    given = load_images(settings("digits", std=[0.1, 0.2, 0.3]))
    assert (given.mean, given.std) == (computed.mean, (0.1, 0.2, 0.3))
    monkeypatch.delattr("sskd.data.channel_statistics")  # it must not be needed
    given = load_images(settings("digits", mean=[0.0, 0.2, 0.3], std=[0.1, 0.2, 0.3]))
    assert (given.mean, given.std) == ((0.0, 0.2, 0.3), (0.1, 0.2, 0.3))


def test_channel_statistics_are_those_of_all_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 1] //= 3
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], pixels.std(axis=(0, 2, 3))[:2], rtol=1e-12)
    assert mean[2] == pytest.approx(0.2)
    assert 0 < std[2] < 1e-3


@pytest.mark.usefixtures("all_digits")
def test_digits_are_scaled_images_of_scikit_learn() -> None:
    images = load_images(settings("digits"))
    published = load_digits()
    assert images.classes == tuple("0123456789")
    assert (images.name, images.num_classes, images.image_size) == ("digits", 10, 32)
    assert len(images.train) + len(images.test) == 1797
    assert images.holdout is None
    # Every fifth image of each class, in the order of the file.
    seen = [0] * 10
    is_test = []
    for label in published.target:
        seen[label] += 1
        is_test.append(seen[label] % 5 == 0)
    for split, selected in ((images.train, ~np.array(is_test)), (images.test, np.array(is_test))):
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (selected.sum(), 3, 32, 32)
        assert split.labels.tolist() == published.target[selected].tolist()
        assert (split.images == split.images[:, :1]).all()
        # Bilinear scaling by 4 does not change the values of the corners.
        small = published.images[selected]
        corner = np.rint(small[:, 0, 0] * 255 / 16)
        assert (split.images[:, 0, 0, 0].numpy() == corner).all()
        # Column 14 is at (14 + 0.5) / 4 - 0.5 = 3.125 in the small image.
        between = (small[:, 0, 3] * 0.875 + small[:, 0, 4] * 0.125) * 255 / 16
        assert np.abs(split.images[:, 0, 0, 14].numpy() - between).max() <= 0.5
    assert images.train.images.max() == 255
    pixels = images.train.images.numpy() / 255
    np.testing.assert_allclose(images.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9)


def test_holdout_fraction_and_noise_apply_in_this_order() -> None:
    everything = load_images(settings("digits")).train
    parts = {"holdout": 0.25, "fraction": 0.5, "label_noise": 0.5, "seed": 3}
    images = load_images(settings("digits", **parts))
    clean = load_images(settings("digits", **{**parts, "label_noise": 0.0}))
    assert images.holdout is not None
    assert clean.holdout is not None
    assert torch.equal(images.train.images, clean.train.images)
    # The held-out part has no label noise.
    assert torch.equal(images.holdout.labels, clean.holdout.labels)
    for label in range(10):
        total = int((everything.labels == label).sum())
        held = round(0.25 * total)
        kept = round(0.5 * (total - held))
        of_class = clean.train.labels == label
        assert (clean.holdout.labels == label).sum() == held
        assert of_class.sum() == kept
        assert (images.train.labels[of_class] != label).sum() == round(0.5 * kept)
    assert torch.equal(images.test.labels, load_images(settings("digits")).test.labels)


def test_a_given_mean_and_std_are_used() -> None:
    images = load_images(settings("digits", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], size=40))
    assert (images.mean, images.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert images.image_size == 40


def test_all_tensors_move_to_another_device() -> None:
    images = load_images(settings("digits", holdout=0.1)).to("meta")
    assert isinstance(images, Images)
    assert images.holdout is not None
    for split in (images.train, images.test, images.holdout):
        assert split.images.device.type == split.labels.device.type == "meta"


def test_methods_and_seeds_share_images_and_wrong_labels(composed: Compose) -> None:
    """A study of few or of wrong labels compares methods, not choices of images."""
    study = ("dataset=digits", "dataset.fraction=0.5", "dataset.label_noise=0.3")
    configs = [
        composed(*study, "pair=vgg13-vgg8", f"method={method}", f"seed={seed}", "runs=runs")
        for method, seed in (("kd", 0), ("kd", 1), ("sskd", 2), ("crd", 0))
    ]
    (chosen,) = {config.dataset.model_dump_json() for config in configs}
    first, again = (load_images(DatasetSettings.model_validate_json(chosen)) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)
    # The teacher saw all images with their own labels.
    assert {(c.teacher.fraction, c.teacher.label_noise) for c in configs if c.teacher} == {(1, 0)}
