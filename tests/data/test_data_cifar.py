"""CIFAR: reading, refusing and downloading the published files, and the cache."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load, save
from stand_in import wait_until
from starting import Started
from torchvision.datasets import CIFAR10, CIFAR100

import sskd.data.cifar
from sskd.data import DatasetSettings, Images, load_images
from sskd.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
REAL = os.environ.get("SSKD_DATA")


def settings(name: str, **changes: Any) -> DatasetSettings:
    """Return the settings in the real YAML file, with changes."""
    return DatasetSettings(**{**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **changes})


def refused(name: str, **changes: Any) -> str:
    """Return the error message for the settings; it is one line."""
    with pytest.raises(UserError) as caught:
        load_images(settings(name, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_cifar(folder: Path) -> dict[str, str]:
    """Write a small CIFAR-100 in the published layout; return the MD5 digests of its files."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {
        name: {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [k % 2 for k in range(count)],
        }
        for name, count in (("train", 6), ("test", 4))
    }
    content["meta"] = {"fine_label_names": ["apple", "baby"]}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    return {
        name: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        for name in content
    }


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a small CIFAR-100, with its digests in place of the published ones."""
    digests = write_cifar(tmp_path / "root" / "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digests["meta"]})
    return tmp_path / "root"


def no_download(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing may be downloaded here")


def test_all_pixels_of_cifar_are_read(small_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sskd.data.cifar, "download_and_extract_archive", no_download)
    images = load_images(settings("cifar100", root=str(small_cifar)))
    raw = pickle.loads((small_cifar / "cifar-100-python" / "train").read_bytes())
    assert images.train.images.flatten(1).numpy().tolist() == raw["data"].tolist()
    assert images.train.labels.tolist() == raw["fine_labels"]
    assert images.train.labels.dtype == torch.int64
    assert (len(images.test), images.classes) == (4, ("apple", "baby"))
    assert images.mean == (0.5071, 0.4866, 0.4409)


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_missing_files_are_reported_with_advice(name: str, tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path):
        message = refused(name, root=str(root), download=False)
        assert str(root) in message
        assert "dataset.root=FOLDER" in message
        assert "dataset.download=true" in message
    assert not (tmp_path / "absent").exists()


def test_a_relative_root_is_reported_as_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "somewhere") in refused("cifar100", root="somewhere", download=False)


@pytest.mark.parametrize("broken", ["train", "test", "meta"])
@pytest.mark.parametrize("download", [False, True])
def test_a_truncated_file_is_named_and_not_changed(
    broken: str, download: bool, small_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sskd.data.cifar, "download_and_extract_archive", no_download)
    path = small_cifar / "cifar-100-python" / broken
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    message = refused("cifar100", root=str(small_cifar), download=download)
    assert str(path) in message
    assert "published" in message
    assert "move it away" in message
    assert path.read_bytes() == before


def test_only_files_with_the_digest_are_unpickled(small_cifar: Path) -> None:
    marker = small_cifar / "was-unpickled"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    hostile = pickle.dumps(Hostile())
    for name in ("train", "test", "meta"):
        path = small_cifar / "cifar-100-python" / name
        published = path.read_bytes()
        path.write_bytes(hostile)
        assert name in refused("cifar100", root=str(small_cifar), download=False)
        path.write_bytes(published)
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists(), "the pickle really runs the code"


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no such host"),
        TimeoutError("timed out"),
        RuntimeError("File not found or corrupted."),
    ],
)
def test_a_failed_download_is_reported_in_one_line(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert socket.getdefaulttimeout() == 30
        raise failure

    monkeypatch.setattr(sskd.data.cifar, "download_and_extract_archive", fail)
    message = refused("cifar10", root=str(tmp_path / "new"), download=True)
    assert CIFAR10.url in message
    assert str(tmp_path / "new") in message
    assert str(failure) in message
    assert "dataset.root=FOLDER" in message
    assert socket.getdefaulttimeout() is None


def test_a_root_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("cifar10", root=str(tmp_path / "file" / "below"), download=True)
    assert str(tmp_path / "file" / "below") in message


LOAD_SCRIPT = """
import json, sys
from torchvision.datasets import CIFAR100
from sskd.data import DatasetSettings, load_images
arguments = json.loads(sys.argv[1])
for name, value in arguments["published"].items():
    setattr(CIFAR100, name, value)
