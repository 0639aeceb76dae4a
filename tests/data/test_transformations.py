"""SSKD's transformations: each compared with torchvision's operation on the same parameters."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torchvision.transforms.functional as reference
from scipy.stats import chisquare, kstest
from test_strong import pictures
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from sskd.data import Loader, Split, Transformations, Views
from sskd.data.augmentation import CROPS, JIGSAWS, Cropper, draw_crops
from sskd.data.rectangles import AREA, ASPECT
from sskd.data.transformations import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    JITTER,
    LUMA_WEIGHTS,
    PRINTED_WEIGHTS,
    SATURATION,
    TRANSFORMATIONS,
    TransformedView,
)

CPU = torch.device("cpu")
SIDE = 32
COUNT = 64
MANY = 4000
UNLIKELY = 1e-3  # the significance level of the frequency tests; their seeds are fixed
POOL = tuple(TRANSFORMATIONS)
ADJUST = {
    BRIGHTNESS: reference.adjust_brightness,
    CONTRAST: reference.adjust_contrast,
    SATURATION: reference.adjust_saturation,
    HUE: reference.adjust_hue,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(name: str, count: int, side: int = SIDE) -> Tensor:
    return TRANSFORMATIONS[name](side, CPU).draw(count, seeded(side))


def made(name: str, images: Tensor, parameters: Tensor) -> Tensor:
    return TRANSFORMATIONS[name](images.shape[-1], CPU)(images.float(), parameters)


def assert_equal_levels(found: Tensor, expected: Tensor) -> None:
    """Compare pixels of 0..255 with torchvision's of 0..1."""
    torch.testing.assert_close(found / 255, expected, rtol=0, atol=2e-6)


def test_colour_dropping_is_torchvisions_with_the_printed_weights() -> None:
    images = pictures(COUNT)
    found = made("colour_dropping", images, torch.ones(COUNT, 1))
    ratio = torch.tensor(PRINTED_WEIGHTS) / torch.tensor(LUMA_WEIGHTS)
    weighted = images / 255 * ratio.view(3, 1, 1)
    assert_equal_levels(found, reference.rgb_to_grayscale(weighted, 3))


def test_rotation_is_torchvisions() -> None:
    images, turns = pictures(COUNT), drawn("rotation", COUNT)
    assert set(turns.flatten().tolist()) == {1, 2, 3}
    found = made("rotation", images, turns)
    for view, image, turn in zip(found, images, turns.flatten(), strict=True):
        assert torch.equal(view, reference.rotate(image.float(), 90 * turn.item()))


@pytest.mark.parametrize("side", [32, 9])
def test_crop_and_resize_is_torchvisions(side: int) -> None:
    images, boxes = pictures(COUNT, side), drawn("crop_resize", COUNT, side)
    found = made("crop_resize", images, boxes)
    for view, image, box in zip(found, images, boxes.int().tolist(), strict=True):
        top, left, height, width = box
        expected = reference.resized_crop(image / 255, top, left, height, width, [side, side])
        assert_equal_levels(view, expected)


@pytest.mark.parametrize("kind", ADJUST)
def test_each_adjustment_of_colours_is_torchvisions(kind: int) -> None:
    images = pictures(COUNT)
    low, high = JITTER[kind]
    amounts = torch.linspace(low, high, COUNT)
    parameters = TRANSFORMATIONS["colour_jitter"](SIDE, CPU).neutral.repeat(COUNT, 1)
    parameters[:, 2], parameters[:, 6] = kind, amounts
    found = made("colour_jitter", images, parameters)
    for view, image, amount in zip(found, images, amounts.tolist(), strict=True):
        assert_equal_levels(view, ADJUST[kind](image / 255, amount))


def test_colour_jitter_is_torchvisions_in_every_order() -> None:
    parameters = drawn("colour_jitter", 200)
    orders = {tuple(order) for order in parameters[:, :4].int().tolist()}
    assert orders == set(itertools.permutations(range(4)))
    images = pictures(200, 16)
    found = made("colour_jitter", images, parameters)
    for view, image, row in zip(found, images / 255, parameters, strict=True):
        expected = image
        for kind, amount in zip(row[:4].int().tolist(), row[4:].tolist(), strict=True):
            expected = ADJUST[kind](expected, amount)
        assert_equal_levels(view, expected)


@pytest.mark.parametrize("name", POOL)
def test_neutral_parameters_change_no_bit(name: str) -> None:
    images = pictures(COUNT)
    neutral = TRANSFORMATIONS[name](SIDE, CPU).neutral
    assert torch.equal(made(name, images, neutral.repeat(COUNT, 1)), images.float())


def test_boxes_have_the_distribution_of_torchvision() -> None:
    boxes = drawn("crop_resize", MANY)
    top, left, height, width = boxes.T
    assert (boxes == boxes.round()).all()
    assert (torch.stack([top, left, SIDE - top - height, SIDE - left - width]) >= 0).all()
    torch.manual_seed(1)
    draw = partial(RandomResizedCrop.get_params, torch.empty(3, SIDE, SIDE), [*AREA], [*ASPECT])
    expected = torch.tensor([draw() for _ in range(MANY)])
    for column in range(4):
        assert kstest(boxes[:, column], expected[:, column]).pvalue > UNLIKELY


