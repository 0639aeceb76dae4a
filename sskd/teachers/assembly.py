"""Build a run's networks and its method."""

from __future__ import annotations

import torch
from torch import nn

from sskd.config import Config
from sskd.data import Images, Split
from sskd.errors import UserError
from sskd.methods import Method, build_method
from sskd.models import ARCHITECTURES, build_model, takes_image_size
from sskd.output import complain_once
from sskd.runs.plan import TeacherWeights
from sskd.seeding import seed_torch
from sskd.teachers.find import load_heads, load_teacher, report_ignored_heads
from sskd.training.phase_settings import check_phase


def assemble(config: Config, images: Images, found: TeacherWeights | None = None) -> Method:
    """Return the method of ``config`` with a new student, and the weights of the teacher ``found``.

    Raises:
        UserError: the method does not support this pair of networks.
    """
    seed_torch(config.seed, "student")
    sizes = images.num_classes, images.image_size
    student = build_model(config.student.name, *sizes)
    _report_large_images(config.student.name, student, images)
    teacher = None
    if config.teacher:
        teacher = build_model(config.teacher.name, *sizes)
        _report_large_images(config.teacher.name, teacher, images)
        if found:
            load_teacher(teacher, found)
            report_ignored_heads(config.method.name, found)
    heads = load_heads(found.heads) if found and found.heads else None
    seed_torch(config.seed, "method")
    try:
        return build_method(config.method, student, teacher, images, heads=heads)
    except UserError as error:
        networks = [network.name for network in (config.teacher, config.student) if network]
        raise UserError(f"method={config.method.name} {'-'.join(networks)}: {error}") from None


def _report_large_images(name: str, network: nn.Module, images: Images) -> None:
    """Print a line if the images have more than twice the size that ``network`` is designed for."""
    size, designed = images.image_size, getattr(network, "designed_size", None)
    if designed and size > 2 * designed:
        others = ", ".join(filter(takes_image_size, ARCHITECTURES))
        complain_once(
            f"warning: {name} is designed for images of {designed} pixels, and these have {size}: "
            f"its maps are up to {(size / designed) ** 2:.0f} times as large; networks for large "
            f"images are {others}"
        )


def check_compatible(config: Config) -> None:
    """Raise the UserError of ``assemble`` or of a phase, without weights of a teacher and data."""
    size = config.dataset.size
    two = Split(torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.arange(2))
    method = assemble(
        config,
        Images(
            name="two",
            classes=("0", "1"),
            train=two,
            test=two,
            holdout=None,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        ),
    )
    for phase in method.phases():
        check_phase(phase, config)