print(len(load_images(DatasetSettings(**arguments["settings"])).train), flush=True)
"""


class Archive(http.server.BaseHTTPRequestHandler):
    """Sends the first half of an archive, and the rest after the event ``resumes``."""

    content: bytes
    resumes: threading.Event
    requests: Counter[str]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.headers["Method"] == "HEAD":  # from torchvision, to follow redirections
            return
        self.requests[self.path] += 1
        half = len(self.content) // 2
        self.wfile.write(self.content[:half])
        self.wfile.flush()
        self.resumes.wait(60)
        with suppress(OSError):  # the client may be dead
            self.wfile.write(self.content[half:])

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def served(small_cifar: Path) -> Iterator[tuple[type[Archive], dict[str, Any]]]:
    """A server of the small CIFAR-100, and the attributes that torchvision needs for it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(small_cifar / CIFAR100.base_folder, CIFAR100.base_folder)
    content = packed.getvalue()
    attributes = {"content": content, "resumes": threading.Event(), "requests": Counter()}
    handler: type[Archive] = type("Handler", (Archive,), attributes)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield (
            handler,
            {
                "url": f"http://127.0.0.1:{server.server_address[1]}/archive",
                "tgz_md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
                "train_list": CIFAR100.train_list,
                "test_list": CIFAR100.test_list,
                "meta": CIFAR100.meta,
            },
        )
        handler.resumes.set()
        server.shutdown()


def start_load(root: Path, published: dict[str, Any]) -> Started:
    """Start a process that downloads the small CIFAR-100 into ``root`` and loads it."""
    loaded = settings("cifar100", root=str(root)).model_dump()
    arguments = {"published": published, "settings": loaded}
    return Started("-c", LOAD_SCRIPT, json.dumps(arguments))


def test_parallel_processes_download_once(
    served: tuple[type[Archive], dict[str, Any]], tmp_path: Path
) -> None:
    server, published = served
    root = tmp_path / "new"
    loads = [start_load(root, published) for _ in range(2)]
    wait_until(lambda: server.requests)
    assert not (root / CIFAR100.base_folder).exists()
    time.sleep(0.5)  # the other process waits for the lock
    server.resumes.set()
    assert [load.communicate(timeout=60)[0] for load in loads] == ["6\n", "6\n"]
    assert server.requests.total() == 1
    assert sorted(path.name for path in (root / CIFAR100.base_folder).iterdir()) == [
        "meta", "test", "train",
    ]  # fmt: skip


def test_a_killed_download_leaves_no_partial_file(
    served: tuple[type[Archive], dict[str, Any]], tmp_path: Path
) -> None:
    server, published = served
    root = tmp_path / "new"
    killed = start_load(root, published)
    wait_until(lambda: server.requests)
    time.sleep(0.2)
    killed.kill()
    killed.communicate()
    part = root / f".{CIFAR100.base_folder}.part" / CIFAR100.base_folder
    part.mkdir(parents=True)
    (part / "train").write_bytes(b"left by a process that was killed while it unpacked")
    server.resumes.set()
    load = start_load(root, published)
    assert load.communicate(timeout=60)[0] == "6\n"
    assert not part.parent.exists()


@pytest.fixture
def cached_cifar(small_cifar: Path) -> tuple[Images, Path]:
    """The result of the first load of a small CIFAR-100, and the cache that it writes."""
    images = load_images(settings("cifar100", root=str(small_cifar)))
    return images, small_cifar / "cifar-100-python.safetensors"


def load_again(cache: Path) -> Images:
    """Load again, with the cache as it is."""
    return load_images(settings("cifar100", root=str(cache.parent), download=False))


def assert_same(images: Images, others: Images) -> None:
    assert images.classes == others.classes
    for split, other in ((images.train, others.train), (images.test, others.test)):
        for tensor, same in ((split.images, other.images), (split.labels, other.labels)):
            assert tensor.dtype == same.dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor, same)


def test_a_second_load_needs_only_the_cache(cached_cifar: tuple[Images, Path]) -> None:
    images, cache = cached_cifar
    shutil.rmtree(cache.parent / "cifar-100-python")
    assert_same(load_again(cache), images)
    cache.unlink()
    assert "is not in" in refused("cifar100", root=str(cache.parent), download=False)


def test_loaded_images_do_not_depend_on_the_cache(cached_cifar: tuple[Images, Path]) -> None:
    images, cache = cached_cifar
    loaded = load_again(cache)
    cache.write_bytes(bytes(cache.stat().st_size))
    cache.unlink()
    assert_same(loaded, images)
    loaded.train.images.zero_()


def change_one_pixel(content: bytes) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")
    return content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]


