"""Group B, seams: where one thing meets another (state and padding, groups of heads and weights, rows without a key)."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

from tevo.contracts import Normaliser
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.testing.checks import (
    check,
    close,
    compare_gradients,
    expect,
    is_mixer_like,
    limit,
    oracle_of,
    step_through,
)
from tevo.testing.subject import SeatedObjective, Subject, stateful
from tevo.testing.tolerances import RUNGS


@check(
    "Exact state: a later piece that is padded, each row on another side, equals the unpadded one, or is refused.",
    lambda s: s.claims("exact_state") and s.claims("padding") and s.any_length(),
    group="B",
)
def check_padded_continuation(s: Subject) -> float:
    """Padding before the first token meets an empty state, so that only padding after it shows what it does to one."""
    module, n = s.make(causal=True), s.sizes()[0]
    first, last = n // 3, n // 3 + 3  # where the second and the third piece begin
    owner, x = stateful(module), s.inputs(2, n)
    whole = s.call(module, x)
    padded = torch.full((2, 5, s.dim), 7.0, dtype=x.dtype)
    padded[0, 2:], padded[1, :3] = x[0, first:last], x[1, first:last]
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    places = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]) + first
    worst = 0.0
    for at in (places, None):
        with torch.no_grad():
            _, state = owner.step(x[:, :first], owner.init_state(2))
            try:
                middle, state = owner.step(padded, state, mask=mask, at=at)
            except ValueError:
                continue
            after = None if at is None else torch.arange(last, n).expand(2, -1)
            end, _ = owner.step(x[:, last:], state, at=after)
        ours = torch.cat([middle[mask].unflatten(0, (2, 3)), end], 1)
        how = "counted by the part" if at is None else "given"
        worst = max(
            worst, close(f"{s.name}, positions {how}, after a padded piece", ours, whole[:, first:], RUNGS["F64"])
        )
    return worst


@check(
    "Cross, with a state: stepping over any split of the queries equals one pass over the same context, padded or not.",
    lambda s: s.claims("exact_state") and s.claims("cross") and s.claims("bidirectional") and is_mixer_like(s),
    group="B",
)
def check_cross_state(s: Subject) -> float:
    """What decoding keeps of a context never changes, and is computed apart from the context's own pass."""
    module, n = s.make(causal=False), s.sizes()[0]
    owner, x, context = stateful(module), s.inputs(2, n), s.inputs(2, n + 3, seed=2)
    masks: list[Tensor | None] = [None]
    if s.claims("padding"):
        masks.append(torch.arange(n + 3) < torch.tensor([[n + 3], [n - 1]]))
    worst = 0.0
    for mask in masks:
        whole = s.call(module, x, context, mask=mask)
        for pieces in ((n,), (n - 4, 1, 3)):
            outputs, start = [], 0
            with torch.no_grad():
                state = owner.init_state(2, context=context, mask=mask)
                for piece in pieces:
                    at = torch.arange(start, start + piece).expand(2, -1)
                    y, state = owner.step(x[:, start : start + piece], state, at=at)
                    outputs.append(y)
                    start += piece
            what = f"{s.name} over {'a' if mask is None else 'a padded'} context in pieces {pieces}"
            worst = max(worst, close(what, torch.cat(outputs, 1), whole, RUNGS["F64"]))
    return worst


@check(
    "Cross, causal, with fewer keys than queries: it equals the second formulation, zeros before the first key included.",
    lambda s: s.claims("cross") and s.claims("causal") and s.card.role == "mixer",
    group="B",
    house=True,
)
def check_before_the_first_key(s: Subject) -> float:
    """Aligned bottom-right, the first queries come before every key."""
    module, n = s.make(causal=True), s.sizes()[0]
    x, context = s.inputs(2, n).requires_grad_(), s.inputs(2, max(1, n - 3), seed=2).requires_grad_()
    theirs = oracle_of(s).reference(module, x, context)
    most = limit(s, "oracle", "F64")
    return compare_gradients(
        f"{s.name}, more queries than keys", module, [x, context], s.call(module, x, context), theirs, most
    )


@check(
    "Dropout acts in training, and changes nothing in evaluation.",
    lambda s: s.accepts("dropout"),
    group="A",
)
def check_dropout(s: Subject) -> float:
    """Examples leave it out, so that nothing else would see it act at the wrong time, or never."""
    x = s.inputs(2, s.sizes()[0])
    plain, dropping = (replace(s, example={**s.example, "dropout": rate}).make() for rate in (0.0, 0.5))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        wanted = s.call(plain, x)
        expect(torch.equal(s.call(dropping, x), wanted), f"{s.name} drops in evaluation")
        expect(not torch.equal(s.call(dropping.train(), x), wanted), f"{s.name} drops nothing in training")
    return 0.0


