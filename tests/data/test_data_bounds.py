"""Decoding images of unknown origin: the allowed formats, and bounds on memory."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps
from test_data_folder import load, make_folder, refused, settings

import sskd.data.decode
from sskd.data.decode import FORMATS, MAX_BYTES, MAX_PIXELS, MAX_TILES, decode
from sskd.data.folder import folder_digest
from sskd.data.listing import EXTENSIONS
from sskd.errors import UserError

# ---- formats ----


def image_as(form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["EPS", "GIF", "ICO", "PCX", "SGI", "TGA", "DDS", "ICNS"])
@pytest.mark.parametrize("name", ["b.png", "b.jpg"])
def test_another_format_is_refused_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str
) -> None:
    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("PostScript is a program, and must not be run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    root = make_folder(tmp_path)
    (root / "train/dog/b.png").unlink()
    (root / "train/dog" / name).write_bytes(image_as(form))
    assert f"{name} cannot be read as an image: cannot identify" in refused(root)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: ran.append(args))
    root = make_folder(tmp_path)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    for start in (b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<LL", 32, len(page)) + bytes(20)):
        (root / "train/dog/b.png").write_bytes(start + page)
        refused(root)
    assert ran == []


@pytest.mark.parametrize("form", FORMATS)
def test_each_allowed_format_is_read(form: str) -> None:
    colour = decode(image_as(form), 32).flatten(1).float().mean(1)
    assert colour.tolist() == pytest.approx([200, 100, 50], abs=3)


def test_the_extensions_are_those_of_the_formats() -> None:
    assert {Image.registered_extensions()[extension] for extension in EXTENSIONS} == set(FORMATS)


# For each orientation of EXIF 2.3: the stored pixels of an image that is displayed as ``a``.
STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[::-1],
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[:, ::-1],
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "TIFF lzw": {}}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_photograph_is_upright(tmp_path: Path, form: str, orientation: int, mode: str) -> None:
    """This includes an uncompressed TIFF, which Pillow garbles if it maps the file into memory."""
    shown = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {**LOSSLESS[form], "exif": exif}
    name, _, compression = form.partition(" ")
    if compression:
        options["compression"] = f"tiff_{compression}"
    root = make_folder(tmp_path)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](shown)))
    stored.convert(mode).save(root / "train/dog/b.png", name, **options)
    image = load(root).train.images[6].numpy()
    assert (image == shown[:, 8:40]).all(), "the centre, 32 pixels wide"


# ---- bounds ----


def png(width: int, height: int) -> bytes:
    """Return a PNG of one colour, with 1 bit per pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg(width: int, height: int) -> bytes:
    """Return a JPEG of 32 x 32 pixels whose header states another size."""
    content = bytearray(image_as("JPEG"))
    start = content.index(b"\xff\xc0")  # the frame header: length, bits, height, width
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp(width: int, height: int) -> bytes:
    content = bytearray(image_as("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def tiff(tags: list[tuple[int, int, int]], data: bytes = b"") -> bytes:
    """Return a little-endian TIFF; ``tags`` are (tag, count, value), with 32-bit values."""
    table = b"".join(struct.pack("<HHLL", tag, 4, count, value) for tag, count, value in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + table + bytes(4) + data


def grey_tiff(width: int, height: int, *more: tuple[int, int, int], data: bytes = b"") -> bytes:
    tags = [(256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, 8), (262, 1, 1), (277, 1, 1)]
    return tiff([*tags, *more], data)


def tiff_of_one_tile(side: int) -> bytes:
    """Return a TIFF of one pixel in a tile of ``side`` x ``side``, which is decoded completely."""
    data = zlib.compress(bytes(side * side), 9)
    start = 8 + 2 + 12 * 10 + 4
    tile = [(322, 1, side), (323, 1, side), (324, 1, start), (325, 1, len(data))]
    return grey_tiff(1, 1, *tile, data=data)


def tiff_of_strips(count: int) -> bytes:
    start = 8 + 2 + 12 * 9 + 4
    strips = [(273, count, start), (278, 1, 1), (279, count, start + 4 * count)]
    return grey_tiff(1, count, *strips, data=bytes(8 * count))


def big_tiff_of_strips(count: int) -> bytes:
    table = struct.pack("<HHQQ", 273, 4, count, 36)
    return b"II" + struct.pack("<HHHQQ", 43, 8, 0, 16, 1) + table + bytes(8 * count)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PNG": (lambda: png(13_000, 13_000), "it has 13000 x 13000 pixels"),
    "a PNG beyond Pillow's limit": (lambda: png(20_000, 20_000), "exceeds limit"),
    "a PNG with one row too many": (lambda: png(8192, 8193), "it has 8192 x 8193 pixels"),
    "a JPEG header": (lambda: jpeg(13_000, 13_000), "it has 13000 x 13000 pixels"),
    "the largest JPEG header": (lambda: jpeg(65_500, 65_500), "exceeds limit"),
    "a BMP header": (lambda: bmp(13_000, 13_000), "it has 13000 x 13000 pixels"),
    "a PPM header": (lambda: b"P6 13000 13000 255\n", "it has 13000 x 13000 pixels"),
    "a TIFF header": (lambda: grey_tiff(13_000, 13_000), "it has 13000 x 13000 pixels"),
    "a TIFF tile": (lambda: tiff_of_one_tile(8200), "its tiles have 8200 x 8200 pixels"),
    "TIFF strips": (lambda: tiff_of_strips(MAX_TILES + 1), "262,145 strips or tiles"),
    "BigTIFF strips": (lambda: big_tiff_of_strips(MAX_TILES + 1), "262,145 strips or tiles"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    make, expected = BOMBS[kind]
    root = make_folder(tmp_path)
    loaded, load_image = [], ImageFile.ImageFile.load

    def watched(image: Any) -> Any:
        loaded.append(image.size)
        return load_image(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    (root / "train/dog/b.png").write_bytes(make())
    message = refused(root)
    assert f"{root / 'train/dog/b.png'} cannot be read as an image: " in message
    assert expected in message
    assert max(width * height for width, height in loaded) < 10_000, "only small images are decoded"
    assert capfd.readouterr().err == "", "no warning from Pillow"


def test_the_limit_of_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sskd.data.decode, "MAX_PIXELS", 32 * 40)
    assert decode(png(40, 32), 32).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="41 x 32 pixels"):
        decode(png(41, 32), 32)
    assert MAX_PIXELS == 8192 * 8192


def test_a_tiled_tiff_is_read() -> None:
    assert decode(tiff_of_one_tile(256), 32).unique().tolist() == [0]


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 60 * 2**30])
def test_a_file_over_the_limit_is_not_read(tmp_path: Path, size: int) -> None:
    root = make_folder(tmp_path)
    with (root / "train/dog/b.png").open("r+b") as stream:
        stream.truncate(size)  # sparse
    start = time.monotonic()
    assert f"it has more than {MAX_BYTES} bytes, the limit" in refused(root)
    with pytest.raises(UserError, match="bytes, the limit for such a file"):
        folder_digest(settings(root))
    assert time.monotonic() - start < 5


def test_the_files_of_all_threads_fit_into_memory() -> None:
    max_threads = 32  # the default of ThreadPoolExecutor
    assert max_threads * MAX_BYTES <= 2**31


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path)
    at_once, counts, guard, fit = 0, [], threading.Lock(), ImageOps.fit

    def slow(*args: Any) -> Any:
        nonlocal at_once
        with guard:
            at_once += 1
            counts.append(at_once)
        time.sleep(0.02)
        with guard:
            at_once -= 1
        return fit(*args)

    monkeypatch.setattr(ImageOps, "fit", slow)
    load(root)
    assert max(counts) > 1, "small images are decoded in parallel"
    counts.clear()
    monkeypatch.setattr(sskd.data.decode, "_LARGE", 0)
    load(root)
    assert max(counts) == 1


