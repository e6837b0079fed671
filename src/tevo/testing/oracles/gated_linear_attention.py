"""Gated linear attention by its closed form: every pair of tokens with the product of the factors between them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    b, n, d = x.shape
    h, e = module.heads, module.e
    w = d // h
    rows = []
    for i in range(b):
        real = [t for t in range(n) if mask is None or bool(mask[i, t])]
        alphas = {}
        for t in real:
            z = module.decay.weight @ (module.decay_into.weight @ x[i, t]) + module.decay.bias
            alphas[t] = (1 / (1 + torch.exp(-z))) ** (1 / module.tau)
        for t in range(n):
            if t not in real:
                rows.append(torch.zeros_like(x[i, t]))
                continue
            joined = []
            for head in range(h):
                own, wide = slice(head * e, head * e + e), slice(head * w, head * w + w)
                q = module.qk.weight[: h * e][own] @ x[i, t]
                o, faded = x.new_zeros(w), torch.ones_like(q)
                for s in reversed([s for s in real if s <= t]):
                    k = module.qk.weight[h * e :][own] @ x[i, s]
                    o = o + (q * faded * k).sum() * (module.v.weight[wide] @ x[i, s])
                    faded = faded * alphas[s][own]
                o = o / e**0.5
                z = o - o.mean()
                z = z / (z.square().mean() + module.norm.eps).sqrt() * module.norm.weight + module.norm.bias
                r = module.gate.weight[wide] @ x[i, t] + module.gate.bias[wide]
                joined.append(z * r / (1 + torch.exp(-r)))
            rows.append(module.out.weight @ torch.cat(joined))
    return torch.stack(rows).reshape(x.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Equation (1), in chunks and token by token, from nothing and from a state, with gradients of everything."""
    names = ("q", "k", "v", "log_decay")
    forms = (
        ("chunks of 5", lambda *a: system.gated_linear_attention(*a, chunk=5)),
        ("one chunk", system.gated_linear_attention),
        ("token by token", system.plain_gated_linear_attention),
    )
    for what, form in forms:
        for case in ("zero_state", "with_state"):
            leaf = {name: arrays[f"in.{name}"].clone().requires_grad_() for name in names}
            if case == "with_state":
                leaf["state0"] = arrays["in.state0"].clone().requires_grad_()
            o, state = form(*(leaf[name].transpose(1, 2) for name in names), leaf.get("state0"))
            o = o.transpose(1, 2)
            yield f"{what}: {case}.out.o", o, arrays[f"{case}.out.o"], 1e-10
            yield f"{what}: {case}.out.state", state, arrays[f"{case}.out.state"], 1e-10
            total = (o * arrays[f"{case}.cot.o"]).sum() + (state * arrays[f"{case}.cot.state"]).sum()
            for name, gradient in zip(leaf, torch.autograd.grad(total, list(leaf.values())), strict=True):
                yield f"{what}: {case}.grad.in.{name}", gradient, arrays[f"{case}.grad.in.{name}"], 1e-10
