"""docs/extending.md: its files are written to a folder, and its commands are run there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import statistics
import zipfile
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose, random_images
from starting import ROOT, run
from torch import Tensor

from sskd.data import SOURCES
from sskd.invocation.extensions import GROUP, VARIABLE
from sskd.methods import METHODS
from sskd.models import ARCHITECTURES

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
FILE = re.compile(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", re.M | re.S)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
QUICK = ("schedule.epochs=1", "dataset.fraction=0.05", "wandb.mode=disabled", "device=cpu")
MODULES = {
    "sskd-student": "sskd.commands.student",
    "sskd-report": "sskd.report.__main__",
    "sskd-checks": "sskd.checks.__main__",
}
# Runs a console script of the checkout, as the installed one does.
SCRIPT = """
import importlib, sys

sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
sys.argv = sys.argv[3:]
sys.exit(module.command() if hasattr(module, "command") else module.main())
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the page."""
    folder = tmp_path_factory.mktemp("mine")
    for name, body in FILE.findall(PAGE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _no_entries() -> Any:
    """Remove what an imported file of the page has registered."""
    yield
    for table, name in ((METHODS, "normkd"), (ARCHITECTURES, "plain16"), (SOURCES, "npz")):
        table.pop(name, None)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_block(section: str, number: int, folder: Path, *more: str) -> list[CompletedProcess[str]]:
    """Run the commands of a ``bash`` block of a section in ``folder``; return how they ended.

    ``more`` are words for its training commands.
    """
    block = COMMANDS.findall(SECTIONS[section])[number].replace("\\\n", " ")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = []
    for line in block.splitlines():
        words = shlex.split(line.replace("FILE", str(folder / "images.npz")))
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            environment[name] = value
        else:
            training = [*words, *more] if words[0] == "sskd-student" else words
            command = ("-c", SCRIPT, str(ROOT), MODULES[words[0]], *training)
            ended.append(run(*command, cwd=folder, env=environment))
        assert not ended or ended[-1].returncode == 0, (line, ended[-1].stdout, ended[-1].stderr)
    return ended


def write_images(path: Path, size: int) -> dict[str, Any]:
    """Write 80 training and 40 test images that can be learned; return the file's arrays."""
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


def test_every_block_of_the_page_is_a_file_or_commands() -> None:
    fences = len(re.findall(r"^```\w+$", PAGE, re.M))
    assert len(FILE.findall(PAGE)) + len(COMMANDS.findall(PAGE)) == fences


def test_a_method_is_at_most_40_lines() -> None:
    bodies = [body for _, body in FILE.findall(SECTIONS["A method"])]
    assert len(bodies) == 2  # its Python file, its YAML file
    lines = sum(len(body.splitlines()) for body in bodies)
    assert lines <= 42
    assert f"It has {lines} lines" in SECTIONS["A method"]


def test_the_method_passes_the_checks(mine: Path) -> None:
    (checked,) = run_block("A method", 0, mine)
    lines = checked.stdout.splitlines()
    assert len(lines) == 6 + 13
    assert all(line.startswith("ok ") for line in lines)


def test_the_method_is_trained_and_shown(mine: Path, tmp_path: Path) -> None:
    os.environ[VARIABLE] = "normkd.py"
    try:
        _, reported = run_block("A method", 1, mine, *QUICK, "teacher.fraction=0.05")
    finally:
        del os.environ[VARIABLE]
    assert re.search(r"^NORMKD ", reported.stdout, re.M), reported.stdout


def test_the_method_joins_a_sweep_of_the_suite(mine: Path) -> None:
    os.environ[VARIABLE] = "normkd.py"
    try:
        run_block("A method", 2, mine, *QUICK, "teacher.fraction=0.05")
    finally:
        del os.environ[VARIABLE]
    assert list(mine.glob("smoke/digits/distill/*/normkd/seed0*/result.json"))


def test_the_network_passes_the_checks(mine: Path) -> None:
    (checked,) = run_block("A network", 0, mine)
    assert [line[:3] for line in checked.stdout.splitlines()] == ["ok "] * 5


