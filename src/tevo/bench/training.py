"""The training cell of a comparison: one part, one task, one seed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tevo.bench.measure import parameters
from tevo.bench.subjects import Model, source_of
from tevo.bench.tasks import Task, task
from tevo.bench.worker import Interrupted
from tevo.objectives.next_token import NextToken
from tevo.training.loop import train
from tevo.training.recipe import LanguageModelRecipe

__all__ = ["METRICS", "cell_recipe", "make_task", "recipe_of", "train_cell"]

# points of a loss curve that a result keeps
_POINTS = 30
# where the loop writes, inside the cell's folder
RUN = "run"
METRICS = f"{RUN}/metrics.jsonl"


def cell_recipe(model: Model, *, task: Mapping[str, Any], training: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """All that decides a cell's result.

    Args:
        model: the part in its seat.
        task: ``name`` and the task's options.
        training: fields of :class:`tevo.training.recipe.Recipe` that differ from its defaults.
        seed: of initialisation and of the order of the data; equal seeds see the same batches.
    """
    return {
        "kind": "train",
        "part": model.part,
        "source": source_of(model.part),
        "model": asdict(model),
        "task": dict(task),
        "training": dict(training),
        "seed": seed,
    }


def train_cell(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train and evaluate one cell.

    Returns:
        ``score`` in the task's metric on its valid split; ``curve``: pairs of steps and training loss in bits;
        ``parameters``; ``training_seconds``; ``threads``.

    Raises:
        Interrupted: a signal stopped it; what was trained is kept and gone on from.
    """
    if recipe["source"] != source_of(recipe["part"]):
        raise ValueError(f"the code of {recipe['part']} has changed since this grid was made; run compare again")
    model = Model(**recipe["model"])
    made = make_task(json.dumps(recipe["task"], sort_keys=True))
    plan = recipe_of(recipe, threads=torch.get_num_threads())
    result = train(plan, build=model.build, objective=NextToken(), task=made, folder=folder / RUN)
    if not result.finished:
        raise Interrupted
    if result.score is None or not math.isfinite(result.score):
        raise FloatingPointError(f"the score is {result.score}")
    records = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    losses = [(r["step"], r["loss"] / math.log(2)) for r in records if "loss" in r]
    stride = max(1, len(losses) // _POINTS)
    # means over equal stretches: single batches are noisy
    curve = [_mean(losses[i : i + stride]) for i in range(0, len(losses) - stride + 1, stride)]
    # weights are not needed any more, and a grid has many cells
    shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)
    return {
        "score": result.score,
        "curve": curve,
        "parameters": parameters(model.build()),
        "training_seconds": max(r["seconds"] for r in records if "seconds" in r),
        "threads": torch.get_num_threads(),
    }


def recipe_of(cell: Mapping[str, Any], *, threads: int) -> LanguageModelRecipe:
    """The training recipe of a cell."""
    model, options = cell["model"], cell["task"]
    values = {
        "task": options["name"],
        "data": options.get("data") or "",
        "length": model["length"],
        "mixer": (model["mixer"],),
        "channel": model["channel"],
        "position": model["position"],
        "residual": model["residual"],
        "dim": model["dim"],
        "depth": model["depth"],
        "heads": model["heads"],
        "seed": cell["seed"],
        "threads": threads,
        **cell["training"],
    }
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return LanguageModelRecipe(**values)


@cache
def make_task(text: str) -> Task:
    """The task of a JSON object with its name and options; one for all cells of a process."""
    options = json.loads(text)
    return task(options.pop("name"), **options)


def _mean(points: list[tuple[int, float]]) -> list[float]:
    return [points[-1][0], sum(value for _, value in points) / len(points)]
