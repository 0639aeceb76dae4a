"""A Hydra sweeper for jobs that are runs of the suite: it skips what has finished.

Hydra loads plugins from the package ``hydra_plugins`` alone; ``sskd.commands.sweep`` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from math import prod

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

# Hydra's own launcher keeps the configuration of each job until its batch has ended.
_IN_ONE_PROCESS = 20
# A larger grid takes hours to compose, may exhaust the memory, and is almost always a typo.
_MOST_JOBS = 100_000


class ResumableSweeper(BasicSweeper):
    """Launches the jobs that have not finished, and reports at the end which still have not."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the grid of ``hydra.sweeper.params`` and ``arguments`` to its end.

        Raises:
            UserError: a job cannot be composed (before any is launched), or has not finished
                (after all have been).
        """
        # Importing torch takes seconds, which Hydra's search for plugins should not.
        from sskd.commands.sweep import Sweep
        from sskd.distributed.environment import world_size
        from sskd.errors import UserError
        from sskd.invocation.extensions import load_extensions

        assert self.hydra_context is not None
        assert self.launcher is not None
        assert self.config is not None
        if world_size() > 1 and not isinstance(self.launcher, BasicLauncher):
            raise UserError(
                f"hydra/launcher: {type(self.launcher).__name__} starts jobs in other processes or "
                "threads, and torchrun's processes train them one after the other; use "
                "hydra/launcher=basic"
            )
        size = self._batch_size()
        HydraConfig.instance().set_config(self.config.copy())  # for what is composed below
        load_extensions()
        loader = self.hydra_context.config_loader
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        refuse_endless(overrides)
        grid = self.split_arguments(overrides, max_batch_size=None)[0]
        sweep = Sweep(grid, compose=partial(loader.load_sweep_config, self.config))
        sweep.launch(sweep.queue(), size, self.launcher.launch)
        sweep.report_unfinished()

    def _batch_size(self) -> int | None:
        """Return how many jobs are launched at once; None: all.

        Raises:
            UserError: an option of the sweeper is wrong.
        """
        from sskd.errors import UserError

        size = self.max_batch_size
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise UserError(f"hydra.sweeper.max_batch_size={size}: should be at least 1, or null")
        if not isinstance(self.params, Mapping | None):
            raise UserError(
                f"hydra.sweeper.params: should be a mapping of settings to their values, such as "
                f"'seed: 0,1,2' (got {self.params!r})"
            )
        if size is None and isinstance(self.launcher, BasicLauncher):
            return _IN_ONE_PROCESS
        return size


def refuse_endless(overrides: Sequence[Override]) -> None:
    """Raise UserError for values that cannot be counted, or that make too many jobs."""
    from sskd.errors import UserError

    counts: dict[str, int] = {}
    for override in overrides:
        if not override.is_sweep_override():
            continue
        key = override.get_key_element()
        try:
            value = override.value()
            # Hydra's own iterator shuffles a range as a list, however long.
            is_range = isinstance(value, RangeSweep)
            values = value.range() if is_range else override.sweep_string_iterator()
            count = sum(1 for _ in islice(values, _MOST_JOBS + 1))
        except (HydraException, ValueError, ArithmeticError):  # interval(1,4), a step of 0, nan
            raise UserError(
                f"{override.input_line}: a grid needs a finite list of values, such as "
                f"{key}=1,2,3 or '{key}=range(1,4)'"
            ) from None
        if not count:
            raise UserError(f"{override.input_line}: has no values, so the grid has no jobs")
        counts[key] = count
    if prod(counts.values()) > _MOST_JOBS:
        factors = " x ".join(f"{count} of {key}" for key, count in counts.items())
        raise UserError(
            f"the grid has more than {_MOST_JOBS} jobs ({factors}); launch a part of it"
        )
