"""Training and evaluation from packed images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data.dataloader
from conftest import Command, KeptRuns
from jpegs import CLASSES, load, write_jpegs
from PIL import Image
from scipy.stats import kstest
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.functional import pil_to_tensor, resized_crop

import sskd.data.packed.cutting
import sskd.data.packed.workers
from sskd.data import (
    WHOLE,
    Batch,
    Images,
    Loader,
    Share,
    Split,
    StrongAugmentation,
    Transformations,
    Views,
    eval_batches,
)
from sskd.data.augmentation import CROPS, JIGSAWS, Normaliser
from sskd.data.packed.cutting import TrainingRequest
from sskd.data.packed.file import PackedFile
from sskd.data.packed.loader import PackedLoader
from sskd.data.packed.split import PackedSplit
from sskd.data.packed.workers import Workers, default_workers
from sskd.data.rectangles import AREA, ASPECT, draw_rectangles, place_rectangles
from sskd.distributed import environment
from sskd.errors import UserError
from sskd.training.graph import _why_not

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TRAIN = 37
SIDE = 32
ALL_VIEWS = [
    Views(),
    Views(4),
    Views(4, one_crop=True),
    Views(strong=StrongAugmentation()),
    Views(transformed=Transformations(("rotation", "colour_jitter"))),
    Views(jigsaws=3),
]


@pytest.fixture(scope="module")
def root(kept_runs: KeptRuns, shared_folder: Path) -> Path:
    """Return a folder of images that is packed already."""

    def make(folder: Path) -> None:
        write_jpegs(folder, TRAIN, 9)

    kept_runs.put("few_jpegs", make)
    return shared_folder / "kept" / "few_jpegs"


@pytest.fixture(scope="module")
def images(root: Path) -> Images:
    return load(root, size=SIDE, mean=list(MEAN), std=list(STD))


def loader_of(split: Any, workers: int = 0, **options: Any) -> PackedLoader:
    chosen = {"batch_size": 8, **options}
    loader = replace(split, workers=workers).loader(MEAN, STD, **chosen)
    assert isinstance(loader, PackedLoader)
    return loader


def rest_of(loader: PackedLoader) -> list[Batch]:
    return [loader.next_batch() for _ in range(loader.position, loader.steps)]


def epoch(loader: PackedLoader, seed: int = 3) -> list[Batch]:
    loader.begin_epoch(seed)
    return rest_of(loader)


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


# ---- batches ----


def test_the_order_is_that_of_images_in_memory(images: Images) -> None:
    loader = loader_of(images.train, views=Views(2))
    batches = epoch(loader)
    noise = Split(torch.zeros(TRAIN, 3, 8, 8, dtype=torch.uint8), images.train.labels)
    expected = Loader(noise, MEAN, STD, batch_size=8)
    expected.begin_epoch(3)
    assert [len(batch.y) for batch in batches] == [8, 8, 8, 8, 5]
    for batch in batches:
        like = expected.next_batch()
        assert torch.equal(batch.indices, like.indices)
        assert torch.equal(batch.y, images.train.labels[batch.indices])
        assert batch.x.shape == (2 * len(batch.y), 3, SIDE, SIDE)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
    assert not same(batches, epoch(loader, 4))
    with pytest.raises(IndexError, match="all 5 batches"):
        loader.next_batch()


def test_batches_are_the_same_for_any_number_of_workers(images: Images) -> None:
    for views in (ALL_VIEWS[3], ALL_VIEWS[4]):
        loader = loader_of(images.train, workers=2, views=views)
        loader.begin_epoch(9)
        loader.next_batch()  # the rest of this epoch is not drawn
        assert same(epoch(loader), epoch(loader_of(images.train, views=views)))
        assert same(epoch(loader, 5), epoch(loader_of(images.train, views=views), 5))


def test_a_sample_has_the_same_views_in_any_batch(images: Images) -> None:
    found = []
    for size in (8, 5):
        batches = epoch(loader_of(images.train, views=Views(2), batch_size=size))
        order = torch.cat([batch.indices for batch in batches]).argsort()
        found.append(torch.cat([batch.x.unflatten(0, (-1, 2)) for batch in batches])[order])
    assert torch.equal(*found)


def test_processes_share_the_batches_of_one(images: Images) -> None:
    whole, *shares = (
        loader_of(images.train, views=Views(2), share=share)
        for share in (WHOLE, Share(0, 2), Share(1, 2))
    )
    whole.begin_epoch(3)
    whole.next_batch()
    for loader in shares:
        loader.load_state_dict(whole.state_dict())
    seen = 0
    for expected in rest_of(whole)[: shares[0].steps - 1]:
        parts = [loader.next_batch() for loader in shares]
        assert len({len(part.y) for part in parts}) == 1
        for name, values in expected._asdict().items():
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, values[: len(joined)]), name
        seen += sum(len(part.y) for part in parts)
    assert seen == TRAIN - 8 - 1, "one image cannot be divided"


def test_an_epoch_resumes_without_decoding_its_start(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(images.train, views=Views(4))
    loader.begin_epoch(7)
    for _ in range(3):
        loader.next_batch()
    state, rest = loader.state_dict(), rest_of(loader)
    decoded: list[int] = []
    plain = PackedFile.image

    def counted(file: PackedFile, position: int) -> Tensor:
        decoded.append(position)
        return plain(file, position)

    monkeypatch.setattr(PackedFile, "image", counted)
    resumed = loader_of(images.train, views=Views(4))
    resumed.load_state_dict(state)
    assert resumed.position == 3
    assert same(rest, rest_of(resumed))
    with_workers = loader_of(images.train, workers=2, views=Views(4))
    with_workers.load_state_dict(state)
    assert same(rest, rest_of(with_workers))
    assert sorted(decoded) == sorted(i for batch in rest for i in batch.indices.tolist())


def test_a_batch_can_be_read_before_it_is_drawn(images: Images) -> None:
    loader = loader_of(images.train)
    first = loader.peek(loader.next_size)
    assert same([first], [loader.next_batch()])
    assert not torch.equal(first.indices, loader.next_batch().indices)
    with pytest.raises(ValueError, match="the next batch has 8 images, not 3"):
        loader.draw(3)


# ---- the right images ----


def pixels_of(x: Tensor) -> Tensor:
    """Return normalised images in [0, 255]."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (x * std + mean) * 255


