"""Performer: every pair of tokens by the product of their features, written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _products(module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    """The estimates of e^(q . k / sqrt(e)) for one query (e,) and keys (m, e), or the ReLU form's products."""
    q, k = q / len(q) ** 0.25, k / len(q) ** 0.25
    if type(module).__name__ == "PerformerReLU":
        return ((torch.relu(module.w @ q) + 1e-3) * (torch.relu(k @ module.w.T) + 1e-3)).sum(1)
    return torch.exp((q + k) @ module.w.T - ((q * q).sum() + (k * k).sum(1, keepdim=True)) / 2).mean(1)


def _floor(module: nn.Module, q: Tensor) -> Tensor:
    """What eps stands for beside the products of one query, whose largest exponent is taken out."""
    if type(module).__name__ == "PerformerReLU":
        return q.new_tensor(module.eps)
    q = q / len(q) ** 0.25
    return module.eps * torch.exp((module.w @ q).detach().max() - q @ q / 2) / math.sqrt(len(module.w))


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    source = x if context is None else context
    b, n, d = x.shape
    m, h = source.shape[1], module.heads.heads
    e = d // h
    rows = []
    for i in range(b):
        kept = [s for s in range(m) if mask is None or bool(mask[i, s])]
        parts: list[list[Tensor]] = [[] for _ in range(n)]
        for head in range(h):
            own = slice(head * e, head * e + e)
            k = source[i] @ module.heads.kv.weight[:d][own].T
            v = source[i] @ module.heads.kv.weight[d:][own].T
            for t in range(n):
                q = module.heads.q.weight[own] @ x[i, t]
                seen = [s for s in kept if not module.causal or s <= t + m - n]
                products = _products(module, q, k[seen])
                parts[t].append(products @ v[seen] / (_floor(module, q) + products.sum()))
        rows += [module.heads.out.weight @ torch.cat(part) for part in parts]
    return torch.stack(rows).reshape(b, n, d)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package's features, with its stabilisers, read in both directions. Its third kind is of another paper."""
    from tevo.functional.linear_attention import causal_linear_attention

    w = arrays["in.projection"]
    for case in ("softmax", "softmax_causal", "relu", "relu_causal"):
        q, k, v = leaves = [arrays[f"in.{name}"].clone().requires_grad_() for name in ("q", "k", "v")]
        if case.startswith("softmax"):

            def features(x: Tensor, dims: tuple[int, ...]) -> Tensor:
                largest = (x * x.shape[-1] ** -0.25 @ w.mT).amax(dims, keepdim=True).detach()
                return system.positive_features(x, w, shift=largest, add=1e-4)

            phi_q, phi_k = features(q, (-1,)), features(k, (-1, -2))
        else:
            phi_q, phi_k = system.relu_features(q, w), system.relu_features(k, w)
        if case.endswith("causal"):
            # 1e-6 is added to every feature of the sum of keys there
            both, _ = causal_linear_attention(phi_q, phi_k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
            y = both[..., :-1] / (both[..., -1:] + 1e-6 * phi_q.sum(-1, keepdim=True))
        else:
            y = system.read(phi_q, system.summarise(phi_k, v), 0.0)
        yield f"{case}.out.y", y, arrays[f"{case}.out.y"], 1e-10
        gradients = torch.autograd.grad((y * arrays[f"{case}.cot.y"]).sum(), leaves)
        for name, gradient in zip(("q", "k", "v"), gradients, strict=True):
            yield f"{case}.grad.in.{name}", gradient, arrays[f"{case}.grad.in.{name}"], 1e-10
