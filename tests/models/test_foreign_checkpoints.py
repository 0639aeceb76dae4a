"""Checkpoints of strangers: read if the tensors are whole and one network fits, else refused."""

from __future__ import annotations

import io
import math
import os
import pickle
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.models import (
    build_model,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    recognise,
    weights_digest,
)
from sskd.models.checkpoints import MOST_BYTES

State = dict[str, Tensor]


def network(name: str = "resnet8", classes: int = 10, seed: int = 1) -> State:
    torch.manual_seed(seed)
    return dict(build_model(name, classes).state_dict())


STATE = network()
DIGEST = weights_digest(STATE)
HEAD = {"proj_head.0.weight": torch.zeros(64, 64), "proj_head.0.bias": torch.zeros(64)}


def prefixed(*prefixes: str, state: State = STATE) -> State:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def changed(**tensors: Tensor) -> State:
    return {**STATE, **{name.replace("_", ".", 1): tensor for name, tensor in tensors.items()}}


def is_read(content: object, path: Path, **how: Any) -> None:
    """Save ``content``; it must be read as STATE, and load into a network."""
    torch.save(content, path, **how)
    assert weights_digest(read_checkpoint(path).state) == DIGEST
    model = build_model("resnet8", 10)
    load_weights(model, path)
    assert weights_digest(model) == DIGEST


