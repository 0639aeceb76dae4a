"""Decoding a stranger's image: only the formats that are meant, within bounds of memory."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

# Any other format is refused whatever the file is called. Pillow hands PostScript, for one, to
# Ghostscript, which runs it as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")

MOST_PIXELS = 2**26  # 67 megapixels: 256 MiB, as Pillow keeps 4 bytes a pixel
# Of a file: more than a camera's 67 megapixels take, or 22 uncompressed. The pool's threads, 32 at
# most, each hold one file: 2 GiB.
MOST_BYTES = 2**26
MOST_TILES = 2**18  # of a TIFF file: 67 megapixels in tiles of 16 x 16; Pillow lists each

# Larger images are decoded one at a time, so that many threads do not multiply the memory.
_LARGE = 2**24
_one_large_image = Lock()

_STRIP_OFFSETS, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS = 273, 322, 323, 324  # tags of TIFF 6.0


def decode(content: bytes, size: int) -> Tensor:
    """Decode the first frame upright, scale it to cover a square and crop: uint8 [3, size, size].

    Raises:
        Exception: of almost any class, by Pillow's decoders, if ``content`` is broken.
        ValueError: it is beyond the bounds, or has more than 8 bits a channel.
    """
    if (tiles := _tiles(content)) > MOST_TILES:
        raise ValueError(f"it has {tiles:,} strips or tiles, and the limit is {MOST_TILES:,}")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        pixels = _refuse_large(image)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a channel; convert it to 8")
        with _one_large_image if pixels > _LARGE else nullcontext():
            # A camera's note of how it was held must not pass for a rotation of the scene.
            ImageOps.exif_transpose(image, in_place=True)
            upright = image if image.mode == "RGB" else image.convert("RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    tensor: Tensor = pil_to_tensor(square)
    return tensor


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings, which a stranger's file can cause by the thousand.

    Filters belong to the process: enter it before the threads that decode start.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _refuse_large(image: Image.Image) -> int:
    """Return the pixels of an image that is not decoded yet; ValueError if they are too many."""
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):
        # A tile is decoded whole, however little of it the image shows.
        width, height = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"its tiles have {width} x {height} pixels; the limit is {MOST_PIXELS:,}"
            )
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, and the limit is {MOST_PIXELS:,}; "
            "scale it down"
        )
    return pixels


def _tiles(content: bytes) -> int:
    """Return how many strips or tiles a TIFF file says it has; 0 for any other format."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return 0
    (version,) = struct.unpack_from(f"{order}H", content, 2)
    if version == 43:  # BigTIFF
        start, number, entry, at = f"{order}Q", f"{order}Q", f"{order}HHQ8x", 8
    else:
        start, number, entry, at = f"{order}L", f"{order}H", f"{order}HHL4x", 4
    (table,) = struct.unpack_from(start, content, at)
    (entries,) = struct.unpack_from(number, content, table)
    first, each = table + struct.calcsize(number), struct.calcsize(entry)
    found = (struct.unpack_from(entry, content, first + each * k) for k in range(entries))
    return max((n for tag, _, n in found if tag in (_STRIP_OFFSETS, _TILE_OFFSETS)), default=0)
