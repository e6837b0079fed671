"""Recipes on text: presets, the paper's figures, schedules, and options that are refused where they mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tevo.colt5.text_recipes import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneRecipe, PretrainRecipe
from tevo.training.recipe import read, resolve

EVERY = [
    *((PretrainRecipe, name) for name in PRETRAIN_PRESETS),
    *((FinetuneRecipe, name) for name in FINETUNE_PRESETS),
]


@pytest.mark.parametrize(("cls", "preset"), EVERY)
def test_presets_resolve_and_read_back_equal(
    cls: type[PretrainRecipe | FinetuneRecipe], preset: str, tmp_path: Path
) -> None:
    recipe = resolve(cls, preset=preset)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read(tmp_path / "recipe.json") == recipe


def test_the_paper_s_figures() -> None:
    before, after = resolve(PretrainRecipe, preset="paper-base"), resolve(FinetuneRecipe, preset="paper-base")
    assert (before.steps, before.batch, before.length, before.share(0)) == (10**6, 256, 4096, 1 / 8)
    assert (before.optimizer, before.schedule, before.dropout) == ("adafactor", "inverse_sqrt", 0)
    # the peak holds for the first 10,000 steps
    assert before.lr == 0.01 and before.warmup * before.steps == 10**4
    assert (after.batch, after.length, after.share(0), after.dropout) == (128, 16384, 1 / 16, 0.1)
    assert (after.optimizer, after.schedule, after.lr, after.warmup) == ("adafactor", "constant", 1e-3, 0)


def test_the_paper_s_base_has_the_paper_s_number_of_parameters() -> None:
    pytest.importorskip("transformers")
    import torch

    from tevo.colt5.text_training import build_model

    with torch.device("meta"):
        recipe = resolve(PretrainRecipe, preset="paper-base")
        model = build_model(recipe, type("Vocabulary", (), {"vocab": 32128})())  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) == 432_810_240


def test_share_and_softness_go_from_the_first_to_the_last_number() -> None:
    recipe = PretrainRecipe(steps=101, shares=(1.0, 0.25), eps=(1.0, 0.25))
    assert [recipe.share(step) for step in (0, 40, 80, 100, 500)] == pytest.approx([1, 0.5, 0.25, 0.25, 0.25])
    assert [recipe.softness(step) for step in (0, 50, 100, 500)] == pytest.approx([1, 0.5, 0.25, 0.25])
    assert PretrainRecipe(routing="dense").share(7) == 1.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\) have no use for optimizer=adafactor"),
        ({"final_lr": 0.5}, "final_lr=0.5 has no use for schedule=inverse_sqrt"),
        ({"schedule": "constant", "steps": 20000}, r"lr=0.01 would be above 1 / sqrt\(step\) at step 20000"),
        ({"lr": 0.1, "steps": 10000}, "at step 1000, which adafactor never takes; make lr at most 0.0316"),
        ({"precision": "fp16"}, "activations of the T5 family overflow"),
        ({"compile": True}, "compile is true"),
        ({"shares": (1.0, 0.0)}, "shares are"),
        ({"eps": (1.0, 0.0)}, "eps are"),
        ({"length": 5}, "length is 5, expected at least 16"),
        ({"heavy_dim": 0}, "heavy_dim is 0"),
        ({"vocab": -1}, "vocab is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PretrainRecipe(**options)  # type: ignore[arg-type]


def test_adamw_takes_averages_and_a_cosine_that_ends() -> None:
    PretrainRecipe(optimizer="adamw", schedule="cosine", betas=(0.9, 0.99), final_lr=0.5, lr=0.1)


def test_recipes_need_no_torch() -> None:
    code = "import sys; import tevo.colt5.text_recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
