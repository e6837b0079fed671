from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tevo.bench import compare
from tevo.bench.cells import Grid
from tevo.bench.subjects import fitted
from tevo.bench.timing import measure_lengths
from tevo.bench.training import train_cell
from tevo.bench.worker import work

MY_PART = '''
import torch
from torch import nn

class Mine(nn.Module):
    """Each token's own projection beside the running mean of all so far."""

    def __init__(self, *, dim, causal=False):
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def forward(self, x, context=None, *, mask=None, at=None):
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        return self.value(x).cumsum(1) / count
'''


@pytest.fixture(scope="session")
def mine(tmp_path_factory) -> str:
    """A part of the user's, in a file of its own."""
    path: Path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(MY_PART)
    return f"{path}:Mine"


@pytest.fixture(scope="session")
def small_plan(mine) -> compare.Plan:
    """Three seeds of softmax and one of the user's part, four steps each."""
    request = compare.Request(parts=("softmax", mine), tasks=("recall",), seeds=(3, 1), lengths=(16, 32))
    task = {"name": "recall", "length": 16, "vocab": 16, "pairs": 2, "examples": 8}
    sizes = {"vocab": 16, "length": 16, "dim": 8, "depth": 1, "heads": 2}
    every = {"eval_every": 4, "save_every": 2, "log_every": 1}
    return compare.Plan(
        request=request,
        models={"recall": fitted(request.everyone(), sizes=sizes, position="rope")},
        tasks={"recall": task},
        training={"recall": {"steps": 4, "batch": 4, "lr": 1e-2, "warmup": 0.25, **every}},
        seeds=(3, 1),
        lengths=(16, 32),
        workers=1,
        threads=1,
        seconds={"recall": dict.fromkeys(request.everyone(), 1.0)},
        total=10.0,
        trimmed=("lengths 5 -> 2",),
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_plan):
    """A small finished comparison: its plan, folder and results."""
    folder = tmp_path_factory.mktemp("compare")
    plan = small_plan
    grid = Grid(folder)
    grid.order([grid.add(recipe).name for _, _, _, recipe in plan.cells])
    assert work(grid, train_cell) == 4
    builds = {
        part: {k: v for k, v in model.parts().items() if k != "length" and v is not None}
        for part, model in plan.models["recall"].items()
    }
    cost = measure_lengths(builds, plan.lengths, rounds=1)
    results = compare.collect(plan, folder, cost, command="tevo compare softmax mine.py:Mine")
    yield plan, folder, results
    shutil.rmtree(folder, ignore_errors=True)
