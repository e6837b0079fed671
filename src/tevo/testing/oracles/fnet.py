"""FNet by explicit cosine and sine matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _matrices(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """C and S of the given size, entry by entry."""
    angles = [[2 * math.pi * (j * k % size) / size for k in range(size)] for j in range(size)]
    angle = torch.tensor(angles, dtype=like.dtype).reshape(size, size)
    return angle.cos(), angle.sin()


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """C_n X C_d - S_n X S_d."""
    n, d = x.shape[1:]
    (c_n, s_n), (c_d, s_d) = _matrices(n, x), _matrices(d, x)
    y = torch.stack([c_n @ row @ c_d - s_n @ row @ s_d for row in x])
    return y / math.sqrt(n * d) if module.unitary else y


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """FNet of the package transformers: the mixer, one layer, and the model around it."""
    mix = system.FNet(dim=12)
    x = arrays["x"].clone().requires_grad_()
    y = mix(x)
    y.backward(arrays["cotangent"])
    yield "mixer.out", y, arrays["mixer.out"], 1e-10
    yield "mixer.grad.x", x.grad, arrays["mixer.grad.x"], 1e-10

    weights = {name[2:]: array.clone().requires_grad_() for name, array in arrays.items() if name.startswith("w.")}

    def norm(name: str, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def linear(name: str, z: Tensor) -> Tensor:
        return F.linear(z, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer(i: int, z: Tensor) -> Tensor:
        own = f"encoder.layer.{i}"
        z = norm(f"{own}.fourier.output.LayerNorm", z + mix(z))
        inner = F.gelu(linear(f"{own}.intermediate.dense", z), approximate="tanh")
        return norm(f"{own}.output.LayerNorm", z + linear(f"{own}.output.dense", inner))

    x = arrays["x"].clone().requires_grad_()
    y = layer(0, x)
    y.backward(arrays["cotangent"])
    yield "layer0.out", y, arrays["layer0.out"], 1e-10
    for name, theirs in arrays.items():
        if name.startswith("layer0.grad."):
            key = name.removeprefix("layer0.grad.")
            own = x if key == "x" else weights.get(f"encoder.layer.0.{key}", weights.get(key))
            yield name, own.grad, theirs, 1e-10
    for weight in weights.values():
        weight.grad = None

    ids = arrays["ids"]
    # token 0 is padding there, whose embedding gets no gradient
    z = F.embedding(ids, weights["embeddings.word_embeddings.weight"], padding_idx=0)
    z = z + F.embedding(arrays["type_ids"], weights["embeddings.token_type_embeddings.weight"])
    z = z + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    z = linear("embeddings.projection", norm("embeddings.LayerNorm", z))
    for i in range(2):
        z = layer(i, z)
    z.backward(arrays["cotangent"])
    yield "out", z, arrays["out"], 1e-10
    yield "pooled", linear("pooler.dense", z[:, 0]).tanh(), arrays["pooled"], 1e-10
    for name, theirs in arrays.items():
        if name.startswith("grad.") and weights[name[5:]].grad is not None:
            yield name, weights[name[5:]].grad, theirs, 1e-10
