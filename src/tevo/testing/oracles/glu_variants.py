"""Gated feed-forward, one hidden unit at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor) -> Tensor:
    """Sum over hidden units of g(w . x) (v . x) w_2, with biases where there are any."""
    width = module.out.weight.shape[1]
    w, v = module.into.weight[:width], module.into.weight[width:]
    y = torch.zeros_like(x)
    for unit in range(width):
        z = (x * w[unit]).sum(-1, keepdim=True)
        value = (x * v[unit]).sum(-1, keepdim=True)
        if module.into.bias is not None:
            z, value = z + module.into.bias[unit], value + module.into.bias[width + unit]
        y = y + gate(type(module).__name__, z) * value * module.out.weight[:, unit]
    return y if module.out.bias is None else y + module.out.bias


def gate(name: str, z: Tensor) -> Tensor:
    """The nonlinearity that the class's name says."""
    sigma = 1 / (1 + torch.exp(-z))
    return {
        "GLU": sigma,
        "Bilinear": z,
        "ReGLU": (z + z.abs()) / 2,
        "GEGLU": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "SwiGLU": z * sigma,
    }[name]


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's gated T5 feed-forward with five gates, with the tanh form of GELU, and Llama's with biases."""
    cases = {"glu": "GLU", "bilinear": "Bilinear", "reglu": "ReGLU", "geglu_erf": "GEGLU", "swiglu": "SwiGLU"}
    for case, cls in [*cases.items(), ("swiglu_bias", "SwiGLU")]:
        bias = case == "swiglu_bias"
        module = getattr(system, cls)(dim=12, hidden_dim=20, match_parameters=False, bias=bias).double()
        prefix = "w_bias" if bias else "w"
        w, v, out = ("gate_proj", "up_proj", "down_proj") if bias else ("wi_0", "wi_1", "wo")
        kinds = ("weight", "bias") if bias else ("weight",)
        with torch.no_grad():
            for kind in kinds:
                stacked = torch.cat([arrays[f"{prefix}.{w}.{kind}"], arrays[f"{prefix}.{v}.{kind}"]])
                getattr(module.into, kind).copy_(stacked)
                getattr(module.out, kind).copy_(arrays[f"{prefix}.{out}.{kind}"])
        x = arrays["x"].clone().requires_grad_()
        y = module(x)
        y.backward(arrays["cotangent"])
        yield f"{case}.out", y, arrays[f"{case}.out"], 1e-12
        yield f"{case}.grad.x", x.grad, arrays[f"{case}.grad.x"], 1e-12
        for kind in kinds:
            stacked = torch.cat([arrays[f"{case}.grad.{w}.{kind}"], arrays[f"{case}.grad.{v}.{kind}"]])
            yield f"{case}.grad.{w}+{v}.{kind}", getattr(module.into, kind).grad, stacked, 1e-12
            yield (
                f"{case}.grad.{out}.{kind}",
                getattr(module.out, kind).grad,
                arrays[f"{case}.grad.{out}.{kind}"],
                1e-12,
            )
    # the bare equation takes any gate
    leaves = [arrays[name].clone().requires_grad_() for name in ("x", "w.wi_0.weight", "w.wi_1.weight", "w.wo.weight")]
    y = system.gated(*leaves, lambda z: nn.functional.gelu(z, approximate="tanh"))
    y.backward(arrays["cotangent"])
    yield "geglu_tanh.out", y, arrays["geglu_tanh.out"], 1e-12
    for name, leaf in zip(("x", "wi_0.weight", "wi_1.weight", "wo.weight"), leaves, strict=True):
        yield f"geglu_tanh.grad.{name}", leaf.grad, arrays[f"geglu_tanh.grad.{name}"], 1e-12
