"""The JPEG files that are packed: made of any image, and decoded again."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sskd.data.decode import opened, upright

SHORT_SIDE = 256  # pixels; an image with a longer short side is scaled down to it
QUALITY = 95
_ORIENTATION = 0x0112  # of EXIF 2.3
_UPRIGHT = 1


class Encoded(NamedTuple):
    """A JPEG file in RGB, and its size in pixels."""

    content: bytes
    height: int
    width: int


def to_jpeg(content: bytes) -> Encoded:
    """Return an image file as an upright JPEG in RGB whose short side is at most 256 pixels.

    A file that is one already is returned as it is. A larger image is scaled bilinearly with
    antialias.

    Raises:
        Exception: as ``sskd.data.decode.decode``.
    """
    with opened(content) as image:
        rotated = image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT
        is_own = image.format == "JPEG" and image.mode == "RGB" and not rotated
        picture = upright(image)
        picture.load()  # a damaged file is found here, not in training
        width, height = picture.size
        if is_own and min(width, height) <= SHORT_SIDE:
            return Encoded(content, height, width)
        if min(width, height) > SHORT_SIDE:
            picture = picture.resize(_scaled(width, height), Image.Resampling.BILINEAR)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=QUALITY)
    return Encoded(stream.getvalue(), picture.height, picture.width)


def _scaled(width: int, height: int) -> tuple[int, int]:
    """Return the size with a short side of 256, rounded as torchvision's ``Resize`` does."""
    short = min(width, height)
    return SHORT_SIDE * width // short, SHORT_SIDE * height // short


def decode(content: bytes, height: int, width: int) -> Tensor:
    """Decode a packed JPEG file of this size: uint8 [3, H, W].

    Raises:
        ValueError: it has another size, or is not in RGB; found before its pixels are decoded.
        Exception: of almost any type, from Pillow, if ``content`` is broken.
    """
    # Not torchvision.io.decode_jpeg: torchvision 0.29 has announced its removal.
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if (image.height, image.width, image.mode) != (height, width, "RGB"):
            raise ValueError(
                f"it has {image.width} x {image.height} pixels in {image.mode}, and the index says "
                f"{width} x {height} in RGB"
            )
        pixels: Tensor = pil_to_tensor(image)
    return pixels
