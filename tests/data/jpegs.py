"""Generated JPEG files of many sizes, and the datasets that the tests load from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from sskd.data import DatasetSettings, Images, load_images

CONF = Path(__file__).parents[2] / "conf" / "dataset"
CLASSES = ("ant", "bee", "cow", "dog")


def write_jpegs(root: Path, train: int, test: int) -> Path:
    """Write images of smooth colours, 20 to 120 pixels on each side, in four classes."""
    generator = np.random.default_rng(train)
    for part, count in (("train", train), ("test", test)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for number in range(count):
            width, height = (int(each) for each in generator.integers(20, 121, 2))
            colours = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            picture = colours.resize((width, height), Image.Resampling.BILINEAR)
            picture.save(root / part / CLASSES[number % 4] / f"{number:04}.jpg", quality=90)
    return root


def settings(root: Path, **changes: Any) -> DatasetSettings:
    """Return the settings in the real YAML file of a packed folder, decoded in this process."""
    shown = yaml.safe_load((CONF / "folder.yaml").read_text())
    own = {"root": str(root), "crop": "resized", "workers": 0}
    return DatasetSettings(**{**shown, **own, **changes})


def load(root: Path, **changes: Any) -> Images:
    return load_images(settings(root, **changes))
