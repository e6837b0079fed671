"""The feed-forward, one hidden unit at a time, with each activation in another form than the system's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor) -> Tensor:
    """Sum over hidden units of phi(w . x + b) times the unit's output vector."""
    y = torch.zeros_like(x)
    for unit in range(len(module.into.weight)):
        z = (x * module.into.weight[unit]).sum(-1, keepdim=True)
        z = z if module.into.bias is None else z + module.into.bias[unit]
        y = y + phi(module.activation, z, module.learned) * module.out.weight[:, unit]
    return y if module.out.bias is None else y + module.out.bias


def phi(name: str, z: Tensor, learned: Tensor | None) -> Tensor:
    """By exponentials, sines and absolute values alone."""
    if name == "swish_learned":
        return z / (1 + torch.exp(-learned * z))
    if name == "prelu":
        return (z + z.abs()) / 2 + learned * (z - z.abs()) / 2
    positive, negative = (z + z.abs()) / 2, (z - z.abs()) / 2
    grown = torch.exp(z)
    rising = torch.exp(negative) - 1
    u = math.sqrt(8 / math.pi) * (z + 0.044715 * z * z * z)
    half_turn = math.pi
    forms = {
        "identity": lambda: z,
        "relu": lambda: positive,
        "relu_squared": lambda: positive * z,
        "leaky_relu": lambda: positive + negative / 100,
        "elu": lambda: positive + rising,
        "celu": lambda: positive + rising,
        "selu": lambda: 1.0507009873554804934 * (positive + 1.6732632423543772848 * rising),
        "gelu": lambda: z * torch.erfc(-z / 2**0.5) / 2,
        "gelu_tanh": lambda: z / (1 + torch.exp(-u)),
        "sigmoid": lambda: grown / (1 + grown),
        "tanh": lambda: (grown - 1 / grown) / (grown + 1 / grown),
        "softplus": lambda: torch.log(1 + grown),
        "swish": lambda: z * grown / (1 + grown),
        "mish": lambda: z * ((1 + grown) ** 2 - 1) / ((1 + grown) ** 2 + 1),
        "gcu": lambda: z * torch.sin(z + half_turn / 2),
        "ncu": lambda: z * (1 - z) * (1 + z),
        "squ": lambda: z * (z + 1),
        # sin(z - pi) = sin(z + pi) = -sin z joins the two fractions
        "dsu": lambda: half_turn**2 * torch.sin(z) / (half_turn**2 - z * z),
        "ssu": lambda: half_turn * torch.sin(z) / (half_turn - z),
    }
    return forms[name]()


def beside(system: ModuleType) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The table's slopes against the derivatives of :func:`phi`, at numbers small and large, beside poles and kinks."""
    z = torch.linspace(-6.53, 6.37, 130, dtype=torch.float64)
    # below 0.05 the slope of sin(z) / z is a series; pi is where the decaying units have theirs
    near = torch.tensor([-0.3, -0.049, -0.011, 0.004, 0.031, 0.2], dtype=torch.float64)
    z = torch.cat([z, near, near + math.pi, near - math.pi]).requires_grad_()
    for name, entry in system.ACTIVATIONS.items():
        learned = None if entry.first is None else torch.tensor(0.7, dtype=torch.float64)
        (theirs,) = torch.autograd.grad(phi(name, z, learned).sum(), z)
        ours = entry.slope(z.detach()) if learned is None else entry.slope(z.detach(), learned)
        yield f"slope of {name}", ours, theirs, 1e-10
