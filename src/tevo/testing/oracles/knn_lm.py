"""kNN-LM, query by query and entry by entry, over whole passes of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

# constructor arguments at which one context gives the model alone
PLAIN: dict[str, object] = {"share": 0.0}


def reference(part: nn.Module, contexts: Sequence[Tensor], task: Tensor) -> Tensor:
    """Next-token probabilities (b, n, V) at ``task`` (b, n) after ``contexts`` (b, C_i); the store is the part's own."""
    whole = torch.cat([*contexts, task], 1)
    past = whole.shape[1] - task.shape[1]
    x = part.model.embedding(whole)
    for i, block in enumerate(part.model.encoder.blocks):
        x = x + block.mixer(block.residual.norms[0](x))
        f = block.residual.norms[1](x)
        x = x + block.channel(f)
        if i + 1 == len(part.model.encoder.blocks):
            x = block.residual.final(x)
    lm = part.model.head(x).softmax(-1)
    rows = []
    for b in range(len(task)):
        for t in range(past, whole.shape[1]):
            ranked = sorted(
                (sum((float(a) - float(c)) ** 2 for a, c in zip(f[b, t], key, strict=True)), int(value))
                for key, value in zip(part.keys, part.values, strict=True)
            )[: part.neighbours]
            votes = torch.zeros_like(lm[b, t])
            for distance, value in ranked:
                votes[value] += math.exp(-(distance - ranked[0][0]) / part.temperature)
            rows.append(part.share * votes / votes.sum() + (1 - part.share) * lm[b, t])
    return torch.stack(rows).unflatten(0, task.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The released vote and mixture over a given store and given queries; not its similarity by dot product."""
    share, k = float(arrays["in.lambda"]), int(arrays["in.k"])
    distances, found = system.nearest(arrays["in.queries"], arrays["in.keys"], k)
    yield "out.neighbours", found.double(), arrays["out.neighbours"].double(), 0.0
    # the released code has distances with the sign of a similarity
    yield "out.sq_dist", distances, arrays["out.sq_dist"].abs(), 1e-12
    vocab = arrays["in.lm_logp"].shape[-1]
    votes = system.vote(distances, arrays["in.values"][found], vocab, 1.0)
    theirs = arrays["out.knn_logp_words_1_to_V"]
    absent = theirs < -5000
    yield "out.knn_logp_words, absent", votes[..., 1:].isinf().double(), absent.double(), 0.0
    yield "out.knn_logp_words", votes[..., 1:][~absent], theirs[~absent], 1e-12
    targets = arrays["in.targets"]
    # padding and absent words have -10000 there
    scored = (targets != arrays["in.pad_idx"]) & (arrays["out.knn_logp_target"] > -5000)
    ours = votes.gather(-1, targets[..., None])[..., 0]
    yield "out.knn_logp_target", ours[scored], arrays["out.knn_logp_target"][scored], 1e-12
    real = targets != arrays["in.pad_idx"]
    lm = arrays["in.lm_logp"]
    if lm.shape != votes.shape:
        raise ValueError(f"model log-probabilities of shape {tuple(lm.shape)}, votes of {tuple(votes.shape)}")
    both = system.interpolate(votes, lm, share).gather(-1, targets[..., None])[..., 0]
    yield "out.combined_logp_target", both[real], arrays["out.combined_logp_target"][real], 1e-12
