"""Metrics: the stored values of the reference codes, plain loops, and what each result says of itself."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tevo.slot_attention.metrics import (
    ari,
    average_precision,
    average_precision_per_image,
    fg_ari,
    mean_best_overlap,
    mean_iou,
    region_ids,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention"
ARI_CASES = [
    "random",
    "noisy",
    "perfect",
    "permuted",
    "merged",
    "split",
    "one_slot",
    "uniform_ties",
    "single_object_bg_separate",
    "single_object_all_one_slot",
    "single_object_split",
    "no_object",
]
# edge convention -> suffix of the implementation that has it
EDGES = {"one": "savi", "skip": "sklearn", "nan": "dm"}


def ints(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("case", ARI_CASES)
def test_ari_equals_the_implementation_that_has_the_edge(case: str, edge: str) -> None:
    with np.load(GOLDEN / "ari_a.npz") as data:
        truth = torch.from_numpy(data[f"{case}/true_ids"])
        soft = torch.from_numpy(data[f"{case}/pred_prob"]).movedim(-1, 1)
        for metric, name in ((ari, "ari"), (fg_ari, "fg_ari")):
            found = metric(truth, soft, edge=edge)
            expected = data[f"{case}/{name}_{EDGES[edge]}"].astype(np.float64)
            # two of the three computed in float32
            np.testing.assert_allclose(found.per_image.numpy(), expected, rtol=0, atol=1e-6)
            assert found.skipped == np.isnan(expected).sum()
            if found.skipped < len(expected):
                assert abs(found.value - np.nanmean(expected)) <= 1e-6
            else:
                assert math.isnan(found.value)


def one_hot_fg_ari(truth: np.ndarray, predicted: np.ndarray) -> float:
    """DeepMind's convention in its own terms: one-hot masks of one image, that of the background left out."""
    t, p = np.eye(5)[truth.ravel()][:, 1:], np.eye(5)[predicted.ravel()]
    if len(set(t.argmax(1))) == 1 and len(set(p.argmax(1))) == 1:
        return 1.0
    n, total = t.T @ p, t.sum()
    r, a, b = ((x * (x - 1)).sum() for x in (n, n.sum(1), n.sum(0)))
    with np.errstate(invalid="ignore"):
        chance = a * b / (total * (total - 1))
        return float((r - chance) / ((a + b) / 2 - chance))


def test_the_edge_of_deepmind_equals_its_terms_on_scenes_of_few_pixels() -> None:
    # six pixels of few ids: every edge is met, a lone object of id 1 and of another id too
    truth = torch.cat([ints(high, 300, 2, 3, seed=high) for high in (2, 3, 5)])
    truth[:40] = 2 * truth[:40]
    predicted = torch.cat([ints(high, 300, 2, 3, seed=9 + high) for high in (1, 2, 4)])
    expected = [one_hot_fg_ari(t, p) for t, p in zip(truth.numpy(), predicted.numpy(), strict=True)]
    found = fg_ari(truth, predicted, edge="nan")
    np.testing.assert_allclose(found.per_image.numpy(), expected, rtol=0, atol=1e-12)
    assert 0 < found.skipped < 900 and expected.count(1.0) > 10


def test_the_default_edge_is_that_of_savi() -> None:
    truth, predicted = torch.zeros(2, 3, 3, dtype=torch.long), ints(3, 2, 3, 3)
    assert fg_ari(truth, predicted).per_image.tolist() == [1.0, 1.0]
    assert "SAVi" in fg_ari(truth, predicted).conventions["edge"]


def test_regions_of_one_pixel_each_are_an_edge_too() -> None:
    """No pair of pixels is joined on either side: 0/0 again, though nothing is in one region."""
    truth, predicted = torch.arange(1, 7)[None], torch.arange(6).flip(0)[None]
    assert [fg_ari(truth, predicted, edge=edge).value for edge in ("one", "skip")] == [1.0, 1.0]
    assert fg_ari(truth, predicted, edge="nan").skipped == 1
    # joined on one side alone, it is chance
    assert fg_ari(truth, torch.zeros_like(predicted)).value == 0.0


