"""A cache of a dataset's tensors in one file, which is faster to read than the published files.

A safetensors file holds only numbers and text, so reading it runs no code. The file contains a
digest of the tensors, the classes and the digests of the published files. The digest is checked
on the tensors that are returned, so a file that is corrupt, truncated or belongs to other data is
ignored. This does not prevent forgery: a user with write access to the folder of the data can store
wrong images with a matching digest.
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

METADATA_KEY = "about"
MAX_BYTES = 2**30  # CIFAR's caches have 184 MB


def read_cache(path: Path, published: Mapping[str, str]) -> Source | None:
    """Return the dataset that ``write_cache`` wrote to ``path``; None for any other file.

    ``published`` are the digests, by name, of the files from which the cache was made.
    """
    try:
        # Read once and not mapped into memory: another process may replace the file at any time.
        content = read_bounded(path, MAX_BYTES, follow=True)
        tensors = load(content)
        metadata = json.loads(read_metadata(content)[METADATA_KEY])
        source = Source(
            tuple(metadata["classes"]),
            Split(tensors["train.images"], tensors["train.labels"]),
            Split(tensors["test.images"], tensors["test.labels"]),
        )
        is_intact = metadata["sha256"] == _digest(source, published)
    # After any problem with the cache, the published files are read instead.
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return source if is_intact and find_problem(source) is None else None


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file: its length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def write_cache(path: Path, published: Mapping[str, str], source: Source) -> None:
    """Write ``source`` to ``path`` atomically; an error is ignored, because the cache is optional.

    A shared folder, for example, is often read-only. ``published`` is as in ``read_cache``. A
    dataset that is too large for ``read_cache`` is not written.
    """
    if sum(tensor.nbytes for tensor in _tensors(source).values()) >= MAX_BYTES - 2**20:
        return

    def write(stream: BinaryIO) -> None:
        metadata = {"classes": source.classes, "sha256": _digest(source, published)}
        stream.write(save(_tensors(source), metadata={METADATA_KEY: json.dumps(metadata)}))

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
