"""What ranks exchange, and the refusal of what they cannot share."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Compose
from many_ranks import environment, finish, free_port, on_ranks, start
from starting import run
from torch import nn

from sskd.checks.samples import random_images
from sskd.device import choose_device
from sskd.distributed import ranks
from sskd.distributed.batch_norm import SyncBatchNorm
from sskd.errors import UserError
from sskd.models import build_model
from sskd.training.data_parallel import check_division, synchronise_batch_norms
from sskd.training.evaluation import predict

TEST_IMAGES = (1, 2, 5)
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
WEIGHTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()


def predictions(count: int) -> torch.Tensor:
    images = random_images(5, count, size=16)
    torch.manual_seed(0)
    return predict(build_model("resnet8", 5), images.test, images)


def fail_on_first() -> int:
    raise UserError("no such file")


def exchanged() -> dict[str, Any]:
    """Return what one of three ranks gets by each function."""
    rank = ranks.rank()
    try:
        ranks.from_first(fail_on_first)
    except UserError as error:
        failure = f"{type(error).__name__}: {error}"
    tensors = [torch.tensor([1.0 + rank]), torch.full((2, 2), 10.0 * rank)]
    ranks.average_(tensors)
    return {
        "failure": failure,
        "first": ranks.from_first(lambda: {"rank": rank, "list": [1, None]}),
        "after first": ranks.after_first(lambda: rank),
        "largest": list(ranks.largest(rank, -rank)),
        "average": tensors,
        "part of 7": ranks.part_of(7),
        "uneven": ranks.gather_uneven(ranks.part_of(7)),
        "predictions": [predictions(count) for count in TEST_IMAGES],
    }


def test_three_ranks_exchange_values(tmp_path: Path) -> None:
    found = on_ranks(3, exchanged, tmp_path)
    assert [each["failure"] for each in found] == [
        "UserError: no such file",
        *["FirstRankError: no such file"] * 2,
    ]
    assert [each["first"] for each in found] == [{"rank": 0, "list": [1, None]}] * 3
    assert [each["after first"] for each in found] == [0, 1, 2]
    assert [each["largest"] for each in found] == [[2, 0]] * 3
    for each in found:
        assert each["average"][0].tolist() == [2.0]
        assert each["average"][1].tolist() == [[10.0, 10.0], [10.0, 10.0]]
        assert each["uneven"].tolist() == list(range(7))
    assert [each["part of 7"].tolist() for each in found] == [[0, 1, 2], [3, 4], [5, 6]]
    for place, count in enumerate(TEST_IMAGES):  # each image once, in order
        expected = predictions(count)
        for each in found:
            torch.testing.assert_close(each["predictions"][place], expected, rtol=1e-4, atol=1e-5)


def normalised(layer: nn.Module, rows: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Return a layer's output for ``rows``, its gradients and its running statistics."""
    rows = rows.clone().requires_grad_()
    output = layer(rows)
    (output * weights).sum().backward()
    return [output.detach(), rows.grad, layer.running_mean, layer.running_var]


def norm_of_half() -> list[torch.Tensor]:
    layer = SyncBatchNorm(4)
    return normalised(layer, ROWS[ranks.rank()].float(), WEIGHTS.float().chunk(2)[ranks.rank()])


def test_a_synchronised_batch_norm_is_pytorchs_of_the_whole_batch(tmp_path: Path) -> None:
    expected = normalised(nn.BatchNorm1d(4), ROWS.flatten(0, 1).float(), WEIGHTS.float())
    found = on_ranks(2, norm_of_half, tmp_path)
    for name, place in (("output", 0), ("gradient", 1)):
        whole = torch.cat([each[place] for each in found])
        torch.testing.assert_close(whole, expected[place], msg=name)
    for place in (2, 3):
        for each in found:
            torch.testing.assert_close(each[place], expected[place])


def test_a_gathered_loss_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    rows = ROWS.flatten(0, 1).clone().requires_grad_()
    gathered_loss(rows).backward()
    found = on_ranks(2, gathered_gradient, tmp_path)
    assert rows.grad is not None
    # DistributedDataParallel divides the sum over the ranks by their number.
    torch.testing.assert_close(torch.cat(found) / 2, rows.grad)


def gathered_loss(rows: torch.Tensor) -> torch.Tensor:
    return (rows @ rows.T).square().sum()


def gathered_gradient() -> torch.Tensor:
    rows = ROWS[ranks.rank()].clone().requires_grad_()
    # Twice, so that two functions have the same gradient as input.
    twice = ranks.gather_with_gradient(rows) + ranks.gather_with_gradient(rows)
    gathered_loss(twice / 2).backward()
    assert rows.grad is not None
    return rows.grad


