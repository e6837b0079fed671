"""What `tevo demo colt5` ships: weights of learned and static routing, and the record of all runs they were taken from.

python -m benchmarks.colt5_records code                  from runs/colt5_routing and benchmarks/colt5_routing.json
python -m benchmarks.colt5_records code --seed 1 --out FOLDER

Weights are those of one seed, the first unless another is named; the record has every finished run of the preset.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.colt5_routing import TARGET
from benchmarks.slot_grid import ROOT
from tevo.bench.cells import name_of
from tevo.colt5.training import pack

SHIPPED = ROOT / "src" / "tevo" / "colt5" / "shipped"
ROUTINGS = ("learned", "static")
# of a cell, what names it
KEYS = ("preset", "routing", "seed", "recipe")


def ship(record: dict[str, Any], *, preset: str, seed: int, grid: Path, out: Path) -> list[dict[str, Any]]:
    """Pack the runs of ``preset`` and ``seed`` into ``out``, and give the cells that the record is to have.

    Raises:
        ValueError: a run is missing.
    """
    cells = [cell for cell in record["cells"] if cell["preset"] == preset and "error" not in cell]
    for routing in ROUTINGS:
        found = [cell for cell in cells if cell["routing"] == routing and cell["seed"] == seed]
        if not found:
            raise ValueError(
                f"the record has no run of {preset!r} with {routing} routing and seed {seed}; train it with "
                f"python -m benchmarks.colt5_routing --presets {preset}"
            )
        # one recipe for each preset, routing and seed: the last is the newest
        name = name_of({key: found[-1][key] for key in KEYS})
        pack(grid / "cells" / name / "run", out / routing)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colt5_records", description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset", help="of the grid of routings")
    parser.add_argument("--seed", type=int, default=0, help="whose weights (default 0)")
    parser.add_argument("--grid", type=Path, default=Path("runs/colt5_routing"), help="folder of the cells")
    parser.add_argument("--record", type=Path, default=TARGET, help="what benchmarks.colt5_routing stored")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write into")
    given = parser.parse_args()
    record = json.loads(given.record.read_text(encoding="utf-8"))
    cells = ship(record, preset=given.preset, seed=given.seed, grid=given.grid, out=given.out)
    stored = {
        "command": record["command"],
        "packed": shlex.join(["python", "-m", "benchmarks.colt5_records", *sys.argv[1:]]),
        "machine": record["machine"],
        "seed": given.seed,
        "cells": cells,
    }
    (given.out / "record.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    print(f"{given.out}: {', '.join(ROUTINGS)}, record.json of {len(cells)} runs; {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
