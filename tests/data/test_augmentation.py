"""The augmentation, compared with its definition for single images in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import binomtest, chisquare

from sskd.data import Split
from sskd.data.augmentation import Cropper, Normaliser, Views, draw_crops

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
UNLIKELY = 1e-3  # the significance level of the frequency tests; their seeds are fixed


def noise_split(count: int, side: int = 8, seed: int = 0) -> Split:
    """Return random images, so that no two crops of an image are equal."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 7, (count,), generator=generator))


def found_in(image: np.ndarray, view: np.ndarray, turns: int) -> list[tuple[bool, int, int]]:
    """Return each (flip, top, left) of the 162 crops of ``image`` that equals ``view``."""
    side = image.shape[-1]
    found = []
    for flip in (False, True):
        start = image[:, :, ::-1] if flip else image
        turned = np.rot90(start, turns, axes=(1, 2))
        padded = np.pad(turned, ((0, 0), (4, 4), (4, 4)))
        crops = sliding_window_view(padded, (side, side), axis=(1, 2))
        equal = (crops == view[:, None, None]).all(axis=(0, 3, 4))
        assert equal.shape == (9, 9)
        found += [(flip, int(top), int(left)) for top, left in np.argwhere(equal)]
    return found


def choices(count: int, views: int, side: int, seed: int) -> np.ndarray:
    """Augment random images; return the crops as [count, views, (flip, top, left)]."""
    images = noise_split(count, side, seed).images
    before = images.clone()
    crops = draw_crops(count, Views(views), torch.Generator().manual_seed(seed))
    order = torch.randperm(count)
    cut = Cropper(images, views)(order, crops[order])
    assert torch.equal(images, before)
    assert cut.dtype == torch.uint8
    assert cut.shape == (count * views, 3, side, side)
    augmented = cut.unflatten(0, (count, views))[order.argsort()]
    recovered = np.empty((count, views, 3), dtype=int)
    for i, image in enumerate(images.numpy()):
        for view in range(views):
            found = found_in(image, augmented[i, view].numpy(), view)
            assert len(found) == 1, (i, view, found)
            recovered[i, view] = found[0]
    return recovered


@pytest.fixture(scope="module")
def many_choices() -> np.ndarray:
    return choices(count=1000, views=4, side=8, seed=3)


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_every_view_is_one_of_the_162_crops(views: int) -> None:
    recovered = choices(count=8, views=views, side=32, seed=views)
    assert (recovered[..., 0] == recovered[:, :1, 0]).all(), "all views have the same flip"


def test_crops_of_views_are_independent(many_choices: np.ndarray) -> None:
    assert (many_choices[..., 0] == many_choices[:, :1, 0]).all()
    for first, second in [(0, 1), (1, 2), (2, 3), (3, 0)]:
        for axis in (1, 2):
            together = many_choices[:, first, axis] * 9 + many_choices[:, second, axis]
            assert chisquare(np.bincount(together, minlength=81)).pvalue > UNLIKELY


def test_all_81_offsets_are_equally_likely(many_choices: np.ndarray) -> None:
    for view in range(4):
        offsets = many_choices[:, view, 1] * 9 + many_choices[:, view, 2]
        assert chisquare(np.bincount(offsets, minlength=81)).pvalue > UNLIKELY


def test_half_of_the_images_are_flipped(many_choices: np.ndarray) -> None:
    flips = many_choices[:, 0, 0]
    assert binomtest(int(flips.sum()), len(flips), 0.5).pvalue > UNLIKELY
    neighbours = flips[:-1] == flips[1:]
    assert binomtest(int(neighbours.sum()), len(neighbours), 0.5).pvalue > UNLIKELY


def test_a_crop_is_rotated_padded_and_then_cut(many_choices: np.ndarray) -> None:
    """Check the numbers of ``draw_crops``, under which the outputs of a teacher are stored."""
    crops = draw_crops(1000, Views(4), torch.Generator().manual_seed(3)).numpy()
    flip, top, left = np.moveaxis(many_choices, -1, 0)
    assert (crops == ((np.arange(4) * 2 + flip) * 9 + top) * 9 + left).all()


def test_the_views_of_one_crop_are_its_rotations() -> None:
    images = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)
    views = Views(4, one_crop=True)
    for seed in range(5):
        crops = draw_crops(len(images), views, torch.Generator().manual_seed(seed))
        cut = Cropper(images, views.rotations)(torch.arange(len(images)), crops)
        first, *others = cut.unflatten(0, (-1, 4)).unbind(1)
        for turns, view in enumerate(others, 1):
            assert torch.equal(view, torch.rot90(first, turns, (2, 3)))
        one_view = draw_crops(len(images), Views(), torch.Generator().manual_seed(seed))
        assert torch.equal(crops[:, :1], one_view)


@pytest.mark.parametrize("views", [0, 5])
def test_more_than_four_views_are_refused(views: int) -> None:
    with pytest.raises(ValueError, match=f"not {views}"):
        Views(views)


def test_normalise_uses_the_mean_and_std_of_a_channel() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    result = Normaliser(MEAN, STD, width=16, device=images.device)(images)
    mean, std = np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
