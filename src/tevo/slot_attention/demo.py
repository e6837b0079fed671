"""The page of ``tevo demo slots``: a trained model on scenes with more objects than it was trained on, and its evidence.

Everything shown is computed when the page is made or read from a record that names the command it came from; what is
missing is said to be missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tevo import charts
from tevo.slot_attention import pixels
from tevo.slot_attention.data.sets import Generated
from tevo.slot_attention.metrics import fg_ari
from tevo.slot_attention.models import SlotAutoencoder
from tevo.slot_attention.pictures import colours_of, decoded, in_terminal, render, rounds, tiles
from tevo.slot_attention.recipes import SlotRecipe
from tevo.slot_attention.training import SlotTask, build_model, build_task, restore
from tevo.training import checkpoint
from tevo.training.loop import Data
from tevo.training.recipe import read

__all__ = ["SHIPPED", "Crowd", "crowd", "describe_run", "make_page", "open_run", "pack", "sharpening"]

# a packed run (recipe.json, weights.safetensors), record.json of its seeds, differences.json and cost.json
SHIPPED = Path(__file__).with_name("shipped")

ROUNDS = 10
SLOTS = range(5, 12)
# objects of a scene of CLEVR at most
MOST = 10
# generators that make as many objects as one asks for, and the most that fit
_CROWDED = {"coloured_shapes": 6}
# scenes of the curves at most, and seconds that drawing them may take
_SCENES, _SECONDS = 64, 12.0
_SHOWN = 3
_LABELS = {"auto": "tevo", "lean": "tevo, memory=lean", "plain": "plain form"}


class Crowd(NamedTuple):
    """Scenes with more objects than in training."""

    images: Tensor  # b 3 h w
    truth: Tensor  # b h w
    trained: int  # objects of a scene in training at most
    how: str


def open_run(folder: Path) -> tuple[SlotRecipe, SlotTask, SlotAutoencoder, int | None]:
    """Recipe, task and model of a run, or of a packed one, whose step is not known.

    Raises:
        ValueError: no run, a damaged one, or one of another model than an autoencoder.
    """
    step: int | None
    if (folder / "weights.safetensors").is_file():
        recipe = read(folder / "recipe.json")
        if not isinstance(recipe, SlotRecipe):
            raise ValueError(f"{folder} holds a run of kind {recipe.kind!r}, expected a slot autoencoder's")
        task = build_task(recipe)
        model, step = build_model(recipe, task), None
        try:
            weights = load_file(folder / "weights.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder}/weights.safetensors is damaged ({error}); pack the run again") from error
        checkpoint.match(weights, model.state_dict(), where=f"{folder}/weights.safetensors")
        model.load_state_dict(weights)
    else:
        recipe, task, model, step = restore(folder)
    if not isinstance(model, SlotAutoencoder) or not isinstance(task, SlotTask):
        raise ValueError(f"{folder} holds a {type(model).__name__}; pictures need a slot autoencoder, which has masks")
    return recipe, task, model, step


def pack(run: Path, folder: Path) -> None:
    """Write the recipe and the weights of a run, without its optimiser, into ``folder``."""
    recipe, _, model, _ = restore(run)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(folder / "recipe.json", recipe.to_json())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")


def describe_run(recipe: SlotRecipe, step: int | None) -> str:
    """One line on what was trained."""
    of = f"step {step} of {recipe.steps}" if step is not None else f"{recipe.steps} steps"
    return (
        f"{recipe.data or f'{recipe.scenes}, {recipe.side} x {recipe.side} pixels'}; {of} of {recipe.batch} scenes, "
        f"seed {recipe.seed}; {recipe.num_slots} slots of width {recipe.dim}, {recipe.iterations} rounds"
    )


def crowd(recipe: SlotRecipe, task: Data, *, count: int) -> Crowd:
    """Held-out scenes with more objects than in training, or fewer than ``count`` of them, where few are found."""
    if recipe.most_objects is not None and recipe.most_objects < MOST:
        trained = recipe.most_objects
        others = build_task(replace(recipe, most_objects=MOST, examples=16 * count))
        rows = _held_out(others, count=count, fewest=trained + 1)
        how = f"held-out scenes of the source of the training scenes, which were those with up to {trained}"
        return Crowd(rows["inputs"], rows["targets"], trained, how)
    trained = max(_objects(ids) for ids in task.batch("train", recipe.seed, 0, 64)["targets"])
    if recipe.scenes in _CROWDED and not recipe.data:
        fewest, most = trained + 1, _CROWDED[recipe.scenes]
        scenes = Generated(recipe.scenes, examples=count, objects=(fewest, most))
        rows = _held_out(SlotTask(scenes=scenes, stride=recipe.stride), count=count)
        how = f"held-out scenes of {fewest} to {most} objects of the generator of the training scenes, which had up to {trained}"
        return Crowd(rows["inputs"], rows["targets"], trained, how)
    rows = _held_out(task, count=4 * count)
    images, truth = rows["inputs"].clone(), rows["targets"].clone()
    kept = []
    for i in range(min(len(images), count)):
        wanted = trained + 1 + i % 3
        for j in range(1, 25):
            other = (i + j) % len(images)
            _lay_over(images[i], truth[i], rows["inputs"][other], rows["targets"][other], most=wanted)
        if _objects(truth[i]) > trained:
            kept.append(i)
    how = (
        f"held-out scenes with objects of other held-out scenes laid where there is room; training had up to {trained}"
    )
    return Crowd(images[kept], truth[kept], trained, how)


def _held_out(task: Data, *, count: int, fewest: int = 0) -> dict[str, Tensor]:
    """The first test scenes with ``fewest`` objects, as many as there are of ``count``."""
    found: list[dict[str, Tensor]] = []
    for rows in task.batches("test", 32):
        kept = [i for i, ids in enumerate(rows["targets"]) if _objects(ids) >= fewest]
        found.append({name: rows[name][kept] for name in ("inputs", "targets")})
        if sum(len(rows["targets"]) for rows in found) >= count:
            break
    return {name: torch.cat([rows[name] for rows in found])[:count] for name in ("inputs", "targets")}


def _lay_over(image: Tensor, truth: Tensor, other: Tensor, ids: Tensor, *, most: int) -> None:
    """Put into a scene objects of another that hide nothing of it, up to ``most`` in all."""
    for i in ids.unique().tolist():
        place = ids == i
        if i > 0 and _objects(truth) < most and not (truth[place] > 0).any():
            image[:, place] = other[:, place]
            truth[place] = truth.max() + 1


def _objects(ids: Tensor) -> int:
    return int((ids.unique() > 0).sum())


class Sharpening(NamedTuple):
    """How slots settle on crowded scenes."""

    over_rounds: list[tuple[int, float]]  # T, FG-ARI in %
    over_slots: list[tuple[int, float]]  # K, FG-ARI in %
    settled: Tensor  # t b k d, slots after each round
    scenes: int
    slots: int
    shown: list[dict[str, Any]]
    refused: str  # why K could not be varied, or ""


@torch.no_grad()
def sharpening(model: SlotAutoencoder, found: Crowd, *, iterations: int) -> Sharpening:
    """FG-ARI over T = 1..10 and K = 5..11, and pictures of some scenes on the way.

    Args:
        model: the autoencoder.
        found: crowded scenes.
        iterations: T at which K is varied.
    """
    slots, most, refused = 1 + max(_objects(ids) for ids in found.truth), SLOTS[-1], ""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(found.images), most, model.slot_attention.dim, generator=generator)
    try:
        starts = model.slot_attention.initial_slots(0, noise=noise)
    except ValueError as error:
        # learned queries are no more than they are
        refused, most = str(error), model.slot_attention.num_slots
        starts = model.slot_attention.initial_slots(0, noise=noise[:, :most])
    slots = min(slots, most)
    count = _affordable(model, found, starts)
    images, truth, starts = found.images[:count], found.truth[:count], starts[:count]
    settled = rounds(model, images, starts[:, :slots], ROUNDS)[0][:ROUNDS]
    over_rounds, masks_of_rounds = [], []
    for t in range(ROUNDS):
        _, masks = model.decoder(settled[t])
        over_rounds.append((t + 1, _percent(truth, masks)))
        masks_of_rounds.append(masks[:_SHOWN])
    over_slots, masks_of_slots = [], []
    for k in range(SLOTS[0], most + 1):
        masks = model(images, slots=starts[:, :k], iterations=iterations).masks
        over_slots.append((k, _percent(truth, masks)))
        masks_of_slots.append(masks[:_SHOWN])
    shown = []
    for i in range(min(_SHOWN, count)):
        lines = []
        for t in (1, 2, 3, 5, ROUNDS):
            cut = tiles(images[i], truth[i], decoded(model, settled[t - 1, i : i + 1]))
            lines.append((f"T = {t}", cut[2:]))
        shown.append(
            {
                "objects": _objects(truth[i]),
                "input": pixels.from_image(images[i]),
                "truth": pixels.from_ids(truth[i]),
                "rounds": [pixels.from_masks(m[i], colours_of(m[i], truth[i])) for m in masks_of_rounds],
                "slots": [
                    (k, pixels.from_masks(m[i], colours_of(m[i], truth[i])))
                    for k, m in zip(SLOTS, masks_of_slots, strict=False)
                ],
                "lines": lines,
            }
        )
    return Sharpening(over_rounds, over_slots, settled, count, slots, shown, refused)


def _percent(truth: Tensor, masks: Tensor) -> float:
    return 100 * fg_ari(truth, masks, source="decoder masks").value


def _affordable(model: SlotAutoencoder, found: Crowd, starts: Tensor) -> int:
    """As many scenes as the curves can have in their time."""
    begin = time.perf_counter()
    model(found.images[:2], slots=starts[:2])
    each = (time.perf_counter() - begin) / 2
    return int(min(len(found.images), max(2 * _SHOWN, _SECONDS / (each * (ROUNDS + len(SLOTS))))))


def make_page(
    folder: Path,
    target: Path,
    *,
    records: Path,
    cost: Mapping[str, Any] | None,
    began: float,
    terminal: tuple[bool, int] = (False, 80),
) -> tuple[str, list[str]]:
    """Write the page of a run.

    Args:
        folder: the run, packed or not.
        target: the HTML file.
        records: folder of record.json, differences.json and cost.json, each of which may be missing.
        cost: live measurements as :func:`tevo.slot_attention.cost.measure` gives them, or None.
        began: time.perf_counter() at the start, for the seconds that the page states.
        terminal: colours or not, and the width in characters, of the text for a terminal.

    Returns:
        scenes as text for a terminal, and sentences on what was found and what is missing.
    """
    recipe, task, model, step = open_run(folder)
    model.eval()
    found = crowd(recipe, task, count=_SCENES)
    if not len(found.images):
        raise ValueError(f"{folder}: no held-out scene has room for more objects than its training scenes")
    seen = sharpening(model, found, iterations=recipe.iterations)
    record, differences, stored = (_read(records / f"{name}.json") for name in ("record", "differences", "cost"))
    best = max(score for _, score in seen.over_rounds)
    # an implicit gradient has rounds of its own
    trained_t = min(recipe.iterations + recipe.implicit, ROUNDS)
    said = [
        f"{seen.scenes} scenes of {found.trained + 1} to {max(_objects(t) for t in found.truth)} objects, where training "
        f"had up to {found.trained}: FG-ARI {dict(seen.over_rounds)[trained_t]:.1f} % after the {trained_t} rounds of training, "
        f"{best:.1f} % at best within {ROUNDS}."
    ]
    text = render(
        "demo.html.j2",
        facts=describe_run(recipe, step),
        run=folder.name if folder != SHIPPED else "the weights that tevo ships",
        said=said,
        how=found.how,
        trained=found.trained,
        seen=seen,
        rounds_chart=charts.curve(seen.over_rounds, label="rounds T", mark=trained_t, marked="as trained"),
        slots_chart=charts.curve(seen.over_slots, label="slots K", mark=recipe.num_slots, marked="as trained")
        if seen.over_slots
        else "",
        differences=_differences(differences),
        cost=_cost(cost, stored),
        seeds=_seeds(record),
        recipe=recipe.to_json(),
        seconds=time.perf_counter() - began,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
    )
    target.write_text(text, encoding="utf-8")
    colour, width = terminal
    lines = []
    with torch.no_grad():
        for t in (1, trained_t, ROUNDS):
            out = decoded(model, seen.settled[t - 1, :1])
            shown = in_terminal(
                found.images[0], found.truth[0], out.masks[0], out.reconstruction[0], colour=colour, width=width
            )
            lines.append(f"T = {t}\n{shown}")
    missing = [
        name for name, there in (("record", record), ("differences", differences), ("cost", stored)) if there is None
    ]
    if missing:
        said.append(
            f"not on the page, since {records} has no such file: {', '.join(f'{name}.json' for name in missing)}"
        )
    return "\n".join(lines), said


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _differences(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Charts of the largest differences from the authors' outputs: see benchmarks/slot_differences.py."""
    if found is None:
        return None
    groups = []
    for group in found["groups"]:
        rows = [
            charts.Bar(row["name"], row["difference"], f"{row['difference']:.1e}", row["ours"]) for row in group["rows"]
        ]
        title = group["title"]
        groups.append({"title": title, "note": group["note"], "chart": charts.lengths(rows, title=title)})
    return {"groups": groups, "command": found["command"], "against": found["against"]}


