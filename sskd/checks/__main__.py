"""The command ``sskd-checks``, or ``python -m sskd.checks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sskd import CONF
from sskd.commands.process import run_tool
from sskd.errors import CheckError, UserError, one_line
from sskd.invocation.composition import compose_config
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_parser
from sskd.output import say

if TYPE_CHECKING:
    from sskd.config import Config
    from sskd.data import Images
    from sskd.methods import Method

DESCRIPTION = """\
Check that a method, a network or a dataset has the properties that the suite relies on,
such as gradients for exactly what a phase trains. The command prints one line for each
check. "refused" is not a failure: a method does not support a pair of networks, or a
dataset does not have images of another size. The exit status is 1 if a check fails.
"""
EXAMPLES = """\
examples:
  {command} method kd
  SSKD_EXTENSIONS=dist.py {command} method dist --config-dir conf
  {command} arch resnet20
  {command} dataset folder dataset.root=FOLDER
"""
PAIR = "resnet14-resnet8"


class Check(NamedTuple):
    """One check: its name, the function that raises CheckError, whether a refusal is fine."""

    name: str
    run: Callable[[], None]
    may_refuse: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's by default) and return its exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(argv)))


def _run(given: argparse.Namespace) -> int:
    load_extensions()
    failed = [check for check in _CHECKS[given.group](given) if not _passes(check)]
    return 1 if failed else 0


def _passes(check: Check) -> bool:
    """Run one check, print its line and return whether it passed."""
    try:
        check.run()
    except (CheckError, UserError) as error:
        passed = check.may_refuse and isinstance(error, UserError)
        say(f"{'refused' if passed else 'FAILED '} {check.name}: {error}")
        return passed
    except Exception as error:  # a fault in the code that is checked
        say(f"FAILED  {check.name}: {type(error).__name__}: {one_line(error)}")
        return False
    say(f"ok      {check.name}")
    return True


def _config(given: argparse.Namespace, *words: str) -> Config:
    from sskd.config import read_config

    folders = [Path(given.config_dir)] if given.config_dir else []
    return read_config(compose_config("student", [*words, *given.overrides], folders))


def _build(given: argparse.Namespace, images: Images, pair: str = PAIR) -> Method:
    """Return the method of the command line, with networks of random weights."""
    import torch

    from sskd.methods import METHODS, build_method
    from sskd.models import build_model

    teacher, student = pair.split("-")
    words = (f"method={given.name}", f"arch@teacher={teacher}", f"arch@student={student}")
    settings = _config(given, *words).method
    torch.manual_seed(0)
    needs_teacher = METHODS[settings.name].needs_teacher
    sizes = images.num_classes, images.image_size
    student_network = build_model(student, *sizes)
    teacher_network = build_model(teacher, *sizes) if needs_teacher else None
    return build_method(settings, student_network, teacher_network, images)


def _method_checks(given: argparse.Namespace) -> Iterator[Check]:
    from sskd.checks import methods
    from sskd.checks.device import check_device
    from sskd.checks.samples import fitted_teacher, random_images
    from sskd.models import takes_image_size

    def overfit() -> None:
        images = random_images(16, 4)
        method = _build(given, images)
        if method.needs_teacher:
            fitted = fitted_teacher(PAIR.split("-")[0], len(images.train))
            method.teacher.load_state_dict(fitted.state_dict())
        methods.check_overfits(method, images)

    def phases(pair: str) -> None:
        images = random_images(3, 4)
        methods.check_phases(_build(given, images, pair), images)

    few = random_images(20, 4)
    build = partial(_build, given, few)
    build()  # a wrong setting is an error, not a failed check
    yield Check("state is saved and loaded", lambda: methods.check_state(build))
    yield Check("resumes with the same bits", lambda: methods.check_resume(build, few))
    yield Check("batch of one image", lambda: methods.check_single_image(build(), few))
    yield Check("teacher_outputs", lambda: methods.check_teacher_outputs(build(), few))
    yield Check("a CUDA graph can contain a step", lambda: check_device(build(), few))
    yield Check("overfits a batch", overfit)
    for path in sorted((CONF / "pair").glob("*.yaml")):
        # Those for ImageNet have as many stages, and maps as large, as the pairs with ResNet50.
        if not any(map(takes_image_size, path.stem.split("-"))):
            yield Check(f"gradients with {path.stem}", partial(phases, path.stem), may_refuse=True)


def _network_checks(given: argparse.Namespace) -> Iterator[Check]:
    from sskd.checks import networks

    words = (f"arch@student={given.name}", f"arch@teacher={given.name}")
    name = _config(given, *words).student.name
    yield Check("shapes of the features", lambda: networks.check_features(name))
    yield Check("gradients", lambda: networks.check_gradients(name))
    yield Check("single image", lambda: networks.check_single_image(name))
    yield Check("works as a teacher", lambda: networks.check_teacher(name))
    yield Check("checkpoints are recognised", lambda: networks.check_recognition(name))


def _dataset_checks(given: argparse.Namespace) -> Iterator[Check]:
    from sskd.checks import datasets

    settings = _config(given, f"dataset={given.name}").dataset
    check = partial(datasets.check_images, settings)
    yield Check("types and shapes", partial(check, settings.size))
    yield Check("types and shapes with 64 pixels", partial(check, 64), may_refuse=True)
    yield Check("two loads are equal", lambda: datasets.check_repeatable(settings))
    yield Check("images of each class", lambda: datasets.check_classes(settings))


_CHECKS = {"method": _method_checks, "arch": _network_checks, "dataset": _dataset_checks}


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("checks", DESCRIPTION, EXAMPLES)
    parser.add_argument("group", choices=sorted(_CHECKS), help="what to check")
    parser.add_argument("name", help="the name of the method, architecture or dataset")
    parser.add_argument("--config-dir", "-cd", help="a folder with GROUP/NAME.yaml of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for the training commands"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
