"""Recipes of CoLT5 on questions over long inputs. No torch here, so that help and dry checks are instant.

Training goes through phases: inputs grow, and the routed share falls from 1, at which every token takes the heavy branch, so
that a router learns what is worth keeping from a model that has it all. Inside phase p, u of its steps done,

    share = f_{p-1} (f_p / f_{p-1})^min(1, u / 0.8),   f_0 = 1                                            (1)
    eps   = e_0 (e_1 / e_0)^(step / (steps - 1))                                                          (2)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

from tevo.training.base import Recipe, option

__all__ = ["PRESETS", "CoLT5Recipe", "Place"]

# fields that are younger than stored runs, which are named by their recipes' content
_LATER: dict[str, Any] = {
    "outlines": (),
    "forced": False,
    "keys": 2.0,
    "one_router": False,
    "cross_kv_heads": 1,
    "what": "copy",
    "marked": 4,
    "depth": 10,
    "children": 10,
}
# options that one task alone has
_OWN = {"what": "rearrange", "marked": "rearrange", "depth": "listops", "children": "listops"}
# part of a phase after which the share stays
_ANNEALED = 0.8


class Place(NamedTuple):
    """Where a step is: the phase's index, its first step, and the step behind its last."""

    phase: int
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class CoLT5Recipe(Recipe):
    """A :class:`tevo.colt5.CoLT5ForConditionalGeneration` that answers questions over long inputs."""

    kind: ClassVar[str] = "colt5"

    steps: int = option(1500, "optimiser steps")
    batch: int = option(8, "rows per step of the last phase, over all processes and micro-batches")
    lr: float = option(3e-3, "peak learning rate")
    weight_decay: float = option(0.01, "AdamW decay; never of vectors and scalars")
    betas: tuple[float, float] = option((0.9, 0.98), "AdamW averages")
    examples: int = option(200, "held-out rows per evaluation")
    task: Literal["lookup", "documents", "passkey", "listops", "rearrange", "code", "modules"] = option(
        "lookup",
        "lookup, documents, passkey, listops, rearrange (made words), code or modules (words or bytes of the standard library)",
    )
    ask: Literal["signature", "classes", "docstring", "changed"] = option(
        "signature", "modules: signature, classes, docstring or changed"
    )
    questions: int = option(4, "lookup, code: names asked for in each input")
    what: Literal["copy", "reverse", "selective", "sort"] = option(
        "copy", "rearrange: copy, reverse (marked words that stand together), selective or sort (that stand apart)"
    )
    marked: int = option(4, "rearrange: words with a mark")
    depth: int = option(10, "listops: levels of a tree")
    children: int = option(10, "listops: the most of an operation")
    hops: int = option(1, "lookup: names to follow until a value is reached")
    names: int = option(64, "lookup: different names; code: tokens for names")
    values: int = option(32, "lookup: different values; rearrange: different words to mark")
    parameters: int = option(3, "code: most parameters of a function that is asked for")
    facts: tuple[int, ...] = option((), "lookup, documents: facts or documents of an input, a number for each phase")
    outlines: tuple[int, ...] = option(
        (), "code: words kept from each def on, a number for each phase; 0 for the whole text, as in what is evaluated"
    )
    told: tuple[float, ...] = option((), "lookup: share of questions that say their answer, a number for each phase")
    routing: Literal["learned", "static", "random", "none", "dense", "longt5"] = option(
        "learned",
        "learned, static, random, none (no heavy branch), dense (it takes all tokens) or longt5 (its layers in the encoder, with "
        "as many heads and twice the light width)",
    )
    keys: float = option(2.0, "keys and values among routed tokens, as a multiple of the queries; all tokens at most")
    one_router: bool = option(
        False, "one router chooses queries and keys, which are the same tokens then; needs keys=1"
    )
    forced: bool = option(False, "lookup, code: the questions' tokens are always among the routed ones")
    lengths: tuple[int, ...] = option((2048,), "tokens of an input, a number for each phase; the last is evaluated")
    phases: tuple[int, ...] = option((1,), "how long each phase is, as parts of the steps")
    rows: tuple[int, ...] = option((1,), "rows of a step of each phase, in batches")
    shares: tuple[float, ...] = option((1 / 16,), "routed share at the end of each phase; 1 before the first")
    eps: tuple[float, float] = option((1.0, 0.3), "learned: softness of the soft top-k, at the first and the last step")
    dim: int = option(64, "width")
    layers: int = option(2, "of the encoder")
    decoder_layers: int = option(1, "of the decoder")
    light_heads: int = option(1, "heads of the window")
    heavy_heads: int = option(3, "heads among routed tokens")
    heads: int = option(4, "heads of the decoder")
    cross_kv_heads: int = option(
        1, "heads of keys and values of the decoder's look at the encoder: 1, or a divisor of heads"
    )
    head_dim: int = option(16, "width of a head")
    light_dim: int = option(64, "width inside the feed-forward of all tokens")
    heavy_dim: int = option(256, "width inside the feed-forward of routed tokens")
    hidden_dim: int = option(128, "width inside the decoder's feed-forward")
    tied: bool = option(False, "the head is the embedding")
    start: Literal["paper", "mimetic", "copying"] = option(
        "paper",
        "paper (T5's initial weights), mimetic (equal tokens find each other from the first step), or copying (and so do "
        "tokens with equal neighbours, and the decoder repeats what it reads)",
    )
    looks: tuple[int, ...] = option(
        (-1,), "mimetic, copying: the token at which each light head begins to look, from its own"
    )
    radius: int = option(8, "tokens that the window sees on each side")
    dropout: float = option(0.0, "share of activations dropped in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (
            "lengths",
            "phases",
            "rows",
            "shares",
            *(["facts"] if self.facts else []),
            *(["outlines"] if self.outlines else []),
            *(["told"] if self.told else []),
        )
        counts = {name: len(getattr(self, name)) for name in names}
        if len(set(counts.values())) > 1 or not self.lengths:
            said = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(f"phases do not agree: {said}; give each a number for each phase")
        for name in ("lengths", "phases", "rows", "facts"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} are {getattr(self, name)}, expected at least 1 each")
        if not all(1e-6 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares are {self.shares}, expected numbers from 1e-6 to 1")
        if not all(eps > 0 for eps in self.eps):
            raise ValueError(f"eps are {self.eps}, expected numbers above 0")
        if self.facts and self.task not in ("lookup", "documents"):
            raise ValueError(
                f"facts are {self.facts} for task={self.task}, which has none; leave them out, or say --facts without numbers "
                "where a preset has them"
            )
        if self.outlines and self.task != "code":
            raise ValueError(f"outlines are {self.outlines} for task={self.task}, which has none; leave them out")
        if self.told and self.task != "lookup":
            raise ValueError(f"told is {self.told} for task={self.task}, which cannot tell; leave it out")
        for name, task in _OWN.items():
            if self.task != task and getattr(self, name) != _LATER[name]:
                raise ValueError(
                    f"{name} is {getattr(self, name)} for task={self.task}, expected task={task}; leave it out"
                )
        if self.forced and (self.task not in ("lookup", "code") or self.routing in ("none", "dense", "longt5")):
            raise ValueError(
                f"forced is true for task={self.task} and routing={self.routing}, expected lookup or code, of which some tokens "
                "are routed; leave it out"
            )
        if not self.keys > 0 or (self.one_router and self.keys != 1):
            raise ValueError(
                f"keys is {self.keys} with one_router={self.one_router}, expected a multiple above 0, and 1 with one router"
            )
        if (self.keys != 2 or self.one_router) and self.routing in ("none", "dense", "longt5"):
            raise ValueError(
                f"keys is {self.keys} and one_router={self.one_router} for routing={self.routing}, which routes nothing or "
                "all; leave them out"
            )
        if not all(0 <= told <= 1 for told in self.told):
            raise ValueError(f"told is {self.told}, expected shares from 0 to 1")
        if self.looks != (-1,) and self.start == "paper":
            raise ValueError(f"looks are {self.looks} for start={self.start}, which has none; leave them out")
        if len(self.looks) not in (1, self.light_heads) or any(abs(look) > self.radius for look in self.looks):
            raise ValueError(
                f"looks are {self.looks}, expected one, or one for each of light_heads={self.light_heads}, all within "
                f"radius={self.radius}"
            )
        if self.compile:
            raise ValueError("compile is true, but each step of colt5 routes another number of tokens; leave it out")
        for name in ("dim", "layers", "decoder_layers", "light_heads", "heavy_heads", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.cross_kv_heads < 1 or self.heads % self.cross_kv_heads:
            raise ValueError(f"cross_kv_heads is {self.cross_kv_heads}, expected a divisor of heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share from 0 to below 1")

    def content(self) -> dict[str, Any]:
        """Kind and fields; those of ``_LATER`` only where they are not what they were before there was a choice."""
        content = super().content()
        return {name: value for name, value in content.items() if name not in _LATER or value != _LATER[name]}

    def place(self, step: int) -> Place:
        """The phase of a step; steps past the last belong to the last phase."""
        ends = [round(self.steps * done / sum(self.phases)) for done in accumulate(self.phases)]
        phase = next((p for p, end in enumerate(ends) if step < end), len(ends) - 1)
        return Place(phase, ends[phase - 1] if phase else 0, ends[phase])

    def share(self, step: int) -> float:
        """Routed share of a step (eq. 1)."""
        if self.routing == "dense":
            return 1.0
        phase, first, end = self.place(step)
        before, after = self.shares[phase - 1] if phase else 1.0, self.shares[phase]
        done = (step - first) / max(end - 1 - first, 1)
        return float(before * (after / before) ** min(1.0, done / _ANNEALED))

    def softness(self, step: int) -> float:
        """Eps of a step (eq. 2)."""
        first, last = self.eps
        return float(first * (last / first) ** min(1.0, step / max(self.steps - 1, 1)))


PRESETS: dict[str, dict[str, Any]] = {
    # a few seconds: to see that everything goes
    "tiny": {
        "steps": 60,
        "lengths": (48, 96),
        "phases": (2, 1),
        "rows": (2, 1),
        "shares": (1.0, 0.25),
        "facts": (8, 8),
        "names": 16,
        "values": 8,
        "questions": 1,
        "dim": 32,
        "head_dim": 8,
        "light_dim": 32,
        "heavy_dim": 64,
        "hidden_dim": 64,
        "eval_every": 60,
        "save_every": 60,
        "examples": 32,
        "threads": 1,
    },
    # minutes on a core: inputs of 2,048 words with 32 facts, four of which are asked for
    "lookup": {
        "steps": 1300,
        "batch": 4,
        "lr": 1e-3,
        "lengths": (32, 64, 128, 512, 2048),
        "phases": (250, 350, 250, 250, 200),
        "rows": (16, 8, 8, 2, 1),
        "shares": (1.0, 1.0, 0.25, 0.0625, 0.0625),
        "facts": (4, 12, 16, 24, 32),
        "told": (0.9, 0.3, 0.2, 0.1, 0.0),
        "names": 32,
        "start": "mimetic",
        "eps": (1.0, 1.0),
        "light_heads": 2,
        "heavy_heads": 4,
        "heads": 4,
        "head_dim": 32,
        "radius": 3,
        "eval_every": 1300,
        "save_every": 650,
        "threads": 2,
    },
    # minutes on a core: four marked words among 2,048 are sorted, or copied or reversed; what=selective is not learned by it
    "rearrange": {
        "task": "rearrange",
        "what": "sort",
        "steps": 800,
        "batch": 4,
        "lr": 1e-3,
        "lengths": (32, 64, 128, 512, 2048),
        "phases": (350, 150, 100, 100, 100),
        "rows": (16, 8, 8, 2, 1),
        "shares": (1.0, 1.0, 0.25, 0.0625, 0.0625),
        "start": "copying",
        "looks": (-1, -2),
        "eps": (1.0, 1.0),
        "light_heads": 2,
        "heavy_heads": 4,
        "heads": 4,
        "head_dim": 32,
        "radius": 3,
        "eval_every": 800,
        "save_every": 400,
        "threads": 1,
    },
    # minutes on a core: small lists, whose values are learned in part
    "listops": {
        "task": "listops",
        "depth": 4,
        "children": 4,
        "steps": 1500,
        "batch": 32,
        "lr": 1e-3,
        "lengths": (12, 24, 48),
        "phases": (1, 1, 1),
        "rows": (2, 1, 1),
        "shares": (1.0, 0.5, 0.25),
        "layers": 3,
        "start": "mimetic",
        "eps": (1.0, 1.0),
        "light_heads": 2,
        "heavy_heads": 2,
        "heads": 4,
        "head_dim": 16,
        "radius": 4,
        "eval_every": 1500,
        "save_every": 500,
        "threads": 1,
    },
    # minutes on a core: the parameters of four named functions in 2,048 words of a module of the standard library
    "code": {
        "task": "code",
        "steps": 1000,
        "batch": 1,
        "lr": 1e-3,
        "lengths": (80, 128, 256, 512, 2048),
        "phases": (220, 80, 150, 250, 300),
        "rows": (64, 32, 16, 8, 2),
        "shares": (1.0, 1.0, 0.25, 0.125, 0.0625),
        "outlines": (8, 10, 20, 60, 0),
        "names": 256,
        "parameters": 2,
        "start": "copying",
        "looks": (-2, -3, -4),
        "eps": (1.0, 1.0),
        "light_heads": 3,
        "heavy_heads": 4,
        "heads": 4,
        "head_dim": 32,
        "radius": 5,
        "eval_every": 1000,
        "save_every": 500,
        "threads": 2,
    },
    # 16 documents of 4 sentences among 2,048 words; one is asked for
    "documents": {
        "task": "documents",
        "steps": 1300,
        "lengths": (128, 512, 2048),
        "phases": (8, 3, 2),
        "rows": (4, 2, 1),
        "shares": (0.125, 0.0625, 0.0625),
        "facts": (2, 8, 16),
        "eval_every": 325,
        "save_every": 325,
        "threads": 1,
    },
    # bytes of the standard library: the parameters of a named function
    "modules": {
        "task": "modules",
        "steps": 2000,
        "lengths": (512, 2048),
        "phases": (3, 1),
        "rows": (4, 1),
        "shares": (0.125, 0.0625),
        "dim": 96,
        "layers": 3,
        "decoder_layers": 2,
        "head_dim": 24,
        "light_dim": 96,
        "heavy_dim": 384,
        "hidden_dim": 192,
        "radius": 32,
        "eval_every": 500,
        "save_every": 500,
        "threads": 2,
    },
}
# what `tevo demo colt5` shows
PRESETS["demo"] = PRESETS["code"]
