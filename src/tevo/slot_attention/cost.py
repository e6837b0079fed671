"""Time and extra memory of one pass of Slot Attention over many inputs, form by form, on the machine at hand.

The package ``slot-attention`` is measured beside ours where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from tevo.bench import forms

__all__ = ["FORMS", "PEER", "SHAPE", "measure", "passes"]

SHAPE = {"batch": 16, "inputs": 16384, "width": 64, "slots": 7, "iterations": 3}
FORMS: dict[str, dict[str, str]] = {"auto": {}, "lean": {"memory": "lean"}, "plain": {"form": "plain"}}
PEER = "slot-attention"
_ROUNDS = 3
# inputs of a pass that only has to have run
_SHORT = 1024


def measure(
    *,
    threads: int,
    seconds: float = 8.0,
    shape: Mapping[str, int] = SHAPE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Forward and training, time in seconds and memory in bytes, of every form.

    Args:
        threads: of torch.
        seconds: after which no further round of timing is begun.
        shape: batch, inputs, width, slots, iterations.
        say: is told what is being measured.

    Returns:
        "forms": form -> forward_s, train_s, forward_bytes, train_bytes, or "error"; "shape" in words, "threads",
        "rounds" of the timing.
    """
    names = [*FORMS, *([PEER] if importlib.util.find_spec("slot_attention") else [])]
    say("measuring memory and time of " + ", ".join(names))
    short = {**shape, "inputs": min(_SHORT, shape["inputs"])}
    found = forms.measure(__name__, names, shape=shape, short=short, threads=threads, seconds=seconds, rounds=_ROUNDS)
    words = "batch {batch}, {inputs:,} inputs of width {width}, {slots} slots, {iterations} rounds, float32".format(
        **shape
    )
    return {**found, "shape": words, "threads": threads}


def passes(name: str, shape: Mapping[str, int]) -> dict[str, Callable[[], None]]:
    """A forward pass without a graph, and one with its backward pass to inputs and weights, of a form with a :data:`SHAPE`."""
    import torch

    from tevo.slot_attention.module import SlotAttention

    torch.manual_seed(0)
    d, k, rounds = shape["width"], shape["slots"], shape["iterations"]
    module: torch.nn.Module
    if name == PEER:
        module = importlib.import_module("slot_attention").SlotAttention(
            num_slots=k, dim=d, iters=rounds, hidden_dim=128
        )
    else:
        module = SlotAttention(dim=d, num_slots=k, iterations=rounds, hidden_dim=128, **FORMS[name])  # type: ignore[arg-type]
    x = torch.randn(shape["batch"], shape["inputs"], d)
    leaf = x.detach().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        module(leaf).sum().backward()

    return {"forward": forward, "train": train}