def test_the_amounts_of_colour_jitter_are_uniform() -> None:
    parameters = drawn("colour_jitter", MANY)
    for kind, (low, high) in enumerate(JITTER):
        amounts = parameters[:, 4:][parameters[:, :4] == kind]
        assert len(amounts) == MANY
        assert kstest(amounts, "uniform", (low, high - low)).pvalue > UNLIKELY


def test_each_view_has_one_of_the_pool_all_equally_likely() -> None:
    view = TransformedView(Transformations(POOL), SIDE, CPU)
    parameters = view.draw(MANY, seeded()).split([1, 1, 4, 8], dim=1)
    neutral = [TRANSFORMATIONS[name](SIDE, CPU).neutral for name in POOL]
    chosen = torch.stack(
        [(part != none).any(1) for part, none in zip(parameters, neutral, strict=True)]
    )
    # The largest rectangle, the whole image, is neutral.
    assert set(chosen.sum(0).tolist()) <= {0, 1}
    assert (chosen.sum(0) == 0).float().mean() < 0.01
    assert chisquare(chosen.sum(1)).pvalue > UNLIKELY
    images = pictures(COUNT)
    few = [part[:COUNT] for part in parameters]
    found = view(images, torch.cat(few, dim=1))
    for place, name in enumerate(POOL):
        rows = chosen[place, :COUNT]
        assert torch.equal(found[rows], made(name, images[rows], few[place][rows]))


def test_a_view_with_all_of_the_pool_has_them_in_order() -> None:
    view = TransformedView(Transformations(("crop_resize", "colour_jitter"), True), SIDE, CPU)
    images, parameters = pictures(COUNT), view.draw(COUNT, seeded())
    cut = made("crop_resize", images, parameters[:, :4])
    assert torch.equal(view(images, parameters), made("colour_jitter", cut, parameters[:, 4:]))


def loader_of(views: Views, *, strong_copies: bool = False) -> Loader:
    split = Split(pictures(12)[2:], torch.arange(10))  # the first one is grey
    return Loader(
        split, (0.0,) * 3, (1.0,) * 3, batch_size=4, views=views, strong_copies=strong_copies
    )


TRANSFORMED = Views(transformed=Transformations(POOL))


def test_the_seed_of_an_epoch_decides_its_views() -> None:
    first, again = loader_of(TRANSFORMED), loader_of(TRANSFORMED)
    first.begin_epoch(3)
    first.next_batch()
    again.load_state_dict(first.state_dict())
    expected, found = first.next_batch(), again.next_batch()
    assert torch.equal(expected.x, found.x)
    again.begin_epoch(4)
    again.next_batch()
    assert not torch.equal(expected.x, again.next_batch().x)


def test_the_first_view_is_normal_and_the_others_are_transformed_crops() -> None:
    loader = loader_of(TRANSFORMED)
    batch = loader.next_batch()
    assert (batch.crops // CROPS == 0).all()
    plain = loader.augmenter.crops_of(batch.indices, batch.crops.view(-1, 4))
    same = (batch.x == plain).flatten(1).all(1).view(-1, 4)
    assert same[:, 0].all()
    assert not same[:, 1:].all()
    assert batch.x.is_contiguous(memory_format=torch.channels_last)


def test_strong_copies_are_transformed_too() -> None:
    loader = loader_of(Views(transformed=Transformations(("colour_dropping",))), strong_copies=True)
    views = torch.cat([loader.next_batch().x for _ in range(5)]).unflatten(0, (-1, 4))
    grey = (views == views[:, :, :1]).flatten(2).all(2)
    assert grey[:, 1:].all()
    assert not grey[:, 0].any()


@pytest.mark.parametrize("side", [2, 32])
def test_a_jigsaw_has_the_patches_in_its_order(side: int) -> None:
    views = Views(jigsaws=3)
    images = torch.randint(256, (50, 3, side, side), dtype=torch.uint8, generator=seeded())
    crops = draw_crops(len(images), views, seeded())
    assert (crops[:, 0] < CROPS).all()
    assert set((crops[:, 1:] // CROPS).flatten().tolist()) == set(range(1, len(JIGSAWS)))
    cropper = Cropper(images, views.rotations, jigsaws=True)
    indices = torch.arange(len(images))
    cut = cropper(indices, crops)
    upright = Cropper(images, 1)(indices, crops % CROPS)
    half = side // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    for view, crop, number in zip(cut, upright, crops.flatten() // CROPS, strict=True):
        patches = [crop[:, row : row + half, left : left + half] for row, left in corners]
        for (row, left), place in zip(corners, JIGSAWS[number], strict=True):
            assert torch.equal(view[:, row : row + half, left : left + half], patches[place])


def test_the_orders_of_jigsaws_are_equally_likely() -> None:
    crops = draw_crops(MANY, Views(jigsaws=3), seeded(1))
    counts = torch.bincount((crops[:, 1:] // CROPS).flatten(), minlength=len(JIGSAWS))
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > UNLIKELY
    flips = (crops % CROPS) // 81
    assert (flips == flips[:, :1]).all()


def test_only_one_kind_of_views_follows_the_normal_one() -> None:
    with pytest.raises(ValueError, match="one normal view alone"):
        Views(4, jigsaws=3)
    with pytest.raises(ValueError, match="one normal view alone"):
        Views(jigsaws=3, transformed=Transformations(POOL))


@pytest.mark.parametrize("pool", [(), ("rotaton",), "rotation"])
def test_a_pool_has_names_of_transformations(pool: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be a tuple of some of colour_dropping, rotation"):
        Transformations(pool)
