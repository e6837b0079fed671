"""Activation functions of the feed-forward, the oscillating ones among them, in one table.

    FFN(x) = phi(x W_1 + b_1) W_2 + b_2

    gcu(z) = z cos z        ncu(z) = z - z^3        squ(z) = z^2 + z
    dsu(z) = pi/2 (S(z - pi) - S(z + pi))           ssu(z) = pi S(z - pi)           S(z) = sin(z) / z
    swish(z) = z sigmoid(beta z)                    mish(z) = z tanh(log(1 + e^z))

and the usual ones (``ACTIVATIONS``), each with its derivative. S is the cardinal sine that is not normalised. A unit
whose function has more than one zero, as gcu, can realise XOR alone. Cost O(n d f), no state. Letters: f hidden units.

Source: 2204.02921, sections 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import ChannelMixer
from tevo.names import suggest

CARD = Card(
    id="activation_zoo",
    role="channel",
    summary="Any of 21 activation functions between the feed-forward's two maps, oscillating ones among them.",
    equations=(
        r"\mathrm{FFN}(x) = \phi(x W_1 + b_1)\, W_2 + b_2",
        r"\mathrm{GCU}(z) = z \cos z,\quad \mathrm{NCU}(z) = z - z^3,\quad \mathrm{SQU}(z) = z^2 + z",
        r"\mathrm{DSU}(z) = \tfrac{\pi}{2} \big(S(z - \pi) - S(z + \pi)\big),\quad \mathrm{SSU}(z) = \pi S(z - \pi),"
        r"\quad S(z) = \tfrac{\sin z}{z}",
    ),
    exports={"activation_zoo": "ActivatedFeedForward"},
    cost="n",
    flops="4 * n * d * (hidden_dim or 4 * d)",
    parameters=(
        "2 * d * (hidden_dim or 4 * d) + bias * ((hidden_dim or 4 * d) + d)"
        " + (activation in ('prelu', 'swish_learned'))"
    ),
    memory="n",
    claims=("token_wise",),
    examples=(
        {"dim": 12},
        {"dim": 5, "hidden_dim": 7, "activation": "ncu"},
        {"dim": 3, "hidden_dim": 5, "activation": "squ", "bias": False},
        {"dim": 5, "hidden_dim": 7, "activation": "dsu"},
        {"dim": 5, "hidden_dim": 7, "activation": "ssu"},
        {"dim": 5, "hidden_dim": 7, "activation": "mish"},
        {"dim": 5, "hidden_dim": 7, "activation": "swish"},
        {"dim": 5, "hidden_dim": 7, "activation": "swish_learned"},
        {"dim": 5, "hidden_dim": 7, "activation": "identity"},
        {"dim": 5, "hidden_dim": 7, "activation": "relu"},
        {"dim": 5, "hidden_dim": 7, "activation": "relu_squared"},
        {"dim": 5, "hidden_dim": 7, "activation": "leaky_relu"},
        {"dim": 5, "hidden_dim": 7, "activation": "prelu"},
        {"dim": 5, "hidden_dim": 7, "activation": "elu"},
        {"dim": 5, "hidden_dim": 7, "activation": "selu"},
        {"dim": 5, "hidden_dim": 7, "activation": "celu"},
        {"dim": 5, "hidden_dim": 7, "activation": "gelu"},
        {"dim": 5, "hidden_dim": 7, "activation": "gelu_tanh"},
        {"dim": 5, "hidden_dim": 7, "activation": "sigmoid"},
        {"dim": 5, "hidden_dim": 7, "activation": "tanh"},
        {"dim": 5, "hidden_dim": 7, "activation": "softplus"},
    ),
    reduces_to=("feed_forward at activation='gelu' or 'relu'",),
    equals=("torch.nn.functional silu, mish, gelu (both forms), elu, selu, celu, softplus",),
    departures=(
        "Learned parameters (swish_learned, prelu) are one number a layer, the paper's form; one a channel is not offered.",
    ),
    notes=(
        "ncu and squ are polynomials: deep stacks of them explode, and cubes of 41 overflow float16. gelu and gelu_tanh "
        "differ by up to 5e-4; BERT and GPT-2 checkpoints take the tanh form. celu at its alpha of 1 is elu."
    ),
)


class Activation(NamedTuple):
    """A function of a number and its derivative; with ``first`` both take a learned number that starts there."""

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    monotone: bool
    bounded: bool
    zero_at_zero: bool
    first: float | None = None


def sine_over(z: Tensor) -> Tensor:
    """S(z) = sin(z) / z, 1 at 0; torch's sinc is that of pi z."""
    return torch.sinc(z / math.pi)


def sine_over_slope(z: Tensor) -> Tensor:
    """S'(z) = (z cos z - sin z) / z^2, 0 at 0."""
    small = z.abs() < 0.05
    # the difference of nearly equal terms, by its series
    series = -z / 3 + z**3 / 30 - z**5 / 840 + z**7 / 45360
    safe = z.where(~small, 1.0)
    return torch.where(small, series, (safe * safe.cos() - safe.sin()) / safe.square())