def refusal(path: Path, arch: str = "resnet8") -> str:
    """The message of the error, one line, that loading ``path`` must raise; quickly."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_weights(build_model(arch, 10), path)
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert len(message) < 1000
    return message


# ---- texts ----

LONG = "a" * 300_000
TEXTS: dict[str, Callable[[], dict[str, Any]]] = {
    "arguments": lambda: {"model": STATE, "args": LONG},
    "a log of lines": lambda: {"net": STATE, "log": [LONG, "b c\n" * 50_000]},
    "a text named twice": lambda: {"state_dict": STATE, "args": LONG, "opt": {"again": LONG}},
    "a key": lambda: {"model": STATE, LONG: 3},
    "beside a dict with attributes": lambda: {"model": OrderedDict(STATE), "args": {"a": LONG}},
    "of other letters": lambda: {"model": STATE, "args": "é" * 200_000},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_long_text_is_read(kind: str, zipped: bool, tmp_path: Path) -> None:
    is_read(TEXTS[kind](), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


CALLS = {
    "a text": text(LONG) + b")R.",
    "a remembered text": text(LONG) + b"q\x00)\x81h\x00)R.",
    "a text in a list": b"](" + text(LONG) + b"e)R.",
    "a text in a tuple": text(LONG) + b"\x85)R.",
    "a text in a dict": b"}(" + text("a") + text(LONG) + b"u)R.",
    "a text as a class": text(LONG) + b")\x81.",
    "what a call returned": b"ccollections\nOrderedDict\n)R" + text(LONG) + b"0)R.",
    "a name without end": b"c" + b"a" * 300_000 + b"\nb\n.",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_long_text_that_would_be_called_is_refused(kind: str, tmp_path: Path) -> None:
    """Torch would quote it, and look through the quotation for minutes."""
    path = tmp_path / "net.pth"
    path.write_bytes(b"\x80\x02" + CALLS[kind])
    assert "no valid checkpoint has that" in refusal(path)


# ---- accuracies ----

ACCURACIES: dict[str, tuple[Any, float | None]] = {
    "none": (None, None),
    "a tensor of one value": (torch.tensor([[61.5]]), 61.5),
    "a list of one": ([61.5], 61.5),
    "a list": ([61.5, 88.0], None),
    "a tensor of two": (torch.tensor([61.5, 88.0]), None),
    "by name": ({"top1": torch.tensor(61.5), "top5": 88.0}, 61.5),
    "by other names": ({"train": 99.0, "test": 61.5}, None),
    "not a number": (math.nan, None),
    "infinite": (torch.tensor(math.inf), None),
    "a number as text": ("61.5", 61.5),
    "a text": ("high", None),
    "a text of percent": ("61.5 %", None),
    "too high": (161.5, None),
    "negative": (-1, None),
    "a share": (0.93, None),
    "all of a share": (torch.tensor(1.0), None),
    "none right": (0, 0.0),
    "of NumPy": (np.float64(61.5), 61.5),
    "a complex number": (torch.tensor(1j), None),
    "many digits": ("1" * 5000, None),
    "no tensor's values": (torch.empty(1, device="meta"), None),
}


@pytest.mark.parametrize("kind", ACCURACIES)
def test_an_odd_accuracy_does_not_keep_weights_away(kind: str, tmp_path: Path) -> None:
    stated, wanted = ACCURACIES[kind]
    for key in ("acc", "accuracy", "best_acc1"):
        is_read({"state_dict": STATE, key: stated}, tmp_path / "net.pth")
        assert read_checkpoint(tmp_path / "net.pth").accuracy == wanted


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [(torch.inf, None), ("1" * 5000, None), (-3, None), ([7], 7), ("late", None), (10**400, None)],
)
def test_an_odd_epoch_does_not_either(stated: Any, wanted: int | None, tmp_path: Path) -> None:
    if stated == 10**400:  # torch.save has no such number, JSON has
        path = tmp_path / "net.safetensors"
        path.write_bytes(save(STATE, metadata={"epoch": str(stated)}))
    else:
        path = tmp_path / "net.pth"
        torch.save({"model": STATE, "epoch": stated}, path)
    assert read_checkpoint(path).epoch == wanted


# ---- names ----

NAMES: dict[str, Callable[[], State]] = {
    "compiled": lambda: prefixed("_orig_mod."),
    "parallel twice": lambda: prefixed("module.", "module."),
    "Lightning": lambda: prefixed("model."),
    "a backbone": lambda: prefixed("backbone."),
    "a compiled parallel one": lambda: prefixed("_orig_mod.", "module."),
    "a parallel compiled one": lambda: prefixed("module.", "_orig_mod."),
    "a parallel backbone with a head": lambda: {
        **prefixed("module.", "backbone."),
        **prefixed("module.", state=HEAD),
    },
    "a compiled backbone with a head": lambda: {
        **prefixed("_orig_mod.", "backbone."),
        **prefixed("_orig_mod.", state=HEAD),
    },
    "an average": lambda: {"n_averaged": torch.tensor(3), **prefixed("module.")},
    "an average under a name": lambda: {
        "ema.n_averaged": torch.tensor(3),
        **prefixed("ema.", "module."),
    },
    "a student": lambda: prefixed("student."),
    "an encoder of two names": lambda: prefixed("base_model.", "model."),
    "a number": lambda: prefixed("0."),
    "FSDP": lambda: prefixed("_fsdp_wrapped_module."),
    "a student's parallel backbone with a head": lambda: {
        **prefixed("student.", "module.", "backbone."),
        **prefixed("student.", "module.", state=HEAD),
    },
    "five wrappers": lambda: prefixed("model.", "_orig_mod.", "module.", "net.", "network."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_wrappers_leave_their_names(kind: str, tmp_path: Path) -> None:
    is_read(NAMES[kind](), tmp_path / "bare.pth")
    is_read({"state_dict": NAMES[kind](), "epoch": 3}, tmp_path / "net.pth")


def test_only_a_prefix_of_all_names_is_a_wrappers(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    mixed = {("module." if name.startswith("fc") else "") + name: STATE[name] for name in STATE}
    for content, problem in (
        (mixed, "missing: 2 (first 'fc.weight'); not expected: 2 (first 'module.fc.weight')"),
        ({**STATE, "extra": torch.ones(1)}, "not expected: 1 (first 'extra')"),
        (prefixed("modul"), f"missing: {len(STATE)} (first 'conv1.weight')"),
    ):
        torch.save(content, path)
        assert f"does not fit: {problem}" in refusal(path)


def test_a_real_wrapper_is_read(tmp_path: Path) -> None:
    model = build_model("resnet8", 10)
    model.load_state_dict(STATE)
    compiled: Any = torch.compile(model)
    wrapped: nn.Module = nn.DataParallel(compiled)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    is_read(wrapped.state_dict(), tmp_path / "wrapped.pth")
    is_read({"ema": averaged.state_dict()}, tmp_path / "averaged.pth")


PROFILED = {
    f"{layer}{count}": torch.zeros(1)
    for layer in ("", "conv1.", "layer1.0.bn1.")
    for count in ("total_ops", "total_params")
}


@pytest.mark.parametrize("around", ["", "module."])
def test_a_profilers_counts_are_left_out(around: str, tmp_path: Path) -> None:
    counted = prefixed(around, state=STATE | PROFILED)
    is_read({"state_dict": counted, "epoch": 3}, tmp_path / "net.pth")


OTHER = network("resnet8", seed=2)
BESIDE: dict[str, Callable[[], State]] = {
    "its average": lambda: {**STATE, **prefixed("ema.", state=OTHER)},
    "its average, and that one's counter": lambda: {
        "n_averaged": torch.tensor(3),
        **STATE,
        **prefixed("module.", state=OTHER),
    },
    "its average, both in a wrapper": lambda: prefixed(
        "module.", state={**STATE, **prefixed("ema.", state=OTHER)}
    ),
    "its teacher": lambda: {**prefixed("model."), **prefixed("teacher.", state=OTHER)},
    "its larger teacher": lambda: {
        **STATE,
        **prefixed("teacher.", state=network("resnet14", seed=2)),
    },
    "its teacher, with a layer more": lambda: {
        **prefixed("student.", state={**STATE, "regressor.weight": torch.ones(4, 4)}),
        **prefixed("teacher.", state=OTHER),
    },
    "a criterion's weight": lambda: {**prefixed("model."), "criterion.weight": torch.ones(10)},
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("arch", ["resnet8", "resnet14"])
def test_no_network_is_picked_from_among_other_tensors(
    kind: str, arch: str, tmp_path: Path
) -> None:
    """Which of them is meant is not a guess to make."""
    path = tmp_path / "net.pth"
    torch.save({"state_dict": BESIDE[kind](), "epoch": 3}, path)
    assert "does not fit: " in refusal(path, arch)
    assert recognise(read_checkpoint(path).state) is None


def test_two_state_dicts_of_one_joined_name_are_both_seen(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for content in ({"a.b": STATE, "a": {"b": OTHER}}, {1: STATE, "1": OTHER}):
        torch.save(content, path)
        assert "holds several networks that fit" in refusal(path)


KEYS = ["net", "student", "model_state_dict", "state_dict_ema", "teacher", "weights", "net.inner"]


@pytest.mark.parametrize("key", KEYS)
def test_a_state_dict_lies_under_any_key(key: str, tmp_path: Path) -> None:
    content: Any = STATE
    for part in reversed(key.split(".")):
        content = {part: content, "epoch": 3, "note": "hello"}
    optimizer = torch.optim.SGD(build_model("resnet8", 10).parameters(), 0.1, momentum=0.9)
    generator = {"cpu": torch.get_rng_state()}
    content |= {"optimizer": optimizer.state_dict(), "generators": generator}
    content |= {"criterion": {"weight": torch.ones(10)}, "loss": {"ce": torch.tensor(1.0)}}
    is_read(content, tmp_path / "net.pth")


def test_of_several_networks_the_one_that_fits_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "net.pth", network("resnet14")
    torch.save({"model": other, "student": prefixed("module.")}, path)
    for name, wanted in (("resnet8", STATE), ("resnet14", other)):
        model = build_model(name, 10)
        load_weights(model, path)
        assert weights_digest(model) == weights_digest(wanted)
    with pytest.raises(UserError, match=r"'model' \(resnet14 with .*, 'student' \(resnet8 with"):
        read_checkpoint(path)
    other_classes = network(classes=7)
    torch.save({"a": other_classes, "b": STATE}, path)
    load_weights(build_model("resnet8", 10), path)
    is_read({"model": STATE, "module": prefixed("module."), "copy": dict(STATE)}, path)


@pytest.mark.parametrize(
    ("one", "other"), [("model", "state_dict"), ("student", "teacher"), ("net", "model_ema")]
)
def test_two_that_fit_and_differ_are_refused(one: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({one: STATE, other: network(seed=2)}, path)
    message = refusal(path)
    both = f"'{one}' (resnet8 with 10 classes), '{other}' (resnet8 with 10 classes)"
    assert f"holds several networks that fit: {both}; save the one that you mean" in message
    with pytest.raises(UserError, match="holds several networks that fit"):
        read_checkpoint(path)


def test_none_that_fits_is_explained_by_a_known_one(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"stats": {"a": torch.ones(2)}, "student": network("resnet20")}, path)
    assert "holds a resnet20 with 10 classes, not a resnet8" in refusal(path)


# ---- tensors ----


def test_counters_of_batches_may_be_absent(tmp_path: Path) -> None:
    left = {k: v for k, v in STATE.items() if not k.endswith("num_batches_tracked")}
    assert len(left) < len(STATE)
    is_read({"net": prefixed("module.", state=left)}, tmp_path / "net.pth")
    is_read({**left, "bn1.num_batches_tracked": torch.tensor(0)}, tmp_path / "net.pth")
    mobile = network("MobileNetV2")
    bare = {
        name.replace("classifier.0.", "classifier."): tensor
        for name, tensor in mobile.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(bare, tmp_path / "mobile.pth")
    assert recognise(read_checkpoint(tmp_path / "mobile.pth").state) == ("MobileNetV2", 10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16, torch.uint8])
def test_counters_of_batches_are_whole_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    averaged = {k: v.to(dtype) if v.dtype == torch.int64 else v for k, v in STATE.items()}
    is_read(averaged, tmp_path / "net.pth")


def views() -> dict[str, State]:
    bias = STATE["fc.bias"]
    flat = torch.cat([STATE["fc.weight"].flatten(), bias])
    return {
        "negated": changed(fc_bias=torch._neg_view(-bias)),
        "the imaginary part of a conjugate": changed(
            fc_bias=torch.complex(torch.zeros(10), -bias).conj().imag
        ),
        "negated twice": changed(fc_bias=torch._neg_view(torch._neg_view(bias))),
        "strided": changed(fc_bias=torch.stack([bias, torch.zeros(10)], 1)[:, 0]),
        "transposed": changed(fc_weight=STATE["fc.weight"].T.contiguous().T),
        "of one storage": changed(fc_weight=flat[:-10].view(10, -1), fc_bias=flat[-10:]),
        "expanded": changed(
            **{"bn1_running_mean": torch.zeros(1).expand(16)},
            **{"bn1_running_var": torch.ones(1).expand(16)},
        ),
        "parameters": {k: nn.Parameter(v, v.is_floating_point()) for k, v in STATE.items()},
    }


@pytest.mark.parametrize("kind", views())
def test_views_of_whole_tensors_are_read(kind: str, tmp_path: Path) -> None:
    if kind == "expanded":
        assert (STATE["bn1.running_mean"] == 0).all()
        assert (STATE["bn1.running_var"] == 1).all()
    is_read(views()[kind], tmp_path / "net.pth")


WIDE = torch.ones(1).half().expand(2**20, 2**19)
TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a conjugate": (
        lambda: changed(fc_bias=torch.ones(10, dtype=torch.complex64).conj()),
        "'fc.bias' as no plain numbers (torch.complex64",
    ),
    "a terabyte in a word": (lambda: {"a": WIDE}, "holds fewer values for 'a' than its shape"),
    "a terabyte of classes": (
        lambda: changed(
            fc_weight=torch.ones(1).expand(2**34, 64), fc_bias=torch.ones(1).expand(2**34)
        ),
        "holds fewer values for 'fc.weight' than its shape",
    ),
    "many names for one storage": (
        lambda: {f"w{n}": t for n in range(300) for t in [WIDE[:1024, :512]]},
        "MiB so far, far more than the file's own size",
    ),
    "counters that are not finite": (
        lambda: changed(**{"bn1_num_batches_tracked": torch.tensor(math.nan)}),
        "not finite, in 'bn1.num_batches_tracked'",
    ),
    "whole numbers for weights": (
        lambda: changed(fc_bias=torch.ones(10, dtype=torch.int8)),
        "holds whole numbers (torch.int8) in 'fc.bias'",
    ),
    "eight bits": (
        lambda: changed(fc_bias=torch.ones(10).to(torch.float8_e4m3fn)),
        "'fc.bias' as no plain numbers (torch.float8",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_whole_are_refused(kind: str, tmp_path: Path) -> None:
    make, told = TENSORS[kind]
    torch.save(make(), tmp_path / "net.pth")
    assert told in refusal(tmp_path / "net.pth")


# ---- files ----


@pytest.mark.parametrize(
    "name",
    ["model_best.pth.tar", "best.th", "best.tar", "best.ckpt", "best.bin", "BEST.PTH", "best.pt",
     "checkpoint.th", "pytorch_model.bin", "resnet8.safetensors"],
)  # fmt: skip
def test_a_folder_of_one_checkpoint(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for other in ("log.txt", "._model_best.pth", ".best.pth", "args.json"):
        (folder / other).write_bytes(b"x")
    if name == "BEST.PTH":
        name = "best.PTH"
    is_read({"state_dict": STATE}, folder / name)
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == folder / name


def test_a_folder_that_leaves_a_choice(tmp_path: Path) -> None:
    for names, told in (
        (["a.pth", "b.pt"], "no best checkpoint"),
        (["last.pth.tar"], "no best checkpoint"),
        (["best.th", "best.tar"], "more than one best checkpoint: best.tar, best.th"),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(UserError, match=told):
            find_checkpoint(folder)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".safetensors"])
def test_the_content_tells_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    for zipped in (True, False):
        is_read({"net": STATE}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(save(prefixed("module."), metadata={"acc": "61.5"}))
    checkpoint = read_checkpoint(path)
    assert (weights_digest(checkpoint.state), checkpoint.accuracy) == (DIGEST, 61.5)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_protocol_is_not_called_code(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": STATE}, path, pickle_protocol=protocol)
    if protocol == 3:  # which has no instruction that torch lacks
        is_read({"model": STATE}, path, pickle_protocol=protocol)
        return
    assert "save it again without pickle_protocol" in refusal(path)
    torch.save({"model": STATE, "args": Code()}, path, pickle_protocol=protocol)
    assert "asks for code" in refusal(path)
    assert "exec" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".th", ".ckpt", ".safetensors"])
def test_code_is_refused_whatever_the_file_is_called(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    for content in ({"args": LONG, "model": Code()}, {"net": STATE, "log": [Code(), LONG]}):
        torch.save(content, path)
        assert "asks for code, which weights do not need: exec;" in refusal(path)
        path.write_bytes(pickle.dumps(content, 2))
        assert "asks for code" in refusal(path)


def test_a_text_of_a_small_archive_is_a_bomb(tmp_path: Path) -> None:
    packed, path = io.BytesIO(), tmp_path / "net.pth"
    torch.save({"model": STATE, "args": "a" * 10**7}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for part in whole.infolist():
            to.writestr(part.filename, whole.read(part) if "data.pkl" in part.filename else b"")
    path.write_bytes(packed.getvalue())
    assert "far more than its own size" in refusal(path)


# ---- sizes ----


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", bytes(8) + b"{"])
def test_a_file_too_large_for_a_checkpoint_is_not_read(
    start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(start)
    os.truncate(path, MOST_BYTES + (1 << 20))
    for reader in ("_read_torch", "_read_safetensors"):
        monkeypatch.setattr(f"sskd.models.checkpoints.{reader}", lambda _: pytest.fail("read"))
    assert "has 2049 MiB, more than the limit of 2048 MiB for a checkpoint" in refusal(path)


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that Python's own objects take during ``call``."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_tensors_of_a_legacy_file_are_not_scanned(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    is_read({"net": STATE}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 128 << 20)
    assert peak_memory(lambda: read_checkpoint(path)) < 64 << 20


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_of_more_than_tensors_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "net.pth"
    content = {"net": STATE, "log": "a" * (17 << 20)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "is damaged, or holds more than 16 MiB beside its tensors" in refusal(path)
