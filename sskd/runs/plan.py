"""A run, resolved once; later steps read the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sskd.config import Config
from sskd.runs.recipe import diff_from_recipe


@dataclass(frozen=True)
class TeacherWeights:
    """The file of a teacher's weights, and the SHA-256 of the tensors in it.

    ``heads`` states the file and the SHA-256 of the modules that the teacher was trained with; None
    if it has none or the student's method does not use them.
    """

    path: Path
    digest: str
    heads: TeacherWeights | None = None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run, resolved from its configuration.

    Attributes:
        config: the checked configuration.
        folder: the run's folder.
        difference: the settings that differ from the recipe, by dotted key; the folder's name has
            a hash of them, as they were before ``computed_in``.
        teacher: the teacher's weights; None for a network alone.
        full_config: the configuration as ``config.yaml`` keeps it: plain values, with the digests
            of the teacher and of the data.
    """

    config: Config
    folder: Path
    difference: Mapping[str, Any]
    teacher: TeacherWeights | None
    full_config: Mapping[str, Any]

    @property
    def data_digest(self) -> str | None:
        """The digest of the dataset's files; None for a source with one content only."""
        digest: str | None = self.full_config["dataset"].get("digest")
        return digest

    def computed_in(self, precision: str) -> RunPlan:
        """Return the plan with the ``precision`` of the device in place of ``precision=auto``.

        The folder and ``full_config`` keep ``auto``, so that they are the same on every device.
        """
        config = self.config.model_copy(update={"precision": precision})
        if config.teacher and config.teacher.precision == self.config.precision:  # it has no effect
            teacher = config.teacher.model_copy(update={"precision": None})
            config = config.model_copy(update={"teacher": teacher})
        settings = diff_from_recipe(self.config)
        digest = {key: self.difference[key] for key in self.difference if key not in settings}
        return replace(self, config=config, difference=diff_from_recipe(config) | digest)
