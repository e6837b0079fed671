"""The needle grid: what is trained once and evaluated at each length, what is stored, and the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import colt5_needle as grid
from tevo.colt5 import training
from tevo.colt5.tasks import Lookup, Passkey

SMALL: dict[str, Any] = {
    "steps": 2,
    "batch": 1,
    "eval_every": 2,
    "save_every": 2,
    "examples": 2,
    "dim": 8,
    "head_dim": 4,
}
LENGTHS = (144, 177)


class Solver(torch.nn.Module):
    """Says what the task's own solver says, but for answers whose fact stands in the last fifth of the text, if so told."""

    share = None

    def __init__(self, task: Lookup | Passkey, *, blind: bool = False) -> None:
        super().__init__()
        self.task, self.blind, self.missed = task, blind, 0

    def forward(self, inputs: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        found = self.task.solve(inputs)
        assert torch.equal(shown[:, 1:], found[:, :-1])
        if self.blind:
            assert isinstance(self.task, Lookup)
            begin = self.task.begin
            for row, answers in zip(inputs.tolist(), found, strict=True):
                late = [5 * row[begin:].index(name) >= 4 * (len(row) - begin) for name in row[1:begin:2]]
                answers[1:-1:2][torch.tensor(late)] = 0
                self.missed += any(late)
        return torch.nn.functional.one_hot(found, self.task.vocab).double()


def test_cells_of_one_recipe_are_models_of_one_recipe() -> None:
    cells = grid.cells(needles=["key"], routings={"learned": 2, "learned, at most 128": 1}, lengths=LENGTHS, rows=3)
    told = [(cell["length"], cell["routing"], cell["seed"], cell["most"]) for cell in cells]
    one = [("learned", 0, None), ("learned, at most 128", 0, 128)]
    assert told == [(n, *rest) for n in LENGTHS for rest in one] + [(n, "learned", 1, None) for n in LENGTHS]
    assert cells[0]["recipe"] == cells[1]["recipe"] == cells[2]["recipe"] != cells[4]["recipe"]
    assert grid.recipe_of(json.loads(json.dumps(cells[4]))).content() == cells[4]["recipe"]
    assert max(grid.recipe_of(cells[0]).lengths) == 2048


def test_each_answer_counts_at_its_own_depth() -> None:
    recipe = grid.recipe_of(grid.cells(needles=["names"], routings={"none": 1}, lengths=LENGTHS, rows=3)[0])
    task = training.build_task(replace(recipe, lengths=(*recipe.lengths[:-1], LENGTHS[-1]))).last
    assert isinstance(task, Lookup)
    solver: Any = Solver(task)
    found = grid.names(solver, recipe, LENGTHS[-1], 3)
    assert found["exact_match"] == 1 and found["texts"] == 15 and found["recall"] is None
    assert found["by_depth"] == [1.0] * 5 and sum(found["answers_by_depth"]) == 15 * 4
    solver = Solver(task, blind=True)
    found = grid.names(solver, recipe, LENGTHS[-1], 3)
    assert found["by_depth"] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert found["exact_match"] == pytest.approx(1 - solver.missed / 15) and 0 < solver.missed < 15


def test_the_key_is_asked_for_at_every_depth() -> None:
    solver: Any = Solver(Passkey(length=177))
    recipe = grid.recipe_of(grid.cells(needles=["key"], routings={"none": 1}, lengths=LENGTHS, rows=3)[0])
    found = grid.key(solver, recipe, LENGTHS[-1], 3)
    assert found["exact_match"] == 1 and found["by_depth"] == [1.0] * 5 and found["texts"] == 15


def test_a_grid_is_trained_evaluated_stored_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    routings = {"learned": 1, "learned, at most 128": 1, "none": 1}
    for needle, lengths in (("key", (32, 40, 48, 56)), ("names", (32, 64, 80, 128, 144))):
        monkeypatch.setitem(grid.NEEDLES, needle, {**grid.NEEDLES[needle], "lengths": lengths})
    cells = grid.cells(needles=["key"], routings=routings, lengths=LENGTHS, rows=1, **SMALL)
    cells += grid.cells(needles=["names"], routings={"learned": 1}, lengths=LENGTHS, rows=1, **SMALL)
    for cell in cells:
        # less than a sixteenth of either
        cell["most"] = cell["most"] and 5
    monkeypatch.setattr(grid, "cells", lambda **options: cells)
    argv = ["colt5_needle", "--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", [*argv, "--collect"])
    assert grid.main() == 0
    assert json.loads((tmp_path / "found.json").read_text())["cells"] == []
    monkeypatch.setattr(sys, "argv", argv)
    assert grid.main() == 0
    stored = json.loads((tmp_path / "found.json").read_text())
    assert [cell.get("error") for cell in stored["cells"]] == [None] * 8
    # one training for all lengths, and for both numbers of routed tokens
    assert len(list((tmp_path / "grid" / "trained").iterdir())) == 3
    for cell in stored["cells"]:
        assert (cell["recall"] is None) == (cell["routing"] == "none")
        assert 0 <= cell["exact_match"] <= 1 and cell["texts"] == 5
    text = grid.page(stored)
    assert "8 of 8 cells" in text and "| routing | what it is | seeds | 144 | 177 |" in text
    assert "| none | no heavy branch | 1 |" in text and "| 100 % |" in text and "| 80 to 100 % |" in text
    capsys.readouterr()
