"""The grid of routings: what is trained, what is stored, and the interval of the difference."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks import colt5_routing as grid

SMALL: dict[str, Any] = {"steps": 3, "eval_every": 3, "save_every": 3, "examples": 4}


def test_a_cell_is_named_by_its_whole_recipe() -> None:
    cells = grid.cells(presets=["tiny"], routings=["learned", "none"], seeds=2, **SMALL)
    assert [(cell["routing"], cell["seed"]) for cell in cells] == [
        ("learned", 0),
        ("none", 0),
        ("learned", 1),
        ("none", 1),
    ]
    assert grid.recipe_of(json.loads(json.dumps(cells[2]))).content() == cells[2]["recipe"]


def test_the_interval_is_student_s_of_paired_differences() -> None:
    stats = pytest.importorskip("scipy.stats")
    one, other = [0.9, 0.95, 0.88], [0.3, 0.42, 0.21]
    gap, half = grid.difference(one, other)
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (gap - half, gap + half) == pytest.approx((low, high))
    assert grid.difference([0.9], [0.5]) == (pytest.approx(0.4), None)


def test_curves_keep_their_means_when_thinned() -> None:
    points = [(step, float(step % 7)) for step in range(1, 121)]
    thin = grid._thinned(points)
    assert len(thin) == 60 and thin[-1][0] == 120
    assert sum(value for _, value in thin) * 2 == pytest.approx(sum(value for _, value in points))


def test_a_grid_is_trained_stored_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = grid.cells(presets=["tiny"], routings=["learned", "static", "none"], seeds=1, **SMALL)
    monkeypatch.setattr(grid, "cells", lambda **options: cells)
    argv = ["colt5_routing", "--grid", str(tmp_path / "grid"), "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", [*argv, "--collect"])
    assert grid.main() == 0
    assert json.loads((tmp_path / "found.json").read_text())["cells"] == []
    monkeypatch.setattr(sys, "argv", argv)
    assert grid.main() == 0
    stored = json.loads((tmp_path / "found.json").read_text())
    learned, static, none = stored["cells"]
    assert not any("error" in cell for cell in stored["cells"])
    assert learned["flops"] > static["flops"] > none["flops"]
    assert learned["curves"]["valid_exact_match"] == [[3, pytest.approx(learned["curves"]["valid_exact_match"][0][1])]]
    assert "routing_survey" in learned and "routing_survey" not in none
    assert set(stored["summary"]["tiny"]) == {"static", "none"}
    text = grid.page(stored)
    assert "| learned | soft top-k of learned scores | 1 |" in text and "3 of 3 trainings are stored" in text
    assert not math.isnan(learned["processor_seconds"])
