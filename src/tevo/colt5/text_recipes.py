"""Recipes of CoLT5 on text: pre-training by filling in what is missing, and fine-tuning on files of questions and answers.

No torch here, so that help and dry checks are instant. The routed share and the softness of the weights go from a first to a
last number, s of the steps done:

    share = f_0 (f_1 / f_0)^min(1, s / 0.8),   eps = e_0 (e_1 / e_0)^s                                        (1)

The presets ``paper-base`` have the figures of CoLT5 (2303.09752): sizes of its table 7, with the heavy width 8192 that its number
of parameters tells; 10^6 steps of 256 rows of 4,096 tokens by Adafactor at 1 / sqrt(max(t, 10^4)), m = 1/8; fine-tuning of rows
of 128 at a constant 0.001, 16,384 tokens, dropout 0.1, m = 1/16. Its text and its pieces are the user's to give.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

from tevo.training.base import Recipe, option

__all__ = ["FINETUNE_PRESETS", "PRETRAIN_PRESETS", "SIZES", "FinetuneRecipe", "PretrainRecipe", "TextRecipe"]

# fields that a run started from another's weights takes from it
SIZES = (
    "dim",
    "layers",
    "decoder_layers",
    "light_heads",
    "heavy_heads",
    "heads",
    "head_dim",
    "light_dim",
    "heavy_dim",
    "hidden_dim",
    "tied",
    "radius",
    "routing",
    "tokens",
)
# part of the steps after which the share stays
_ANNEALED = 0.8


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """A :class:`tevo.colt5.CoLT5ForConditionalGeneration` from text to text."""

    optimizer: Literal["adafactor", "adamw"] = option("adafactor", "adafactor or adamw")
    schedule: Literal["inverse_sqrt", "constant", "cosine"] = option(
        "inverse_sqrt", "of the rate: inverse_sqrt (the peak, then its fall from the warm-up on), constant or cosine"
    )
    lr: float = option(1e-2, "peak learning rate; adafactor's is relative to a parameter's size")
    warmup: float = option(0.01, "share of the steps in which the rate rises; with inverse_sqrt, in which it rests")
    weight_decay: float = option(0.0, "decay; never of vectors and scalars")
    clip: float = option(1e9, "greatest gradient norm; T5 has no bound")
    data: str = option("", "your own file or folder")
    tokens: str = option("", "a spiece.model or tokenizer.json; empty: bytes, in ByT5's scheme")
    vocab: int = option(0, "rows of the embedding; 0: as many as tokens and sentinels need")
    routing: Literal["learned", "static", "dense"] = option(
        "learned", "learned, static (the first token of each block) or dense (the heavy branch takes all tokens)"
    )
    shares: tuple[float, float] = option((1 / 8, 1 / 8), "routed share at the first step, and after 0.8 of them")
    eps: tuple[float, float] = option((1.0, 1.0), "learned: softness of the soft top-k, at the first and the last step")
    dim: int = option(128, "width")
    layers: int = option(4, "of the encoder")
    decoder_layers: int = option(2, "of the decoder")
    light_heads: int = option(1, "heads of the window")
    heavy_heads: int = option(3, "heads among routed tokens")
    heads: int = option(4, "heads of the decoder")
    head_dim: int = option(32, "width of a head")
    light_dim: int = option(128, "width inside the feed-forward of all tokens")
    heavy_dim: int = option(1024, "width inside the feed-forward of routed tokens")
    hidden_dim: int = option(256, "width inside the decoder's feed-forward")
    tied: bool = option(False, "the head is the embedding")
    radius: int = option(127, "tokens that the window sees on each side")
    dropout: float = option(0.0, "share of activations dropped in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rates()
        if self.precision == "fp16":
            raise ValueError("precision is 'fp16', in which activations of the T5 family overflow; use bf16 or fp32")
        if self.compile:
            raise ValueError("compile is true, which no recipe of colt5 has been run with; leave it out")
        sizes = ("dim", "layers", "decoder_layers", "light_heads", "heavy_heads", "heads", "head_dim", "light_dim")
        for name in (*sizes, "heavy_dim", "hidden_dim", "radius"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.vocab < 0:
            raise ValueError(f"vocab is {self.vocab}, expected a number of rows, or 0")
        if not all(1e-6 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares are {self.shares}, expected numbers from 1e-6 to 1")
        if not all(eps > 0 for eps in self.eps):
            raise ValueError(f"eps are {self.eps}, expected numbers above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share from 0 to below 1")

    def _check_rates(self) -> None:
        if self.schedule != "cosine" and self.final_lr != TextRecipe.final_lr:
            raise ValueError(f"final_lr={self.final_lr} has no use for schedule={self.schedule}; leave it out")
        if self.optimizer == "adamw":
            return
        if self.betas != TextRecipe.betas:
            raise ValueError(f"betas={self.betas} have no use for optimizer=adafactor, which keeps no such averages")
        last = max(1, round(self.warmup * self.steps)) if self.schedule == "inverse_sqrt" else self.steps
        if self.lr * sqrt(last) > 1 + 1e-9:
            raise ValueError(
                f"lr={self.lr} would be above 1 / sqrt(step) at step {last}, which adafactor never takes; make lr at most "
                f"{1 / sqrt(last):.3g}"
            )

    def share(self, step: int) -> float:
        """Routed share of a step (eq. 1)."""
        first, last = (1.0, 1.0) if self.routing == "dense" else self.shares
        return float(first * (last / first) ** min(1.0, self._done(step) / _ANNEALED))

    def softness(self, step: int) -> float:
        """Eps of a step (eq. 1)."""
        first, last = self.eps
        return float(first * (last / first) ** self._done(step))

    def _done(self, step: int) -> float:
        return min(1.0, step / max(self.steps - 1, 1))


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(TextRecipe):
    """Pre-training on plain text."""

    kind: ClassVar[str] = "colt5-pretrain"

    steps: int = option(4000, "optimiser steps")
    batch: int = option(8, "rows per step, over all processes and micro-batches")
    warmup: float = option(0.1, "share of the steps in which the rate rises; with inverse_sqrt, in which it rests")
    examples: int = option(64, "held-out rows per evaluation")
    data: str = option("", "your own file or folder; empty: Python's standard library")
    mixture: Literal["ul2", "span_corruption", "gap_sentences"] = option(
        "ul2", "ul2 (three kinds of spans and prefixes), span_corruption, or gap_sentences (PEGASUS: whole sentences)"
    )
    length: int = option(1024, "tokens of an input")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 16:
            raise ValueError(f"length is {self.length}, expected at least 16 tokens")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TextRecipe):
    """Fine-tuning on files of inputs and outputs, from a run's weights or from none."""

    kind: ClassVar[str] = "colt5-finetune"

    steps: int = option(1000, "optimiser steps")
    batch: int = option(8, "rows per step, over all processes and micro-batches")
    schedule: Literal["inverse_sqrt", "constant", "cosine"] = option(
        "constant", "of the rate: inverse_sqrt (the peak, then its fall from the warm-up on), constant or cosine"
    )
    lr: float = option(1e-3, "peak learning rate; adafactor's is relative to a parameter's size")
    warmup: float = option(0.0, "share of the steps in which the rate rises; with inverse_sqrt, in which it rests")
    shares: tuple[float, float] = option((1 / 16, 1 / 16), "routed share at the first step, and after 0.8 of them")
    dropout: float = option(0.1, "share of activations dropped in training")
    data: str = option("", "a .jsonl, .csv or .tsv file of input and output, or a zip of SCROLLS")
    test_data: str = option("", "a file to hold out, half valid, half test; empty: a fifth of data, or its validation")
    from_run: str = option(
        "", "a run of colt5-pretrain or colt5-finetune, whose weights and sizes this one begins with"
    )
    length: int = option(2048, "tokens of an input at most; what is longer loses its end")
    answer: int = option(128, "tokens of an output at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 16 or self.answer < 2:
            raise ValueError(f"length={self.length} and answer={self.answer}, expected at least 16 and 2 tokens")


_TINY: dict[str, Any] = {
    "batch": 4,
    "dim": 32,
    "layers": 2,
    "decoder_layers": 1,
    "head_dim": 8,
    "light_dim": 32,
    "heavy_dim": 64,
    "hidden_dim": 64,
    "radius": 8,
    "threads": 1,
}
_BASE: dict[str, Any] = {
    "dim": 768,
    "layers": 12,
    "decoder_layers": 12,
    "light_heads": 4,
    "heavy_heads": 8,
    "heads": 12,
    "head_dim": 64,
    "light_dim": 1024,
    "heavy_dim": 8192,
    "hidden_dim": 2048,
    "radius": 127,
}

PRETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    # a few seconds: to see that everything goes
    "tiny": {**_TINY, "steps": 40, "length": 128, "examples": 8, "eval_every": 40, "save_every": 20},
    # the defaults, at the size that two cores of a laptop train in minutes
    "laptop": {"length": 512, "steps": 2000, "eval_every": 500, "save_every": 250, "radius": 32, "threads": 2},
    "paper-base": {
        **_BASE,
        "steps": 1_000_000,
        "batch": 256,
        "warmup": 0.01,
        "length": 4096,
        "eval_every": 10_000,
        "save_every": 5_000,
        "log_every": 100,
        "checkpoint_activations": True,
    },
}
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, "steps": 40, "length": 256, "answer": 32, "examples": 8, "eval_every": 40, "save_every": 20},
    "laptop": {"length": 1024, "answer": 64, "eval_every": 250, "save_every": 250, "threads": 2},
    "paper-base": {
        **_BASE,
        "steps": 20_000,
        "batch": 128,
        "length": 16_384,
        "eval_every": 1_000,
        "save_every": 1_000,
        "log_every": 100,
        "checkpoint_activations": True,
    },
}
