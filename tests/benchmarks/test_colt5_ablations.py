"""The grid of ablations: one thing changes in each row, and what is stored elsewhere is not trained again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks import colt5_ablations as grid
from benchmarks import colt5_routing

# a preset of seconds, whose phases are two
SMALL: dict[str, Any] = {"steps": 3, "eval_every": 3, "save_every": 3, "examples": 4}


def test_each_row_changes_what_it_says_and_nothing_else() -> None:
    base, *others = grid.cells(seeds=1)
    assert base["change"] == grid.OURS
    for cell in others:
        changed = {
            name
            for name in base["recipe"].keys() | cell["recipe"].keys()
            if base["recipe"].get(name) != cell["recipe"].get(name)
        }
        assert changed == set(grid.CHANGES[cell["change"]][0]), cell["change"]
    assert others[4]["change"] == "m / 2" and others[4]["recipe"]["shares"][-1] == 1 / 32


def test_published_differences_are_those_of_the_papers_averages() -> None:
    assert {name: paper for name, (_, _, paper) in grid.CHANGES.items() if paper is not None} == {
        "CoLT5": 42.5,
        "static routing": 40.5,
        "one router": 42.0,
        "v = all": 42.5,
        "v = q": 42.3,
        "m / 2": 41.6,
        "1.5 m": 42.9,
        "LongT5 encoder": 42.1,
        "multi-head cross-attention": 42.9,
    }


def test_what_is_stored_with_the_same_recipe_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = json.loads(json.dumps(grid.cells(seeds=1)[0]))
    monkeypatch.setattr(grid, "known", lambda: [{**cell, "preset": "code", "routing": "learned", "exact_match": 0.5}])
    monkeypatch.setattr(colt5_routing, "compute", lambda cell, folder: {"exact_match": 0.1})
    assert grid.compute(cell, tmp_path) == {"change": grid.OURS, "exact_match": 0.5}
    other = {**cell, "recipe": {**cell["recipe"], "keys": 1.0}}
    assert grid.compute(other, tmp_path) == {"exact_match": 0.1}


def test_a_grid_is_trained_stored_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PRESET", "tiny")
    changes = {name: grid.CHANGES[name] for name in (grid.OURS, "one router", "v = all", "LongT5 encoder")}
    monkeypatch.setattr(grid, "CHANGES", changes)
    cells = grid.cells(seeds=1, names=tuple(changes), **SMALL)
    monkeypatch.setattr(grid, "cells", lambda **options: cells)
    monkeypatch.setattr(sys, "argv", ["ablations", "--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "a.json")])
    assert grid.main() == 0
    stored = json.loads((tmp_path / "a.json").read_text())
    assert not any("error" in cell for cell in stored["cells"])
    flops = {cell["change"]: cell["flops"] for cell in stored["cells"]}
    assert flops["one router"] < flops[grid.OURS] < flops["v = all"]
    assert set(stored["summary"]) == set(changes) - {grid.OURS}
    text = grid.page(stored)
    assert "| one router | queries and keys are the same tokens | 1 |" in text and "| -0.5 |" in text
    assert "4 of 4 trainings are stored" in text
