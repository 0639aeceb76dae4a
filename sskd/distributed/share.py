"""The part of each batch that one of several processes trains on."""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """The part of process ``rank`` of ``ranks``: as large as that of every other process.

    The parts of a batch follow each other in the order of the ranks. Images that cannot be divided
    evenly are left out: at most ``ranks - 1``, and only of the last batch of an epoch.
    """

    rank: int = 0
    ranks: int = 1

    def size(self, batch: int) -> int:
        """Return the images in this part of a batch of ``batch`` images."""
        return batch // self.ranks

    def start(self, batch: int) -> int:
        """Return the place in the batch at which this part begins."""
        return self.rank * self.size(batch)


WHOLE = Share()
