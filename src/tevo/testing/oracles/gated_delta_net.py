"""Gated delta net, one token and one head at a time, over the real tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    b, n, _ = x.shape
    h, e = module.heads, module.e
    width = module.taps.shape[1]
    rows = []
    for i in range(b):
        memory = [x.new_zeros(e, 2 * e) for _ in range(h)]
        seen: list[Tensor] = []
        for t in range(n):
            if mask is not None and not bool(mask[i, t]):
                rows.append(torch.zeros_like(x[i, t]))
                continue
            u = x[i, t]
            seen.append(module.qkv.weight @ u)
            mixed = _silu(sum(module.taps[:, lag] * y for lag, y in enumerate(reversed(seen[-width:]))))
            joined = []
            for head in range(h):
                q = mixed[head * e : head * e + e]
                k = mixed[(h + head) * e : (h + head) * e + e]
                v = mixed[2 * h * e + 2 * head * e : 2 * h * e + 2 * head * e + 2 * e]
                q, k = q / (q @ q).sqrt(), k / (k @ k).sqrt()
                beta = 1 / (1 + torch.exp(-(module.beta.weight[head] @ u)))
                pace = torch.log(1 + torch.exp(module.decay.weight[head] @ u + module.decay.bias[head]))
                alpha = torch.exp(-torch.exp(module.log_rate[head]) * pace)
                erased = memory[head] - beta * torch.outer(k, k @ memory[head])
                memory[head] = alpha * erased + beta * torch.outer(k, v)
                o = memory[head].T @ q / e**0.5
                o = module.norm.weight * o / (o.square().mean() + 1e-5).sqrt()
                joined.append(o * _silu(module.gate.weight[2 * head * e : 2 * head * e + 2 * e] @ u))
            rows.append(module.out.weight @ torch.cat(joined))
    return torch.stack(rows).reshape(x.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Equation (1), in chunks and token by token, from nothing and from a state, with gradients of everything."""
    names = ("q", "k", "v", "log_decay", "beta")
    forms = (
        ("chunks of 5", lambda *a: system.gated_delta_rule(*a, chunk=5)),
        ("one chunk", system.gated_delta_rule),
        ("token by token", system.plain_gated_delta_rule),
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
