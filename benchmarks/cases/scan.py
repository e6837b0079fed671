"""The diagonal scan against torch's associative scan and against one step after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from benchmarks.harness import Case, inference, relative_rms, training
from tevo.functional.exponential import sequential_wkv, wkv
from tevo.functional.scan import scan, sequential_scan

D = 512
Mode = Callable[..., Callable[[], object]]


def _ours(a: Tensor, b: Tensor) -> Tensor:
    return scan(a, b)[0]


def _loop(a: Tensor, b: Tensor) -> Tensor:
    return sequential_scan(a, b)[0]


def _associative(a: Tensor, b: Tensor) -> Tensor:
    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]


def _scan(mode: Mode, dtype: torch.dtype, n: int) -> Case:
    # |a| < 1: an unstable recurrence would compare overflows
    a, b = torch.randn(1, n, D, dtype=dtype).tanh(), torch.randn(1, n, D, dtype=dtype)
    if dtype.is_complex:
        a = torch.polar(a.abs().clamp(max=0.999), a.angle())
    forms = {"tevo scan": _ours, "associative_scan": _associative}
    if n <= 4096:
        forms["one step after another"] = _loop

    def check() -> None:
        for name, form in forms.items():
            for got, wanted in zip(training(form, a, b)(), training(_ours, a, b)(), strict=True):
                if not relative_rms(_real(got), _real(wanted)) <= 1e-5:
                    raise ValueError(
                        f"{name} differs from tevo's scan by {relative_rms(_real(got), _real(wanted)):.1e}"
                    )

    return Case(
        variants={name: mode(form, a, b) for name, form in forms.items()},
        baseline="tevo scan",
        check=check,
        note=f"batch 1, {D} channels, {dtype}; a differs at every step. Outputs and gradients of a and b are compared.",
    )


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _wkv(mode: Mode, batch: int, n: int, d: int) -> Case:
    inputs = torch.randn(batch, n, d), torch.randn(batch, n, d), torch.rand(d), torch.randn(d)

    def ours(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
        return wkv(k, v, decay=decay, bonus=bonus)[0]

    def loop(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
        return sequential_wkv(k, v, decay=decay, bonus=bonus)[0]

    return Case(
        variants={"tevo wkv": mode(ours, *inputs), "one token after another": mode(loop, *inputs)},
        baseline="tevo wkv",
        tolerance=1e-4,
        note="The gradient of the decay sums over all tokens, hence the tolerance of 1e-4.",
    )


_MODES: dict[str, Mode] = {"forward": inference, "training": training}

CASES: dict[str, Callable[[], Case]] = {
    **{
        f"scan/{name}/{n}": partial(_scan, mode, torch.float32, n)
        for n in (1024, 4096, 16384)
        for name, mode in _MODES.items()
    },
    **{f"scan/complex/{name}/4096": partial(_scan, mode, torch.complex64, 4096) for name, mode in _MODES.items()},
    **{f"scan/wkv/{name}/8x512x256": partial(_wkv, mode, 8, 512, 256) for name, mode in _MODES.items()},
}
