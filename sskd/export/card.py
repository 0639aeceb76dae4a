"""The card of an export: what the network is, how it was trained and how good it is.

The card is a README.md. Its head is YAML that the Hugging Face Hub reads, with the suite's facts
under the key ``sskd``. It names no path of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import sskd
from sskd.data.packed.cutting import CENTRE
from sskd.errors import mask_unprintable
from sskd.export.agreement import Agreement
from sskd.export.contents import INPUT, OUTPUT, Classifier, Contents
from sskd.export.formats import FORMATS, OPSET
from sskd.export.subject import Subject
from sskd.export.templates import render
from sskd.overrides import flatten

CARD = "README.md"
# By dataset.crop: an argument of ImageOps.fit, the share of the picture that each edge loses.
_BORDERS = {"padded": "", "resized": f", bleed={(1 - CENTRE[0] / CENTRE[1]) / 2}"}


class DataLicence(NamedTuple):
    """The licence of a dataset, the page that states it, and the id of the dataset on the Hub."""

    licence: str
    page: str | None = None
    hub_id: str | None = None


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_UCI = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"
_LICENCES = {
    "cifar10": DataLicence("no licence stated by its authors", _CIFAR, "uoft-cs/cifar10"),
    "cifar100": DataLicence("no licence stated by its authors", _CIFAR, "uoft-cs/cifar100"),
    "digits": DataLicence("CC BY 4.0", _UCI),
}
_UNKNOWN = DataLicence("unknown: state here what applies to your images")


class _Text(NamedTuple):
    """What a card says about a format: the Hub's tag, the place of the classes, what it needs."""

    tag: str
    classes: str
    needs: str


_EXTRA_FILE = "in its extra file `classes`, as JSON"
_TEXTS = {
    "onnx": _Text(
        "onnx",
        "in its metadata entry `classes`, as JSON",
        # Runtimes before 1.18 refuse the version of the format (IR 10) that torch writes.
        f"Needs `onnxruntime` 1.18 or later, `numpy` and `pillow`. The opset is {OPSET}.",
    ),
    "pt2": _Text(
        "pytorch",
        _EXTRA_FILE,
        "Needs `torch`, at least the version that wrote the file (`versions` in the head), `numpy` "
        "and `pillow`. The network is in eval mode: it is not meant for training.",
    ),
    "torchscript": _Text(
        "pytorch",
        _EXTRA_FILE,
        "Needs `torch`, `numpy` and `pillow`. PyTorch has deprecated TorchScript, so `torch.jit` "
        "warns; it is here for programs that need it, such as C++ ones.",
    ),
    "hub": _Text(
        "pytorch",
        "in `config.json`, as `classes` and `id2label`",
        "Needs `torch`, at least the version that wrote `model.pt2` (`versions` in the head), "
        "`numpy` and `pillow`. `model.safetensors` holds the weights under their names in the "
        "suite, not folded, for training.",
    ),
}


def describe(subject: Subject, classifier: Classifier, *, folded: int) -> dict[str, Any]:
    """Return the facts about a network as plain values: the card's head, and metadata of files.

    ``folded`` is the number of its BatchNorms that are in convolutions of ``classifier``.
    """
    trained, result = subject.trained, subject.result
    mean, std = trained.normalisation
    size, classes = trained.images.image_size, list(trained.images.classes)
    licence = _LICENCES.get(trained.dataset.source, _UNKNOWN)
    facts: dict[str, Any] = {
        "name": subject.name,
        "architecture": subject.arch,
        "network": trained.name,
        "parameters": sum(each.numel() for each in trained.network.parameters()),
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", 3, size, size]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(classes)]},
        "channels": "RGB in [0, 1]",
        "normalisation": {"inside": True, "mean": list(mean), "std": list(std)},
        "batch_norms": {"left": classifier.batch_norms, "folded": folded},
        "dataset": {
            "name": trained.images.name,
            "source": trained.dataset.source,
            "crop": trained.dataset.crop,
            "licence": licence.licence,
            "licence_page": licence.page,
        },
        "epoch": subject.epoch,
        "training": None if result is None else _training(subject),
        "versions": {"sskd": sskd.__version__, "torch": str(torch.__version__)},
        "classes": classes,
    }
    return _without_paths(facts)


def _training(subject: Subject) -> dict[str, Any]:
    result = subject.result
    assert result is not None
    settings = flatten(dict(result.run or {}))
    return {
        "method": result.method,
        "seed": result.seed,
        "epochs": result.epoch,
        "top1": asdict(result.top1),
        "teacher": result.teacher,
        "teacher_top1": result.teacher_top1,
        "teacher_epoch": result.teacher_epoch,
        "agreement": result.agreement,
        "weights_digest": getattr(result.digest, subject.epoch or "last"),
        "difference": dict(result.difference),
        "settings": {key: value for key, value in settings.items() if value is not None},
        "precision": result.precision,
        "seconds": result.seconds,
        "device": result.device,
        "versions": dict(result.versions),
        "commit": result.commit,
        "date": result.date,
    }


def _without_paths(value: Any) -> Any:
    """Return ``value`` with the last part of each absolute path, and no control characters."""
    if isinstance(value, Mapping):
        return {str(key): _without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    if isinstance(value, str):
        return mask_unprintable(Path(value).name if value.startswith(("/", "~")) else value)
    return value


def render_card(
    name: str, contents: Contents, agreement: Agreement, int8: Mapping[str, Any] | None
) -> str:
    """Return the card of an export in the format ``name``.

    Args:
        contents: with the facts that ``describe`` returns.
        agreement: of the file with the network.
        int8: the sizes of both files, and the agreement of the one in int8; None without it.
    """
    facts, file = contents.facts, FORMATS[name].file
    checked = {"format": name, "file": file, "agreement": asdict(agreement), "int8": int8}
    head = _head(name, facts, agreement) | {"sskd": {**checked, **facts}}
    body = render(
        "card.md",
        **facts,
        file=file,
        about=_TEXTS[name],
        usage=_usage(name, contents),
        agreement=agreement,
        int8=int8,
    )
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{text}---\n\n{body}"


def _usage(name: str, contents: Contents) -> str:
    """Return the code that loads the file and classifies a picture as the suite does."""
    return render(
        f"{name}.txt",
        file=FORMATS[name].file,
        size=contents.size,
        entry=contents.entry,
        border=_BORDERS[contents.facts["dataset"]["crop"]],
    )


def _head(name: str, facts: Mapping[str, Any], agreement: Agreement) -> dict[str, Any]:
    """Return the keys that the Hugging Face Hub reads."""
    dataset, training = facts["dataset"], facts["training"] or {}
    hub_id = _LICENCES.get(dataset["source"], _UNKNOWN).hub_id
    title = {"last": ", last epoch", "best": ", best epoch on the test set", None: ""}
    metric = {
        "type": "accuracy",
        "name": f"top-1 in percent{title[facts['epoch']]}",
        "value": round(agreement.top1, 2),
    }
    measured = {
        "task": {"type": "image-classification"},
        "dataset": {"name": dataset["name"], "type": hub_id or dataset["name"], "split": "test"},
        "metrics": [metric],
    }
    distilled = ["knowledge-distillation"] if training.get("teacher") else []
    return {
        "license": "unknown",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", _TEXTS[name].tag, *distilled],
        **({"datasets": [hub_id]} if hub_id else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": facts["name"], "results": [measured]}],
    }
