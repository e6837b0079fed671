"""The shared checks of adapters, beside those of any map from tokens to tokens: of a small model that they adapt."""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.bench.measure import saved_bytes
from tevo.contracts import Adapter
from tevo.models.encoder import Encoder
from tevo.testing.checks import check, close, expect
from tevo.testing.subject import Subject, disturb
from tevo.testing.tolerances import RUNGS, relative_rms


def adapter_of(s: Subject) -> Adapter:
    """The adapter, not yet attached."""
    adapter = s.cls(**s.example)
    assert isinstance(adapter, Adapter)
    return adapter


def copies(model: Encoder) -> dict[str, Tensor]:
    """Names and values of what is saved with a model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@check(
    "What attach gives is all that requires a gradient; three steps with weight decay change the outputs and nothing else.",
    lambda s: s.card.role == "adapter",
)
def check_trains_its_own(s: Subject) -> float:
    """What is frozen must stay as it was to the last bit, or the model cannot be shared among tasks."""
    model = s.host()
    size = sum(p.numel() for p in model.parameters())
    given = adapter_of(s).attach(model)
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    count = sum(p.numel() for p in given)
    expect(0 < count < size, f"{s.name} trains {count} numbers of a model with {size}")
    expect({id(p) for p in given} == wanted, f"{s.name}: what attach gives is not what requires a gradient")
    before, ids = copies(model), {n for n, p in model.named_parameters() if p.requires_grad}
    x = s.inputs(2, s.sizes()[0])
    first = model(x).detach()
    optimiser = torch.optim.AdamW(given, lr=0.05, weight_decay=0.1)
    for step in range(3):
        optimiser.zero_grad()
        (model(x) - s.inputs(2, s.sizes()[0], seed=step + 2)).square().mean().backward()
        optimiser.step()
    expect(relative_rms(model(x), first) > 1e-6, f"{s.name}: training changes nothing")
    for name, value in model.state_dict().items():
        expect(name in ids or torch.equal(value, before[name]), f"{s.name}: training changed the frozen {name}")
    return 0.0


@check("Freshly attached, it leaves the model's outputs as they were.", lambda s: s.claims("unchanged_at_start"))
def check_unchanged_at_start(s: Subject) -> float:
    """Training starts from the trained model."""
    x = s.inputs(2, s.sizes()[0])
    return close(s.name, s.adapted(disturbed=False)(x), s.host()(x), RUNGS["EXACT"])


@check("Merged, the model has its own parameters again and gives the same outputs.", lambda s: s.claims("merges"))
def check_merges(s: Subject) -> float:
    """No trace of the adapter is left: no time, no memory."""
    model, adapter, x = s.host(), adapter_of(s), s.inputs(2, s.sizes()[0])
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    kind = {name: type(module) for name, module in model.named_modules()}
    adapter.attach(model)
    disturb(model, trained_only=True)
    adapted = model(x)
    adapter.merge(model)
    found = {name: value.shape for name, value in model.state_dict().items()}
    expect(
        found == shapes, f"{s.name}: merged, the model saves {sorted(found.keys() ^ shapes.keys()) or 'other shapes'}"
    )
    expect({n: type(m) for n, m in model.named_modules()} == kind, f"{s.name}: merged, the model has other modules")
    return close(f"{s.name} merged", model(x), adapted, RUNGS["F64"])


@check("The bytes kept for backward are those of any depth.", lambda s: s.claims("recomputes"))
def check_recomputes(s: Subject) -> float:
    """What the method is for."""
    x = s.inputs(2, s.sizes()[0])
    two, five = (saved_bytes(s.adapted(depth=depth), x) for depth in (2, 5))
    expect(0 < two == five, f"{s.name} keeps {two} bytes for backward with 2 blocks and {five} with 5")
    return 0.0
