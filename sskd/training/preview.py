"""Pictures of what a run is fed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from sskd.config import Config
from sskd.data import Images, Loader
from sskd.files import write_atomically
from sskd.seeding import derive_seed

_ROWS = 8
_GREY = 0.5  # between the views, told apart from their black padding
_SCALE = 3  # screen pixels a pixel: 32 are too small to look at


def save_views(folder: Path, images: Images, config: Config, views: int) -> Path:
    """Save ``views.png``: a few images' views, a row an image; return its path."""
    seed = derive_seed(config.seed, "picture")
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    # A loader copies all images that it is given, so it gets no more than the picture's.
    few = images.train.take(order[:_ROWS].to(images.train.images.device))
    loader = Loader(few, images.mean, images.std, _ROWS, views)
    loader.begin_epoch(seed)
    mean = torch.tensor(images.mean)[:, None, None]
    std = torch.tensor(images.std)[:, None, None]
    pixels = (loader.next_batch().x.cpu() * std + mean).clamp(0, 1)
    large = pixels.repeat_interleave(_SCALE, 2).repeat_interleave(_SCALE, 3)
    picture = BytesIO()
    save_image(make_grid(large, nrow=views, padding=_SCALE, pad_value=_GREY), picture, format="png")
    write_atomically(folder / "views.png", lambda stream: stream.write(picture.getvalue()))
    return folder / "views.png"
