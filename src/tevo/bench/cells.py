"""A grid of cells: a folder of small jobs that any number of workers share.

    GRID/cells/<name>/cell.json      what is to be computed; the name is a hash of it
                      claim          locked by the worker that has the cell; says who that is
                      result.json    what came out, written whole or not at all

A claim is a lock of the kernel's, which falls with the process that holds it, however that ends: a dead worker's cell
is free at once, and no live one can lose its own. So killing a worker costs its cell alone, running the same grid
again computes what is missing, and two grids merge by copying their cells.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tevo.training.checkpoint import write_file

__all__ = ["Cell", "Grid", "name_of"]


def name_of(recipe: Mapping[str, Any]) -> str:
    """The name of the cell that computes ``recipe``: 16 hexadecimal digits of the SHA-256 of its sorted JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


class Cell:
    """One job of a grid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The hash of its recipe."""
        return self.folder.name

    def recipe(self) -> dict[str, Any]:
        """What is to be computed.

        Raises:
            ValueError: the stored recipe is not the one that the cell is named after.
        """
        path = self.folder / "cell.json"
        try:
            recipe: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; delete that folder and run the same command again") from error
        if name_of(recipe) != self.name:
            raise ValueError(
                f"{path} was changed after it was named; delete that folder and run the same command again"
            )
        return recipe

    def result(self) -> dict[str, Any] | None:
        """What came out, or None."""
        path = self.folder / "result.json"
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged; delete it and run the same command again") from error
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Store what came out."""
        write_file(self.folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Hold the cell, if nobody else does: gives whether it is held."""
        with (self.folder / "claim").open("a+", encoding="utf-8") as file:
            if not _lock(file):
                yield False
                return
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.time()}))
            file.flush()
            yield True

    def held(self) -> bool:
        """Whether a worker has the cell at this moment."""
        path = self.folder / "claim"
        if not path.exists():
            return False
        with path.open("a+", encoding="utf-8") as file:
            return not _lock(file)


class Grid:
    """A folder of cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, recipe: Mapping[str, Any]) -> Cell:
        """The cell of a recipe, made unless it is there; a finished one keeps its result."""
        cell = Cell(self.folder / "cells" / name_of(recipe))
        if not (cell.folder / "cell.json").exists():
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_file(cell.folder / "cell.json", json.dumps(recipe, indent=1, allow_nan=False) + "\n")
        return cell

    def order(self, names: Sequence[str]) -> None:
        """Say in which order workers take the cells; those that are not named are not taken."""
        write_file(self.folder / "order.json", json.dumps(list(names), indent=1) + "\n")

    def cells(self) -> list[Cell]:
        """The cells in order.

        Raises:
            ValueError: the folder is not a grid.
        """
        path = self.folder / "order.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} is not a grid: it has no order.json; expected a folder of `tevo compare`")
        return [Cell(self.folder / "cells" / name) for name in json.loads(path.read_text(encoding="utf-8"))]

    def take(self) -> Iterator[Cell]:
        """Cells that nobody has and that have no result, each held while the caller works on it."""
        for cell in self.cells():
            if cell.result() is None:
                with cell.claim() as held:
                    # another worker may have finished it between the look and the claim
                    if held and cell.result() is None:
                        yield cell


def _lock(file: IO[str]) -> bool:
    """Lock an open file for as long as it is open, unless another process has it."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError(
            "this system has no flock, which workers need to share a grid; run compare on Linux or macOS"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
