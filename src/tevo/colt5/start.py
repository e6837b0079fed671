"""A start from which a small CoLT5 learns in minutes to find things far away; from T5's own it stays at guessing for longer.

    heavy:  W_q = c W_k,   W_o = g W_v^T / h       equal tokens find each other, and bring what stands with them     (1)
            B'[j - i] += -6 for |j - i| <= 3 r     what light heads see needs no heavy ones
    light:  B_h[o_h] += 4                          each head begins by looking at one neighbour, the one before it   (2)
    all other output maps: a tenth of T5's         the residual stream begins as the embedding                       (3)

Where tokens are to be found by what stands near them rather than by what they are, and what is found is to be repeated:

    heavy:  B'[j - i] += -24 more in (1)           a token is its own best match, and would find nothing else         (4)
    light:  W_o *= 2 of the first layer, 1/2 of the others; heavy: W_o *= 1/2 of the first
                                                   neighbours first, likes from the second layer on                   (5)
    cross:  W_q += c W_k,   W_o = g W_v^T / h,   head = d^-1/2 embedding
                                                   the decoder looks at what is like its token, and repeats it        (6)

Everything is trained from there on, as from any start. (1) is the mimetic start of Trockman and Kolter (arXiv 2305.09828),
without its noise. c = 4 e^-1/2 makes a token's score with its like 4 e^1/2 times the share of it that heads see; g = 2.

Letters: h heads, e width of a head, r radius of the light window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tevo.colt5.layers import ConditionalAttention, GatedFeedForward, LocalAttention, RelativeBias, RoutedAttention
from tevo.colt5.modeling import CoLT5ForConditionalGeneration, DecoderAttention, DecoderLayer
from tevo.positions.t5_bias import bucket

__all__ = ["copying_start", "mimetic_start"]

SHARP, GAIN, BEFORE, NEAR, QUIET = 4.0, 2.0, 4.0, -6.0, 0.1
NEARER, LOUD, LOW = -24.0, 2.0, 0.5


@torch.no_grad()
def mimetic_start(model: CoLT5ForConditionalGeneration, *, looks: Sequence[int] = (-1,)) -> None:
    """Change the initial weights of ``model`` in place.

    Args:
        model: freshly initialised.
        looks: offset o at which each light head begins to look, or one for all.
    """
    encoder = model.encoder
    for module in model.modules():
        if isinstance(module, RoutedAttention):
            key, value = module.kv.weight.chunk(2)
            module.q.weight.copy_(key * (SHARP * (len(key) // module.heads) ** -0.5))
            module.out.weight.copy_(value.mT * (GAIN / module.heads))
        elif isinstance(module, GatedFeedForward | DecoderAttention):
            module.out.weight.mul_(QUIET)
    for head, look in enumerate(looks):
        _add(
            encoder.light_bias, torch.tensor([look]), BEFORE, slice(None) if len(looks) == 1 else slice(head, head + 1)
        )
    _keep_away(model, NEAR)


@torch.no_grad()
def copying_start(model: CoLT5ForConditionalGeneration) -> None:
    """Equations (4) to (6), in place, of a ``model`` that has had its :func:`mimetic_start`."""
    _keep_away(model, NEARER)
    first = True
    for module in model.modules():
        if isinstance(module, ConditionalAttention):
            module.light.out.weight.mul_(LOUD if first else LOW)
            module.heavy.out.weight.mul_(LOW if first else 1.0)
            first = False
        elif isinstance(module, DecoderLayer):
            _repeat(module.cross_attention)
    model.lm_head.weight.copy_(model.get_input_embeddings().weight * model.config.dim**-0.5)


def _repeat(cross: DecoderAttention) -> None:
    """Equation (6) of one layer; heads that share keys begin with the same share of the output."""
    group = cross.heads // cross.kv_heads
    key, value = (
        w.unflatten(0, (cross.kv_heads, -1)).repeat_interleave(group, 0).flatten(0, 1) for w in cross.kv.weight.chunk(2)
    )
    cross.q.weight.add_(key * (SHARP * (len(key) // cross.heads) ** -0.5))
    cross.out.weight.copy_(value.mT * (GAIN / cross.heads))


def _keep_away(model: CoLT5ForConditionalGeneration, amount: float) -> None:
    """Add to the biases of heavy heads for what light ones see."""
    light = next(module for module in model.encoder.modules() if isinstance(module, LocalAttention))
    heavy = getattr(model.encoder, "heavy_bias", None)
    if heavy is not None:
        near = 3 * light.radius
        _add(heavy, torch.arange(-near, near + 1), amount)


def _add(bias: nn.Module, offsets: torch.Tensor, amount: float, heads: slice = slice(None)) -> None:
    """Add to the buckets of these offsets, once to each."""
    assert isinstance(bias, RelativeBias)
    found = bucket(offsets, causal=False, buckets=bias.buckets, max_distance=bias.max_distance)
    bias.table[heads, found.unique()] += amount
