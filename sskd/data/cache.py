"""A dataset's tensors in one file, which is read faster than the published files.

What may be trusted: a safetensors file holds numbers and text, and reading it runs no code.
The digest in it covers the tensors, the classes and the published digests, and is checked
over the very memory that is handed out; a file that is damaged, cut short or another
dataset's is as good as none. It does not guard against forgery: whoever may write to the
data's folder can put wrong images there with a digest that fits them, and no more than that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sskd.data.images import Split
from sskd.data.reading import Source, find_problem
from sskd.files import read_bounded, write_atomically

ABOUT = "about"
MOST_BYTES = 2**30  # CIFAR's caches have 184 MB


def read_cache(path: Path, published: Mapping[str, str]) -> Source | None:
    """Return what ``write_cache`` wrote to ``path``, in ordinary memory; None for all else.

    ``published`` are the digests of the files that the content was made from, by name.
    """
    try:
        # Read once, not mapped into memory: another process may replace the file at any moment.
        content = read_bounded(path, MOST_BYTES, follow=True)
        tensors = load(content)
        about = json.loads(_metadata(content)[ABOUT])
        source = Source(
            tuple(about["classes"]),
            Split(tensors["train.images"], tensors["train.labels"]),
            Split(tensors["test.images"], tensors["test.labels"]),
        )
        whole = about["sha256"] == _digest(source, published)
    # Whatever is wrong with the file, the published ones are read in its place.
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return source if whole and find_problem(source) is None else None


def _metadata(content: bytes) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors, by its published format."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def write_cache(path: Path, published: Mapping[str, str], source: Source) -> None:
    """Write ``source`` to ``path`` whole, or leave it where the folder or the disk forbids that.

    ``published`` is as in ``read_cache``.
    """

    def write(stream: BinaryIO) -> None:
        about = {"classes": source.classes, "sha256": _digest(source, published)}
        stream.write(save(_tensors(source), metadata={ABOUT: json.dumps(about)}))

    # Without a cache all goes on, only later; of a shared folder often nobody may write to it.
    with contextlib.suppress(OSError):
        write_atomically(path, write)


def _tensors(source: Source) -> dict[str, Tensor]:
    return {
        "train.images": source.train.images,
        "train.labels": source.train.labels,
        "test.images": source.test.images,
        "test.labels": source.test.labels,
    }


def _digest(source: Source, published: Mapping[str, str]) -> str:
    """Return the SHA-256 of all tensors, the classes and the published digests."""
    digest = hashlib.sha256(json.dumps([source.classes, dict(published)]).encode())
    for name, tensor in _tensors(source).items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
