"""A worker: takes the cells of a grid one after another. ``python -m tevo.bench.worker GRID [--threads N]``.

Any number may run on one grid, on one machine or on several that share the folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tevo.bench.cells import Cell, Grid

__all__ = ["Interrupted", "main", "work"]

# a cell's recipe and folder to its result
Compute = Callable[[Mapping[str, Any], Path], dict[str, Any]]


class Interrupted(Exception):
    """Raised by a computation that a signal has stopped; its cell stays unfinished."""


def work(grid: Grid, compute: Compute) -> int:
    """Compute cells until none is free. Returns how many were finished."""
    finished = 0
    for cell in grid.take():
        finish(cell, compute)
        finished += 1
    return finished


def finish(cell: Cell, compute: Compute) -> None:
    """Compute one cell. What goes wrong in it is its result: it concerns this cell and no other."""
    start = time.perf_counter()
    recipe = cell.recipe()
    try:
        result = compute(recipe, cell.folder)
    except (ValueError, FloatingPointError, RuntimeError, MemoryError, NotImplementedError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        result = {"error": f"{type(error).__name__}: {text}"}
    cell.finish({**result, "seconds": time.perf_counter() - start})


def main(argv: list[str]) -> int:
    """Run a worker. Returns 0 when no cell is left, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tevo.bench.worker")
    parser.add_argument("grid", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--with-parent", action="store_true", help="end when the process that started this one ends")
    options = parser.parse_args(argv)
    if options.with_parent:
        _end_with_parent()
    # torch and accelerate are wanted only now, and threads must be set before any work
    import torch

    from tevo.bench.training import train_cell

    torch.set_num_threads(options.threads)
    try:
        work(Grid(options.grid), train_cell)
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        # as if interrupted: the cell is saved and left
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
