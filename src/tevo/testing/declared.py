"""Group E, declared cost: what is counted without a device against what the card declares."""

from __future__ import annotations

import torch

from tevo.bench.measure import fit_exponent, saved_bytes
from tevo.testing.checks import check, expect, leaves
from tevo.testing.cost import EXPONENTS, Called, at_length, count, declared_flops, formula, growth, last_octave
from tevo.testing.subject import Subject, stateful


@check("Counted FLOPs grow with the length as the card declares.", lambda s: s.costed, once=True, group="E")
def check_cost(s: Subject) -> float:
    """The growth decides from which length on a part is the cheaper one. Counted on meta tensors."""
    exponent = last_octave(growth(s))
    if exponent is None:
        expect(not s.card.flops, f"{s.name}: the card declares FLOPs but none are counted")
        return 0.0
    least, most = EXPONENTS[s.card.cost]
    expect(least <= exponent <= most, f"{s.name}: FLOPs grow as n^{exponent:.3f}, the card declares {s.card.cost}")
    return 0.0


@check("Counted FLOPs equal the card's formula within 1 %.", lambda s: bool(s.card.flops) and s.costed, group="E")
def check_flops(s: Subject) -> float:
    """At six lengths, odd ones among them, or all that the part can take."""
    worst = 0.0
    for n in (*s.sizes(), *(n for n in (48, 65, 200) if s.any_length() and "length" not in s.example)):
        counted, declared = count(s, n), declared_flops(s, n)
        gap = abs(counted - declared) / max(counted, 1)
        expect(gap <= 0.01, f"{s.name}: {counted} FLOPs counted at n={n}, the card's formula gives {declared:.0f}")
        worst = max(worst, gap)
    return worst


# lengths at which the bytes kept for backward are counted
KEPT = (512, 1024, 2048)


@check("Bytes kept for backward grow no faster with the length than the FLOPs declared.",
       lambda s: s.costed and s.card.role != "position", once=True, group="E")  # fmt: skip
def check_saved_bytes(s: Subject) -> float:
    """A matrix of scores that is kept where none need be is what fills the memory at long lengths."""
    counts = []
    for n in KEPT:
        built = at_length(s, n)
        x = torch.randn(1, n, built.dim, generator=torch.Generator().manual_seed(1))
        counts.append(saved_bytes(Called(built, built.make(dtype=torch.float32, disturbed=False)), x.requires_grad_()))
    exponent = fit_exponent(KEPT, counts, octaves=3.0)
    if exponent is not None:
        most = EXPONENTS[s.card.cost][1] + 0.05
        expect(
            exponent <= most,
            f"{s.name}: bytes kept for backward grow as n^{exponent:.2f}, the card declares {s.card.cost}",
        )
    return 0.0


@check("The decoding state holds exactly the numbers that the card declares.",
       lambda s: bool(s.card.state) and s.claims("causal") and s.claims("exact_state"), group="E")  # fmt: skip
def check_state_size(s: Subject) -> float:
    """Memory while decoding decides how many sequences a machine serves. Masks, positions and counters may be left out."""
    module, n = stateful(s.make(causal=True)), max(s.sizes())
    x = s.inputs(2, n)
    with torch.no_grad():
        _, state = module.step(x, module.init_state(len(x)))
    kept = list(leaves(state))
    floats = sum(leaf.numel() for leaf in kept if leaf.is_floating_point()) / len(x)
    everything = sum(leaf.numel() for leaf in kept) / len(x)
    wanted = formula(s, s.card.state, n)
    expect(
        wanted in (floats, everything),
        f"{s.name}: {floats:g} numbers of a sequence are kept after n={n} ({everything:g} with masks and counters), "
        f"the card declares {wanted:g}",
    )
    return 0.0
