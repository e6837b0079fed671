"""The tolerance ladder: rungs by name, never bare numbers in a check."""

from __future__ import annotations

import torch
from torch import Tensor

# relative RMS unless said otherwise
RUNGS = {
    "EXACT": 0.0,
    "F64": 1e-10,  # two formulations of one equation in float64
    "FFT": 1e-12,  # causality of FFT convolutions: leak relative to the largest gradient
    "F32": 1e-5,
    "BF16": 2e-2,  # bfloat16 against float32 of the same weights: a few roundings of 2^-9 each
    "CHOICE": 0.5,  # bfloat16 of parts that choose among tokens or keys: near ties are decided otherwise
}


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """rms(ours - theirs) / rms(theirs); the plain rms where theirs is all zero; 0 for empty tensors."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    if ours.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().to(torch.float64), theirs.detach().to(torch.float64)
    gap = (ours - theirs).square().mean().sqrt()
    size = theirs.square().mean().sqrt()
    value = float(gap / size) if size > 0 else float(gap)
    return value if value == value else float("inf")
