"""The slot program: from a recipe to scenes, model and objective.

L = mean over images, channels and pixels of (image' - image)^2,   image in [-1, 1]                    (1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.bench.tasks import HELD_OUT
from tevo.contracts import Loss, Objective
from tevo.slot_attention.data import Scene, clevr_lite, multi_dsprites_like, tetrominoes_like
from tevo.slot_attention.gradient import Implicit
from tevo.slot_attention.metrics import fg_ari
from tevo.slot_attention.models import Decomposition, SlotAutoencoder, SlotEncoder
from tevo.slot_attention.module import SlotAttention
from tevo.slot_attention.recipes import SlotRecipe
from tevo.training.loop import Result, restore_model, train
from tevo.training.progress import Watch
from tevo.training.recipe import read

__all__ = ["Reconstruction", "SlotTask", "build_model", "build_task", "measured", "restore", "run"]

# recipes' seeds are not negative: no training set has these scenes
_SETS = {"valid": -1, "test": -2}


class Reconstruction(Objective):
    """Mean squared error of a model that gives a :class:`tevo.slot_attention.models.Decomposition` (eq. 1)."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` holds ``inputs`` (b, 3, h, w)."""
        return Loss(F.mse_loss(model(batch["inputs"]).reconstruction, batch["inputs"]), {})


class _Reconstruct(nn.Module):
    """An autoencoder's reconstruction alone."""

    def __init__(self, model: SlotAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (b, 3, h, w) give as many."""
        found: Decomposition = self.model(images)
        return found.reconstruction


class SlotTask:
    """Scenes to take apart, scored by FG-ARI of the decoder's masks.

    Args:
        scenes: generator's name.
        most_objects: of clevr_lite.
        stride: every n-th row and column is kept.
        examples: scenes of each held-out split.
    """

    name = "slots"
    metric = "fg_ari"
    higher_is_better = True

    def __init__(self, *, scenes: str, most_objects: int | None = None, stride: int = 1, examples: int = 320) -> None:
        options: dict[str, Any] = {} if most_objects is None else {"objects": (3, most_objects)}
        generators: dict[str, Callable[..., Scene]] = {
            "tetrominoes_like": tetrominoes_like,
            "multi_dsprites_like": multi_dsprites_like,
            "clevr_lite": clevr_lite,
        }
        self._make = partial(generators[scenes], **options)
        self.stride, self.examples = stride, examples
        self.facts = {"scenes": scenes, "most_objects": most_objects, "stride": stride, "examples": examples}

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """Scenes ``index * size`` onwards, of the endless set of ``seed`` or of a held-out set, which has no seed.

        Returns:
            "inputs" (size, 3, h, w) in [-1, 1], and "targets" (size, h, w), ids of the objects, 0 the background.

        Raises:
            ValueError: no such split, or a batch past the end of one.
        """
        if split != "train" and split not in HELD_OUT:
            raise ValueError(f"slots: split is {split!r}, expected 'train', 'valid' or 'test'")
        first, last = index * size, (index + 1) * size
        if split in HELD_OUT:
            if first >= self.examples:
                raise ValueError(
                    f"slots: batch {index} of {size} is past the end of {split!r}, of {self.examples} scenes"
                )
            seed, last = _SETS[split], min(last, self.examples)
        made = self._make(seed, range(first, last))
        kept = slice(None, None, self.stride)
        images = torch.from_numpy(np.moveaxis(made["image"], -1, 1)[..., kept, kept].astype(np.float32))
        return {"inputs": images / 127.5 - 1, "targets": torch.from_numpy(made["ids"][:, kept, kept].astype(np.int64))}

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All scenes of a held-out split, once each."""
        for index in range(-(-self.examples // size)):
            yield self.batch(split, 0, index, size)

    def score(self, outputs: Decomposition, targets: Tensor) -> tuple[Tensor, Tensor]:
        """FG-ARI as (sum, scenes): SAVi's and scikit-learn's convention, 1 where it is 0/0."""
        return self._score(outputs.masks, targets)

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
        scores = [self._score(masks(rows["inputs"]), rows["targets"]) for rows in self.batches("valid", 64)]
        return float(sum(total for total, _ in scores) / sum(count for _, count in scores))

    def _score(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        values = fg_ari(targets, masks, source="decoder masks").per_image
        kept = ~values.isnan()
        return values[kept].sum().double(), kept.sum().double()


def _hues(images: Tensor) -> Tensor:
    """Masks (b, 8, h, w) of pixels that have the same of red, green and blue: what a model that sees no places can do."""
    places = torch.tensor([1, 2, 4])[:, None, None]
    return F.one_hot(((images > -1) * places).sum(1), 8).movedim(-1, 1)


def build_task(recipe: SlotRecipe) -> SlotTask:
    """The recipe's scenes."""
    return SlotTask(
        scenes=recipe.scenes, most_objects=recipe.most_objects, stride=recipe.stride, examples=recipe.examples
    )


def build_model(recipe: SlotRecipe, task: SlotTask) -> SlotAutoencoder:
    """A freshly initialised model; torch's global generator decides its weights."""
    size = (recipe.side, recipe.side)
    model = SlotAutoencoder(
        image_size=size,
        num_slots=recipe.num_slots,
        dim=recipe.dim,
        hidden_dim=recipe.hidden_dim,
        iterations=recipe.iterations,
        decoder_grid=(recipe.decoder_grid, recipe.decoder_grid),
        channels=recipe.channels,
        decoder_strides=recipe.decoder_strides,
    )
    model.encoder = SlotEncoder(image_size=size, channels=recipe.channels, strides=recipe.encoder_strides)
    if recipe.implicit:
        model.slot_attention = SlotAttention(
            dim=recipe.dim,
            num_slots=recipe.num_slots,
            input_dim=recipe.channels,
            iterations=recipe.iterations,
            hidden_dim=recipe.hidden_dim,
            gradient=Implicit(recipe.implicit),
        )
    return model


def measured(model: SlotAutoencoder) -> nn.Module:
    """What a dry run measures: a module from a batch's inputs to one tensor."""
    return _Reconstruct(model)


def run(recipe: SlotRecipe, *, folder: Path, watch: Watch | None = None) -> Result:
    """Train the recipe's model in ``folder``, from its newest checkpoint on."""
    task = build_task(recipe)
    return train(
        recipe,
        build=lambda: build_model(recipe, task),
        objective=Reconstruction(),
        task=task,
        folder=folder,
        watch=watch,
    )


def restore(folder: Path) -> tuple[SlotRecipe, SlotTask, SlotAutoencoder, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Raises:
        ValueError: the folder is not a slot autoencoder's run, or its checkpoint is damaged.
    """
    if not (folder / "recipe.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no recipe.json; expected a folder that `tevo train` made")
    recipe = read(folder / "recipe.json")
    if not isinstance(recipe, SlotRecipe):
        raise ValueError(f"{folder} is a run of kind {recipe.kind!r}, expected a slot autoencoder's")
    task = build_task(recipe)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)
