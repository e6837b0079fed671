from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.slot_half_precision import DTYPES, MODULES, trained
from torch import Tensor, nn

from benchmarks import slot_half_precision
from tevo import tap


class Spoilt(nn.Module):
    """A module whose slots overflow in float16 from the fourth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.calls = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        tap("attention", torch.full((1, 1, 5, 3), 0.25))
        return self.q(x) * (1.0 if self.calls < 4 else math.inf)


def test_what_is_not_finite_is_counted_and_trains_nothing() -> None:
    # a call before training and one at the first look leave one that is sound
    found = trained(Spoilt, torch.bfloat16, 5)
    assert (found["steps"], found["not_finite"]) == (5, 4)
    assert (found["least_won"], found["dead_looks"]) == (3 / 4, 0.0)
    assert found["first_loss"] == found["last_loss"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_module_is_trained_with_a_slot_that_wins_nothing(name: str, dtype: str) -> None:
    found = trained(MODULES[name], DTYPES[dtype], 3)
    assert found["not_finite"] == 0
    # a plan gives every slot its share
    assert (found["dead_looks"] == 1.0) == (name != "sinkhorn")


def test_what_is_stored_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_half_precision, "MODULES", {"plain": MODULES["plain"]})
    file = tmp_path / "a.json"
    monkeypatch.setattr(sys, "argv", ["slot_half_precision", "--out", str(file), "--steps", "2"])
    assert slot_half_precision.main() == 0
    first = json.loads(file.read_text())
    assert [(cell["module"], cell["dtype"]) for cell in first["cells"]] == [("plain", dtype) for dtype in DTYPES]
    monkeypatch.setattr(slot_half_precision, "trained", None)
    assert slot_half_precision.main() == 0
    assert json.loads(file.read_text()) == first
