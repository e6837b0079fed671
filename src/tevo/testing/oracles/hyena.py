"""Hyena operator: each convolution as the matrix of its filter, each filter tap by tap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def taps(module: nn.Module, n: int) -> Tensor:
    """The first n taps (n, (N-1) d) of the implicit filters, window included."""
    linear = [module.mlp[i] for i in range(4)]
    channels = linear[3].weight.shape[0]
    slowest, fastest = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
    found = []
    for t in range(n):
        z = module.features[t]
        for layer in linear[:3]:
            z = torch.sin(module.frequency * (layer.weight @ z + layer.bias))
        h = linear[3].weight @ z
        time = t / (module.length - 1) if module.length > 1 else 0.0
        window = []
        for c in range(channels):
            delta = slowest + (fastest - slowest) * (c / (channels - 1) if channels > 1 else 0.0)
            window.append(math.exp(-time * abs(delta)))
        found.append(h * torch.tensor(window, dtype=h.dtype))
    return torch.stack(found)


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    b, n, d = x.shape
    order = module.order
    h = taps(module, n)  # n (N-1)d
    rows = []
    for i in range(b):
        real = [t for t in range(n) if mask is None or bool(mask[i, t])]
        z = x[i, real] @ module.into.weight.T + module.into.bias
        short = []
        for t in range(len(real)):
            row = module.short_bias
            for lag in range(min(3, t + 1)):
                row = row + module.short[:, lag] * z[t - lag]
            short.append(row)
        groups = [torch.stack(short)[:, g * d : (g + 1) * d] for g in range(order + 1)]
        v = groups[order]
        for o in range(order - 1):
            u = v * groups[order - 1 - o]
            columns = []
            for c in range(d):
                toeplitz = torch.stack(
                    [
                        torch.stack([h[t - s, o * d + c] if s <= t else 0 * h[0, 0] for s in range(len(real))])
                        for t in range(len(real))
                    ]
                )
                columns.append(toeplitz @ u[:, c] + module.skip[o, c] * u[:, c])
            v = torch.stack(columns, 1)
        y = (v * groups[0]) @ module.out.weight.T + module.out.bias
        full = torch.zeros_like(x[i])
        full[real] = y
        rows.append(full)
    return torch.stack(rows)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    _, n, d, order, length, emb_dim, filter_dim, _ = arrays["settings"].tolist()
    w = {name.removeprefix("w."): value for name, value in arrays.items() if name.startswith("w.")}
    ours = system.Hyena(
        dim=d, length=length, order=order, emb_dim=emb_dim, filter_dim=filter_dim, frequency=1.0
    ).double()
    yield "initial features", system.positional_features(length, emb_dim), arrays["pos_features_init"][0], 1e-11
    window = torch.exp(-arrays["buffer.t"][0] * arrays["buffer.deltas"][0].abs())  # L d
    yield "window", ours.window(n), window[:n], 1e-11
    x = arrays["x"].clone().requires_grad_()
    leaves = {
        "x": x,
        "in_proj.weight": ours.into.weight,
        "in_proj.bias": ours.into.bias,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
        "short_filter.bias": ours.short_bias,
        "filter_fn.bias": ours.skip,
        "filter_fn.pos_emb.z": ours.features,
        "filter_fn.implicit_filter.1.freq": ours.frequency,
    }
    for i in range(4):
        leaves[f"filter_fn.implicit_filter.{2 * i}.weight"] = ours.mlp[i].weight
        if i < 3:
            leaves[f"filter_fn.implicit_filter.{2 * i}.bias"] = ours.mlp[i].bias
    with torch.no_grad():
        for name, leaf in leaves.items():
            if name != "x":
                leaf.copy_(w[name].reshape(leaf.shape))
        # their taps are the oldest first
        ours.short.copy_(w["short_filter.weight"][:, 0].flip(-1))
    yield "filter", ours.filter(n), arrays["filter"], 1e-11
    y = ours(x)
    yield "output", y, arrays["out"], 1e-11
    *gradients, taps_gradient = torch.autograd.grad(y, [*leaves.values(), ours.short], arrays["cotangent"])
    yield "gradient of the short filter", taps_gradient, arrays["grad.short_filter.weight"][:, 0].flip(-1), 1e-11
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        yield f"gradient of {name}", gradient, arrays[f"grad.{name}"].reshape(leaf.shape), 1e-11
