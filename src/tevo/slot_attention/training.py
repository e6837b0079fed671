"""The slot program: from a recipe to scenes, model and objective.

An autoencoder is trained on (eq. 1), a set predictor on the cost of the best matching (:mod:`tevo.slot_attention.matching`).

L = mean over images, channels and pixels of (image' - image)^2,   image in [-1, 1]                    (1)
sigma = (1 + cos(pi min(step / steps, 1))) / 2                                                       (2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.bench.tasks import HELD_OUT
from tevo.contracts import Loss, Objective
from tevo.slot_attention.aggregation import WeightedMean
from tevo.slot_attention.competition import Mesh
from tevo.slot_attention.data import Scene, set_targets
from tevo.slot_attention.data.sets import Generated, SceneSet, Stored
from tevo.slot_attention.gradient import BiLevel, Implicit
from tevo.slot_attention.init import Background, LearnedQueries
from tevo.slot_attention.invariant import (
    Frame,
    Translation,
    TranslationScale,
    TranslationScaleRotation,
    invariant_autoencoder,
)
from tevo.slot_attention.matching import hungarian_huber
from tevo.slot_attention.metrics import average_precision, average_precision_per_image, fg_ari
from tevo.slot_attention.models import Decomposition, SetPrediction, SlotAutoencoder, SlotEncoder, SlotSetPredictor
from tevo.slot_attention.module import SlotAttention
from tevo.slot_attention.patches import PatchDecoder, PatchEncoder
from tevo.slot_attention.presets import DropPath
from tevo.slot_attention.recipes import SlotRecipe
from tevo.training.loop import Result, restore_model, train
from tevo.training.progress import Watch
from tevo.training.recipe import of_run

__all__ = [
    "THRESHOLDS",
    "Annealed",
    "Reconstruction",
    "SetLoss",
    "SetTask",
    "SlotModel",
    "SlotTask",
    "build_attention",
    "build_model",
    "build_scenes",
    "build_task",
    "evaluated",
    "measured",
    "restore",
    "run",
]

SlotModel = SlotAutoencoder | SlotSetPredictor
THRESHOLDS = (math.inf, 1.0, 0.5, 0.25, 0.125)
FRAMES: dict[str, Frame] = {
    "isa_t": Translation(),
    "isa_ts": TranslationScale(),
    "isa_tsr": TranslationScaleRotation(),
}


class Reconstruction(Objective):
    """Mean squared error of a model that gives a :class:`tevo.slot_attention.models.Decomposition` (eq. 1)."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` holds ``inputs`` (b, 3, h, w)."""
        return Loss(F.mse_loss(model(batch["inputs"]).reconstruction, batch["inputs"]), {})


class SetLoss(Objective):
    """Huber cost of the best matching between predicted and true objects, padding rows included."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` holds ``inputs`` (b, 3, h, w) and ``targets`` (b, 10, 19)."""
        return Loss(hungarian_huber(model(batch["inputs"]).predictions, batch["targets"])[0], {})


class Annealed(Objective):
    """Another objective, while the noise of learned queries falls from 1 to 0 (eq. 2).

    Args:
        objective: what is minimised.
        steps: until there is no noise.
    """

    step: Tensor

    def __init__(self, *, objective: Objective, steps: int) -> None:
        super().__init__()
        self.objective, self.steps = objective, steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """As the other objective's; ``model.slot_attention`` starts from learned queries."""
        done = (self.step / self.steps).clamp(max=1)
        model.get_buffer("slot_attention.slots_sigma").copy_((1 + (math.pi * done).cos()) / 2)
        loss: Loss = self.objective(model, batch)
        return loss

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """As the other objective's."""
        return self.objective.items(batch)

    def after_step(self) -> None:
        """Count."""
        self.step += 1


