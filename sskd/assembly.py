"""Put a run's networks and method together."""

from __future__ import annotations

from sskd.config import Config
from sskd.data import Images
from sskd.errors import UserError
from sskd.methods import Method, build_method
from sskd.models import build_model
from sskd.seeding import seed_everything


def assemble(config: Config, images: Images) -> Method:
    """Return the method of ``config`` with a fresh student, and a teacher to be loaded.

    Raises:
        UserError: the method cannot take this pair of networks.
    """
    seed_everything(config.seed, "student")
    student = build_model(config.student.name, images.num_classes)
    teacher = None
    if config.teacher:
        teacher = build_model(config.teacher.name, images.num_classes)
    seed_everything(config.seed, "method")
    try:
        return build_method(config.method, student, teacher, images)
    except UserError as error:
        networks = [network.name for network in (config.teacher, config.student) if network]
        raise UserError(f"method={config.method.name} {'-'.join(networks)}: {error}") from None
