"""Pictures of what a slot autoencoder does with scenes: parts, masks, attention round by round, and where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tevo import pages
from tevo.slot_attention import pixels
from tevo.slot_attention.diagnose import Finding, diagnose
from tevo.slot_attention.metrics import fg_ari, region_ids
from tevo.slot_attention.models import Decomposition, SlotAutoencoder
from tevo.slot_attention.pixels import Pixels
from tevo.taps import record
from tevo.training.loop import Data

__all__ = ["Survey", "View", "colours_of", "decoded", "in_terminal", "render", "rounds", "survey", "tiles", "view"]

# pixels of a picture's longer side in the files that are written
_SIDE = 140


class Survey(NamedTuple):
    """Scenes, what slots started from and became, and how well they found the objects."""

    images: Tensor  # n 3 h w
    truth: Tensor  # n h w
    starts: Tensor  # n k d
    slots: Tensor  # n k d
    scores: Tensor  # n, FG-ARI; NaN where there is none


class View(NamedTuple):
    """What :func:`view` found and wrote."""

    page: Path
    files: list[Path]
    fg_ari: float
    findings: list[Finding]
    scenes: str


@torch.no_grad()
def survey(
    model: SlotAutoencoder,
    task: Data,
    *,
    split: str,
    batch: int,
    num_slots: int | None = None,
    iterations: int | None = None,
) -> Survey:
    """All scenes of a held-out split, with the initial slots that :func:`tevo.training.loop.evaluate` draws."""
    found = []
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for rows in task.batches(split, batch):
            images, truth = rows["inputs"], rows["targets"]
            starts = model.slot_attention.initial_slots(len(images), num_slots)
            out: Decomposition = model(images, slots=starts, iterations=iterations)
            scores = fg_ari(truth, out.masks, source="decoder masks").per_image
            found.append(Survey(images, truth, starts, out.slots, scores))
    return Survey(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def rounds(model: SlotAutoencoder, images: Tensor, starts: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Slots (t, b, k, d) and attention (t, b, k, h, w), mean of the heads, after each round.

    An implicit gradient adds rounds of its own to ``iterations``.
    """
    model.eval()
    with record() as seen:
        model.slot_attention(model.encoder(images), slots=starts, iterations=iterations)
    attention = torch.stack(seen["attention"]).mean(2).unflatten(-1, model.encoder.grid)
    return torch.stack(seen["slots"]), attention


def colours_of(masks: Tensor, truth: Tensor) -> list[int]:
    """A colour for each of the slots ``masks`` (k, h, w): its object's of ``truth`` (h, w), or one that is free.

    Objects and slots are paired by falling overlap over union.
    """
    regions = region_ids(masks[None])[0]
    ids = truth.unique().tolist()
    overlaps = []
    for k in range(len(masks)):
        for i in ids:
            both, either = ((regions == k) & (truth == i)).sum(), ((regions == k) | (truth == i)).sum()
            overlaps.append((float(both / either), -k, i))
    chosen: dict[int, int] = {}
    for overlap, k, i in sorted(overlaps, reverse=True):
        if overlap > 0 and -k not in chosen and i not in chosen.values():
            chosen[-k] = i
    free = iter(i for i in range(1, len(ids) + len(masks) + 1) if i not in ids)
    return [chosen[k] if k in chosen else next(free) for k in range(len(masks))]


