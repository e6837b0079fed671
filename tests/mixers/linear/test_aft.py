from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.linear import aft
from tevo.mixers.linear.aft import AFTFull, AFTLocal, AFTSimple, earlier_keys
from tevo.models.causal_lm import CausalLM
from tevo.testing.subject import disturb

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def average(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal AFT as one dense softmax for each feature."""
    n = k.shape[1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)[..., None]
    weights = (w[..., None] + k[:, None]).masked_fill(later, -torch.inf).softmax(2)
    return (weights * v[:, None]).sum(2)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 33, 65, 100])
@pytest.mark.parametrize("spread", [0.0, 80.0])
def test_halving_and_one_product_equal_the_dense_softmax(
    n: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aft, "_SPREAD", spread)
    w, k, v = (3 * tokens(1, n, n)).requires_grad_(), tokens(2, n, 3).requires_grad_(), tokens(2, n, 3).requires_grad_()
    numerator, denominator, _ = earlier_keys(w, k, v)
    ours, theirs = numerator / denominator, average(w, k, v)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, (w, k, v), cotangent), torch.autograd.grad(theirs, (w, k, v), cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_without_biases_full_and_local_equal_simple(causal: bool) -> None:
    full = AFTFull(dim=12, length=13, hidden_dim=5, causal=causal).double()
    local = AFTLocal(dim=12, length=13, hidden_dim=5, causal=causal, window=3).double()
    simple = AFTSimple(dim=12, hidden_dim=5, causal=causal).double()
    for mixer in (full, local):
        torch.nn.init.zeros_(mixer.a)
        mixer.qkv, mixer.out = simple.qkv, simple.out
        torch.testing.assert_close(mixer(tokens(2, 13, 12)), simple(tokens(2, 13, 12)), **CLOSE)


def test_local_with_a_window_of_all_tokens_equals_full() -> None:
    full, local = AFTFull(dim=12, length=13).double(), AFTLocal(dim=12, length=13, window=13).double()
    disturb(full)
    local.load_state_dict(full.state_dict())
    assert torch.equal(local(tokens(2, 13, 12)), full(tokens(2, 13, 12)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cls", [AFTFull, AFTSimple])
def test_constant_keys_and_biases_give_the_mean_of_the_values(cls: type, causal: bool) -> None:
    mixer = cls(dim=12, causal=causal, **({"length": 13} if cls is AFTFull else {})).double()
    if cls is AFTFull:
        torch.nn.init.ones_(mixer.a)
        torch.nn.init.ones_(mixer.b)
    with torch.no_grad():
        mixer.qkv.weight[12:24] = 0.0
    x = tokens(2, 13, 12)
    q, _, v = mixer.qkv(x).chunk(3, -1)
    mean = v.cumsum(1) / torch.arange(1, 14)[:, None] if causal else v.mean(1, keepdim=True)
    torch.testing.assert_close(mixer(x), mixer.out(q.sigmoid() * mean), **CLOSE)


@pytest.mark.parametrize("n", [13, 50])
def test_a_huge_later_key_does_not_drown_earlier_ones_in_float32(n: int) -> None:
    w, k, v = tokens(1, n, n).float(), tokens(2, n, 3).float(), tokens(2, n, 3).float()
    k[:, n // 2 :] += 200.0  # e^-200 is no float32 number
    numerator, denominator, _ = earlier_keys(w, k, v)
    # float32 rounds keys near 200 by up to 1e-5
    torch.testing.assert_close(numerator / denominator, average(w, k, v), rtol=1e-4, atol=1e-4)
    assert bool((denominator > 0).all())


@pytest.mark.parametrize("causal", [False, True])
def test_simple_leaves_padding_out_and_continues_by_state(causal: bool) -> None:
    # the generic checks see full and local; this is the same for the simple form
    mixer, x = AFTSimple(dim=12, hidden_dim=5, causal=causal, bias=True).double(), tokens(2, 13, 12)
    disturb(mixer)
    alone = mixer(x[:, 4:10])
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 4:10] = True
    padded = mixer(x.masked_fill(~mask[..., None], float("nan")), mask=mask)
    torch.testing.assert_close(padded[:, 4:10], alone, **CLOSE)
    assert bool(padded.isfinite().all())
    assert bool(mixer(x, mask=torch.zeros_like(mask)).isfinite().all())
    assert mixer(x[:, :0]).shape == (2, 0, 12)
    if causal:
        state, pieces = mixer.init_state(2), []
        for start, stop in ((0, 1), (1, 6), (6, 7), (7, 13)):
            y, state = mixer.step(x[:, start:stop], state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), **CLOSE)


@pytest.mark.parametrize("mixer", ["aft", "aft_local"])
def test_a_language_model_generates_from_left_padded_prompts_as_from_plain_ones(mixer: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(vocab=11, dim=12, depth=2, mixer=mixer, length=17).double()
    disturb(model)
    prompt = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.arange(8)[None].expand(2, -1) >= 3
    plain = model.generate(prompt, new_tokens=9, temperature=0)
    assert torch.equal(model.generate(padded, new_tokens=9, temperature=0, mask=mask)[:, 3:], plain)


def test_what_it_cannot_do_is_refused() -> None:
    x = tokens(2, 13, 12).float()
    with pytest.raises(ValueError, match=r"length=7.*length >= 13"):
        AFTFull(dim=12, length=7)(x)
    with pytest.raises(ValueError, match="window=0"):
        AFTLocal(dim=12, length=7, window=0)
    with pytest.raises(ValueError, match="context"):
        AFTSimple(dim=12)(x, x)
    with pytest.raises(ValueError, match="causal=True"):
        AFTFull(dim=12, length=13).init_state(2)


def test_half_precision_keeps_exponentials_in_float32() -> None:
    mixer = AFTFull(dim=12, length=13, causal=True).bfloat16()
    y, state = mixer.step(tokens(2, 13, 12).bfloat16(), mixer.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32
    wide = AFTFull(dim=12, length=13, causal=True)
    wide.load_state_dict(mixer.state_dict())
    # inputs and weights have 8 bits, so that sums over twelve of them agree to some percent
    torch.testing.assert_close(y.float(), wide(tokens(2, 13, 12).bfloat16().float()), rtol=0.05, atol=0.05)
