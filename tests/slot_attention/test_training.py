from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tests.training.test_lm import StopsAt, same, tensors

from tevo.slot_attention import training as slots
from tevo.slot_attention.aggregation import WeightedMean
from tevo.slot_attention.competition import Mesh
from tevo.slot_attention.data import Generated, clevr_lite, multi_dsprites_like, set_targets
from tevo.slot_attention.gradient import BiLevel
from tevo.slot_attention.models import Decomposition, SetPrediction, SlotSetPredictor
from tevo.slot_attention.recipes import PRESETS, SlotRecipe
from tevo.slot_attention.training import Annealed, Reconstruction, SetLoss, SetTask, SlotTask, evaluated
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


SET: dict[str, Any] = {name: value for name, value in SMALL.items() if not name.startswith("decoder")} | {
    "model": "set_predictor",
    "encoder_strides": (2, 2),
    "num_slots": 5,
    "stride": 1,
}


@pytest.fixture
def clevr(tmp_path: Path) -> str:
    np.savez(tmp_path / "clevr.npz", **clevr_lite(0, range(30), size=(16, 16), samples=1, objects=(3, 5)))
    return str(tmp_path / "clevr.npz")


@pytest.fixture
def sprites(tmp_path: Path) -> str:
    made = multi_dsprites_like(0, range(30))
    np.savez(tmp_path / "sprites.npz", image=made["image"][:, ::2, ::2], ids=made["ids"][:, ::2, ::2])
    return str(tmp_path / "sprites.npz")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"implicit": 1},
        {"attention": "bo_qsa", "noise_steps": 6},
        {"attention": "mesh"},
        {"attention": "isa_tsr"},
        {"data": "sprites", "decoder_grid": 8},
        {**SET, "data": "clevr"},
    ],
    ids=["unrolled", "implicit", "bo_qsa", "mesh", "isa", "file", "set"],
)
def test_a_model_cut_off_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if "data" in options:
        options = {**options, "data": request.getfixturevalue(options["data"])}
    recipe = SlotRecipe(**({**SMALL, **options} if options.get("model") != "set_predictor" else options))
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


def test_every_preset_builds_its_model() -> None:
    for name, values in PRESETS.items():
        recipe = SlotRecipe(**values)
        task = SlotTask(scenes="tetrominoes_like")
        model = slots.build_model(recipe, task)
        assert model.slot_attention.num_slots == recipe.num_slots, name
        assert isinstance(model, SlotSetPredictor) == (recipe.model == "set_predictor"), name
    # counted in the released code
    numbers = {
        name: sum(p.numel() for p in slots.build_model(SlotRecipe(**PRESETS[name]), task).parameters())
        for name in ("clevr6", "clevr10-set")
    }
    assert numbers == {"clevr6": 890_308, "clevr10-set": 380_755}


def test_the_attention_named_is_the_attention_built() -> None:
    mesh = slots.build_attention(SlotRecipe(**SMALL, attention="mesh"))
    assert mesh.competition == Mesh()
    query = slots.build_attention(SlotRecipe(**SMALL, attention="bo_qsa"))
    assert (query.gradient, query.aggregation) == (BiLevel(), WeightedMean(eps=0.0, offset=1.0))
    assert float(query.get_buffer("slots_sigma")) == 0.0
    assert query.input_dim == SMALL["channels"]


def test_the_noise_of_the_queries_falls_to_nothing() -> None:
    recipe = SlotRecipe(**SMALL, attention="bo_qsa", noise_steps=4)
    task = slots.build_task(recipe)
    model = slots.build_model(recipe, task)
    objective = slots.build_objective(recipe)
    assert isinstance(objective, Annealed)
    batch, seen = task.batch("train", 0, 0, 2), []
    for _ in range(6):
        for _ in range(2):  # micro-batches share a step
            objective(model, batch)
        seen.append(float(model.slot_attention.get_buffer("slots_sigma")))
        objective.after_step()
    assert seen == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0], abs=1e-6)


def test_other_data_under_the_same_name_are_not_resumed(tmp_path: Path, sprites: str) -> None:
    recipe = SlotRecipe(**{**SMALL, "data": sprites, "decoder_grid": 8})
    with pytest.raises(RuntimeError):
        slots.run(recipe, folder=tmp_path / "run", watch=StopsAt(5))
    made = multi_dsprites_like(1, range(30))
    np.savez(sprites, image=made["image"][:, ::2, ::2], ids=made["ids"][:, ::2, ::2])
    with pytest.raises(ValueError, match="was made with other data"):
        slots.run(recipe, folder=tmp_path / "run")


