"""CIFAR's files that change while they are read, or that are not regular files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_cifar import assert_same, cached_cifar, settings, small_cifar  # noqa: F401

from sskd.data import Images, load_images
from sskd.data.cache import read_cache
from sskd.errors import UserError

GIGABYTES = 60 * 2**30


def make_sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(GIGABYTES)


def other_images() -> bytes:
    images = np.zeros((6, 3072), np.uint8)
    return pickle.dumps({"data": images, "fine_labels": [1] * 6})


@pytest.mark.parametrize("moment", range(12))
def test_a_file_that_changes_after_its_digest_is_not_used(
    small_cifar: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    """The images, and those in the cache, are the published ones, whenever the file changes."""
    path = small_cifar / "cifar-100-python" / "train"
    expected = load_images(settings("cifar100", root=str(small_cifar)))
    cache = small_cifar / "cifar-100-python.safetensors"
    cache.unlink()
    computed, md5 = 0, hashlib.md5

    class Watched:
        def __init__(self, *content: bytes, usedforsecurity: bool = True) -> None:
            self.update, self._digest = None, md5(*content, usedforsecurity=usedforsecurity)
            self.update = self._digest.update

        def hexdigest(self) -> str:
            nonlocal computed
            found = self._digest.hexdigest()
            if computed == moment:
                path.write_bytes(other_images())
            computed += 1
            return found

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "md5", Watched)
        try:
            found = load_images(settings("cifar100", root=str(small_cifar), download=False))
        except UserError:
            assert not cache.exists()
        else:
            assert_same(found, expected)
            assert_same(load_images(settings("cifar100", root=str(small_cifar))), expected)
    assert computed > 0


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, make_sparse])
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_other_kinds_of_files_are_refused_at_once(
    small_cifar: Path,  # noqa: F811
    put: Callable[[Path], Any],
    name: str,
) -> None:
    path = small_cifar / "cifar-100-python" / name
    path.unlink()
    put(path)
    with pytest.raises(UserError, match=str(path)):
        load_images(settings("cifar100", root=str(small_cifar), download=False))


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, make_sparse])
def test_a_cache_that_is_not_a_file_is_ignored(
    cached_cifar: tuple[Images, Path],  # noqa: F811
    put: Callable[[Path], Any],
) -> None:
    images, cache = cached_cifar
    cache.unlink()
    put(cache)
    again = load_images(settings("cifar100", root=str(cache.parent), download=False))
    assert torch.equal(again.train.images, images.train.images)


@pytest.mark.parametrize(
    "header", [b"[" * 5_000, b'{"__metadata__": 3}', b'{"__metadata__": {"about": "{}"}}', b"{}"]
)
def test_a_cache_with_a_broken_header_is_ignored(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_cache(path, {}) is None
