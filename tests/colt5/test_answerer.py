"""The loss of answers: its weights, its parts, and the same with layers that are computed again."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from tests.colt5.test_training import SMALL

from tevo.colt5 import answerer, training
from tevo.objectives.next_token import IGNORED


def test_exact_matches_are_counted_where_a_task_says_what_is_exact() -> None:
    task = training.build_task(SMALL)
    torch.manual_seed(0)
    model, batch = training.build_model(SMALL, task), task.batch("train", 0, 0, 4)
    counted, plain = (answerer.Answers(SMALL, one)(model, batch) for one in (task, None))
    assert counted.total.item() == plain.total.item()
    assert set(counted.parts) - set(plain.parts) == {"exact_match"}


def test_sharpness_is_one_for_weights_of_zero_and_one_and_their_mean_where_flat() -> None:
    assert float(answerer.sharpness([torch.tensor([[1.0, 1.0, 0.0]])])) == 1
    assert float(answerer.sharpness([torch.full((2, 5), 0.2), torch.ones(2, 5)])) == pytest.approx(0.6)


def test_the_loss_weighs_slices_by_their_scored_targets() -> None:
    objective = answerer.Answers(SMALL, training.build_task(SMALL))
    batch = {"inputs": torch.zeros(2, 3), "targets": torch.tensor([[4, 1], [1, IGNORED]])}
    assert int(objective.items(batch)) == 3


def test_recomputed_layers_give_the_same_loss() -> None:
    task = training.build_task(SMALL)
    torch.manual_seed(0)
    model = training.build_model(SMALL, task)
    objective = answerer.Answers(SMALL, training.build_task(SMALL))
    objective.step.fill_(5)
    batch, found = task.batch("train", 0, 5, 4), []
    for on in (False, True):
        model.checkpoint_activations = on
        assert model.checkpoint_activations is on
        model.zero_grad()
        loss = objective(model, batch)
        loss.total.backward()
        found.append((loss.total.item(), loss.parts["sharpness"].item(), float(model.model.lm_head.weight.grad.norm())))
    assert found[0] == pytest.approx(found[1]) and math.isfinite(found[0][0])
