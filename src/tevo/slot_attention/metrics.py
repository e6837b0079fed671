"""How well slots find objects: ARI, FG-ARI, mBO, mIoU on masks and AP on sets, each stating its conventions.

With n_ij the pixels that object i shares with predicted region j, a_i and b_j their sums and n the total:

ARI = (R - E) / ((A + B)/2 - E),   R = sum n_ij (n_ij - 1),  A = sum a_i (a_i - 1),  B = sum b_j (b_j - 1),
E = A B / (n (n - 1))                                                                                (1)
IoU_ij = n_ij / (a_i + b_j - n_ij)                                                                   (2)
mBO = mean over objects i of max_j IoU_ij;   mIoU = max over matchings s of mean_i IoU_i,s(i)        (3)
AP = sum over true positives t of (1/objects) max_{u >= t} precision_u,  by falling confidence       (4)

Masks are id maps (b, ...) of integers, or one mask for each slot (b, k, ...), of which the largest counts.
Everything after the batch is one set of pixels: a video (b, frames, rows, columns) is scored as one volume. Id 0 of
the truth is the background. Counts are integers and ratios float64: float32 loses pixels of a 128 x 128 image.

Sources: deepmind ``multi_object_datasets`` and google-research ``slot-attention-video`` (ARI), google-research
``slot_attention`` (AP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tevo.slot_attention.matching import match

__all__ = [
    "EDGES",
    "Score",
    "ari",
    "average_precision",
    "average_precision_per_image",
    "fg_ari",
    "mean_best_overlap",
    "mean_iou",
    "region_ids",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """A metric, and what it was taken over.

    Args:
        name: the metric.
        value: mean over the images that have one, in [0, 1] (ARI: at most 1); NaN where none has.
        per_image: (b,), NaN where skipped; of a pooled metric, empty.
        images: how many images there were.
        skipped: how many of them have no value and are left out of the mean.
        conventions: what was decided where papers and codes differ.
    """

    name: str
    value: float
    per_image: Tensor
    images: int
    skipped: int
    conventions: Mapping[str, str]

    def __str__(self) -> str:
        stated = "; ".join(f"{key}: {text}" for key, text in self.conventions.items())
        return (
            f"{self.name} {self.value:.4f} over {self.images - self.skipped} images, {self.skipped} skipped ({stated})"
        )


def region_ids(masks: Tensor) -> Tensor:
    """Masks (b, k, ...), soft or not, give the id (b, ...) of the largest slot, the first among equals."""
    return (masks.byte() if masks.dtype == torch.bool else masks).argmax(1)


# where eq. 1 is 0/0, each rule gives the value from two facts about an image (b,): whether it has any counted pixel, and
# whether truth and prediction are one region each over all pixels


def _one(counted: Tensor, single: Tensor) -> Tensor:
    return torch.ones_like(counted, dtype=torch.float64)


def _skip(counted: Tensor, single: Tensor) -> Tensor:
    return torch.where(counted, 1.0, math.nan).double()


def _nan(counted: Tensor, single: Tensor) -> Tensor:
    return torch.where(single, 1.0, math.nan).double()


EDGES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "one": (_one, "1 where ARI is 0/0, images without foreground included (SAVi)"),
    "skip": (_skip, "1 where ARI is 0/0, images without foreground skipped (scikit-learn on the foreground)"),
    "nan": (_nan, "skipped where ARI is 0/0, unless truth and prediction are one region over all pixels (DeepMind)"),
}


def ari(truth: Tensor, predicted: Tensor, *, edge: str = "one", source: str = "not stated") -> Score:
    """Adjusted Rand index over all pixels, the background as one more object (eq. 1).

    Args:
        truth: ids (b, ...), 0 = background.
        predicted: ids (b, ...) or masks (b, k, ...).
        edge: a key of ``EDGES``: what an image scores where eq. 1 is 0/0.
        source: where the prediction came from (decoder alpha, attention), for the record.
    """
    return _ari("ARI", truth, predicted, False, edge, source)


def fg_ari(truth: Tensor, predicted: Tensor, *, edge: str = "one", source: str = "not stated") -> Score:
    """Adjusted Rand index over the foreground pixels alone (eq. 1); arguments as for :func:`ari`."""
    return _ari("FG-ARI", truth, predicted, True, edge, source)


def mean_best_overlap(
    truth: Tensor,
    predicted: Tensor,
    *,
    ignore: Tensor | None = None,
    ignore_background: bool = False,
    source: str = "not stated",
) -> Score:
    """Mean over objects of the best IoU with any region (eq. 3), then over images; mBO-i or mBO-c as the ids are.

    Args:
        truth: ids (b, ...), 0 = background, which is never an object.
        predicted: ids (b, ...) or masks (b, k, ...).
        ignore: (b, ...) bool, True = pixel not counted at all (overlaps, crowds).
        ignore_background: background pixels are not counted in the regions either.
        source: where the prediction came from, for the record.
    """
    overlaps, objects, stated = _overlaps("mBO", truth, predicted, ignore, ignore_background, source)
    best = overlaps.amax(-1).masked_fill(~objects, 0.0).sum(1) / objects.sum(1)
    return _score("mBO", best, {**stated, "regions": "may serve several objects"})


def mean_iou(
    truth: Tensor,
    predicted: Tensor,
    *,
    ignore: Tensor | None = None,
    ignore_background: bool = False,
    source: str = "not stated",
) -> Score:
    """Mean IoU over objects under the best one-to-one matching (eq. 3); arguments as for :func:`mean_best_overlap`.

    An object left without a region counts 0.
    """
    overlaps, objects, stated = _overlaps("mIoU", truth, predicted, ignore, ignore_background, source)
    pairs = match(-overlaps.masked_fill(~objects[..., None], 0.0))
    matched = overlaps[torch.arange(len(overlaps), device=overlaps.device)[:, None], pairs[:, 0], pairs[:, 1]]
    found = matched.masked_fill(~objects.gather(1, pairs[:, 0]), 0.0).sum(1) / objects.sum(1)
    return _score("mIoU", found, {**stated, "regions": "matched one to one (Hungarian)"})


def average_precision(predictions: Tensor, targets: Tensor, *, threshold: float = math.inf) -> Score:
    """AP of sets of CLEVR objects, the detections of all images pooled, as in the official code (eq. 4).

    A detection is true if the nearest real object of its image with the same four attributes is nearer than
    ``threshold`` and no surer detection has claimed it; a second-nearest object is not tried.

    Args:
        predictions: (b, k, 19): 3 coordinates as (c + 3)/6, size 2, material 2, shape 3, colour 8, confidence.
        targets: (b, m, 19) alike, the last 1 for an object, 0 for a padding row.
        threshold: greatest distance in scene units, exclusive.
    """
    true, _, objects = _detections(predictions, targets, threshold)
    pooled = torch.argsort(predictions[..., -1].flatten(), descending=True, stable=True)
    value = _area(true.flatten()[pooled][None], objects.sum()[None])
    stated = _ap_conventions(threshold, "detections of all images pooled")
    return Score(
        name="AP",
        value=float(value),
        per_image=value.new_zeros(0),
        images=len(predictions),
        skipped=0 if objects.any() else len(predictions),
        conventions=stated,
    )


def average_precision_per_image(predictions: Tensor, targets: Tensor, *, threshold: float = math.inf) -> Score:
    """As :func:`average_precision`, but taken within each image and averaged: not comparable with the pooled figure."""
    true, order, objects = _detections(predictions, targets, threshold)
    value = _area(true.gather(1, order), objects)
    return _score("AP", value, _ap_conventions(threshold, "within each image, then averaged"))


def _ari(name: str, truth: Tensor, predicted: Tensor, foreground: bool, edge: str, source: str) -> Score:
    if edge not in EDGES:
        raise ValueError(f"{name} got edge={edge!r}, expected one of {', '.join(EDGES)}")
    rule, words = EDGES[edge]
    background = "its pixels ignored" if foreground else "counted as an object"
    stated = {**_mask_conventions(truth, predicted, source), "background": background, "edge": words}
    truth, ids = _ids(name, truth, predicted)
    counted = truth > 0 if foreground else torch.ones_like(truth, dtype=torch.bool)
    table = _contingency(truth, ids, counted)  # b i j
    pairs, a, b, n = (_ordered_pairs(t) for t in (table, table.sum(2), table.sum(1), table.sum((1, 2))[:, None]))
    # in integers, so that 0/0 is told exactly: A and B are at most n (n - 1), and equal there or at 0
    undefined = (a == b) & ((a == n) | (a == 0))
    # the background row of a one-hot truth without its first column reads as the first object
    regions = torch.where(counted, truth, 1)
    single = (regions == regions[:, :1]).all(1) & (ids == ids[:, :1]).all(1)
    expected = a.double() * (b.double() / n.clamp(min=1))
    value = (pairs - expected) / ((a + b).double() / 2 - expected)  # (eq. 1)
    return _score(name, torch.where(undefined, rule(counted.any(1), single), value), stated)


def _overlaps(
    name: str, truth: Tensor, predicted: Tensor, ignore: Tensor | None, ignore_background: bool, source: str
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """IoU (b, i, j), which i are objects of the image (b, i), and the conventions."""
    if ignore is not None and (ignore.dtype != torch.bool or ignore.shape != truth.shape):
        raise ValueError(
            f"{name} got ignore of dtype {ignore.dtype} and shape {tuple(ignore.shape)}, expected torch.bool of shape "
            f"{tuple(truth.shape)} with True for pixels that do not count"
        )
    background = "its pixels ignored" if ignore_background else "no object, its pixels count in the regions"
    stated = {**_mask_conventions(truth, predicted, source), "background": background}
    stated["ignored pixels"] = "none" if ignore is None else "as given"
    truth, ids = _ids(name, truth, predicted)
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore is None else ~ignore.flatten(1)
    if ignore_background:
        counted = counted & (truth > 0)
    table = _contingency(truth, ids, counted)
    a, b = table.sum(2), table.sum(1)
    iou = table / (a[:, :, None] + b[:, None] - table).clamp(min=1).double()  # (eq. 2)
    objects = a > 0
    objects[:, 0] = False
    return iou, objects, stated


def _ids(name: str, truth: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Both as int64 ids (b, pixels) from 0 up without great gaps, the background still 0."""
    if truth.is_floating_point() or truth.is_complex() or truth.ndim < 2:
        raise ValueError(
            f"{name} got truth of dtype {truth.dtype} and shape {tuple(truth.shape)}, expected integer ids (batch, ...) "
            "with 0 for the background"
        )
    if predicted.ndim == truth.ndim + 1:
        if predicted.isnan().any():
            raise ValueError(
                f"{name} got soft masks with NaN, of which no slot is the largest; look for a diverged model"
            )
        predicted = region_ids(predicted)
    if predicted.shape != truth.shape or predicted.is_floating_point():
        raise ValueError(
            f"{name} got a prediction of shape {tuple(predicted.shape)} and dtype {predicted.dtype} for a truth of shape "
            f"{tuple(truth.shape)}, expected integer ids of that shape or masks (batch, slots, ...) at that resolution"
        )
    truth, predicted = truth.flatten(1).long(), predicted.flatten(1).long()
    for what, ids in (("truth", truth), ("prediction", predicted)):
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(
                f"{name} got negative ids in the {what}, expected 0 for the background and 1, 2, ... above"
            )
    return _compact(truth), _compact(predicted)


