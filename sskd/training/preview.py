"""A picture of the images that a run is trained on."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from sskd.config import Config
from sskd.data import Images, Views
from sskd.files import write_atomically
from sskd.runs.run import Run
from sskd.seeding import derive_seed

_ROWS = 8
_GREY = 0.5  # between the views, distinct from their black padding
_MOST_SCALE = 3  # screen pixels per pixel, because 32x32 is too small to see
_SCREEN = 256  # screen pixels of a view from which on it is large enough


def save_views(run: Run, images: Images, config: Config, views: Views) -> Path:
    """Save ``views.png``, the views of a few images; return its path.

    A row has the views of one image. Its strong copy, if there is one, has the next row.
    """
    seed = derive_seed(config.seed, "picture")
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    # A loader may copy all of its images, so it gets only those of the picture.
    few = images.train.take(order[:_ROWS].to(images.train.device))
    copies = config.strong_copies
    loader = few.loader(images.mean, images.std, batch_size=1, views=views, strong_copies=copies)
    loader.begin_epoch(seed)
    samples = torch.arange(loader.samples, device=few.device)
    x = loader.views_of(samples.view(-1, len(few)).T.flatten())
    mean = torch.tensor(images.mean)[:, None, None]
    std = torch.tensor(images.std)[:, None, None]
    pixels = (x.cpu() * std + mean).clamp(0, 1)
    scale = max(1, min(_MOST_SCALE, _SCREEN // few.size))
    large = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    picture = BytesIO()
    save_image(
        make_grid(large, nrow=views.count, padding=_MOST_SCALE, pad_value=_GREY),
        picture,
        format="png",
    )
    path = run.folder / "views.png"
    with run.lock.writing() as still_ours:
        write_atomically(path, lambda out: out.write(picture.getvalue()), still_ours=still_ours)
    return path
