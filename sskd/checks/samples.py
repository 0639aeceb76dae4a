"""Small inputs for the checks: images that can be learned, and a teacher that has learned them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from sskd.data import Batch, Images, Loader, Split, Views
from sskd.methods import Phase
from sskd.models import build_model

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
_TEACHER_STEPS = 40


def random_images(train: int, test: int, classes: int = 5, size: int = 32) -> Images:
    """Return images of noise whose mean brightness depends on the class, so that it is learnable.

    Args:
        train: the number of training images.
        test: the number of test images.
        classes: the number of classes.
        size: pixels of a side.
    """
    generator = torch.Generator().manual_seed(5)

    def split(count: int) -> Split:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 64, (count, 3, size, size), generator=generator)
        images = noise + (labels * 190 // classes)[:, None, None, None]
        return Split(images.to(torch.uint8), labels)

    names = tuple(f"class {label}" for label in range(classes))
    return Images(
        name="noise",
        classes=names,
        train=split(train),
        test=split(test),
        holdout=None,
        mean=MEAN,
        std=STD,
    )


def first_batch(images: Images, phase: Phase, size: int) -> Batch:
    """Return the first batch of ``size`` images that ``phase`` trains on."""
    return loader_of(images, phase, size).next_batch()


def loader_of(images: Images, phase: Phase, batch_size: int) -> Loader:
    """Return the loader of ``phase`` at the start of an epoch of seed 0."""
    return Loader(images.train, images.mean, images.std, batch_size=batch_size, views=phase.views)


@cache
def fitted_teacher(name: str, images: int, size: int = 32) -> nn.Module:
    """Return a network ``name`` that has learned ``images`` random images in four rotations.

    They are those of ``random_images(images, 4, size=size)``.
    """
    data = random_images(images, 4, size=size)
    torch.manual_seed(0)
    teacher = build_model(name, data.num_classes, size).train()
    batch = Loader(data.train, data.mean, data.std, batch_size=images, views=Views(4)).next_batch()
    labels = batch.y.repeat_interleave(4)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for _ in range(_TEACHER_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(batch.x).logits, labels).backward()
        optimizer.step()
    return teacher
