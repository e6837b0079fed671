"""What a CoLT5 layer is compared with: the same heads and widths, and nothing is routed.

*Light*: the light branches alone. *Long*: LongT5's layer, of which the light heads and the heavy ones see the same, a window
and summaries of blocks of 16 tokens; its feed-forward is twice as wide as the light one, as in the CoLT5 paper. Either takes
over the weights that the layer has, so that all begin alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.colt5.layers import ConditionalLayer, GatedFeedForward
from tevo.colt5.longt5 import LongT5Layer
from tevo.functional.masks import blank
from tevo.mixers.local.longt5 import LongT5

__all__ = ["LightLayer", "LongLayer"]


class LightLayer(nn.Module):
    """A layer without its heavy branches.

    Args:
        of: the layer whose light branches and norms it has.
    """

    def __init__(self, *, of: ConditionalLayer) -> None:
        super().__init__()
        self.attention_norm, self.attention = of.attention_norm, of.attention.light
        self.feed_forward_norm, self.feed_forward = of.feed_forward_norm, of.feed_forward.light
        self.dropout = of.dropout

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, forced: Tensor | None = None, forbidden: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d), zeros at padding. There is nothing to force or forbid."""
        if forced is not None or forbidden is not None:
            raise ValueError("LightLayer got forced or forbidden tokens, and routes none; leave them out")
        x = blank(x, mask)
        x = x + F.dropout(self.attention(self.attention_norm(x), mask=mask), self.dropout, self.training)
        y = self.feed_forward(self.feed_forward_norm(x))
        return blank(x + F.dropout(y, self.dropout, self.training), mask)


class LongLayer(LongT5Layer):
    """LongT5's layer, transient-global, with the heads of another.

    Args:
        of: the layer whose heads, tables of distance and norms it has; the tables are copied. Blocks of 16 tokens and their
            table are new, as is the feed-forward, whose output is as loud as the light one's.
    """

    @torch.no_grad()
    def __init__(self, *, of: ConditionalLayer) -> None:
        light, heavy, dim = of.attention.light, of.attention.heavy, of.attention_norm.weight.numel()
        assert light.bias is not None and heavy.bias is not None
        attention = LongT5(
            dim=dim,
            heads=light.heads + heavy.heads,
            head_dim=light.head_dim,
            radius=light.radius,
            buckets=light.bias.buckets,
            max_distance=light.bias.max_distance,
        )
        small = of.feed_forward.light
        feed_forward = GatedFeedForward(dim=dim, hidden_dim=2 * small.out.in_features)
        super().__init__(dim=dim, attention=attention, feed_forward=feed_forward, dropout=of.dropout)
        q, k, v = light.qkv.weight.chunk(3)
        more_k, more_v = heavy.kv.weight.chunk(2)
        attention.q.weight.copy_(torch.cat([q, heavy.q.weight]))
        attention.kv.weight.copy_(torch.cat([k, more_k, v, more_v]))
        attention.out.weight.copy_(torch.cat([light.out.weight, heavy.out.weight], 1))
        attention.bias.copy_(torch.cat([light.bias.table, heavy.bias.table]))
        feed_forward.out.weight.mul_(small.out.weight.std() / feed_forward.out.weight.std())
        self.attention_norm, self.feed_forward_norm = of.attention_norm, of.feed_forward_norm

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, forced: Tensor | None = None, forbidden: Tensor | None = None
    ) -> Tensor:
        """As :meth:`LightLayer.forward`."""
        if forced is not None or forbidden is not None:
            raise ValueError("LongLayer got forced or forbidden tokens, and routes none; leave them out")
        return super().forward(x, mask=mask)
