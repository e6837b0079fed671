"""Neighbourhood attention by explicit lists of keys, one query at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _keys(i: int, size: int, window: int, dilation: int, causal: bool) -> list[int]:
    """The tokens that token i of an axis sees."""
    same = list(range(i % dilation, size, dilation))
    place = same.index(i)
    if causal:
        return same[max(0, place - window + 1) : place + 1]
    start = max(0, min(place - window // 2, len(same) - window))
    return same[start : start + window]


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """A line is a grid of one row, whose row offsets are not in the table."""
    b, n, d = x.shape
    rows, columns = module.grid or (1, n)
    k, delta, h = module.window, module.dilation, module.heads
    e = d // h
    q, keys, v = (x @ module.qkv.weight.T + module.qkv.bias).split(d, -1)
    outputs = []
    for row in range(b):
        for token in range(n):
            r, c = divmod(token, columns)
            seen = [
                (i, j)
                for i in _keys(r, rows, k, delta, module.causal)
                for j in _keys(c, columns, k, delta, module.causal)
            ]
            for head in range(h):
                part = slice(head * e, (head + 1) * e)
                top, bottom = x.new_zeros(e), x.new_zeros(())
                for i, j in seen:
                    s = q[row, token, part] @ keys[row, i * columns + j, part] / e**0.5
                    if module.bias is not None:
                        down, right = (i - r) // delta, (j - c) // delta + k - 1
                        s = (
                            s
                            + module.bias[head, right if module.grid is None else (down + k - 1) * (2 * k - 1) + right]
                        )
                    top, bottom = top + s.exp() * v[row, i * columns + j, part], bottom + s.exp()
                outputs.append(top / bottom)
    y = torch.stack(outputs).reshape(b, n, d)
    return y @ module.out.weight.T + module.out.bias


def _dense(plan: object, n: int) -> Tensor:
    """(n, n): which token sees which, read off the tiles."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    tile = plan.query.shape[1]
    for place, token in enumerate(plan.query.flatten().tolist()):
        # a padded query claims to be token 0, whose place is another
        if int(plan.back[token]) == place:
            for key, allowed in zip(plan.key[place // tile], plan.allowed[place // tile, place % tile], strict=True):
                seen[token, key] |= allowed
    return seen


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package natten: lines and grids, dilated and not; its causal masks. Not its zero-padded short sides."""
    cases = (
        ("na1d", "dil1", {"window": 5}),
        ("na1d", "dil2", {"window": 5, "dilation": 2}),
        ("na2d", "dil1", {"window": 3, "grid": (7, 5)}),
    )
    for which, case, arguments in cases:
        mixer = system.NeighborhoodAttention(dim=12, heads=3, **arguments).double()
        _fill(mixer, arrays, which)
        x = arrays[f"{which}.x"].clone().requires_grad_()
        y = mixer(x.flatten(1, -2)).reshape(x.shape)
        y.backward(arrays[f"{which}.cotangent"])
        yield f"{which}.out_{case}", y, arrays[f"{which}.out_{case}"], 1e-12
        yield f"{which}.grad_{case}.x", x.grad, arrays[f"{which}.grad_{case}.x"], 1e-12
        theirs = arrays[f"{which}.grad_{case}.rpb"].flatten(1)
        yield f"{which}.grad_{case}.rpb", mixer.bias.grad, theirs, 1e-12
        for name, linear in (("qkv", mixer.qkv), ("proj", mixer.out)):
            for kind in ("weight", "bias"):
                theirs = arrays[f"{which}.grad_{case}.{name}.{kind}"]
                yield f"{which}.grad_{case}.{name}.{kind}", getattr(linear, kind).grad, theirs, 1e-12

    mixer = system.NeighborhoodAttention(dim=12, heads=3, window=5, causal=True, relative=False).double()
    _fill(mixer, arrays, "na1d")
    x = arrays["na1d.x"].clone().requires_grad_()
    y = mixer(x)
    y.backward(arrays["na1d.cotangent"])
    yield "causal1d.out_no_rpb", y, arrays["causal1d.out_no_rpb"], 1e-12
    yield "causal1d.grad.x", x.grad, arrays["causal1d.grad.x"], 1e-12
    yield "causal1d.grad.qkv.weight", mixer.qkv.weight.grad, arrays["causal1d.grad.qkv.weight"], 1e-12

    for name, sizes, window, dilation, causal in (
        ("causal1d", (13,), 5, 1, (True,)),
        ("causal1d_dil2", (13,), 5, 2, (True,)),
        ("plain1d_dil2", (13,), 5, 2, (False,)),
        ("plain2d", (7, 5), 3, 1, (False, False)),
        ("causal_rows2d", (7, 5), 3, 1, (True, False)),
    ):
        plan = system.tiles(sizes, window=window, dilation=dilation, causal=causal)
        theirs = arrays[f"mask.{name}"]
        yield f"mask.{name}", _dense(plan, len(theirs)).double(), theirs.double(), 0.0


def _fill(mixer: nn.Module, arrays: dict[str, Tensor], which: str) -> None:
    with torch.no_grad():
        if mixer.bias is not None:
            mixer.bias.copy_(arrays[f"{which}.w.rpb"].flatten(1))
        for name, linear in (("qkv", mixer.qkv), ("proj", mixer.out)):
            for kind in ("weight", "bias"):
                getattr(linear, kind).copy_(arrays[f"{which}.w.{name}.{kind}"])