def test_files_that_do_not_fit_the_model_are_refused(tmp_path: Path, sprites: str, clevr: str) -> None:
    with pytest.raises(ValueError, match="the decoder makes 18 x 18 pixels of scenes of 16 x 16"):
        slots.run(SlotRecipe(**{**SMALL, "data": sprites}), folder=tmp_path / "run")
    with pytest.raises(ValueError, match="the scenes have no x, y, z, size, material"):
        slots.run(SlotRecipe(**{**SET, "data": sprites}), folder=tmp_path / "run")
    scenes = {name: values for name, values in np.load(clevr).items() if name != "ids"}
    np.savez(tmp_path / "a.npz", **scenes)
    with pytest.raises(ValueError, match="the scenes have no ids, which FG-ARI needs"):
        slots.run(SlotRecipe(**{**SMALL, "data": str(tmp_path / "a.npz")}), folder=tmp_path / "run")
    np.savez(tmp_path / "b.npz", **{**scenes, "image": scenes["image"][:, :, 1:]})
    with pytest.raises(ValueError, match="has scenes of 16 x 15 pixels, expected square ones"):
        slots.run(SlotRecipe(**{**SET, "data": str(tmp_path / "b.npz")}), folder=tmp_path / "run")


def test_a_file_of_a_generators_scenes_gives_what_the_generator_gives(clevr: str) -> None:
    made = SetTask(scenes=Generated("clevr_lite", objects=(3, 5), size=16, whole_frame=True)).batch("train", 0, 0, 2)
    scene = clevr_lite(0, range(2), size=(16, 16), objects=(3, 5), crop=(0, 240, 0, 320))
    assert torch.equal(made["targets"], torch.from_numpy(set_targets(scene)))
    assert made["targets"].shape == (2, 10, 19)
    assert torch.equal(made["inputs"], torch.from_numpy(scene["image"]).movedim(-1, 1) / 127.5 - 1)


def test_the_set_loss_is_that_of_the_best_of_all_matchings() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = (torch.randn(3, 4, 19, dtype=torch.float64, generator=generator) for _ in range(2))

    class Fixed(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> SetPrediction:
            return SetPrediction(predictions, predictions)

    loss = SetLoss()(Fixed(), {"inputs": torch.zeros(3), "targets": targets}).total
    best = []
    for p, y in zip(predictions, targets, strict=True):
        z = (p[:, None] - y).abs()
        cost = torch.where(z <= 1, z**2 / 2, z - 0.5).mean(-1)
        best.append(min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in permutations(range(4))))
    assert float(loss) == pytest.approx(sum(best) / 3, abs=1e-12)


def test_perfect_predictions_have_full_precision_at_every_threshold(clevr: str) -> None:
    recipe = SlotRecipe(**{**SET, "data": clevr})
    task = slots.build_task(recipe)
    rows = list(task.batches("test", 4))
    figures = task.figures((SetPrediction(one["targets"], one["targets"]), one["targets"]) for one in rows)
    assert figures == {"AP inf": 1.0, "AP 1": 1.0, "AP 0.5": 1.0, "AP 0.25": 1.0, "AP 0.125": 1.0}
    moved = [one["targets"].clone() for one in rows]
    for one in moved:
        one[..., 0] += 0.3 / 6  # 0.3 units of the scene
    off = task.figures((SetPrediction(a, a), b["targets"]) for a, b in zip(moved, rows, strict=True))
    assert [off[name] for name in ("AP inf", "AP 1", "AP 0.5", "AP 0.25")] == [1.0, 1.0, 1.0, 0.0]
    total, count = task.score(SetPrediction(moved[0], moved[0]), rows[0]["targets"])
    assert float(total / count) == 1.0
    assert task.chance < 0.1
    assert task.baselines["another scene"] < 0.2


def test_an_evaluation_is_that_of_training_unless_it_is_asked_otherwise(tmp_path: Path) -> None:
    result = slots.run(SlotRecipe(**SMALL), folder=tmp_path)
    recipe, task, model, _ = slots.restore(tmp_path)

    def ask(**options: int) -> float:
        return evaluated(model, task, split="valid", batch=recipe.batch, **options)["FG-ARI"]

    assert ask() == pytest.approx(result.score, abs=1e-12)
    assert ask(num_slots=4, iterations=3, init_seed=0) == ask()
    others = [ask(init_seed=1), ask(num_slots=6), ask(iterations=1)]
    assert len({ask(), *others}) == 4
    assert ask(init_seed=1) == others[0]


def test_a_task_may_have_more_objects_than_its_recipe() -> None:
    task = slots.build_task(SlotRecipe(**SMALL), Generated("tetrominoes_like", examples=4, objects=(5, 5)))
    ids = torch.cat([rows["targets"] for rows in task.batches("test", 3)])
    assert ids.shape[0] == 4
    assert all(len(one.unique()) == 6 for one in ids)
