from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tevo.objectives.next_token import NextToken, next_token_loss


def written_out(logits: Tensor, targets: Tensor) -> float:
    nats = []
    for row, answers in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, answer in zip(row, answers, strict=True):
            if answer != -100:
                nats.append(math.log(sum(math.exp(s) for s in scores)) - scores[answer])
    return sum(nats) / len(nats)


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 13, 7, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 7, (3, 13), generator=generator)
    targets[0, :5] = -100
    targets[2] = -100
    return logits, targets


def test_equals_the_sum_written_out() -> None:
    logits, targets = example()
    assert float(next_token_loss(logits, targets)) == pytest.approx(written_out(logits, targets), rel=1e-12)


def test_its_gradient_is_softmax_minus_one_hot_over_the_count() -> None:
    logits, targets = example()
    logits.requires_grad_()
    (found,) = torch.autograd.grad(next_token_loss(logits, targets), logits)
    scored = targets != -100
    expected = (logits.softmax(-1) - nn.functional.one_hot(targets.clamp(min=0), 7)) * scored[..., None] / scored.sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_parts_weighted_by_their_items_give_the_whole() -> None:
    logits, targets = example()
    objective = NextToken()

    class Fixed(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return logits[rows[:, 0]]

    def batch(rows: list[int]) -> dict[str, Tensor]:
        return {"inputs": torch.tensor(rows)[:, None], "targets": targets[rows]}

    items = [int(objective.items(batch([r]))) for r in range(3)]
    assert items == [8, 13, 0]
    parts = [float(objective(Fixed(), batch([r])).total) * items[r] for r in range(3)]
    assert sum(parts) / sum(items) == pytest.approx(float(objective(Fixed(), batch([0, 1, 2])).total), rel=1e-12)


def test_nothing_scored_is_zero_and_not_nan() -> None:
    logits, targets = example()
    assert float(next_token_loss(logits, torch.full_like(targets, -100))) == 0.0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets = example()
    assert next_token_loss(logits.bfloat16(), targets).dtype == torch.float32
    assert next_token_loss(logits, targets).dtype == torch.float64


def test_rows_become_inputs_and_what_follows_them_without_padding() -> None:
    tokens = torch.tensor([[4, 5, 6, 7], [1, 2, 3, 3]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    batch = NextToken().corrupt(tokens, mask=mask, generator=torch.Generator())
    assert batch["inputs"].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert batch["targets"].tolist() == [[5, 6, 7], [2, 3, -100]]
