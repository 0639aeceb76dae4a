"""Checkpoints of unknown origin: read if the tensors are regular and one network fits."""

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
from sskd.models.safe_load import MAX_BYTES

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


def is_read(content: object, path: Path, **options: Any) -> None:
    """Save ``content``, and check that it is read as STATE and loads into a network."""
    torch.save(content, path, **options)
    assert weights_digest(read_checkpoint(path).state) == DIGEST
    model = build_model("resnet8", 10)
    load_weights(model, path)
    assert weights_digest(model) == DIGEST


def refusal(path: Path, arch: str = "resnet8") -> str:
    """Return the message of the error that loading ``path`` must raise: one line, quickly."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_weights(build_model(arch, 10), path)
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert len(message) < 1000
    return message


# ---- strings ----

LONG = "a" * 300_000
STRINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "arguments": lambda: {"model": STATE, "args": LONG},
    "a log": lambda: {"net": STATE, "log": [LONG, "b c\n" * 50_000]},
    "the same string twice": lambda: {"state_dict": STATE, "args": LONG, "opt": {"again": LONG}},
    "a key": lambda: {"model": STATE, LONG: 3},
    "an ordered dict": lambda: {"model": OrderedDict(STATE), "args": {"a": LONG}},
    "not ASCII": lambda: {"model": STATE, "args": "é" * 200_000},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", STRINGS)
def test_a_long_string_is_read(kind: str, zipped: bool, tmp_path: Path) -> None:
    is_read(STRINGS[kind](), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)


def pickled_string(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


CALLS = {
    "a string": pickled_string(LONG) + b")R.",
    "a memoized string": pickled_string(LONG) + b"q\x00)\x81h\x00)R.",
    "a string in a list": b"](" + pickled_string(LONG) + b"e)R.",
    "a string in a tuple": pickled_string(LONG) + b"\x85)R.",
    "a string in a dict": b"}(" + pickled_string("a") + pickled_string(LONG) + b"u)R.",
    "a string as a class": pickled_string(LONG) + b")\x81.",
    "the result of a call": b"ccollections\nOrderedDict\n)R" + pickled_string(LONG) + b"0)R.",
    "a long name": b"c" + b"a" * 300_000 + b"\nb\n.",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_of_a_long_string_is_refused(kind: str, tmp_path: Path) -> None:
    """Torch would quote it in an error, and search the error for minutes."""
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
    "named": ({"top1": torch.tensor(61.5), "top5": 88.0}, 61.5),
    "under other names": ({"train": 99.0, "test": 61.5}, None),
    "not a number": (math.nan, None),
    "infinite": (torch.tensor(math.inf), None),
    "a number as a string": ("61.5", 61.5),
    "a string": ("high", None),
    "a percentage as a string": ("61.5 %", None),
    "too high": (161.5, None),
    "negative": (-1, None),
    "a fraction": (0.93, None),
    "a fraction of 1": (torch.tensor(1.0), None),
    "zero": (0, 0.0),
    "a NumPy scalar": (np.float64(61.5), 61.5),
    "a complex number": (torch.tensor(1j), None),
    "many digits": ("1" * 5000, None),
    "a tensor without values": (torch.empty(1, device="meta"), None),
}


@pytest.mark.parametrize("kind", ACCURACIES)
def test_an_odd_accuracy_does_not_prevent_loading(kind: str, tmp_path: Path) -> None:
    stated, expected = ACCURACIES[kind]
    for key in ("acc", "accuracy", "best_acc1"):
        is_read({"state_dict": STATE, key: stated}, tmp_path / "net.pth")
        assert read_checkpoint(tmp_path / "net.pth").accuracy == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(torch.inf, None), ("1" * 5000, None), (-3, None), ([7], 7), ("late", None), (10**400, None)],
)
def test_an_odd_epoch_is_ignored(stated: Any, expected: int | None, tmp_path: Path) -> None:
    if stated == 10**400:  # JSON can hold this number, torch.save cannot
        path = tmp_path / "net.safetensors"
        path.write_bytes(save(STATE, metadata={"epoch": str(stated)}))
    else:
        path = tmp_path / "net.pth"
        torch.save({"model": STATE, "epoch": stated}, path)
    assert read_checkpoint(path).epoch == expected


# ---- names ----

NAMES: dict[str, Callable[[], State]] = {
    "compiled": lambda: prefixed("_orig_mod."),
    "parallel, twice": lambda: prefixed("module.", "module."),
    "Lightning": lambda: prefixed("model."),
    "a backbone": lambda: prefixed("backbone."),
    "a compiled parallel network": lambda: prefixed("_orig_mod.", "module."),
    "a parallel compiled network": lambda: prefixed("module.", "_orig_mod."),
    "a parallel backbone with a head": lambda: {
        **prefixed("module.", "backbone."),
        **prefixed("module.", state=HEAD),
    },
    "a compiled backbone with a head": lambda: {
        **prefixed("_orig_mod.", "backbone."),
        **prefixed("_orig_mod.", state=HEAD),
    },
    "an average": lambda: {"n_averaged": torch.tensor(3), **prefixed("module.")},
    "an average with a prefix": lambda: {
        "ema.n_averaged": torch.tensor(3),
        **prefixed("ema.", "module."),
    },
    "a student": lambda: prefixed("student."),
    "two unusual names": lambda: prefixed("base_model.", "model."),
    "a number": lambda: prefixed("0."),
    "FSDP": lambda: prefixed("_fsdp_wrapped_module."),
    "a student's parallel backbone with a head": lambda: {
        **prefixed("student.", "module.", "backbone."),
        **prefixed("student.", "module.", state=HEAD),
    },
    "five wrappers": lambda: prefixed("model.", "_orig_mod.", "module.", "net.", "network."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_prefixes_of_wrappers_are_removed(kind: str, tmp_path: Path) -> None:
    is_read(NAMES[kind](), tmp_path / "plain.pth")
    is_read({"state_dict": NAMES[kind](), "epoch": 3}, tmp_path / "net.pth")


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    mixed = {("module." if name.startswith("fc") else "") + name: STATE[name] for name in STATE}
    for content, problem in (
        (mixed, "missing: 2 (first 'fc.weight'); not expected: 2 (first 'module.fc.weight')"),
        ({**STATE, "extra": torch.ones(1)}, "not expected: 1 (first 'extra')"),
        (prefixed("modul"), f"missing: {len(STATE)} (first 'conv1.weight')"),
    ):
        torch.save(content, path)
        assert f"does not fit: {problem}" in refusal(path)


def test_real_wrappers_are_read(tmp_path: Path) -> None:
    model = build_model("resnet8", 10)
    model.load_state_dict(STATE)
    compiled: Any = torch.compile(model)
    wrapped: nn.Module = nn.DataParallel(compiled)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    is_read(wrapped.state_dict(), tmp_path / "wrapped.pth")
    is_read({"ema": averaged.state_dict()}, tmp_path / "averaged.pth")


PROFILER_BUFFERS = {
    f"{layer}{count}": torch.zeros(1)
    for layer in ("", "conv1.", "layer1.0.bn1.")
    for count in ("total_ops", "total_params")
}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_buffers_of_a_profiler_are_ignored(prefix: str, tmp_path: Path) -> None:
    counted = prefixed(prefix, state=STATE | PROFILER_BUFFERS)
    is_read({"state_dict": counted, "epoch": 3}, tmp_path / "net.pth")


OTHER = network("resnet8", seed=2)
MIXED: dict[str, Callable[[], State]] = {
    "its average": lambda: {**STATE, **prefixed("ema.", state=OTHER)},
    "its average, with a counter": lambda: {
        "n_averaged": torch.tensor(3),
        **STATE,
        **prefixed("module.", state=OTHER),
    },
    "its average, in a wrapper": lambda: prefixed(
        "module.", state={**STATE, **prefixed("ema.", state=OTHER)}
    ),
    "its teacher": lambda: {**prefixed("model."), **prefixed("teacher.", state=OTHER)},
    "its larger teacher": lambda: {
        **STATE,
        **prefixed("teacher.", state=network("resnet14", seed=2)),
    },
    "its teacher, with another layer": lambda: {
        **prefixed("student.", state={**STATE, "regressor.weight": torch.ones(4, 4)}),
        **prefixed("teacher.", state=OTHER),
    },
    "a criterion's weight": lambda: {**prefixed("model."), "criterion.weight": torch.ones(10)},
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("arch", ["resnet8", "resnet14"])
def test_a_part_of_a_state_dict_is_not_a_network(kind: str, arch: str, tmp_path: Path) -> None:
    """It is not known which of them is meant."""
    path = tmp_path / "net.pth"
    torch.save({"state_dict": MIXED[kind](), "epoch": 3}, path)
    assert "does not fit: " in refusal(path, arch)
    assert recognise(read_checkpoint(path).state) is None


def test_two_state_dicts_can_have_one_joined_name(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for content in ({"a.b": STATE, "a": {"b": OTHER}}, {1: STATE, "1": OTHER}):
        torch.save(content, path)
        assert "holds several networks that fit" in refusal(path)


KEYS = ["net", "student", "model_state_dict", "state_dict_ema", "teacher", "weights", "net.inner"]


@pytest.mark.parametrize("key", KEYS)
def test_a_state_dict_can_be_under_any_key(key: str, tmp_path: Path) -> None:
    content: Any = STATE
    for part in reversed(key.split(".")):
        content = {part: content, "epoch": 3, "note": "hello"}
    optimizer = torch.optim.SGD(build_model("resnet8", 10).parameters(), 0.1, momentum=0.9)
    generator = {"cpu": torch.get_rng_state()}
    content |= {"optimizer": optimizer.state_dict(), "generators": generator}
    content |= {"criterion": {"weight": torch.ones(10)}, "loss": {"ce": torch.tensor(1.0)}}
    is_read(content, tmp_path / "net.pth")


def test_the_network_that_fits_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "net.pth", network("resnet14")
    torch.save({"model": other, "student": prefixed("module.")}, path)
    for name, state in (("resnet8", STATE), ("resnet14", other)):
        model = build_model(name, 10)
        load_weights(model, path)
        assert weights_digest(model) == weights_digest(state)
    with pytest.raises(UserError, match=r"'model' \(resnet14 with .*, 'student' \(resnet8 with"):
        read_checkpoint(path)
    other_classes = network(classes=7)
    torch.save({"a": other_classes, "b": STATE}, path)
    load_weights(build_model("resnet8", 10), path)
    is_read({"model": STATE, "module": prefixed("module."), "copy": dict(STATE)}, path)


@pytest.mark.parametrize(
    ("one", "other"), [("model", "state_dict"), ("student", "teacher"), ("net", "model_ema")]
)
def test_two_different_networks_that_fit_are_refused(one: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({one: STATE, other: network(seed=2)}, path)
    message = refusal(path)
    both = f"'{one}' (resnet8 with 10 classes), '{other}' (resnet8 with 10 classes)"
    assert f"holds several networks that fit: {both}; save the one that you need" in message
    with pytest.raises(UserError, match="holds several networks that fit"):
        read_checkpoint(path)


def test_a_known_network_is_named_if_none_fits(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"stats": {"a": torch.ones(2)}, "student": network("resnet20")}, path)
    assert "holds a resnet20 with 10 classes, not a resnet8" in refusal(path)


# ---- tensors ----


def test_batch_counters_may_be_absent(tmp_path: Path) -> None:
    left = {k: v for k, v in STATE.items() if not k.endswith("num_batches_tracked")}
    assert len(left) < len(STATE)
    is_read({"net": prefixed("module.", state=left)}, tmp_path / "net.pth")
    is_read({**left, "bn1.num_batches_tracked": torch.tensor(0)}, tmp_path / "net.pth")
    mobile = network("MobileNetV2")
    plain = {
        name.replace("classifier.0.", "classifier."): tensor
        for name, tensor in mobile.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(plain, tmp_path / "mobile.pth")
    assert recognise(read_checkpoint(tmp_path / "mobile.pth").state) == ("MobileNetV2", 10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16, torch.uint8])
def test_batch_counters_become_integers(dtype: torch.dtype, tmp_path: Path) -> None:
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
        "in one storage": changed(fc_weight=flat[:-10].view(10, -1), fc_bias=flat[-10:]),
        "expanded": changed(
            **{"bn1_running_mean": torch.zeros(1).expand(16)},
            **{"bn1_running_var": torch.ones(1).expand(16)},
        ),
        "parameters": {k: nn.Parameter(v, v.is_floating_point()) for k, v in STATE.items()},
    }


@pytest.mark.parametrize("kind", views())
def test_views_of_tensors_are_read(kind: str, tmp_path: Path) -> None:
    if kind == "expanded":
        assert (STATE["bn1.running_mean"] == 0).all()
        assert (STATE["bn1.running_var"] == 1).all()
    is_read(views()[kind], tmp_path / "net.pth")


EXPANDED = torch.ones(1).half().expand(2**20, 2**19)
TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a conjugate": (
        lambda: changed(fc_bias=torch.ones(10, dtype=torch.complex64).conj()),
        "'fc.bias' in an unsupported format (torch.complex64",
    ),
    "a terabyte of one value": (
        lambda: {"a": EXPANDED},
        "holds fewer values for 'a' than its shape",
    ),
    "a terabyte of classes": (
        lambda: changed(
            fc_weight=torch.ones(1).expand(2**34, 64), fc_bias=torch.ones(1).expand(2**34)
        ),
        "holds fewer values for 'fc.weight' than its shape",
    ),
    "many names for one storage": (
        lambda: {f"w{n}": t for n in range(300) for t in [EXPANDED[:1024, :512]]},
        "MiB so far, far more than the file's own size",
    ),
    "counters that are not finite": (
        lambda: changed(**{"bn1_num_batches_tracked": torch.tensor(math.nan)}),
        "not finite, in 'bn1.num_batches_tracked'",
    ),
    "integers for weights": (
        lambda: changed(fc_bias=torch.ones(10, dtype=torch.int8)),
        "holds integers (torch.int8) instead of weights in 'fc.bias'",
    ),
    "eight bits": (
        lambda: changed(fc_bias=torch.ones(10).to(torch.float8_e4m3fn)),
        "'fc.bias' in an unsupported format (torch.float8",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_irregular_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = TENSORS[kind]
    torch.save(make(), tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth")


# ---- files ----


@pytest.mark.parametrize(
    "name",
    ["model_best.pth.tar", "best.th", "best.tar", "best.ckpt", "best.bin", "BEST.PTH", "best.pt",
     "checkpoint.th", "pytorch_model.bin", "resnet8.safetensors"],
)  # fmt: skip
def test_the_only_checkpoint_of_a_folder_is_found(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for other in ("log.txt", "._model_best.pth", ".best.pth", "args.json"):
        (folder / other).write_bytes(b"x")
    if name == "BEST.PTH":
        name = "best.PTH"
    is_read({"state_dict": STATE}, folder / name)
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == folder / name


def test_an_ambiguous_folder_is_refused(tmp_path: Path) -> None:
    for names, message in (
        (["a.pth", "b.pt"], "no best checkpoint"),
        (["last.pth.tar"], "no best checkpoint"),
        (["best.th", "best.tar"], "more than one best checkpoint: best.tar, best.th"),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(UserError, match=message):
            find_checkpoint(folder)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".safetensors"])
def test_the_content_decides_the_format(suffix: str, tmp_path: Path) -> None:
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
def test_another_pickle_protocol_is_not_called_code(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": STATE}, path, pickle_protocol=protocol)
    if protocol == 3:  # it has only instructions that torch knows
        is_read({"model": STATE}, path, pickle_protocol=protocol)
        return
    assert "save it again without the argument pickle_protocol" in refusal(path)
    torch.save({"model": STATE, "args": Code()}, path, pickle_protocol=protocol)
    assert "asks to run code" in refusal(path)
    assert "exec" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".th", ".ckpt", ".safetensors"])
def test_code_is_refused_under_any_file_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    for content in ({"args": LONG, "model": Code()}, {"net": STATE, "log": [Code(), LONG]}):
        torch.save(content, path)
        assert "asks to run code, which weights do not need: exec;" in refusal(path)
        path.write_bytes(pickle.dumps(content, 2))
        assert "asks to run code" in refusal(path)


def test_a_compressed_string_is_refused_as_a_bomb(tmp_path: Path) -> None:
    packed, path = io.BytesIO(), tmp_path / "net.pth"
    torch.save({"model": STATE, "args": "a" * 10**7}, path)
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.infolist():
            target.writestr(
                part.filename, source.read(part) if "data.pkl" in part.filename else b""
            )
    path.write_bytes(packed.getvalue())
    assert "far more than its own size" in refusal(path)


# ---- sizes ----


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", bytes(8) + b"{"])
def test_a_file_over_the_size_limit_is_not_read(
    start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(start)
    os.truncate(path, MAX_BYTES + (1 << 20))
    for reader in ("_load_torch", "_load_safetensors"):
        monkeypatch.setattr(f"sskd.models.safe_load.{reader}", lambda _: pytest.fail("read"))
    assert "has 2049 MiB, more than the limit of 2048 MiB for a checkpoint" in refusal(path)


def peak_memory(call: Callable[[], Any]) -> int:
    """Return the peak memory of Python's objects during ``call``, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_tensors_of_a_legacy_file_are_not_scanned(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    is_read({"net": STATE}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 128 << 20)
    assert peak_memory(lambda: read_checkpoint(path)) < 64 << 20


@pytest.mark.parametrize("zipped", [False, True])
def test_a_long_log_in_a_checkpoint_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "net.pth"
    content = {"net": STATE, "log": "a" * (17 << 20)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "is corrupt, or holds more than 16 MiB in addition to its tensors" in refusal(path)
