from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tevo.bench.cells import Grid, name_of
from tevo.bench.worker import work


def made(folder: Path, count: int = 3) -> Grid:
    grid = Grid(folder)
    grid.order([grid.add({"number": i}).name for i in range(count)])
    return grid


def double(recipe, folder):
    return {"double": 2 * recipe["number"]}


def test_the_name_depends_on_content_and_not_on_order():
    assert name_of({"a": 1, "b": [2.5, None]}) == name_of({"b": [2.5, None], "a": 1})
    assert name_of({"a": 1}) != name_of({"a": 2})


def test_a_worker_finishes_all_cells_and_a_second_finds_nothing_left(tmp_path):
    grid = made(tmp_path)
    assert work(grid, double) == 3
    assert [cell.result()["double"] for cell in grid.cells()] == [0, 2, 4]
    assert work(grid, double) == 0


def test_adding_a_finished_cell_again_keeps_its_result(tmp_path):
    grid = made(tmp_path)
    work(grid, double)
    assert grid.add({"number": 1}).result()["double"] == 2


def test_an_error_is_the_result_of_its_cell_alone(tmp_path):
    def fail_on_one(recipe, folder):
        if recipe["number"] == 1:
            raise ValueError("one is refused\nwith details")
        return double(recipe, folder)

    grid = made(tmp_path)
    assert work(grid, fail_on_one) == 3
    first, second, third = (cell.result() for cell in grid.cells())
    assert second["error"] == "ValueError: one is refused"
    assert first["double"] == 0 and third["double"] == 4


def test_a_claimed_cell_is_passed_over_and_free_again_afterwards(tmp_path):
    grid = made(tmp_path)
    cell = grid.cells()[0]
    with cell.claim() as held:
        assert held and cell.held()
        with grid.cells()[0].claim() as again:
            assert not again
        assert work(grid, double) == 2
    assert not cell.held()
    assert work(grid, double) == 1


def _slow(recipe, folder):
    (folder / f"by_{os.getpid()}").touch()
    time.sleep(0.02)
    return {"by": os.getpid()}


def _work_slowly(folder):
    work(Grid(folder), _slow)


def test_two_workers_share_a_grid_and_compute_no_cell_twice(tmp_path):
    grid = made(tmp_path, 20)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work_slowly, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(cell.result() is not None for cell in grid.cells())
    assert all(len(list(cell.folder.glob("by_*"))) == 1 for cell in grid.cells())


HANG = """
import sys, time
from pathlib import Path
from tevo.bench.cells import Grid
from tevo.bench.worker import work

def compute(recipe, folder):
    if recipe["number"] == 1:
        (folder / "begun").touch()
        time.sleep(60)
    return {"double": 2 * recipe["number"]}

work(Grid(Path(sys.argv[1])), compute)
"""


def test_a_worker_killed_in_mid_cell_loses_that_cell_only(tmp_path):
    grid = made(tmp_path)
    cells = grid.cells()
    worker = subprocess.Popen([sys.executable, "-c", HANG, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not (cells[1].folder / "begun").exists():
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.02)
    assert cells[1].held()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert cells[0].result()["double"] == 0 and cells[1].result() is None
    # its claim fell with it: another worker takes it over at once
    assert work(grid, double) == 2
    assert [cell.result()["double"] for cell in cells] == [0, 2, 4]


def test_a_changed_or_damaged_cell_is_refused_in_one_sentence(tmp_path):
    grid = made(tmp_path)
    cell = grid.cells()[0]
    path = cell.folder / "cell.json"
    path.write_text(json.dumps({"number": 7}))
    with pytest.raises(ValueError, match="was changed after it was named"):
        cell.recipe()
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        cell.recipe()


def test_a_folder_that_is_no_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a grid"):
        Grid(tmp_path).cells()


def test_no_result_is_ever_seen_half_written(tmp_path):
    grid = made(tmp_path, 1)
    cell = grid.cells()[0]
    cell.finish({"numbers": list(range(1000))})
    assert not list(cell.folder.glob("*result.json-*"))
    assert len(cell.result()["numbers"]) == 1000
