from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tests.training.test_lm import StopsAt, same, tensors

from tevo.slot_attention import training as slots
from tevo.slot_attention.models import Decomposition
from tevo.slot_attention.recipes import PRESETS, SlotRecipe
from tevo.slot_attention.training import Reconstruction, SlotTask
from tevo.training.loop import evaluate

SMALL: dict[str, Any] = {
    **PRESETS["laptop"],
    "dim": 8,
    "hidden_dim": 12,
    "channels": 6,
    "batch": 4,
    "examples": 6,
    "steps": 8,
    "save_every": 3,
    "eval_every": 5,
    "threads": 1,
}


@pytest.mark.parametrize("options", [{}, {"implicit": 1}], ids=["unrolled", "implicit"])
def test_an_autoencoder_cut_off_and_resumed_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = SlotRecipe(**SMALL, **options)
    slots.run(recipe, folder=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        slots.run(recipe, folder=tmp_path / "cut", watch=StopsAt(5))
    slots.run(recipe, folder=tmp_path / "cut")
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_a_restored_run_scores_as_it_did_whenever_it_is_asked(tmp_path: Path) -> None:
    result = slots.run(SlotRecipe(**SMALL), folder=tmp_path)
    recipe, task, model, step = slots.restore(tmp_path)
    assert (recipe, step) == (SlotRecipe(**SMALL), 8)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate(model, task, split="valid", batch=recipe.batch) == pytest.approx(result.score, abs=1e-12)


def test_batches_are_slices_of_one_set_for_each_seed_and_split() -> None:
    task = SlotTask(scenes="tetrominoes_like", stride=2, examples=7)
    whole = task.batch("train", 3, 0, 6)
    parts = [task.batch("train", 3, index, 2) for index in range(3)]
    for name in ("inputs", "targets"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    held = [torch.cat([rows["targets"] for rows in task.batches("valid", size)]) for size in (2, 5)]
    assert len(held[0]) == 7
    assert torch.equal(held[0], held[1])
    others = [task.batch("train", 4, 0, 6), task.batch("valid", 3, 0, 6), task.batch("test", 3, 0, 6)]
    assert all(not torch.equal(other["targets"], whole["targets"]) for other in others)
    assert whole["inputs"].shape == (6, 3, 18, 18)
    assert (whole["inputs"].min(), whole["inputs"].max()) == (-1, pytest.approx(1, abs=0.3))


def test_past_the_end_and_unknown_splits_are_refused() -> None:
    task = SlotTask(scenes="tetrominoes_like", examples=3)
    with pytest.raises(ValueError, match="past the end of 'test', of 3 scenes"):
        task.batch("test", 0, 1, 3)
    with pytest.raises(ValueError, match="split is 'dev'"):
        task.batch("dev", 0, 0, 3)


def test_the_score_is_the_mean_rand_index_of_the_foreground() -> None:
    task = SlotTask(scenes="tetrominoes_like", stride=2, examples=5)
    ids = task.batch("valid", 0, 0, 5)["targets"]
    masks = torch.rand(5, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    total, count = task.score(Decomposition(masks, masks, masks, masks), ids)
    expected = [
        adjusted_rand_score(true[true > 0], mask.argmax(0)[true > 0]) for true, mask in zip(ids, masks, strict=True)
    ]
    assert count == 5
    assert float(total) == pytest.approx(sum(expected), abs=1e-9)


def test_baselines_are_what_they_say() -> None:
    task = SlotTask(scenes="tetrominoes_like", stride=2, examples=64)
    assert abs(task.chance) < 0.02
    assert task.baselines["one slot"] == 0.0
    # right but where two pieces have one colour, which is in 96 of 216 scenes
    assert 0.6 < task.baselines["hue"] < 0.9


def test_the_loss_is_the_mean_squared_error_of_the_reconstruction() -> None:
    recipe = SlotRecipe(**SMALL)
    task = slots.build_task(recipe)
    model = slots.build_model(recipe, task).double()
    rows = {name: value.double() for name, value in task.batch("train", 0, 0, 3).items()}
    torch.manual_seed(0)
    total = Reconstruction()(model, rows).total
    torch.manual_seed(0)
    y = model(rows["inputs"])
    again = (y.masks[:, :, None] * y.colours).sum(1) - rows["inputs"]
    assert float(total.detach()) == pytest.approx(float((again.detach() ** 2).sum() / again.numel()), rel=1e-12)
