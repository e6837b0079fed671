"""``tevo eval``: score a trained run on held-out data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tevo.cli._flags import describe, option, parse

HELP = "score a trained run on held-out data, beside chance and baselines"
EXAMPLES = ("tevo eval runs/notes", "tevo eval runs/notes --split test --json")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the verb."""

    split: Literal["valid", "test"] = option("test", "held-out split: valid or test")
    json: bool = option(False, "print one JSON object")


def main(argv: list[str]) -> int:
    """Run the verb."""
    if not argv or "-h" in argv or "--help" in argv:
        print("\n".join([*EXAMPLES, "", "  RUN                      folder that `tevo train` made", describe(Options)]))
        return 0
    folder, *flags = argv
    options = parse(Options, flags, verb="eval")

    import torch

    from tevo.slot_attention import training as slots
    from tevo.slot_attention.recipes import SlotRecipe
    from tevo.training import lm
    from tevo.training.loop import evaluate
    from tevo.training.recipe import read

    stored = Path(folder) / "recipe.json"
    # a folder that is no run is refused by either
    program: Any = slots if stored.is_file() and isinstance(read(stored), SlotRecipe) else lm
    recipe, task, model, step = program.restore(Path(folder))
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    score = evaluate(model, task, split=options.split, batch=recipe.batch)
    numbers = {"run": folder, "step": step, "split": options.split, "metric": task.metric, "score": score}
    numbers |= {"chance": task.chance, "baselines": task.baselines, "rows": task.examples}
    length = getattr(task, "length", None)
    if length is not None:
        numbers["length"] = length
    if options.json:
        print(json.dumps(numbers))
        return 0
    better = "higher" if task.higher_is_better else "lower"
    print(f"{task.metric} {score:.4f} ({better} is better) on {options.split} after {step} steps")
    rows = "scenes" if length is None else f"sequences of {length} tokens"
    print(f"{task.examples} {rows}; chance {task.chance:.4f}")
    for name, value in task.baselines.items():
        print(f"baseline {name}, on valid: {value:.4f}")
    return 0
