"""MEFT as an ordinary network of two streams, each layer written out, with ordinary gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reversible encoder: (b, n, d), mask (b, n), gives (b, n, d)."""
    return torch.stack([_encode(model, x[b], None if mask is None else mask[b]) for b in range(len(x))])


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean(-1, keepdim=True)
    return z / (z.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def _hidden(into: nn.Module, out: nn.Module, x: Tensor) -> Tensor:
    """Both the feed-forward and an adapter: two maps with GELU between."""
    hidden = _linear(into, x)
    return _linear(out, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def _attention(heads: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    x = x.where(real[:, None], torch.zeros_like(x))
    q, (k, v) = _linear(heads.q, x), _linear(heads.kv, x).chunk(2, -1)
    e, parts = q.shape[-1] // heads.heads, []
    for h in range(heads.heads):
        part = slice(h * e, (h + 1) * e)
        power = (q[:, part] @ k[:, part].T / math.sqrt(e)).exp() * real
        parts.append(power @ v[:, part] / power.sum(-1, keepdim=True))
    return _linear(heads.out, torch.cat(parts, -1))


def _encode(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence (n, d) through the two streams."""
    real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    scale, shift = model.stack.factors
    h1 = h2 = x
    for layer in model.stack.layers:
        block, norms = layer.block, layer.block.residual.norms
        halves = hasattr(block.mixer, "adapter")

        def attend(h: Tensor, block: nn.Module = block, norms: nn.Module = norms, halves: bool = halves) -> Tensor:
            mixer = block.mixer.mixer if halves else block.mixer
            m = _attention(mixer.heads, _norm(norms[0], h), real)
            return h + (m + _hidden(block.mixer.adapter.into, block.mixer.adapter.out, m) if halves else m)

        def feed(h: Tensor, block: nn.Module = block, norms: nn.Module = norms) -> Tensor:
            y, channel, beside = _norm(norms[1], h), block.channel.channel, block.channel.adapter
            h = h + _hidden(channel.into, channel.out, y) + _hidden(beside.into, beside.out, y)
            return h if block.residual.final is None else _norm(block.residual.final, h)

        def whole(
            h: Tensor, first: Callable[[Tensor], Tensor] = attend, then: Callable[[Tensor], Tensor] = feed
        ) -> Tensor:
            return then(first(h))

        if halves:
            h1 = scale * h1 + attend(h2)
            h2 = shift * h2 + feed(h1)
            continue

        def adapt(h: Tensor, own: nn.Module = layer.adapter) -> Tensor:
            return _hidden(own.into, own.out, h)

        f, g = (whole, adapt) if type(layer).__name__ == "LayerFirst" else (adapt, whole)
        y1 = scale * h1 + f(h2)
        y2 = shift * h2 + g(y1)
        h1, h2 = y2, y1
    return (h1 + h2) / 2


class KeysSeen(nn.Module):
    """Attention to real keys only, of queries that are padding too, as the official layers have it."""

    def __init__(self, attention: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.attention, self.seen = attention, mask[:, None].expand(-1, mask.shape[1], -1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        return self.attention(x, attend=self.seen)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The released encoder on BERT layers: outputs, streams and gradients of each variant, reversible and ordinary."""
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention
    from tevo.models.encoder import Encoder

    factors = float(arrays["in.lambda"]), float(arrays["in.beta"])
    for case, cls in (("meft1", system.MEFT1), ("meft2", system.MEFT2), ("meft3", system.MEFT3)):
        mixers = [
            KeysSeen(SoftmaxAttention(dim=12, heads=MultiHead(dim=12, heads=3, bias=True)), arrays["in.mask"])
            for _ in range(3)
        ]
        model = Encoder(dim=12, depth=3, heads=3, mixer=mixers, residual="post_norm", hidden_dim=19).double()
        for recomputed, name in ((None, f"{case}.rev"), (0, case)):
            if recomputed is None:
                adapter = cls(rank=5, factors=factors)
                adapter.attach(model)
                pairs = [pair for i, layer in enumerate(model.stack.layers) for pair in _pairs(layer, i, case)]
                with torch.no_grad():
                    for module, part, named in pairs:
                        getattr(module, part).copy_(arrays[f"{case}.w.{named}"])
                    # keys and values are one map here
                    for i, layer in enumerate(model.stack.layers):
                        own = f"{case}.w.layer.{i}.attention.self."
                        for part in ("weight", "bias"):
                            both = [arrays[f"{own}{role}.{part}"] for role in ("key", "value")]
                            getattr(_heads(layer).kv, part).copy_(torch.cat(both))
                        for norm in layer.block.residual.norms:
                            norm.eps = 1e-12
            else:
                # the ordinary gradients of all weights, the trained ones too
                model.stack.recomputed = 0
                model.requires_grad_(True)
            x = arrays["in.x"].clone().requires_grad_()
            h1, h2 = model.stack.streams(x)
            y = (h1 + h2) / 2
            yield f"{name}.out.y", y, arrays[f"{case}.out.y"], 1e-11
            yield f"{name}.out.stream1", h1, arrays[f"{case}.out.stream1"], 1e-11
            yield f"{name}.out.stream2", h2, arrays[f"{case}.out.stream2"], 1e-11
            model.zero_grad()
            y.backward(arrays[f"{case}.cot.y"])
            yield f"{name}.grad.in.x", x.grad, arrays[f"{name}.grad.in.x"], 1e-11
            for module, part, named in pairs:
                ours = getattr(module, part).grad
                if ours is not None:
                    yield f"{name}.grad.w.{named}", ours, arrays[f"{case}.grad.w.{named}"], 1e-11
            if recomputed == 0:
                for i, layer in enumerate(model.stack.layers):
                    own = f"layer.{i}.attention.self."
                    for part in ("weight", "bias"):
                        both = [arrays[f"{case}.grad.w.{own}{role}.{part}"] for role in ("key", "value")]
                        yield (
                            f"{name}.grad.w.{own}kv.{part}",
                            getattr(_heads(layer).kv, part).grad,
                            torch.cat(both),
                            1e-11,
                        )


def _heads(layer: nn.Module) -> nn.Module:
    mixer = layer.block.mixer
    return (mixer.mixer if hasattr(mixer, "adapter") else mixer).attention.heads


def _pairs(layer: nn.Module, index: int, case: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Our module, its parameter's name, and the official name; keys and values are apart."""
    block, own = layer.block, f"layer.{index}."
    named = {
        "attention.self.query": _heads(layer).q,
        "attention.output.dense": _heads(layer).out,
        "attention.output.LayerNorm": block.residual.norms[0],
        "intermediate.dense": block.channel.channel.into,
        "output.dense": block.channel.channel.out,
        "output.LayerNorm": block.residual.norms[1],
        "ffn_adapter.dense1": block.channel.adapter.into,
        "ffn_adapter.dense2": block.channel.adapter.out,
    }
    if case == "meft3":
        named |= {
            "attention.output.attn_adapter.dense1": block.mixer.adapter.into,
            "attention.output.attn_adapter.dense2": block.mixer.adapter.out,
        }
    else:
        named |= {"rev_adapter.dense1": layer.adapter.into, "rev_adapter.dense2": layer.adapter.out}
    for name, module in named.items():
        for part in ("weight", "bias"):
            yield module, part, f"{own}{name}.{part}"
