from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tevo.training import checkpoint, lm
from tevo.training.progress import Silent
from tevo.training.recipe import LanguageModelRecipe

SMALL: dict[str, Any] = {
    "task": "recall",
    "length": 26,
    "dim": 12,
    "depth": 2,
    "heads": 3,
    "batch": 4,
    "examples": 6,
    "steps": 8,
    "save_every": 3,
    "eval_every": 5,
    "dropout": 0.1,
    "threads": 1,
}


class StopsAt(Silent):
    def __init__(self, last: int) -> None:
        self.last = last

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        if step == self.last:
            raise RuntimeError("pulled the plug")


def tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(folder)
    assert newest is not None
    return {k: v for k, v in checkpoint.load(newest).tensors.items() if k.startswith(prefix)}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "rope", "channel": "relu", "residual": "post_norm"}, {"mixer": ("softmax", "linear_attention")}],
    ids=["plain", "parts", "mixed"],
)
def test_a_language_model_cut_off_and_resumed_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = LanguageModelRecipe(**SMALL, **options)
    lm.run(recipe, folder=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        lm.run(recipe, folder=tmp_path / "cut", watch=StopsAt(5))
    lm.run(recipe, folder=tmp_path / "cut")
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    lm.run(LanguageModelRecipe(**SMALL), folder=tmp_path / "kept")
    lm.run(LanguageModelRecipe(**SMALL, checkpoint_activations=True), folder=tmp_path / "recomputed")
    assert same(tensors(tmp_path / "kept"), tensors(tmp_path / "recomputed"))


def test_a_restored_model_is_the_trained_one(tmp_path: Path) -> None:
    result = lm.run(LanguageModelRecipe(**SMALL), folder=tmp_path)
    recipe, task, model, step = lm.restore(tmp_path)
    assert recipe == LanguageModelRecipe(**SMALL)
    assert (step, task.name) == (result.step, "recall")
    stored = {k.removeprefix("trainee.model."): v for k, v in tensors(tmp_path, "trainee.model.").items()}
    assert same(dict(model.state_dict()), stored)


def test_a_recipe_changed_by_one_digit_is_refused(tmp_path: Path) -> None:
    lm.run(LanguageModelRecipe(**SMALL), folder=tmp_path)
    path = tmp_path / "recipe.json"
    text = path.read_text()
    assert '"examples": ' in text
    path.write_text(text.replace('"examples": ', '"examples": 1', 1))
    with pytest.raises(ValueError, match=r"recipe\.json is not the one that checkpoint step-\d+ was made with"):
        lm.restore(tmp_path)


def test_embeddings_do_not_decay(tmp_path: Path) -> None:
    from tevo.training.loop import parameter_groups

    recipe = LanguageModelRecipe(**SMALL)
    model = lm.build_model(recipe, lm.build_task(recipe))
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    assert any(p is model.embedding.weight for p in spared["params"])
    assert all(p.ndim >= 2 for p in decayed["params"])