def test_a_training_crop_is_that_of_the_source_image(
    root: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((root / "train").glob("*/*"))
    chosen = torch.tensor([30, 3, 17, 36, 0, 9])
    boxes: list[list[int]] = []

    def place(numbers: Tensor, bounds: Tensor) -> Tensor:
        placed = place_rectangles(numbers, bounds)
        boxes.extend(placed.int().tolist())
        return placed

    monkeypatch.setattr(sskd.data.packed.cutting, "place_rectangles", place)
    batches = epoch(loader_of(images.train.take(chosen), batch_size=4))
    x, y, indices, crops = (torch.cat(each) for each in zip(*batches, strict=True))
    assert sorted(indices.tolist()) == [*range(len(chosen))]
    for image, label, index, crop, box in zip(x, y, indices, crops, boxes, strict=True):
        path = paths[chosen[index]]
        assert CLASSES[label] == path.parent.name
        expected = resized_crop(pil_to_tensor(Image.open(path)), *box, [SIDE, SIDE], antialias=True)
        expected = expected.flip(2) if crop % CROPS >= CROPS // 2 else expected
        assert (pixels_of(image) - expected).abs().max() <= 1.01


def test_a_selected_image_keeps_its_label(tmp_path: Path) -> None:
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 240)]
    for part, name, number in product(("train", "test"), CLASSES, range(8)):
        path = tmp_path / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colours[CLASSES.index(name)]).save(path)
    chosen = load(tmp_path, size=SIDE, holdout=0.25, fraction=0.5, mean=list(MEAN), std=list(STD))
    assert chosen.holdout is not None
    for split, count in ((chosen.train, 12), (chosen.holdout, 8), (chosen.test, 32)):
        batches = epoch(loader_of(split))
        batches += [Batch(x, y, y, y) for x, y in eval_batches(split, MEAN, STD, 5)]
        assert sum(len(batch.y) for batch in batches) == 2 * count
        for batch in batches:
            found = pixels_of(batch.x).mean((2, 3))
            distances = torch.cdist(found, torch.tensor(colours, dtype=torch.float32))
            assert torch.equal(distances.argmin(1), batch.y)


