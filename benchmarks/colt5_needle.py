"""How far does a CoLT5 find? Needles in texts of 1,024 to 65,536 tokens, of models that were trained on at most 2,048.

python -m benchmarks.colt5_needle                go on with runs/colt5_needle, store benchmarks/colt5_needle.json
python -m benchmarks.colt5_needle --collect      store what is finished, train and evaluate nothing
python -m benchmarks.colt5_needle --needles key --lengths 1024 4096 --rows 5

Two needles. *key*: a key of five digits, told once among words (task passkey), put at each depth. *names*: four names are
asked for, of which one of 32 facts each says the value (task lookup); places are drawn, and told by fifths of the text.
Nothing is trained on long texts: models are evaluated as they are, of a sixteenth of the tokens, or of at most 128, the
number that they had in training (*learned, at most 128*). A model is trained when its first cell is taken; cells are taken
seed by seed, from the shortest texts to the longest, and several processes may work on one grid at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.slot_grid import ROOT, fill, on, spread, store
from tevo.bench.cells import name_of
from tevo.bench.measure import parameters
from tevo.bench.worker import Interrupted
from tevo.colt5 import training
from tevo.colt5.answerer import Answerer
from tevo.colt5.inspection import ROUTERS, choices, recall
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.tasks import Lookup, Passkey
from tevo.colt5.tasks.contract import PAD
from tevo.training.recipe import resolve

TARGET = ROOT / "benchmarks" / "colt5_needle.json"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 20
# of texts that take seconds
FEWER = {32768: 8, 65536: 4}
# tokens that are routed of a text of 2,048
MOST = 128
# of an evaluation's batch, in tokens
TOKENS = 32768

# seeds of each
ROUTINGS = {"learned": 3, "learned, at most 128": 1, "static": 1, "none": 1}
WORDS = {
    "learned": "soft top-k of learned scores, a sixteenth of the tokens",
    "learned, at most 128": "the same models, at most 128 tokens",
    "static": "the first token of each of equal blocks, a sixteenth of the tokens",
    "none": "no heavy branch",
}
MARKS = {
    "key": ("question", "words before the key", "key"),
    "names": ("questions", "names of the facts asked for", "values of the facts asked for"),
}
TITLES = {"key": "A key of five digits", "names": "Names among names"}
NEEDLES: dict[str, dict[str, Any]] = {
    "key": {
        "task": "passkey",
        "steps": 640,
        "batch": 4,
        "lr": 1e-3,
        "lengths": (32, 128, 512, 2048),
        "phases": (380, 140, 70, 50),
        "rows": (16, 8, 4, 1),
        "shares": (0.25, 0.0625, 0.0625, 0.0625),
        "start": "mimetic",
        # each digit sees how far away the words before the key are
        "looks": (-1, -2, -3, -4, -5),
        "eps": (1.0, 1.0),
        "light_heads": 5,
        "heavy_heads": 4,
        "heads": 4,
        "head_dim": 32,
        "radius": 5,
        "eval_every": 640,
        "save_every": 160,
    },
    "names": {"preset": "lookup"},
}


def cells(
    *, needles: Sequence[str], routings: Mapping[str, int], lengths: Sequence[int], rows: int, **changes: Any
) -> list[dict[str, Any]]:
    """What is to be evaluated, seed by seed, the shortest texts first. A cell holds the whole recipe of its model."""
    found = []
    for seed in range(max(routings.values())):
        for length in lengths:
            for needle in needles:
                for routing in (name for name, seeds in routings.items() if seed < seeds):
                    kind, _, capped = routing.partition(", ")
                    options = {**NEEDLES[needle], "threads": 1, **changes, "routing": kind, "seed": seed}
                    content = resolve(CoLT5Recipe, **options).content()
                    cell = {"needle": needle, "routing": routing, "seed": seed, "length": length}
                    most, texts = MOST if capped else None, min(rows, FEWER.get(length, rows))
                    found.append({**cell, "rows": texts, "most": most, "recipe": content})
    return found


def recipe_of(cell: Mapping[str, Any]) -> CoLT5Recipe:
    """The recipe in a cell."""
    return resolve(CoLT5Recipe, **{name: value for name, value in cell["recipe"].items() if name != "kind"})


def compute(cell: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The scores of one model on texts of one length; the model is trained unless it is."""
    recipe = recipe_of(cell)
    # one model of all the cells that have its recipe
    run = folder.parent.parent / "trained" / name_of(cell["recipe"])
    if not training.run(recipe, folder=run).finished:
        raise Interrupted
    _, _, model, _ = training.open_run(run)
    n = cell["length"]
    if model.share is not None and cell["most"] is not None:
        model.share = min(model.share, cell["most"] / n)
    found = (key if cell["needle"] == "key" else names)(model, recipe, n, cell["rows"])
    return {**found, "parameters": parameters(model)}