def test_a_large_compressed_text_is_refused() -> None:
    """Pillow limits the size of the compressed texts and profiles in a PNG."""
    content = image_as("PNG")
    end = content.index(b"IDAT") - 4
    for kind, data in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        data += zlib.compress(bytes(100 * 2**20), 9)
        crc = struct.pack(">I", zlib.crc32(kind + data))
        chunk = struct.pack(">I", len(data)) + kind + data + crc
        with pytest.raises(ValueError, match=r"[Dd]ecompressed"):
            decode(content[:end] + chunk + content[end:], 32)


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG"])
def test_only_the_first_frame_is_decoded(form: str) -> None:
    frames = [Image.new("RGB", (64, 64), (k, 0, 0)) for k in range(50)]
    stream = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], **options)
    assert decode(stream.getvalue(), 32).unique().tolist() == [0]


def test_pillows_warnings_do_not_reach_the_terminal(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    # Pillow warns of each tag that points beyond the file.
    table = b"".join(struct.pack("<HHLL", 40_000 + k, 1, 2**20, 8) for k in range(100))
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 100) + table + bytes(4)
    (root / "train/dog/b.png").write_bytes(image_as("PNG", exif=exif))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(root)
    assert [warning for warning in caught if "PIL" in str(warning.filename)] == []
