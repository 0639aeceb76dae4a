"""The loader: the batches of an epoch, and resuming in the middle of one."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from test_augmentation import MEAN, STD, found_in, noise_split
from torch.utils._python_dispatch import TorchDispatchMode

from sskd.data import (
    WHOLE,
    Batch,
    Loader,
    Share,
    Split,
    StrongAugmentation,
    Views,
    eval_batches,
)


def loader_of(count: int, batch_size: int, views: int = 1) -> Loader:
    return Loader(noise_split(count), MEAN, STD, batch_size=batch_size, views=Views(views))


def epoch(loader: Loader) -> list[Batch]:
    return [loader.next_batch() for _ in range(loader.position, loader.steps)]


def test_padding_is_black_before_normalisation() -> None:
    white = Split(torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(64).long())
    x = Loader(white, MEAN, STD, batch_size=64).next_batch().x
    mean, std = np.array(MEAN), np.array(STD)
    for channel in range(3):
        values = x[:, channel].unique().numpy()
        expected = (np.array([0.0, 1.0]) - mean[channel]) / std[channel]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


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


@pytest.mark.parametrize(("count", "ranks", "left_out"), [(16, 2, 0), (17, 2, 1), (21, 3, 0)])
def test_the_shares_of_processes_are_parts_of_the_same_batches(
    count: int, ranks: int, left_out: int
) -> None:
    split, batch_size = noise_split(count), 6
    whole, *shares = (
        Loader(split, MEAN, STD, batch_size=batch_size, views=Views(2), share=share)
        for share in (WHOLE, *(Share(rank, ranks) for rank in range(ranks)))
    )
    for loader in (whole, *shares):
        loader.begin_epoch(3)
    seen = 0
    for expected in epoch(whole)[: shares[0].steps]:
        parts = [loader.next_batch() for loader in shares]
        assert len({len(part.y) for part in parts}) == 1
        for name, values in expected._asdict().items():
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, values[: len(joined)]), name
        seen += sum(len(part.y) for part in parts)
    assert seen == count - left_out
    assert all(loader.position == loader.steps and not loader.next_size for loader in shares)


def test_a_position_is_that_of_any_number_of_processes() -> None:
    whole = loader_of(16, 6)
    whole.begin_epoch(3)
    whole.next_batch()
    whole.next_batch()
    expected = whole.peek(4).indices
    for rank in range(2):
        part = Loader(noise_split(16), MEAN, STD, batch_size=6, share=Share(rank, 2))
        part.load_state_dict(whole.state_dict())
        assert torch.equal(part.next_batch().indices, expected[2 * rank :][:2])


def test_a_batch_has_its_labels_and_ordered_views() -> None:
    split = noise_split(20)
    loader = Loader(split, MEAN, STD, batch_size=6, views=Views(4))
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


def test_the_seed_of_an_epoch_determines_its_batches() -> None:
    first, second = loader_of(30, 8, views=2), loader_of(30, 8, views=2)
    second.begin_epoch(1)
    epoch(second)
    for loader in (first, second):
        loader.begin_epoch(11)
    batches, same = epoch(first), epoch(second)
    for one, other in zip(batches, same, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    first.begin_epoch(12)
    others = epoch(first)
    assert not torch.equal(batches[0].indices, others[0].indices)
    assert not torch.equal(batches[0].indices.sort().values, torch.arange(8)), "shuffled"


@pytest.mark.parametrize("done", [0, 2, 4])
def test_a_loader_resumes_in_mid_epoch_bit_for_bit(done: int) -> None:
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


def test_a_saved_state_does_not_change() -> None:
    loader = loader_of(30, 8)
    loader.next_batch()
    state = loader.state_dict()
    loader.next_batch()
    assert state["position"] == 1


def test_the_global_random_state_is_not_used() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch(loader_of(20, 8, views=4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = epoch(loader_of(20, 8, views=4))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses operations for whose result the host must wait."""

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


def test_evaluation_batches_are_in_order() -> None:
    split = noise_split(10)
    batches = list(eval_batches(split, MEAN, STD, batch_size=4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    x = torch.cat([x for x, _ in batches])
    pixels = split.images.numpy().astype(np.float64) / 255
    expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("views", [Views(), Views(2), Views(4, one_crop=True)])
def test_a_strong_copy_of_each_image_is_a_sample(views: Views) -> None:
    split = noise_split(7)
    loader = Loader(split, MEAN, STD, batch_size=4, views=views, strong_copies=True)
    loader.begin_epoch(3)
    batches = epoch(loader)
    assert loader.steps == len(batches) == 4
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == sorted([*range(7), *range(7)])
    assert torch.equal(torch.cat([batch.y for batch in batches]), split.labels[indices])
    weak = 0
    for batch in batches:
        crops = batch.crops.unflatten(0, (-1, views.count))
        both = batch.x, loader.augmenter.crops_of(batch.indices, crops)
        for rows, plain in zip(*(x.unflatten(0, crops.shape) for x in both), strict=True):
            weak += torch.equal(rows, plain)
            if views.one_crop:
                for turns, row in enumerate(rows):
                    assert torch.equal(row, torch.rot90(rows[0], turns, (1, 2)))
    assert weak == 7


def test_strong_views_follow_the_weak_ones() -> None:
    split = noise_split(6)
    views = Views(strong=StrongAugmentation())
    loader = Loader(split, MEAN, STD, batch_size=6, views=views)
    loader.begin_epoch(1)
    first = loader.next_batch()
    crops = first.crops.unflatten(0, (-1, 2))
    cut = loader.augmenter.crops_of(first.indices, crops)
    assert torch.equal(first.x[::2], cut[::2])
    assert not any(map(torch.equal, first.x[1::2], cut[1::2]))
    assert not torch.equal(crops[:, 0], crops[:, 1])
    loader.begin_epoch(1)
    assert torch.equal(loader.next_batch().x, first.x)
    loader.begin_epoch(2)
    assert not torch.equal(loader.next_batch().x, first.x)
    with pytest.raises(ValueError, match="strong copies already"):
        Loader(split, MEAN, STD, batch_size=6, views=views, strong_copies=True)