def test_eight_ranks_wait_for_a_slow_first_one(tmp_path: Path) -> None:
    # A broadcast to eight reaches the last one over others, so that the first one is long done.
    assert on_ranks(8, values_of_slow_first, tmp_path) == [list(range(10))] * 8


def values_of_slow_first() -> list[int]:
    found = []
    for number in range(10):
        time.sleep(0.01 * (ranks.rank() * number % 7))
        found.append(ranks.from_first(partial(slowly, number)))
    return found


def slowly(number: int) -> int:
    time.sleep(0.05)
    return number


def test_an_error_of_one_rank_alone_ends_it(tmp_path: Path) -> None:
    code = (
        "from sskd.distributed import group\n"
        "from sskd.errors import UserError\n"
        "group._FAILURE_WINDOW = 0.5\n"
        "with group.process_group():\n"
        "    if group.ranks.rank():\n"
        "        raise UserError('no file on this machine')\n"
        "    group.ranks.largest(1)\n"
    )
    processes = start(2, "-c", code)
    processes[1].wait(60)
    processes[0].wait(60)
    first, second = finish(processes)
    assert first[0] == 1
    assert "Traceback" not in first[2]
    (line,) = [line for line in first[2].splitlines() if line.startswith("error")]
    assert line.startswith("error: rank 0: lost the connection to another rank, which has ended (")
    assert second[0] == 1
    lines = [line for line in second[2].splitlines() if line.startswith("error")]
    assert lines == ["error: rank 1: no file on this machine"]


def test_a_restart_does_not_see_the_keys_of_its_predecessor(tmp_path: Path) -> None:
    code = (
        "import os, torch.distributed as dist\n"
        "from sskd.distributed import group\n"
        "store = dist.TCPStore('127.0.0.1', int(os.environ['MASTER_PORT']), is_master=True)\n"
        "os.environ |= {'TORCHELASTIC_USE_AGENT_STORE': 'True'}\n"
        "for attempt in ('0', '1'):\n"
        "    os.environ['TORCHELASTIC_RESTART_COUNT'] = attempt\n"
        "    assert not group._store().check(['job/0'])\n"
        "    group._store().set('job/0', 'null')\n"
        "    group._store.cache_clear()\n"
    )
    variables = environment(0, 2, free_port())
    done = run("-c", code, env=os.environ | variables)
    assert done.returncode == 0, done.stderr


def test_help_ends_all_ranks() -> None:
    for status, out, err in finish(start(2, "train_student.py", "--help")):
        assert status == 0, err
        assert "Distil a student from a teacher" in out or not out


def test_a_world_size_that_torchrun_did_not_set_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, out, err = command("dataset=digits")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "error: WORLD_SIZE=4 is set, but not RANK, which torchrun sets too; start with torchrun "
        "--nproc_per_node=4, or unset WORLD_SIZE"
    ]
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE='many' is not a valid number" in command("dataset=digits")[2]
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE='0' is not a valid number" in command("dataset=digits")[2]


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(1, 4, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"started 4 processes.* 2 GPUs; use --nproc_per_node=2"):
        choose_device("auto")
    with pytest.raises(
        UserError, match="device=cuda:1: torchrun's processes cannot share one device"
    ):
        choose_device("cuda:1")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("batch", "advice"), [(64, "batch_size=63 or 66"), (2, "batch_size=3$"), (66, "")]
)
def test_a_batch_that_ranks_do_not_divide_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, batch: int, advice: str
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    config = composed("method=vanilla", f"batch_size={batch}")
    if not advice:
        check_division(config)
        return
    with pytest.raises(UserError, match=f"3 processes cannot divide it evenly; use {advice}"):
        check_division(config)


def test_a_program_that_does_not_connect_the_processes_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="started 2 processes, which this program does not connect"):
        check_division(composed("method=vanilla"))


def test_a_batch_norm_without_weights_cannot_be_synchronised() -> None:
    with pytest.raises(UserError, match=r"sync_batch_norm=true: BatchNorm2d\(3.* needs weights"):
        synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(3, affine=False)))


def test_precomputed_outputs_need_one_process(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UserError, match="precompute=true: needs a single process"):
        check_division(composed("method=kd", "teacher.precompute=true"))


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        done = run("train_student.py", "dataset=digits", env=os.environ | environment(0, 2, port))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: the processes cannot connect to 127.0.0.1:{port} (")
    assert line.endswith("use another port with torchrun --master_port=PORT")
