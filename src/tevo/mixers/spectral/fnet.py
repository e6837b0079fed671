"""FNet: attention is replaced by a Fourier transform over features and tokens; nothing is learned.

    Y = Re(F_n X F_d)                                                        (1)
      = C_n X C_d - S_n X S_d,   C_N[j, k] = cos(2 pi j k / N), S likewise   (2)

F_N is the discrete Fourier transform without normalisation, so that features grow by about sqrt(n d): the authors' blocks
are post-norm. C and S are symmetric, so the map is its own transpose, and its backward pass is the map itself.
Cost O(n d (log n + log d)); no parameters, no state, no causal form. Padding reaches every token.

Source: 2105.03824, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import TokenMixer
from tevo.functional.masks import refuse_context, refuse_mask

CARD = Card(
    id="fnet",
    role="mixer",
    summary="Replaces attention by the real part of a Fourier transform over features and tokens.",
    equations=(r"Y = \mathrm{Re}\left(\mathcal{F}_n\, X\, \mathcal{F}_d\right)",),
    exports={"fnet": "FNet"},
    cost="n log n",
    flops="5 * n * d * (log2(n) + log2(d))",
    parameters="0",
    memory="1",
    claims=("bidirectional",),
    examples=({"dim": 12}, {"dim": 7, "unitary": True}, {"dim": 1}),
    equals=("transformers 5.23.0 FNetModel: mixer, first layer, two-layer model; values in tests/golden/fnet_a.npz",),
    notes=(
        "Use post-norm (residual='post_norm') as the paper does, or unitary=True in a pre-norm block. All sequences of a "
        "batch, in training and later, should be padded to one length: padding mixes into every token."
    ),
)


def fourier_mix(x: Tensor) -> Tensor:
    """Equation (1) for ``x`` (b, n, d); half precision is computed in float32."""
    y: Tensor = _FourierMix.apply(x)
    return y


class _FourierMix(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        d = x.shape[-1]
        if x.numel() == 0:
            return x.clone()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        half = torch.fft.rfft2(wide).real  # b n d/2+1
        # the transform of real numbers at (-a, -b) is the conjugate of that at (a, b)
        rest = half[..., 1 : d - d // 2].flip(-1)
        rest = torch.cat([rest[..., :1, :], rest[..., 1:, :].flip(-2)], -2)
        return torch.cat([half, rest], -1).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return fourier_mix(dy)


class FNet(TokenMixer):
    """Fourier mixing.

    Args:
        dim: width d.
        unitary: divide by sqrt(n d), so that the transform keeps the norm of its input; not in the paper.
    """

    def __init__(self, *, dim: int, unitary: bool = False) -> None:
        super().__init__()
        self.dim, self.unitary = dim, unitary

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); the order of the tokens is that of the tensor, whatever ``at`` says.

        Raises:
            ValueError: a context, a mask, or another width than ``dim``.
        """
        refuse_mask("FNet", mask)
        refuse_context("FNet", context)
        if x.shape[-1] != self.dim:
            raise ValueError(f"FNet was built for dim={self.dim}, got tokens of width {x.shape[-1]}")
        y = fourier_mix(x)
        return y * max(1, x.shape[1] * self.dim) ** -0.5 if self.unitary else y
