"""Caches of past tokens that grow while decoding."""

from __future__ import annotations

import torch
from torch import Tensor


def append(cache: Tensor, new: Tensor, past: int, *, dim: int) -> tuple[Tensor, Tensor]:
    """Write ``new`` behind the first ``past`` entries of ``cache`` along ``dim``; returns the cache and its filled part.

    The room doubles when it is used up, so that decoding n tokens copies O(n) entries. While gradients are recorded the
    entries are joined instead: writing in place would change what earlier steps keep for backward.
    """
    n = new.shape[dim]
    if torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad):
        joined = torch.cat([cache.narrow(dim, 0, past), new], dim)
        return joined, joined
    room = cache.shape[dim]
    if past + n > room:
        shape = list(cache.shape)
        shape[dim] = max(past + n, 2 * room) - past
        cache = torch.cat([cache.narrow(dim, 0, past), cache.new_zeros(shape)], dim)
    cache.narrow(dim, past, n).copy_(new)
    return cache, cache.narrow(dim, 0, past + n)