# ---- views ----


def cuts_of(loader: PackedLoader, samples: list[int]) -> tuple[Tensor, Tensor]:
    cuts = loader._work[TrainingRequest(3, samples)]
    assert not isinstance(cuts, str)
    return cuts.pixels, cuts.arrangements


@pytest.mark.parametrize("views", ALL_VIEWS)
def test_views_are_flipped_turned_and_ordered_cuts(images: Images, views: Views) -> None:
    loader = loader_of(images.train, views=views)
    loader.begin_epoch(3)
    samples = [*range(TRAIN)]
    x = loader.views_of(torch.tensor(samples)).unflatten(0, (TRAIN, views.count))
    pixels, numbers = cuts_of(loader, samples)
    normalise = Normaliser(MEAN, STD, width=SIDE, device=torch.device("cpu"))
    plain = 1 if views.transformed else views.crops  # views that are not made any further
    half = SIDE // 2
    for sample in samples:
        for view in range(plain):
            order, crop = divmod(int(numbers[sample, view]), CROPS)
            cut = pixels[sample, 0 if views.one_crop else view]
            cut = cut.flip(2) if crop >= CROPS // 2 else cut
            if views.jigsaws:
                patches = [cut[:, r : r + half, c : c + half] for r in (0, half) for c in (0, half)]
                a, b, c, d = (patches[place] for place in JIGSAWS[order])
                cut = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
            else:
                assert order == view
                cut = torch.rot90(cut, view, (1, 2))
            assert torch.equal(x[sample, view], normalise(cut[None])[0])
    assert 0.2 < (numbers % CROPS >= CROPS // 2).double().mean() < 0.8
    assert not torch.equal(x[:, 0], x[:, -1]) or views.count == 1


def test_strong_copies_have_choices_of_their_own(images: Images) -> None:
    loader = loader_of(images.train, strong_copies=True)
    assert loader.samples == 2 * TRAIN
    batches = epoch(loader)
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == sorted([*range(TRAIN)] * 2)
    samples = torch.arange(2 * TRAIN)
    x = loader.views_of(samples)
    pixels, numbers = cuts_of(loader, samples.tolist())
    flips = (numbers >= CROPS // 2).view(-1, 1, 1, 1)
    cut = torch.where(flips, pixels[:, 0].flip(3), pixels[:, 0])
    is_plain = (x == Normaliser(MEAN, STD, width=SIDE, device=x.device)(cut)).flatten(1).all(1)
    assert is_plain[:TRAIN].all()
    assert is_plain[TRAIN:].sum() < TRAIN // 4


# ---- rectangles ----


@pytest.mark.parametrize(("height", "width"), [(60, 100), (20, 21), (40, 300), (1, 1)])
def test_rectangles_are_of_allowed_area_and_aspect(height: int, width: int) -> None:
    drawn = draw_rectangles(height, width, 500, torch.Generator().manual_seed(1)).numpy()
    top, left, tall, wide = drawn.T
    assert (drawn == drawn.round()).all()
    assert (tall >= 1).all() and (wide >= 1).all()  # noqa: PT018
    assert (top >= 0).all() and (top + tall <= height).all()  # noqa: PT018
    assert (left >= 0).all() and (left + wide <= width).all()  # noqa: PT018
    # Sides are rounded to pixels, by up to half a pixel each.
    assert ((tall + 0.5) * (wide + 0.5) >= AREA[0] * height * width).all()
    assert ((wide + 0.5) / (tall - 0.5) >= ASPECT[0]).all()
    assert ((wide - 0.5) / (tall + 0.5) <= ASPECT[1]).all()


def test_rectangles_have_the_distribution_of_torchvision() -> None:
    torch.manual_seed(0)
    image, count = torch.empty(3, 60, 100), 1500
    expected = [RandomResizedCrop.get_params(image, [*AREA], [*ASPECT]) for _ in range(count)]
    found = draw_rectangles(60, 100, count, torch.Generator().manual_seed(2))
    for ours, reference in zip(found.T.numpy(), np.array(expected).T, strict=True):
        assert kstest(ours, reference).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (333, 7), (150, 5)])