def _cost(live: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bars of four costs; live ones are solid, those of the stored run hatched, by their ratio to ours."""
    panels = []
    for what, title, unit in (
        ("forward_s", "time, forward", "ms"),
        ("train_s", "time, forward and backward", "ms"),
        ("forward_bytes", "extra memory, forward", "MiB"),
        ("train_bytes", "extra memory, forward and backward", "MiB"),
    ):
        rows = []
        ours = None if live is None else live["forms"]["auto"].get(what)
        scale = 1e3 if unit == "ms" else 2**-20
        for name, numbers in ({} if live is None else live["forms"]).items():
            value = numbers.get(what)
            if value is not None and ours is not None:
                text = f"{charts.short(value * scale)} {unit}, {value / ours:.2f} x"
                rows.append(charts.Bar(_LABELS.get(name, name), value / ours, text, name in ("auto", "lean")))
        for name, numbers in ({} if stored is None else stored["peers"]).items():
            ratio = numbers.get(what)
            if ratio is not None and not (live is not None and name in live["forms"]):
                rows.append(charts.Bar(name, ratio, f"{ratio:.2f} x, stored", False, solid=False))
        if rows:
            panels.append({"title": title, "chart": charts.bars(rows, title=title)})
    return {
        "panels": panels,
        "live": live,
        "stored": stored,
        "errors": [] if live is None else [f"{n}: {f['error']}" for n, f in live["forms"].items() if "error" in f],
    }


def _seeds(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    names: Sequence[str] = list(dict.fromkeys(run["recipe"] for run in record["runs"]))
    groups = [
        charts.Group(
            f"{name} ({sum(run['recipe'] == name for run in record['runs'])} seeds)",
            [100 * run["fg_ari"] for run in record["runs"] if run["recipe"] == name],
            name == record["ours"],
        )
        for name in names
    ]
    lines = {name: 100 * value for name, value in {"chance": record["chance"], **record["baselines"]}.items()}
    return {**record, "chart": charts.dots(groups, lines=lines, title="FG-ARI in % of every seed")}
