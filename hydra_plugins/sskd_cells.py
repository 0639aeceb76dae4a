"""Hydra's basic sweeper for cells that are runs of the suite.

Hydra takes plugins from the package ``hydra_plugins`` only; ``sskd.commands.sweep`` says
what a cell is.
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

# Hydra's own launcher keeps each cell's configuration until its batch has ended.
_IN_ONE_PROCESS = 20
# To compose so many takes hours; more are a slip, and may not fit into the memory.
_MOST_CELLS = 100_000


class CellSweeper(BasicSweeper):
    """Launches the cells that have not finished, and tells at the end which still have not."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the grid of ``hydra.sweeper.params`` and ``arguments`` to its end.

        Raises:
            UserError: a cell cannot be composed (before any is launched), or has not finished
                (after all have been).
        """
        # Importing torch takes seconds, which Hydra's search for plugins should not.
        from sskd.commands.sweep import Sweep
        from sskd.errors import UserError
        from sskd.extensions import load_extensions

        size = self.max_batch_size
        if size is not None and size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size={size}: should be at least 1, or null")
        if size is None and isinstance(self.launcher, BasicLauncher):
            size = _IN_ONE_PROCESS
        if not isinstance(self.params, Mapping | None):
            raise UserError(
                f"hydra.sweeper.params: should be a mapping of settings to their values, such as "
                f"'seed: 0,1,2' (got {self.params!r})"
            )
        assert self.hydra_context is not None
        assert self.launcher is not None
        assert self.config is not None
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


def refuse_endless(overrides: Sequence[Override]) -> None:
    """Raise UserError for values that cannot be counted, or that make too many cells."""
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
            count = sum(1 for _ in islice(values, _MOST_CELLS + 1))
        except (HydraException, ValueError, ArithmeticError):  # interval(1,4), a step of 0, nan
            raise UserError(
                f"{override.input_line}: a grid needs values that can be counted, such as "
                f"{key}=1,2,3 or '{key}=range(1,4)'"
            ) from None
        if not count:
            raise UserError(f"{override.input_line}: has no values, so the grid has no cells")
        counts[key] = count
    if prod(counts.values()) > _MOST_CELLS:
        told = " x ".join(f"{count} of {key}" for key, count in counts.items())
        raise UserError(f"the grid has more than {_MOST_CELLS} cells ({told}); launch a part of it")
