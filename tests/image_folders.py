"""Folders of images that tests write."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_images(root: Path, shade: int, count: int = 4) -> Path:
    """Write ``count`` images of each of two classes for training and test; return the folder."""
    for part in ("train", "test"):
        for label in ("dark", "light"):
            folder = root / "photos" / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                colour = (shade, 200 * (label == "light"), number)
                Image.new("RGB", (32, 32), colour).save(folder / f"{number}.bmp")
    return root / "photos"