def test_ari_equals_counting_pairs_of_pixels() -> None:
    """Of all pairs of pixels, how many the two partitions agree to join, against what chance would join."""
    truth, predicted = ints(4, 5, 6, 7), ints(3, 5, 6, 7, seed=2)
    found = fg_ari(truth, predicted).per_image
    for b in range(5):
        t, p = (x[b][truth[b] > 0] for x in (truth, predicted))
        upper = torch.ones(len(t), len(t), dtype=torch.bool).triu(1)
        same_t, same_p = ((x[:, None] == x)[upper] for x in (t, p))
        both, a, c, n = (int(x.sum()) for x in (same_t & same_p, same_t, same_p, upper))
        chance = a * c / n
        assert abs(float(found[b]) - (both - chance) / ((a + c) / 2 - chance)) <= 1e-12


def test_ari_does_not_depend_on_names_or_order_of_pixels() -> None:
    truth, predicted = ints(4, 3, 35), ints(5, 3, 35, seed=2)
    shuffle = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    names = torch.tensor([0, 70_000, 3, 12])
    other = fg_ari(names[truth][:, shuffle], (4 - predicted)[:, shuffle])
    torch.testing.assert_close(other.per_image, fg_ari(truth, predicted).per_image, rtol=0, atol=1e-12)


def test_counts_of_large_images_lose_no_pixel() -> None:
    """One pixel of 512 x 512 in another region: float32 sums of squares would not see it."""
    truth = torch.ones(1, 512, 512, dtype=torch.uint8)
    truth[:, :256] = 2
    predicted = truth.clone()
    predicted[0, 0, 0] = 1
    n, half = 512 * 512, 512 * 256
    a = 2 * half * (half - 1)
    b = (half + 1) * half + (half - 1) * (half - 2)
    r = half * (half - 1) + (half - 1) * (half - 2)
    chance = a * b / (n * (n - 1))
    expected = (r - chance) / ((a + b) / 2 - chance)
    assert 0 < 1 - expected < 2e-5
    assert abs(fg_ari(truth, predicted).value - expected) <= 1e-12


def test_a_video_is_scored_as_one_volume() -> None:
    truth, predicted = ints(4, 2, 3, 5, 7), ints(4, 2, 3, 5, 7, seed=2)
    found = fg_ari(truth, predicted)
    assert torch.equal(found.per_image, fg_ari(truth.flatten(1), predicted.flatten(1)).per_image)
    assert found.conventions["compared at"] == "3 x 5 x 7"


def best_and_matched(truth: Tensor, predicted: Tensor, counted: Tensor) -> tuple[float, float]:
    """mBO and mIoU of one image from sets of pixels, the matching by enumeration."""
    t, p = (x[counted].tolist() for x in (truth, predicted))
    places = {name: [{i for i, y in enumerate(x) if y == v} for v in set(x)] for name, x in (("t", t), ("p", p))}
    objects = [s for v, s in zip(set(t), places["t"], strict=True) if v > 0]
    iou = [[len(o & r) / len(o | r) for r in places["p"]] for o in objects]
    padded = [row + [0.0] * len(objects) for row in iou]
    matched = max(
        sum(row[j] for row, j in zip(padded, order, strict=True))
        for order in permutations(range(len(padded[0])), len(objects))
    )
    return sum(max(row) for row in iou) / len(objects), matched / len(objects)


