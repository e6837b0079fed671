"""Matching: exact against enumeration and against the reference's stored matchings."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tevo.slot_attention.matching import hungarian_huber, match, pairwise_huber

pytest.importorskip("scipy")

GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention"
CASES = ("case0", "case1", "case2", "case3", "case4")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_matching_equal_the_reference(case: str) -> None:
    with np.load(GOLDEN / "ap_hungarian_a.npz") as data:
        predictions, targets = (torch.from_numpy(data[f"{case}/{name}"]) for name in ("pred", "target"))
        loss, pairs = hungarian_huber(predictions, targets)
        # padding rows tie, so this holds in the reference's own float32 only
        assert torch.equal(pairs, torch.from_numpy(data[f"{case}/huber_indices"]))
        assert abs(float(loss) - float(data[f"{case}/huber_loss"])) <= 1e-6


def test_costs_matching_and_gradient_equal_the_reference_in_double_precision() -> None:
    with np.load(GOLDEN / "set_prediction_small_a.npz") as data:
        predictions = torch.from_numpy(data["out/predictions_f64"]).requires_grad_()
        targets = torch.from_numpy(data["in/target"]).double()
        loss, pairs = hungarian_huber(predictions, targets)
        (gradient,) = torch.autograd.grad(loss, predictions)
        assert torch.equal(pairs, torch.from_numpy(data["out/indices_row_target_col_pred"]))
        for found, name in (
            (pairwise_huber(targets, predictions), "out/pairwise_cost_f64"),
            (loss, "out/loss_f64"),
            (gradient, "grad/predictions"),
        ):
            np.testing.assert_allclose(found.detach().numpy(), data[name], rtol=0, atol=1e-12)


def test_huber_is_quadratic_within_one_and_linear_beyond() -> None:
    targets, predictions = 2 * draw(2, 4, 5), 2 * draw(2, 3, 5, seed=2)
    found = pairwise_huber(targets, predictions)
    for b in range(2):
        for i in range(4):
            for j in range(3):
                terms = [abs(float(z)) for z in targets[b, i] - predictions[b, j]]
                mean = sum(z * z / 2 if z <= 1 else z - 0.5 for z in terms) / 5
                assert abs(float(found[b, i, j]) - mean) <= 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (5, 3)])
def test_no_enumerated_matching_is_cheaper(rows: int, columns: int) -> None:
    cost = draw(6, rows, columns)
    pairs = match(cost)
    assert pairs.shape == (6, 2, min(rows, columns))
    for matrix, (r, c) in zip(cost, pairs, strict=True):
        tall = matrix if rows <= columns else matrix.T
        least = min(
            float(sum(tall[i, j] for i, j in enumerate(order)))
            for order in permutations(range(tall.shape[1]), len(tall))
        )
        assert len(set(r.tolist())) == len(set(c.tolist())) == min(rows, columns)
        assert abs(float(matrix[r, c].sum()) - least) <= 1e-12


def test_loss_does_not_depend_on_the_order_of_objects_or_slots() -> None:
    predictions, targets = draw(3, 5, 7), draw(3, 5, 7, seed=2)
    loss, _ = hungarian_huber(predictions, targets)
    other, _ = hungarian_huber(predictions[:, [3, 1, 4, 0, 2]], targets[:, [2, 0, 1, 4, 3]])
    assert abs(float(loss - other)) <= 1e-12


def test_gradient_of_the_loss_is_that_of_the_matched_pairs() -> None:
    predictions, targets = draw(2, 5, 7).requires_grad_(), draw(2, 3, 7, seed=2)
    loss, pairs = hungarian_huber(predictions, targets)
    (gradient,) = torch.autograd.grad(loss, predictions)
    expected = torch.zeros_like(predictions)
    for b in range(2):
        for i, j in pairs[b].T.tolist():
            # the derivative of the Huber function is its argument, clipped to one
            expected[b, j] = (predictions[b, j] - targets[b, i]).detach().clamp(-1, 1) / 7 / 2
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_costs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        match(torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="expected \\(batch, slots, width\\)"):
        hungarian_huber(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
