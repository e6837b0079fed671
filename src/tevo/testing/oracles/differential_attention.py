"""Differential attention, one pair of maps and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias


def reference(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    h, g = module.heads, module.groups
    e = module.q.weight.shape[0] // h
    (q1, k1), (q2, k2) = module.lambdas
    factor = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + module.first
    out = []
    for tokens, source in zip(x, context, strict=True):
        kv = [_linear(module.kv, y) for y in source]

        def head(i: int, which: int, kv: list[Tensor] = kv) -> Tensor:
            # map i's own key or value head, (m, e)
            start = (which * g + i * g // h) * e
            return torch.stack([y[start : start + e] for y in kv])

        for token in tokens:
            q, parts = _linear(module.q, token), []
            for j in range(h // 2):
                maps = []
                for i in (j, j + h // 2):
                    power = (head(i, 0) @ q[i * e : i * e + e] / math.sqrt(e)).exp()
                    maps.append(power / power.sum())
                values = torch.cat([head(j, 1), head(j + h // 2, 1)], 1)
                y = (maps[0] - factor * maps[1]) @ values
                y = y / (y.square().mean() + 1e-5).sqrt() * module.norm.weight
                parts.append(y * (1 - module.first))
            out.append(_linear(module.out, torch.cat(parts)))
    return torch.stack(out).reshape(x.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The layer of transformers, causal with rotation, and bidirectional with padding."""
    from tevo.mixers.softmax.softmax import SoftmaxAttention
    from tevo.positions.rope import RoPE

    for case, causal in (("causal_rope", True), ("bidir_pad_norope", False)):
        heads = system.DifferentialAttention(
            dim=12, heads=4, groups=2, head_dim=6, index=int(arrays["in.layer_idx"]), bias=True
        )
        # cos and sin of position 1 tell the base of the rotation
        base = float(arrays["in.rope_cos"][1, 1].acos() ** -3)
        mixer = SoftmaxAttention(
            dim=12, heads=heads, causal=causal, position=RoPE(base=base) if causal else None
        ).double()
        pairs = [(heads.q, ["q_proj"]), (heads.kv, ["k_proj", "v_proj"]), (heads.out, ["o_proj"])]
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        with torch.no_grad():
            for layer, own in pairs:
                for kind in ("weight", "bias"):
                    getattr(layer, kind).copy_(torch.cat([arrays[f"w.{name}.{kind}"] for name in own]))
            heads.lambdas.copy_(torch.stack([arrays[f"w.{name}"] for name in names]).unflatten(0, (2, 2)))
        made = torch.tensor(heads.first, dtype=torch.float64)
        yield "out.lambda_init", made, arrays["out.lambda_init"].double(), 1e-10
        x = arrays["in.x"].clone().requires_grad_()
        mask = None if causal else ~arrays["in.pad"].bool()
        real = torch.ones(1) if mask is None else mask[..., None]
        y = mixer(x, mask=mask) * real
        yield f"{case}.out.y", y, arrays[f"{case}.out.y"] * real, 1e-10
        leaves = [x, heads.lambdas, *(getattr(layer, kind) for layer, _ in pairs for kind in ("weight", "bias"))]
        found = torch.autograd.grad((y * arrays[f"{case}.cot.y"]).sum(), leaves)
        yield f"{case}.grad.in.x", found[0], arrays[f"{case}.grad.in.x"], 1e-10
        theirs = torch.stack([arrays[f"{case}.grad.w.{name}"] for name in names]).unflatten(0, (2, 2))
        yield f"{case}.grad.w.lambdas", found[1], theirs, 1e-10
        own = [(parts, kind) for _, parts in pairs for kind in ("weight", "bias")]
        for gradient, (parts, kind) in zip(found[2:], own, strict=True):
            theirs = torch.cat([arrays[f"{case}.grad.w.{name}.{kind}"] for name in parts])
            yield f"{case}.grad.w.{parts[-1]}.{kind}", gradient, theirs, 1e-10
