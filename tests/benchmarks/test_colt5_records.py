"""What is shipped is what was trained, with the record of every run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import colt5_records, colt5_routing
from tevo.colt5 import demo, training


def test_runs_of_a_grid_are_packed_with_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"steps": 2, "eval_every": 2, "save_every": 2, "examples": 3, "batch": 2}
    cells = colt5_routing.cells(presets=["tiny"], routings=["learned", "static"], seeds=1, **small)
    monkeypatch.setattr(colt5_routing, "cells", lambda **options: cells)
    grid, found, out = tmp_path / "grid", tmp_path / "found.json", tmp_path / "shipped"
    monkeypatch.setattr(sys, "argv", ["x", "--grid", str(grid), "--out", str(found)])
    assert colt5_routing.main() == 0
    monkeypatch.setattr(sys, "argv", ["x", "tiny", "--grid", str(grid), "--record", str(found), "--out", str(out)])
    assert colt5_records.main() == 0
    assert "record.json of 2 runs" in capsys.readouterr().out
    record = demo.read_record(out)
    assert record is not None and [cell["routing"] for cell in record["cells"]] == ["learned", "static"]
    for cell in record["cells"]:
        recipe, _, _, _ = training.open_run(out / cell["routing"])
        assert cell["recipe"] == json.loads(json.dumps(recipe.content()))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    with pytest.raises(ValueError, match="no run of 'tiny' with learned routing and seed 1"):
        colt5_records.main()
