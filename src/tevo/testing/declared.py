"""Group E, declared cost: what is counted without a device against what the card declares."""

from __future__ import annotations

import torch

from tevo.bench.measure import parameters
from tevo.testing.checks import check, expect, leaves
from tevo.testing.cost import EXPONENTS, count, declared_flops, formula, growth, growth_kept, last_octave
from tevo.testing.subject import Subject, stateful


@check("Counted FLOPs grow with the length as the card declares.", lambda s: s.costed, once=True, group="E")
def check_cost(s: Subject) -> float:
    """The growth decides from which length on a part is the cheaper one. Counted on meta tensors."""
    exponent = last_octave(growth(s))
    if exponent is None:
        expect(not s.card.flops, f"{s.name}: the card declares FLOPs but none are counted")
        return 0.0
    holds = abs(exponent - EXPONENTS[s.card.cost]) <= 0.05
    expect(holds, f"{s.name}: FLOPs grow as n^{exponent:.3f}, the card declares {s.card.cost}")
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


@check(
    "Bytes kept for backward grow with the length as the card declares; without a word of it, no faster than the FLOPs.",
    lambda s: bool(s.card.memory) or (s.costed and s.card.role != "position"),
    once=True,
    group="E",
)
def check_saved_bytes(s: Subject) -> float:
    """A matrix of scores that is kept where none need be is what fills the memory at long lengths."""
    exponent = growth_kept(s)
    gap = exponent - EXPONENTS[s.card.memory or s.card.cost]
    declared = s.card.memory or f"{s.card.cost} for its FLOPs"
    expect(
        -0.1 <= gap <= 0.1 if s.card.memory else gap <= 0.1,
        f"{s.name}: bytes kept for backward grow as n^{exponent:.3f}, the card declares {declared}",
    )
    return 0.0


@check("The part trains exactly as many numbers as the card declares.", lambda s: bool(s.card.parameters), group="E")
def check_parameters(s: Subject) -> float:
    """Comparisons at equal size are only as good as the count; a bias that nobody meant shows here first."""
    counted, wanted = parameters(s.part_of(s.make(disturbed=False))), formula(s, s.card.parameters, max(s.sizes()))
    expect(counted == wanted, f"{s.name} trains {counted} numbers, the card declares {wanted:g}")
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
