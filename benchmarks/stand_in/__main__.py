"""The command: run Python on the stand-in, in place of this process."""

from __future__ import annotations

import sys

import benchmarks.stand_in
from benchmarks.stand_in.process import run_python
from sskd.errors import UserError


def main() -> None:
    """Run Python with the arguments of the command line."""
    if len(sys.argv) < 2:
        sys.exit((benchmarks.stand_in.__doc__ or "").strip())
    try:
        run_python(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
