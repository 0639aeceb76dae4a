"""The formats: how each is written, and how its file is run without the suite's code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sskd.errors import UserError
from sskd.export.contents import BATCH, INPUT, OUTPUT, Contents, refusing_failures
from sskd.export.templates import render
from sskd.models import save_weights

Run = Callable[[Tensor], Tensor]  # float32 images [N, 3, H, W] in [0, 1] to logits [N, C]
OPSET = 18
INT8 = "model_int8.onnx"


class Format(NamedTuple):
    """One format.

    ``file`` is the name of the file with the network. ``write`` fills an empty folder. ``load``
    returns the network of that folder. ``packages`` are those of the extra [export] that it needs.
    """

    file: str
    write: Callable[[Path, Contents], None]
    load: Callable[[Path, Contents], Run]
    packages: tuple[str, ...] = ()


def require_packages(names: list[str]) -> None:
    """Raise UserError if a package of the formats ``names`` is not installed."""
    for name in names:
        missing = [each for each in FORMATS[name].packages if not importlib.util.find_spec(each)]
        if missing:
            raise UserError(f"--to {name} needs {', '.join(missing)}: pip install '.[export]'")


def _write_onnx(folder: Path, contents: Contents) -> None:
    import onnx

    program = contents.program
    with refusing_failures("torch.onnx"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: BATCH}},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
        graph = model.graph
        for part in (*graph.node, *graph.input, *graph.output, *graph.value_info):
            part.ClearField("metadata_props")  # the exporter's notes on its own work
        onnx.helper.set_model_props(model, contents.metadata)
        onnx.checker.check_model(model, full_check=True)
    (folder / FORMATS["onnx"].file).write_bytes(model.SerializeToString())


def run_onnx(path: Path) -> Run:
    """Return the network of an ONNX file, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_pt2(folder: Path, contents: Contents) -> None:
    path = folder / FORMATS["pt2"].file
    with refusing_failures("torch.export"):
        torch.export.save(contents.program, path, extra_files=contents.metadata)


def _load_pt2(folder: Path, contents: Contents) -> Run:
    return torch.export.load(folder / FORMATS["pt2"].file).module()


def _write_torchscript(folder: Path, contents: Contents) -> None:
    path = folder / FORMATS["torchscript"].file
    with refusing_failures("torch.jit"), torch.no_grad():
        traced = torch.jit.trace(contents.classifier, contents.example, check_trace=False)
        torch.jit.save(traced, path, _extra_files=contents.metadata)
    _remove_traces(path)


def _remove_traces(path: Path) -> None:
    """Remove the stack traces of a TorchScript file, which hold paths of this machine."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            if not name.endswith(".debug_pkl"):
                archive.writestr(name, content)


def _load_torchscript(folder: Path, contents: Contents) -> Run:
    with refusing_failures("torch.jit"):
        loaded: Any = torch.jit.load(folder / FORMATS["torchscript"].file, map_location="cpu")

    def run(images: Tensor) -> Tensor:
        with refusing_failures("torch.jit"):
            logits: Tensor = loaded(images)
        return logits

    return run


def _write_hub(folder: Path, contents: Contents) -> None:
    _write_pt2(folder, contents)
    save_weights(folder / "model.safetensors", contents.original, {"arch": contents.entry})
    hubconf = render("hubconf.txt", entry=contents.entry, **contents.facts)
    (folder / "hubconf.py").write_text(hubconf, encoding="utf-8")
    classes = contents.facts["classes"]
    config = {
        "num_labels": len(classes),
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
        "image_size": contents.size,
        "num_channels": 3,
        **contents.facts,
    }
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _load_hub(folder: Path, contents: Contents) -> Run:
    loaded: Run = torch.hub.load(str(folder), contents.entry, source="local")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # of hubconf.py
    return loaded


FORMATS = {
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        lambda folder, _: run_onnx(folder / "model.onnx"),
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "pt2": Format("model.pt2", _write_pt2, _load_pt2),
    "torchscript": Format("model.pt", _write_torchscript, _load_torchscript),
    "hub": Format("model.pt2", _write_hub, _load_hub),
}
