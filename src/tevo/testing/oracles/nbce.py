"""Naive Bayes context extension, token by token and context by context, over whole passes of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

# constructor arguments at which one context gives the model alone
PLAIN: dict[str, object] = {"beta": 0.0, "top_p": 1.0}


def reference(part: nn.Module, contexts: Sequence[Tensor], task: Tensor) -> Tensor:
    """Next-token probabilities (b, n, V) at ``task`` (b, n) after ``contexts`` (b, C_i)."""
    rows = []
    for b in range(len(task)):
        texts = [torch.cat([c[b], task[b]]) for c in ([task[:, :0], *contexts])]
        logits = [part.model(text[None])[0, len(text) - task.shape[1] :] for text in texts]
        rows.append(_row(part, logits))
    return torch.stack(rows)


def _row(part: nn.Module, logits: list[Tensor]) -> Tensor:
    """Probabilities (n, V) of one row from the logits (n, V) after no context and after each."""
    chosen, found = None, []
    for t in range(len(logits[0])):
        kept = [_kept(one[t].tolist(), part.top_p) for one in logits]
        scores = []
        surest, least = None, math.inf
        for i, one in enumerate(kept[1:]):
            entropy = sum(-p * max(math.log(p), -100.0) for p in one.values())
            entropy -= part.eta if i == chosen else 0.0
            if entropy < least:
                surest, least = i, entropy
        chosen = surest
        for w in range(len(logits[0][t])):
            if part.mean:
                missing = any(w not in one for one in kept[1:])
                pooled = -math.inf if missing else sum(math.log(one[w]) for one in kept[1:]) / len(kept[1:])
            else:
                pooled = math.log(kept[1 + chosen][w]) if w in kept[1 + chosen] else -math.inf
            empty = math.log(kept[0][w]) if w in kept[0] else -math.inf
            scores.append(pooled if empty < -100 else (1 + part.beta) * pooled - part.beta * empty)
        most = max(scores)
        weights = [math.exp(score - most) for score in scores]
        found.append([weight / sum(weights) for weight in weights])
    return torch.tensor(found, dtype=logits[0].dtype)


def _kept(logits: list[float], top_p: float) -> dict[int, float]:
    """The probabilities of the likeliest words, until they have ``top_p`` together."""
    most = max(logits)
    total = sum(math.exp(x - most) for x in logits)
    p = [math.exp(x - most) / total for x in logits]
    kept: dict[int, float] = {}
    for w in sorted(range(len(p)), key=lambda w: -p[w]):
        if top_p < 1 and kept and sum(kept.values()) >= top_p:
            break
        kept[w] = p[w]
    return kept


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The released merging of predictions (beta 0.25, eta 0.1, top-p 0.95) on given logits, step by step."""
    logits, before = arrays["in.logits"], torch.zeros(1, dtype=torch.long)  # steps k+1 V
    logp = system.filtered(logits, 0.95)
    for t, now in enumerate(logp):
        entropy = system.entropies(now[None], before, 0.1)
        yield f"out.entropy_after_bonus[{t}]", entropy[0], arrays["out.entropy_after_bonus"][t], 1e-12
        before = entropy[:, 1:].argmin(1) + 1
        yield f"out.chosen_context[{t}]", before[0].double(), arrays["out.chosen_context"][t].double(), 0.0
        merged = system.against_empty(now[before[0]], now[0], 0.25)
        theirs = arrays["out.merged_logits"][t]
        filtered = theirs.isinf()
        yield f"out.merged_logits[{t}], filtered", merged.isinf().double(), filtered.double(), 0.0
        yield f"out.merged_logits[{t}]", merged[~filtered], theirs[~filtered], 1e-12
        # both sides are divided by a temperature of 0.01, which makes a hundred times as much of a rounding
        yield f"out.probs_tau001[{t}]", (merged / 0.01).softmax(-1), arrays["out.probs_tau001"][t], 1e-10