@check(
    "Exact state: in bfloat16, stepping computes what it computes in float32 with the same weights, within 2 %.",
    lambda s: s.claims("exact_state"),
    group="C",
)
def check_bfloat16_steps(s: Subject) -> float:
    """A state that is kept or joined in another precision than a pass has is found by decoding only."""
    half = s.make(causal=True, dtype=torch.bfloat16)
    full = copy.deepcopy(half).to(torch.float32)
    n = s.sizes()[0]
    x, pieces = s.inputs(2, n, dtype=torch.bfloat16), (n - 3, 1, 2)
    with torch.no_grad():
        y, wanted = step_through(s, half, x, pieces), step_through(s, full, x.to(torch.float32), pieces)
    expect(y.dtype == torch.bfloat16, f"{s.name} turned bfloat16 into {y.dtype} while stepping")
    return close(f"{s.name} stepping in bfloat16", y, wanted, limit(s, "bfloat16", "BF16"))


@check(
    "Heads: attention with its weights written out equals the fused kernel, causal and not, values and gradients.",
    lambda s: s.card.role == "heads",
    group="B",
)
def check_written_out_weights(s: Subject) -> float:
    """Which query head reads which key head is decided in two places."""
    n, worst = s.sizes()[0], 0.0
    for causal in (False, True):
        fused = s.make(causal=causal)
        assert isinstance(fused, SoftmaxAttention)
        plain = SoftmaxAttention(dim=s.dim, heads=fused.heads, causal=causal, normaliser=Normaliser()).eval()
        x = s.inputs(2, n).requires_grad_()
        what = f"{s.name} causal={causal}, weights written out"
        worst = max(worst, compare_gradients(what, plain, [x], plain(x), s.call(fused, x), RUNGS["F64"]))
    return worst


@check(
    "Normaliser: a query without any allowed key gets weights of zero, and finite gradients.",
    lambda s: s.card.role == "normaliser",
    group="B",
)
def check_no_allowed_key(s: Subject) -> float:
    """Weights on padding would count as soon as values have a bias."""
    part = s.part_of(s.make())
    scores = torch.randn(2, s.heads, 7, 9, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    scores.requires_grad_()
    allowed = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(3)) < 0.7
    allowed[:, :, 3] = False
    weights = part(scores, allowed)
    expect(not bool(weights[:, :, 3].any()), f"{s.name} gives weight to keys of a query that may see none")
    expect(not bool(weights.masked_select(~allowed).any()), f"{s.name} gives weight to keys that may not be seen")
    (gradient,) = torch.autograd.grad((weights * scores.detach()).sum(), scores)
    expect(bool(gradient.isfinite().all()), f"{s.name}: gradients are not finite where a query may see no key")
    return 0.0


@check(
    "Normaliser: its scores equal the second formulation's, or scaled dot products where that has none.",
    lambda s: s.card.role == "normaliser",
    group="B",
    house=True,
)
def check_scores(s: Subject) -> float:
    """Weights alone are compared from given scores."""
    part = s.part_of(s.make())
    assert isinstance(part, Normaliser)
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(2, s.heads, n, s.dim // s.heads, generator=generator, dtype=torch.float64) for n in (7, 9))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    second = getattr(oracle_of(s), "score", scaled_dot_products)
    return compare_gradients(
        f"{s.name}: scores", part, leaves, part.score(q, k), second(part, q, k), limit(s, "oracle", "F64")
    )


def scaled_dot_products(part: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    """The neutral scores, one pair of heads at a time."""
    return torch.einsum("bhne, bhme -> bhnm", q, k) / q.shape[-1] ** 0.5


@check(
    "What the file offers beside the part equals its second formulation.",
    lambda s: s.house and hasattr(oracle_of(s), "beside"),
    group="B",
    house=True,
)
def check_beside(s: Subject) -> float:
    """Tables, derivatives and training-time forms that no forward pass in evaluation reaches."""
    system = sys.modules[s.cls.__module__]
    return max(close(what, ours, theirs, most) for what, ours, theirs, most in oracle_of(s).beside(system))


@check(
    "Objective: a batch hides what the second formulation says it hides.",
    lambda s: s.house and hasattr(oracle_of(s), "corruption"),
    group="B",
    seat="objective",
    house=True,
)
def check_corruption(s: Subject) -> float:
    """A loss is right for whatever it is shown, also for the answer."""
    seated = s.make()
    assert isinstance(seated, SeatedObjective)
    for what, holds in oracle_of(s).corruption(seated.objective, seated.batch(64, max(s.sizes()))):
        expect(holds, f"{s.name}: it does not hold that {what}")
    return 0.0
