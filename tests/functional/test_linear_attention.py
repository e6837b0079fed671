from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tevo.functional.linear_attention import (
    causal_linear_attention,
    linear_attention,
    normalised_causal_linear_attention,
    normalised_linear_attention,
    recurrent_linear_attention,
)

B, H, P, V = 2, 3, 4, 5
KINDS = ["plain", "decay", "constant_decay", "delta", "decay_delta", "constant_decay_delta"]


def make(n: int, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Signed inputs that require gradients; keys of norm <= 1, as the delta rule asks."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=rng)  # noqa: E731
    given = {
        "q": randn(B, H, n, P),
        "k": torch.nn.functional.normalize(randn(B, H, n, P), dim=-1),
        "v": randn(B, H, n, V),
        "state": randn(B, H, P, V),
    }
    if "constant_decay" in kind:
        given["g"] = -randn(H).abs()
    elif "decay" in kind:
        given["g"] = -randn(B, H, n).abs()
    if "delta" in kind:
        given["beta"] = 2 * randn(B, H, n).sigmoid()
    return {name: t.requires_grad_() for name, t in given.items()}


def gradients(outputs: tuple[Tensor, Tensor], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    y, state = outputs
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    loss = (y * weight).sum() + y.square().sum() + 3 * state.square().sum()
    return torch.autograd.grad(loss, tuple(given.values()), materialize_grads=True)


def masked_square(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    """All pairs of positions, from no state."""
    n = q.shape[2]
    scores = (q @ k.mT).tril()
    if g is not None:
        sums = (g[:, None].expand(H, n) if g.dim() == 1 else g).cumsum(-1)
        scores = scores * (sums[..., :, None] - sums[..., None, :]).tril().exp()
    return scores @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "chunk"), [(0, 4), (1, 4), (2, 64), (13, 4), (12, 4), (13, 1), (33, 32), (65, 64)])
def test_chunks_equal_one_token_after_another(n: int, chunk: int, kind: str) -> None:
    given = make(n, kind)
    mine = causal_linear_attention(**given, chunk=chunk)
    plain = recurrent_linear_attention(**given)
    torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(mine, given), gradients(plain, given), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", [causal_linear_attention, recurrent_linear_attention])
@pytest.mark.parametrize("kind", ["plain", "decay", "constant_decay"])
def test_equals_the_masked_square(form, kind: str) -> None:
    given = make(13, kind)
    del given["state"]
    torch.testing.assert_close(form(**given)[0], masked_square(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [causal_linear_attention, recurrent_linear_attention])
def test_delta_rule_equals_products_of_householder_like_matrices(form) -> None:
    given = make(13, "decay_delta")
    q, k, v, g, beta, s = (given[name] for name in ("q", "k", "v", "g", "beta", "state"))
    ys = []
    for t in range(13):
        kk = torch.einsum("bhp,bhr->bhpr", k[:, :, t], k[:, :, t])
        kv = torch.einsum("bhp,bhv->bhpv", k[:, :, t], v[:, :, t])
        weight = beta[:, :, t, None, None]
        s = g[:, :, t, None, None].exp() * (torch.eye(P, dtype=torch.float64) - weight * kk) @ s + weight * kv
        ys.append(torch.einsum("bhp,bhpv->bhv", q[:, :, t], s))
    torch.testing.assert_close(form(**given), (torch.stack(ys, 2), s), rtol=1e-12, atol=1e-12)


def test_delta_rule_at_full_strength_stores_the_value_under_its_key() -> None:
    given = make(13, "delta")
    given["beta"] = torch.ones_like(given["beta"])
    _, state = causal_linear_attention(**given, chunk=4)
    recalled = torch.einsum("bhp,bhpv->bhv", given["k"][:, :, -1], state)
    torch.testing.assert_close(recalled, given["v"][:, :, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_are_exact(kind: str) -> None:
    given = make(5, kind)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return causal_linear_attention(**dict(zip(given, inputs, strict=True)), chunk=2)

    assert gradcheck(run, tuple(given.values()), fast_mode=True)
    assert gradgradcheck(run, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_equals_one_pass(kind: str) -> None:
    given = make(29, kind)
    whole, last = causal_linear_attention(**given, chunk=4)
    state, parts = given["state"], []
    for i, j in ((0, 1), (1, 12), (12, 12), (12, 13), (13, 29)):
        here = {name: t[:, :, i:j] if t.dim() > 1 else t for name, t in given.items()} | {"state": state}
        part, state = causal_linear_attention(**here, chunk=4)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_future_tokens_do_not_change_the_past(kind: str) -> None:
    given = make(13, kind)
    per_token = [t for name, t in given.items() if name != "state" and t.dim() > 1]
    y, _ = causal_linear_attention(**given, chunk=4)
    for t in (0, 3, 4, 6):
        for g in torch.autograd.grad(y[:, :, t].sum(), per_token, retain_graph=True, materialize_grads=True):
            assert (g[:, :, t + 1 :] == 0).all()
        for x in (given["k"], given["v"]):
            (g,) = torch.autograd.grad(y[:, :, t].sum(), x, retain_graph=True)
            assert g[:, :, t].abs().max() > 0


def test_strong_decay_neither_overflows_nor_loses_the_near_past() -> None:
    given = {name: t.detach() for name, t in make(70, "decay").items()}
    given["g"] = 40 * given["g"]  # e^{-sum g} of a chunk would overflow float64, and float32 many times over
    expected = masked_square(**{name: t for name, t in given.items() if name != "state"})
    single = {name: t.float().requires_grad_() for name, t in given.items() if name != "state"}
    y, state = causal_linear_attention(**single)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums of g near 2e3
    assert all(g.isfinite().all() for g in gradients((y, state), single))


def test_bidirectional_form_is_the_sum_over_all_keys() -> None:
    given = make(13, "plain")
    k, v = given["k"][:, :, :7], given["v"][:, :, :7]
    scores = torch.einsum("bhnp,bhmp->bhnm", given["q"], k)
    expected = torch.einsum("bhnm,bhmv->bhnv", scores, v)
    torch.testing.assert_close(linear_attention(given["q"], k, v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 13])
def test_normalised_forms_are_weighted_averages(n: int) -> None:
    given = make(n, "plain")
    q, k = given["q"].exp(), given["k"].exp()
    v, eps = given["v"], 0.01
    scores = q @ k.mT
    expected = (scores / (scores.sum(-1, keepdim=True) + eps)) @ v
    torch.testing.assert_close(normalised_linear_attention(q, k, v, eps=eps), expected, rtol=1e-12, atol=1e-12)
    scores = scores.tril()
    expected = (scores / (scores.sum(-1, keepdim=True) + eps)) @ v
    y, state = normalised_causal_linear_attention(q, k, v, eps=eps, chunk=4)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert state.shape == (B, H, P, V + 1)
    torch.testing.assert_close(state[..., -1], k.sum(2), rtol=1e-12, atol=1e-12)


def test_a_query_without_keys_gets_zeros() -> None:
    given = make(13, "plain")
    k = given["k"].exp() * (torch.arange(13) >= 4)[:, None]
    y, _ = normalised_causal_linear_attention(given["q"].exp(), k, given["v"], chunk=4)
    assert (y[:, :, :4] == 0).all() and (y[:, :, 4:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decay", "decay_delta"])
def test_half_precision_accumulates_in_single(kind: str, dtype: torch.dtype) -> None:
    given = {name: t.detach().to(dtype) for name, t in make(200, kind).items()}
    y, state = causal_linear_attention(**given)
    expected, _ = recurrent_linear_attention(**{name: t.double() for name, t in given.items()})
    assert y.dtype == dtype and state.dtype == torch.float32
    # one rounding of the result, and float32 inside
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "decay", "delta"])
def test_vmap_over_sequences_equals_the_batch(kind: str) -> None:
    given = {name: t.detach()[:, None] for name, t in make(13, kind).items()}
    mapped = torch.func.vmap(lambda inputs: causal_linear_attention(**inputs, chunk=4))(given)
    batched = causal_linear_attention(**{name: t[:, 0] for name, t in given.items()}, chunk=4)
    torch.testing.assert_close(tuple(t[:, 0] for t in mapped), batched, rtol=1e-12, atol=1e-12)


# torch's own compiler makes an instance of every autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "decay", "decay_delta"])
def test_compiles_to_one_graph_with_gradients(kind: str) -> None:
    given = make(70, kind)
    compiled = torch.compile(causal_linear_attention, backend="aot_eager", fullgraph=True)
    mine, plain = compiled(**given, chunk=16), causal_linear_attention(**given, chunk=16)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(mine, given), gradients(plain, given), rtol=1e-10, atol=1e-10)


def test_refuses_shapes_that_do_not_fit() -> None:
    given = make(7, "decay_delta")
    for name, wrong, message in (
        ("k", given["k"][:, :, :3], "repeat shared heads"),
        ("g", given["g"][:, :2], "g of shape"),
        ("beta", given["beta"][:, :2], "beta of shape"),
        ("state", given["state"][..., :2], "state of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_linear_attention(**given | {name: wrong})
    with pytest.raises(ValueError, match="chunk=0"):
        causal_linear_attention(**given, chunk=0)