def _compact(ids: Tensor) -> Tensor:
    if ids.numel() == 0 or int(ids.max()) < 256:
        return ids
    # 0 must stay 0 even where no pixel has it
    _, inverse = torch.cat([ids.new_zeros(1), ids.flatten()]).unique(return_inverse=True)
    return inverse[1:].view_as(ids)


def _contingency(truth: Tensor, predicted: Tensor, counted: Tensor) -> Tensor:
    """Pixels (b, i, j) with true id i and predicted id j, of those ``counted`` (b, pixels)."""
    batch = len(truth)
    rows, columns = (int(ids.max()) + 1 if ids.numel() else 1 for ids in (truth, predicted))
    image = torch.arange(batch, device=truth.device)[:, None]
    cell = (image * rows + truth) * columns + predicted
    return torch.bincount(cell[counted], minlength=batch * rows * columns).view(batch, rows, columns)


def _ordered_pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1)).flatten(1).sum(1)


def _detections(predictions: Tensor, targets: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which detections are true (b, k), their order of falling confidence (b, k), and the objects of each image (b,)."""
    for what, rows in (("predictions", predictions), ("targets", targets)):
        if rows.ndim != 3 or rows.shape[-1] != 19 or len(rows) != len(predictions):
            raise ValueError(
                f"average precision got {what} of shape {tuple(rows.shape)}, expected (batch, objects, 19) with "
                "coordinates, size, material, shape, colour and a flag"
            )
    if not threshold > 0:
        raise ValueError(
            f"average precision got threshold={threshold}, expected a distance above 0 (math.inf for none)"
        )
    real = targets[..., -1] == 1
    if not (real | (targets[..., -1] == 0)).all():
        raise ValueError(
            "average precision got targets whose last number is neither 1 (an object) nor 0 (a padding row)"
        )
    if predictions.isnan().any():
        raise ValueError("average precision got predictions with NaN, which have no order; look for a diverged model")
    distance = torch.cdist(
        6 * predictions[..., :3].double(), 6 * targets[..., :3].double(), compute_mode="donot_use_mm_for_euclid_dist"
    )  # b k m
    candidate = real[:, None].expand_as(distance)
    for attribute in (slice(3, 5), slice(5, 7), slice(7, 10), slice(10, 18)):
        kind, wanted = (rows[..., attribute].argmax(-1) for rows in (predictions, targets))
        candidate = candidate & (kind[..., None] == wanted[:, None])
    order = torch.argsort(predictions[..., -1], dim=1, descending=True, stable=True)
    k, m = distance.shape[1:]
    if m == 0:
        return real.new_zeros(len(real), k), order, real.sum(1)
    nearest, chosen = distance.masked_fill(~candidate, math.inf).min(-1)
    eligible = candidate.any(-1) & (nearest < threshold) if threshold < math.inf else candidate.any(-1)
    # of the eligible detections of one object only the surest is true
    rank = order.argsort(1).masked_fill(~eligible, k)
    surest = rank.new_full((len(rank), m), k).scatter_reduce(1, chosen, rank, "amin")
    return eligible & (surest.gather(1, chosen) == rank), order, real.sum(1)


def _area(true: Tensor, objects: Tensor) -> Tensor:
    """AP (g,) of groups of detections (g, k) in order of falling confidence, for ``objects`` (g,) to be found (eq. 4)."""
    found = true.cumsum(1).double()
    precision = found / torch.arange(1, true.shape[1] + 1, device=true.device)
    envelope = precision.flip(1).cummax(1).values.flip(1) if true.shape[1] else precision
    return (envelope * true).sum(1) / objects


def _score(name: str, values: Tensor, stated: Mapping[str, str]) -> Score:
    return Score(
        name=name,
        value=float(values.nanmean()),
        per_image=values,
        images=len(values),
        skipped=int(values.isnan().sum()),
        conventions=stated,
    )


def _mask_conventions(truth: Tensor, predicted: Tensor, source: str) -> dict[str, str]:
    regions = "argmax over slots, first among equals" if predicted.ndim > truth.ndim else "ids as given"
    return {"masks": source, "regions from": regions, "compared at": " x ".join(str(size) for size in truth.shape[1:])}


def _ap_conventions(threshold: float, pooling: str) -> dict[str, str]:
    return {
        "threshold": "none" if threshold == math.inf else f"distance < {threshold:g} scene units",
        "pooling": pooling,
        "claims": "nearest object of equal attributes only, surest detection first",
        "equal confidences": "earlier detection first",
    }
