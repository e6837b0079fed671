"""Recipes of the slot autoencoder. No torch here, so that help and dry checks are instant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tevo.training.base import Recipe, option

__all__ = ["PRESETS", "SlotRecipe"]


@dataclass(frozen=True, kw_only=True)
class SlotRecipe(Recipe):
    """A :class:`tevo.slot_attention.models.SlotAutoencoder` trained to reconstruct scenes that are made on the fly."""

    kind: ClassVar[str] = "slots"

    # what the reference has, where the text programs have other defaults
    lr: float = option(4e-4, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW decay; never of vectors and scalars")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW averages")
    batch: int = option(64, "scenes per step, over all processes and micro-batches")
    scenes: Literal["tetrominoes_like", "multi_dsprites_like", "clevr_lite"] = option(
        "tetrominoes_like", "generator: tetrominoes_like, multi_dsprites_like, clevr_lite"
    )
    most_objects: int | None = option(None, "clevr_lite: objects at most, from 3 on; none: 10")
    stride: int = option(1, "keep every n-th row and column of the scenes")
    num_slots: int = option(4, "slots, the background's among them")
    iterations: int = option(3, "rounds of slot attention")
    dim: int = option(64, "width of the slots")
    hidden_dim: int = option(128, "width inside the slots' MLP")
    channels: int = option(32, "width of the convolutions")
    encoder_strides: tuple[int, ...] = option((1, 1, 1, 1), "stride of each layer of the encoder")
    decoder_grid: int = option(35, "side of the grid on which a slot is tiled")
    decoder_strides: tuple[int, ...] = option((1, 1, 1), "stride of each layer of the decoder but the last")
    implicit: int = option(0, "gradient through this many steps at the fixed point; 0: through all rounds")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stride", "num_slots", "iterations", "dim", "hidden_dim", "channels", "decoder_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, most in (("encoder_strides", math.inf), ("decoder_strides", 5)):
            if not all(1 <= stride <= most for stride in getattr(self, name)):
                raise ValueError(f"{name} are {getattr(self, name)}, expected whole numbers from 1 to {most}")
        if self.implicit < 0:
            raise ValueError(f"implicit is {self.implicit}, expected at least 0")
        if self.most_objects is not None and (self.scenes != "clevr_lite" or not 3 <= self.most_objects <= 10):
            raise ValueError(
                f"most_objects is {self.most_objects} for scenes={self.scenes}, expected 3 to 10, and of clevr_lite only"
            )
        side, made = self.side, self.decoder_grid * math.prod(self.decoder_strides)
        if made != side:
            raise ValueError(
                f"the decoder makes {made} x {made} pixels of scenes of {side} x {side}; "
                "choose decoder_grid times the product of decoder_strides to be that"
            )

    @property
    def side(self) -> int:
        """Rows, and columns, of a scene as the model sees it."""
        return -(-{"tetrominoes_like": 35, "multi_dsprites_like": 64, "clevr_lite": 128}[self.scenes] // self.stride)


# 2006.15055, appendix, and the authors' code: Adam at 4e-4, 10,000 steps of warm-up, batch 64, 500,000 steps, no clipping,
# no weight decay. Decay here is this house's cosine in place of a halving every 100,000 steps. Scenes are made anew for
# every step where the paper has 60,000 (CLEVR: those with at most 6 objects among 70,000).
_PAPER: dict[str, Any] = {
    "steps": 500_000,
    "warmup": 0.02,
    "clip": 1e9,
    "final_lr": 0.03,
    "save_every": 5000,
    "eval_every": 5000,
    "examples": 320,
    "log_every": 100,
}

PRESETS: dict[str, dict[str, Any]] = {
    # sizes of the models for 35 x 35 and 64 x 64 as in later reimplementations; the authors released that for 128 x 128
    "tetrominoes": _PAPER,
    "multi-dsprites": {**_PAPER, "scenes": "multi_dsprites_like", "num_slots": 6, "decoder_grid": 64},
    "clevr6": {
        **_PAPER,
        "scenes": "clevr_lite",
        "most_objects": 6,
        "num_slots": 7,
        "channels": 64,
        "decoder_grid": 8,
        "decoder_strides": (2, 2, 2, 2, 1),
    },
    # minutes on two cores: every second pixel, an encoder and a decoder at a quarter of their places
    # in these steps it groups pixels by hue, as the baseline of that name; pieces of one colour are not yet told apart
    "laptop": {
        "stride": 2,
        "steps": 5000,
        "batch": 16,
        "lr": 1.5e-3,
        "dim": 32,
        "hidden_dim": 64,
        "encoder_strides": (2, 1, 1),
        "decoder_grid": 9,
        "decoder_strides": (1, 1, 2),
        "save_every": 500,
        "eval_every": 500,
        "examples": 320,
        "threads": 2,
    },
}
