"""Strong views, compared with Pillow's functions, which the authors of MLLD and CRLD call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy.stats import chisquare, kstest
from torch import Tensor

from sskd.data import strong
from sskd.data.strong import (
    RANGES,
    Operation,
    StrongAugmentation,
    StrongView,
    draw_strong,
    operation_columns,
    square_columns,
)

CPU = torch.device("cpu")
SIDE = 32
UNLIKELY = 1e-3  # the significance level of the frequency tests; their seeds are fixed
NO_SQUARE = (0, 0, -1, -1)
ENHANCE: dict[Operation, Callable[[Image.Image], Any]] = {
    Operation.BRIGHTNESS: ImageEnhance.Brightness,
    Operation.COLOR: ImageEnhance.Color,
    Operation.CONTRAST: ImageEnhance.Contrast,
    Operation.SHARPNESS: ImageEnhance.Sharpness,
}
# Magnitudes with which an operation changes nothing.
NOTHING = {
    **dict.fromkeys(ENHANCE, 1),
    **dict.fromkeys((Operation.ROTATE, Operation.SHEAR_X, Operation.SHEAR_Y), 0),
    **dict.fromkeys((Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.IDENTITY), 0),
    Operation.POSTERIZE: 8,
    Operation.SOLARIZE: 256,
}


def pictures(count: int, side: int = SIDE) -> Tensor:
    """Return images of various contrasts; the first has one level, the second has two."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    contrast = torch.rand(count, 3, 1, 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.rand(smooth.shape, generator=generator)
    images = ((0.8 * smooth + 0.2 * noise) * contrast * 256).to(torch.uint8)
    images[0] = 77
    images[1] = 100 + images[1] % 2
    return images


def one_round(operation: Operation, magnitudes: Tensor, side: int) -> Tensor:
    """Return the parameters of views with one operation and without Cutout."""
    columns = operation_columns(torch.full(magnitudes.shape, operation), magnitudes, side)
    return torch.cat([columns, torch.tensor([NO_SQUARE] * len(columns)).int()], dim=1)


def magnitudes_of(operation: Operation, count: int) -> Tensor:
    low, high = RANGES.get(operation, (0, 0))
    magnitudes = low + (high - low) * (torch.arange(count).double() + 0.3) / count
    return (magnitudes * 2**16).round() / 2**16 if operation in ENHANCE else magnitudes


def by_pillow(operation: Operation, image: Image.Image, magnitude: float) -> Image.Image:
    if operation in ENHANCE:
        return ENHANCE[operation](image).enhance(magnitude)
    if operation is Operation.ROTATE:
        return image.rotate(magnitude)
    if operation in (Operation.AUTOCONTRAST, Operation.EQUALIZE):
        return getattr(ImageOps, operation.name.lower())(image)
    if operation is Operation.POSTERIZE:
        return ImageOps.posterize(image, int(magnitude))
    if operation is Operation.SOLARIZE:
        return ImageOps.solarize(image, magnitude)  # type: ignore[arg-type]
    pixels = magnitude * image.width
    maps = {
        Operation.IDENTITY: (1, 0, 0, 0, 1, 0),
        Operation.SHEAR_X: (1, magnitude, 0, 0, 1, 0),
        Operation.SHEAR_Y: (1, 0, 0, magnitude, 1, 0),
        Operation.TRANSLATE_X: (1, 0, pixels, 0, 1, 0),
        Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, pixels),
    }
    return image.transform(image.size, Image.Transform.AFFINE, maps[operation])


def as_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("side", [SIDE, 45])
@pytest.mark.parametrize("operation", Operation)
def test_an_operation_gives_the_pixels_of_pillow(operation: Operation, side: int) -> None:
    images, magnitudes = pictures(30, side), magnitudes_of(operation, 30)
    views = StrongView(side, CPU)(images, one_round(operation, magnitudes, side))
    expected = torch.stack(
        [
            as_tensor(by_pillow(operation, as_pillow(image), magnitude))
            for image, magnitude in zip(images, magnitudes.tolist(), strict=True)
        ]
    )
    difference = (views.int() - expected.int()).abs()
    if operation is Operation.AUTOCONTRAST:  # Pillow rounds some whole numbers down
        assert difference.max() == 1
        assert (difference > 0).float().mean() < 0.02
    else:
        assert difference.max() == 0
    assert torch.equal(views[2:], images[2:]) == (operation is Operation.IDENTITY)