def test_all_three_train_together(mine: Path) -> None:
    write_images(mine / "images.npz", size=24)
    more = ("schedule.epochs=16", "batch_size=16", "optimizer.lr=0.01", "device=cpu",
            "wandb.mode=disabled")  # fmt: skip
    checked, _ = run_block("A dataset", 0, mine, *more)
    assert [line[:3] for line in checked.stdout.splitlines()] == ["ok "] * 4

    (path,) = mine.glob("runs/mine/distill/resnet20-plain16/normkd/*/result.json")
    result = json.loads(path.read_text())
    names = [result[key] for key in ("method", "student", "teacher", "dataset")]
    assert names == ["normkd", "plain16", "resnet20", "mine"]
    convolutions = 9 * (3 * 16 + 16 * 16 + 16 * 32 + 32 * 64)
    assert result["parameters"] == convolutions + 2 * (16 + 16 + 32 + 64) + (64 + 1) * 5
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    terms = [line["loss/normkd"] for line in lines if line["stage"] == "distill"]
    assert len(terms) == 16
    assert all(map(math.isfinite, terms))
    # Two batches of other crops in each epoch: a single one says little.
    assert statistics.median(terms[8:]) < terms[0] / 2
    digest = hashlib.sha256((mine / "images.npz").read_bytes()).hexdigest()
    assert f"digest: {digest}" in (path.parent / "config.yaml").read_text()


def test_an_installed_package_is_an_extension(mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = run("-c", build, str(tmp_path), cwd=mine)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / 'site')!r}]\n"
        "from sskd.invocation.extensions import load_extensions\n"
        "from sskd.methods import METHODS\n"
        "load_extensions()\n"
        "print(METHODS['normkd'].__module__)"
    )
    loaded = run("-c", code, cwd=tmp_path)
    assert loaded.stdout == "normkd\n", loaded.stderr
    assert GROUP in PAGE


def softened(logits: Tensor, temperature: float) -> list[list[float]]:
    powers = [[math.exp(value / temperature) for value in row] for row in logits.tolist()]
    return [[power / sum(row) for power in row] for row in powers]


@pytest.mark.parametrize(("batch", "classes"), [(2, 3), (7, 5), (16, 100)])
@pytest.mark.parametrize(("factor", "smallest"), [(1.0, 0.01), (2.0, 0.01), (2.0, 4.0)])
def test_the_loss_has_a_temperature_of_each_image(
    mine: Path, batch: int, classes: int, factor: float, smallest: float
) -> None:
    loss = load(mine / "normkd.py").normkd_loss
    generator = torch.Generator().manual_seed(batch)
    student = 2 * torch.randn(batch, classes, generator=generator)
    teacher = 2 * torch.randn(batch, classes, generator=generator)
    rows = []
    for pair in zip(student.double(), teacher.double(), strict=True):
        both = [max(factor * statistics.stdev(z.tolist()), smallest) for z in pair]
        (q,), (p,) = (softened(z[None], t) for z, t in zip(pair, both, strict=True))
        rows.append(both[1] ** 2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = loss(student, teacher, factor, smallest).item()
    assert found == pytest.approx(statistics.fmean(rows), rel=1e-4)


def test_the_loss_forgets_shift_and_scale(mine: Path) -> None:
    loss = load(mine / "normkd.py").normkd_loss
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert loss(5 * logits + 3, logits, 2.0, 0.01).item() == pytest.approx(0, abs=1e-5)


def test_the_loss_of_one_image_is_finite(mine: Path) -> None:
    loss = load(mine / "normkd.py").normkd_loss
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 9, generator=generator)
    student = torch.randn(1, 9, generator=generator, requires_grad=True)
    alone = loss(student, teacher, 2.0, 0.01)
    (gradient,) = torch.autograd.grad(alone, student)
    assert alone.isfinite()
    assert gradient.isfinite().all()


def test_the_network_has_the_features_of_its_docstring(mine: Path) -> None:
    torch.manual_seed(0)
    network = load(mine / "plain.py").Plain(7, width=4)
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


def test_the_images_are_those_of_the_file(mine: Path, tmp_path: Path, composed: Compose) -> None:
    arrays = write_images(tmp_path / "images.npz", size=32)
    module = load(mine / "arrays.py")
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
