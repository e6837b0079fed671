"""Time and extra memory of one pass of Slot Attention over many inputs, form by form, on the machine at hand.

Times are taken in one process, the forms in turn; memory, what a pass adds to the resident set at its peak, in a process
of its own for each form. The package ``slot-attention`` is measured beside ours where it is installed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from tevo.bench import timing

__all__ = ["FORMS", "PEER", "SHAPE", "measure"]

SHAPE = {"batch": 16, "inputs": 16384, "width": 64, "slots": 7, "iterations": 3}
FORMS: dict[str, dict[str, str]] = {"auto": {}, "lean": {"memory": "lean"}, "plain": {"form": "plain"}}
PEER = "slot-attention"
# the module itself, which is also run
_HERE = "tevo.slot_attention.cost"
_LEAST_ROUNDS, _PATIENCE = 3, 120


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
    job = {"shape": dict(shape), "threads": threads, "seconds": seconds}
    forms: dict[str, dict[str, Any]] = {name: {} for name in names}
    say("measuring time")
    times = timing.child(_HERE, {**job, "what": "time", "forms": names}, patience=_PATIENCE)
    for name in names:
        say(f"measuring memory: {name}")
        forms[name] |= times.get(name, {"error": times.get("error", "no answer")})
        forms[name] |= timing.child(_HERE, {**job, "what": "memory", "forms": [name]}, patience=_PATIENCE)
    words = "batch {batch}, {inputs:,} inputs of width {width}, {slots} slots, {iterations} rounds, float32".format(
        **shape
    )
    return {"forms": forms, "shape": words, "threads": threads, "rounds": times.get("rounds", 0)}


def _passes(name: str, shape: Mapping[str, int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass without a graph, and one with its backward pass to inputs and weights."""
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

    return forward, train


def _times(names: list[str], shape: Mapping[str, int], seconds: float) -> dict[str, Any]:
    runs = {
        (name, what): run
        for name in names
        for what, run in zip(("forward_s", "train_s"), _passes(name, shape), strict=True)
    }
    for run in runs.values():
        run()
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    gc.disable()
    began, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            taken[key].append(time.perf_counter() - start)
        rounds += 1
    found: dict[str, Any] = {
        name: {what: median(taken[name, what]) for what in ("forward_s", "train_s")} for name in names
    }
    return {**found, "rounds": rounds}


def _memory(name: str, shape: Mapping[str, int]) -> dict[str, int]:
    timing._return_pages()
    forward, train = _passes(name, shape)
    return {"forward_bytes": timing._peak_bytes(forward), "train_bytes": timing._peak_bytes(train)}


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    if job["what"] == "time":
        return _times(job["forms"], job["shape"], job["seconds"])
    return _memory(job["forms"][0], job["shape"])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.loads(sys.argv[1]))))