def test_if_nothing_fits_the_centre_is_cut_out(height: int, width: int) -> None:
    image = torch.empty(3, height, width)
    expected = RandomResizedCrop.get_params(image, [*AREA], [*ASPECT])
    found = draw_rectangles(height, width, 3, torch.Generator().manual_seed(0))
    assert found.tolist() == [[float(each) for each in expected]] * 3


# ---- evaluation ----


def test_evaluation_has_each_image_once_as_torchvision_cuts_it(root: Path, images: Images) -> None:
    paths = sorted((root / "train").glob("*/*"))
    scale, crop = Resize(SIDE * 256 // 224, antialias=True), CenterCrop(SIDE)
    decoded = [pil_to_tensor(Image.open(path)) for path in paths]
    expected = torch.stack([crop(scale(each)) for each in decoded])
    for workers in (0, 2):
        split = images.train
        assert isinstance(split, PackedSplit)
        batches = list(replace(split, workers=workers).pixel_batches(10))
        found = torch.cat([pixels for pixels, _ in batches])
        assert [len(labels) for _, labels in batches] == [10, 10, 10, 7]
        assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
        assert (found.int() - expected.int()).abs().max() <= 1
    assert not multiprocessing.active_children(), "they end with the evaluation"
    assert not list(split.take(torch.arange(0)).pixel_batches(10))
    mirrored = torch.cat([pixels for pixels, _ in split.mirrored().pixel_batches(64)])
    assert torch.equal(mirrored, found.flip(3))
    ((x, _),) = eval_batches(split, MEAN, STD, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    assert torch.allclose(x, (found / 255 - mean) / std, atol=1e-5)


def test_a_part_of_the_images_can_be_selected(root: Path, images: Images) -> None:
    chosen = load(root, size=SIDE, holdout=0.2, fraction=0.5, label_noise=0.5)
    assert chosen.holdout is not None
    assert (len(chosen.train), len(chosen.holdout)) == (16, 8)
    everything = {each.numpy().tobytes(): int(y) for each, y in zip(
        images.train.images, images.train.labels, strict=True)}  # fmt: skip
    labels = [everything[each.numpy().tobytes()] for each in chosen.train.images]
    wrong = [a != b for a, b in zip(labels, chosen.train.labels.tolist(), strict=True)]
    assert sum(wrong) == 8
    held = {each.numpy().tobytes() for each in chosen.holdout.images}
    assert held.isdisjoint(each.numpy().tobytes() for each in chosen.train.images)
    pixels = images.train.images.double().transpose(0, 1).flatten(1) / 255
    assert chosen.mean == pytest.approx(pixels.mean(1).tolist())
    assert chosen.std == pytest.approx(pixels.std(1, correction=0).tolist())


# ---- processes ----


def test_damage_that_a_worker_finds_ends_in_one_line(images: Images) -> None:
    split = images.train
    assert isinstance(split, PackedSplit)
    checksums = split.file.index.checksums.clone()
    checksums[5] += 1
    file = replace(split.file, index=replace(split.file.index, checksums=checksums))
    loader = loader_of(replace(split, file=file), workers=2)
    with pytest.raises(UserError) as caught:
        epoch(loader)
    loader.close()
    assert str(caught.value).startswith(
        f"{split.file.path}: the image {split.file.index.name(5)} is damaged (its checksum differs)"
    )


def test_workers_leave_signals_to_the_run(images: Images) -> None:
    loader = loader_of(images.train, workers=1)
    loader.begin_epoch(3)
    batches = [loader.next_batch()]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    # Sent by another process than the run, as by a scheduler or a terminal.
    sender = os.fork()
    if sender == 0:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, signum)
        os._exit(0)
    os.waitpid(sender, 0)
    batches += rest_of(loader)
    assert same(batches, epoch(loader_of(images.train)))
    worker.terminate()  # by the run itself
    worker.join(20)
    assert worker.exitcode == 0


class Dying(Dataset[int]):
    """Ends the worker process, as the system does if the memory is full."""

    def __getitem__(self, request: int) -> int:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        return request


class Same(Dataset[int]):
    """Returns the request, or raises it."""

    def __getitem__(self, request: int | Exception) -> int:
        if isinstance(request, Exception):
            raise request
        return request


@pytest.fixture
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch look for dead workers every 0.2 seconds instead of every five."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))


def death_of(results: Iterator[int]) -> None:
    with pytest.raises(UserError) as caught:
        list(results)
    assert str(caught.value).startswith("a process that decodes images ended (DataLoader worker")
    assert str(caught.value).endswith("set a smaller dataset.workers=N, or 0 for none")


@pytest.mark.usefixtures("checked_often")
def test_a_worker_that_is_killed_ends_the_run_in_one_line() -> None:
    workers = Workers(Dying(), 1, torch.device("cpu"))
    death_of(workers.results([1]))
    workers.close()


@pytest.mark.usefixtures("checked_often")
def test_a_dead_worker_does_not_disturb_a_computation() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    workers = Workers(Same(), 1, torch.device("cpu"))
    results = workers.results(range(9))
    assert next(results) == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    (worker,) = multiprocessing.active_children()
    worker.kill()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:  # a signal's handler would raise an error here
        pass
    death_of(results)
    workers.close()


@pytest.mark.parametrize(("kind", "count"), [(RuntimeError, 1), (EOFError, 0)])
def test_a_fault_in_a_worker_keeps_its_traceback(kind: type[Exception], count: int) -> None:
    workers = Workers(Same(), count, torch.device("cpu"))
    with pytest.raises(kind, match="my fault"):
        list(workers.results([kind("my fault")]))
    workers.close()
    assert not multiprocessing.active_children(), "the error keeps none of them"


def test_the_processes_of_torchrun_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sskd.data.packed.workers, "available_cores", lambda: 12)
    for processes, expected in ((None, 12), ("3", 4), ("50", 1), ("none", 12)):
        monkeypatch.delenv(environment.LOCAL_WORLD_SIZE, raising=False)
        if processes:
            monkeypatch.setenv(environment.LOCAL_WORLD_SIZE, processes)
        assert default_workers() == expected
    monkeypatch.setattr(sskd.data.packed.workers, "available_cores", lambda: 96)
    assert default_workers() == 16, "at most"


# ---- runs ----


def test_a_run_trains_on_packed_images(root: Path, tmp_path: Path, command: Command) -> None:
    words = [f"dataset.root={root}", "dataset=folder", "dataset.crop=resized", "dataset.workers=0"]
    words += ["arch@teacher=resnet8", "arch@student=resnet8", "method=kd", "teacher.train=true"]
    words += ["schedule.epochs=1", "batch_size=16", "teacher.precompute=true", "device=cpu"]
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "teacher.precompute: there are too many crops of packed images to store, so" in out
    assert "epoch 1/1" in out
    assert list(tmp_path.rglob("views.png"))
    assert "already finished" in command(*words, "dataset.workers=1")[1]


def test_a_step_with_workers_is_not_a_graph(images: Images) -> None:
    from sskd.methods import Vanilla

    loader = loader_of(images.train)
    loader.device = torch.device("cuda")
    assert _why_not(loader, Vanilla.__new__(Vanilla)) == "the images come from a packed file"
