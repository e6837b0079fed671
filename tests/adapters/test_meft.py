from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo import record
from tevo.adapters.meft import MEFT1, MEFT2, MEFT3, Pass, Stack
from tevo.bench.measure import saved_bytes
from tevo.models.causal_lm import CausalLM
from tevo.models.encoder import Encoder
from tevo.testing.tolerances import RUNGS, relative_rms

ALL = pytest.mark.parametrize("kind", [MEFT1, MEFT2, MEFT3])


def encoder(depth: int = 4, **options: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(dim=12, depth=depth, heads=3, hidden_dim=19, **options).double()  # type: ignore[arg-type]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gradients(model: Encoder, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((y * drawn(*y.shape)).sum(), leaves))


@ALL
@pytest.mark.parametrize("recomputed", [None, 2])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"residual": "post_norm", "causal": True}])
def test_gradients_are_those_of_ordinary_backward(
    kind: type[MEFT1], recomputed: int | None, options: dict[str, object]
) -> None:
    found = []
    for count in (recomputed, 0):
        model = encoder(**options)  # type: ignore[arg-type]
        kind(rank=5, factors=(0.9, 0.8), recomputed=count).attach(model)
        torch.manual_seed(4)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
        # dropout draws the same numbers in both
        torch.manual_seed(5)
        found.append((gradients(model, drawn(2, 7, 12)), torch.get_rng_state()))
    (ours, after), (theirs, wanted) = found
    assert torch.equal(after, wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_rms(a, b) <= 1e-8  # the inverse divides by 0.72 in each of four layers


@ALL
def test_inputs_are_computed_back(kind: type[MEFT1]) -> None:
    model = encoder()
    kind(rank=5, factors=(1.0, 1.0)).attach(model)
    stack, x = model.stack, drawn(2, 7, 12)
    assert isinstance(stack, Stack)
    run = Pass(list(stack.layers), (1.0, 1.0), None, None)  # type: ignore[arg-type]
    h1, h2 = run.forward(x, x, noted=True)
    assert relative_rms(h1, x) > 0.1
    zeros = torch.zeros_like(x)
    seen: list[Tensor] = []
    run._compare = lambda *inputs: seen.extend(inputs)  # type: ignore[method-assign]
    run.backward(h1.detach(), h2.detach(), x, zeros, zeros, (False, torch.bfloat16))
    assert relative_rms(seen[0], x) <= RUNGS["F64"] and relative_rms(seen[1], x) <= RUNGS["F64"]


@pytest.mark.parametrize(("kind", "factors"), [(MEFT1, (1e-9, 1e-9)), (MEFT2, (1.0, 1e-9))])
def test_with_silent_adapters_and_factors_near_zero_it_is_the_trained_model(
    kind: type[MEFT1], factors: tuple[float, float]
) -> None:
    x, model = drawn(2, 7, 12), encoder()
    wanted = model(x)
    kind(rank=5, factors=factors, recomputed=0).attach(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".out." in name:
                p.zero_()
    stack = model.stack
    assert isinstance(stack, Stack)
    h1, h2 = stack.streams(x)
    # the streams are swapped at the end: the trained layer's is the second of MEFT1 and the first of MEFT2
    assert relative_rms(h2 if kind is MEFT1 else h1, wanted) <= 1e-6


def test_kept_bytes_grow_with_the_layers_that_are_not_recomputed() -> None:
    sizes = []
    for recomputed in (None, 3, 2, 0):
        model = encoder()
        MEFT1(rank=5, factors=(1.0, 1.0), recomputed=recomputed).attach(model)
        sizes.append(saved_bytes(model, drawn(2, 7, 12)))
    assert sizes == sorted(sizes) and sizes[0] < sizes[3] / 4


def test_wrong_gradients_are_an_error_and_not_a_result() -> None:
    model = encoder(depth=12).float()
    MEFT3(rank=5, factors=(0.1, 0.1)).attach(model)
    y = model(drawn(2, 7, 12).float())
    with pytest.raises(RuntimeError, match="choose factors nearer 1"):
        y.sum().backward()


def test_a_tap_is_seen_once() -> None:
    model = encoder(depth=2)
    MEFT1(rank=5).attach(model)
    with record() as seen:
        model(drawn(2, 7, 12)).sum().backward()
    assert len(seen["channel_input"]) == 2


def test_mixed_precision_recomputes_in_the_same_precision() -> None:
    model = encoder(depth=2).float()
    MEFT1(rank=5, factors=(1.0, 1.0)).attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(drawn(2, 7, 12).float())
    # bfloat16 sums again give the same bits; in float32 the inputs would be off by 1 %
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_language_model_is_adapted_and_generates() -> None:
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, position="rope")
    given = MEFT1(rank=4, also=("head.*",)).attach(model)
    assert any(p is model.head.weight for p in given) and not model.embedding.weight.requires_grad
    assert model.generate(torch.tensor([[3, 1]]), new_tokens=3, temperature=0).shape == (1, 5)


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model with one encoder of blocks"):
        MEFT1().attach(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="recomputed=9, but the model has 4 layers"):
        MEFT1(recomputed=9).attach(encoder())
    with pytest.raises(ValueError, match="cannot split the wiring ReZero"):
        MEFT3().attach(encoder(residual="rezero"))
    with pytest.raises(ValueError, match="factors > 0"):
        MEFT2(factors=(1.0, 0.0))
    with pytest.raises(ValueError, match="cannot be merged"):
        MEFT1().merge(encoder())
