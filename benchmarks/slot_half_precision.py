"""Ten thousand steps of training in half precision, with a slot that wins nothing forced all along: is any number not finite?

python -m benchmarks.slot_half_precision                  go on with what is missing of benchmarks/slot_half_precision.json
python -m benchmarks.slot_half_precision --steps 20       a look, with --out elsewhere

Autocast without a loss scaler, float32 weights, gradients clipped at 1. Each time that the trained queries have grown soft
they are made so large again that the softmax is hard. There are more slots than inputs, so that some win nothing: less than
float16 can hold beside its eps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.slot_grid import ROOT, store
from tevo import record
from tevo.slot_attention.aggregation import WeightedMean
from tevo.slot_attention.competition import JointSoftmax, Sinkhorn
from tevo.slot_attention.invariant import InvariantSlotAttention, Translation, TranslationScale
from tevo.slot_attention.module import SlotAttention

TARGET = ROOT / "benchmarks" / "slot_half_precision.json"
STEPS = 10_000
# norm of the queries' map that makes the softmax hard, and how often it is looked at
HARD, LOOK = 500.0, 100
SIZES: dict[str, Any] = {"dim": 8, "input_dim": 6, "num_slots": 5, "hidden_dim": 8, "iterations": 2}
GRID = (1, 3)

MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: SlotAttention(**SIZES, form="plain"),
    "absorbed": lambda: SlotAttention(**SIZES, form="absorbed"),
    "lean": lambda: SlotAttention(**SIZES, memory="lean"),
    "heads that compete": lambda: SlotAttention(**SIZES, heads=2, competition=JointSoftmax()),
    "mean of SAVi": lambda: SlotAttention(**SIZES, aggregation=WeightedMean(eps=0.0, offset=1e-8)),
    "sinkhorn": lambda: SlotAttention(**SIZES, competition=Sinkhorn()),
    "isa, translation": lambda: InvariantSlotAttention(**SIZES, grid=GRID, frame=Translation()),
    "isa, translation and scale": lambda: InvariantSlotAttention(**SIZES, grid=GRID, frame=TranslationScale()),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slot_half_precision", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each training (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cells = json.loads(given.out.read_text(encoding="utf-8"))["cells"] if given.out.exists() else []
    cells = [cell for cell in cells if cell["steps"] == given.steps and cell["module"] in MODULES]
    stored = {(cell["module"], cell["dtype"]) for cell in cells}
    for name, dtype in ((name, dtype) for name in MODULES for dtype in DTYPES):
        if (name, dtype) in stored:
            continue
        cells.append({"module": name, "dtype": dtype, **trained(MODULES[name], DTYPES[dtype], given.steps)})
        command = f"python -m benchmarks.slot_half_precision --steps {given.steps} --threads {given.threads}"
        store(given.out, cells, command=command, planned=len(MODULES) * len(DTYPES))
        print(f"{cells[-1]['not_finite']:>6} of {given.steps} steps not finite  {dtype:<8}  {name}", flush=True)
    return 0 if all(cell["not_finite"] == 0 for cell in cells) else 1


def trained(make: Callable[[], nn.Module], dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Fit a line of the slots' mean to the mean of random inputs.

    Returns:
        how many steps had a loss or a gradient that is not finite (they change no weight); the least that a slot won at a
        look, and in what share of the looks that was less than 1e-8; the loss of the first and of the last hundredth of the
        steps; seconds.
    """
    torch.manual_seed(0)
    module = make()
    inputs = torch.randn(2, GRID[0] * GRID[1], SIZES["input_dim"])
    head = nn.Linear(module(inputs).shape[-1], SIZES["input_dim"])
    parameters = [*module.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    not_finite, least, losses, began = 0, [], [], time.perf_counter()
    for step in range(steps):
        x = torch.randn_like(inputs)
        with torch.autocast("cpu", dtype=dtype):
            if step % LOOK == 0:
                least.append(_hardened(module, x))
            loss = (head(module(x)).mean(1) - x.mean(1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            not_finite += 1
            continue
        optimiser.step()
        losses.append(loss.item())
    some = max(1, steps // 100)
    return {
        "steps": steps,
        "not_finite": not_finite,
        "least_won": min(least),
        "dead_looks": mean(won < 1e-8 for won in least),
        "first_loss": mean(losses[:some]) if losses else None,
        "last_loss": mean(losses[-some:]) if losses else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.no_grad()
def _hardened(module: nn.Module, x: torch.Tensor) -> float:
    """Queries of the norm that makes the softmax hard; then the least that a slot wins of ``x``."""
    weight = module.get_parameter("q.weight")
    weight.mul_(HARD / weight.norm())
    with record() as seen:
        module(x)
    return min(float(a.sum(-1).min()) for a in seen["attention"])


if __name__ == "__main__":
    raise SystemExit(main())
