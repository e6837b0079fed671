"""Adafactor is the paper's, schedules are T5's, and a run with either optimiser goes on to the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.training.chains import ToyModel, ToyTask, final_hash, toy_recipe
from torch import Tensor, nn

from tevo.objectives.next_token import NextToken
from tevo.training.loop import Result, train
from tevo.training.optimizers import OPTIMIZERS, SCHEDULES
from tevo.training.progress import Silent, Watch

SHORT = {"steps": 12, "save_every": 4, "eval_every": 5}


def written_out(p: Tensor, grads: list[Tensor], rate: float) -> Tensor:
    """Algorithms 4 and 5 of the paper, with the relative step min(rate, 1 / sqrt(t))."""
    v: tuple[Tensor, ...] = ()
    for t, g in enumerate(grads, 1):
        square, beta = g * g + 1e-30, 1 - t**-0.8
        new = (square.mean(-1), square.mean(-2)) if g.ndim == 2 else (square,)
        v = tuple(beta * old + (1 - beta) * one for old, one in zip(v or new, new, strict=True))
        estimate = torch.outer(v[0], v[1]) / v[0].mean() if g.ndim == 2 else v[0]
        u = g / estimate.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        p = p - min(rate, t**-0.5) * max(1e-3, float(p.square().mean().sqrt())) * u
    return p


@pytest.mark.parametrize("shape", [(13, 7), (12,)])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_adafactor_is_the_paper_s(shape: tuple[int, ...], size: float) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g, dtype=torch.float64)
    # growing, so that the clipping of updates matters
    grads = [size * (1 + 3 * t) * torch.randn(shape, generator=g, dtype=torch.float64) for t in range(9)]
    p = nn.Parameter(start.clone())
    optimizer = OPTIMIZERS["adafactor"].make([{"params": [p], "weight_decay": 0.0}], toy_recipe(lr=0.45))
    for grad in grads:
        p.grad = grad
        optimizer.step()
    # the rate's bound 1 / sqrt(t) is reached at the fifth step
    torch.testing.assert_close(p.detach(), written_out(start, grads, 0.45), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(5, 3), (4,), (2, 5, 3)])
def test_what_an_optimiser_keeps_is_what_it_says(name: str, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = OPTIMIZERS[name].make([{"params": [p], "weight_decay": 0.0}], toy_recipe())
    p.grad = torch.randn(shape)
    optimizer.step()
    found, said = optimizer.state[p], OPTIMIZERS[name].state(p)
    assert {k: (v.shape, v.dtype, v.device) for k, v in found.items()} == {
        k: (v.shape, v.dtype, v.device) for k, v in said.items()
    }


def test_schedules_are_t5_s() -> None:
    t5 = toy_recipe(steps=10**6, lr=0.01, warmup=0.01)
    for step in (0, 1, 9_999, 10_000, 40_000, 999_999):
        assert SCHEDULES["inverse_sqrt"](t5, step) == pytest.approx(1 / math.sqrt(max(step + 1, 10**4)))
    constant = toy_recipe(steps=100, lr=1e-3, warmup=0.0)
    assert {SCHEDULES["constant"](constant, step) for step in range(100)} == {1e-3}
    warm = toy_recipe(steps=100, lr=1e-3, warmup=0.1)
    assert [SCHEDULES["constant"](warm, step) for step in (0, 4, 9, 50)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3])


class Pulled(Silent):
    def advance(self, step: int, steps: int, numbers: object) -> None:
        if step == 7:
            raise RuntimeError("pulled the plug")


def run(folder: Path, watch: Watch | None = None) -> Result:
    return train(
        toy_recipe(**SHORT),
        build=lambda: ToyModel(),
        objective=NextToken(),
        task=ToyTask(),
        folder=folder,
        watch=watch,
        optimizer=OPTIMIZERS["adafactor"],
        rate=SCHEDULES["inverse_sqrt"],
    )


def test_a_run_by_adafactor_cut_off_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="pulled"):
        run(tmp_path / "cut", Pulled())
    assert run(tmp_path / "cut").finished
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    # each takes up its own moments only
    with pytest.raises(ValueError, match=r"does not fit this model: it lacks .*exp_avg"):
        (tmp_path / "cut" / "checkpoints" / "step-00000012").rename(tmp_path / "gone")
        train(toy_recipe(**SHORT), build=ToyModel, objective=NextToken(), task=ToyTask(), folder=tmp_path / "cut")
