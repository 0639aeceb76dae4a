"""Exported files: what is in them, that they run without the suite, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import torch
import yaml
from conftest import SmallTeacher, compose_once
from faults import SMALL
from image_folders import write_images
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn

from sskd.config import read_config
from sskd.data.decode import decode
from sskd.data.packed.cutting import central
from sskd.errors import UserError
from sskd.export.__main__ import NAMES, main
from sskd.export.agreement import Agreement, require_agreement, require_any_batch
from sskd.export.card import describe
from sskd.export.contents import Classifier, Contents
from sskd.export.formats import FORMATS
from sskd.export.subject import find_subject
from sskd.export.templates import render
from sskd.models import build_model, fold_batch_norms, save_weights
from sskd.models.features import partial_features
from sskd.train import train
from sskd.trained import TrainedNetwork

onnx = pytest.importorskip("onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def run_folder(small_teacher: SmallTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished student."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    small_teacher.put(runs)
    words = (*SMALL, "method=kd", f"runs={runs}", "wandb.mode=disabled")
    train(read_config(compose_once("student", *words)))
    (result,) = runs.rglob("kd/*/result.json")
    return result.parent


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the exports of that student in every format."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main([str(run_folder), "--to", ",".join(NAMES), "--int8", "--out", str(out)]) == 0
    return out


@pytest.fixture
def classifier() -> Classifier:
    """Return a network whose BatchNorms have statistics."""
    torch.manual_seed(0)
    network = build_model("resnet8", 10)
    network(torch.rand(8, 3, 32, 32))
    return Classifier(network, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def head(card: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.read_text().split("---\n")[1])
    return found


def refused(capsys: Any, *words: object) -> str:
    """Return the one line with which the command refuses ``words``."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return str(error)


def test_the_formats_of_the_command_are_those_of_the_code() -> None:
    assert list(NAMES) == list(FORMATS)


def test_a_card_has_a_head_for_programs(exported: Path, run_folder: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    for name in NAMES:
        found = head(exported / name / "README.md")
        facts = found["sskd"]
        assert (exported / name / facts["file"]).is_file()
        assert facts["agreement"]["images"] == 30
        assert facts["agreement"]["changed"] == 0
        assert facts["classes"] == DIGITS
        assert facts["epoch"] == "last"
        assert facts["training"]["top1"] == result["top1"]
        assert facts["training"]["teacher_top1"] == result["teacher_top1"]
        assert facts["training"]["settings"]["method.temperature"] == 4
        (model,) = found["model-index"]
        (metric,) = model["results"][0]["metrics"]
        assert metric["value"] == pytest.approx(result["top1"]["last"], abs=0.005)
        assert found["pipeline_tag"] == "image-classification"
    assert "CC BY 4.0" in (exported / "hub" / "README.md").read_text()


def test_an_export_has_no_path_of_the_machine(exported: Path) -> None:
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) == 12
    for path in files:
        content = _unpacked(path)
        for folder in (pages.ROOT, Path(torch.__file__).parents[1], exported.parents[1]):
            assert str(folder).encode() not in content, path


