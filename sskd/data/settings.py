"""The settings of a dataset, as ``conf/dataset/*.yaml`` shows them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sskd.files import expanded
from sskd.settings import (
    EARLY,
    NonEmpty,
    Positive,
    Seed,
    Settings,
    ShareBelowAll,
    ShareOfAny,
)

Crop = Literal["padded", "resized"]
Mean = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False), EARLY]


class DatasetSettings(Settings):
    """What to load, and which part of it to use for training.

    ``source`` is the key of the reader. ``name`` is the name of the data in folders of results and
    in tables; None in a YAML file means the last part of ``root``.

    ``crop`` is how training images are cut: ``padded`` at the edges, as small images in memory are,
    or ``resized`` from a random rectangle, as images in a packed file are.
    """

    source: str
    name: str
    root: NonEmpty
    download: bool
    size: int = Field(ge=32, le=256)
    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)] | None
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None
    fraction: ShareOfAny
    label_noise: ShareBelowAll
    holdout: ShareBelowAll
    seed: Seed
    crop: Crop = "padded"
    packed: NonEmpty | None = None
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    in_memory_gib: Positive = 4.0

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if re.fullmatch(r"\w[\w.-]*", name) is None:
            raise ValueError(
                "may contain only letters, digits, '_', '-' and '.', and must not start with '-' "
                "or '.'; set dataset.name=NAME"
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _name_after_root(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name", "") is None:
            return values | {"name": expanded(str(values.get("root"))).absolute().name}
        return values
