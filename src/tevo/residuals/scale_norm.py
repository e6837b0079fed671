"""ScaleNorm: a token is scaled to one learned length, in place of layer normalisation, in a pre-norm wiring.

    ScaleNorm(x) = g x / max(|x|, eps),   g one learned number, at first d^1/2                       (1)
    x <- x + F_s(ScaleNorm_s(x)),  s = 1..S;   after the last block  x <- ScaleNorm(x)               (2)
    FixNorm(E) = every row of the word table E over its length                                       (3)
    SmallInit: attention matrices N(0, 2 / (5 d)), feed-forward matrices N(0, 2 / (d + f))           (4)

The input is d^1/2 FixNorm(E), and tied logits are the products of FixNorm(E) with the output: the last g is then their
temperature. Cost O(n d), no state. Letters: f width of the feed-forward.

Source: 1910.05895, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Residual, Sublayer
from tevo.mixers.softmax.softmax import SoftmaxAttention

CARD = Card(
    id="scale_norm",
    role="residual",
    summary="Norm before each sublayer that scales a token to one learned length; smaller initial attention matrices.",
    equations=(
        r"\mathrm{ScaleNorm}(x) = g\, \frac{x}{\max(\lVert x \rVert_2, \epsilon)},\quad g_0 = \sqrt{d}",
        r"x \leftarrow x + F_s(\mathrm{ScaleNorm}_s(x))",
    ),
    exports={"scale_norm": "PreScaleNorm", "scale_norm_bare": "ScaleNorm"},
    cost="n",
    parameters="sublayers + (1 if depth and index == depth - 1 else 0)",
    memory="n",
    examples=(
        {"part": "scale_norm", "dim": 12},
        {"part": "scale_norm", "dim": 5, "eps": 1.0, "sublayers": 3},
        {"part": "scale_norm", "dim": 4, "depth": 2, "index": 1, "small_init": False},
        {"part": "scale_norm_bare", "dim": 12},
        {"part": "scale_norm_bare", "dim": 5, "eps": 2.0},
        {"part": "scale_norm_bare", "dim": 1},
    ),
    reduces_to=("pre_norm with rms_norm without gain at g = d^1/2, eps -> 0",),
    equals=(
        "tnq177/transformers_without_tears Encoder and Decoder of layers.py; values in tests/golden/scale_norm_a.npz",
    ),
    departures=(
        "SmallInit is applied where the block's mixer is softmax attention, and to every matrix of its channel mixer as "
        "it is stored: stacked gates count their joint width.",
    ),
    notes=(
        "scale_norm_bare is the norm alone, for norm= of other wirings; worse in post_norm, says the paper. FixNorm is the "
        "host's table's: register_parametrization(embedding, 'weight', FixNorm()) normalises it wherever it is used."
    ),
    variants={"scale_norm_bare": {"role": "norm", "claims": ("token_wise",), "parameters": "1"}},
)


def scale_norm(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """Equation (1) for ``x`` (..., d) and a number ``g``; half precision is computed in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (g * F.normalize(wide, dim=-1, eps=eps)).to(x.dtype)


class ScaleNorm(nn.Module):
    """The norm alone.

    Args:
        dim: width d.
        eps: least length that a token is divided by, > 0.
    """

    def __init__(self, *, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"ScaleNorm got eps={eps}; a token of zeros needs eps > 0 to be divided by")
        self.dim, self.eps = dim, eps
        self.g = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The root of d, as in the paper."""
        nn.init.constant_(self.g, self.dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) gives (..., d)."""
        return scale_norm(x, self.g, self.eps)


class FixNorm(nn.Module):
    """Equation (3) as a parametrization of an embedding's weight."""

    def forward(self, table: Tensor) -> Tensor:
        """(V, d) gives rows of length one."""
        return F.normalize(table, dim=-1)


class PreScaleNorm(Residual):
    """Pre-norm wiring with ScaleNorm.

    Args:
        dim: width d.
        eps: least length that a token is divided by, > 0.
        small_init: draw the block's matrices by equation (4).
        sublayers: number of sublayers in the block.
        depth: blocks in the stack.
        index: which of them this is, from 0; the last one ends with the stack's final norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        eps: float = 1e-5,
        small_init: bool = True,
        sublayers: int = 2,
        depth: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__()
        self.small_init = small_init
        self.norms = nn.ModuleList(ScaleNorm(dim=dim, eps=eps) for _ in range(sublayers))
        last = depth is not None and index == depth - 1
        self.final = ScaleNorm(dim=dim, eps=eps) if last else None

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """(b, n, d) through all sublayers."""
        for norm, sublayer in zip(self.norms, sublayers, strict=True):
            x = x + sublayer(norm(x))
        return x if self.final is None else self.final(x)

    def initialise(self, block: nn.Module) -> None:
        """Equation (4): attention as if each of its matrices were a d x 4d one, the feed-forward by Xavier's normal."""
        mixer, channel = getattr(block, "mixer", None), getattr(block, "channel", None)
        if not self.small_init:
            return
        if isinstance(mixer, SoftmaxAttention):
            for linear in _linears(mixer.heads):
                d = linear.out_features if linear is getattr(mixer.heads, "out", None) else linear.in_features
                nn.init.normal_(linear.weight, std=(2 / (5 * d)) ** 0.5)
        if channel is not None:
            for linear in _linears(channel):
                nn.init.xavier_normal_(linear.weight)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
