"""Decoding image files of unknown origin: only chosen formats, and within bounds of memory."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sskd.errors import UserError, one_line
from sskd.files import read_bounded

T = TypeVar("T")

# Other formats are refused under any file name. Pillow passes PostScript, for example, to
# Ghostscript, which runs it as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")

MAX_PIXELS = 2**26  # 67 megapixels: 256 MiB, because Pillow uses 4 bytes per pixel
# Of a file. This holds 67 megapixels of a camera, or 22 uncompressed. Each of up to 32 threads
# keeps one file in memory: 2 GiB.
MAX_BYTES = 2**26
MAX_TILES = 2**18  # of a TIFF: 67 megapixels in tiles of 16 x 16; Pillow makes a list of them

# Larger images are decoded one at a time, so that the threads do not multiply the memory.
_LARGE = 2**24  # pixels
_one_large_image = Lock()

_STRIP_OFFSETS, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS = 273, 322, 323, 324  # tags of TIFF 6.0


def read_image(path: Path, size: int) -> tuple[Tensor, str]:
    """Return an image as ``decode`` does, and the SHA-256 of the bytes that were decoded.

    Raises:
        UserError: the file cannot be read, or is not an image within the bounds.
    """
    return read_as(path, partial(decode, size=size))


def read_as(path: Path, convert: Callable[[bytes], T]) -> tuple[T, str]:
    """Return what ``convert`` makes of the content of ``path``, and the content's SHA-256.

    Raises:
        UserError: the file cannot be read, or ``convert`` raised any error.
    """
    try:
        content = read_bounded(path, MAX_BYTES, follow=True)
        return convert(content), hashlib.sha256(content).hexdigest()
    except Exception as error:  # Pillow raises almost any type of error for a broken file
        raise unreadable_error(path, error) from error


def unreadable_error(path: Path, error: Exception) -> UserError:
    """Return the error for the file ``path``, which could not be read because of ``error``."""
    return UserError(f"{path} cannot be read as an image: {one_line(error)}")


def decode(content: bytes, size: int) -> Tensor:
    """Decode the first frame, rotate it upright, scale it to cover a square and crop it.

    Returns:
        uint8 [3, size, size].

    Raises:
        Exception: of almost any type, from Pillow, if ``content`` is broken.
        ValueError: ``content`` is beyond the bounds, or has more than 8 bits a channel.
    """
    with opened(content) as image:
        square = ImageOps.fit(upright(image), (size, size), Image.Resampling.BILINEAR)
    tensor: Tensor = pil_to_tensor(square)
    return tensor


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """Yield the first frame of an image, which is within the bounds and not decoded yet.

    Raises what ``decode`` raises.
    """
    if (tiles := _count_tiles(content)) > MAX_TILES:
        raise ValueError(f"it has {tiles:,} strips or tiles, and the limit is {MAX_TILES:,}")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        pixels = _count_pixels(image)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a channel; convert it to 8")
        with _one_large_image if pixels > _LARGE else nullcontext():
            yield image


def upright(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB, rotated upright.

    EXIF records how the camera was held; the pixels may be stored sideways.
    """
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings; a single file can cause thousands of them.

    Warning filters belong to the process, so enter this before the decoding threads start.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _count_pixels(image: Image.Image) -> int:
    """Return the pixels of an image that is not decoded yet; ValueError if there are too many."""
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):
        # A tile is decoded completely, even if the image shows only a part of it.
        width, height = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"its tiles have {width} x {height} pixels; the limit is {MAX_PIXELS:,}"
            )
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, and the limit is {MAX_PIXELS:,}; "
            "scale it down"
        )
    return pixels


def _count_tiles(content: bytes) -> int:
    """Return the number of strips or tiles in the header of a TIFF; 0 for any other format."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return 0
    (version,) = struct.unpack_from(f"{order}H", content, 2)
    if version == 43:  # BigTIFF
        start, number, entry, offset = f"{order}Q", f"{order}Q", f"{order}HHQ8x", 8
    else:
        start, number, entry, offset = f"{order}L", f"{order}H", f"{order}HHL4x", 4
    (table,) = struct.unpack_from(start, content, offset)
    (entries,) = struct.unpack_from(number, content, table)
    first, entry_size = table + struct.calcsize(number), struct.calcsize(entry)
    found = (struct.unpack_from(entry, content, first + entry_size * k) for k in range(entries))
    return max((n for tag, _, n in found if tag in (_STRIP_OFFSETS, _TILE_OFFSETS)), default=0)
