"""Group A, interface: what code around a part relies on without asking."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tevo.testing.checks import check, close, expect, refuses
from tevo.testing.subject import Subject
from tevo.testing.tolerances import RUNGS


@check("The output has the input's shape and dtype (float64, float32) and is finite.", group="A")
def check_shape_and_dtype(s: Subject) -> float:
    """Shapes prove nothing, but wrong ones prove a lot."""
    for dtype in s.through("precisions"):
        module = s.make(dtype=dtype)
        for n in s.sizes():
            x = s.inputs(2, n, dtype=dtype)
            before = x.clone()
            y = s.call(module, x)
            expect(y.dtype == dtype, f"{s.name} turned {dtype} into {y.dtype}")
            expect(bool(y.isfinite().all()), f"{s.name} gave values that are not finite at n={n}")
            expect(torch.equal(x, before), f"{s.name} changed its input in place")
            if s.card.role != "stack":
                expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
    return 0.0


@check("Rows of a batch are independent.", group="A")
def check_batch_consistency(s: Subject) -> float:
    """f(x)[i] equals f(x[i:i+1])."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(3, n)
    whole = s.call(module, x)
    return max(close(f"row {i} alone", s.call(module, x[i : i + 1]), whole[i : i + 1], RUNGS["F64"]) for i in range(3))


@check("Lengths 0 and 1 work, and an empty batch.", lambda s: s.any_length(), group="A")
def check_short_lengths(s: Subject) -> float:
    """The lengths at which most code was never tried."""
    module = s.make()
    for batch, n in ((2, 1), (2, 0), (0, 5)):
        x = s.inputs(batch, n).requires_grad_()
        y = s.call(module, x)
        if s.card.role != "stack":
            expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
        expect(bool(y.isfinite().all()), f"{s.name} gave values that are not finite at n={n}")
        if y.requires_grad:
            y.sum().backward()
    return 0.0


@check("Two calls in evaluation give the same bits, and use no random numbers.", group="A")
def check_deterministic(s: Subject) -> float:
    """Same input, same output."""
    module, x = s.make(), s.inputs(2, s.sizes()[0])
    before = torch.get_rng_state()
    first, second = s.call(module, x), s.call(module, x)
    expect(torch.equal(first, second), f"{s.name} gave different outputs for the same input")
    expect(torch.equal(before, torch.get_rng_state()), f"{s.name} drew random numbers in evaluation")
    return 0.0


@check(
    "A form that the card does not claim is refused.",
    lambda s: s.card.role == "normaliser" or (s.card.role in ("mixer", "block") and s.accepts("causal")),
    group="A",
    house=True,
)
def check_refuses_other_forms(s: Subject) -> float:
    """Refuse what cannot be honoured."""
    for form, value in (("causal", True), ("bidirectional", False)):
        if not s.claims(form):
            refuses(f"{s.name} with causal={value}", lambda value=value: s.make(causal=value))  # type: ignore[misc]
    return 0.0


@check(
    "Without the padding claim a mask is refused.",
    lambda s: s.card.role == "mixer" and not s.claims("padding"),
    group="A",
    house=True,
)
def check_refuses_a_mask(s: Subject) -> float:
    """Never silently ignored."""
    n = s.sizes()[0]
    module, mask = s.make(), torch.ones(2, n, dtype=torch.bool)
    refuses(f"{s.name} with a mask", lambda: s.call(module, s.inputs(2, n), mask=mask))
    return 0.0


@check("Exchanging rows of a batch exchanges outputs.", group="A")
def check_batch_order(s: Subject) -> float:
    """A part that looks along the batch mixes strangers, which no loss will show."""
    module = s.make()
    x = s.inputs(3, s.sizes()[-1])
    order = torch.arange(len(x)).flip(0)
    return close("rows in reverse", s.call(module, x[order]), s.call(module, x)[order], RUNGS["F64"])


@check(
    "Lengths around 1, powers of two and the part's own sizes (w - 1, w, w + 1) work.",
    lambda s: s.any_length(),
    group="A",
)
def check_lengths(s: Subject) -> float:
    """Blocks, windows and top-k go wrong where a length is just not a multiple, or shorter than k."""
    module = s.make()
    for n in s.boundaries():
        x = s.inputs(2, n)
        y = s.call(module, x)
        if s.card.role != "stack":
            expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
        expect(bool(y.isfinite().all()), f"{s.name} gave values that are not finite at n={n}")
    return 0.0


@check("Transposed, expanded and offset inputs give what contiguous ones give, and are not changed.", group="A")
def check_layouts(s: Subject) -> float:
    """A view in place of a copy is the caller's right; writing into it is nobody's."""
    module, n = s.make(), s.sizes()[0]
    plain = s.inputs(2, n)
    offset = torch.cat([torch.full_like(plain[:, :1], 5.0), plain], 1)[:, 1:]
    row = plain[:1].expand(len(plain), -1, -1)
    worst = 0.0
    for what, x, same in (
        ("transposed", plain.mT.contiguous().mT, plain),
        ("offset", offset, plain),
        ("expanded", row, row.contiguous()),
    ):
        before = x.clone()
        y = s.call(module, x)
        expect(torch.equal(x, before), f"{s.name} changed its {what} input")
        worst = max(worst, close(f"{what} input", y, s.call(module, same), RUNGS["F64"]))
    return worst


@check("A deep copy, a pickled copy and a second build from the same seed give the same bits.", group="A")
def check_copies(s: Subject) -> float:
    """Averaging weights, workers and tests all make copies."""
    module, x = s.make(), s.inputs(2, s.sizes()[0])
    y = s.call(module, x)
    copies = {"deep": copy.deepcopy(module), "second": s.make()}
    parts = list(module.modules())
    # neither a class that is defined inside a function nor what torch makes for a parametrised one has a name to find
    if not any("<locals>" in type(part).__qualname__ or is_parametrized(part) for part in parts):
        copies["pickled"] = pickle.loads(pickle.dumps(module))
    for what, twin in copies.items():
        assert isinstance(twin, nn.Module)
        expect(torch.equal(s.call(twin, x), y), f"{s.name}: a {what} copy gives other outputs")
    return 0.0


@check("It can be built and run on the meta device.", lambda s: s.card.role != "adapter", group="A", once=True)
def check_meta(s: Subject) -> float:
    """Large models are built without memory first; a part that looks at values cannot be."""
    with torch.device("meta"):
        # a module that was built before only moves there
        module = s.make(disturbed=False).to("meta")
        x = torch.empty(2, s.sizes()[0], s.dim, dtype=torch.float64)
        y = s.call(module, x)
    expect(y.is_meta, f"{s.name} left the meta device for {y.device}")
    if s.card.role != "stack":
        expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
    return 0.0
