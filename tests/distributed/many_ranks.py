"""Processes that are connected as torchrun connects them, without the time that torchrun takes."""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starting import Started, forked
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sskd.config import Config, parse_config
from sskd.data import Images
from sskd.distributed import ranks
from sskd.distributed.group import process_group
from sskd.methods import Method, Phase
from sskd.optimizers import build_optimizer
from sskd.seeding import seed_torch
from sskd.teachers.assembly import assemble
from sskd.training.data_parallel import divide, parallel
from sskd.training.meter import Meter
from sskd.training.phase_settings import phase_loader, phase_optimizer, phase_schedule
from sskd.training.step import TrainingStep, set_trainable

Result = dict[str, Tensor]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        number: int = server.getsockname()[1]
        return number


def start(count: int, *words: str, env: Mapping[str, str] | None = None) -> list[Started]:
    """Start a command on ``count`` ranks, of which none restarts or ends another one."""
    port = free_port()
    base = os.environ if env is None else env
    return [
        Started(*words, env={**base, **environment(rank, count, port)}) for rank in range(count)
    ]


def finish(processes: Sequence[Started], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Wait for the ranks' ends as torchrun does: if one fails, the others are ended."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.terminate()
            break
        time.sleep(0.05)
    texts = [process.communicate(timeout=30) for process in processes]
    return [(p.wait(), *text) for p, text in zip(processes, texts, strict=True)]


def on_ranks(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """Return what ``work`` returns on each of ``count`` ranks; it is called in new processes."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    processes = [
        forked(_work, work, environment(rank, count, port), folder / str(rank))
        for rank in range(count)
    ]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, process.exitcode
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(count)]


def _work(work: Callable[[], Any], variables: Mapping[str, str], path: Path) -> None:
    os.environ.update(variables)
    with process_group():
        torch.save(work(), path)
        ranks.largest(0)  # rank 0, which has the store, ends last


@dataclass(frozen=True)
class Steps:
    """A few training steps of every phase of a method, on all ranks of this process's group.

    Attributes:
        values: the plain configuration, which pickle can copy.
        eval_norms: BatchNorms normalise by their running statistics, in training too.
    """

    values: dict[str, Any]
    images: Images
    steps: int
    eval_norms: bool = False

    def __call__(self) -> Result:
        """Return the state of the method and the means of the metrics after the steps."""
        config = parse_config(self.values)
        method = assemble(config, self.images)
        divide(method, config)
        result: Result = {}
        for phase in method.phases():
            result |= self._train(method, phase, config)
        state = {k: v for k, v in method.state_dict().items() if not k.startswith("teacher.")}
        return copy.deepcopy(state) | result

    def _train(self, method: Method, phase: Phase, config: Config) -> Result:
        loader = phase_loader(phase, self.images, config)
        loader.begin_epoch(7)
        seed_torch(3)
        set_trainable(phase, method)
        if self.eval_norms:
            phase.trains.apply(_evaluate_norm)
        lr = phase_schedule(phase, config).lr
        settings = phase_optimizer(phase, config)
        meter = Meter()
        step = TrainingStep(
            phase=parallel(phase),
            method=method,
            optimizer=build_optimizer(settings, phase.trains.parameters(), lr),
            loader=loader,
            meter=meter,
            precision=config.precision,
        )
        for number in range(self.steps):
            if loader.position == loader.steps:
                loader.begin_epoch(number)
            step.take()
        return {f"{phase.name}/{k}": torch.tensor(v) for k, v in meter.read().items()}


def _evaluate_norm(module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        module.eval()
