"""Hydra's basic sweeper for cells that are runs of the suite.

Hydra takes plugins from the package ``hydra_plugins`` only; what a cell is, ``sskd.sweep`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

# Hydra's own launcher keeps each cell's configuration until its batch has ended.
_IN_ONE_PROCESS = 20


class CellSweeper(BasicSweeper):
    """Launches the cells that have not finished, and tells at the end which still have not."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the grid of ``hydra.sweeper.params`` and ``arguments`` to its end.

        Raises:
            UserError: a cell cannot be composed (before any is launched), or has not finished
                (after all have been).
        """
        # Importing torch takes seconds, which Hydra's search for plugins should not.
        from sskd.errors import UserError
        from sskd.sweep import Sweep

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
        loader = self.hydra_context.config_loader
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        grid = self.split_arguments(overrides, max_batch_size=None)[0]
        sweep = Sweep(grid, compose=partial(loader.load_sweep_config, self.config))
        sweep.launch(sweep.begin(), size, self.launcher.launch)
        sweep.end()
