"""Causal linear attention in chunks against its plain forms and against softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, inference, relative_rms, training
from tevo.functional.linear_attention import causal_linear_attention, recurrent_linear_attention

HEADS, WIDTH = 8, 64
Mode = Callable[..., Callable[[], object]]
Form = Callable[..., Tensor]


def _chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_linear_attention(q, k, v)[0]


def _tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return recurrent_linear_attention(q, k, v)[0]


def _square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def _sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnp, bhnpv -> bhnv", q, torch.einsum("bhnp, bhnv -> bhnpv", k, v).cumsum(2))


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, HEADS, n, WIDTH) for _ in range(3))
    return q, F.normalize(k, dim=-1), v


def _case(mode: Mode, forms: dict[str, Form], inputs: tuple[Tensor, ...], note: str) -> Case:
    """All ``forms`` but softmax must agree, in outputs and gradients."""
    comparable = {name: form for name, form in forms.items() if form is not _softmax}

    def check() -> None:
        (first, *others) = comparable.items()
        wanted = training(first[1], *inputs)()
        for name, form in others:
            for got, want in zip(training(form, *inputs)(), wanted, strict=True):
                if not relative_rms(got, want) <= 1e-4:
                    raise ValueError(f"{name} differs from {first[0]} by {relative_rms(got, want):.1e} (relative RMS)")

    return Case(
        variants={name: mode(form, *inputs) for name, form in forms.items()},
        baseline="tevo chunks",
        check=check,
        note=f"batch 1, {HEADS} heads x {WIDTH}, float32. {note}",
    )


def _plain(mode: Mode, n: int) -> Case:
    forms: dict[str, Form] = {
        "tevo chunks": _chunks,
        "masked square": _square,
        "one token after another": _tokens,
        "softmax (SDPA)": _softmax,
    }
    if n <= 1024:
        forms["sums of outer products"] = _sums  # keeps n x 64 x 64 numbers a head
    return _case(mode, forms, _inputs(n), "SDPA computes something else and is not compared.")


def _long(mode: Mode, n: int) -> Case:
    def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_linear_attention(q, k, v, chunk=128)[0]

    forms: dict[str, Form] = {"tevo chunks": _chunks, "tevo chunks of 128": wide, "softmax (SDPA)": _softmax}
    return _case(mode, forms, _inputs(n), "SDPA computes something else and is not compared.")


def _decay(mode: Mode, n: int) -> Case:
    inputs = (*_inputs(n), -torch.rand(1, HEADS, n))

    def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return causal_linear_attention(q, k, v, g=g)[0]

    def tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return recurrent_linear_attention(q, k, v, g=g)[0]

    def square(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        sums = g.cumsum(-1)
        return ((q @ k.mT) * (sums[..., :, None] - sums[..., None, :]).tril().exp()).tril() @ v

    forms: dict[str, Form] = {"tevo chunks": chunks, "masked square": square, "one token after another": tokens}
    return _case(mode, forms, inputs, "A decay of its own at every step and head.")


def _delta(mode: Mode, n: int) -> Case:
    inputs = (*_inputs(n), torch.rand(1, HEADS, n))

    def chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return causal_linear_attention(q, k, v, beta=beta)[0]

    def tokens(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return recurrent_linear_attention(q, k, v, beta=beta)[0]

    return _case(
        mode, {"tevo chunks": chunks, "one token after another": tokens}, inputs, "Delta rule, keys of norm 1."
    )


_MODES: dict[str, Mode] = {"forward": inference, "training": training}
_KINDS = {
    "plain": (_plain, (1024, 4096)),
    "long": (_long, (16384,)),
    "decay": (_decay, (1024, 4096)),
    "delta": (_delta, (1024, 4096)),
}

CASES: dict[str, Callable[[], Case]] = {
    f"linear_attention/{kind}/{name}/{n}": partial(make, mode, n)
    for kind, (make, lengths) in _KINDS.items()
    for n in lengths
    for name, mode in _MODES.items()
}