@pytest.mark.parametrize("operation", NOTHING)
def test_a_neutral_magnitude_leaves_an_image(operation: Operation) -> None:
    images = pictures(4)
    magnitudes = torch.full([4], NOTHING[operation], dtype=torch.float64)
    assert torch.equal(
        StrongView(SIDE, CPU)(images, one_round(operation, magnitudes, SIDE)), images
    )


def test_operations_and_magnitudes_are_uniform() -> None:
    settings, generator = StrongAugmentation(), torch.Generator().manual_seed(0)
    with patch.object(strong, "operation_columns", wraps=operation_columns) as spy:
        draw_strong(5000, SIDE, settings, generator)
    operations, magnitudes, _ = spy.call_args.args
    assert operations.shape == (5000, 2)
    pairs = operations[:, 0] * len(Operation) + operations[:, 1]
    assert chisquare(pairs.bincount(minlength=len(Operation) ** 2)).pvalue > UNLIKELY
    for operation, (low, high) in RANGES.items():
        drawn = magnitudes[operations == operation].numpy()
        assert kstest(drawn, "uniform", (low, high - low)).pvalue > UNLIKELY


def test_a_seed_gives_one_set_of_views() -> None:
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw_strong(100, SIDE, StrongAugmentation(), generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("operations", [1, 3])
def test_operations_follow_each_other(operations: int) -> None:
    images = pictures(50)
    settings = StrongAugmentation(operations, cutout=0)
    parameters = draw_strong(50, SIDE, settings, torch.Generator().manual_seed(0))
    view = StrongView(SIDE, CPU)
    expected = images
    for columns in parameters[:, :-4].split(14, dim=1):
        expected = view(expected, torch.cat([columns, parameters[:, -4:]], dim=1))
    assert torch.equal(view(images, parameters), expected)
    assert not torch.equal(expected, images)


def test_without_operations_and_cutout_images_stay() -> None:
    images = pictures(4)
    parameters = draw_strong(4, SIDE, StrongAugmentation(0, 0), torch.Generator())
    assert parameters.shape == (4, 4)
    assert torch.equal(StrongView(SIDE, CPU)(images, parameters), images)


@pytest.mark.parametrize("side", [SIDE, 45])
def test_cutout_covers_the_pixels_of_the_authors(side: int) -> None:
    images, generator = pictures(40, side), torch.Generator().manual_seed(0)
    lengths, x, y = torch.rand(3, 40, dtype=torch.float64, generator=generator)
    lengths, x, y = lengths * side / 2, x * side, y * side
    views = StrongView(side, CPU)(images, square_columns(lengths, torch.stack([x, y])))
    for image, view, (length, *centre) in zip(
        images, views, torch.stack([lengths, x, y], 1).tolist(), strict=True
    ):
        first = [int(max(0, each - length / 2)) for each in centre]
        last = [min(side, each + length) for each in first]
        expected = as_pillow(image)
        ImageDraw.Draw(expected).rectangle((*first, *last), (125, 123, 114))
        assert torch.equal(view, as_tensor(expected))


def test_cutout_covers_up_to_a_quarter_everywhere() -> None:
    images = torch.zeros(2000, 3, SIDE, SIDE, dtype=torch.uint8)
    settings = StrongAugmentation(operations=0)
    parameters = draw_strong(2000, SIDE, settings, torch.Generator().manual_seed(0))
    covered = StrongView(SIDE, CPU)(images, parameters)[:, 0] == 125
    areas = covered.sum((1, 2))
    assert areas.min() == 1
    assert areas.max() == (SIDE // 2) ** 2
    assert covered.any(0).all()


def test_a_view_does_not_depend_on_its_batch() -> None:
    images = pictures(20)
    parameters = draw_strong(20, SIDE, StrongAugmentation(), torch.Generator().manual_seed(3))
    view, before = StrongView(SIDE, CPU), images.clone()
    views = view(images.contiguous(memory_format=torch.channels_last), parameters)
    alone = [view(images[i : i + 1], parameters[i : i + 1]) for i in range(20)]
    assert torch.equal(views, torch.cat(alone))
    assert torch.equal(images, before)


def test_a_view_needs_no_value_on_the_host() -> None:
    meta = torch.device("meta")
    parameters = draw_strong(8, SIDE, StrongAugmentation(), torch.Generator()).to(meta)
    images = torch.empty(8, 3, SIDE, SIDE, dtype=torch.uint8, device=meta)
    views = StrongView(SIDE, meta)(images, parameters)
    assert (views.shape, views.dtype, views.device) == (images.shape, torch.uint8, meta)