class SlotTask:
    """Scenes to take apart, scored by FG-ARI of the decoder's masks.

    Args:
        scenes: where they come from, or a generator's name.
        stride: every n-th row and column is kept.
        examples: scenes of each held-out split, where ``scenes`` is a name.
    """

    name = "slots"
    metric = "fg_ari"
    higher_is_better = True

    def __init__(self, *, scenes: SceneSet | str, stride: int = 1, examples: int = 320) -> None:
        self.scenes: SceneSet = Generated(scenes, examples=examples) if isinstance(scenes, str) else scenes
        self.stride = stride
        self.facts: dict[str, Any] = {**self.scenes.facts, "stride": stride, "examples": self.rows("valid")}

    def rows(self, split: str) -> int:
        """How many scenes a held-out split has."""
        return self.scenes.held(split)

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """Scenes ``index * size`` onwards, of the set of ``seed``, which has no end, or of a held-out set without seed.

        Returns:
            "inputs" (size, 3, h, w) in [-1, 1], and "targets" (size, h, w), ids of the objects, 0 the background.

        Raises:
            ValueError: no such split, or a batch past the end of one.
        """
        made = _taken(self.scenes, split, seed, index, size)
        _need(made, ("ids",), "FG-ARI")
        kept = slice(None, None, self.stride)
        return {
            "inputs": _pixels(made, self.stride),
            "targets": torch.from_numpy(made["ids"][:, kept, kept].astype(np.int64)),
        }

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All scenes of a held-out split, once each."""
        for index in range(-(-self.rows(split) // size)):
            yield self.batch(split, 0, index, size)

    def score(self, outputs: Decomposition, targets: Tensor) -> tuple[Tensor, Tensor]:
        """FG-ARI as (sum, scenes): SAVi's and scikit-learn's convention, 1 where it is 0/0."""
        return _summed(fg_ari(targets, outputs.masks, source="decoder masks").per_image)

    def figures(self, found: Iterable[tuple[Decomposition, Tensor]]) -> dict[str, float]:
        """What is reported of outputs and targets, batch by batch: name -> share of 1."""
        return {"FG-ARI": _ratio([self.score(outputs, targets) for outputs, targets in found])}

    @cached_property
    def chance(self) -> float:
        """FG-ARI of pixels that fall to one of 4 slots at random, on the valid split."""
        generator = torch.Generator().manual_seed(0)
        return self._on_valid(lambda rows: torch.rand(len(rows), 4, *rows.shape[2:], generator=generator))

    @cached_property
    def baselines(self) -> dict[str, float]:
        """On the valid split: all pixels in one slot; pixels grouped by which of red, green and blue they have."""
        return {
            "one slot": self._on_valid(lambda rows: torch.ones(len(rows), 1, *rows.shape[2:])),
            "hue": self._on_valid(_hues),
        }

    def _on_valid(self, masks: Callable[[Tensor], Tensor]) -> float:
        found = [
            _summed(fg_ari(rows["targets"], masks(rows["inputs"]), source="a baseline").per_image)
            for rows in self.batches("valid", 64)
        ]
        return _ratio(found)


class SetTask:
    """Scenes whose objects are to be listed, scored by average precision.

    While training, precision is taken within each image, because that can be summed over batches; what is reported in
    the end is the official one, of the detections of all images together.

    Args:
        scenes: where they come from.
        stride: every n-th row and column is kept.
    """

    name = "slots"
    metric = "ap_per_image"
    higher_is_better = True

    def __init__(self, *, scenes: SceneSet, stride: int = 1) -> None:
        self.scenes, self.stride = scenes, stride
        self.facts: dict[str, Any] = {
            **scenes.facts,
            "stride": stride,
            "examples": self.rows("valid"),
            "targets": "objects",
        }

    def rows(self, split: str) -> int:
        """How many scenes a held-out split has."""
        return self.scenes.held(split)

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """As :meth:`SlotTask.batch`, with "targets" (size, 10, 19) as :func:`tevo.slot_attention.data.set_targets`."""
        made = _taken(self.scenes, split, seed, index, size)
        _need(made, ("x", "y", "z", "size", "material", "shape", "color", "visibility"), "the objects of CLEVR")
        return {"inputs": _pixels(made, self.stride), "targets": torch.from_numpy(set_targets(made))}

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All scenes of a held-out split, once each."""
        for index in range(-(-self.rows(split) // size)):
            yield self.batch(split, 0, index, size)

    def score(self, outputs: SetPrediction, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Average precision within each image, at any distance, as (sum, scenes)."""
        return _summed(average_precision_per_image(outputs.predictions, targets).per_image)

    def figures(self, found: Iterable[tuple[SetPrediction, Tensor]]) -> dict[str, float]:
        """As :meth:`SlotTask.figures`: the official average precision at each threshold, in units of the scene."""
        pairs = [(outputs.predictions, targets) for outputs, targets in found]
        return _precisions(*(torch.cat(side) for side in zip(*pairs, strict=True)))

    @cached_property
    def chance(self) -> float:
        """AP of uniformly random predictions, at any distance, on the valid split."""
        generator = torch.Generator().manual_seed(0)
        targets = self._valid_targets()
        return _precisions(torch.rand(targets.shape, generator=generator), targets)["AP inf"]

    @cached_property
    def baselines(self) -> dict[str, float]:
        """AP at any distance, on the valid split: the objects of another scene."""
        targets = self._valid_targets()
        return {"another scene": _precisions(targets.roll(1, 0), targets)["AP inf"]}

    def _valid_targets(self) -> Tensor:
        return torch.cat([rows["targets"] for rows in self.batches("valid", 64)])


def _precisions(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    return {f"AP {t:g}": average_precision(predictions, targets, threshold=t).value for t in THRESHOLDS}


def _taken(scenes: SceneSet, split: str, seed: int, index: int, size: int) -> Scene:
    if split != "train" and split not in HELD_OUT:
        raise ValueError(f"slots: split is {split!r}, expected 'train', 'valid' or 'test'")
    first, last = index * size, (index + 1) * size
    if split in HELD_OUT:
        rows = scenes.held(split)
        if first >= rows:
            raise ValueError(f"slots: batch {index} of {size} is past the end of {split!r}, of {rows} scenes")
        last = min(last, rows)
    return scenes.take(split, seed, first, last)


def _pixels(made: Scene, stride: int) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1]; those of one channel are shown in grey."""
    image = np.moveaxis(made["image"], -1, 1)[..., ::stride, ::stride]
    return torch.from_numpy(image.astype(np.float32)).expand(-1, 3, -1, -1) / 127.5 - 1


def _need(made: Scene, names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if name not in made]
    if missing:
        raise ValueError(f"the scenes have no {', '.join(missing)}, which {what} needs; they have {', '.join(made)}")


def _summed(values: Tensor) -> tuple[Tensor, Tensor]:
    kept = ~values.isnan()
    return values[kept].sum().double(), kept.sum().double()


def _ratio(sums: list[tuple[Tensor, Tensor]]) -> float:
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


def _hues(images: Tensor) -> Tensor:
    """Masks (b, 8, h, w) of pixels that have the same of red, green and blue: what a model that sees no places can do."""
    places = torch.tensor([1, 2, 4])[:, None, None]
    return F.one_hot(((images > -1) * places).sum(1), 8).movedim(-1, 1)


def build_scenes(recipe: SlotRecipe) -> SceneSet:
    """The recipe's scenes, of a file or a generator."""
    if recipe.data:
        return Stored(
            recipe.data,
            test_data=recipe.test_data or None,
            examples=recipe.examples,
            most_objects=recipe.most_objects,
        )
    return Generated(
        recipe.scenes,
        examples=recipe.examples,
        objects=None if recipe.most_objects is None else (3, recipe.most_objects),
        size=recipe.size,
        # coordinates are of the whole picture
        whole_frame=recipe.model == "set_predictor",
    )


def build_task(recipe: SlotRecipe, scenes: SceneSet | None = None) -> SlotTask | SetTask:
    """What the recipe's model is to do with its scenes, or with others."""
    kind = SetTask if recipe.model == "set_predictor" else SlotTask
    return kind(scenes=build_scenes(recipe) if scenes is None else scenes, stride=recipe.stride)


def build_model(recipe: SlotRecipe, task: SlotTask | SetTask) -> SlotModel:
    """A freshly initialised model; torch's global generator decides its weights.

    Raises:
        ValueError: the scenes are not square, or not of the size that the decoder makes.
    """
    size = _size(recipe, task)
    shared: dict[str, Any] = {
        "image_size": size,
        "num_slots": recipe.num_slots,
        "dim": recipe.dim,
        "hidden_dim": recipe.hidden_dim,
        "iterations": recipe.iterations,
    }
    if recipe.attention in FRAMES:
        return invariant_autoencoder(
            **shared,
            frame=FRAMES[recipe.attention],
            channels=recipe.channels,
            encoder_strides=recipe.encoder_strides,
            decoder_grid=(recipe.decoder_grid, recipe.decoder_grid),
            decoder_strides=recipe.decoder_strides,
            gradient=Implicit(recipe.implicit) if recipe.implicit else None,
        )
    model: SlotModel
    if recipe.model == "set_predictor":
        model = SlotSetPredictor(**shared, strides=recipe.encoder_strides)
    else:
        model = SlotAutoencoder(
            **shared,
            channels=recipe.channels,
            # the decoder is replaced where there are patches
            decoder_grid=size if recipe.patch else (recipe.decoder_grid, recipe.decoder_grid),
            decoder_strides=(1,) if recipe.patch else recipe.decoder_strides,
        )
    if recipe.patch:
        model.encoder = PatchEncoder(image_size=size, patch=recipe.patch, channels=recipe.channels)
        model.decoder = PatchDecoder(dim=recipe.dim, image_size=size, patch=recipe.patch, channels=recipe.channels)
    else:
        model.encoder = SlotEncoder(image_size=size, channels=recipe.channels, strides=recipe.encoder_strides)
    # the model has the paper's already, unless the width differs
    if recipe.implicit or recipe.attention != "slots" or model.slot_attention.input_dim != recipe.channels:
        model.slot_attention = build_attention(recipe)
    return model


def build_attention(recipe: SlotRecipe) -> SlotAttention:
    """The slot module that the recipe names; those of later papers have torch's eps in their norms, as their code.

    Invariant ones are built with the model around them.
    """
    variants: dict[str, Mapping[str, Any]] = {
        "slots": {},
        "background": {"init": Background()},
        "bo_qsa": {
            "norm_eps": 1e-5,
            "init": LearnedQueries(std=None, sigma=1.0 if recipe.noise_steps else 0.0),
            "aggregation": WeightedMean(eps=0.0, offset=1.0),
            "gradient": BiLevel(),
        },
        "mesh": {"norm_eps": 1e-5, "competition": Mesh()},
    }
    parts = dict(variants[recipe.attention])
    if recipe.implicit:
        parts["gradient"] = Implicit(recipe.implicit)
    attention = SlotAttention(
        dim=recipe.dim,
        num_slots=recipe.num_slots,
        input_dim=recipe.channels,
        iterations=recipe.iterations,
        hidden_dim=recipe.hidden_dim,
        **parts,
    )
    if recipe.attention == "bo_qsa":
        assert attention.mlp is not None
        attention.mlp.append(DropPath(0.2))
    return attention


def _size(recipe: SlotRecipe, task: SlotTask | SetTask) -> tuple[int, int]:
    if not recipe.data:
        return recipe.side, recipe.side
    height, width = task.batch("test", 0, 0, 1)["inputs"].shape[2:]
    if height != width:
        raise ValueError(
            f"{recipe.data} has scenes of {height} x {width} pixels, expected square ones; give --crop or --size to "
            "`tevo data convert`"
        )
    if recipe.patch and height % recipe.patch:
        raise ValueError(f"patch is {recipe.patch} for scenes of {height} x {width}, expected a divisor")
    if recipe.model == "autoencoder" and not recipe.patch and recipe.decoded != height:
        raise ValueError(
            f"the decoder makes {recipe.decoded} x {recipe.decoded} pixels of scenes of {height} x {width}; choose "
            "decoder_grid times the product of decoder_strides to be that"
        )
    return height, width


def build_objective(recipe: SlotRecipe) -> Objective:
    """What is minimised."""
    objective: Objective = SetLoss() if recipe.model == "set_predictor" else Reconstruction()
    return Annealed(objective=objective, steps=recipe.noise_steps) if recipe.noise_steps else objective


class _First(nn.Module):
    """The first of a model's outputs alone."""

    def __init__(self, model: SlotModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (b, 3, h, w) give a reconstruction or predictions."""
        found: Decomposition | SetPrediction = self.model(images)
        return found[0]


def measured(model: SlotModel) -> nn.Module:
    """What a dry run measures: a module from a batch's inputs to one tensor."""
    return _First(model)


def run(recipe: SlotRecipe, *, folder: Path, watch: Watch | None = None) -> Result:
    """Train the recipe's model in ``folder``, from its newest checkpoint on."""
    task = build_task(recipe)
    return train(
        recipe,
        build=lambda: build_model(recipe, task),
        objective=build_objective(recipe),
        task=task,
        folder=folder,
        watch=watch,
    )


@torch.no_grad()
def evaluated(
    model: SlotModel,
    task: SlotTask | SetTask,
    *,
    split: str,
    batch: int,
    num_slots: int | None = None,
    iterations: int | None = None,
    init_seed: int = 0,
) -> dict[str, float]:
    """The figures of a whole held-out split: name -> share of 1. The model's mode and random generators are left as found.

    Args:
        model: in whatever mode; it is evaluated in evaluation mode.
        task: where scenes come from.
        split: "valid" or "test".
        batch: scenes at once.
        num_slots: other than the model's.
        iterations: other than the model's.
        init_seed: decides the noise from which slots start; 0 is that of the evaluations while training.
    """
    device = next(model.parameters()).device

    def found() -> Iterator[tuple[Any, Tensor]]:
        for rows in task.batches(split, batch):
            outputs = model(rows["inputs"].to(device), num_slots=num_slots, iterations=iterations)
            yield type(outputs)(*(one.cpu() for one in outputs)), rows["targets"]

    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(init_seed)
            return task.figures(found())
    finally:
        model.train(training)


def restore(folder: Path, *, scenes: SceneSet | None = None) -> tuple[SlotRecipe, SlotTask | SetTask, SlotModel, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Args:
        folder: the run.
        scenes: for the task, in place of those of the recipe.

    Raises:
        ValueError: the folder is not a slot model's run, or its checkpoint is damaged.
    """
    recipe = of_run(folder, SlotRecipe)
    task = build_task(recipe, scenes)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)
