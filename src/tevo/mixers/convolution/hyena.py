"""Hyena operator: attention replaced by gates between long convolutions whose filters a small network generates.

    (x_0, ..., x_{N-1}, v) = short(u W_in + b_in)                  short: causal, three taps a channel
    v <- h_o * (x v) + bias_o (x v),    x = x_{N-1}, ..., x_1      * is convolution, o = 0, ..., N-2       (1)
    y = (x_0 v) W_out + b_out
    h(t) = MLP(z_t) exp(-|delta| t / (L - 1)),    z_t = [t / (L - 1); cos(f 2 pi t / L); -sin(f 2 pi t / L)]

The MLP's nonlinearity is sin(w .) with one trainable w for all its layers. Order N has N - 1 long convolutions, as in the
authors' code (the paper's text counts N). Letters: L greatest length. Cost O(N d n log n + N n d^2) FLOPs; no recurrence:
decoding keeps every convolution's inputs and costs O(N n d) a token, beside the filter's first n taps.

Source: 2302.10866, section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.fft_conv import fft_conv, short_conv
from tevo.functional.masks import blank, check_mask, refuse_context
from tevo.functional.precision import island

CARD = Card(
    id="hyena",
    role="mixer",
    summary="Attention replaced by element-wise gates between long convolutions with implicit filters.",
    equations=(
        r"(x_0, \dots, x_{N-1}, v) = \mathrm{short}(u W_{in} + b_{in})",
        r"v \leftarrow h_o * (x \odot v) + b_o \odot (x \odot v),\quad x = x_{N-1}, \dots, x_1",
        r"y = (x_0 \odot v) W_{out} + b_{out}",
        r"h(t) = \mathrm{MLP}(z_t) \odot e^{-|\delta| t / (L-1)}",
    ),
    exports={"hyena": "Hyena"},
    cost="n log n",
    state="(order - 1) * n * d + 2 * (order + 1) * d",
    parameters=(
        "(order + 1) * d * (d + 5) + length * emb_dim + (order - 1) * d + d * d + d"
        " + filter_dim * (emb_dim + 2 * filter_dim + 4 + (order - 1) * d)"
    ),
    memory="n",
    claims=("causal", "padding", "fixed_length", "exact_state"),
    examples=(
        {"dim": 12, "length": 17, "emb_dim": 5, "filter_dim": 7},
        {"dim": 5, "length": 23, "order": 3, "emb_dim": 3, "filter_dim": 9, "frequency": 1.0},
        {"dim": 3, "length": 19, "order": 4, "emb_dim": 7, "filter_dim": 5, "frequency": 10.0},
    ),
    equals=("HazyResearch/safari at 02220c6, standalone_hyena.py, HyenaOperator",),
    departures=(
        "The authors train the positional features z with a learning rate of 1e-5; here they have the recipe's. Neither "
        "they nor the filter network are decayed, as there.",
        "The window's decay rates are spread over the channels of all N - 1 filters, as in the authors' code; the paper "
        "does not say how for N > 2.",
    ),
    tolerances={
        "causal": ("FFT", "the transform carries rounding errors of the whole sequence into every output"),
    },
    notes=(
        "FLOPs are counted, not declared: transforms have the next length with the factors 2, 3 and 5 only. Padding takes "
        "part of the length, and between real tokens it counts as distance."
    ),
)

# the window falls to this at 1.5 lengths in the slowest channel and at 0.3 lengths in the fastest, as in the authors' code
_TARGET, _SLOWEST, _FASTEST = 1e-2, 1.5, 0.3


def positional_features(length: int, emb_dim: int) -> Tensor:
    """The initial z (L, emb_dim), in float64."""
    t = torch.arange(length, dtype=torch.float64)[:, None]
    bands = (emb_dim - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    angle = f * 2 * math.pi * t / length
    return torch.cat([t / max(length - 1, 1), angle.cos(), -angle.sin()], -1)


def long_conv(u: Tensor, h: Tensor, last: int) -> Tensor:
    """The ``last`` outputs (b, last, d) of the causal convolution of u (b, n, d) with h (d, n)."""
    if last == 1:
        return torch.einsum("bnd, dn -> bd", u, h.flip(-1).to(u.dtype))[:, None]
    return fft_conv(u, h)[:, u.shape[1] - last :]


class Hyena(TokenMixer):
    """The Hyena operator.

    Args:
        dim: width d.
        length: greatest length L; fewer tokens use the first taps of the filters.
        order: N >= 2, one more than the long convolutions.
        emb_dim: features of a position, odd, >= 3.
        filter_dim: width of the filter network.
        frequency: initial w of its sines, 1 to 14 in the paper's models.
        causal: there is no other form.
        dropout: probability with which an input of a long convolution is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        order: int = 2,
        emb_dim: int = 33,
        filter_dim: int = 64,
        frequency: float = 14.0,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("Hyena's convolutions look back only; build it with causal=True")
        if order < 2 or emb_dim < 3 or emb_dim % 2 == 0 or length < 1:
            raise ValueError(
                f"Hyena got order={order}, emb_dim={emb_dim}, length={length}; expected order >= 2, an odd emb_dim >= 3 and "
                "length >= 1"
            )
        self.length = length
        self.order = order
        self.dropout = dropout
        self.initial_frequency = frequency
        self.into = nn.Linear(dim, (order + 1) * dim)
        self.short = nn.Parameter(torch.empty((order + 1) * dim, 3))
        self.short_bias = nn.Parameter(torch.empty((order + 1) * dim))
        self.features = nn.Parameter(torch.empty(length, emb_dim))
        self.frequency = nn.Parameter(torch.empty(filter_dim))
        self.mlp = nn.ModuleList(
            [
                nn.Linear(emb_dim, filter_dim),
                nn.Linear(filter_dim, filter_dim),
                nn.Linear(filter_dim, filter_dim),
                nn.Linear(filter_dim, (order - 1) * dim, bias=False),
            ]
        )
        self.skip = nn.Parameter(torch.empty(order - 1, dim))
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Torch's own for linear maps and the short filter (uniform, |w| <= 3^-1/2), skip N(0, 1): the authors' code."""
        for linear in (self.into, self.out, *self.mlp):
            linear.reset_parameters()
        nn.init.uniform_(self.short, -(3**-0.5), 3**-0.5)
        nn.init.uniform_(self.short_bias, -(3**-0.5), 3**-0.5)
        self.features.copy_(positional_features(*self.features.shape))
        nn.init.constant_(self.frequency, self.initial_frequency)
        nn.init.normal_(self.skip)

    def no_decay(self) -> set[str]:
        """What generates the filters, and the skip."""
        return {"features", "skip", *(f"mlp.{i}.weight" for i in range(len(self.mlp)))}

    def window(self, n: int) -> Tensor:
        """exp(-|delta| t / (L - 1)) at the first n positions (n, (N-1) d), in float32 for half precision."""
        dtype, device = torch.promote_types(self.features.dtype, torch.float32), self.features.device
        time = torch.linspace(0, 1, self.length, dtype=dtype, device=device)[:n, None]
        least, most = (-math.log(_TARGET) / at for at in (_SLOWEST, _FASTEST))
        return torch.exp(-time * torch.linspace(least, most, self.skip.numel(), dtype=dtype, device=device))

    def filter(self, n: int) -> Tensor:
        """The first n taps (n, (N-1) d), in float32 for half precision."""
        window = self.window(n)
        z = self.features[:n].to(window.dtype)
        # a sine of large arguments needs its digits
        with island(z):
            for layer in self.mlp:
                assert isinstance(layer, nn.Linear)
                bias = None if layer.bias is None else layer.bias.to(z.dtype)
                z = F.linear(z, layer.weight.to(z.dtype), bias)
                z = z if bias is None else torch.sin(self.frequency.to(z.dtype) * z)
        return z * window

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) of padding on either side; order is that of the tokens, not ``at``."""
        return self.step(x, self.init_state(len(x), context=context), mask=mask)[0]

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Two inputs of the short filter (b, 2, (N+1) d), and the inputs of the long ones (b, 0, (N-1) d)."""
        refuse_context("Hyena", context)
        return self.skip.new_zeros(batch, 2, len(self.short)), self.skip.new_zeros(batch, 0, self.skip.numel())

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); padding between real tokens would count as distance, so that only a first piece has any.

        Raises:
            ValueError: padding in a later piece (read from the CPU only, and not while compiling).
        """
        assert isinstance(state, tuple)
        tail, past = state
        assert isinstance(tail, Tensor) and isinstance(past, Tensor)
        check_mask("Hyena", mask, x.shape[0], x.shape[1])
        readable = mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if past.shape[1] and readable and mask is not None and not bool(mask.all()):
            raise ValueError(
                f"Hyena got padding in a piece that follows {past.shape[1]} tokens, where it would count as distance; pad "
                "the first piece only"
            )
        n, total = x.shape[1], past.shape[1] + x.shape[1]
        if total > self.length:
            raise ValueError(
                f"Hyena was built for length={self.length} tokens, got n={total}; rebuild with length>={total}"
            )
        # the projection has a bias: padding is blanked behind it too, and once more where it enters a convolution
        z = blank(self.into(blank(x, mask)), mask)
        z, tail = short_conv(z, self.short, bias=self.short_bias, state=tail)
        *gates, v = z.chunk(self.order + 1, -1)
        # an empty sequence still needs a filter of one tap
        filters = self.filter(max(total, 1)).mT.chunk(self.order - 1)
        inputs = []
        for gate, h, skip, before in zip(
            reversed(gates[1:]), filters, self.skip, past.chunk(self.order - 1, -1), strict=True
        ):
            u = blank(F.dropout(v * gate, self.dropout, self.training), mask)
            inputs.append(torch.cat([before, u], 1))
            v = long_conv(inputs[-1], h, n) + skip * u  # (eq. 1)
        return self.out(v * gates[0]), (tail, torch.cat(inputs, -1))
