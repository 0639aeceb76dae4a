"""A folder of images by class: what of it is read, its identity, and its images as tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sskd.data.decode import MOST_BYTES, decode, quiet_pillow
from sskd.data.digests import digests
from sskd.data.images import Split
from sskd.data.reading import Source, abbreviate, absolute_path, one_line
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError, shortened
from sskd.files import MOST_DEPTH, is_too_deep, read_bounded
from sskd.output import complain_once

PARTS = ("train", "test")
_LAYOUT = "train/CLASS and test/CLASS"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What systems, office programs, cameras' cards and network drives leave in folders; in lower case.
SYSTEM_STARTS = (".", "~$", "@syno")
SYSTEM_NAMES = frozenset(
    {
        "thumbs.db",
        "thumbs.db:encryptable",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "icon\r",
        "__macosx",
        "__pycache__",
        "lost+found",
        "system volume information",
        "$recycle.bin",
        "recycler",
        "found.000",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "network trash folder",
        "temporary items",
        "thevolumesettingsfolder",
        "_gsdata_",
        "aquota.user",
        "aquota.group",
    }
)


@dataclass
class PassedOver:
    """The paths below the root that are not read, by the reason."""

    hidden: list[str] = field(default_factory=list)
    no_class: list[str] = field(default_factory=list)
    no_image: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (
            ("hidden or of the system", self.hidden),
            ("outside of a class", self.no_class),
            ("without an image's extension", self.no_image),
        )
        return "; ".join(
            f"{len(names)} {kind} ({abbreviate(sorted(names), 3)})"
            for kind, names in kinds
            if names
        )


@dataclass(frozen=True)
class Listing:
    """The classes of one part, and each image's path below the root with its class's number."""

    classes: list[str]
    names: list[str]
    labels: list[int]


def folder(settings: DatasetSettings) -> Source:
    """Images in ``root/train/CLASS`` and ``root/test/CLASS``, the same classes in both."""
    root = absolute_path(settings.root)
    train, test, passed_over = _list_folder(root)
    if told := str(passed_over):
        complain_once(f"{root}: passed over {told}")
    content = hashlib.sha256()
    train_split = _read_part(root, train, settings.size, content.update)
    test_split = _read_part(root, test, settings.size, content.update)
    # Bytes of another encoding than UTF-8 become escapes: a name goes into text files.
    classes = (os.fsencode(name).decode(errors="backslashreplace") for name in train.classes)
    return Source(tuple(classes), train_split, test_split, content.hexdigest())


def folder_fingerprint(settings: DatasetSettings) -> str:
    """Return the SHA-256 of the paths and the contents of the images that ``folder`` reads."""
    root = absolute_path(settings.root)
    train, test, _ = _list_folder(root)
    names = train.names + test.names
    content = hashlib.sha256()
    for name, digest in zip(names, digests(root, names, MOST_BYTES, _unreadable), strict=True):
        content.update(_line(name, digest))
    return content.hexdigest()


def refuse_missing_folder(settings: DatasetSettings) -> None:
    """Raise UserError if ``folder`` would find no images to read, or classes that differ."""
    _list_folder(absolute_path(settings.root))


def names_and_sizes(settings: DatasetSettings) -> str | None:
    """Return the fingerprint that versions before this one gave the folder.

    It covers the names and sizes of all files, hidden ones too. None: those versions would have
    read a file that is now passed over, so that a run of theirs had other images.
    """
    root = absolute_path(settings.root)
    try:
        walks = [step for part in PARTS for step in _walk(root / part)]
    except (OSError, UserError):  # those versions read hidden folders too, and would end there
        return None
    paths = [Path(folder, name) for folder, _, files in walks for name in files]
    parts = [path.relative_to(root).parts[1:] for path in paths]
    if any(_is_image(own[-1]) and any(map(_is_hidden, own)) and own[1:] for own in parts):
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(os.fsencode(f"{path.relative_to(root)} {path.stat().st_size}\n"))
    return digest.hexdigest()


def _line(name: str, digest: str) -> bytes:
    return os.fsencode(name) + b"\0" + digest.encode() + b"\n"


def _list_folder(root: Path) -> tuple[Listing, Listing, PassedOver]:
    passed_over = PassedOver()
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root}: is a file; set dataset.root=FOLDER, which holds {_LAYOUT}")
        _refuse_absent(root)
        train, test = (_list_part(root, part, passed_over) for part in PARTS)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from error
    if differing := set(train.classes) ^ set(test.classes):
        raise UserError(
            f"{root}: train and test must have the same classes, but only one of them has "
            f"{abbreviate(sorted(differing))}"
        )
    return train, test, passed_over


def _list_part(root: Path, part: str, passed_over: PassedOver) -> Listing:
    """List what is read, in the order of torchvision's ImageFolder: that of all older runs."""
    _refuse_absent(root / part)
    members: dict[str, list[tuple[str, list[str]]]] = {}
    for where, folders, files in _walk(root / part):
        inside = os.path.relpath(where, root)
        passed_over.hidden += [f"{inside}/{name}" for name in folders + files if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name)]  # the walk leaves them out
        if inside == part:
            members = {name: [] for name in sorted(folders)}
        shown = sorted(name for name in files if not _is_hidden(name))
        images = [name for name in shown if _is_image(name)]
        passed_over.no_image += [f"{inside}/{name}" for name in shown if not _is_image(name)]
        if inside == part:
            passed_over.no_class += [f"{inside}/{name}" for name in images]
        else:
            members[Path(inside).parts[1]].append((inside, images))
    found = {
        label: [f"{inside}/{name}" for inside, images in sorted(steps) for name in images]
        for label, steps in members.items()
    }
    _refuse_empty(root / part, found)
    labels = [label for label, names in enumerate(found.values()) for _ in names]
    return Listing(list(found), [name for names in found.values() for name in names], labels)


