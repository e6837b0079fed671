"""What the recipes of all programs share. No torch here, so that help and dry checks are instant."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

__all__ = ["Recipe", "circumstances", "option"]


def option(default: Any, help: str, *, circumstance: bool = False) -> Any:
    """A field of a recipe with its line of help."""
    # a circumstance may differ when a run is resumed: it is recorded, but is no part of what the run is
    return field(default=default, metadata={"help": help, "circumstance": circumstance})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every program's training shares. Field help is the ``help`` of its metadata.

    ``kind`` names the program: the key of its recipes in ``RECIPES``.
    """

    kind: ClassVar[str]

    steps: int = option(1000, "optimiser steps")
    batch: int = option(16, "rows per step, over all processes and micro-batches")
    accumulate: int = option(1, "micro-batches per step; less memory, the same result")
    lr: float = option(1e-3, "peak learning rate")
    warmup: float = option(0.05, "share of the steps in which the rate rises linearly")
    final_lr: float = option(0.1, "share of the peak at which the cosine ends")
    weight_decay: float = option(0.1, "AdamW decay; never of vectors and scalars")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW averages")
    clip: float = option(1.0, "greatest gradient norm")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "fp32, bf16 or fp16 (GPU only)")
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass")
    compile: bool = option(False, "torch.compile the model")
    seed: int = option(0, "decides initialisation, data order and dropout")
    threads: int = option(0, "CPU threads; 0: torch's choice", circumstance=True)
    save_every: int = option(200, "steps between checkpoints")
    eval_every: int = option(200, "steps between evaluations on held-out data")
    examples: int = option(256, "held-out rows per evaluation")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    tensorboard: bool = option(False, "also write TensorBoard events")

    def __post_init__(self) -> None:
        at_least = {
            1: ("steps", "batch", "accumulate", "save_every", "eval_every", "examples", "log_every"),
            0: ("seed", "threads", "warmup", "final_lr", "weight_decay"),
        }
        for least, names in at_least.items():
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number above 0")
        for name in ("warmup", "final_lr"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected two numbers from 0 to below 1")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision is {self.precision!r}, expected fp32, bf16 or fp16")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}, expected less than 2**32")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} cannot be cut into accumulate={self.accumulate} equal micro-batches; "
                "choose a multiple"
            )

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of all that decides the result; circumstances such as threads are left out."""
        values = {k: v for k, v in self.content().items() if k not in circumstances(type(self))}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The recipe as JSON; ``read`` gives an equal recipe back."""
        return json.dumps(self.content(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def content(self) -> dict[str, Any]:
        """Kind and fields."""
        return {"kind": self.kind, **asdict(self)}


def circumstances(cls: type[Recipe]) -> set[str]:
    """Names of the fields that may differ when a run is resumed."""
    return {f.name for f in fields(cls) if f.metadata["circumstance"]}
