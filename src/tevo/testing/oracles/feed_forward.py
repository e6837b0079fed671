"""Feed-forward, one hidden unit at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

GOLDEN = "glu_variants_a.npz"


def reference(module: nn.Module, x: Tensor) -> Tensor:
    """Sum over hidden units of act(x . w_1 + b_1) w_2, plus b_2."""
    y = torch.zeros_like(x)
    for unit in range(module.into.weight.shape[0]):
        z = (x * module.into.weight[unit]).sum(-1, keepdim=True)
        if module.into.bias is not None:
            z = z + module.into.bias[unit]
        # the class says which nonlinearity it is: x Phi(x), or the positive part
        a = z * (1 + torch.erf(z / math.sqrt(2))) / 2 if type(module).__name__ == "GELU" else (z + z.abs()) / 2
        y = y + a * module.out.weight[:, unit]
    return y if module.out.bias is None else y + module.out.bias


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's T5 feed-forward with ReLU, which has no biases."""
    module = system.ReLU(dim=12, hidden_dim=20, bias=False).double()
    with torch.no_grad():
        module.into.weight.copy_(arrays["w_plain.wi.weight"])
        module.out.weight.copy_(arrays["w_plain.wo.weight"])
    x = arrays["x"].clone().requires_grad_()
    y = module(x)
    y.backward(arrays["cotangent"])
    yield "ffn_relu.out", y, arrays["ffn_relu.out"], 1e-12
    yield "ffn_relu.grad.x", x.grad, arrays["ffn_relu.grad.x"], 1e-12
    yield "ffn_relu.grad.wi", module.into.weight.grad, arrays["ffn_relu.grad.wi.weight"], 1e-12
    yield "ffn_relu.grad.wo", module.out.weight.grad, arrays["ffn_relu.grad.wo.weight"], 1e-12