def _refuse_absent(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; set dataset.root=FOLDER to one that holds {_LAYOUT}"
        )


def _refuse_empty(part: Path, found: dict[str, list[str]]) -> None:
    if not found:
        raise UserError(f"{part}: holds no class; put images into {part}/CLASS")
    if empty := [label for label, names in found.items() if not names]:
        raise UserError(
            f"{part}: has no images of {abbreviate(empty)}; put some into the folder or remove it "
            f"(the names of images end in {', '.join(EXTENSIONS)})"
        )


def _is_hidden(name: str) -> bool:
    return name.lower().startswith(SYSTEM_STARTS) or name.lower() in SYSTEM_NAMES


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as ``os.walk`` does; links are followed.

    Raises:
        OSError: a folder cannot be read; ``os.walk`` would leave it out.
        UserError: two names lead to one folder. Its images would count twice, and a few links
            that lead back are as good as folders without end. Or a folder lies too deep.
    """
    seen: dict[tuple[int, int], str] = {}
    for step in os.walk(top, onerror=_raise, followlinks=True):
        if is_too_deep(step[0], top):
            raise UserError(
                f"{shortened(step[0], 120)}: lies more than {MOST_DEPTH} folders below "
                f"{shortened(str(top), 120)}; move or remove it"
            )
        status = Path(step[0]).stat()
        first = seen.setdefault((status.st_dev, status.st_ino), step[0])
        if first != step[0] and status.st_ino:  # some systems number no folder
            raise UserError(f"{step[0]}: is the same folder as {first}; remove the link")
        yield step


def _raise(error: OSError) -> None:
    raise error


def _read_part(root: Path, listing: Listing, size: int, update: Callable[[bytes], object]) -> Split:
    """Read the images; ``update`` gets the line of each for the digest of what was decoded."""
    images = torch.empty(len(listing.names), 3, size, size, dtype=torch.uint8)
    # Pillow lets go of the interpreter lock while it decodes and scales.
    with quiet_pillow(), ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda name: _read_image(root / name, size), listing.names)
        top = root / listing.names[0].split("/")[0]
        progress = tqdm(decoded, str(top), len(images), unit="image", disable=None)
        for position, (image, digest) in enumerate(progress):
            images[position] = image
            update(_line(listing.names[position], digest))
    return Split(images, torch.tensor(listing.labels))


def _read_image(path: Path, size: int) -> tuple[Tensor, str]:
    """Return an image as ``decode`` does, and the SHA-256 of the very bytes that were decoded."""
    try:
        content = read_bounded(path, MOST_BYTES, follow=True)
        return decode(content, size), hashlib.sha256(content).hexdigest()
    except Exception as error:  # Pillow's decoders raise almost any class on a broken file
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as an image: {one_line(error)}")
