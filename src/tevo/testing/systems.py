"""Group D, systems: saving, compiling and whatever else a program does with a module."""

from __future__ import annotations

import copy

import torch

from tevo.testing.checks import check, compare_gradients, expect
from tevo.testing.subject import Subject
from tevo.testing.tolerances import RUNGS


@check("The state dict round-trips: a second instance with it gives the same bits.", group="D")
def check_state_dict(s: Subject) -> float:
    """What is saved is what is needed."""
    one, two = s.make(), s.make(disturbed=False)
    saved = copy.deepcopy(one.state_dict())
    for name, tensor in saved.items():
        expect(not tensor.is_complex(), f"{s.name}: {name} is complex; store it as a pair of reals")
    two.load_state_dict(saved)
    x = s.inputs(2, s.sizes()[0])
    expect(torch.equal(s.call(one, x), s.call(two, x)), f"{s.name}: outputs differ after loading the state dict")
    return 0.0


@check("torch.compile traces it as one graph, with the same values and gradients.", once=True, group="D")
def check_compiles(s: Subject) -> float:
    """Traced with the aot_eager backend: the graph is tested, not the code generator."""
    module = s.make()
    x = s.inputs(2, s.sizes()[0]).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: s.call(module, y), fullgraph=True, backend="aot_eager", dynamic=False)
    try:
        ours = compiled(x)
        return compare_gradients(f"{s.name} compiled", module, [x], ours, s.call(module, x), RUNGS["F64"])
    finally:
        torch._dynamo.reset()
