"""The loader against the definition of its augmentation, written out image by image in NumPy."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import binomtest, chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from sskd.data import Batch, Loader, Split, eval_batches
from sskd.data.augmentation import crop_views, draw_crops, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
UNLIKELY = 1e-3  # the level of the frequency tests; their seeds are fixed


def noise_split(count: int, side: int = 8, seed: int = 0) -> Split:
    """Random images, so that no crop of one looks like another crop."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 7, (count,), generator=generator))


def loader_of(count: int, batch_size: int, views: int = 1) -> Loader:
    return Loader(noise_split(count), MEAN, STD, batch_size, views)


def epoch(loader: Loader) -> list[Batch]:
    return [loader.next_batch() for _ in range(loader.position, loader.steps)]


def found_in(image: np.ndarray, view: np.ndarray, turns: int) -> list[tuple[bool, int, int]]:
    """Every (flip, top, left) of which ``view`` is the padded image's crop; all 162 are tried."""
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
    """Recover [count, views, (flip, top, left)] from augmented images."""
    images = noise_split(count, side, seed).images
    before = images.clone()
    crops = draw_crops(count, views, torch.Generator().manual_seed(seed))
    augmented = crop_views(images, crops, views)
    assert torch.equal(images, before)
    assert augmented.dtype == torch.uint8
    assert augmented.shape == (count, views, 3, side, side)
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
def test_every_view_is_a_crop_of_the_flipped_turned_padded_image(views: int) -> None:
    recovered = choices(count=8, views=views, side=32, seed=views)
    assert (recovered[..., 0] == recovered[:, :1, 0]).all(), "one flip for all views"


def test_crops_of_views_are_independent(many_choices: np.ndarray) -> None:
    assert (many_choices[..., 0] == many_choices[:, :1, 0]).all()
    for first, second in [(0, 1), (1, 2), (2, 3), (3, 0)]:
        for axis in (1, 2):
            together = many_choices[:, first, axis] * 9 + many_choices[:, second, axis]
            assert chisquare(np.bincount(together, minlength=81)).pvalue > UNLIKELY


def test_offsets_are_uniform_over_all_81(many_choices: np.ndarray) -> None:
    for view in range(4):
        offsets = many_choices[:, view, 1] * 9 + many_choices[:, view, 2]
        assert chisquare(np.bincount(offsets, minlength=81)).pvalue > UNLIKELY


def test_half_of_the_images_are_flipped(many_choices: np.ndarray) -> None:
    flips = many_choices[:, 0, 0]
    assert binomtest(int(flips.sum()), len(flips), 0.5).pvalue > UNLIKELY
    neighbours = flips[:-1] == flips[1:]
    assert binomtest(int(neighbours.sum()), len(neighbours), 0.5).pvalue > UNLIKELY


def test_padding_is_black_before_normalisation() -> None:
    white = Split(torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(64).long())
    x = Loader(white, MEAN, STD, 64).next_batch().x
    mean, std = np.array(MEAN), np.array(STD)
    for channel in range(3):
        values = x[:, channel].unique().numpy()
        expected = (np.array([0.0, 1.0]) - mean[channel]) / std[channel]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("views", [0, 5])
def test_views_beyond_the_four_turns_are_refused(views: int) -> None:
    with pytest.raises(ValueError, match=f"not {views}"):
        draw_crops(2, views, torch.Generator())


def test_normalise_is_the_channelwise_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    result = normalise(images, mean, std)
    expected = (images.numpy().astype(np.float64) / 255 - mean.numpy()) / std.numpy()
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (3, 64, 1)])
def test_an_epoch_holds_every_image_once(count: int, batch_size: int, steps: int) -> None:
    loader = loader_of(count, batch_size)
    assert loader.steps == steps
    loader.begin_epoch(5)
    batches = epoch(loader)
    assert [len(batch.y) for batch in batches[:-1]] == [batch_size] * (steps - 1)
    assert len(batches[-1].y) == count - batch_size * (steps - 1)
    assert torch.cat([batch.indices for batch in batches]).sort().values.tolist() == [*range(count)]
    assert loader.position == steps
    with pytest.raises(IndexError, match=f"all {steps} batches"):
        loader.next_batch()


def test_a_batch_has_its_own_labels_and_views_image_by_image() -> None:
    split = noise_split(20)
    loader = Loader(split, MEAN, STD, batch_size=6, views=4)
    loader.begin_epoch(1)
    mean, std = np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))
    for batch in epoch(loader):
        assert batch.x.dtype == torch.float32
        assert batch.y.dtype == batch.indices.dtype == torch.int64
        assert batch.x.shape == (4 * len(batch.y), 3, 8, 8)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.y, split.labels[batch.indices])
        pixels = np.rint((batch.x.numpy() * std + mean) * 255).astype(np.uint8)
        for row, view in enumerate(pixels):
            image = split.images[batch.indices[row // 4]].numpy()
            assert len(found_in(image, view, turns=row % 4)) == 1


def test_the_seed_of_an_epoch_fixes_its_batches() -> None:
    first, second = loader_of(30, 8, views=2), loader_of(30, 8, views=2)
    second.begin_epoch(1)
    epoch(second)
    for loader in (first, second):
        loader.begin_epoch(11)
    ours, same = epoch(first), epoch(second)
    for one, other in zip(ours, same, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    first.begin_epoch(12)
    others = epoch(first)
    assert not torch.equal(ours[0].indices, others[0].indices)
    assert not torch.equal(ours[0].indices.sort().values, torch.arange(8)), "shuffled"


@pytest.mark.parametrize("done", [0, 2, 4])
def test_goes_on_in_mid_epoch_bit_for_bit(done: int) -> None:
    loader = loader_of(30, 8, views=4)
    loader.begin_epoch(21)
    for _ in range(done):
        loader.next_batch()
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    rest = epoch(loader)

    resumed = loader_of(30, 8, views=4)
    resumed.begin_epoch(99)
    resumed.next_batch()
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.position == done
    again = epoch(resumed)
    assert len(again) == len(rest) == 4 - done
    for one, other in zip(rest, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_state_does_not_change_with_the_loader() -> None:
    loader = loader_of(30, 8)
    loader.next_batch()
    state = loader.state_dict()
    kept = state["generator"].clone()
    loader.next_batch()
    assert state["position"] == 1
    assert torch.equal(state["generator"], kept)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch(loader_of(20, 8, views=4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = epoch(loader_of(20, 8, views=4))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses the operations whose result's shape or value the host must wait for."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.waiting, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


def test_a_batch_never_waits_for_the_device() -> None:
    loader = loader_of(20, 8, views=4)
    with NoWaiting():
        loader.begin_epoch(2)
        loader.next_batch()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(2).sum().item()


def test_plain_goes_through_the_images_in_order() -> None:
    split = noise_split(10)
    batches = list(eval_batches(split, MEAN, STD, batch_size=4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    x = torch.cat([x for x, _ in batches])
    pixels = split.images.numpy().astype(np.float64) / 255
    expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