def change_a_label(content: bytes) -> bytes:
    """Change a label and keep the digest."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = load(content)
    tensors["train.labels"][0] += 1
    return save(tensors, header["__metadata__"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: b"not safetensors" * 1000,
        lambda content: content.replace(b"baby", b"bear"),
        lambda content: save(load(content)),
        lambda content: save(load(content), {"about": "[]"}),
        lambda content: save({"weight": torch.ones(2)}, {"about": '{"classes": [], "sha256": ""}'}),
        change_one_pixel,
        change_a_label,
    ],
)
def test_a_corrupt_or_foreign_cache_is_replaced(
    damage: Callable[[bytes], bytes], cached_cifar: tuple[Images, Path]
) -> None:
    images, cache = cached_cifar
    intact = cache.read_bytes()
    cache.write_bytes(damage(intact))
    assert cache.read_bytes() != intact
    assert_same(load_again(cache), images)
    assert cache.read_bytes() == intact


def test_the_cache_of_other_published_files_is_not_used(
    cached_cifar: tuple[Images, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = cached_cifar
    monkeypatch.setattr(CIFAR100, "test_list", [["test", "0" * 32]])
    assert "differs from the published file" in refused(
        "cifar100", root=str(cache.parent), download=False
    )


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fails", ["open", "flush"])
def test_a_cache_that_cannot_be_written_is_skipped(
    error: int,
    fails: str,
    small_cifar: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(error, os.strerror(error))

    opened = Path.open

    def open_to_read(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return refuse() if "w" in mode else opened(path, mode, *args, **kwargs)

    if fails == "open":
        monkeypatch.setattr(Path, "open", open_to_read)
    else:
        monkeypatch.setattr("sskd.files.os.fsync", refuse)
    images = load_images(settings("cifar100", root=str(small_cifar)))
    assert len(images.train) == 6
    assert [path.name for path in small_cifar.iterdir()] == ["cifar-100-python"]
    assert capfd.readouterr() == ("", "")


def test_a_read_only_folder_is_not_changed(small_cifar: Path) -> None:
    small_cifar.chmod(0o555)
    if os.access(small_cifar, os.W_OK):
        pytest.skip("this user may write to any folder")
    assert len(load_images(settings("cifar100", root=str(small_cifar))).train) == 6
    assert [path.name for path in small_cifar.iterdir()] == ["cifar-100-python"]


def test_another_size_of_cifar_is_refused() -> None:
    assert "dataset.size=32" in refused("cifar100", size=64)


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder with a link to the real files."""
    if REAL is None:
        pytest.skip("SSKD_DATA names no folder that holds cifar-100-python")
    root = tmp_path_factory.mktemp("data")
    (root / "cifar-100-python").symlink_to(Path(REAL).absolute() / "cifar-100-python")
    return root


@pytest.fixture(scope="module")
def real_cifar100(real_root: Path) -> Images:
    """The result of the first load."""
    return load_images(settings("cifar100", root=str(real_root), mean=None, std=None))


def test_cifar100_has_its_published_size(real_cifar100: Images) -> None:
    assert real_cifar100.train.images.shape == (50000, 3, 32, 32)
    assert real_cifar100.test.images.shape == (10000, 3, 32, 32)
    assert torch.bincount(real_cifar100.train.labels).tolist() == [500] * 100
    assert torch.bincount(real_cifar100.test.labels).tolist() == [100] * 100
    assert (real_cifar100.num_classes, real_cifar100.image_size) == (100, 32)
    assert real_cifar100.classes[:2] == ("apple", "aquarium_fish")


def test_cifar100_has_the_pixels_of_torchvision(real_root: Path, real_cifar100: Images) -> None:
    reference = CIFAR100(real_root, train=False)
    for position in range(0, 10000, 97):
        image, label = reference[position]
        pixels = real_cifar100.test.images[position].permute(1, 2, 0).numpy()
        assert (pixels == np.asarray(image)).all()
        assert real_cifar100.test.labels[position] == label


def test_cached_cifar100_has_the_pixels_of_torchvision(
    real_root: Path, real_cifar100: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = CIFAR100(real_root, train=True), CIFAR100(real_root, train=False)
    monkeypatch.setattr(CIFAR100, "__init__", no_download)
    cached = load_again(real_root / "cifar-100-python.safetensors")
    assert list(cached.classes) == references[0].classes
    for split, reference in zip((cached.train, cached.test), references, strict=True):
        assert (split.images.permute(0, 2, 3, 1).numpy() == reference.data).all()
        assert split.labels.tolist() == reference.targets


def test_the_published_mean_and_std_are_those_of_cifar100(
    real_cifar100: Images,
) -> None:
    recipe = settings("cifar100")
    assert real_cifar100.mean == pytest.approx(recipe.mean, abs=1e-4)
    assert real_cifar100.std == pytest.approx(recipe.std, abs=3e-4)
