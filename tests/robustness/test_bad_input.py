"""Bad input in files of every kind is refused in one line; test_commands.py has the command line.

The line says what is wrong and where. No code is run, no file is changed, and nothing hangs.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Compose
from faults import SMALL
from image_folders import write_images
from PIL import Image
from report_runs import RESULT, put_run, put_status
from test_commands import MISTAKES
from test_data_cifar import cached_cifar, load_again, small_cifar  # noqa: F401  # fixtures
from test_data_folder import load, make_folder, refused, settings

import sskd.data
from sskd.data import Images
from sskd.data.reading import Source
from sskd.data.sources import folder_digest
from sskd.errors import UserError
from sskd.models import build_model, load_weights
from sskd.report import published
from sskd.report.__main__ import main as report_main
from sskd.report.results import read_results
from sskd.train import train

SECONDS = 60  # more than any of these takes; reading a device or a pipe would never end


@contextmanager
def in_time() -> Iterator[None]:
    """Raise an error in the line that hangs if the body takes too long."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("it hung")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _ignore_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the log handlers of Hydra that write to the closed streams of earlier tests."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Code:
    """Creates a folder if it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


# ---- sweep files ----

STUDENT = "defaults:\n  - student\n  - _self_\n"
MULTIRUN = f"{STUDENT}hydra:\n  mode: MULTIRUN\n"
YAML: dict[str, tuple[str | bytes, str]] = {
    "a bracket left open": (f"{STUDENT}batch_size: [1\n", "while parsing a flow sequence in"),
    "a tab": (f"{STUDENT}\tbatch_size: 3\n", "bad.yaml', line 4, column 1"),
    "a key twice": (f"{STUDENT}seed: 1\nseed: 2\n", "found duplicate key seed"),
    "a key that is a list": (f"{STUDENT}? [a, b]\n: 3\n", "found unhashable key"),
    "a key that is a number": (f"{STUDENT}1: 3\n", "1: no such setting"),
    "an alias of nothing": (f"{STUDENT}seed: *missing\n", "found undefined alias"),
    "two documents": (f"{STUDENT}---\nseed: 3\n", "expected a single document"),
    "code": (f"{STUDENT}seed: !!python/object/apply:os.mkdir [CANARY]\n", "python/object/apply:os"),
    "a module": (f"{STUDENT}seed: !!python/module:antigravity\n", "python/module:antigravity"),
    "UTF-16": (b"\xff\xfes\0", "bad.yaml: cannot be composed ('utf-8' codec can't decode byte"),
    "binary": (b"\0\1\2", "unacceptable character #x0000"),
    "nothing": ("", "a sweep's file begins with 'defaults: [student]'"),
    "a text": ("just text\n", "a sweep's file begins with 'defaults: [student]'"),
    "a list": ("- 1\n- 2\n", "must be a DictConfig, got ListConfig"),
    "an unknown key": (f"{STUDENT}batch: 3\n", "batch: no such setting; did you mean 'batch_size'"),
    "an unknown key below": (f"{STUDENT}optimizer:\n  rate: 1\n", "optimizer.rate: no such"),
    "a text for a number": (f"{STUDENT}batch_size: many\n", "should be a valid integer (got 'many"),
    "a number for a group": (f"{STUDENT}schedule: 3\n", "schedule: should be a valid dictionary"),
    "a mapping for a list": (f"{STUDENT}wandb:\n  tags: {{a: b}}\n", "Cannot merge"),
    "not a number": (f"{STUDENT}seed: .nan\n", "seed: should be a valid integer (got nan)"),
    "a date": (f"{STUDENT}runs: 2024-01-01\nseed: 1e400\n", "seed: should be a valid integer"),
    "a variable": (f"{STUDENT}batch_size: ${{missing}}\n", "Interpolation key 'missing' not found"),
    "a circle": (f"{STUDENT}seed: ${{seed}}\n", "seed"),
    "a choice": ("defaults:\n  - student\n  - override method: kdd\n", "did you mean 'kd'?"),
    "a group": ("defaults:\n  - student\n  - override methd: kd\n", "methd"),
    "no file": ("defaults:\n  - nosuch\n", "Could not load 'nosuch'"),
    "no list of defaults": ("defaults: student\n", "defaults must be a list (got str)"),
    "two choices in one": ("defaults:\n  - {a: b, c: d}\n", "Too many keys in default item"),
    "itself": ("defaults:\n  - bad\n", "bad.yaml: its defaults lead back to itself"),
    "a mode": (f"{STUDENT}hydra:\n  mode: NOW\n", "MULTIRUN"),
    "a number for a launcher": (f"{MULTIRUN}  launcher: 3\n", "int is not a subclass of Basic"),
    "a sweep of nothing": (
        f"{MULTIRUN}  sweeper:\n    params: 3\n",
        "hydra.sweeper.params: should",
    ),
    "a sweep of commas": (
        f"{MULTIRUN}  sweeper:\n    params:\n      seed: 0,,1\n",
        "seed=0,,1: cannot be read as KEY=VALUE",
    ),
    "a sweep over no setting": (
        f"{MULTIRUN}  sweeper:\n    params:\n      methd: kd,at\n",
        "methd: no such setting; did you mean 'method'?",
    ),
    "a job that is wrong": (
        f"{MULTIRUN}  sweeper:\n    params:\n      seed: 0,-1\n",
        "seed: should be greater than or equal to 0 (got -1)",
    ),
}


@pytest.mark.parametrize("kind", YAML)
def test_a_sweep_file_is_refused(command: Command, tmp_path: Path, kind: str) -> None:
    text, message = YAML[kind]
    folder, canary = tmp_path / "sweeps", tmp_path / "canary"
    folder.mkdir()
    data = text if isinstance(text, bytes) else text.replace("CANARY", str(canary)).encode()
    (folder / "bad.yaml").write_bytes(data)
    with in_time():
        status, out, err = command("-cd", str(folder), "-cn", "bad", "dataset=digits")
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    assert message in err.replace('"', "'")
    assert not command.runs.exists()
    assert not canary.exists()


# ---- checkpoints ----


class Crash:
    """A NumPy type whose state crashes the interpreter if NumPy unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f4", False, True), (3, "<", None, -1, -1, 0)


