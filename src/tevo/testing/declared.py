"""Group E, declared cost: what is counted without a device against what the card declares."""

from __future__ import annotations

from tevo.testing.checks import check, expect
from tevo.testing.cost import EXPONENTS, count, declared_flops, growth
from tevo.testing.subject import Subject


@check("Counted FLOPs grow with the length as the card declares.", once=True, group="E")
def check_cost(s: Subject) -> float:
    """Fitted on meta tensors over three octaves."""
    found = growth(s)
    exponent = found["exponent"]
    if exponent is None:
        expect(not s.card.flops, f"{s.name}: the card declares FLOPs but none are counted")
        return 0.0
    assert isinstance(exponent, float)
    least, most = EXPONENTS[s.card.cost]
    expect(least <= exponent <= most, f"{s.name}: FLOPs grow as n^{exponent}, the card declares {s.card.cost}")
    return 0.0


@check("Counted FLOPs equal the card's formula within 1 %.", lambda s: bool(s.card.flops), group="E")
def check_flops(s: Subject) -> float:
    """At the part's own odd lengths."""
    worst = 0.0
    for n in s.sizes():
        counted, declared = count(s, n), declared_flops(s, n)
        gap = abs(counted - declared) / max(counted, 1)
        expect(gap <= 0.01, f"{s.name}: {counted} FLOPs counted at n={n}, the card's formula gives {declared:.0f}")
        worst = max(worst, gap)
    return worst
