"""Jobs of a sweep in threads of one process, which share a GPU and what is stored there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig

from sskd.output import prefixed_lines, steady_output
from sskd.seeding import OwnGenerators
from sskd.training.signals import StopSignals, forward_scheduler_signal
from sskd.turns import Turns, raise_if_stopped

T = TypeVar("T")
_POLL = 0.5  # seconds; a signal that another thread receives does not end this one's waiting
_PATIENCE = 10.0  # seconds that jobs have to end after the second Ctrl-C


class JobGlobals:
    """What is global in a process and belongs to one job: random generators, Hydra's settings."""

    def __init__(self) -> None:
        self._generators = OwnGenerators()
        self._hydra = HydraConfig.instance().cfg

    def save(self) -> None:
        """Keep the present values, at the end of a turn."""
        self._generators.save()
        self._hydra = HydraConfig.instance().cfg

    def restore(self) -> None:
        """Set the values that were kept, at the start of a turn."""
        self._generators.restore()
        HydraConfig.instance().cfg = self._hydra


def run_in_threads(jobs: Mapping[int, Callable[[], T]], at_once: int) -> list[T]:
    """Call the ``jobs``, by their numbers, each in a thread; return what they return.

    Args:
        at_once: how many threads there are.

    Raises:
        Interrupted: a signal came. Each job that had started has finished its step and is saved.
        KeyboardInterrupt: a second SIGINT came; the jobs may not be saved.
    """
    outside = JobGlobals()
    with steady_output(), forward_scheduler_signal(), StopSignals() as signals:
        turns = Turns(received=lambda: signals.noted)
        pool = ThreadPoolExecutor(at_once)
        own = [JobGlobals() for _ in jobs]  # before any job changes what is global
        started = [
            pool.submit(_run, turns, values, job)
            for values, job in zip(own, jobs.items(), strict=True)
        ]
        try:
            while wait(started, timeout=_POLL).not_done:
                pass
        except KeyboardInterrupt:
            turns.abandon()
            pool.shutdown(wait=False, cancel_futures=True)
            wait([each for each in started if not each.cancelled()], timeout=_PATIENCE)
            raise
        finally:
            pool.shutdown(wait=False)
            outside.restore()
        if "wandb" in sys.modules:  # a job has logged
            from sskd.tracking.session import end_service

            end_service()
        signals.raise_if_received()
    return [each.result() for each in started]


def _run(turns: Turns, own: JobGlobals, job: tuple[int, Callable[[], T]]) -> T:
    number, work = job
    with turns.job(own), prefixed_lines(f"#{number} "):
        raise_if_stopped()
        return work()
