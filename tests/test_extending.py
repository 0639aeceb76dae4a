"""docs/extending.md against the code: its parts are added to a copy of the checkout and tested."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose, random_images
from pages import EXTENDING, PART, ROOT, commands, needs_a_part, read, section
from starting import run
from torch import Tensor

PAGE = read(EXTENDING)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout with the parts of the page added to it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("conf", "hydra_plugins", "sskd", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "train_student.py", "train_teacher.py"):
        shutil.copy(ROOT / name, copy)
    for block in PART.finditer(PAGE):
        path, table = copy / block["file"], block["table"]
        if table is None:
            assert not path.exists(), "the page would overwrite a file"
            path.write_text(block["body"], encoding="utf-8")
        else:
            add_lines(path, table, block["body"].splitlines())
    return copy


def add_lines(path: Path, table: str, added: list[str]) -> None:
    """Add an import in its place, and an entry at the end of the dict ``table``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    imported, entry = (line.removeprefix("+") for line in added)
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{table}: dict["))
    lines.insert(lines.index("}", start), entry)
    own = [i for i, line in enumerate(lines) if line.startswith("from sskd.") and line > imported]
    lines.insert(own[0], imported)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_of_the_page_names_its_file() -> None:
    blocks = len(re.findall(r"^```\w+$", PAGE, re.M))
    assert len(list(PART.finditer(PAGE))) + len(re.findall(r"^```bash$", PAGE, re.M)) == blocks


def test_a_method_is_at_most_40_lines() -> None:
    part = section(EXTENDING, "A method")
    bodies = [block["body"] for block in PART.finditer(part)]
    assert len(bodies) == 3  # its Python file, its entry, its YAML file
    lines = sum(len(body.splitlines()) for body in bodies)
    assert lines <= 40
    assert f"is {lines} lines in all" in part


def write_images(path: Path, size: int) -> dict[str, Any]:
    """Write 80 training and 40 test images that can be learnt; return the file's arrays."""
    images = random_images(80, 40, size=size)
    arrays: dict[str, Any] = {
        "train_images": images.train.images.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.train.labels.numpy(),
        "test_images": images.test.images.permute(0, 2, 3, 1).numpy(),
        "test_labels": images.test.labels.numpy(),
        "classes": np.array(images.classes),
    }
    np.savez(path, **arrays)
    return arrays


def test_the_command_of_the_page_trains(checkout: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images.npz", size=24)
    (command,) = filter(needs_a_part, commands(PAGE))
    words = [word.replace("FILE", str(tmp_path / "images.npz")) for word in command[1:]]
    small = ("schedule.epochs=16", "batch_size=16", "device=cpu", f"runs={tmp_path / 'runs'}")
    finished = run(*words, *small, "wandb.mode=disabled", cwd=checkout)
    assert finished.returncode == 0, finished.stderr

    (path,) = tmp_path.glob("runs/mine/distill/resnet20-plain16/dist/*/result.json")
    result = json.loads(path.read_text())
    names = [result[key] for key in ("method", "student", "teacher", "dataset")]
    assert names == ["dist", "plain16", "resnet20", "mine"]
    assert 0 <= result["top1"]["last"] <= 100
    convolutions = 9 * (3 * 16 + 16 * 16 + 16 * 32 + 32 * 64)
    assert result["parameters"] == convolutions + 2 * (16 + 16 + 32 + 64) + (64 + 1) * 5

    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    terms = [line["loss/dist"] for line in lines if line["stage"] == "distill"]
    assert len(terms) == 16
    assert all(map(math.isfinite, terms))
    assert terms[-1] < terms[0] / 2
    digest = hashlib.sha256((tmp_path / "images.npz").read_bytes()).hexdigest()
    assert f"digest: {digest}" in (path.parent / "config.yaml").read_text()


def test_a_wrong_setting_of_the_method_is_refused(checkout: Path, tmp_path: Path) -> None:
    wrong = ("method=dist", "method.intra=-1", "+method.inter=1", f"runs={tmp_path / 'runs'}")
    refused = run("train_student.py", "dataset=digits", *wrong, cwd=checkout)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert "method.intra: should be greater than or equal to 0" in refused.stderr
    assert "method.inter: no such setting; did you mean 'method.intra'?" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_the_tests_of_methods_cover_the_method(checkout: Path) -> None:
    """On the 11 pairs, overfitting a batch, with a batch of one image, loading its state."""
    quiet = ("-q", "-p", "no:cacheprovider", "--color=no")
    tested = run(
        "-m", "pytest", "tests/methods/test_methods.py", "-k", "dist", *quiet, cwd=checkout
    )
    assert tested.returncode == 0, tested.stdout
    passed = re.search(r"^(\d+) passed", tested.stdout, re.M)
    assert passed is not None, tested.stdout
    assert int(passed[1]) >= 11 + 3


def softened(logits: Tensor, temperature: float) -> list[list[float]]:
    powers = [[math.exp(value / temperature) for value in row] for row in logits.tolist()]
    return [[power / sum(row) for power in row] for row in powers]


@pytest.mark.parametrize(("batch", "classes"), [(2, 3), (7, 5), (16, 100)])
@pytest.mark.parametrize(("temperature", "intra"), [(1.0, 1.0), (4.0, 0.5), (2.0, 0.0)])
def test_the_loss_is_pearsons_correlation(
    checkout: Path, batch: int, classes: int, temperature: float, intra: float
) -> None:
    loss = load(checkout / "sskd/methods/dist.py").dist_loss
    generator = torch.Generator().manual_seed(batch)
    student = 2 * torch.randn(batch, classes, generator=generator)
    teacher = 2 * torch.randn(batch, classes, generator=generator)
    rows = [softened(logits.double(), temperature) for logits in (student, teacher)]
    columns = [list(zip(*table, strict=True)) for table in rows]
    of_images, of_classes = (
        statistics.fmean(1 - statistics.correlation(s, t) for s, t in zip(*pair, strict=True))
        for pair in (rows, columns)
    )
    expected = temperature**2 * (of_images + intra * of_classes)
    assert loss(student, teacher, temperature, intra).item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_zero_for_equals_and_finite_for_one(
    checkout: Path,
) -> None:
    loss = load(checkout / "sskd/methods/dist.py").dist_loss
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    assert loss(logits + 3, logits, 1.0, 1.0).item() == pytest.approx(0, abs=1e-5)
    student = torch.randn(1, 9, generator=generator, requires_grad=True)
    alone = loss(student, logits[:1], 1.0, 1.0)
    (gradient,) = torch.autograd.grad(alone, student)
    assert alone.isfinite()
    assert gradient.isfinite().all()


def test_the_network_returns_features_for_methods(checkout: Path) -> None:
    torch.manual_seed(0)
    network = load(checkout / "sskd/models/plain.py").Plain(7, width=4)
    features = network(torch.randn(2, 3, 32, 32))
    sizes = [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert features.stem.shape == (2, 4, 32, 32)
    for stage, preact, size in zip(features.stages, features.preacts, sizes, strict=True):
        assert stage.shape == (2, *size)
        assert (preact < 0).any()
        assert torch.equal(stage, preact.clamp(min=0))
    torch.testing.assert_close(features.pooled, features.stages[-1].flatten(2).mean(2))
    assert features.logits.shape == (2, 7)
    F.cross_entropy(features.logits, torch.tensor([0, 6])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert [tuple(tensor.shape) for tensor in network.state_dict().values()][-2:] == [(7, 16), (7,)]


def test_the_dataset_has_the_images_of_the_file(
    checkout: Path, tmp_path: Path, composed: Compose
) -> None:
    arrays = write_images(tmp_path / "images.npz", size=32)
    module = load(checkout / "sskd/data/arrays.py")
    settings = composed("dataset=folder", f"dataset.root={tmp_path / 'images.npz'}").dataset
    source = module.npz(settings)
    assert source.classes == tuple(f"class {label}" for label in range(5))
    for split, part in ((source.train, "train"), (source.test, "test")):
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.labels.tolist() == arrays[f"{part}_labels"].tolist()
        for channel in range(3):
            expected = arrays[f"{part}_images"][:, :, :, channel]
            assert split.images[:, channel].tolist() == expected.tolist()
    larger = module.npz(settings.model_copy(update={"size": 64}))
    assert larger.train.images.shape == (80, 3, 64, 64)

    before = module.npz_digest(settings)
    np.savez(tmp_path / "images.npz", **arrays | {"test_labels": arrays["test_labels"][::-1]})
    assert module.npz_digest(settings) != before
