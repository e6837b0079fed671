"""LongT5 with one softmax over explicit lists of tokens and blocks, one query at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _bucket(offset: int, module: nn.Module) -> int:
    """T5's bucket of key place - query place."""
    buckets, first = module.buckets, 0
    if module.causal:
        distance = max(0, -offset)
    else:
        buckets //= 2
        first = buckets if offset > 0 else 0
        distance = abs(offset)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(module.max_distance / exact)
    return first + min(buckets - 1, exact + int(share * (buckets - exact) + 1e-9))


def _row(module: nn.Module, x: list[Tensor]) -> list[Tensor]:
    """One sequence of real tokens."""
    n, h, g = len(x), module.heads, module.block
    w_q = module.q.weight.chunk(h)
    w_k, w_v = (w.chunk(h) for w in module.kv.weight.chunk(2))
    blocks = n // g if g else 0
    own = [i // g if g else 0 for i in range(n)]
    if not module.causal:
        own = [min(i, blocks - 1) for i in own]
    summaries = []
    for j in range(blocks):
        total = torch.stack([x[i] for i in range(n) if own[i] == j]).sum(0)
        scale = (total.square().mean() + module.global_norm.eps).sqrt()
        summaries.append(total / scale * module.global_norm.weight)
    outputs = []
    for i in range(n):
        near = [j for j in range(n) if abs(i - j) <= module.radius and (j <= i or not module.causal)]
        far = [j for j in range(blocks) if j < own[i] or not module.causal]
        parts = []
        for head in range(h):
            q, s, values = w_q[head] @ x[i], [], []
            for j in near:
                s.append(q @ (w_k[head] @ x[j]) + module.bias[head, _bucket(j - i, module)])
                values.append(w_v[head] @ x[j])
            for j in far:
                s.append(q @ (w_k[head] @ summaries[j]) + module.global_bias[head, _bucket(j - own[i], module)])
                values.append(w_v[head] @ summaries[j])
            parts.append(torch.stack(s).softmax(0) @ torch.stack(values))
        outputs.append(module.out.weight @ torch.cat(parts))
    return outputs


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Each row by itself, its padding taken out; padding gives zeros."""
    rows = []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask is None or bool(mask[b, t])]
        places = dict(zip(real, _row(module, [x[b, t] for t in real]), strict=True))
        rows.append(torch.stack([places.get(t, torch.zeros_like(x[b, t])) for t in range(x.shape[1])]))
    return torch.stack(rows)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package transformers: both layers, full and padded, and an encoder of two layers. No causal form there."""
    settings = {"dim": 12, "heads": 3, "head_dim": 5, "radius": 6, "buckets": 8, "max_distance": 16}
    mask = arrays["mask"].bool()
    for which, cls, more in (("local", system.LongT5Local, {}), ("tglobal", system.LongT5, {"block": 4})):
        mixer = cls(**settings, **more).double()
        _fill(mixer, arrays, f"{which}.w.")
        for case, real in (("full", None), ("pad", mask)):
            keep = torch.ones_like(mask) if real is None else real
            mixer.zero_grad()
            x = arrays["x"].clone().requires_grad_()
            y = mixer(x, mask=real) * keep[..., None]
            y.backward(arrays["cotangent"])
            yield f"{which}.out_{case}", y, arrays[f"{which}.out_{case}"], 1e-11
            yield f"{which}.grad_{case}.x", x.grad, arrays[f"{which}.grad_{case}.x"], 1e-11
            for name, parameter, theirs in _pairs(mixer, arrays, f"{which}.grad_{case}."):
                yield f"{which}.grad_{case}.{name}", parameter.grad, theirs, 1e-11

    weights = {
        name.removeprefix("encoder.w."): array.clone().requires_grad_()
        for name, array in arrays.items()
        if name.startswith("encoder.w.")
    }
    layers = [system.LongT5(**settings, block=4).double() for _ in range(2)]
    # one pair of tables for all layers
    layers[1].bias, layers[1].global_bias = layers[0].bias, layers[0].global_bias
    own = [f"encoder.block.{i}.layer.0.TransientGlobalSelfAttention." for i in range(2)]
    for layer, prefix in zip(layers, own, strict=True):
        _fill(layer, arrays, f"encoder.w.{prefix}")

    def norm(name: str, z: Tensor) -> Tensor:
        return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    z = F.embedding(arrays["encoder.ids"], weights["shared.weight"])
    for i, layer in enumerate(layers):
        block = f"encoder.block.{i}.layer"
        z = z + layer(norm(f"{block}.0.layer_norm", z), mask=mask)
        inner, dense = norm(f"{block}.1.layer_norm", z), f"{block}.1.DenseReluDense"
        gate = F.gelu(inner @ weights[f"{dense}.wi_0.weight"].T, approximate="tanh")
        z = z + (gate * (inner @ weights[f"{dense}.wi_1.weight"].T)) @ weights[f"{dense}.wo.weight"].T
    z = norm("encoder.final_layer_norm", z) * mask[..., None]
    z.backward(arrays["encoder.cotangent"])
    yield "encoder.out_pad", z, arrays["encoder.out_pad"], 1e-11
    for name, weight in weights.items():
        if weight.grad is not None:
            yield f"encoder.grad.{name}", weight.grad, arrays[f"encoder.grad.{name}"], 1e-11
    for layer, prefix in zip(layers, own, strict=True):
        for name, parameter, theirs in _pairs(layer, arrays, f"encoder.grad.{prefix}"):
            yield f"encoder.grad.{prefix}{name}", parameter.grad, theirs, 1e-11


def _pairs(mixer: nn.Module, arrays: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name, our parameter, theirs under the prefix)."""
    yield "q", mixer.q.weight, arrays[f"{prefix}q.weight"]
    yield "kv", mixer.kv.weight, torch.cat([arrays[f"{prefix}{name}.weight"] for name in "kv"])
    yield "o", mixer.out.weight, arrays[f"{prefix}o.weight"]
    # the second layer of the encoder has no tables of its own
    if f"{prefix}relative_attention_bias.weight" in arrays:
        yield "bias", mixer.bias, arrays[f"{prefix}relative_attention_bias.weight"].T
    if f"{prefix}global_relative_attention_bias.weight" in arrays:
        yield "global_bias", mixer.global_bias, arrays[f"{prefix}global_relative_attention_bias.weight"].T
    if mixer.global_norm is not None:
        yield "norm", mixer.global_norm.weight, arrays[f"{prefix}global_input_layer_norm.weight"]


def _fill(mixer: nn.Module, arrays: dict[str, Tensor], prefix: str) -> None:
    with torch.no_grad():
        for _, parameter, theirs in _pairs(mixer, arrays, prefix):
            parameter.copy_(theirs)
