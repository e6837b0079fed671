"""Recipes of the slot autoencoder. No torch here, so that help and dry checks are instant."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from tevo.training.base import Recipe, option

__all__ = ["PRESETS", "SlotRecipe"]


@dataclass(frozen=True, kw_only=True)
class SlotRecipe(Recipe):
    """A slot model trained on scenes, made on the fly or from a converted file.

    An autoencoder reconstructs them (:class:`tevo.slot_attention.models.SlotAutoencoder`), a set predictor lists their
    objects (:class:`tevo.slot_attention.models.SlotSetPredictor`).
    """

    kind: ClassVar[str] = "slots"

    # what the reference has, where the text programs have other defaults
    lr: float = option(4e-4, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW decay; never of vectors and scalars")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW averages")
    batch: int = option(64, "scenes per step, over all processes and micro-batches")
    model: Literal["autoencoder", "set_predictor"] = option("autoencoder", "autoencoder or set_predictor")
    attention: Literal["slots", "background", "bo_qsa", "mesh", "isa_t", "isa_ts", "isa_tsr"] = option(
        "slots",
        "slots (the paper's), background (a first slot of its own), bo_qsa, mesh, or Invariant Slot Attention, whose slots "
        "know no place (isa_t), size (isa_ts) and angle (isa_tsr)",
    )
    scenes: Literal["tetrominoes_like", "multi_dsprites_like", "clevr_lite", "coloured_shapes"] = option(
        "tetrominoes_like", "generator: tetrominoes_like, multi_dsprites_like, clevr_lite, coloured_shapes"
    )
    data: str = option("", "scenes of a folder made by `tevo data` or a .npz, in place of a generator's")
    test_data: str = option("", "test scenes of another; empty: the last of data")
    most_objects: int | None = option(None, "objects at most, of data or clevr_lite; none: as they have")
    size: int | None = option(None, "clevr_lite: side in pixels; none: 128")
    stride: int = option(1, "keep every n-th row and column of the scenes")
    num_slots: int = option(4, "slots, the background's among them")
    iterations: int = option(3, "rounds of slot attention")
    dim: int = option(64, "width of the slots")
    hidden_dim: int = option(128, "width inside the slots' MLP")
    channels: int = option(32, "width of the convolutions")
    encoder_strides: tuple[int, ...] = option((1, 1, 1, 1), "stride of each layer of the encoder")
    decoder_grid: int = option(35, "side of the grid on which a slot is tiled")
    decoder_strides: tuple[int, ...] = option(
        (1, 1, 1), "stride of each layer of the decoder but the last; isa with none: an MLP of each pixel"
    )
    patch: int = option(
        0, "side of the patches that the encoder reads and the decoder makes; 0: of pixels, as the paper"
    )
    implicit: int = option(0, "gradient through this many steps at the fixed point; 0: through all rounds")
    noise_steps: int = option(0, "bo_qsa: steps in which the noise of the first slots falls from 1 to 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stride", "num_slots", "iterations", "dim", "hidden_dim", "channels", "decoder_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, most in (("encoder_strides", math.inf), ("decoder_strides", 5)):
            if not all(1 <= stride <= most for stride in getattr(self, name)):
                raise ValueError(f"{name} are {getattr(self, name)}, expected whole numbers from 1 to {most}")
        for name in ("implicit", "noise_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.attention == "bo_qsa" and self.implicit:
            raise ValueError(f"implicit is {self.implicit} for attention=bo_qsa, which has a gradient of its own")
        if self.noise_steps and self.attention != "bo_qsa":
            raise ValueError(f"noise_steps is {self.noise_steps} for attention={self.attention}, expected bo_qsa")
        self._check_scenes()
        if self.patch < 0:
            raise ValueError(f"patch is {self.patch}, expected at least 0")
        if self.attention.startswith("isa"):
            self._refuse(f"attention={self.attention}, which has an autoencoder of its own", "model", "patch")
        if self.model == "set_predictor":
            self._refuse("a set_predictor, which has no decoder", "decoder_grid", "decoder_strides", "patch")
        elif self.patch:
            self._refuse("patches, which need none", "encoder_strides", "decoder_grid", "decoder_strides")
            if not self.data and self.side % self.patch:
                raise ValueError(f"patch is {self.patch} for scenes of {self.side} x {self.side}, expected a divisor")
        elif not self.data and self.decoded != self.side:
            raise ValueError(
                f"the decoder makes {self.decoded} x {self.decoded} pixels of scenes of {self.side} x {self.side}; "
                "choose decoder_grid times the product of decoder_strides to be that"
            )

    def _refuse(self, what: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != next(f.default for f in fields(self) if f.name == name):
                raise ValueError(f"{name} is {getattr(self, name)} for {what}; leave it out")

    def _check_scenes(self) -> None:
        if self.test_data and not self.data:
            raise ValueError(f"test_data is {self.test_data!r} without data; give both")
        if self.data and self.size is not None:
            raise ValueError(f"size is {self.size} with data={self.data!r}, whose scenes have theirs; leave it out")
        for name in ("most_objects", "size"):
            if getattr(self, name) is not None and not self.data and self.scenes != "clevr_lite":
                raise ValueError(
                    f"{name} is {getattr(self, name)} for scenes={self.scenes}, expected it of clevr_lite only"
                )
        least = 1 if self.data else 3
        if self.most_objects is not None and not least <= self.most_objects <= 10:
            raise ValueError(f"most_objects is {self.most_objects}, expected {least} to 10")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}, expected at least 1")
        if self.model == "set_predictor" and not self.data and self.scenes != "clevr_lite":
            raise ValueError(f"scenes is {self.scenes} for a set_predictor, expected clevr_lite, or data")

    @property
    def side(self) -> int:
        """Rows, and columns, of a generated scene as the model sees it."""
        sides = {
            "tetrominoes_like": 35,
            "multi_dsprites_like": 64,
            "clevr_lite": self.size or 128,
            "coloured_shapes": 24,
        }
        return -(-sides[self.scenes] // self.stride)

    @property
    def decoded(self) -> int:
        """Rows, and columns, of what the decoder makes."""
        return self.decoder_grid * math.prod(self.decoder_strides)


# 2006.15055, appendix, and the authors' code: Adam at 4e-4, 10,000 steps of warm-up, batch 64, 500,000 steps, no clipping,
# no weight decay. Decay here is this house's cosine in place of a halving every 100,000 steps. Scenes are made anew for
# every step, or those of `data`, where the paper has 60,000 (CLEVR: those with at most 6 objects among 70,000).
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
    # the authors' code of set prediction: batch 512, 150,000 steps, 1,000 of warm-up, halved every 50,000 steps (here the
    # cosine down to their last rate), whole pictures of 3 to 10 objects at 128 x 128; they evaluate on 15,000 scenes
    "clevr10-set": {
        **_PAPER,
        "model": "set_predictor",
        "steps": 150_000,
        "warmup": 1 / 150,
        "final_lr": 0.125,
        "batch": 512,
        "scenes": "clevr_lite",
        "num_slots": 10,
        "channels": 64,
        "encoder_strides": (1, 2, 2, 1),
        "save_every": 1000,
        "eval_every": 5000,
        "examples": 500,
    },
    # 2210.08990 and the authors' code, mixture decoder, its settings for 128 x 128 scenes of up to 10 objects: batch 128,
    # 250,000 steps, 5,000 of warm-up, clipped at 1, halved every 50,000 steps (here the cosine down to their last rate),
    # noise gone after 30,000. They have ClevrTex where this has clevr_lite, or `data`
    "bo-qsa": {
        **_PAPER,
        "attention": "bo_qsa",
        "noise_steps": 30_000,
        "steps": 250_000,
        "clip": 1.0,
        "batch": 128,
        "scenes": "clevr_lite",
        "num_slots": 11,
        "channels": 64,
        "encoder_strides": (2, 1, 1, 1),
        "decoder_grid": 8,
        "decoder_strides": (2, 2, 2, 2, 1),
    },
    # 2301.13197 and the authors' code, Multi-dSprites: the paper's autoencoder, clipped at 0.1, 530 epochs of 60,000 scenes
    "mesh": {
        **_PAPER,
        "attention": "mesh",
        "steps": 496_875,
        "clip": 0.1,
        "scenes": "multi_dsprites_like",
        "num_slots": 6,
        "decoder_grid": 64,
    },
    # 2302.04973 and the authors' code, Tetrominoes: 20,000 steps, 5,000 of warm-up, the cosine to 0, clipped at 0.05. They
    # have 512 images (`data` takes as many), and clip the gradient of an error that is 919 times this one: a sum over an
    # image in [0, 1], not the mean over one in [-1, 1]
    "isa-t": {
        **_PAPER,
        "attention": "isa_t",
        "steps": 20_000,
        "warmup": 0.25,
        "final_lr": 0.0,
        "clip": 0.05,
        "channels": 64,
        "decoder_strides": (),
        "save_every": 1000,
        "eval_every": 1000,
    },
    # under ten minutes on two cores: small scenes in 36 patches, a slot of its own for the background, gradients clipped
    # hard as MESH and SAVi do; with seeds and baselines beside it in `tevo demo slots`
    "demo": {
        "scenes": "coloured_shapes",
        "attention": "background",
        "patch": 4,
        "num_slots": 5,
        "channels": 64,
        "steps": 11_000,
        "batch": 32,
        "lr": 2e-3,
        "clip": 0.1,
        "save_every": 1000,
        "eval_every": 1000,
        "examples": 320,
        "threads": 2,
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
    # minutes on two cores: at most 6 objects on 64 x 64 pixels, 256 places. Cast the scenes first, which takes longer:
    # tevo data make clevr_lite --scenes 6000 --objects 3 6 --size 64 --whole-frame --out clevr64
    # tevo train slots --preset laptop-set --data clevr64
    "laptop-set": {
        "model": "set_predictor",
        "scenes": "clevr_lite",
        "most_objects": 6,
        "num_slots": 10,
        "steps": 6000,
        "batch": 32,
        "lr": 1e-3,
        "channels": 32,
        "encoder_strides": (2, 2, 1),
        "save_every": 500,
        "eval_every": 500,
        "examples": 320,
        "threads": 2,
    },
}
