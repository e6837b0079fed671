"""Time and extra memory of one encoder layer over a long text, CoLT5 beside LongT5 and a dense one, on the machine at hand.

All have the width and the heads of :meth:`tevo.colt5.CoLT5Config.tiny`; a dense feed-forward is twice as wide as the light one
and a quarter of the heavy one, as in the paper. The dense layer is this house's softmax attention without a position bias,
which torch's fused kernel computes. LongT5 with transient-global attention is that of the package ``transformers``, where it
is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from tevo.bench import forms

__all__ = ["FORMS", "PEER", "SHAPE", "measure", "passes"]

SHAPE = {"tokens": 16384, "width": 128, "heads": 4, "radius": 127}
PEER = "LongT5, transient-global (transformers)"
FORMS = ("CoLT5 (tevo)", PEER, "dense (fused attention)")
_ROUNDS = 2
# tokens of a pass that only has to have run
_SHORT = 1024


def measure(
    *,
    threads: int,
    seconds: float = 6.0,
    shape: Mapping[str, int] = SHAPE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time in seconds and memory in bytes of a forward pass of every form.

    Args:
        threads: of torch.
        seconds: after which no further round of timing is begun.
        shape: tokens, width, heads, radius.
        say: is told what is being measured.

    Returns:
        "forms": form -> forward_s, forward_bytes, or "error"; "shape" in words, "threads", "rounds", and "skipped": why a form
        was not measured.
    """
    there = importlib.util.find_spec("transformers") is not None
    names = [name for name in FORMS if there or name != PEER]
    say("measuring memory and time of " + ", ".join(names))
    short = {**shape, "tokens": min(_SHORT, shape["tokens"])}
    found = forms.measure(__name__, names, shape=shape, short=short, threads=threads, seconds=seconds, rounds=_ROUNDS)
    words = "one text of {tokens:,} tokens, one layer of width {width} with {heads} heads, float32, without gradients"
    skipped = [] if there else ["LongT5 is not measured: the package transformers is missing; pip install 'tevo[hf]'"]
    return {**found, "shape": words.format(**shape), "threads": threads, "skipped": skipped}


def passes(name: str, shape: Mapping[str, int]) -> dict[str, Callable[[], None]]:
    """A forward pass without a graph, of the form ``name`` with a shape as :data:`SHAPE`."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, shape["tokens"], shape["width"])
    layer = {FORMS[0]: _colt5, PEER: _longt5, FORMS[2]: _dense}[name](shape)
    layer.eval()

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {"forward": forward}


def _colt5(shape: Mapping[str, int]) -> Any:
    from tevo.colt5.layers import ConditionalAttention, ConditionalFeedForward, ConditionalLayer, RelativeBias
    from tevo.colt5.routers import Budget, Router

    d, h = shape["width"], shape["heads"]
    m, v = Budget(1 / 16), Budget(1 / 8)
    attention = ConditionalAttention(
        dim=d,
        light_heads=h // 4,
        heavy_heads=h - h // 4,
        head_dim=d // h,
        radius=shape["radius"],
        q_router=Router(dim=d, budget=m),
        kv_router=Router(dim=d, budget=v),
        light_bias=RelativeBias(heads=h // 4),
        heavy_bias=RelativeBias(heads=h - h // 4),
    )
    feed_forward = ConditionalFeedForward(dim=d, light_dim=d, heavy_dim=8 * d, router=Router(dim=d, budget=m))
    return ConditionalLayer(dim=d, attention=attention, feed_forward=feed_forward)


def _longt5(shape: Mapping[str, int]) -> Any:
    import torch
    from transformers import LongT5Config, LongT5EncoderModel

    d, h = shape["width"], shape["heads"]
    config = LongT5Config(
        vocab_size=8,
        d_model=d,
        d_kv=d // h,
        d_ff=2 * d,
        num_heads=h,
        num_layers=1,
        local_radius=shape["radius"],
        encoder_attention_type="transient-global",
        feed_forward_proj="gated-gelu",
    )
    encoder = LongT5EncoderModel(config)

    class Embedded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return encoder(inputs_embeds=x)

    encoder.eval()
    return Embedded()


def _dense(shape: Mapping[str, int]) -> Any:
    from tevo.colt5.layers import GatedFeedForward
    from tevo.colt5.longt5 import LongT5Layer
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    d, h = shape["width"], shape["heads"]
    attention: Any = SoftmaxAttention(dim=d, heads=h)
    return LongT5Layer(dim=d, attention=attention, feed_forward=GatedFeedForward(dim=d, hidden_dim=2 * d))