@pytest.mark.parametrize("ignore_background", [False, True])
@pytest.mark.parametrize("regions", [2, 5])
def test_overlaps_equal_loops_over_sets_of_pixels(regions: int, ignore_background: bool) -> None:
    pytest.importorskip("scipy")
    truth, predicted = ints(4, 5, 6, 7), ints(regions, 5, 6, 7, seed=2)
    # the first image lacks an object, so that empty rows of the table are met
    truth[0][truth[0] == 2] = 1
    ignore = ints(5, 5, 6, 7, seed=3) == 0
    best = mean_best_overlap(truth, predicted, ignore=ignore, ignore_background=ignore_background)
    matched = mean_iou(truth, predicted, ignore=ignore, ignore_background=ignore_background)
    for b in range(5):
        counted = ~ignore[b] & ((truth[b] > 0) | (not ignore_background))
        mbo, miou = best_and_matched(truth[b], predicted[b], counted)
        assert abs(float(best.per_image[b]) - mbo) <= 1e-12
        assert abs(float(matched.per_image[b]) - miou) <= 1e-12


def test_images_without_objects_are_skipped_and_counted() -> None:
    pytest.importorskip("scipy")
    truth = ints(3, 4, 5, 5)
    truth[1] = 0
    for metric in (mean_best_overlap, mean_iou):
        found = metric(truth, truth)
        assert (found.images, found.skipped, found.value) == (4, 1, 1.0)
        assert "1 skipped" in str(found)


def test_the_first_of_equal_slots_wins() -> None:
    soft = torch.full((2, 3, 4, 4), 1 / 3)
    soft[1, 1:] = 0.4
    assert torch.equal(region_ids(soft), torch.tensor([0, 1])[:, None, None].expand(2, 4, 4))
    assert torch.equal(region_ids(soft > 0.35), region_ids(soft))


def test_every_result_states_its_conventions() -> None:
    pytest.importorskip("scipy")
    truth, soft = ints(3, 2, 5, 6), torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    for metric in (ari, fg_ari, mean_best_overlap, mean_iou):
        stated = metric(truth, soft, source="decoder alpha").conventions
        assert stated["masks"] == "decoder alpha"
        assert stated["regions from"] == "argmax over slots, first among equals"
        assert stated["compared at"] == "5 x 6"
        assert "background" in stated
        assert metric(truth, truth).conventions["regions from"] == "ids as given"
    for edge in EDGES:
        assert str(fg_ari(truth, soft, edge=edge)).count("edge:") == 1


@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case3", "case4", "perfect", "wrong"])
def test_ap_equals_the_official_code(case: str) -> None:
    with np.load(GOLDEN / "ap_hungarian_a.npz") as data:
        predictions, targets = (torch.from_numpy(data[f"{case}/{name}"]) for name in ("pred", "target"))
        for threshold, expected in zip(data["thresholds"], data[f"{case}/ap"], strict=True):
            found = average_precision(predictions, targets, threshold=math.inf if threshold < 0 else float(threshold))
            # the official code holds precision and recall in float32
            assert abs(found.value - expected) <= 1e-6


