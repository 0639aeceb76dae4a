"""Measurements in the cache folder of the user, so that an interrupted command resumes.

The key of a measurement is what decides it: the digest of the weights, the data and the settings.
So a copied run is not measured again, and a run that was trained again is. The folder of a run
stays as it is: it may be read-only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sskd.data import DatasetSettings, Images
from sskd.files import cache_folder, read_bounded, write_atomically

FORMAT = 1  # changes with the meaning of a measurement
MOST_BYTES = 2**20
Key = Mapping[str, Any]
Values = dict[str, Any]


def stored(key: Key, measure: Callable[[], Values], *, again: bool = False) -> tuple[Values, bool]:
    """Return what was measured under ``key``, else what ``measure`` returns, and keep that.

    A corrupt file counts as missing, and one that cannot be written is not kept.

    Args:
        again: measure even if there is a measurement.

    Returns:
        The values, and whether they were measured before.
    """
    full = {"format": FORMAT, **key}
    path = _path_of(full)
    if not again and path and (values := _read(path, full)) is not None:
        return values, True
    values = measure()
    if path:
        content = json.dumps({"key": full, "values": values}, indent=1).encode()
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, lambda stream: stream.write(content))
    return values, False


def data_key(settings: DatasetSettings, images: Images) -> Key:
    """Return what decides the images of a dataset and their labels."""
    chosen = ("fraction", "label_noise", "holdout", "seed")
    part = {name: getattr(settings, name) for name in chosen}
    return {**part, **pixels_key(settings, images)}


def pixels_key(settings: DatasetSettings, images: Images) -> Key:
    """Return what decides the images of a dataset, whatever part of them is chosen."""
    key = {"source": settings.source, "size": settings.size, "digest": images.digest}
    # Measurements of earlier versions, which had no other crops, are kept without it.
    return key if settings.crop == "padded" else key | {"crop": settings.crop}


def _path_of(key: Key) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder and folder / "measurements" / f"{digest[:32]}.json"


def _read(path: Path, key: Key) -> Values | None:
    try:
        content = json.loads(read_bounded(path, MOST_BYTES))
        same = content["key"] == json.loads(json.dumps(key))
        return dict(content["values"]) if same else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
