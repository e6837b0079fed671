"""T5's relative bias, with bucket borders in whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

GOLDEN = "softmax_t5_bias_a.npz"


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """Unscaled products plus the learned scalar of the bucket of j - i."""
    s = torch.einsum("bhne,bhme->bhnm", q, k)
    offsets = (k_at[:, None, :] - q_at[:, :, None]).tolist()
    places = [[[bucket(o, module.causal, module.buckets, module.max_distance) for o in r] for r in b] for b in offsets]
    index = torch.tensor(places).reshape(len(offsets), q.shape[2], k.shape[2])
    return s + torch.stack([row[index] for row in module.table], 1)


def bucket(offset: int, causal: bool, buckets: int, max_distance: int) -> int:
    """Exact below half of a side's buckets; beyond, the largest t with (d / half)^rest >= (max / half)^t."""
    side = buckets if causal else buckets // 2
    base = side if offset > 0 and not causal else 0
    distance = max(-offset, 0) if causal else abs(offset)
    half = side // 2
    if distance < half:
        return base + distance
    rest = side - half
    t = 0
    # the border of bucket half + t + 1, both sides raised to the power rest and freed of fractions
    while t + 1 < rest and distance**rest * half ** (t + 1) >= max_distance ** (t + 1) * half**rest:
        t += 1
    return base + half + t


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's T5 attention: encoder, encoder with padding, causal, decoded, cross; and its buckets."""
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    offsets = arrays["bucket32_128.rel"]
    for case, causal in (("enc", False), ("dec", True)):
        ours = system.bucket(offsets, causal=causal, buckets=32, max_distance=128)
        yield f"bucket32_128.{case}", ours, arrays[f"bucket32_128.{case}"], 0.0
        n = torch.arange(23)
        ours = system.bucket(n[None, :] - n[:, None], causal=causal, buckets=8, max_distance=16)
        yield f"buckets_{case}", ours, arrays[f"buckets_{case}"], 0.0
    for case in ("enc_full", "enc_pad", "dec_causal"):
        causal = case == "dec_causal"
        heads = MultiHead(dim=12, heads=3, head_dim=5)
        bias = system.T5Bias(heads=3, causal=causal, buckets=8, max_distance=16)
        mixer = SoftmaxAttention(dim=12, heads=heads, position=bias, causal=causal).double()
        _copy(heads, arrays)
        with torch.no_grad():
            bias.table.copy_(arrays["w.relative_attention_bias.weight"].T)
        # what comes out at padding is nobody's business, and the official gradients are of the real tokens' outputs
        real = arrays["pad_keep"] if case == "enc_pad" else torch.ones(2, 23, dtype=torch.bool)
        x = arrays["x"].clone().requires_grad_()
        y = mixer(x, mask=real if case == "enc_pad" else None)
        y.backward(arrays["cotangent"] * real[..., None])
        yield f"out_{case}", y[real], arrays[f"out_{case}"][real], 1e-12
        yield from _gradients(heads, arrays, f"grad_{case}.")
        yield f"grad_{case}.x", x.grad, arrays[f"grad_{case}.x"], 1e-12
        table = arrays[f"grad_{case}.relative_attention_bias.weight"].T
        yield f"grad_{case}.relative_attention_bias", bias.table.grad, table, 1e-12
    with torch.no_grad():
        state, steps = mixer.init_state(2), []
        for t in range(23):
            y, state = mixer.step(arrays["x"][:, t : t + 1], state)
            steps.append(y)
    yield "out_decode_steps", torch.cat(steps, 1), arrays["out_decode_steps"], 1e-12

    # the official cross-attention has no bias
    heads = MultiHead(dim=12, heads=3, head_dim=5).double()
    _copy(heads, arrays)
    bias = system.T5Bias(heads=3, buckets=8, max_distance=16)
    nn.init.zeros_(bias.table)
    mixer = SoftmaxAttention(dim=12, heads=heads, position=bias.double())
    x, memory = (arrays[name].clone().requires_grad_() for name in ("x", "memory"))
    y = mixer(x, memory)
    y.backward(arrays["cotangent"])
    yield "out_cross", y, arrays["out_cross"], 1e-12
    yield from _gradients(heads, arrays, "grad_cross.")
    yield "grad_cross.x", x.grad, arrays["grad_cross.x"], 1e-12
    if "grad_cross.memory" in arrays:
        yield "grad_cross.memory", memory.grad, arrays["grad_cross.memory"], 1e-12


def _copy(heads: nn.Module, arrays: dict[str, Tensor]) -> None:
    with torch.no_grad():
        heads.q.weight.copy_(arrays["w.q.weight"])
        heads.kv.weight.copy_(torch.cat([arrays["w.k.weight"], arrays["w.v.weight"]]))
        heads.out.weight.copy_(arrays["w.o.weight"])


def _gradients(heads: nn.Module, arrays: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    yield prefix + "q", heads.q.weight.grad, arrays[prefix + "q.weight"], 1e-12
    kv = torch.cat([arrays[prefix + "k.weight"], arrays[prefix + "v.weight"]])
    yield prefix + "kv", heads.kv.weight.grad, kv, 1e-12
    yield prefix + "o", heads.out.weight.grad, arrays[prefix + "o.weight"], 1e-12
