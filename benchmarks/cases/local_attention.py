"""Windowed attention in blocks against the dense form with a mask, and against the plain blocked form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, inference, training
from tevo.functional.local_attention import local_attention

HEADS, E, RADIUS = 4, 64, 127
Mode = Callable[..., Callable[[], object]]


def _ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return local_attention(q, k, v, radius=RADIUS, bias=bias)


def _inputs(n: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, n, E) for _ in range(3)]


def _in_window(n: int) -> Tensor:
    at = torch.arange(n)
    return (at - at[:, None]).abs() <= RADIUS


def _concat(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    # three blocks of keys side by side, product, softmax, product: how published layers do it
    c = RADIUS + 1
    n = q.shape[2]
    blocks = n // c

    def windows(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, c, c)).unflatten(2, (blocks + 2, c))
        return torch.cat([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], 3)

    offset = torch.arange(3 * c) - c - torch.arange(c)[:, None]
    at = torch.arange(blocks)[:, None, None] * c + torch.arange(3 * c) - c
    s = q.unflatten(2, (blocks, c)) @ windows(k).mT * E**-0.5
    if bias is not None:
        s = s + bias[:, (offset + RADIUS).clamp(0, 2 * RADIUS)][:, None]
    s = s.masked_fill(~((offset.abs() <= RADIUS) & (at >= 0) & (at < n)), -torch.inf)
    return (s.softmax(-1) @ windows(v)).flatten(2, 3)


def _plain(mode: Mode, n: int) -> Case:
    seen = _in_window(n)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    x = _inputs(n)
    return Case(
        variants={
            "tevo": mode(_ours, *x),
            "SDPA, n x n mask": mode(masked, *x),
            "concat and softmax": mode(_concat, *x),
        },
        baseline="tevo",
        note=f"radius {RADIUS}, {HEADS} heads of {E}, float32",
    )


def _biased(mode: Mode, n: int) -> Case:
    x, bias = _inputs(n), torch.randn(HEADS, 2 * RADIUS + 1)
    return Case(
        variants={"tevo": mode(_ours, *x, bias), "concat and softmax": mode(_concat, *x, bias)},
        baseline="tevo",
        note=f"radius {RADIUS}, {HEADS} heads of {E}, float32, a bias by offset (trained in the training case)",
    )


CASES: dict[str, Callable[[], Case]] = {
    f"local_attention/{name}/{n}": partial(make, mode, n)
    for make, name, mode, n in (
        (_plain, "forward", inference, 1024),
        (_plain, "forward", inference, 4096),
        (_plain, "training", training, 1024),
        (_plain, "training", training, 4096),
        (_biased, "bias_forward", inference, 4096),
        (_biased, "bias_training", training, 4096),
    )
}
