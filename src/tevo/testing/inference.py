"""The shared checks of inference parts: of scores of the next token after contexts, in the seat ``inference``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tevo.contracts import Inference, State
from tevo.models.causal_lm import CausalLM
from tevo.testing.checks import check, close, expect, leaves, limit, oracle_of, refuses, reorder
from tevo.testing.cost import EXPONENTS, growth
from tevo.testing.subject import VOCAB, Subject, token_ids
from tevo.testing.tolerances import RUNGS, relative_rms

# unequal lengths of the contexts, and how many tokens follow
WINDOWS, TASK = (5, 8, 3), 6


def made(s: Subject, *, dtype: torch.dtype = torch.float64) -> Inference:
    """The part with its model."""
    part = s.make(dtype=dtype)
    assert isinstance(part, Inference)
    return part


def contexts(batch: int) -> list[Tensor]:
    """Texts of unequal length."""
    return [token_ids(batch, n, seed=10 + i) for i, n in enumerate(WINDOWS)]


def after(part: Inference, texts: list[Tensor], tokens: Tensor, pieces: tuple[int, ...] = ()) -> Tensor:
    """Probabilities (b, n, V) of the next token at each of ``tokens`` (b, n), stepped in pieces."""
    state, found, start = part.start(texts), [], 0
    for piece in pieces or (tokens.shape[1],):
        scores, state = part.step(tokens[:, start : start + piece], state)
        found.append(scores.softmax(-1))
        start += piece
    return torch.cat(found, 1)


@check("Scores (b, n, V) have the model's dtype, and their softmax is a distribution.", seat="inference")
def check_distribution(s: Subject) -> float:
    """They are sampled from."""
    for dtype in (torch.float64, torch.float32):
        part = made(s, dtype=dtype)
        for n in (1, TASK, 0):
            scores, _ = part.step(token_ids(2, n), part.start(contexts(2)))
            expect(scores.shape == (2, n, VOCAB), f"{s.name} gave scores of shape {tuple(scores.shape)}")
            expect(scores.dtype == dtype, f"{s.name} turned {dtype} into {scores.dtype}")
            expect(bool(scores.softmax(-1).isfinite().all()), f"{s.name} gave scores that are no distribution")
    return 0.0


@check("It equals the second formulation in float64, with several contexts of unequal length.", seat="inference")
def check_inference_oracle(s: Subject) -> float:
    """Two formulations, always."""
    part, oracle, worst = made(s), oracle_of(s), 0.0
    for batch, count in ((2, 3), (3, 1), (1, 2)):
        texts, tokens = contexts(batch)[:count], token_ids(batch, TASK, seed=3)
        with torch.no_grad():
            theirs = oracle.reference(part, texts, tokens)
        what = f"{s.name} after {count} contexts"
        worst = max(worst, close(what, after(part, texts, tokens), theirs, limit(s, "inference_oracle", "F64")))
    return worst


@check("With one context, and what it adds turned off, it is the model after that context.", seat="inference")
def check_one_context_is_the_model(s: Subject) -> float:
    """The oracle's ``PLAIN`` says how it is turned off."""
    part = made(replace(s, example={**s.example, **oracle_of(s).PLAIN}))
    (text, *_), tokens = contexts(2), token_ids(2, TASK, seed=3)
    model = part.model
    assert isinstance(model, CausalLM)
    with torch.no_grad():
        whole = model(torch.cat([text, tokens], 1))[:, text.shape[1] :].softmax(-1)
    return close(f"{s.name} turned off", after(part, [text], tokens), whole, RUNGS["F64"])


@check("Exact state: stepping over any split equals one step.", lambda s: s.claims("exact_state"), seat="inference")
def check_splits(s: Subject) -> float:
    """A prompt and token by token are one function."""
    part, texts, tokens = made(s), contexts(2), token_ids(2, TASK, seed=3)
    whole = after(part, texts, tokens)
    splits = ((1,) * TASK, (2, 1, TASK - 3), (TASK - 1, 1))
    return max(
        close(f"{s.name} in {pieces}", after(part, texts, tokens, pieces), whole, RUNGS["F64"]) for pieces in splits
    )


