"""The Perceiver, one latent and one input at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean()
    return z / (z.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def _layer(layer: nn.Module, latents: list[Tensor], inputs: list[Tensor] | None) -> list[Tensor]:
    """One reading, or one layer of the tower if there are no inputs."""
    queries = [_norm(layer.query_norm, z) for z in latents]
    read = queries if inputs is None else [_norm(layer.input_norm, y) for y in inputs]
    width = layer.q.weight.shape[0]
    e = width // layer.heads
    both = [_linear(layer.kv, y) for y in read]
    after = []
    for z, query in zip(latents, queries, strict=True):
        q, parts = _linear(layer.q, query), []
        for h in range(layer.heads):
            part = slice(h * e, (h + 1) * e)
            top, bottom = 0 * q[part], 0.0
            for kv in both:
                weight = (q[part] @ kv[:width][part] / math.sqrt(e)).exp()
                top, bottom = top + weight * kv[width:][part], bottom + weight
            parts.append(top / bottom if both else top)
        z = z + _linear(layer.out, torch.cat(parts))
        hidden = _linear(layer.into, _norm(layer.mlp_norm, z))
        after.append(z + _linear(layer.back, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2))
    return after


def _features(grid: tuple[int, ...], bands: int) -> list[list[float]]:
    """Raw coordinates, sines and cosines of every point, row-major."""
    points: list[list[float]] = [[]]
    for size in grid:
        points = [[*p, -1 + 2 * i / (size - 1) if size > 1 else -1.0] for p in points for i in range(size)]

    def frequency(size: int, j: int) -> float:
        return 1 + (size / 2 - 1) * j / (bands - 1) if bands > 1 else 1.0

    rows = []
    for p in points:
        angles = [math.pi * frequency(size, j) * c for c, size in zip(p, grid, strict=True) for j in range(bands)]
        rows.append([*p, *map(math.sin, angles), *map(math.cos, angles)])
    return rows


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """T readings, each followed by the tower, for every row by itself."""
    rows = []
    for b in range(x.shape[0]):
        inputs = list(x[b])
        if module.grid is not None:
            axes = len(module.grid)
            bands = (module.readings[0].input_norm.weight.numel() - x.shape[-1] - axes) // (2 * axes)
            places = torch.tensor(_features(module.grid, bands), dtype=x.dtype)
            inputs = [torch.cat([y, p]) for y, p in zip(inputs, places, strict=True)]
        inputs = [y for t, y in enumerate(inputs) if mask is None or bool(mask[b, t])]
        z = list(module.latents)
        for repeat in range(module.repeats):
            z = _layer(module.readings[1 if repeat else 0], z, inputs)
            for layer in module.tower:
                z = _layer(layer, z, None)
        rows.append(torch.stack(z))
    return torch.stack(rows)


NAMES = {
    "attention.self.layernorm1": "query_norm",
    "attention.self.layernorm2": "input_norm",
    "attention.self.query": "q",
    "attention.output.dense": "out",
    "layernorm": "mlp_norm",
    "mlp.dense1": "into",
    "mlp.dense2": "back",
}


def _pairs(layer: nn.Module, kind: str, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(our name, our parameter or its gradient, theirs), keys and values joined."""
    for theirs, ours in NAMES.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in found:
                parameter = getattr(getattr(layer, ours), part)
                yield f"{ours}.{part}", parameter if kind == "w" else parameter.grad, found[f"{theirs}.{part}"]
    for part in ("weight", "bias"):
        parameter = getattr(layer.kv, part)
        joined = torch.cat([found[f"attention.self.{name}.{part}"] for name in ("key", "value")])
        yield f"kv.{part}", parameter if kind == "w" else parameter.grad, joined


def _under(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package transformers: one reading and two towers, and three readings of its layers; position features.

    Not expressible: perceiver-pytorch's model (gated MLPs, a tower of its own for the first reading) and the softmax
    over queries.
    """
    shape = {"dim": 10, "latents": 5, "latent_dim": 12, "heads": 3}
    layers = ("encoder.self_attends.0.", "encoder.self_attends.1.")

    def fill(model: nn.Module) -> None:
        with torch.no_grad():
            model.latents.copy_(arrays["w.embeddings.latents"])
            for layer, prefix in zip(
                (model.readings[0], *model.tower[:2]), ("encoder.cross_attention.", *layers), strict=True
            ):
                for _, ours, theirs in _pairs(layer, "w", _under(arrays, f"w.{prefix}")):
                    ours.copy_(theirs)

    # one reading and two blocks that share their two layers: a tower of four in which two are the same
    model = system.Perceiver(**shape, depth=4, repeats=1).double()
    model.tower[2], model.tower[3] = model.tower[0], model.tower[1]
    fill(model)
    for case, mask in (("full", None), ("pad", arrays["mask"])):
        model.zero_grad()
        x = arrays["x"].clone().requires_grad_()
        z = model(x, mask=mask)
        z.backward(arrays["cotangent"])
        yield f"out_{case}", z, arrays[f"out_{case}"], 1e-11
        gradients = _under(arrays, f"grad_{case}.")
        yield f"grad_{case}.x", x.grad, gradients["x"], 1e-11
        yield f"grad_{case}.latents", model.latents.grad, gradients["embeddings.latents"], 1e-11
        for layer, prefix in zip(
            (model.readings[0], *model.tower[:2]), ("encoder.cross_attention.", *layers), strict=True
        ):
            for name, ours, theirs in _pairs(layer, "grad", _under(gradients, prefix)):
                yield f"grad_{case}.{prefix}{name}", ours, theirs, 1e-11

    three = system.Perceiver(**shape, depth=2, repeats=3).double()
    fill(three)
    with torch.no_grad():
        for _, ours, theirs in _pairs(three.readings[1], "w", _under(arrays, "t3.second_cross.w.")):
            ours.copy_(theirs)
    x = arrays["x"].clone().requires_grad_()
    z = three(x, mask=arrays["mask"])
    z.backward(arrays["cotangent"])
    yield "t3.out_pad", z, arrays["t3.out_pad"], 1e-11
    yield "t3.grad.x", x.grad, arrays["t3.grad.x"], 1e-11

    # there: for each axis its sines, cosines and coordinate
    bands = int(arrays["rep.settings"][0])
    ours = system.fourier_features((3, 5), bands, resolution=(9, 9))
    theirs = arrays["rep.position_features"].unflatten(-1, (2, 2 * bands + 1))
    parts = theirs[..., -1], theirs[..., :bands].flatten(1), theirs[..., bands:-1].flatten(1)
    yield "rep.position_features", ours, torch.cat(parts, -1), 1e-11