def swish(z: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Z sigmoid(beta z)."""
    return z * torch.sigmoid(beta * z)


def swish_slope(z: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Of :func:`swish` by z."""
    sigma = torch.sigmoid(beta * z)
    return sigma + beta * z * sigma * (1 - sigma)


def mish_slope(z: Tensor) -> Tensor:
    """Of z tanh(softplus(z))."""
    t = F.softplus(z).tanh()
    return t + z * (1 - t.square()) * z.sigmoid()


def dsu(z: Tensor) -> Tensor:
    """The decaying sine unit."""
    return math.pi / 2 * (sine_over(z - math.pi) - sine_over(z + math.pi))


def dsu_slope(z: Tensor) -> Tensor:
    """Of :func:`dsu`."""
    return math.pi / 2 * (sine_over_slope(z - math.pi) - sine_over_slope(z + math.pi))


def gelu_slope(z: Tensor) -> Tensor:
    """Phi(z) + z phi(z), with the normal distribution and its density."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2 + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_slope(z: Tensor) -> Tensor:
    """Of z (1 + tanh(u)) / 2 with u = (2 / pi)^1/2 (z + 0.044715 z^3)."""
    c = math.sqrt(2 / math.pi)
    t = (c * (z + 0.044715 * z**3)).tanh()
    return (1 + t) / 2 + z / 2 * (1 - t.square()) * c * (1 + 3 * 0.044715 * z.square())


def _step(z: Tensor, below: Tensor | float, above: float = 1.0) -> Tensor:
    return torch.where(z > 0, above, below * torch.ones_like(z))


# the constants of self-normalising networks
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

#                                 value and slope                                            monotone bounded zero at zero
ACTIVATIONS = {
    "identity": Activation(lambda z: z, torch.ones_like, True, False, True),
    "relu": Activation(F.relu, lambda z: _step(z, 0.0), True, False, True),
    "relu_squared": Activation(lambda z: F.relu(z).square(), lambda z: 2 * F.relu(z), True, False, True),
    "leaky_relu": Activation(F.leaky_relu, lambda z: _step(z, 0.01), True, False, True),
    "prelu": Activation(lambda z, a: torch.where(z > 0, z, a * z), _step, True, False, True, 0.25),
    "elu": Activation(F.elu, lambda z: _step(z, z.exp()), True, False, True),
    "selu": Activation(F.selu, lambda z: _step(z, SELU_SCALE * SELU_ALPHA * z.exp(), SELU_SCALE), True, False, True),
    "celu": Activation(F.celu, lambda z: _step(z, z.exp()), True, False, True),
    "gelu": Activation(F.gelu, gelu_slope, False, False, True),
    "gelu_tanh": Activation(lambda z: F.gelu(z, approximate="tanh"), gelu_tanh_slope, False, False, True),
    "sigmoid": Activation(torch.sigmoid, lambda z: z.sigmoid() * (1 - z.sigmoid()), True, True, False),
    "tanh": Activation(torch.tanh, lambda z: 1 - z.tanh().square(), True, True, True),
    "softplus": Activation(F.softplus, torch.sigmoid, True, False, False),
    "swish": Activation(swish, swish_slope, False, False, True),
    "swish_learned": Activation(swish, swish_slope, False, False, True, 1.0),
    "mish": Activation(F.mish, mish_slope, False, False, True),
    "gcu": Activation(lambda z: z * z.cos(), lambda z: z.cos() - z * z.sin(), False, False, True),
    "ncu": Activation(lambda z: z - z**3, lambda z: 1 - 3 * z.square(), False, False, True),
    "squ": Activation(lambda z: z.square() + z, lambda z: 2 * z + 1, False, False, True),
    "dsu": Activation(dsu, dsu_slope, False, True, True),
    "ssu": Activation(
        lambda z: math.pi * sine_over(z - math.pi), lambda z: math.pi * sine_over_slope(z - math.pi), False, True, True
    ),
}


class ActivatedFeedForward(ChannelMixer):
    """Feed-forward with an activation of the table.

    Args:
        dim: width d.
        hidden_dim: number f of hidden units; by default 4 dim.
        activation: a name of ``ACTIVATIONS``.
        bias: whether the maps have biases.
    """

    def __init__(self, *, dim: int, hidden_dim: int | None = None, activation: str = "gcu", bias: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            meant = suggest(activation, ACTIVATIONS)
            raise ValueError(
                f"ActivatedFeedForward got activation={activation!r}{meant}; choose among {', '.join(ACTIVATIONS)}"
            )
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.activation = activation
        self.into = nn.Linear(dim, hidden_dim, bias=bias)
        self.out = nn.Linear(hidden_dim, dim, bias=bias)
        first = ACTIVATIONS[activation].first
        self.learned = None if first is None else nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform matrices and zero biases, as the plain feed-forward; the learned number at its table's start."""
        for linear in (self.into, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        first = ACTIVATIONS[self.activation].first
        if self.learned is not None and first is not None:
            nn.init.constant_(self.learned, first)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); tokens are independent, so a mask changes nothing."""
        # looked up here, because a module that holds a lambda cannot be pickled
        z, phi = self.into(x), ACTIVATIONS[self.activation].value
        y: Tensor = self.out(phi(z) if self.learned is None else phi(z, self.learned))
        return y
