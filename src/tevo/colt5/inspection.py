"""What the routers of a CoLT5 choose: weights over the text, recall of marked tokens, agreement of routers, sharpness.

    weight    w_i of each token, 0 where it is not routed
    recall    share of the marked tokens that are routed, beside the share of all tokens that are                       (1)
    agreement Pearson correlation of two routers' weights over the tokens of a layer                                    (2)
    sharpness sum of w^2 over sum of w: 1 where weights are 0 and 1, less the flatter they are                          (3)

These are the paper's pictures (its figures 6 and 7 and table 10), of any model that has this house's encoder.

Letters: l layers, r routers of a layer (queries, keys and values, feed-forward), b texts, n tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tevo import charts, pages
from tevo.colt5.answerer import Answerer
from tevo.colt5.reading import held_out
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.training import Curriculum, curve, open_run
from tevo.taps import record

__all__ = [
    "PAIRS",
    "ROUTERS",
    "Choices",
    "agreement",
    "choices",
    "describe_run",
    "heat_map",
    "make_page",
    "maps",
    "recall",
    "sentences",
    "survey",
    "training_charts",
]

ROUTERS = ("queries", "keys and values", "feed-forward")
PAIRS = ((1, 0), (1, 2), (0, 2))
TEMPLATES = Path(__file__).with_name("templates")
_LEVELS, _TABS = 5, 24


class Choices(NamedTuple):
    """What was routed.

    Args:
        weights: (l, r, b, n), 0 where a token is not routed.
        routed: (l, r, b, n) bool.
        encoded: (b, n, d), what the encoder made of it.
    """

    weights: Tensor
    routed: Tensor
    encoded: Tensor


@torch.no_grad()
def choices(model: Answerer, inputs: Tensor) -> Choices:
    """What the routers of a model in evaluation choose of ``inputs`` (b, n).

    Raises:
        ValueError: the model routes nothing.
    """
    if model.share is None:
        raise ValueError(
            "this model has no heavy branch, so that nothing is routed; look at one that is learned or static"
        )
    with record() as seen:
        encoded, _ = model.encode(inputs)
    places, weights = seen["routed"], seen["routing_weights"]
    if model.model.config.one_router:
        # what it says of the queries holds for the keys
        places, weights = (
            [one for q, ff in zip(x[::2], x[1::2], strict=True) for one in (q, q, ff)] for x in (places, weights)
        )
    empty = encoded.new_zeros(inputs.shape)
    # slots without a token repeat the last one with weight 0
    all_weights = [empty.scatter_add(1, at, w.to(empty.dtype)) for at, w in zip(places, weights, strict=True)]
    routed = [empty.scatter(1, at, 1.0).bool() for at in places]
    shape = (-1, len(ROUTERS))
    return Choices(torch.stack(all_weights).unflatten(0, shape), torch.stack(routed).unflatten(0, shape), encoded)


def recall(routed: Tensor, marked: Tensor) -> Tensor:
    """``routed`` (l, r, b, n) and ``marked`` (b, n) bool give (l, r) (eq. 1); NaN where nothing is marked."""
    return (routed & marked).sum((-2, -1)) / marked.sum()


def agreement(weights: Tensor, real: Tensor) -> Tensor:
    """``weights`` (l, r, b, n) and ``real`` (b, n) bool give (l, pairs) for ``PAIRS`` (eq. 2); NaN for constant weights."""
    x = weights[..., real].double()  # l r tokens
    x = x - x.mean(-1, keepdim=True)
    norm = x.norm(dim=-1)
    pairs = [(x[:, i] * x[:, j]).sum(-1) / (norm[:, i] * norm[:, j]) for i, j in PAIRS]
    return torch.stack(pairs, -1)


def survey(
    model: Answerer, task: Curriculum, *, split: str = "valid", batch: int = 8, rows: int = 64
) -> dict[str, Any]:
    """Recall, agreement and sharpness over the first rows of a held-out split, ready for JSON.

    Returns:
        "recall": what is marked (question, evidence, answer, all) -> layer by layer, router by router; "agreement": layer by
        layer, pair by pair; "sharpness": layer by layer, router by router; "routers", "pairs" and "rows".
    """
    last = task.last
    hits: dict[str, list[Tensor]] = {}
    weights, reals = [], []
    for given in _first(task, split, batch, rows):
        found = choices(model, given["inputs"])
        oracle, real = last.oracle(given["inputs"], given["targets"]), given["inputs"] != 0
        for name, marked in (*oracle._asdict().items(), ("all", real)):
            pair = torch.stack([(found.routed & marked).sum((-2, -1)), marked.sum().expand(found.routed.shape[:2])])
            hits.setdefault(name, []).append(pair.double())
        weights.append(found.weights.flatten(2))
        reals.append(real.flatten())
    x, kept = torch.cat(weights, -1), torch.cat(reals)
    return {
        "recall": {name: _numbers(torch.div(*torch.stack(each).sum(0))) for name, each in hits.items()},
        "agreement": _numbers(agreement(x[:, :, None], kept[None])),
        "sharpness": _numbers(x.square().sum(-1) / x.sum(-1)),
        "routers": list(ROUTERS),
        "pairs": [f"{ROUTERS[i]} with {ROUTERS[j]}" for i, j in PAIRS],
        "rows": min(rows, task.examples),
    }


def _first(task: Curriculum, split: str, batch: int, rows: int) -> Iterable[Mapping[str, Tensor]]:
    for index in range(-(-min(rows, task.examples) // batch)):
        yield task.batch(split, 0, index, batch)


def _numbers(table: Tensor) -> list[list[float | None]]:
    # JSON has no NaN
    return [[None if value != value else round(value, 4) for value in row] for row in table.tolist()]


def heat_map(pieces: Sequence[str], weights: Tensor, marked: Tensor | None = None) -> str:
    """A text as HTML, each piece the darker the more weight (n,) it has; ``marked`` (n,) bool are underlined.

    Weights are shown relative to the greatest.
    """
    top = float(weights.max().clamp(min=1e-12))
    level = (weights / top * _LEVELS).ceil().long().tolist()
    lines = [False] * len(pieces) if marked is None else marked.tolist()
    parts = []
    for (depth, line), run in groupby(zip(pieces, level, lines, strict=True), key=lambda one: (one[1], one[2])):
        text = escape("".join(piece for piece, _, _ in run), quote=False)
        names = " ".join([f"w{depth}"] * (depth > 0) + ["m"] * line)
        parts.append(f'<i class="{names}">{text}</i>' if names and text else text)
    return "".join(parts)


def maps(pieces: Sequence[str], weights: Tensor, marked: Tensor | None = None) -> list[dict[str, str]]:
    """A map of each layer, of the mean over its routers, then of each router, where that are not too many.

    Args:
        pieces: the text of each token.
        weights: (l, r, n).
        marked: (n,) bool, or None.

    Returns:
        "name" and "html" of each.
    """
    found = [
        {"name": f"layer {layer + 1}", "html": heat_map(pieces, each.mean(0), marked)}
        for layer, each in enumerate(weights[:_TABS])
    ]
    for layer, each in enumerate(weights):
        for router, one in zip(ROUTERS, each, strict=True):
            if len(found) < _TABS:
                found.append({"name": f"{layer + 1}: {router}", "html": heat_map(pieces, one, marked)})
    return found


def describe_run(recipe: CoLT5Recipe, step: int) -> str:
    """One line on what was trained."""
    which = {"modules": recipe.ask, "rearrange": recipe.what}.get(recipe.task)
    what = recipe.task if which is None else f"{recipe.task}, {which}"
    tokens = "bytes" if recipe.task == "modules" else "words"
    routed = {
        "none": "no heavy branch",
        "dense": "all of them take the heavy branch",
        "longt5": "LongT5's encoder",
    }.get(recipe.routing, f"{recipe.routing} routing of {recipe.shares[-1]:.4g} of them")
    return (
        f"{what}, {recipe.lengths[-1]:,} {tokens}; {routed}; step {step} of {recipe.steps}, seed {recipe.seed}; {recipe.layers} "
        f"layers of width {recipe.dim}"
    )


def make_page(folder: Path, target: Path, *, split: str = "test", texts: int = 3, rows: int = 64) -> dict[str, Any]:
    """Write what a run routes, as one HTML file.

    Args:
        folder: the run, packed or not.
        target: the HTML file.
        split: "valid" or "test".
        texts: how many are shown.
        rows: how many the figures are over.

    Returns:
        the figures, as :func:`survey`, and "exact_match" over those shown.

    Raises:
        ValueError: no run, or one that routes nothing.
    """
    recipe, task, model, step = open_run(folder)
    found = survey(model, task, split=split, rows=rows)
    examples = []
    for one in held_out(task, split, texts):
        answer = one.say(model.answer(one.tokens, most=task.answer_length)[0])
        weights = choices(model, one.tokens).weights[:, :, 0]
        drawn = maps(one.pieces, weights, one.marked)
        examples.append({"question": one.question, "right": one.right, "given": answer, "maps": drawn})
    match = sum(one["right"] == one["given"] for one in examples)
    title = f"What {folder.name} routes"
    text = pages.render(
        "routing.html.j2",
        folder=TEMPLATES,
        title=title,
        facts=describe_run(recipe, step),
        said=[f"{match} of the {len(examples)} answers shown are right.", *sentences(found)],
        examples=examples,
        found=found,
        charts=training_charts(folder),
        recipe=recipe.to_json(),
    )
    target.write_text(text, encoding="utf-8")
    return {**found, "exact_match": match / max(len(examples), 1)}


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the figures say in words."""
    best = []
    for name in ("answer", "evidence", "question"):
        table = found["recall"][name]
        known = [
            (value, layer, router)
            for layer, row in enumerate(table)
            for router, value in enumerate(row)
            if value is not None
        ]
        if known:
            value, layer, router = max(known)
            share = found["recall"]["all"][layer][router]
            best.append(
                f"Of the {name}'s tokens the {ROUTERS[router]} router of layer {layer + 1} takes {100 * value:.0f} %, of all "
                f"tokens {100 * share:.0f} %."
            )
    return best


def training_charts(folder: Path) -> list[dict[str, str]]:
    """Exact match and sharpness over the steps of a run, as far as they were recorded."""
    if not (folder / "metrics.jsonl").is_file():
        return []
    match = {"in training": curve(folder, "exact_match"), "held out": curve(folder, "valid_exact_match")}
    sharp = {"sharpness": curve(folder, "sharpness")}
    drawn = []
    for series, caption in (
        (match, "Exact match: in training at the length and share of the step, held out at the last ones."),
        (sharp, "Sharpness of the weights, mean over layers and routers."),
    ):
        known = {name: points for name, points in series.items() if points}
        if known:
            svg = charts.lines(known, label="step", title=caption, ours=list(known)[-1])
            drawn.append({"svg": svg, "caption": caption})
    return drawn
