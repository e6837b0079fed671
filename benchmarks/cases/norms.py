"""Root-mean-square normalisation against torch's own norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, inference, relative_rms, training
from tevo.functional.norms import rms_norm

EPS = 1e-6
Mode = Callable[..., Callable[[], object]]


def _case(mode: Mode, rows: int, d: int) -> Case:
    x, weight, bias = torch.randn(rows, d), torch.randn(d), torch.randn(d)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, EPS)

    def torchs(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (d,), w, EPS)

    def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), w, b, EPS)

    def check() -> None:
        for a, b in zip(training(ours, x, weight)(), training(torchs, x, weight)(), strict=True):
            if not relative_rms(a, b) <= 1e-5:
                raise ValueError(f"rms_norm differs from F.rms_norm by {relative_rms(a, b):.1e} (relative RMS)")

    return Case(
        variants={
            "F.layer_norm": mode(layer_norm, x, weight, bias),
            "tevo rms_norm": mode(ours, x, weight),
            "F.rms_norm": mode(torchs, x, weight),
        },
        baseline="F.layer_norm",
        check=check,
        note="F.layer_norm computes something else; it is the time to come near. The two others are compared.",
    )


CASES: dict[str, Callable[[], Case]] = {
    f"norms/{name}/{rows}x{d}": partial(_case, mode, rows, d)
    for rows, d in ((8192, 512), (2048, 256), (64, 256))
    for name, mode in (("forward", inference), ("training", training))
}