Maker = Callable[[Path], object]


def saved(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def network(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a teacher's weights, some of them changed; ``fc_bias`` changes ``fc.bias``."""
    torch.manual_seed(0)
    changed = {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    return {**build_model("resnet14", 10).state_dict(), **changed}


def biased(value: float) -> dict[str, torch.Tensor]:
    return network(fc_bias=torch.full((10,), value))


def packed(**parts: bytes) -> bytes:
    """Return a compressed zip archive with torch's names; ``data_pkl`` is ``net/data.pkl``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(f"net/{name.replace('_', '.')}", part)
    return stream.getvalue()


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file, whose header and length of the header can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(kind: str = "F32", shape: tuple[int, ...] = (2,), start: int = 0, end: int = 8) -> Any:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def about(text: str) -> bytes:
    return tensors({"__metadata__": {"about": text}, "a": entry()}, bytes(8))


KNOWS_FOUR_BITS = tuple(map(int, version("safetensors").split(".")[:2])) >= (0, 6)
CUT = "cannot be read as a checkpoint; it is probably truncated"
NO_STATE = "holds no state dict"
CODE = "asks to run code, which weights do not need: "
# The name of the file, what makes its content from the path of the canary, and the error.
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": ("net.pth", lambda _: b"", CUT),
    "text": ("net.pth", lambda _: b"<html>404</html>", CUT),
    "a cut zip": ("net.pth", lambda _: saved(network())[:30_000], CUT),
    "a cut legacy file": (
        "net.pth",
        lambda _: saved(network(), _use_new_zipfile_serialization=False)[:30_000],
        CUT,
    ),
    "a zip of something else": ("net.pth", lambda _: packed(readme=b"hello"), CUT),
    "a zip in a zip": ("net.pth", lambda _: packed(net_pth=saved(network())), CUT),
    "a zip bomb": (
        "net.pth",
        lambda _: packed(data_pkl=b"\x80\2" + bytes(64 << 20), version=b"3"),
        "would unpack to 64 MiB, far more than its own size",
    ),
    "brackets without end": ("net.pth", lambda _: b"\x80\2" + b"(" * 10**5 + b"t" * 10**5, CUT),
    "a name without end": (
        "net.pth",
        lambda _: b"\x80\2c" + b"a" * 300_000 + b"\nb\n.",
        "holds a name of 300002 characters",
    ),
    "a name without end, of no text": (
        "net.pth",
        lambda _: b"\x80\2c" + b"\xe2" * 300_000 + b"\nb\n.",
        CUT,
    ),
    "a number without end": ("net.pth", lambda _: b"\x80\2\x8b\xff\xff\xff\x7f1", CUT),
    "code, protocol 0": ("net.pth", lambda to: pickle.dumps(Code(to), 0), CODE),
    "code, protocol 2": ("net.pth", lambda to: pickle.dumps({"model": Code(to)}, 2), CODE),
    "code, protocol 4": ("net.pth", lambda to: pickle.dumps({"model": Code(to)}, 4), CODE),
    "code, protocol 5": ("net.pth", lambda to: pickle.dumps([Code(to)], 5), CODE),
    "code in a zip": ("net.pth", lambda to: saved({"state_dict": Code(to)}), CODE),
    "code named over two lines": (
        "net.pth",
        lambda _: b"\x80\4\x8c\5os\nrm\x8c\1x\x93.",
        "os?rm.x",
    ),
    "a type that crashes NumPy": ("net.pth", lambda _: saved({"acc": Crash()}), CUT),
    "a number of too few bytes": (
        "net.pth",
        lambda _: saved({"acc": np.float64(7)}).replace(b"f8", b"f4"),
        CUT,
    ),
    "a network, pickled": ("net.pth", lambda _: saved(build_model("resnet8", 10)), "ResNet"),
    "a list": ("net.pth", lambda _: saved([network()]), "holds a list, not a state dict"),
    "a tensor": ("net.pth", lambda _: saved(torch.ones(3)), "holds a Tensor, not a state dict"),
    "a number": ("net.pth", lambda _: saved(3), "holds a int, not a state dict"),
    "no weights": ("net.pth", lambda _: saved({"model": {}}), NO_STATE),
    "names of no text": ("net.pth", lambda _: saved({3: torch.ones(3)}), NO_STATE),
    "a name over two lines": ("net.pth", lambda _: saved({"a\nb": 3}), "(found: a?b)"),
    "other names": (
        "net.pth",
        lambda _: saved({f"x{name}": tensor for name, tensor in network().items()}),
        "does not fit: missing:",
    ),
    "another shape": ("net.pth", lambda _: saved(network(fc_bias=torch.ones(3))), "another shape"),
    "another network": (
        "net.pth",
        lambda _: saved(build_model("resnet20", 10).state_dict()),
        "name the architecture resnet20, for a teacher with arch@teacher=resnet20",
    ),
    "not a number": ("net.pth", lambda _: saved(biased(torch.nan)), "not finite, in 'fc.bias'"),
    "infinite": ("net.pth", lambda _: saved(biased(torch.inf)), "not finite, in 'fc.bias'"),
    "too large for float32": (
        "net.pth",
        lambda _: saved(network(fc_bias=torch.full((10,), 1e300, dtype=torch.float64))),
        "not finite, in 'fc.bias'",
    ),
    "whole numbers": (
        "net.pth",
        lambda _: saved(network(fc_bias=torch.ones(10, dtype=torch.int64))),
        "holds integers (torch.int64) instead of weights in 'fc.bias'",
    ),
    "complex": (
        "net.pth",
        lambda _: saved(network(fc_bias=torch.ones(10, dtype=torch.complex64))),
        "'fc.bias' in an unsupported format (torch.complex64",
    ),
    "sparse": (
        "net.pth",
        lambda _: saved(network(fc_bias=torch.ones(10).to_sparse())),
        "'fc.bias' in an unsupported format (torch.float32, torch.sparse_coo",
    ),
    "without values": (
        "net.pth",
        lambda _: saved(network(fc_bias=torch.ones(10, device="meta"))),
        "on 'meta'",
    ),
    "a terabyte in a word": (
        "net.pth",
        lambda _: saved({"a": torch.ones(1).half().expand(2**20, 2**19)}),
        "holds fewer values for 'a' than its shape (1048576, 524288) says",
    ),
    "empty safetensors": ("net.safetensors", lambda _: b"", CUT),
    "no tensors": ("net.safetensors", lambda _: tensors({}), NO_STATE),
    "a header of no JSON": ("net.safetensors", lambda _: tensors(b"{not json"), CUT),
    "a header of no text": ("net.safetensors", lambda _: tensors(b"\xff" * 20), CUT),
    "a header beyond the end": ("net.safetensors", lambda _: tensors(b"{}", length=50), CUT),
    "a header of terabytes": ("net.safetensors", lambda _: tensors(b"{}", length=1 << 60), CUT),
    "a deep header": ("net.safetensors", lambda _: tensors(b"[" * 10**5), CUT),
    "overlapping tensors": (
        "net.safetensors",
        lambda _: tensors({"a": entry(), "b": entry(start=4, end=12)}, bytes(12)),
        CUT,
    ),
    "tensors beyond the end": ("net.safetensors", lambda _: tensors({"a": entry()}, bytes(4)), CUT),
    "a gap": ("net.safetensors", lambda _: tensors({"a": entry(start=4, end=12)}, bytes(12)), CUT),
    "a shape that overflows": (
        "net.safetensors",
        lambda _: tensors({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
        CUT,
    ),
    "an unknown type": ("net.safetensors", lambda _: tensors({"a": entry("F99")}, bytes(8)), CUT),
    "four bits": (
        "net.safetensors",
        lambda _: tensors({"a": entry("F4", end=1)}, bytes(1)),
        "holds 'a' in an unsupported format" if KNOWS_FOUR_BITS else CUT,
    ),
    "deep facts": ("net.safetensors", lambda _: about("[" * 10**5), CUT),
    "facts of no JSON": ("net.safetensors", lambda _: about("{"), CUT),
    "code under another name": ("net.safetensors", lambda to: saved({"a": Code(to)}), CODE),
}


def check_teacher_is_refused(command: Command, path: Path | str, message: str) -> None:
    """Use ``path`` as the teacher of a student; it must be refused in one line."""
    arguments = [item for item in SMALL if not item.startswith("teacher.train")]
    with in_time():
        status, out, err = command(*arguments, "method=kd", f"teacher.checkpoint='{path}'")
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    assert message in err
    assert not command.runs.exists()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_refused(command: Command, tmp_path: Path, kind: str) -> None:
    name, make, message = CHECKPOINTS[kind]
    path, canary = tmp_path / name, tmp_path / "canary"
    data = make(canary)
    path.write_bytes(data)
    check_teacher_is_refused(command, path, message)
    assert path.read_bytes() == data
    assert not canary.exists()


def two_of_the_best(folder: Path) -> None:
    for name in ("a_best.pth", "b_best.pt"):
        (folder / name).write_bytes(b"")


def without_permission(path: Path) -> None:
    path.write_bytes(saved(network()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user, probably root, may read any file")


PLACES: dict[str, tuple[str, Maker, str]] = {
    "a link to itself": ("net.pth", lambda path: path.symlink_to(path), "no checkpoint at "),
    "a link to nothing": ("net.pth", lambda path: path.symlink_to("no.pth"), "no checkpoint at "),
    "a pipe": ("net.pth", lambda path: os.mkfifo(path), "no checkpoint at "),
    "a folder of a pipe": ("", lambda path: os.mkfifo(path / "best.pth"), "no checkpoint at "),
    "a folder of a folder": ("", lambda path: (path / "best.pth").mkdir(), "best.pth is a folder"),
    "a folder of nothing": ("", lambda path: None, "it holds nothing; name the file"),
    "a folder of two lines": ("", lambda path: (path / "a\nb").touch(), "it holds a?b; name the"),
    "two of the best": (
        "",
        two_of_the_best,
        "holds more than one best checkpoint: a_best.pth, b_b",
    ),
    "no permission": ("net.pth", without_permission, "cannot be read: permission denied"),
    "a long name": ("x" * 300, lambda path: None, "File name too long"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_file_that_is_no_checkpoint_is_refused(
    command: Command, tmp_path: Path, kind: str
) -> None:
    name, make, message = PLACES[kind]
    (tmp_path / "place").mkdir()
    path = tmp_path / "place" / name
    make(path)
    check_teacher_is_refused(command, path, message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "no checkpoint at /dev/zero"),
        ("~nobody-of-this-name/net.pth", "~nobody-of-this-name has no home folder"),
        ("a\nb.pth", "no checkpoint at a?b.pth"),
    ],
)
def test_a_path_without_a_checkpoint_is_refused(command: Command, path: str, message: str) -> None:
    check_teacher_is_refused(command, path, message)


def test_checkpoints_in_other_precisions_are_loaded(tmp_path: Path) -> None:
    """Weights in half or double precision are no mistakes."""
    weights = network()
    for dtype in (torch.float16, torch.float64):
        changed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        path = tmp_path / "net.pth"
        torch.save(changed, path)
        load_weights(build_model("resnet14", 10), path)


# ---- folders of images ----


def put(image: Image.Image, name: str = "b.png", **options: Any) -> Maker:
    """Return a function that replaces the training image of dogs by ``image``."""

    def change(root: Path) -> None:
        (root / "train" / "dog" / "b.png").unlink()
        image.save(root / "train" / "dog" / name, **options)

    return change


def write(data: bytes) -> Maker:
    return lambda root: (root / "train" / "dog" / "b.png").write_bytes(data)


def image_file(size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "png")
    return stream.getvalue()


def replace_by_file(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").write_text("")


def unreadable_image(root: Path) -> None:
    path = root / "train" / "dog" / "b.png"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user, probably root, may read any file")


def no_classes(root: Path) -> None:
    for name in ("cat", "dog"):
        shutil.rmtree(root / "train" / name)
    (root / "train" / "a.png").write_bytes(image_file())


def new_class(name: str) -> Maker:
    return lambda root: (root / "train" / name).mkdir()


def linked_to_each_other(root: Path) -> None:
    for number in range(20):
        (root / f"train/dog/{number}").symlink_to("../cat")
        (root / f"train/cat/{number}").symlink_to("../dog")


def tree_of_links(root: Path) -> None:
    """Create folders with two links to each from its parent: a million paths to the last."""
    for number in range(20):
        (root / f"tree/{number}").mkdir(parents=True)
        for name in "ab":
            (root / f"tree/{number}/{name}").symlink_to(f"../{number + 1}")
    (root / "tree/20").mkdir()
    (root / "train/dog/tree").symlink_to("../../tree/0")


def moving(name: str) -> Maker:
    """Return a function that replaces the training image of dogs by a red and a blue frame."""
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    return put(frames[0], name, save_all=True, append_images=frames[1:])


IMAGE = "train/dog/b.png cannot be read as an image: "
FOLDERS: dict[str, tuple[Maker, str]] = {
    "missing": (shutil.rmtree, "there is no folder "),
    "a file for a folder": (replace_by_file, "there is no folder "),
    "no classes": (no_classes, "train: holds no class"),
    "an empty class": (new_class("owl"), "train: has no images of owl; "),
    "a class of two lines": (new_class("o\nwl"), "train: has no images of o?wl; "),
    "a class that is a formula": (new_class("=cmd|x"), "train: has no images of =cmd|x; "),
    "classes of one part": (
        lambda root: (root / "test/dog").rename(root / "test/fox"),
        "only train has dog and only test has fox; add",
    ),
    "a class of GIFs": (moving("b.gif"), "has no images of dog; "),
    "an empty image": (write(b""), IMAGE),
    "a text": (write(b"hello"), IMAGE),
    "half an image": (write(image_file()[:2000]), IMAGE),
    "a changed image": (write(image_file().replace(b"IDAT", b"IDAx")), IMAGE),
    "a page": (write(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), IMAGE),
    "16 bits": (put(Image.new("I;16", (32, 32))), f"{IMAGE}more than 8 bits a channel"),
    "32 bits": (put(Image.new("I", (32, 32)), "b.tiff"), "more than 8 bits a channel"),
    "floats": (put(Image.new("F", (32, 32)), "b.tiff"), "more than 8 bits a channel"),
    "a bomb": (put(Image.new("1", (20_000, 20_000))), f"{IMAGE}Image size (400000000 pixels)"),
    "a link to nothing": (
        lambda root: (root / "train/dog/c.png").symlink_to("missing.png"),
        "c.png cannot be read as an image: ",
    ),
    "a link to its folder": (
        lambda root: (root / "train/dog/again").symlink_to(".."),
        "train/dog/again: is the same folder as ",
    ),
    "links to each other's folder": (linked_to_each_other, ": is the same folder as "),
    "a tree of links": (tree_of_links, ": is the same folder as "),
    "a pipe": (
        lambda root: os.mkfifo(root / "train/dog/c.png"),
        "c.png cannot be read as an image: it is not a regular file",
    ),
    "a link to itself": (
        lambda root: (root / "train/dog/c.png").symlink_to("c.png"),
        "c.png cannot be read as an image: ",
    ),
    "no permission": (unreadable_image, f"{IMAGE}[Errno 13] Permission denied"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_images_is_refused(tmp_path: Path, kind: str) -> None:
    change, message = FOLDERS[kind]
    root = make_folder(tmp_path / "photos")
    change(root)
    with in_time():
        line = refused(root)
        with suppress(UserError, OSError):  # it runs before the images are read
            folder_digest(settings(root))
    assert message in line
    assert str(root) in line


FINE: dict[str, tuple[Maker, list[int] | None]] = {
    "one pixel": (put(Image.new("RGB", (1, 1), (1, 2, 3))), [1, 2, 3]),
    "a line": (put(Image.new("RGB", (3000, 1), (1, 2, 3))), [1, 2, 3]),
    "grey and alpha": (put(Image.new("LA", (9, 9), (7, 0))), [7, 7, 7]),
    "moving": (moving("b.png"), [255, 0, 0]),
    "a link to an image": (
        lambda root: (root / "train/dog/c.png").symlink_to(root / "train/cat/a_grey.png"),
        None,
    ),
    "a name in another encoding": (
        lambda root: (root / "train/cat/a_grey.png").rename(root / "train/cat/caf\udce9.png"),
        None,
    ),
    "an odd name": (put(Image.new("RGB", (32, 32), (1, 2, 3)), "=a\n<b>.png"), [1, 2, 3]),
}


@pytest.mark.parametrize("kind", FINE)
def test_an_odd_image_is_read(tmp_path: Path, kind: str) -> None:
    change, colour = FINE[kind]
    root = make_folder(tmp_path)
    change(root)
    images = load(root).train.images
    assert folder_digest(settings(root))
    assert len(images) >= 7
    if colour is not None:
        assert images[6].flatten(1).unique(dim=1).flatten().tolist() == colour


# ---- CIFAR's files ----


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def insert_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code(path.parent / "canary")))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b""), flip_bit, insert_code, replace_by_folder],
    ids=["empty", "changed", "code", "folder"],
)
def test_a_file_of_cifar_is_refused(
    command: Command,
    small_cifar: Path,  # noqa: F811
    damage: Maker,
    name: str,
) -> None:
    folder = small_cifar / "cifar-100-python"
    damage(folder / name)
    before = content(small_cifar)
    words = [f"dataset.root={small_cifar}", "dataset.download=false"]
    status, out, err = command("method=vanilla", *words)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert str(folder / name) in err
    assert content(small_cifar) == before
    assert not (folder / "canary").exists()


def test_a_cache_with_a_label_out_of_range_is_replaced(
    cached_cifar: tuple[Images, Path],  # noqa: F811
) -> None:
    """The digest of the cache fits, so only the label shows the error."""
    from sskd.data.cache import read_cache, write_cache

    images, cache = cached_cifar
    original = cache.read_bytes()
    labels = images.train.labels.clone()
    for wrong in (2, -1, 2**40):
        labels[0] = wrong
        source = Source(images.classes, images.train.with_labels(labels), images.test)
        write_cache(cache, {"train": "digest"}, source)
        assert cache.read_bytes() != original
        assert read_cache(cache, {"train": "digest"}) is None
    assert torch.equal(load_again(cache).train.labels, images.train.labels)


# ---- tiny runs on odd data ----

TINY = ("schedule.epochs=1", "arch@student=resnet8", "arch@teacher=resnet8", "teacher.train=true")


@pytest.mark.parametrize(("label", "message"), [(10, "class 10"), (-1, "class -1")])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_label_out_of_range_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, part: str, label: int, message: str
) -> None:
    reader = sskd.data.SOURCES["digits"]

    def wrong(settings: Any) -> Source:
        source = reader.load(settings)
        split = getattr(source, part)
        labels = split.labels.clone()
        labels[3] = label
        return source._replace(**{part: replace(split, labels=labels)})

    monkeypatch.setitem(sskd.data.SOURCES, "digits", reader._replace(load=wrong))
    with pytest.raises(UserError, match=f"dataset=digits.*{message}, and 10 classes") as error:
        train(composed(*SMALL, "method=vanilla"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_dataset_without_images_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    reader = sskd.data.SOURCES["digits"]

    def empty(settings: Any) -> Source:
        source = reader.load(settings)
        return source._replace(**{part: getattr(source, part).take(torch.arange(0))})

    monkeypatch.setitem(sskd.data.SOURCES, "digits", reader._replace(load=empty))
    with pytest.raises(UserError, match=r"has no (training|test) images"):
        train(composed(*SMALL, "method=vanilla"))


@pytest.mark.parametrize("method", ["vanilla", "kd", "crd", "sskd"])
def test_fewer_images_than_a_batch_are_trained_on(
    composed: Compose, tmp_path: Path, method: str
) -> None:
    root = write_images(tmp_path, 0, count=1)
    words = ("dataset=folder", f"dataset.root={root}", "batch_size=64", f"method={method}")
    result = train(composed(*TINY, *words))
    assert result.top1.last is not None


@pytest.mark.parametrize("method", ["kd", "crd"])
def test_crd_needs_a_second_class(composed: Compose, tmp_path: Path, method: str) -> None:
    """With a single class, KD is trivial and CRD has no negatives."""
    root = write_images(tmp_path, 0)
    for part in ("train", "test"):
        shutil.rmtree(root / part / "light")
    config = composed(*TINY, "dataset=folder", f"dataset.root={root}", f"method={method}")
    if method == "kd":
        assert train(config).top1.last == 100
        return
    with pytest.raises(UserError, match="method=crd resnet8-resnet8: needs images of a second"):
        train(config)


def test_label_noise_needs_a_second_class(composed: Compose, tmp_path: Path) -> None:
    root = write_images(tmp_path, 0)
    for part in ("train", "test"):
        shutil.rmtree(root / part / "light")
    words = ("dataset=folder", f"dataset.root={root}", "dataset.label_noise=0.5")
    with pytest.raises(UserError, match="needs a second class"):
        train(composed(*TINY, *words, "method=vanilla"))


# ---- the folders of runs ----


def damage(name: str, text: str | bytes | None) -> Maker:
    """Return a function that writes ``text`` to a file of a run, or removes it if it is None."""

    def change(folder: Path) -> None:
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def edit(name: str, **changes: Any) -> Maker:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pipe(name: str) -> Maker:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


RUNS: dict[str, tuple[Maker, str]] = {
    "no configuration": (damage("config.yaml", None), "config.yaml: cannot be read ("),
    "a configuration of no YAML": (damage("config.yaml", "a: [1"), "config.yaml: cannot be read ("),
    "a configuration of no text": (damage("config.yaml", b"\xff"), "config.yaml: cannot be read ("),
    "code for a configuration": (
        damage("config.yaml", "a: !!python/object/apply:os.mkdir [canary]"),
        "config.yaml: cannot be read (could not determine a constructor for the tag",
    ),
    "a list for a configuration": (
        damage("config.yaml", "- 1"),
        "config.yaml: cannot be read (it is not a mapping)",
    ),
    "a configuration of brackets": (
        damage("config.yaml", "[" * 60_000),
        "config.yaml: cannot be read (it is nested too deeply)",
    ),
    "a number for a configuration": (
        damage("config.yaml", "1e308"),
        "config.yaml: cannot be read (it is a single value)",
    ),
    "a configuration that explodes": (
        damage("config.yaml", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        "config.yaml: cannot be read (it has aliases",
    ),
    "a result of brackets": (
        damage("result.json", "[" * 100_000 + "]" * 100_000),
        "result.json: is not a result",
    ),
    "a pipe for a result": (pipe("result.json"), "result.json: is not a result"),
    "a pipe for a configuration": (pipe("config.yaml"), "config.yaml: cannot be read (it is no"),
    "an empty configuration": (damage("config.yaml", ""), "holds a run of another configuration: "),
    "a configuration of lists": (
        damage("config.yaml", "teacher: [1]\nstudent: 3\ndataset: null"),
        "holds a run of another configuration: ",
    ),
    "a configuration of formulas": (
        damage("config.yaml", "=cmd|x!A1: 3"),
        "holds a run of another configuration: =cmd|x!A1 (3 there, None here)",
    ),
    "a long text": (
        damage("config.yaml", f"batch_size: {'x' * 50_000}"),
        f"batch_size ('{'x' * 99}...{'x' * 99}' there, 64 here)",
    ),
    "a number that Python does not write": (
        damage("config.yaml", f"batch_size: 0x{'f' * 5000}"),
        "config.yaml: cannot be read (Exceeds the limit",
    ),
    "such a number for a key": (
        damage("config.yaml", f"dataset:\n  ? 0x{'f' * 5000}\n  : 1"),
        "config.yaml: cannot be read (Exceeds the limit",
    ),
    "a result of no JSON": (damage("result.json", "{"), "result.json: is not a result"),
    "a result of no text": (damage("result.json", b"\xff\xfe"), "result.json: is not a result"),
    "a list for a result": (damage("result.json", "[1]"), "result.json: is not a result"),
    "an empty result": (damage("result.json", "{}"), "result.json: has no accuracy"),
    "a result of a number for a figure": (
        edit("result.json", top1=3),
        "result.json: is not a result ('top1' is not an object)",
    ),
    "a result of a text for a figure": (
        edit("result.json", top1={"last": "high"}),
        "result.json: is not a result ('top1': 'last' is not a number)",
    ),
    "a number of 5000 digits": (
        damage("result.json", '{"top1": ' + "1" * 5000 + "}"),
        "result.json: is not a result",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs with one finished run, which can be a teacher."""
    from hydra import compose, initialize_config_dir

    from sskd import CONF
    from sskd.config import read_config

    runs = tmp_path_factory.mktemp("finished") / "runs"
    words = (*ALONE, "wandb.mode=disabled", f"runs={runs}")
    with initialize_config_dir(str(CONF), version_base=None):
        config = read_config(compose("student", list(words)))
    train(config)
    return runs


FEW = ("dataset=digits", "dataset.fraction=0.05", "schedule.epochs=1", "arch@student=resnet8")
ALONE = (*FEW, "method=vanilla")
STUDENT_OF_RUN = (*FEW, "method=kd", "arch@teacher=resnet8", "teacher.fraction=0.05")


def copied(finished: Path, runs: Path) -> Path:
    """Copy the finished run and return its folder."""
    shutil.copytree(finished, runs)
    (result,) = runs.rglob("result.json")
    return result.parent


def check_run_is_refused(
    command: Command, finished: Path, words: tuple[str, ...], change: Maker, message: str
) -> None:
    """Run a command on a changed copy of the finished run; it may only print one line."""
    folder = copied(finished, command.runs)
    change(folder)
    before = content(command.runs)
    with in_time():
        status, out, err = command(*words)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert str(folder) in err
    assert message in err
    assert content(command.runs) == before


@pytest.mark.parametrize("kind", RUNS)
def test_a_changed_run_is_refused(command: Command, finished: Path, kind: str) -> None:
    check_run_is_refused(command, finished, ALONE, *RUNS[kind])
    assert not list(command.runs.rglob("canary"))


TEACHERS: dict[str, tuple[Maker, str]] = {
    "no digest": (edit("result.json", digest=None), "result.json has no digest of the best"),
    "a digest of a number": (
        edit("result.json", digest={"best": 3}),
        "result.json: is not a result ('digest': 'best' is not a name)",
    ),
    "another digest": (
        edit("result.json", digest={"best": "0" * 64}),
        "its weights do not have the digest in its result.json",
    ),
    "no weights": (damage("best.pt", None), "no checkpoint at "),
    "corrupt weights": (damage("best.pt", b"PK\3\4"), CUT),
    "code for weights": (
        damage("best.pt", pickle.dumps({"model": Code(Path("canary"))}, 2)),
        CODE,
    ),
    "another configuration": (damage("config.yaml", "seed: 3"), "a teacher of another config"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_changed_teacher_is_refused(command: Command, finished: Path, kind: str) -> None:
    check_run_is_refused(command, finished, STUDENT_OF_RUN, *TEACHERS[kind])


def test_a_malformed_status_does_not_stop_a_run(command: Command, finished: Path) -> None:
    for text in ("[" * 10**5, "{", "[1]", '{"state": []}'):
        folder = copied(finished, command.runs)
        (folder / "result.json").unlink()
        (folder / "status.json").write_text(text)
        status, _, err = command(*ALONE)
        assert (status, "Traceback" in err) == (0, False)
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        shutil.rmtree(command.runs)


# ---- the report ----

RECORDS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "not JSON"),
    "half an object": (json.dumps(RESULT)[:100], "not JSON"),
    "a list": ("[1]", "not a JSON object"),
    "a text": ('"text"', "not a JSON object"),
    "100,000 brackets": ("[" * 10**5, "nested too deeply"),
    "100,000 objects": ('{"a":' * 10**5, "nested too deeply"),
    "no text": (b"\xff\xfe{", "'utf-8' codec can't decode"),
    "not a number": (json.dumps(RESULT | {"seconds": float("nan")}), "'seconds' is nan, out of"),
    "infinite": (json.dumps(RESULT | {"kl": float("inf")}), "'kl' is inf, out of range"),
    "5000 digits": (json.dumps(RESULT | {"seed": 0})[:-1] + f', "x": {"1" * 5000}}}', "not JSON"),
    "400 digits": (
        json.dumps(RESULT | {"seconds": 10**400}),
        f"'seconds' is 1{'0' * 29}...{'0' * 30}, out of range",
    ),
    "a recipe of 400 digits": (
        json.dumps(RESULT | {"recipe": 10**400}),
        f"'recipe' is 1{'0' * 29}...{'0' * 30}, but",
    ),
    "below zero": (json.dumps(RESULT | {"agreement": -1}), "'agreement' is -1, out of range"),
    "above 100": (json.dumps(RESULT | {"teacher_top1": 101}), "'teacher_top1' is 101, out of"),
    "a top-5 above 100": (
        json.dumps(RESULT | {"top5": {"last": 101}}),
        "'top5': 'last' is 101, out of",
    ),
    "a name of two lines": (json.dumps(RESULT | {"dataset": "a\nb"}), "'dataset' is not a name"),
    "an empty name": (json.dumps(RESULT | {"student": ""}), "'student' is not a name"),
    "a name that is a list": (json.dumps(RESULT | {"method": ["kd"]}), "'method' is not a name"),
    "a key that is no name": (json.dumps(RESULT | {"difference": {"": 1}}), "'difference' has a"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_the_report_leaves_out_a_malformed_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text, message = RECORDS[kind]
    path = tmp_path / "bad" / "result.json"
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    put_run(tmp_path, "good")
    with in_time():
        assert report_main([str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith(f"warning: {path}: ")
    assert message in err
    assert err.endswith("; left out\n")


METRICS: dict[str, bytes] = {
    "binary": bytes(range(256)),
    "cut": b'{"stage": "distill", "epo',
    "an epoch of a billion": b'{"stage": "distill", "epoch": 1000000000}',
    "100,000 brackets": b"[" * 10**5,
    "a stage of two lines": b'{"stage": "a\\nb", "epoch": 1}',
}


@pytest.mark.parametrize("kind", METRICS)
def test_the_report_leaves_out_malformed_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = put_run(tmp_path / "runs", "run")
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(METRICS[kind])
    assert report_main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert str(folder / "metrics.jsonl") in lines[0]
    assert " lines are malformed; left out" in lines[0]


INJECTIONS = (
    *(
        "../../up",
        "/etc/passwd",
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "kd;=cmd|' /C calc'!A0",
        "+1",
        "@SUM(A1)",
    ),
    *(r"\input{/etc/passwd}", r"a|b`c[d](javascript:x)", "{{ 7*7 }}", 'it\'s "quoted"', "é·±"),
)


@pytest.mark.parametrize("name", INJECTIONS)
def test_names_are_escaped_in_the_reports_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    names: dict[str, Any] = dict.fromkeys(("dataset", "teacher", "student", "method"), name)
    put_run(runs, "run", **names, difference={name: name}, commit=name)
    put_status(runs / "failed", "failed", error=name, host=name, command=name)
    out.mkdir()
    assert report_main([str(runs), "--out", str(out / "grid")]) == 0
    assert capsys.readouterr().err == ""
    assert {path.name.split(".")[0].split("-")[0] for path in out.iterdir()} == {"grid"}
    # Matplotlib may create its own folders in a new home.
    shown = (path.name for path in tmp_path.iterdir() if path.name not in (".cache", ".config"))
    assert sorted(shown) == ["out", "runs"]
    page = (out / "grid.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    latex = (out / "grid.tex").read_text(encoding="utf-8")
    assert "\\input{" not in latex
    markdown = (out / "grid.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown.replace("\\<", "")
    assert "[d](" not in markdown
    cells = (out / "grid.csv").read_text(encoding="utf-8").replace('"', "").splitlines()[1]
    for cell in cells.split(";"):
        assert not cell.startswith(("=", "+", "-", "@"))


OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "no such option": (["--bset"], 2, "unrecognized arguments: --bset"),
    "two folders": (["a", "b"], 2, "unrecognized arguments: b"),
    "a time of no number": (["--watch", "soon"], 2, "should be a number of seconds (got 'soon')"),
    "no time": (["--watch", "0"], 2, "must be more than 0"),
    "nothing to write to": (["--out"], 2, "expected one argument"),
    "no such folder": (["missing"], 1, "no readable result.json under 'missing'"),
    "a name of two lines": (["no\nwhere"], 1, "no readable result.json under 'no?where'"),
    "a name of a zero": (["no\0where"], 1, "no readable result.json under 'no?where'"),
    "a long name": (["x" * 5000], 1, "File name too long"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_wrong_options_of_the_report_are_refused(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    arguments, status, message = OPTIONS[kind]
    try:
        found: object = report_main(arguments)
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert (found, out) == (status, "")
    *usage, last = err.splitlines()
    assert message in last
    assert (status == 2) == bool(usage)  # argparse's own errors come with the usage
    assert "error: " in last


HEADER = "table,teacher,student,row,top1"
LINE = "similar,vgg13,vgg8,KD,72.98"
PUBLISHED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "line 0: has no values"),
    "no values": (HEADER, "line 1: has no values"),
    "another header": (f"{HEADER},n\n{LINE},3", f"line 1: should be {HEADER}"),
    "a column missing": (f"{HEADER}\n{LINE}\nsimilar,vgg13,KD,70", "line 3: has 4 columns, not 5"),
    "a column more": (f"{HEADER}\n{LINE},3", "line 2: has 6 columns, not 5"),
    "an empty line": (f"{HEADER}\n\n{LINE}", "line 2: has 0 columns, not 5"),
    "no name": (f"{HEADER}\nsimilar,,vgg8,KD,70", "line 2: has no teacher"),
    "no number": (f"{HEADER}\n{LINE}x", "line 2: could not convert string to float: '72.98x'"),
    "not a number": (f"{HEADER}\nsimilar,a,b,KD,nan", "line 2: top1 is nan, not from 0 to 100"),
    "above 100": (f"{HEADER}\nsimilar,a,b,KD,7298", "line 2: top1 is 7298, not from 0 to 100"),
    "below 0": (f"{HEADER}\nsimilar,a,b,KD,-1", "line 2: top1 is -1, not from 0 to 100"),
    "twice": (f"{HEADER}\n{LINE}\n{LINE}", "line 3: vgg13, vgg8, KD has a value already"),
    "a quote left open": (f'{HEADER}\nsimilar,"a,b,KD,70', "unexpected end of data"),
    "no text": (b"\xff\xfe", "'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_malformed_published_values_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    text, message = PUBLISHED[kind]
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(
        published, "SOURCES", {"cifar100": (published.PublishedSource(str(path), "", ()),)}
    )
    published.all_published.cache_clear()
    put_run(tmp_path / "runs", "run")
    try:
        assert report_main([str(tmp_path / "runs")]) == 1
    finally:
        published.all_published.cache_clear()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {path}, line ")
    assert message in err


def test_at_least_eighty_kinds_are_tested() -> None:
    tables: list[Any] = [YAML, CHECKPOINTS, PLACES, FOLDERS, RUNS, TEACHERS, RECORDS, METRICS]
    tables += [INJECTIONS, OPTIONS, PUBLISHED]
    inputs = {repr(mistake) for mistake, _ in MISTAKES}
    assert len(inputs) == len(MISTAKES)
    assert len(inputs) + sum(map(len, tables)) >= 80


def test_a_number_of_a_million_digits_is_not_converted(tmp_path: Path) -> None:
    """Python refuses more than 4300 digits, since the conversion takes quadratic time."""
    path = tmp_path / "run" / "result.json"
    path.parent.mkdir()
    path.write_text('{"seed": ' + "9" * 10**6 + "}")
    warnings: list[str] = []
    with in_time():
        assert read_results(tmp_path, warnings.append) == []
    assert len(warnings) == 1