def tiles(image: Tensor, truth: Tensor, out: Decomposition) -> list[tuple[str, Pixels]]:
    """Pictures with their titles: input, truth, reconstruction, masks, then each slot cut out by its mask.

    Args:
        image: (3, h, w) in [-1, 1].
        truth: ids (h, w).
        out: of this one image.
    """
    masks = out.masks[0]
    colours = colours_of(masks, truth)
    square = max(1, image.shape[-1] // 12)
    slots = [
        (f"slot {k + 1}", pixels.checkered(pixels.cutout(out.colours[0, k], masks[k]), square=square))
        for k in range(len(masks))
    ]
    return [
        ("input", pixels.from_image(image)),
        ("truth", pixels.from_ids(truth)),
        ("reconstruction", pixels.from_image(out.reconstruction[0])),
        ("masks", pixels.from_masks(masks, colours)),
        *slots,
    ]


def in_terminal(
    image: Tensor, truth: Tensor, masks: Tensor, reconstruction: Tensor, *, colour: bool, width: int
) -> str:
    """Input, truth, reconstruction and masks side by side, at most ``width`` characters wide."""
    step = -(-4 * (image.shape[-1] + pixels.GAP) // width)
    thin = (..., slice(step // 2, None, step), slice(step // 2, None, step))
    pictures: list[str]
    if colour:
        shown = [
            pixels.from_image(image[thin]),
            pixels.from_ids(truth[thin]),
            pixels.from_image(reconstruction[thin]),
            pixels.from_masks(masks[thin], colours_of(masks, truth)),
        ]
        pictures = [pixels.as_text(picture, colour=True) for picture in shown]
    else:
        named = torch.tensor(colours_of(masks, truth))[region_ids(masks[None])[0]]
        pictures = [
            pixels.as_text(pixels.from_image(image[thin]), colour=False),
            pixels.as_letters(truth[thin]),
            pixels.as_text(pixels.from_image(reconstruction[thin]), colour=False),
            pixels.as_letters(named[thin]),
        ]
    wide = image[thin].shape[-1] + pixels.GAP
    titles = "".join(t[: wide - 1].ljust(wide) for t in ("input", "truth", "reconstruction", "masks"))
    between = " " * pixels.GAP
    lines = [between.join(parts) for parts in zip(*(p.split("\n") for p in pictures), strict=True)]
    return "\n".join([titles.rstrip(), *lines])


@torch.no_grad()
def view(
    model: SlotAutoencoder,
    task: Data,
    folder: Path,
    *,
    title: str,
    facts: str,
    split: str = "test",
    batch: int = 64,
    scenes: int = 6,
    num_slots: int | None = None,
    iterations: int | None = None,
    terminal: tuple[bool, int] = (False, 80),
) -> View:
    """Write ``index.html`` and PNG files into ``folder``.

    Args:
        model: an autoencoder.
        task: where scenes come from.
        folder: is made if it is not there.
        title: of the page.
        facts: what the page says of the run, below its title.
        split: held-out split.
        batch: scenes at once.
        scenes: shown of the split's beginning, and again as many of those found worst.
        num_slots: K; by default the model's.
        iterations: T; by default the model's.
        terminal: colours or not, and the width in characters, of the text for a terminal.
    """
    whole = survey(model, task, split=split, batch=batch, num_slots=num_slots, iterations=iterations)
    count = min(scenes, len(whole.images))
    order = whole.scores.nan_to_num(nan=2.0).argsort(stable=True)[:count].tolist()
    first = [_scene(model, whole, i) for i in range(count)]
    worst = [_scene(model, whole, i) for i in order]
    times = model.slot_attention.iterations if iterations is None else iterations
    looks = [_attention(model, whole, i, times) for i in range(min(2, count))]
    findings = diagnose(model, whole.images[:batch], whole.truth[:batch], starts=whole.starts[:batch])
    mean = float(whole.scores.nanmean())
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in {
        **{f"scene-{i:02}.png": _strip(scene) for i, scene in enumerate(first)},
        **{f"attention-{i:02}.png": _sheet(look) for i, look in enumerate(looks)},
        "failures.png": pixels.below([_strip(scene) for scene in worst], gap=8),
    }.items():
        files.append(folder / name)
        files[-1].write_bytes(pixels.as_png(picture))
    text = render(
        "view.html.j2",
        title=title,
        facts=facts,
        split=split,
        fg_ari=mean,
        count=len(whole.images),
        skipped=int(whole.scores.isnan().sum()),
        slots=whole.slots.shape[1],
        iterations=times,
        scenes=first,
        failures=worst,
        looks=looks,
        findings=findings,
    )
    target = folder / "index.html"
    target.write_text(text, encoding="utf-8")
    out = decoded(model, whole.slots[:1])
    colour, width = terminal
    shown = in_terminal(
        whole.images[0], whole.truth[0], out.masks[0], out.reconstruction[0], colour=colour, width=width
    )
    return View(target, files, mean, findings, shown)


def render(template: str, **values: Any) -> str:
    """A page from ``templates``.

    Raises:
        ValueError: jinja2 is missing.
    """
    folder = Path(__file__).with_name("templates")
    return pages.render(template, folder=folder, filters={"uri": pixels.as_uri}, **values)


def _scene(model: SlotAutoencoder, whole: Survey, i: int) -> dict[str, Any]:
    out = decoded(model, whole.slots[i : i + 1])
    return {"number": i, "fg_ari": float(whole.scores[i]), "tiles": tiles(whole.images[i], whole.truth[i], out)}


def decoded(model: SlotAutoencoder, slots: Tensor) -> Decomposition:
    """What the decoder makes of slots (b, k, d)."""
    colours, masks = model.decoder(slots)
    return Decomposition((masks[:, :, None] * colours).sum(1), colours, masks, slots)


def _attention(model: SlotAutoencoder, whole: Survey, i: int, iterations: int) -> dict[str, Any]:
    _, attention = rounds(model, whole.images[i : i + 1], whole.starts[i : i + 1], iterations)
    rows = [[pixels.from_weights(weights) for weights in each[0]] for each in attention]
    return {"number": i, "input": pixels.from_image(whole.images[i]), "rows": rows}


def _strip(scene: dict[str, Any]) -> Pixels:
    pictures = [picture for _, picture in scene["tiles"]]
    return pixels.beside([pixels.enlarged(p, _times(p)) for p in pictures], gap=6)


def _sheet(look: dict[str, Any]) -> Pixels:
    return pixels.below(
        [pixels.beside([pixels.enlarged(p, _times(p)) for p in row], gap=6) for row in look["rows"]], gap=6
    )


def _times(picture: Pixels) -> int:
    return max(1, _SIDE // max(picture.shape[:2]))
