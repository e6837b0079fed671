from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.local.memorizing_transformer import MemorizingTransformer, memory_read, retrieve
from tevo.models.causal_lm import CausalLM
from tevo.taps import record
from tevo.testing import RUNGS, relative_rms
from tevo.testing.subject import disturb


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: int) -> MemorizingTransformer:
    torch.manual_seed(0)
    options = {"window": 4, "memory": 30, "topk": 3, **arguments}
    mixer = MemorizingTransformer(dim=12, heads=3, **options).double()
    disturb(mixer)
    return mixer


def test_reading_all_of_the_memory_is_full_attention_to_it() -> None:
    q, k, v = tokens(2, 3, 5, 4), tokens(2, 3, 11, 4).flip(0), tokens(2, 3, 11, 4)
    g = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    every = torch.ones(1, 11, dtype=torch.bool)
    assert relative_rms(memory_read(q, k, v, g, every, 11), (g * (q @ k.mT)).softmax(-1) @ v) <= RUNGS["F64"]


def test_what_is_retrieved_is_what_a_search_through_all_finds() -> None:
    q, k = tokens(2, 3, 5, 4), tokens(2, 3, 11, 4).flip(0)
    allowed = torch.arange(11)[None] < 9
    best = (q @ k.mT)[..., :9].argsort(-1, descending=True)[..., :4]
    assert torch.equal(retrieve(q, k, allowed, 4), best)


def test_a_closed_gate_is_windowed_attention() -> None:
    mixer, x = built(), tokens(2, 13, 12).requires_grad_()
    with torch.no_grad():
        mixer.gate.fill_(-torch.inf)
    y = mixer(x)
    (gradient,) = torch.autograd.grad(y[:, 9].sin().sum(), x)
    assert not gradient[:, :6].any() and bool((gradient[:, 6:10] != 0).any(-1).all())
    with torch.no_grad():
        changed = torch.cat([tokens(2, 6, 12).flip(1), x[:, 6:]], 1)
        assert torch.equal(mixer(changed)[:, 9], y[:, 9])


def test_an_empty_memory_leaves_the_window_alone() -> None:
    mixer, x = built(), tokens(2, 4, 12)
    opened, closed = mixer(x), built()
    with torch.no_grad():
        closed.gate.fill_(-torch.inf)
    assert torch.equal(opened, closed(x))


def test_no_gradient_goes_through_the_memory_though_it_is_read() -> None:
    mixer, x = built(), tokens(2, 13, 12).requires_grad_()
    y = mixer(x)
    (gradient,) = torch.autograd.grad(y[:, 12].sin().sum(), x)
    assert not gradient[:, :9].any()
    with torch.no_grad():
        changed = torch.cat([tokens(2, 8, 12).flip(1), x[:, 8:]], 1)
        assert relative_rms(mixer(changed)[:, 12], y[:, 12]) > 1e-3


def test_the_oldest_tokens_are_forgotten() -> None:
    mixer, x = built(memory=4), tokens(2, 16, 12)
    # at position 12 the memory holds 8 .. 11 and the window 9 .. 12
    changed = torch.cat([x[:, :8] + 1, x[:, 8:]], 1)
    assert relative_rms(mixer(changed)[:, 12:], mixer(x)[:, 12:]) <= RUNGS["F64"]
    with record() as seen:
        mixer(x)
    assert int(seen["retrieved"][0].max()) <= 3


def test_the_state_stays_as_large_as_the_memory_and_a_window() -> None:
    mixer, x = built(memory=5), tokens(2, 40, 12)
    state = mixer.init_state(2)
    with torch.no_grad():
        for t in range(40):
            _, state = mixer.step(x[:, t : t + 1], state)
    assert isinstance(state, tuple) and isinstance(state[0], Tensor) and state[0].shape[2] == 9


def test_a_language_model_generates_as_one_pass_says() -> None:
    torch.manual_seed(0)
    mixer = "memorizing_transformer(window=4, memory=9, topk=2)"
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, mixer=mixer).double()
    prompt = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    out = model.generate(prompt, new_tokens=9, temperature=0)
    for n in range(5, 14):
        assert torch.equal(model(out[:, :n])[:, -1].argmax(-1), out[:, n])


def test_runs_in_half_precision() -> None:
    torch.manual_seed(0)
    mixer = MemorizingTransformer(dim=12, heads=3, window=4, memory=30, topk=30)
    x = torch.randn(2, 13, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert relative_rms(y, mixer(x)) < 0.05


def test_refuses_what_it_has_no_form_for() -> None:
    with pytest.raises(ValueError, match="build it with causal=True"):
        MemorizingTransformer(dim=12, heads=3, causal=False)
    with pytest.raises(ValueError, match="expected at least 1 each"):
        built(window=0)
    with pytest.raises(ValueError, match="with itself only"):
        built()(tokens(1, 2, 12), tokens(1, 4, 12))