@check("Rows of a batch are independent, and may be exchanged between steps (beam search).", seat="inference")
def check_rows(s: Subject) -> float:
    """The batch is dimension 0 of every leaf of the state."""
    part, texts, tokens = made(s), contexts(3), token_ids(3, TASK, seed=3)
    whole, worst = after(part, texts, tokens), 0.0
    for i in range(3):
        alone = after(part, [text[i : i + 1] for text in texts], tokens[i : i + 1])
        worst = max(worst, close(f"{s.name}, row {i} alone", alone, whole[i : i + 1], RUNGS["F64"]))
    order = torch.tensor([2, 0, 0])
    state: State = part.start(texts)
    _, state = part.step(tokens[:, :2], state)
    for leaf in leaves(state):
        expect(leaf.ndim > 0 and len(leaf) == 3, f"{s.name}: a state leaf has shape {tuple(leaf.shape)} for 3 rows")
    scores, _ = part.step(tokens[order, 2:], reorder(state, order))
    return max(worst, close(f"{s.name} reordered", scores.softmax(-1), whole[order, 2:], RUNGS["F64"]))


@check("Every context changes what follows.", seat="inference")
def check_every_context_matters(s: Subject) -> float:
    """Guards against a text that is read and dropped."""
    part, texts, tokens = made(s), contexts(2), token_ids(2, TASK, seed=3)
    whole = after(part, texts, tokens)
    for i, text in enumerate(texts):
        other = list(texts)
        other[i] = torch.cat([text[:, :1], (text[:, 1:] + 1) % VOCAB], 1)
        # where one context is chosen for each token, another one may be chosen for all of these
        alone = after(part, [text], tokens)
        changed = max(
            relative_rms(after(part, other, tokens), whole), relative_rms(after(part, [other[i]], tokens), alone)
        )
        expect(changed > 1e-6, f"{s.name}: context {i} changes nothing")
    return 0.0


@check(
    "Reading and stepping draw no random numbers, record no gradient, and leave the model as it was.", seat="inference"
)
def check_leaves_the_model(s: Subject) -> float:
    """A trained model is used, not changed."""
    part, texts, tokens = made(s), contexts(2), token_ids(2, TASK, seed=3)
    before, random = {k: v.clone() for k, v in part.state_dict().items()}, torch.get_rng_state()
    first, second = (part.step(tokens, part.start(texts))[0] for _ in range(2))
    expect(torch.equal(first, second), f"{s.name} gave different scores for the same tokens")
    expect(torch.equal(random, torch.get_rng_state()), f"{s.name} drew random numbers")
    expect(not first.requires_grad, f"{s.name} recorded gradients")
    for name, value in part.state_dict().items():
        expect(torch.equal(value, before[name]), f"{s.name} changed {name}")
    return 0.0


@check("No context, an empty one and unequal batches are refused.", seat="inference")
def check_refuses_contexts(s: Subject) -> float:
    """In one sentence, before anything is read."""
    part = made(s)
    wrong: tuple[list[Tensor], ...] = ([], [token_ids(2, 0)], [token_ids(2, 3), token_ids(1, 3)], [token_ids(2, 3)[0]])
    for texts in wrong:
        shapes = [tuple(text.shape) for text in texts]
        refuses(f"{s.name} with contexts {shapes}", lambda texts=texts: part.start(texts))  # type: ignore[misc]
    return 0.0


@check(
    "Counted FLOPs of reading a context grow with its length as the card declares.",
    group="E",
    once=True,
    seat="inference",
)
def check_reading_cost(s: Subject) -> float:
    """Fitted over three octaves."""
    exponent = growth(s)["exponent"]
    assert isinstance(exponent, float)
    expect(
        abs(exponent - EXPONENTS[s.card.cost]) <= 0.05,
        f"{s.name}: FLOPs of reading grow as n^{exponent}, the card declares {s.card.cost}",
    )
    return 0.0