def scene(batch: int, slots: int, objects: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random objects and detections near them, a third of them of other attributes."""
    rng = np.random.default_rng(seed)
    targets = np.zeros((batch, objects, 19))
    targets[..., :3] = rng.uniform(0, 1, (batch, objects, 3))
    for start, size in ((3, 2), (5, 2), (7, 3), (10, 8)):
        # few kinds, so that several objects of an image share theirs
        kinds = rng.integers(0, 2 if start == 3 else 1, (batch, objects))
        targets[..., start : start + size] = np.eye(size)[kinds]
    targets[..., 18] = rng.uniform(size=(batch, objects)) < 0.8
    predictions = targets[:, rng.integers(0, objects, slots)] + 0.1 * rng.normal(size=(batch, slots, 19))
    predictions[..., 18] = rng.uniform(size=(batch, slots))
    return torch.from_numpy(predictions), torch.from_numpy(targets)


def looped_ap(predictions: Tensor, targets: Tensor, threshold: float) -> float:
    """One detection after the other, then the area under the step curve of precision over recall."""
    found = [(float(row[18]), b, row) for b, rows in enumerate(predictions) for row in rows]
    claimed, true = set(), []
    for _, b, row in sorted(found, key=lambda entry: -entry[0]):
        nearest, chosen = math.inf, None
        for j, other in enumerate(targets[b]):
            alike = all(row[s:e].argmax() == other[s:e].argmax() for s, e in ((3, 5), (5, 7), (7, 10), (10, 18)))
            distance = float((6 * (row[:3] - other[:3])).norm())
            if other[18] == 1 and alike and distance < nearest:
                nearest, chosen = distance, (b, j)
        true.append(chosen is not None and nearest < threshold and chosen not in claimed)
        if true[-1]:
            claimed.add(chosen)
    objects = int(targets[..., 18].sum())
    points = [(sum(true[:i]) / objects, sum(true[:i]) / i) for i in range(1, len(true) + 1)]
    area, reached = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - reached) * max(precision for _, precision in points[i:])
        reached = recall
    return area


@pytest.mark.parametrize("threshold", [math.inf, 1.0, 0.3])
@pytest.mark.parametrize(("slots", "objects"), [(6, 5), (4, 7), (9, 3)])
def test_ap_equals_a_loop_over_detections(slots: int, objects: int, threshold: float) -> None:
    predictions, targets = scene(7, slots, objects)
    targets[:, 0, 18] = 1
    pooled = average_precision(predictions, targets, threshold=threshold)
    assert abs(pooled.value - looped_ap(predictions, targets, threshold)) <= 1e-12
    alone = average_precision_per_image(predictions, targets, threshold=threshold)
    looped = [looped_ap(predictions[b : b + 1], targets[b : b + 1], threshold) for b in range(7)]
    np.testing.assert_allclose(alone.per_image.numpy(), looped, rtol=0, atol=1e-12)
    assert 0 < pooled.value < 1
    assert abs(pooled.value - alone.value) > 1e-3
    assert pooled.conventions["pooling"] != alone.conventions["pooling"]


def test_a_claimed_object_leaves_nothing_for_a_second_detection() -> None:
    _, targets = scene(1, 2, 2)
    targets[0, :, 3:18] = targets[0, :1, 3:18]
    targets[0, :, :3] = torch.tensor([[0.2, 0.2, 0.5], [0.4, 0.2, 0.5]])
    targets[..., 18] = 1
    # both detections are nearest to the first object; the second object is within reach, but not tried
    predictions = targets[:, [0, 0]].clone()
    predictions[0, :, 18] = torch.tensor([0.9, 0.8])
    assert average_precision(predictions, targets, threshold=2.0).value == 0.5


def test_empty_sets_are_skipped() -> None:
    predictions, targets = scene(3, 4, 5)
    targets[..., 18] = 1
    targets[1, :, 18] = 0
    assert average_precision_per_image(predictions, targets).skipped == 1
    targets[..., 18] = 0
    pooled = average_precision(predictions, targets)
    assert math.isnan(pooled.value) and pooled.skipped == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, p: fg_ari(t, p, edge="two"), "edge='two'"),
        (lambda t, p: fg_ari(t.float(), p), "integer ids"),
        (lambda t, p: fg_ari(t, p[:, :2]), "at that resolution"),
        (lambda t, p: fg_ari(t, p.float()), "at that resolution"),
        (lambda t, p: fg_ari(-t, p), "negative ids"),
        (lambda t, p: fg_ari(t, torch.full((2, 3, 4, 5), math.nan)), "NaN"),
        (lambda t, p: mean_best_overlap(t, p, ignore=t), "torch.bool"),
        (lambda t, p: average_precision(torch.zeros(1, 2, 18), torch.zeros(1, 2, 19)), "predictions of shape"),
        (lambda t, p: average_precision(torch.zeros(1, 2, 19), torch.full((1, 2, 19), 0.5)), "neither 1"),
        (lambda t, p: average_precision(torch.zeros(1, 2, 19), torch.zeros(1, 2, 19), threshold=-1), "threshold=-1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(ints(3, 2, 4, 5), ints(3, 2, 4, 5, seed=2))  # type: ignore[operator]
