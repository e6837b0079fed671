"""RealFormer: every attention layer adds the scores of the one before to its own.

    S_l = Q_l K_l^T / sqrt(e) + S_{l-1},   S_0 = 0,   head by head, before any mask                          (1)
    A_l = softmax(S_l + mask),   or, with a running mean, softmax(S_l / l + mask)                            (2)
    x <- N(x + A_l V_l W_o),   x <- N(x + FFN(x))                                                            (3)

Nothing is learned for it. Cost that of attention and h n^2 additions a layer, with the scores kept from layer to layer.
A query's scores depend on its own row of the layer before alone, so the causal form decodes exactly from cached keys and
values.

Source: 2012.11747, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import Spec
from tevo.contracts import Stack, State
from tevo.functional.attention import scores, softmax_weights, weighted
from tevo.functional.cache import append
from tevo.functional.masks import blank, causal_mask, check_mask
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.models.block import build
from tevo.residuals.post_norm import PostNorm
from tevo.taps import tap

CARD = Card(
    id="realformer",
    role="stack",
    summary="Adds the attention scores of each layer to those of the next, in a post-norm stack.",
    equations=(
        r"S_l = \frac{Q_l K_l^\top}{\sqrt{e}} + S_{l-1},\quad A_l = \mathrm{softmax}(S_l + \mathrm{mask})",
        r"x \leftarrow \mathrm{LN}(x + A_l V_l W_o),\quad x \leftarrow \mathrm{LN}(x + \mathrm{FFN}(x))",
    ),
    exports={"realformer": "RealFormer"},
    cost="n^2",
    flops="depth * (8 * n * d * d + 4 * n * n * d + 4 * n * d * (hidden_dim or 4 * d))",
    state="2 * depth * n * d",
    parameters=(
        "depth * (4 * d * d + 4 * d * bias + 2 * (2 * d if norm == 'layer_norm' else d)"
        " + (2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d) + d"
        " if channel in ('gelu', 'relu') else 3 * d * ((2 * (hidden_dim or 4 * d) + 1) // 3)))"
    ),
    memory="n^2",
    claims=("bidirectional", "causal", "padding", "equivariant", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "depth": 3, "causal": True, "hidden_dim": 7},
        {"dim": 12, "heads": 3, "depth": 2},
        {"dim": 6, "heads": 2, "depth": 3, "mean": True, "bias": False, "norm": "rms_norm", "channel": "swiglu"},
        {"dim": 4, "heads": 1, "depth": 1, "causal": True, "mean": True},
    ),
    reduces_to=("a post-norm stack of softmax attention at depth = 1",),
    equals=(
        "x-transformers 2.31.10 Encoder and Decoder with residual_attn, post-norm; the authors' BERT form, retyped; values "
        "in tests/golden/realformer_a.npz",
    ),
    departures=(
        "GELU in its erf form, the house's; the authors' code takes the tanh form, within 1e-3 of it.",
        "The chain of a decoder's cross-attention is left out: a stack has no second sequence.",
    ),
    notes="The mean is the authors' advice for 30 layers and more. Scores must be kept, so that no fused kernel applies.",
)


class RealFormer(Stack):
    """A stack with residual attention.

    Args:
        dim: width d.
        heads: number of heads h, the same in all layers.
        depth: number of layers.
        causal: a token sees itself and earlier ones.
        channel: channel mixer of each layer.
        hidden_dim: width inside the channel mixers; None leaves their own choice.
        norm: the norms.
        bias: whether the projections of attention have biases.
        mean: divide the sum of scores by the number of layers in it.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        depth: int = 12,
        causal: bool = False,
        channel: Spec = "gelu",
        hidden_dim: int | None = None,
        norm: str = "layer_norm",
        bias: bool = True,
        mean: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"RealFormer got depth={depth}, expected at least 1 layer")
        self.dim, self.causal, self.mean, self.dropout = dim, causal, mean, dropout
        wanted = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
        self.heads = nn.ModuleList(MultiHead(dim=dim, heads=heads, bias=bias) for _ in range(depth))
        self.channels = nn.ModuleList(build("channel", channel, {"dim": dim}, wanted) for _ in range(depth))
        self.residuals = nn.ModuleList(PostNorm(dim=dim, norm=norm) for _ in range(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 0.02, truncated at 2 of them, zero biases, as BERT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); the order of the tokens is that of the tensor."""
        n = x.shape[1]
        check_mask("RealFormer", mask, x.shape[0], n)
        allowed = None if mask is None else mask[:, None, None]  # b 1 1 n
        if self.causal:
            triangle = causal_mask(n, n, x.device)
            allowed = triangle if allowed is None else allowed & triangle
        return self._run(blank(x, mask), allowed, lambda _, k, v: (k, v))

    def _run(
        self, x: Tensor, allowed: Tensor | None, extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """All layers; ``extend(layer, k, v)`` gives the keys and values (b, h, m, e) that queries see."""
        total: Tensor | None = None
        for layer, (heads, channel, residual) in enumerate(zip(self.heads, self.channels, self.residuals, strict=True)):

            def mix(y: Tensor, layer: int = layer, heads: nn.Module = heads) -> Tensor:
                nonlocal total
                assert isinstance(heads, MultiHead)
                q, k, v = heads.split(y, y)
                k, v = extend(layer, k, v)
                own = scores(q, k)  # b h n m
                total = own if total is None else total + own
                s = total / (layer + 1) if self.mean else total
                weights = tap("attention", softmax_weights(s, allowed))
                return self._drop(heads.merge(weighted(weights, v)))

            def transform(y: Tensor, channel: nn.Module = channel) -> Tensor:
                return self._drop(channel(y))

            x = residual(x, (mix, transform))
        return x

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Count (b,), mask (b, cap), and of each layer keys and values (b, h, cap, e), with spare room."""
        if not self.causal:
            raise ValueError("RealFormer(causal=False) has no state of its own; build it with causal=True")
        like = next(self.parameters())
        none = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        caches = []
        for heads in self.heads:
            assert isinstance(heads, MultiHead)
            empty = like.new_zeros(batch, 0, self.dim)
            caches.append(heads.split(empty, empty)[1:])
        return none.long().sum(1), none, tuple(caches)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); the caches of ``state`` are written in place where no gradient needs them."""
        count, seen, caches = state
        assert isinstance(count, Tensor) and isinstance(seen, Tensor) and isinstance(caches, tuple)
        b, n = x.shape[:2]
        check_mask("RealFormer", mask, b, n)
        past = int(count[0]) if b else 0
        new = mask if mask is not None else torch.ones(b, n, dtype=torch.bool, device=x.device)
        seen, real = append(seen, new, past, dim=1)
        after: list[State] = []

        def extend(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            k_cache, v_cache = caches[layer]
            assert isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)
            k_cache, keys = append(k_cache, k, past, dim=2)
            v_cache, values = append(v_cache, v, past, dim=2)
            after.append((k_cache, v_cache))
            return keys, values

        allowed = real[:, None, None] & causal_mask(n, past + n, x.device)
        y = self._run(blank(x, mask), allowed, extend)
        return y, (count + n, seen, tuple(after))
