from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.models.causal_lm import CausalLM
from tevo.stacks.recurrent_memory_transformer import RecurrentMemoryTransformer
from tevo.testing import RUNGS, relative_rms
from tevo.testing.subject import disturb


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: object) -> RecurrentMemoryTransformer:
    torch.manual_seed(0)
    options = {"segment": 4, "memory": 2, "causal": True, "depth": 2, **arguments}
    stack = RecurrentMemoryTransformer(dim=12, heads=3, hidden_dim=7, **options).double()  # type: ignore[arg-type]
    disturb(stack)
    return stack


@pytest.mark.parametrize("causal", [False, True])
def test_one_segment_is_the_transformer_after_learned_vectors(causal: bool) -> None:
    stack, x = built(causal=causal, segment=13), tokens(2, 13, 12)
    prefix = stack.memory.expand(2, -1, -1)
    assert relative_rms(stack(x), stack.encoder(torch.cat([prefix, x], 1))[:, 2:]) <= RUNGS["F64"]


@pytest.mark.parametrize("causal", [False, True])
def test_a_later_segment_sees_an_earlier_one_through_the_memory_alone(causal: bool) -> None:
    stack, x = built(causal=causal), tokens(2, 13, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x)[:, 9].sin().sum(), x)
    assert bool((gradient[:, :4] != 0).any(-1).all())
    assert bool((gradient[:, 12:] == 0).all())
    with torch.no_grad():
        apart = torch.cat([stack(piece) for piece in x.split(4, 1)], 1)
        stack.encoder.blocks[-1].residual.final.weight.zero_()
        stack.encoder.blocks[-1].residual.final.bias.zero_()
        # nothing is handed over any more
        zero = stack(x)
    assert relative_rms(apart[:, :4], stack(x)[:, :4]) > 0 and not bool(zero.any())


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_gradients_pass_as_many_memories_as_unrolled(unroll: int) -> None:
    stack, x = built(unroll=unroll, memory=1, segment=3), tokens(1, 15, 12).requires_grad_()
    y = stack(x)
    for t in range(5):
        (gradient,) = torch.autograd.grad(y[:, 3 * t + 1].sin().sum(), x, retain_graph=True)
        assert bool(gradient[:, :3].any()) == (t <= unroll)


def test_truncation_changes_no_value() -> None:
    whole, cut, x = built(), built(unroll=0), tokens(2, 13, 12)
    assert torch.equal(whole(x), cut(x))


def test_future_tokens_do_not_change_the_past() -> None:
    stack, x = built(), tokens(2, 13, 12).requires_grad_()
    y = stack(x)
    for t in (0, 3, 4, 9):
        (gradient,) = torch.autograd.grad(y[:, t].sin().sum(), x, retain_graph=True)
        assert not gradient[:, t + 1 :].any()
        assert gradient[:, : t + 1].any()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_on_the_right_changes_nothing(causal: bool) -> None:
    stack, x = built(causal=causal), tokens(2, 10, 12)
    padded = torch.cat([x, torch.full((2, 5, 12), float("nan"), dtype=x.dtype)], 1)
    mask = torch.arange(15)[None].expand(2, -1) < 10
    assert relative_rms(stack(padded, mask=mask)[:, :10], stack(x)) <= RUNGS["F64"]


def test_several_segments_compile_to_one_graph() -> None:
    stack, x = built(), tokens(2, 13, 12)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager", dynamic=False)
    assert relative_rms(compiled(x), stack(x)) <= RUNGS["F64"]
    torch._dynamo.reset()


def test_a_language_model_generates_as_one_pass_says() -> None:
    torch.manual_seed(0)
    model = CausalLM(
        vocab=11, dim=12, depth=2, heads=3, stack="recurrent_memory_transformer(segment=4, memory=2, position=learned)"
    ).double()
    prompt = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    out = model.generate(prompt, new_tokens=7, temperature=0)
    for n in range(5, 12):
        assert torch.equal(model(out[:, :n])[:, -1].argmax(-1), out[:, n])


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="memory >= 1"):
        built(memory=0)
    with pytest.raises(ValueError, match="build it with causal=True"):
        built(causal=False).init_state(2)
