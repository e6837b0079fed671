"""Rotary positions by complex multiplication."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

GOLDEN = "softmax_rope_a.npz"


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """Re <f(q, s), f(k, t)> / sqrt(e): only the angle (s - t) theta_j enters, so it is computed from that."""
    e = q.shape[-1]
    distance = (q_at[:, :, None] - k_at[:, None, :])[:, None].to(q.dtype)  # b 1 n m
    s: Tensor | float = 0.0
    for j in range(e // 2):
        theta = module.base ** (-2 * j / e)
        a = torch.complex(q[..., j], q[..., j + e // 2])[..., :, None]
        b = torch.complex(k[..., j], k[..., j + e // 2])[..., None, :]
        s = s + (a * b.conj() * torch.polar(torch.ones_like(distance), distance * theta)).real
    assert isinstance(s, Tensor)
    return s / e**0.5


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's Llama attention: full, causal, decoded; and the bare rotation."""
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    for case in ("full", "causal"):
        heads = MultiHead(dim=12, heads=3, head_dim=6, bias=True)
        mixer = SoftmaxAttention(dim=12, heads=heads, position=system.RoPE(), causal=case == "causal").double()
        with torch.no_grad():
            for linear, names in ((heads.q, ("q",)), (heads.kv, ("k", "v")), (heads.out, ("o",))):
                linear.weight.copy_(torch.cat([arrays[f"w.{n}_proj.weight"] for n in names]))
                linear.bias.copy_(torch.cat([arrays[f"w.{n}_proj.bias"] for n in names]))
        x = arrays["x"].clone().requires_grad_()
        y = mixer(x, at=arrays["positions"])
        y.backward(arrays["cotangent"])
        yield f"out_{case}", y, arrays[f"out_{case}"], 1e-12
        yield f"grad_{case}.x", x.grad, arrays[f"grad_{case}.x"], 1e-12
        for linear, names in ((heads.q, ("q",)), (heads.kv, ("k", "v")), (heads.out, ("o",))):
            for kind in ("weight", "bias"):
                theirs = torch.cat([arrays[f"grad_{case}.{n}_proj.{kind}"] for n in names])
                yield f"grad_{case}.{'+'.join(names)}.{kind}", getattr(linear, kind).grad, theirs, 1e-12
    with torch.no_grad():
        state, steps = mixer.init_state(2), []
        for t in range(13):
            y, state = mixer.step(arrays["x"][:, t : t + 1], state)
            steps.append(y)
    yield "out_decode_steps", torch.cat(steps, 1), arrays["out_decode_steps"], 1e-12
    q = arrays["rotate.in"].transpose(1, 2)
    turned, _ = system.RoPE().turn(q, q, arrays["positions"], arrays["positions"])
    yield "rotate.half_out", turned.transpose(1, 2), arrays["rotate.half_out"], 1e-12