def _unpacked(path: Path) -> bytes:
    """Return what a file holds; torch compresses some members of its archives."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_an_onnx_file_is_complete(exported: Path) -> None:
    for name in ("model.onnx", "model_int8.onnx"):
        path = exported / "onnx" / name
        model = onnx.load(path)
        entries = {each.key: each.value for each in model.metadata_props}
        assert json.loads(entries["classes"]) == DIGITS
        assert json.loads(entries["card"])["architecture"] == "resnet8"
        session = onnxruntime.InferenceSession(path)
        (given,), (returned,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape) == ("images", ["batch", 3, 32, 32])
        assert (returned.name, returned.shape) == ("logits", ["batch", 10])
    assert path.stat().st_size < (exported / "onnx" / "model.onnx").stat().st_size / 2


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_the_code_of_the_page_classifies_a_picture(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    name = NAMES[number]
    blocks = [
        code
        for language, code in pages.code_blocks(pages.read("docs/export.md"))
        if language == "python"
    ]
    assert len(blocks) == len(NAMES)
    code = blocks[number].replace("resnet20", "resnet8")
    assert f"```python\n{code}```" in (exported / name / "README.md").read_text()
    shutil.copytree(exported / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    names: dict[str, Any] = {}
    _write_sideways_picture(Path("picture.png"))
    exec(compile(code, name, "exec"), names)
    assert capsys.readouterr().out.strip() in DIGITS
    expected = decode(Path("picture.png").read_bytes(), 32)[None] / 255
    torch.testing.assert_close(torch.as_tensor(names["images"]), expected)


def test_the_code_for_packed_images_cuts_out_the_same_centre_as_the_suite(tmp_path: Path) -> None:
    photos = write_images(tmp_path, 100)
    save_weights(tmp_path / "mine.safetensors", build_model("resnet8", 2), {})
    words = [f"dataset.root={photos}", "dataset.crop=resized", "dataset.workers=0"]
    out = ["--out", str(tmp_path / "out")]
    file = str(tmp_path / "mine.safetensors")
    assert main([file, "--to", "torchscript", *out, "dataset=folder", *words]) == 0
    ((_, code),) = pages.code_blocks((tmp_path / "out/torchscript/README.md").read_text())
    # Shades that rise from edge to edge: they show which part of the picture is cut out.
    down, right = torch.meshgrid(torch.linspace(0, 1, 120), torch.linspace(0, 1, 90), indexing="ij")
    picture = (torch.stack([down, right, down * right]) * 255).to(torch.uint8)
    names: dict[str, Any] = {"np": np, "torch": torch, "Image": Image, "ImageOps": ImageOps}
    names["picture"] = Image.fromarray(picture.permute(1, 2, 0).numpy())
    lines = [
        line for line in code.splitlines() if line.startswith(("picture = ImageOps.fit", "images"))
    ]
    exec("\n".join(lines), names)
    torch.testing.assert_close(names["images"][0], central(picture, 32) / 255, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_each_format_has_the_border(name: str) -> None:
    code = render(f"{name}.txt", file="FILE", size=32, entry="ENTRY", border=", bleed=0.0625")
    assert "Image.Resampling.BILINEAR, bleed=0.0625)" in code


def _write_sideways_picture(path: Path) -> None:
    """Write noise whose EXIF record says that the camera was held sideways."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise = torch.randint(256, (90, 120, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(path, exif=exif)


