"""Images per second from a packed file, and from a folder through torchvision, in turns.

    python -m benchmarks.packed --images 512 --workers 2

The images are generated JPEG files of the sizes that ImageNet has: most have about 500 x 375
pixels, every tenth 1,600 x 1,200. torchvision's ``ImageFolder`` with a ``DataLoader`` decodes each
file, cuts ``RandomResizedCrop(224)`` out of it, flips it and normalises it in the worker processes,
as most code for ImageNet does. The suite's worker processes cut such rectangles out of the packed
images, which are smaller, and the device flips and normalises them. A round is an epoch of each,
after one that is not timed, in which the workers start.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import harness
from sskd.data import DatasetSettings, Images, load_images
from sskd.data.packed.source import path_of

SIZE = 224
USUAL = (500, 375)  # width and height
LARGE = (1600, 1200)  # of every tenth image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10


def main() -> None:
    """Measure what the command line requests; print and write the table."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        started = time.perf_counter()
        images = load_images(packed_settings(root, options.workers)).to(options.device)
        packing = len(images.train) / (time.perf_counter() - started)
        files = sum(path.stat().st_size for path in root.glob("train/*/*"))
        packed = path_of(packed_settings(root, options.workers)).stat().st_size
        rates = measure(root, images, options)
    before, after = (size / len(images.train) / 2**10 for size in (files, packed))
    sizes = f"{before:,.0f} KiB an image before, {after:,.0f} KiB packed"
    lines = [*table(rates, options), "", f"Packed at {packing:,.0f} images/s; {sizes}."]
    print("\n".join(lines))
    harness.write_results(options, {"images_per_second": rates, "packing": packing}, lines)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = harness.new_parser(__doc__)
    parser.set_defaults(images=512)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each loader")
    return harness.parse(parser)


def write_images(root: Path, count: int) -> None:
    """Write training images of smooth colours with noise, and one test image for each class."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(CLASSES):
            (root / part / f"class {label}").mkdir(parents=True)
    for number in range(count + CLASSES):
        width, height = LARGE if number % 10 == 9 else USUAL
        colours = generator.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
        smooth = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        noise = generator.normal(0, 8, (height, width, 1))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        part = "train" if number < count else "test"
        path = root / part / f"class {number % CLASSES}" / f"{number}.jpg"
        Image.fromarray(pixels).save(path, quality=90)


def packed_settings(root: Path, workers: int) -> DatasetSettings:
    """Return the settings of the folder ``root`` as a packed dataset."""
    return DatasetSettings(
        source="folder",
        name="packed",
        root=str(root),
        download=False,
        size=SIZE,
        mean=list(MEAN),
        std=list(STD),
        fraction=1.0,
        label_noise=0.0,
        holdout=0.0,
        seed=0,
        crop="resized",
        workers=workers,
    )


def measure(root: Path, images: Images, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return images per second of each loader in each round."""
    device = torch.device(options.device)
    loader = images.train.loader(images.mean, images.std, batch_size=options.batch)
    folder = folder_loader(root, options)

    def packed_epoch() -> Iterator[int]:
        loader.begin_epoch(0)
        while loader.position < loader.steps:
            yield len(loader.next_batch().x)

    def folder_epoch() -> Iterator[int]:
        for x, _ in folder:
            yield len(x.to(device, non_blocking=True))

    measures = {"torchvision": timed(folder_epoch, device), "packed": timed(packed_epoch, device)}
    rates = harness.take_turns(measures, options.rounds)
    loader.close()
    return rates


def folder_loader(root: Path, options: argparse.Namespace) -> DataLoader:
    """Return the usual loader of ImageNet's training images."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        ImageFolder(str(root / "train"), transform),
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=options.device.startswith("cuda"),
        persistent_workers=options.workers > 0,
    )


def timed(epoch: Callable[[], Iterator[int]], device: torch.device) -> Callable[[], float]:
    """Draw an epoch; return a function that draws one and returns its images per second."""

    def rate() -> float:
        harness.synchronise(device)
        started = time.perf_counter()
        images = sum(epoch())
        harness.synchronise(device)
        return images / (time.perf_counter() - started)

    rate()
    return rate


def table(rates: dict[str, list[float]], options: argparse.Namespace) -> list[str]:
    """Return the lines of the table, with the median of the ratios of the rounds."""
    pairs = zip(rates["packed"], rates["torchvision"], strict=True)
    ratio = statistics.median(packed / folder for packed, folder in pairs)
    lines = [
        f"{options.images:,} images, {options.workers} workers, batch {options.batch}, "
        f"{harness.machine_of(options)}",
        "",
        *harness.table_head(["loader", "images/s", "range", "ratio"], 1),
    ]
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        shown = f"{ratio:.2f} x" if name == "packed" else ""
        lines.append(harness.table_row([name, f"{statistics.median(values):,.0f}", spread, shown]))
    return lines


if __name__ == "__main__":
    main()