def key(model: Answerer, recipe: CoLT5Recipe, n: int, rows: int) -> dict[str, Any]:
    """``rows`` texts of n tokens for each depth, the same but for the key's place."""
    parts = [evaluated(model, Passkey(length=n, depth=depth, examples=rows)) for depth in DEPTHS]
    right = [part["right"].all(-1) for part in parts]
    return {
        "texts": rows * len(DEPTHS),
        "exact_match": mean(each.double().mean().item() for each in right),
        "by_depth": [each.double().mean().item() for each in right],
        "answers_by_depth": [rows] * len(DEPTHS),
        "recall": _mean_table([part["recall"] for part in parts]),
        "processor_seconds": mean(part["processor_seconds"] for part in parts),
    }


def names(model: Answerer, recipe: CoLT5Recipe, n: int, rows: int) -> dict[str, Any]:
    """As many texts of n tokens as :func:`key` has in all; each answer counts in the fifth of the text that it stands in."""
    texts = rows * len(DEPTHS)
    changed = replace(recipe, lengths=(*recipe.lengths[:-1], n), examples=texts)
    task = training.build_task(changed).last
    assert isinstance(task, Lookup)
    part = evaluated(model, task)
    # a fact's name stands in no other place behind the questions
    asked, told = part["inputs"][:, 1 : task.begin : 2], part["inputs"][:, task.begin :]
    place = torch.stack([(told == one[:, None]).int().argmax(-1) for one in asked.unbind(-1)], -1)  # b q
    fifth = (place * len(DEPTHS)).div(told.shape[1], rounding_mode="floor")
    right = part["right"][:, 1:-1:2]
    each = [right[fifth == index].double() for index in range(len(DEPTHS))]
    return {
        "texts": texts,
        "exact_match": part["right"].all(-1).double().mean().item(),
        "by_depth": [scores.mean().item() if len(scores) else None for scores in each],
        "answers_by_depth": [len(scores) for scores in each],
        "recall": part["recall"],
        "processor_seconds": part["processor_seconds"],
    }


