"""Card: what a system claims. No torch here: cards are read from source as literals, so that lists are instant."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

ROLES = {
    "mixer": "token mixer: tokens exchange information",
    "normaliser": "finer seat of softmax attention: scores to weights",
    "heads": "finer seat of softmax attention: tokens to queries, keys, values and back",
    "channel": "channel mixer: each token is transformed",
    "position": "where order enters",
    "norm": "normalisation of features",
    "residual": "how the sublayers of a block are wired",
    "embedding": "tokens to vectors",
    "block": "a whole block",
    "stack": "owns its blocks, or changes the length",
    "model": "a whole published model",
    "objective": "what is minimised",
    "inference": "how a trained model is used",
    "adapter": "cheap adaptation of a trained model",
    "recipe": "a training recipe",
    "study": "an analysis; its row says what of it is built",
}

# claim word -> what the shared checks ask of a part that makes it (tevo.testing)
CLAIMS = {
    "bidirectional": "has a form in which every token sees every token",
    "causal": "takes causal=True; the gradient of output t with respect to later inputs is zero",
    "cross": "mixes over another sequence, n != m",
    "padding": "takes a mask; the content and amount of padding, on either side, change nothing",
    "position": "takes a Position part in its constructor",
    "grid": "works on a grid of rows x columns, given in the constructor",
    "fixed_length": "is built for a greatest length",
    "equivariant": "permuting the tokens permutes the outputs",
    "exact_state": "step over any split of the sequence equals one pass",
    "lossy_state": "step carries a state that forgets; the card names what does hold",
    "token_wise": "token i's output depends on token i alone",
    "shift_invariant": "adding a constant to all positions changes nothing",
    "identity_at_start": "a freshly built block returns its input",
    "unchanged_at_start": "freshly attached, an adapter leaves the model's outputs as they were",
    "merges": "outputs before and after merge agree, and the model has its own parameters again",
    "recomputes": "the bytes that training keeps for backward do not grow with the depth",
    "shared_across_layers": "one instance serves all layers of a model",
    "nan_contained": "a NaN at one position never reaches earlier ones",
    "linear": "FLOPs grow linearly with the length",
}

COSTS = ("n", "n log n", "n^2", "n sqrt n")
MEMORY = ("1", *COSTS)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The claims of one system; every claim has a shared check.

    Args:
        id: key of the catalogue row and name of the file.
        role: one of ``ROLES``.
        summary: one line: what it replaces, and by what.
        equations: LaTeX, in the paper's symbols.
        exports: part name -> class name in the file; the first is the system's own.
        cost: growth of FLOPs with the length n, one of ``COSTS``; of a finer seat, that of attention with the part in it.
        flops: FLOPs of one forward pass of one sequence (a multiply-add is 2), as an expression in n, m, d, h and the
            constructor's arguments; empty where nothing is counted.
        state: numbers kept per sequence while decoding, as an expression in n, d, h and the constructor's arguments;
            empty where there is no state.
        parameters: numbers that are trained in the part itself, without its seat, as an expression in d, h and the
            constructor's arguments; empty where none is given.
        memory: growth with the length n of the bytes that training keeps for backward, one of ``MEMORY``; of the first
            example, in float32 on a CPU; empty where none is given.
        claims: words of ``CLAIMS``.
        examples: small constructor arguments (>= 1; odd, unequal sizes), the first used by every generic check.
        sizes: lengths n that the checks use where not any length will do (grids, fixed lengths).
        reduces_to: other systems it equals at a stated setting.
        equals: code it was compared with: "source: largest difference is in the evidence".
        departures: where it differs from paper or official code, with reason and effect.
        tolerances: check name -> (rung, reason) where a check needs a looser rung than its default.
        notes: anything a user should know before choosing it.
        variants: part name -> fields that differ for this export of the file.
    """

    id: str
    role: str
    summary: str
    equations: tuple[str, ...]
    exports: Mapping[str, str]
    cost: str
    flops: str = ""
    state: str = ""
    parameters: str = ""
    memory: str = ""
    claims: tuple[str, ...] = ()
    examples: tuple[Mapping[str, object], ...] = ()
    sizes: tuple[int, ...] = ()
    reduces_to: tuple[str, ...] = ()
    equals: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()
    tolerances: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: str = ""
    variants: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"card {self.id}: role is {self.role!r}, expected one of {', '.join(ROLES)}")
        if self.cost not in COSTS:
            raise ValueError(f"card {self.id}: cost is {self.cost!r}, expected one of {', '.join(COSTS)}")
        if self.memory and self.memory not in MEMORY:
            raise ValueError(f"card {self.id}: memory is {self.memory!r}, expected one of {', '.join(MEMORY)}")
        for part in self.variants:
            if part not in self.exports:
                raise ValueError(f"card {self.id}: variants name {part!r}, which is no export")
        for word in self.claims:
            if word not in CLAIMS:
                raise ValueError(f"card {self.id}: unknown claim {word!r}; the words are {', '.join(CLAIMS)}")

    def of(self, part: str) -> Card:
        """The card as it holds for one of the file's exports."""
        return replace(self, **self.variants[part]) if part in self.variants else self  # type: ignore[arg-type]

    def claims_word(self, word: str) -> bool:
        """Whether the card makes the claim, or (``linear``) implies it."""
        return word in self.claims or (word == "linear" and self.cost == "n")


@cache
def read_card(path: Path) -> Card | None:
    """The ``CARD`` of a source file, read as a literal without importing the file; None if it has none."""
    text = path.read_text(encoding="utf-8")
    if "CARD = Card(" not in text:
        return None
    for node in ast.parse(text, filename=str(path)).body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets)
            and isinstance(node.value, ast.Call)
        ):
            known = {f.name for f in fields(Card)}
            values = {}
            for keyword in node.value.keywords:
                if keyword.arg not in known:
                    raise ValueError(f"{path}: CARD has no field {keyword.arg!r}")
                try:
                    values[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError as error:
                    raise ValueError(
                        f"{path}:{keyword.value.lineno}: CARD's field {keyword.arg!r} must be a literal, so that it can be "
                        "read without importing torch"
                    ) from error
            return Card(**values)
    return None
