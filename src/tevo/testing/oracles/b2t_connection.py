"""B2T, written out for a layer of any number of sublayers, with norms of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, sublayers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """a_0 = x; a_s = N_s(a_{s-1} + F_s(a_{s-1})), and the last norm also reads x."""
    a = [x]
    for s, (norm, sublayer) in enumerate(zip(module.norms, sublayers, strict=True), start=1):
        bottom = x if s == len(sublayers) else torch.zeros_like(x)
        a.append(normalise(norm, bottom + a[-1] + sublayer(a[-1])))
    return a[-1]


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm if it has a bias, RMSNorm otherwise."""
    bias = getattr(norm, "bias", None)
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if bias is None else y + bias


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' encoder layer (full, padded) and decoder layer."""
    x_2, memory = arrays["x"].transpose(0, 1), arrays["memory"].transpose(0, 1)
    cotangent = arrays["cotangent"].transpose(0, 1)
    for case in ("full", "pad"):
        parts, pairs = _parts(system, arrays, "encoder")
        x = x_2.clone().requires_grad_()
        # what comes out at padding is nobody's business, and the official gradients are of the real tokens' outputs
        real = ~arrays["pad_mask"] if case == "pad" else torch.ones(2, 13, dtype=torch.bool)
        attend = partial(parts["self_attn"], mask=real if case == "pad" else None)
        y = parts["residual"](x, (attend, parts["channel"]))
        y.backward(cotangent * real[..., None])
        yield f"encoder.out_{case}", y[real], arrays[f"encoder.out_{case}"].transpose(0, 1)[real], 1e-12
        yield f"encoder.grad_{case}.x", x.grad.transpose(0, 1), arrays[f"encoder.grad_{case}.x"], 1e-12
        for names, parameter in pairs:
            theirs = torch.cat([arrays[f"encoder.grad_{case}.{name}"] for name in names])
            yield f"encoder.grad_{case}.{'+'.join(names)}", parameter.grad, theirs, 1e-12
    parts, pairs = _parts(system, arrays, "decoder")
    x, source = x_2.clone().requires_grad_(), memory.clone().requires_grad_()
    y = parts["residual"](
        x,
        (
            parts["self_attn"],
            lambda z: parts["encoder_attn"](z, source, mask=~arrays["memory_pad_mask"]),
            parts["channel"],
        ),
    )
    y.backward(cotangent)
    yield "decoder.out", y.transpose(0, 1), arrays["decoder.out"], 1e-12
    yield "decoder.grad.x", x.grad.transpose(0, 1), arrays["decoder.grad.x"], 1e-12
    yield "decoder.grad.memory", source.grad.transpose(0, 1), arrays["decoder.grad.memory"], 1e-12
    for names, parameter in pairs:
        theirs = torch.cat([arrays[f"decoder.grad.{name}"] for name in names])
        yield f"decoder.grad.{'+'.join(names)}", parameter.grad, theirs, 1e-12


def _parts(
    system: ModuleType, arrays: dict[str, Tensor], layer: str
) -> tuple[dict[str, nn.Module], list[tuple[list[str], Tensor]]]:
    """The layer's parts with the official weights, and which official arrays make which parameter."""
    from tevo.channels.feed_forward import ReLU
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    attentions = ["self_attn"] if layer == "encoder" else ["self_attn", "encoder_attn"]
    residual = system.B2T(dim=12, sublayers=len(attentions) + 1).double()
    channel = ReLU(dim=12, hidden_dim=20).double()
    parts: dict[str, nn.Module] = {"residual": residual, "channel": channel}
    pairs: list[tuple[list[str], Tensor]] = []
    for kind in ("weight", "bias"):
        pairs += [([f"fc1.{kind}"], getattr(channel.into, kind)), ([f"fc2.{kind}"], getattr(channel.out, kind))]
        for norm, name in zip(residual.norms, [*attentions, "final"], strict=True):
            pairs.append(([f"{name}_layer_norm.{kind}"], getattr(norm, kind)))
    for name in attentions:
        heads = MultiHead(dim=12, heads=3, bias=True)
        own = layer == "decoder" and name == "self_attn"
        parts[name] = SoftmaxAttention(dim=12, heads=heads, causal=own).double()
        for kind in ("weight", "bias"):
            pairs += [
                ([f"{name}.q_proj.{kind}"], getattr(heads.q, kind)),
                ([f"{name}.k_proj.{kind}", f"{name}.v_proj.{kind}"], getattr(heads.kv, kind)),
                ([f"{name}.out_proj.{kind}"], getattr(heads.out, kind)),
            ]
    with torch.no_grad():
        for names, parameter in pairs:
            parameter.copy_(torch.cat([arrays[f"{layer}.w.{name}"] for name in names]))
    return parts, pairs