@torch.no_grad()
def evaluated(model: Answerer, task: Passkey | Lookup) -> dict[str, Any]:
    """All of the test split: "inputs" (b, n), "right" (b, t), "recall" of ``MARKS``, each layer by layer and router by
    router (None where nothing is routed), and "processor_seconds" of a text.
    """
    inputs, right, hits, spent = [], [], [], 0.0
    for batch in task.batches("test", max(1, TOKENS // task.length)):
        # the right answer one to the right; no answer is shorter than another
        shown = F.pad(batch["targets"][:, :-1], (1, 0), value=PAD)
        began = time.process_time()
        if model.share is None:
            logits = model(batch["inputs"], shown)
        else:
            # what it chose, and what it made of it, of one pass
            chosen = choices(model, batch["inputs"])
            logits = model.model(encoder_outputs=(chosen.encoded,), decoder_input_ids=shown, use_cache=False).logits
        spent += time.process_time() - began
        right.append((logits.argmax(-1) == batch["targets"]) & ~logits.isnan().any(-1))
        inputs.append(batch["inputs"])
        if model.share is not None:
            marks = task.oracle(batch["inputs"], batch["targets"])
            # what tells of the answer, without it
            marks = marks._replace(evidence=marks.evidence & ~marks.answer)
            hits.append(torch.stack([recall(chosen.routed, mark) for mark in marks]) * len(chosen.encoded))
    table = None if not hits else (torch.stack(hits).sum(0) / task.examples).tolist()
    found: dict[str, Any] = {"inputs": torch.cat(inputs), "right": torch.cat(right)}
    return {**found, "recall": table, "processor_seconds": spent / task.examples}


def _mean_table(tables: Sequence[Any]) -> Any:
    return None if tables[0] is None else torch.tensor(tables, dtype=torch.float64).mean(0).tolist()


def page(stored: Mapping[str, Any]) -> str:
    """What was found, in tables."""
    cells = [cell for cell in stored["cells"] if "error" not in cell]
    failed, missing = len(stored["cells"]) - len(cells), stored["planned"] - len(stored["cells"])
    words = f"{len(stored['cells'])} of {stored['planned']} cells (a model, a length) are stored"
    words += f", {failed} of which failed" if failed else ""
    words += f"; `{stored['command']}` goes on with the missing {missing}." if missing else "."
    lines = [
        "# How far does a CoLT5 find?",
        "",
        "Generated by `make docs` from `benchmarks/colt5_needle.json`.",
        "",
        "Small models, trained on inputs of at most 2,048 tokens, read longer ones as they are, without any further training. "
        "Exact match in %, mean ± standard deviation over seeds; a number without ± is of one seed. Of all tokens a sixteenth "
        f"take the heavy branch, in every layer and at every length, unless the row says {MOST}, the number of a text of 2,048. "
        + words,
    ]
    for needle, title in TITLES.items():
        if rows := [cell for cell in cells if cell["needle"] == needle]:
            lines += ["", f"## {title}", "", *_needle(needle, rows)]
    lines += ["", f"Command: `{stored['command']}`. Machine: {on(stored)}."]
    return "\n".join(lines) + "\n"


def _needle(needle: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tables of one needle."""
    recipe = recipe_of(cells[0])
    lengths = sorted({cell["length"] for cell in cells})
    heads = [f"{n:,}" for n in lengths]
    trained = f"phases of {', '.join(map(str, recipe.lengths))} tokens, {recipe.steps} steps"
    sizes = f"{recipe.layers} layers of width {recipe.dim}, window of {recipe.radius} tokens on each side"
    about = {
        "key": "One sentence among words that are drawn alike tells five digits. Nothing else is a number, so that the window "
        "and the decoder suffice: this is reach over length and depth. All five digits have to be right.",
        "names": f"{recipe.questions} names are asked for, whose values stand with them in {recipe.questions} of "
        f"{(recipe.facts or (0,))[-1]} facts that look alike, so that facts have to be compared with the questions far away. "
        f"All {recipe.questions} values have to be right; by depth each answer counts alone.",
    }[needle]
    lines = [f"{about} Training: {trained}; {sizes}.", ""]

    def of(routing: str, length: int) -> list[Mapping[str, Any]]:
        return [cell for cell in cells if cell["routing"] == routing and cell["length"] == length]

    present = [routing for routing in WORDS if any(cell["routing"] == routing for cell in cells)]

    def texts(each: int) -> str:
        return ", ".join(str(max(cell["texts"] for cell in cells if cell["length"] == n) // each) for n in lengths)

    lines += _head("routing", "what it is", "seeds", *heads)
    for routing in present:
        counts = sorted({len(of(routing, n)) for n in lengths})
        # not all lengths may be there yet
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        scores = [spread([cell["exact_match"] for cell in of(routing, n)], scale=100) for n in lengths]
        lines.append(_row(routing, WORDS[routing], seeds, *scores))
    if needle == "key":
        asked = f"Keys for each model and length, each at {len(DEPTHS)} depths: {texts(len(DEPTHS))}."
    else:
        asked = f"Texts for each model and length: {texts(1)}."
    lines += ["", asked, "", "Learned, by depth:", "", *_head("depth", *heads)]
    for index, depth in enumerate(DEPTHS):
        name = f"{100 * depth:.0f} %" if needle == "key" else f"{20 * index} to {20 * index + 20} %"
        columns = [[cell["by_depth"][index] for cell in of("learned", n)] for n in lengths]
        lines.append(_row(name, *(spread([v for v in column if v is not None], scale=100) for column in columns)))
    lines += ["", "Learned, tokens that are routed, in %, mean over seeds:", ""]
    lines += _head("tokens", "layer", "router", *heads)
    for mark, layer, index in product(range(3), range(recipe.layers), range(len(ROUTERS))):
        columns = [[cell["recall"][mark][layer][index] for cell in of("learned", n)] for n in lengths]
        means = [f"{100 * mean(column):.0f}" if column else "" for column in columns]
        lines.append(_row(MARKS[needle][mark], str(layer + 1), ROUTERS[index], *means))
    lines += ["", "Processor seconds of a text, one thread:", "", *_head("routing", *heads)]
    for routing in present:
        columns = [[cell["processor_seconds"] for cell in of(routing, n)] for n in lengths]
        lines.append(_row(routing, *(f"{mean(column):.2g}" if column else "" for column in columns)))
    return lines


def _head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colt5_needle", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--grid", type=Path, default=Path("runs/colt5_needle"), help="folder of models and cells")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    parser.add_argument("--needles", nargs="+", default=tuple(NEEDLES), choices=NEEDLES, help="default: both")
    parser.add_argument("--routings", nargs="+", default=tuple(ROUTINGS), choices=ROUTINGS, help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="default: 1024, doubled up to 65536")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"texts for each depth (default {ROWS})")
    parser.add_argument("--collect", action="store_true", help="store what is finished, compute nothing")
    given = parser.parse_args()
    # the record says how many threads there were
    torch.set_num_threads(1)
    seeds = {routing: ROUTINGS[routing] for routing in given.routings}
    wanted = cells(needles=given.needles, routings=seeds, lengths=given.lengths, rows=given.rows)
    try:
        found = fill(given.grid, wanted, None if given.collect else compute)
    except Interrupted:
        return 130
    command = " ".join(["python -m benchmarks.colt5_needle", *(word for word in sys.argv[1:] if word != "--collect")])
    store(given.out, found, command=command, planned=len(wanted))
    print(f"{given.out}: {len(found)} of {len(wanted)} cells")
    for cell in found:
        name = f"{cell['needle']}, {cell['routing']}, seed {cell['seed']}, {cell['length']} tokens"
        print(f"{name}: {cell.get('error') or format(100 * cell['exact_match'], '.1f')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
