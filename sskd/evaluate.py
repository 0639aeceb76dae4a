"""Measure the accuracy of any checkpoint: ``python -m sskd.evaluate CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sskd.commands.process import run_tool
from sskd.errors import UserError
from sskd.invocation.composition import compose_config
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import tool_command
from sskd.output import complain, say
from sskd.overrides import as_override

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
    from sskd.models import build_model, find_checkpoint, load_weights
    from sskd.training.evaluation import accuracy, predict

    path = find_checkpoint(checkpoint)
    arch = arch or _recognised_arch(path)
    choices = ["method=vanilla", *_dataset_of_run(path), *overrides]
    folders = [] if config_dir is None else [Path(config_dir)]
    config = read_config(compose_config("student", choices, folders))
    chosen = choose_device(device)
    tune_device(chosen)
    images = load_images(config.dataset).to(chosen)
    _warn_of_other_images(path, config.dataset.root, images.digest)
    network = build_model(arch, images.num_classes)
    stated = load_weights(network, path).accuracy
    to_device(network, images.test.images.device)
    of = f"{path}: {arch}, {images.name} test set"
    top1 = accuracy(predict(network, images.test, images, of), images.test.labels)
    note = "" if stated is None else f" (the file states {stated:.2f})"
    return f"{of}: top-1 {top1:.2f}{note}"


def _recognised_arch(path: Path) -> str:
    """Return the architecture of the network in the file ``path``; UserError if it is unknown."""
    from sskd.models import read_checkpoint, recognise

    recognised = recognise(read_checkpoint(path).state)
    if recognised is None:
        raise UserError(f"{path}: has no architecture of this suite; name it with --arch NAME")
    return recognised[0]


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
