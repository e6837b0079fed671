"""KERPLE, one head and one pair of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """Scaled products less p log(1 + a d), or less a d^p, with the parameters held inside their bounds."""
    power = type(module).__name__ == "KerplePower"
    s = torch.einsum("bhne,bhme->bhnm", q, k) / q.shape[-1] ** 0.5
    heads = []
    for p, a in zip(module.p, module.a, strict=True):
        a = held(a, 0.01, float("inf"))
        p = held(p, 0.01, 2.0 if power else float("inf"))
        batches = []
        for here, there in zip(q_at.tolist(), k_at.tolist(), strict=True):
            penalties = [s.new_zeros(()) if i == j else kernel(power, p, a, abs(i - j)) for i in here for j in there]
            batches.append(torch.stack(penalties).reshape(len(here), len(there)) if penalties else s[0, 0])
        heads.append(torch.stack(batches))
    return s - torch.stack(heads, 1)


def kernel(power: bool, p: Tensor, a: Tensor, distance: int) -> Tensor:
    """The penalty at a distance > 0."""
    return a * float(distance) ** p if power else p * torch.log(1 + a * distance)


def held(value: Tensor, low: float, high: float) -> Tensor:
    """The value moved into its bounds, as if it had been there: the gradient is that of the moved value."""
    now = float(value.detach())
    return value + (min(max(now, low), high) - now)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' log and power modules, power with p = 1, a single query, and parameters outside their bounds.

    The two forms that multiply scores are no additive position and are not compared.
    """
    from tevo.functional.attention import attention

    at = torch.arange(13)[None]
    later = torch.ones(13, 13, dtype=torch.bool).triu(1)
    for case, cls in (("log", "KerpleLog"), ("power_ap_", "KerplePower"), ("power_original", "KerplePower")):
        position = getattr(system, cls)(heads=3).double()
        with torch.no_grad():
            position.a.copy_(arrays[f"{case}.w.bias_a"].flatten())
            position.p.copy_(arrays[f"{case}.w.bias_p"].flatten() if case != "power_original" else torch.ones(3))
        q, k, v = (arrays[name].clone().requires_grad_() for name in ("q", "k", "v"))
        bias = position.bias(q, k, at, at)
        scores = ((q @ k.mT) / 2 + bias).masked_fill(later, 0.0)
        yield f"{case}.scores", scores, arrays[f"{case}.scores"], 1e-12
        out = attention(q, k, v, bias=bias, causal=True)
        yield f"{case}.out", out, arrays[f"{case}.out"], 1e-12
        out.backward(arrays["cotangent"])
        for name, leaf in (("q", q), ("k", k), ("v", v), ("bias_a", position.a), ("bias_p", position.p)):
            if f"{case}.grad.{name}" in arrays:
                theirs = arrays[f"{case}.grad.{name}"]
                yield f"{case}.grad.{name}", leaf.grad.reshape(theirs.shape), theirs, 1e-12
        last = (q[:, :, -1:] @ k.mT) / 2 + position.bias(q[:, :, -1:], k, at[:, -1:], at)
        yield f"{case}.scores_last_row", last, arrays[f"{case}.scores_last_row"], 1e-12
    position = system.KerplePower(heads=3).double()
    with torch.no_grad():
        for name in ("a", "p"):
            getattr(position, name).copy_(arrays[f"clamp.w_before.bias_{name}"].flatten())
    scores = ((arrays["q"] @ arrays["k"].mT) / 2 + position.bias(arrays["q"], arrays["k"], at, at)).masked_fill(
        later, 0.0
    )
    yield "clamp.scores", scores, arrays["clamp.scores"], 1e-12
    position.after_step()
    for name in ("a", "p"):
        yield f"clamp.w_after.{name}", getattr(position, name), arrays[f"clamp.w_after.bias_{name}"].flatten(), 1e-12
