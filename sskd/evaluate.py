"""Measure the accuracy of any checkpoint: ``python -m sskd.evaluate CHECKPOINT``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from sskd.commands.process import run_tool
from sskd.errors import UserError
from sskd.invocation.composition import compose_config
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_command
from sskd.output import complain, say
from sskd.overrides import as_override, flatten

if TYPE_CHECKING:
    from torch import nn

    from sskd.data import Images

_EXAMPLES = """
examples:
  {command} runs/cifar100/scratch/resnet56/seed0
  {command} resnet56_best.pth dataset.root=FOLDER
  {command} wrn.pth --arch wrn_40_2 dataset=cifar10 --device cuda

In a folder, the file with `best` in its name is used; the folder's ckpt/ is searched too. The
checkpoint may be one of this suite, of SSKD or of the CRD benchmark; its architecture is recognised
from its tensors. Beside a run's config.yaml the dataset of that run is used, else CIFAR-100.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the checkpoint that the command line names and return the exit status."""
    return run_tool(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _run(given: argparse.Namespace) -> None:
    load_extensions()
    say(evaluate(**vars(given)))


def _parser() -> argparse.ArgumentParser:
    command = tool_command("evaluate")
    parser = argparse.ArgumentParser(
        prog=command,
        description="Measure the top-1 accuracy of a checkpoint on a test set, in float32.",
        epilog=_EXAMPLES.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file, or a folder that holds one")
    parser.add_argument("--arch", help="the architecture; default: recognised from its tensors")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--config-dir", "-cd", help="a folder with dataset/NAME.yaml of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="dataset.KEY=VALUE", help="as for the training commands"
    )
    return parser


def evaluate(
    checkpoint: str,
    *,
    arch: str | None,
    device: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
) -> str:
    """Return one line with the accuracy of ``checkpoint``.

    Args:
        checkpoint: a file, or a folder that holds one.
        arch: the name of its architecture; None: recognised by its tensors.
        device: as the setting ``device``.
        overrides: choices of the dataset, as for the training commands.
        config_dir: a folder with configuration files beside those of the suite.
    """
    # Importing torch takes seconds, which --help should not.
    from sskd.config import read_config
    from sskd.data import load_images
    from sskd.device import choose_device, to_device, tune_device
    from sskd.models import find_checkpoint, load_weights
    from sskd.training.evaluation import accuracy, predict

    path = find_checkpoint(checkpoint)
    choices = ["method=vanilla", *_dataset_of_run(path), *overrides]
    folders = [] if config_dir is None else [Path(config_dir)]
    config = read_config(compose_config("student", choices, folders))
    chosen = choose_device(device)
    tune_device(chosen)
    images = load_images(config.dataset).to(chosen)
    _warn_of_other_images(path, config.dataset.root, images.digest)
    name, network = _network_of(path, arch, images, folders)
    stated = load_weights(network, path).accuracy
    to_device(network, images.test.images.device)
    of = f"{path}: {name}, {images.name} test set"
    top1 = accuracy(predict(network, images.test, images, of), images.test.labels)
    note = "" if stated is None else f" (the file states {stated:.2f})"
    return f"{of}: top-1 {top1:.2f}{note}"


def _network_of(
    path: Path, arch: str | None, images: Images, folders: Sequence[Path]
) -> tuple[str, nn.Module]:
    """Return the name of the network in the file ``path``, and a new one like it.

    Without ``arch`` it is recognised by its tensors, or it is what the method of the run deploys
    whose folder holds ``path``.

    Raises:
        UserError: it is unknown.
    """
    from sskd.models import build_model, read_checkpoint, recognise

    recognised = None if arch else recognise(read_checkpoint(path).state)
    if name := arch or (recognised and recognised[0]):
        return name, build_model(name, images.num_classes)
    if deployed := _deployed_by_run(path, images, folders):
        return deployed
    raise UserError(f"{path}: has no architecture of this suite; name it with --arch NAME")


def _deployed_by_run(
    checkpoint: Path, images: Images, folders: Sequence[Path]
) -> tuple[str, nn.Module] | None:
    """Return what the method deploys in the run whose folder holds ``checkpoint``, if it is one.

    The run may be untrusted: its settings are checked like those of a command line.
    """
    from sskd.config import read_config
    from sskd.runs.folder import read_config_file
    from sskd.runs.names import CONFIG
    from sskd.teachers.assembly import assemble

    path = checkpoint.parent / CONFIG
    values = read_config_file(path) if path.exists() else {}
    groups = {key: values[key] for key in ("student", "teacher", "method") if key in values}
    named = {key: each["name"] for key, each in groups.items() if _has_name(each)}
    if len(named) < 3:
        return None
    settings = flatten({"method": groups["method"]})
    del settings["method.name"]
    if not all(map(_is_plain, settings.values())):
        raise UserError(f"{path}: the settings of the method are not plain values")
    words = [f"arch@{role}={named[role]}" for role in ("student", "teacher")]
    words += [f"method={named['method']}"]
    words += [as_override(key, value) for key, value in settings.items()]
    config = read_config(compose_config("student", words, folders))
    name = f"{named['student']} as method={named['method']} deploys it"
    return name, assemble(config, images).deployed


def _has_name(group: object) -> TypeGuard[dict[str, Any]]:
    """Return whether ``group`` is a part of a configuration with a name that needs no quotes."""
    name = group.get("name") if isinstance(group, dict) else None
    return isinstance(name, str) and re.fullmatch(r"\w+", name) is not None


def _dataset_of_run(checkpoint: Path) -> list[str]:
    """Return overrides that choose the dataset of the run whose folder holds ``checkpoint``.

    The run may be untrusted, so nothing is downloaded to its root and no interpolation resolved.
    Empty if the folder is not a run's folder.

    Raises:
        UserError: its config.yaml chooses no dataset of this suite.
    """
    from sskd.data import SOURCES, DatasetSettings
    from sskd.runs.folder import read_config_file
    from sskd.runs.names import CONFIG

    path = checkpoint.parent / CONFIG
    if not path.exists():
        return []
    dataset = read_config_file(path).get("dataset")
    if not isinstance(dataset, dict) or dataset.get("source") not in list(SOURCES):
        raise UserError(f"{path}: names no dataset; it is not a run's configuration")
    settings = {key: value for key, value in dataset.items() if key not in ("digest", "download")}
    for key, value in settings.items():
        if key not in DatasetSettings.model_fields or not _is_plain(value):
            raise UserError(f"{path}: dataset.{key} is not a setting of a run's dataset")
    values = [as_override(f"dataset.{key}", value) for key, value in settings.items()]
    return [f"dataset={dataset['source']}", "dataset.download=false", *values]


def _warn_of_other_images(checkpoint: Path, root: str, digest: str | None) -> None:
    """Warn if the run of ``checkpoint`` recorded another ``digest`` of the images in ``root``."""
    if _digest_of_run(checkpoint) not in (None, digest):
        complain(
            f"warning: {checkpoint}: the images in {root} may differ from those of its run: "
            "config.yaml has another dataset.digest"
        )


def _digest_of_run(checkpoint: Path) -> object:
    """Return the digest of the data files that the run of ``checkpoint`` recorded, if any."""
    from sskd.runs.folder import read_config_file
    from sskd.runs.names import CONFIG

    path = checkpoint.parent / CONFIG
    dataset = read_config_file(path).get("dataset") if path.exists() else None
    return dataset.get("digest") if isinstance(dataset, dict) else None


def _is_plain(value: object) -> bool:
    """Return whether ``value`` is a plain value, not an interpolation."""
    parts = value if isinstance(value, list) else [value]
    plain = all(part is None or isinstance(part, bool | int | float | str) for part in parts)
    return plain and "${" not in str(value)


if __name__ == "__main__":
    sys.exit(main())
