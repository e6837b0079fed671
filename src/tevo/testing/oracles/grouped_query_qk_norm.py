"""Grouped-query attention with normalised queries and keys, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight * x / ((x * x).sum() / len(x) + layer.eps) ** 0.5


def reference(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    own = module.project
    e, h, g = own.head_dim, own.heads, own.groups
    out = []
    for tokens, source in zip(x, context, strict=True):
        kv = [_linear(own.kv, y) for y in source]
        keys = [[_norm(module.k_norm, y[u * e : u * e + e]) for u in range(g)] for y in kv]
        values = [[y[(g + u) * e : (g + u) * e + e] for u in range(g)] for y in kv]
        for token in tokens:
            q, parts = _linear(own.q, token), []
            for i in range(h):
                query, u = _norm(module.q_norm, q[i * e : i * e + e]), i // (h // g)
                power = torch.stack([(query * key[u]).sum() / e**0.5 for key in keys]).exp()
                parts.append(sum(w * v[u] for w, v in zip(power / power.sum(), values, strict=True)))
            out.append(_linear(own.out, torch.cat(parts)))
    return torch.stack(out).reshape(x.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Qwen3's attention with rotary positions and without, causal."""
    from tevo.mixers.softmax.softmax import SoftmaxAttention
    from tevo.positions.rope import RoPE

    for case, position in (("rope", RoPE(base=10000.0)), ("plain", None)):
        heads = system.GroupedQueryQKNorm(dim=12, heads=6, groups=2, head_dim=4)
        mixer = SoftmaxAttention(dim=12, heads=heads, causal=True, position=position).double()
        own = heads.project
        with torch.no_grad():
            own.q.weight.copy_(arrays["w.q_proj.weight"])
            own.kv.weight.copy_(torch.cat([arrays["w.k_proj.weight"], arrays["w.v_proj.weight"]]))
            own.out.weight.copy_(arrays["w.o_proj.weight"])
            heads.q_norm.weight.copy_(arrays["w.q_norm.weight"])
            heads.k_norm.weight.copy_(arrays["w.k_norm.weight"])
        x = arrays["in.x"].clone().requires_grad_()
        y = mixer(x)
        yield f"{case}.out.y", y, arrays[f"{case}.out.y"], 1e-10
        leaves = (x, own.q.weight, own.kv.weight, own.out.weight, heads.q_norm.weight, heads.k_norm.weight)
        found = torch.autograd.grad((y * arrays["cot.y"]).sum(), leaves)
        kv = torch.cat([arrays[f"{case}.grad.w.{name}.weight"] for name in ("k_proj", "v_proj")])
        names = ("in.x", "w.q_proj.weight", "", "w.o_proj.weight", "w.q_norm.weight", "w.k_norm.weight")
        for name, gradient in zip(names, found, strict=True):
            theirs = arrays[f"{case}.grad.{name}"] if name else kv
            yield f"{case}.grad.{name or 'w.k_proj and v_proj'}", gradient, theirs, 1e-10