def test_an_existing_export_is_only_replaced_by_force(
    run_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = (run_folder, "--to", "torchscript", "--out", tmp_path / "a")
    assert main([str(word) for word in words]) == 0
    before = (tmp_path / "a/torchscript/model.pt").read_bytes()
    assert "--force" in refused(capsys, *words)
    assert main([str(word) for word in (*words, "--force", "--fold", "--epoch", "best")]) == 0
    assert "folded 9 of 9 BatchNorms" in capsys.readouterr().out
    assert (tmp_path / "a/.old/torchscript-1/model.pt").read_bytes() == before
    facts = head(tmp_path / "a/torchscript/README.md")["sskd"]
    assert (facts["epoch"], facts["batch_norms"]) == ("best", {"left": 0, "folded": 9})
    (tmp_path / "b/torchscript").mkdir(parents=True)
    (tmp_path / "b/torchscript/mine").touch()
    line = refused(capsys, run_folder, "--to", "torchscript", "--force", "--out", tmp_path / "b")
    assert "is no export" in line
    assert (tmp_path / "b/torchscript/mine").exists()


def test_nothing_is_left_of_a_file_that_disagrees(
    run_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run_folder, "--to", "torchscript", "--out", tmp_path / "new" / "out")
    real = FORMATS["torchscript"]

    def load(folder: Path, contents: Contents) -> Any:
        return lambda images: contents.classifier(images) + (len(images) > 7) * 0.1

    monkeypatch.setitem(FORMATS, "torchscript", real._replace(load=load))
    assert "does not compute what the network computes" in refused(capsys, *words)
    assert not (tmp_path / "new").exists()


def test_a_terminated_export_leaves_nothing(
    run_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, contents: Contents) -> None:
        (folder / "model.pt").touch()
        signal.raise_signal(signal.SIGTERM)

    real = FORMATS["torchscript"]
    monkeypatch.setitem(FORMATS, "torchscript", real._replace(write=write))
    words = (str(run_folder), "--to", "torchscript", "--out", str(tmp_path / "new" / "out"))
    assert main(words) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_folding_changes_no_logit(classifier: Classifier) -> None:
    folded = Classifier(fold_batch_norms(classifier.network), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (classifier.batch_norms, folded.batch_norms) == (9, 0)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(folded(images), classifier(images), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Any:
        rows = images.flatten(1)[:, :5]
        return partial_features({"logits": rows if images.sum() > 0 else -rows})


def test_a_network_that_cannot_be_exported_is_refused() -> None:
    network = Classifier(Branching(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match=r"torch\.export cannot export this network .* --to"):
        _ = Contents(network, network, "mine", 32, {}).program


def test_a_file_must_take_any_batch(few_images: Any) -> None:
    expected = torch.ones(20, 5)

    def fixed(images: Tensor) -> Tensor:
        return torch.ones(2, 5)[: len(images)].expand(len(images), 5) / (len(images) != 7)

    with pytest.raises(UserError, match="batch of 7"):
        require_any_batch(
            lambda x: torch.ones(1, 5).expand(len(x), 5) * 0.9 ** (len(x) // 7),
            expected,
            few_images.test,
            "mine",
        )
    with pytest.raises(UserError, match="does not run with a batch of 7"):
        require_any_batch(fixed, expected, few_images.test, "mine")
    numbers = {"images": 2, "largest": 1.0, "changed": 0, "top1": 1.0, "network_top1": 1.0}
    require_agreement(Agreement(difference=1e-5, **numbers), "mine")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nothing was written"):
        require_agreement(Agreement(difference=float("nan"), **numbers), "mine")  # type: ignore[arg-type]


def test_bad_words_are_refused(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "did you mean 'onnx'" in refused(capsys, "r", "--to", "pt2,onx")
    assert "--to onnx" in refused(capsys, "r", "--to", "pt2", "--int8")
    assert "no checkpoint" in refused(capsys, tmp_path / "none", "--to", "pt2")
    (tmp_path / "file.pth").touch()
    words = (tmp_path / "file.pth", "--to", "pt2", "--epoch", "best")
    assert "--epoch chooses" in refused(capsys, *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[export]'" in refused(capsys, "r", "--to", "onnx")


def test_a_run_that_has_not_finished_is_refused(
    capsys: Any, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "seed0"
    shutil.copytree(run_folder, folder)
    (folder / "result.json").unlink()
    words = ("--to", "torchscript", "--out", tmp_path / "out")
    assert "has not finished" in refused(capsys, folder, *words)
    assert "has not finished" in refused(capsys, folder / "model.safetensors", *words)
    (tmp_path / "queued").mkdir()
    (tmp_path / "queued/status.json").touch()
    assert "has not finished" in refused(capsys, tmp_path / "queued", *words)
    assert not (tmp_path / "out").exists()


def test_other_weights_than_those_of_the_result_are_refused(
    capsys: Any, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "seed0"
    shutil.copytree(run_folder, folder)
    save_weights(folder / "model.safetensors", build_model("resnet8", 10), {})
    assert "other weights" in refused(capsys, folder, "--to", "torchscript")


def test_other_classes_are_refused(capsys: Any, tmp_path: Path) -> None:
    save_weights(tmp_path / "seven.safetensors", build_model("resnet8", 7), {})
    words = (tmp_path / "seven.safetensors", "--to", "torchscript", "dataset=digits")
    assert "name a dataset with 7 classes" in refused(capsys, *words)


def test_a_file_without_a_run_has_a_card(tmp_path: Path, capsys: Any) -> None:
    save_weights(tmp_path / "mine.safetensors", build_model("resnet8", 10), {})
    out = tmp_path / "out"
    words = ("--to", "torchscript", "--out", str(out), "dataset=digits")
    assert main([str(tmp_path / "mine.safetensors"), *words]) == 0
    assert "without a record of its training" in (out / "torchscript/README.md").read_text()
    assert head(out / "torchscript/README.md")["sskd"]["training"] is None


def test_a_card_says_which_method_deploys_the_network(
    run_folder: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet8 as method=simkd deploys it"
    monkeypatch.setattr(TrainedNetwork, "name", name)
    facts = describe(find_subject(str(run_folder)), classifier, folded=0)
    assert (facts["network"], facts["architecture"]) == (name, "resnet8")


def test_an_export_is_named_after_its_run(run_folder: Path) -> None:
    expected = f"digits-resnet14-resnet8-kd-{run_folder.name}"
    assert find_subject(str(run_folder)).name == expected
    assert find_subject(str(run_folder), epoch="best").name in (expected, f"{expected}-best")
