"""Softmax attention: against torch's own module, and the memory of earlier segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo.functional.masks import causal_mask
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("form", ["self", "causal", "cross", "padded"])
def test_equals_torch_multihead_attention_in_values_and_gradients(form: str) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    heads = MultiHead(dim=12, heads=3, bias=True)
    ours = SoftmaxAttention(dim=12, heads=heads, causal=form == "causal").double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            q, kv = getattr(theirs, f"in_proj_{kind}").split([12, 24])
            getattr(heads.q, kind).copy_(q)
            getattr(heads.kv, kind).copy_(kv)
            getattr(heads.out, kind).copy_(getattr(theirs.out_proj, kind))
    x = draw(2, 13, 12).requires_grad_()
    y = draw(2, 7, 12, seed=2).requires_grad_() if form == "cross" else x
    real = torch.ones(2, 13, dtype=torch.bool)
    if form == "padded":
        real[1, 9:] = False
    o = ours(x, y if form == "cross" else None, mask=real if form == "padded" else None)
    p, _ = theirs(
        x,
        y,
        y,
        need_weights=False,
        key_padding_mask=~real if form == "padded" else None,
        attn_mask=~causal_mask(13, 13) if form == "causal" else None,
    )
    assert relative_rms(o[real], p[real]) <= RUNGS["F64"]
    cotangent = draw(2, 13, 12, seed=3) * real[..., None]
    for mine, other in zip(
        torch.autograd.grad(o, (x, heads.out.weight), cotangent, retain_graph=True),
        torch.autograd.grad(p, (x, theirs.out_proj.weight), cotangent, retain_graph=True),
        strict=True,
    ):
        assert relative_rms(mine, other) <= RUNGS["F64"]
    mine = torch.autograd.grad(o, (heads.q.weight, heads.kv.weight), cotangent)
    (other,) = torch.autograd.grad(p, theirs.in_proj_weight, cotangent)
    assert relative_rms(torch.cat(mine), other) <= RUNGS["F64"]


def segments(mixer: SoftmaxAttention, x: Tensor, pieces: tuple[int, ...]) -> Tensor:
    state, outputs = mixer.init_state(len(x)), []
    for piece in x.split(pieces, 1):
        y, state = mixer.step(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("pieces", [(5, 5, 3), (1,) * 13, (4, 9)])
def test_a_memory_of_all_earlier_tokens_makes_segments_equal_one_pass(pieces: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(dim=12, heads=3, causal=True, memory=12).double(), draw(2, 13, 12)
    assert relative_rms(segments(mixer, x, pieces), mixer(x)) <= RUNGS["F64"]


def test_a_memory_keeps_the_last_tokens_and_no_others() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(dim=12, heads=3, causal=True, memory=4).double(), draw(2, 13, 12)
    y = segments(mixer, x, (6, 7))
    # the second segment is a sequence that begins with the four remembered tokens
    assert relative_rms(y[:, 6:], mixer(x[:, 2:])[:, 4:]) <= RUNGS["F64"]


def test_no_gradient_passes_into_the_memory() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(dim=12, heads=3, causal=True, memory=5).double(), draw(2, 9, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(segments(mixer, x, (5, 4))[:, 5:].sum(), x)
    assert (gradient[:, :5] == 0).all()
    assert (gradient[:, 5:] != 0).any()


def test_left_padding_of_the_first_segment_changes_nothing() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(dim=12, heads=3, causal=True, memory=8).double(), draw(2, 9, 12)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, :3] = False
    padded = torch.cat([torch.full((2, 3, 12), torch.nan, dtype=x.dtype), x[:, :5]], 1)
    first, state = mixer.step(padded, mixer.init_state(2), mask=mask)
    second, _ = mixer.step(x[:, 5:], state)
    assert relative_rms(torch.cat([first[:, 3:], second], 1), mixer(x)) <= RUNGS["F64"]


def test_refuses_a_memory_without_causal() -> None:
    with pytest.raises(ValueError, match="memory=4 with causal=False"):
        SoftmaxAttention(dim=12, heads=3, memory=4)
