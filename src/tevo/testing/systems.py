"""Group D, systems: saving, compiling and whatever else a program does with a module."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tevo.testing.checks import check, close, compare_gradients, expect
from tevo.testing.cost import Called
from tevo.testing.subject import Subject
from tevo.testing.tolerances import RUNGS


@check("The state dict round-trips: a second instance with it gives the same bits.", group="D")
def check_state_dict(s: Subject) -> float:
    """What is saved is what is needed."""
    one, two = s.make(), s.make(disturbed=False, seed=1)
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


@check("torch.func.functional_call with other parameters computes what a module with them computes.", group="D")
def check_functional_call(s: Subject) -> float:
    """Meta-learning, ensembles and per-sample gradients replace parameters from outside; a cached one stays behind."""
    module = Called(s, s.make())
    x = s.inputs(2, s.sizes()[0])
    other = {name: 1.25 * p.detach() for name, p in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict(other, strict=False)
    with torch.no_grad():
        # what is kept from a call with the old values must not serve the new ones
        module(x)
        return close(f"{s.name} called", torch.func.functional_call(module, other, (x,)), twin(x), RUNGS["F64"])


@check("With activations computed again in backward, gradients are the same.", group="D")
def check_checkpointing(s: Subject) -> float:
    """Random numbers or state between the two passes give silently wrong gradients."""
    module = s.make()
    x = s.inputs(2, s.sizes()[0]).requires_grad_()
    again = checkpoint(lambda y: s.call(module, y), x, use_reentrant=False)
    assert isinstance(again, Tensor)
    return compare_gradients(f"{s.name} checkpointed", module, [x], again, s.call(module, x), RUNGS["EXACT"])


@check("Two threads that use one module in evaluation get what each would alone.", group="D")
def check_threads(s: Subject) -> float:
    """Anything kept on the module between two lines of forward is shared by all who call it."""
    module, n = s.make(), s.sizes()[0]
    inputs = [s.inputs(2, n, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        wanted = [s.call(module, x) for x in inputs]
    same = [False, False]

    def work(i: int) -> None:
        with torch.no_grad():
            same[i] = all(torch.equal(s.call(module, inputs[i]), wanted[i]) for _ in range(4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(all(same), f"{s.name}: outputs differ while another thread uses the module")
    return 0.0


@check("In training the same seed gives the same outputs.", group="D")
def check_training_is_seeded(s: Subject) -> float:
    """A draw that no seed decides cannot be resumed."""
    module = s.make().train()
    x = s.inputs(2, s.sizes()[0])
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(s.call(copy.deepcopy(module), x))
    expect(torch.equal(*outputs), f"{s.name}: the same seed gives different outputs in training")
    return 0.0
