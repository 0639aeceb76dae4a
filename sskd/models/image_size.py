"""How the first layers of the ImageNet networks depend on the size of the images."""

from __future__ import annotations

# Pixels of a side. From the large size on, the first layers are those of ImageNet's networks.
MEDIUM_IMAGE, LARGE_IMAGE = 64, 128


def first_reduction(image_size: int) -> int:
    """Return by which factor the map of the first stage is smaller than the image: 1, 2 or 4.

    The other stages halve it three times. ImageNet's networks reduce by 4 first, which would leave
    a single pixel of a 32x32 image. With less for small images, the last map of images of 32 to 256
    pixels has 4 to 8 pixels on each side.
    """
    if image_size < MEDIUM_IMAGE:
        return 1
    return 2 if image_size < LARGE_IMAGE else 4
