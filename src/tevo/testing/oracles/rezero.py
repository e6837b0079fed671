"""ReZero as a sum of branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, sublayers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The input plus every branch times alpha; a single alpha serves all branches."""
    branches: list[Tensor] = []
    for i, sublayer in enumerate(sublayers):
        alpha = module.alpha[i if len(module.alpha) > 1 else 0]
        branches.append(alpha * sublayer(x + sum(branches)))
    return x + sum(branches)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' encoder layer (full, causal, padded) and decoder layer."""
    x_2, memory = arrays["x"].transpose(0, 1), arrays["memory"].transpose(0, 1)
    cotangent = arrays["cotangent"].transpose(0, 1)
    for case in ("full", "causal", "pad"):
        parts, pairs = _parts(system, arrays, "encoder", case == "causal")
        x = x_2.clone().requires_grad_()
        # what comes out at padding is nobody's business, and the official gradients are of the real tokens' outputs
        real = ~arrays["pad_mask"] if case == "pad" else torch.ones(2, 13, dtype=torch.bool)
        attend = partial(parts["self_attn"], mask=real if case == "pad" else None)
        y = parts["residual"](x, (attend, parts["channel"]))
        y.backward(cotangent * real[..., None])
        yield f"encoder.out_{case}", y[real], arrays[f"encoder.out_{case}"].transpose(0, 1)[real], 1e-12
        yield f"encoder.grad_{case}.x", x.grad.transpose(0, 1), arrays[f"encoder.grad_{case}.x"], 1e-12
        for name, parameters in pairs:
            gradient = torch.cat([p.grad for p in parameters])
            yield f"encoder.grad_{case}.{name}", gradient, arrays[f"encoder.grad_{case}.{name}"], 1e-12
    parts, pairs = _parts(system, arrays, "decoder", True)
    x, source = x_2.clone().requires_grad_(), memory.clone().requires_grad_()
    y = parts["residual"](
        x,
        (
            parts["self_attn"],
            lambda z: parts["multihead_attn"](z, source, mask=~arrays["memory_pad_mask"]),
            parts["channel"],
        ),
    )
    y.backward(cotangent)
    yield "decoder.out", y.transpose(0, 1), arrays["decoder.out"], 1e-12
    yield "decoder.grad.x", x.grad.transpose(0, 1), arrays["decoder.grad.x"], 1e-12
    yield "decoder.grad.memory", source.grad.transpose(0, 1), arrays["decoder.grad.memory"], 1e-12
    for name, parameters in pairs:
        yield f"decoder.grad.{name}", torch.cat([p.grad for p in parameters]), arrays[f"decoder.grad.{name}"], 1e-12


def _parts(
    system: ModuleType, arrays: dict[str, Tensor], layer: str, causal: bool
) -> tuple[dict[str, nn.Module], list[tuple[str, list[Tensor]]]]:
    """The layer's parts with the official weights, and which parameters are which official array."""
    from tevo.channels.feed_forward import ReLU
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    attentions = ["self_attn"] if layer == "encoder" else ["self_attn", "multihead_attn"]
    residual = system.ReZero(sublayers=len(attentions) + 1).double()
    channel = ReLU(dim=12, hidden_dim=20).double()
    parts: dict[str, nn.Module] = {"residual": residual, "channel": channel}
    pairs: list[tuple[str, list[Tensor]]] = [("resweight", [residual.alpha])]
    for kind in ("weight", "bias"):
        pairs += [
            (f"linear1.{kind}", [getattr(channel.into, kind)]),
            (f"linear2.{kind}", [getattr(channel.out, kind)]),
        ]
    for name in attentions:
        heads = MultiHead(dim=12, heads=3, bias=True)
        own = causal and name == "self_attn"
        parts[name] = SoftmaxAttention(dim=12, heads=heads, causal=own).double()
        for kind in ("weight", "bias"):
            pairs += [
                (f"{name}.in_proj_{kind}", [getattr(heads.q, kind), getattr(heads.kv, kind)]),
                (f"{name}.out_proj.{kind}", [getattr(heads.out, kind)]),
            ]
    with torch.no_grad():
        for name, parameters in pairs:
            rows = arrays[f"{layer}.w.{name}"].split([len(p) for p in parameters])
            for parameter, value in zip(parameters, rows, strict=True):
                parameter.copy_(value)
    return parts, pairs
