"""Does learned routing beat static routing? The same small CoLT5 by each routing and seed, on questions over long inputs.

python -m benchmarks.colt5_routing                           go on with runs/colt5_routing, store benchmarks/colt5_routing.json
python -m benchmarks.colt5_routing --collect                 store what is finished, train nothing
python -m benchmarks.colt5_routing --presets lookup --seeds 3 --routings learned static

Learned and static routing take equally many tokens, and differ in the routers' own products alone (2 d FLOPs a token each);
*static, questions* always takes the questions, and as many in all; *none* has no heavy branch, and in *dense* it takes all
tokens. Several processes may work on one grid at once, also from several machines that share the folder; what is killed goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.slot_grid import ROOT, counted, fill, on, spread, store, verdict
from tevo.bench.measure import flops, parameters
from tevo.bench.verdicts import student
from tevo.bench.worker import Interrupted
from tevo.colt5 import training
from tevo.colt5.inspection import survey
from tevo.colt5.recipes import CoLT5Recipe
from tevo.training.loop import evaluate
from tevo.training.recipe import resolve

TARGET = ROOT / "benchmarks" / "colt5_routing.json"
PRESETS = ("lookup", "code")
ROUTINGS = ("learned", "static", "static, questions", "none", "dense")
SEEDS = 3
WORDS = {
    "learned": "soft top-k of learned scores",
    "static": "the first token of each of equal blocks",
    "static, questions": "the questions' tokens, and the first of each of equal blocks",
    "random": "tokens drawn at random",
    "none": "no heavy branch",
    "dense": "all tokens take the heavy branch",
}
# of a curve that is stored
POINTS = 60


def cells(*, presets: Sequence[str], routings: Sequence[str], seeds: int, **changes: Any) -> list[dict[str, Any]]:
    """What is to be trained, seed by seed. A cell holds the whole recipe, so that another recipe is another cell."""
    found = []
    for seed in range(seeds):
        for preset in presets:
            for routing in routings:
                options = (
                    {"routing": "static", "forced": True} if routing == "static, questions" else {"routing": routing}
                )
                recipe = resolve(CoLT5Recipe, preset=preset, seed=seed, **options, **changes)
                found.append({"preset": preset, "routing": routing, "seed": seed, "recipe": recipe.content()})
    return found


def recipe_of(cell: Mapping[str, Any]) -> CoLT5Recipe:
    """The recipe in a cell."""
    return resolve(CoLT5Recipe, **{name: value for name, value in cell["recipe"].items() if name != "kind"})


def compute(cell: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One training, or the rest of it, and its scores on the test split."""
    recipe, run = recipe_of(cell), folder / "run"
    began = time.process_time()
    result = training.run(recipe, folder=run)
    if not result.finished:
        raise Interrupted
    spent = time.process_time() - began
    _, task, model, _ = training.open_run(run)
    found: dict[str, Any] = {
        "exact_match": evaluate(model, task, split="test", batch=recipe.batch),
        "rows": task.examples,
        "chance": task.chance,
        "baselines": task.baselines,
        "parameters": parameters(model),
        "flops": int(flops(training.measured(model), torch.zeros(1, task.length, dtype=torch.long))),
        # of this process alone: a run that was killed has spent more
        "processor_seconds": spent,
        "curves": {
            name: _thinned(training.curve(run, name))
            for name in ("exact_match", "valid_exact_match", "sharpness", "loss")
        },
    }
    if model.share is not None:
        found["routing_survey"] = survey(model, task, split="test", batch=recipe.batch)
    return found


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """Means over equal stretches where there are too many."""
    size = max(1, -(-len(points) // POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [[group[-1][0], round(mean(value for _, value in group), 5)] for group in groups]


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences of equal seeds, and half the width of its 95 % interval (Student; None of a single seed)."""
    pairs = [a - b for a, b in zip(one, other, strict=True)]
    if len(pairs) < 2:
        return mean(pairs), None
    return mean(pairs), student(len(pairs) - 1) * stdev(pairs) / math.sqrt(len(pairs))


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Preset -> learned against each other routing over the seeds that both have: seeds, difference, half_width."""
    told: dict[str, dict[str, Any]] = {}
    for preset in dict.fromkeys(cell["preset"] for cell in found):
        scores = {
            routing: {
                cell["seed"]: cell["exact_match"]
                for cell in found
                if cell["preset"] == preset and cell["routing"] == routing and "error" not in cell
            }
            for routing in WORDS
        }
        told[preset] = {}
        for routing, other in scores.items():
            seeds = sorted(scores["learned"].keys() & other.keys())
            if routing != "learned" and seeds:
                gap, half = difference([scores["learned"][s] for s in seeds], [other[s] for s in seeds])
                told[preset][routing] = {"seeds": len(seeds), "difference": gap, "half_width": half}
    return told


def page(stored: Mapping[str, Any]) -> str:
    """What was found, in tables."""
    lines = [
        "# Does learned routing beat static routing?",
        "",
        "Generated by `make docs` from `benchmarks/colt5_routing.json`.",
        "",
        "Exact match in % on held-out inputs, mean ± standard deviation over seeds. Learned and static routing take equally "
        "many tokens into the heavy branch; their FLOPs differ in the routers' own products alone. Learned minus another: mean "
        "of the differences of equal seeds ± half of its 95 % interval (Student). Processor time is of one thread, training and "
        "its evaluations.",
        "",
        counted(stored["cells"], stored["planned"], stored["command"]),
    ]
    for preset, told in stored["summary"].items():
        rows = [cell for cell in stored["cells"] if cell["preset"] == preset and "error" not in cell]
        if not rows:
            continue
        recipe = recipe_of(rows[0])
        routed = ", ".join(f"{100 * share:.4g} %" for share in recipe.shares)
        guesses = ", ".join(f"{name} {100 * value:.2g} %" for name, value in rows[0]["baselines"].items())
        # names of a look-up have to be right together
        counted_alone = f", each of {recipe.questions} questions that count by themselves" if preset == "code" else ""
        lines += [
            "",
            f"## {preset.capitalize()}",
            "",
            f"Inputs of {recipe.lengths[-1]:,} tokens after phases of {', '.join(map(str, recipe.lengths))}; {recipe.steps} "
            f"steps in all; routed share at the ends of the phases: {routed}; {recipe.layers} layers of width {recipe.dim}, "
            f"{rows[0]['parameters']:,} parameters; {rows[0]['rows']} test inputs{counted_alone}; chance "
            f"{100 * rows[0]['chance']:.2g} %; {guesses}.",
            "",
            "| routing | what it is | seeds | exact match, % | learned minus it | learned is | FLOPs of a text | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        each = {routing: [row for row in rows if row["routing"] == routing] for routing in WORDS}
        learned = [row["exact_match"] for row in each["learned"]]
        for routing, what in WORDS.items():
            if not (known := each[routing]):
                continue
            gap = told.get(routing)
            half = "" if gap is None or gap["half_width"] is None else f" ± {100 * gap['half_width']:.1f}"
            scores = [row["exact_match"] for row in known]
            word = "" if routing == "learned" else verdict(learned, scores, higher_is_better=True)
            minutes = mean(row["processor_seconds"] for row in known) / 60
            lines.append(
                f"| {routing} | {what} | {len(known)} | {spread(scores, scale=100)} | "
                f"{'' if gap is None else format(100 * gap['difference'], '+.1f') + half} | {word} | "
                f"{known[0]['flops']:.3g} | {minutes:.1f} |"
            )
    lines += ["", f"Machine: {on(stored)}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colt5_routing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--grid", type=Path, default=Path("runs/colt5_routing"), help="folder of the cells")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    parser.add_argument(
        "--presets", nargs="+", default=PRESETS, help=f"of tevo train colt5 (default {' '.join(PRESETS)})"
    )
    parser.add_argument("--routings", nargs="+", default=ROUTINGS, choices=WORDS, help="default: all but random")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each (default {SEEDS})")
    parser.add_argument("--steps", type=int, help="other than the preset's")
    parser.add_argument("--collect", action="store_true", help="store what is finished, train nothing")
    given = parser.parse_args()
    # the record says how many threads there were
    torch.set_num_threads(1)
    changes = {} if given.steps is None else {"steps": given.steps}
    wanted = cells(presets=given.presets, routings=given.routings, seeds=given.seeds, threads=1, **changes)
    try:
        found = fill(given.grid, wanted, None if given.collect else compute)
    except Interrupted:
        return 130
    command = " ".join(["python -m benchmarks.colt5_routing", *(word for word in sys.argv[1:] if word != "--collect")])
    store(given.out, found, command=command, planned=len(wanted), summary=summary(found))
    print(f"{given.out}: {len(found)} of {len(wanted)} trainings")
    for preset, told in summary(found).items():
        for routing, gap in told.items():
            half = "" if gap["half_width"] is None else f" ± {100 * gap['half_width']:.1f}"
            print(
                f"{preset}: learned minus {routing} {100 * gap['difference']:+.1f}{half} points, {gap['seeds']} seeds"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
