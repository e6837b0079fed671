"""AFT as a softmax attention of its own for every feature, one query and one key at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Feature c of output t: sigmoid(q) times the mean of v_s, weighted by exp(k_s + w_ts)."""
    b, n, _ = x.shape
    projected = x @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    width = module.hidden_dim
    rows = []
    for row in range(b):
        real = [t for t in range(n) if mask is None or bool(mask[row, t])]
        place = {t: i for i, t in enumerate(real)}  # logical positions
        outputs = []
        for t in range(n):
            q, seen = projected[row, t, :width], [s for s in real if not module.causal or s <= t]
            if t not in place or not seen:
                outputs.append(0 * q)
                continue
            top, bottom = 0 * q, 0 * q
            for s in seen:
                weight = (projected[row, s, width : 2 * width] + _bias(module, place[t], place[s])).exp()
                top, bottom = top + weight * projected[row, s, 2 * width :], bottom + weight
            outputs.append(top / bottom / (1 + (-q).exp()))
        rows.append(torch.stack(outputs))
    y = torch.stack(rows) @ module.out.weight.T
    return y if module.out.bias is None else y + module.out.bias


def _bias(module: nn.Module, t: int, s: int) -> Tensor | float:
    """w_ts."""
    if not hasattr(module, "a"):  # the simple form
        return 0.0
    if module.window is not None and abs(t - s) >= module.window:
        return 0.0
    return module.a[t, s] if module.b is None else module.a[t] @ module.b[s]


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package aft-pytorch for the bidirectional full and simple forms, exact loops for the others; no AFT-conv."""
    learned = {"dim": 12, "length": 17, "hidden_dim": 6, "rank": None, "bias": True}
    plain = {"dim": 12, "hidden_dim": 6, "bias": True}
    cases = {
        "full": system.AFTFull(**learned),
        "simple": system.AFTSimple(**plain),
        "own.full_causal": system.AFTFull(**learned, causal=True),
        "own.local": system.AFTLocal(**learned, window=4),
        "own.local_causal": system.AFTLocal(**learned, window=4, causal=True),
        "own.simple_causal": system.AFTSimple(**plain, causal=True),
    }
    names = ("to_q", "to_k", "to_v")
    for case, mixer in cases.items():
        mixer.double()
        with torch.no_grad():
            for kind in ("weight", "bias"):
                getattr(mixer.qkv, kind).copy_(torch.cat([arrays[f"w.{name}.{kind}"] for name in names]))
                getattr(mixer.out, kind).copy_(arrays[f"w.project.{kind}"])
            if hasattr(mixer, "a"):
                mixer.a.copy_(arrays["w.wbias"])
        x = arrays["x"].clone().requires_grad_()
        y = mixer(x)
        y.backward(arrays["cotangent"])
        yield f"{case}.out", y, arrays[f"{case}.out"], 1e-12
        yield f"{case}.grad.x", x.grad, arrays[f"{case}.grad.x"], 1e-12
        if hasattr(mixer, "a"):
            yield f"{case}.grad.wbias", mixer.a.grad, arrays[f"{case}.grad.wbias"], 1e-12
        for kind in ("weight", "bias"):
            theirs = torch.cat([arrays[f"{case}.grad.{name}.{kind}"] for name in names])
            yield f"{case}.grad.qkv.{kind}", getattr(mixer.qkv, kind).grad, theirs, 1e-12
            yield f"{case}.grad.out.{kind}", getattr(mixer.out, kind).grad, arrays[f"{case}.grad.project.{kind}"], 1e-12

    q, k, v = (arrays[f"loop.{name}"] for name in "qkv")
    w = arrays["w.wbias"][None, :13, :13]
    near = (torch.arange(13)[:, None] - torch.arange(13)).abs() < 4
    zero = torch.zeros(6, dtype=torch.float64)
    yield "loop.full_core", system.aft(q, system.all_keys(w, k, v)), arrays["loop.full_core"], 1e-12
    yield "loop.full_causal", system.aft(q, system.earlier_keys(w, k, v)), arrays["loop.full_causal"], 1e-12
    yield "loop.local", system.aft(q, system.all_keys(w * near, k, v)), arrays["loop.local"], 1e-12
    yield "loop.local_causal", system.aft(q, system.earlier_keys(w * near, k, v)), arrays["loop.local_causal"], 1e-12
    simple = q.sigmoid() * system.wkv(k, v, decay=zero, bonus=None)[0]
    yield "loop.simple_causal", simple, arrays["loop.simple_causal"], 1e-12
    large = system.aft(q, system.earlier_keys(w, arrays["loop.k_large"], v))
    yield "loop.full_causal_large", large, arrays["loop.full_causal_large"], 1e-12
