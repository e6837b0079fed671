"""Linear Recurrent Unit: one complex state at a time, over the real tokens only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def states(module: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    """x_t of a list of tokens (d,)."""
    size = torch.exp(-torch.exp(module.nu_log))
    phase = torch.exp(module.theta_log)
    eigenvalues = torch.complex(size * torch.cos(phase), size * torch.sin(phase))
    matrix = torch.complex(module.B_re, module.B_im) * torch.exp(module.gamma_log)[:, None]
    x, found = torch.zeros_like(eigenvalues), []
    for u in tokens:
        x = eigenvalues * x + (matrix * u).sum(1)
        found.append(x)
    return found


def unit(module: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    """y_t = Re(C x_t) + D u_t; both directions' states side by side where there are two."""
    x = states(module, tokens)
    if not module.causal:
        back = states(module, tokens[::-1])[::-1]
        x = [torch.cat([one, other]) for one, other in zip(x, back, strict=True)]
    matrix = torch.complex(module.C_re, module.C_im)
    return [(matrix * x_t).sum(1).real + module.D * u for x_t, u in zip(x, tokens, strict=True)]


def after(module: nn.Module, y: Tensor) -> Tensor:
    """GELU in its tanh form, then the gated linear unit, of one token."""
    g = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    half = len(y)
    value = (module.glu.weight[:half] * g).sum(1) + module.glu.bias[:half]
    gate = (module.glu.weight[half:] * g).sum(1) + module.glu.bias[half:]
    return value / (1 + torch.exp(-gate))


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    rows = []
    for i, row in enumerate(x):
        real = [t for t in range(len(row)) if mask is None or bool(mask[i, t])]
        mixed = dict(zip(real, unit(module, [row[t] for t in real]), strict=True))
        rows += [after(module, mixed[t]) if t in mixed else torch.zeros_like(row[t]) for t in range(len(row))]
    return torch.stack(rows).reshape(x.shape)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    x = arrays["x"].clone().requires_grad_()
    w = {name.removeprefix("w."): value for name, value in arrays.items() if name.startswith("w.")}
    ours = system.LRU(dim=12, state_dim=7).double()
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"):
            getattr(ours, name).copy_(w[f"seq.{name}"])
        ours.glu.weight.copy_(torch.cat([w["out1.kernel"].T, w["out2.kernel"].T]))
        ours.glu.bias.copy_(torch.cat([w["out1.bias"], w["out2.bias"]]))
    leaves = {"x": x, **{f"seq.{name}": p for name, p in ours.named_parameters() if not name.startswith("glu.")}}

    # the unit alone
    y, _ = ours.unit(x)
    yield "unit: output", y, arrays["lru.out"], 1e-12
    gradients = torch.autograd.grad(y, list(leaves.values()), arrays["cotangent"])
    for name, gradient in zip(leaves, gradients, strict=True):
        yield f"unit: gradient of {name}", gradient, arrays[f"lru.grad.{name}"], 1e-12

    # the layer, with its residual connection and layer norm after it
    norm = nn.LayerNorm(12, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(w["normalization.scale"])
        norm.bias.copy_(w["normalization.bias"])
    z = norm(x + ours(x))
    yield "layer: output", z, arrays["layer.out"], 1e-12
    leaves |= {"normalization.scale": norm.weight, "normalization.bias": norm.bias}
    leaves |= {"glu.weight": ours.glu.weight, "glu.bias": ours.glu.bias}
    found = dict(zip(leaves, torch.autograd.grad(z, list(leaves.values()), arrays["cotangent"]), strict=True))
    for part, half in (("out1", slice(12)), ("out2", slice(12, 24))):
        found[f"{part}.kernel"] = found["glu.weight"][half].T
        found[f"{part}.bias"] = found["glu.bias"][half]
    for name, gradient in found.items():
        if not name.startswith("glu."):
            yield f"layer: gradient of {name}", gradient, arrays[f"layer.grad.{name}"], 1e-12
