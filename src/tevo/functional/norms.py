"""Root-mean-square normalisation of the last dimension, with few passes over memory.

    r = (mean_d(x_d^2) + eps)^(-1/2),    y = x r w                                    (1)
    dx = r (g - x r^2 mean_d(g x)),  g = dy w,    dw = sum over tokens of dy x r      (2)

Equation (2) is the backward pass of layer normalisation with the mean set to zero, but for a constant per token,
mean_d(g), which layer normalisation subtracts; so its fused kernel does the work and the constant is added back.
FLOPs 4 d per token forward; saved for backward: x and one number per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_reference"]

# numbers in x below which passes over memory cost less than calls from Python: with a graph; four times that without
SMALL = 2**16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Equation (1) for ``x`` (..., d) and ``weight`` (d,); half precision is computed in float32.

    Returns:
        (..., d), in the dtype of ``x``.

    Raises:
        ValueError: if ``weight`` does not have the width of ``x``.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}; weight must be (d,) for x (..., d)"
        )
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    small = x.numel() < (SMALL if trained else 4 * SMALL)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or small:
        # compilers and other devices fuse torch's own form; it warns where the dtypes differ
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        return rms_norm_reference(x, weight, eps)
    y: Tensor = (_RMSNorm.apply if trained else _RMSNorm.forward)(x, weight, eps)[0]
    return y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Equation (1) as written; same shapes as :func:`rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype)
    return (z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        z = x.to(dtype)
        r = (torch.linalg.vector_norm(z, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        # the weight first: its product is batched under vmap whenever either factor is, so that r may go in place
        return (z * weight.to(dtype)).mul_(r).to(x.dtype), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        # a second derivative needs r as a function of x, which the saved number is not
        form = _backward_written_out if torch.is_grad_enabled() else _backward_by_layer_norm
        dtype = r.dtype
        # a backward pass called inside autocast would otherwise do the products of the island in half precision
        with torch.autocast(x.device.type, enabled=False):
            dx, dw = form(dy.to(dtype), x.to(dtype), weight.to(dtype), r, ctx.eps)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def _backward_by_layer_norm(dy: Tensor, x: Tensor, w: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, [d], torch.zeros_like(r), r, w, None, [True, True, False]
    )
    return dx.add_((dy @ w).unsqueeze(-1).mul_(r).div_(d)), dw


def _backward_written_out(dy: Tensor, x: Tensor, w: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    g = dy * w
    dx = r * (g - x * r.square() * (g * x).mean(-1, keepdim=True))  # (eq. 2)
    return dx, (dy * x * r).flatten(0, -2).sum(0) if x.ndim > 1 else dy * x * r
