"""``tevo eval``: score a trained run on held-out data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Literal

from tevo.cli._flags import describe, option, parse, refuse_others

if TYPE_CHECKING:
    from tevo.slot_attention.data.sets import SceneSet
    from tevo.slot_attention.recipes import SlotRecipe

HELP = "score a trained run on held-out data, beside chance and baselines"
EXAMPLES = ("tevo eval runs/notes --split test --json", "tevo eval runs/lookup --shares 0.25 0.0625 0.03")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the verb."""

    split: Literal["valid", "test"] = option("test", "held-out split: valid or test")
    num_slots: int | None = option(None, "slots: other than in training")
    iterations: int | None = option(None, "slots: rounds, other than in training")
    init_seeds: int = option(1, "slots: how often, each time from other first slots")
    objects: tuple[int, int] | None = option(None, "slots: scenes with as many objects, fewest and most")
    data: str = option("", "slots: all scenes of a converted file, in place of the split")
    shares: tuple[float, ...] = option((), "colt5: routed shares, others than in training")
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        for name in ("num_slots", "iterations", "init_seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


def main(argv: list[str]) -> int:
    """Run the verb."""
    if not argv or "-h" in argv or "--help" in argv:
        print("\n".join([*EXAMPLES, "", "  RUN                      folder that `tevo train` made", describe(Options)]))
        return 0
    folder, *flags = argv
    options = parse(Options, flags, verb="eval")

    from tevo.training.recipe import read

    stored = Path(folder) / "recipe.json"
    # a folder that is no run is refused by each of them
    kind = read(stored).kind if stored.is_file() else "lm"
    programs = {"lm": _language_model, "slots": _slots, "colt5": _colt5}
    programs |= {"colt5-pretrain": _text, "colt5-finetune": _text}
    refuse_others(options, kind, programs, folder=folder)
    return programs[kind](folder, options)


def _language_model(folder: str, options: Options) -> int:
    import torch

    from tevo.training import lm
    from tevo.training.loop import evaluate

    recipe, task, model, step = lm.restore(Path(folder))
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    score = evaluate(model, task, split=options.split, batch=recipe.batch)
    if options.json:
        numbers = {"run": folder, "step": step, "split": options.split, "metric": task.metric, "score": score}
        numbers |= {"chance": task.chance, "baselines": task.baselines, "rows": task.examples, "length": task.length}
        print(json.dumps(numbers))
        return 0
    better = "higher" if task.higher_is_better else "lower"
    print(f"{task.metric} {score:.4f} ({better} is better) on {options.split} after {step} steps")
    print(f"{task.examples} sequences of {task.length} tokens; chance {task.chance:.4f}")
    for name, value in task.baselines.items():
        print(f"baseline {name}, on valid: {value:.4f}")
    return 0


def _colt5(folder: str, options: Options) -> int:
    import torch

    from tevo.colt5.inspection import describe_run
    from tevo.colt5.training import open_run
    from tevo.training.loop import evaluate

    recipe, task, model, step = open_run(Path(folder))
    _check_shares(folder, options, heavy=model.share is not None)
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    found: dict[str, float] = {}
    for share in options.shares or (model.share,):
        model.share = share
        found["none" if share is None else f"{share:.4g}"] = evaluate(
            model, task, split=options.split, batch=recipe.batch
        )
    if options.json:
        numbers = {
            "run": folder,
            "step": step,
            "split": options.split,
            "metric": task.metric,
            "score": next(iter(found.values())),
        }
        numbers |= {"shares": found, "chance": task.chance, "baselines": task.baselines}
        print(json.dumps({**numbers, "rows": task.examples, "length": task.length}))
        return 0
    print(describe_run(recipe, step))
    print(f"chance {100 * task.chance:.2g} %")
    for name, value in task.baselines.items():
        print(f"baseline {name}, on valid: {100 * value:.2g} %")
    for name, value in found.items():
        print(f"exact match {100 * value:.1f} % of {task.examples} on {options.split}, routed share {name}")
    return 0


def _text(folder: str, options: Options) -> int:
    import torch

    from tevo.colt5.records import Records
    from tevo.colt5.text_training import generated, restore
    from tevo.training.loop import evaluate

    recipe, task, model, step = restore(Path(folder))
    _check_shares(folder, options, heavy=model.share is not None)
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    found: dict[str, dict[str, float]] = {}
    for share in options.shares or (model.share,):
        model.share = share
        one = {task.metric: evaluate(model, task, split=options.split, batch=recipe.batch)}
        if isinstance(task, Records):
            one |= generated(model, task, split=options.split, batch=recipe.batch)
        found["none" if share is None else f"{share:.4g}"] = one
    if options.json:
        score = next(iter(found.values()))[task.metric]
        numbers = {"run": folder, "step": step, "split": options.split, "metric": task.metric, "score": score}
        print(json.dumps({**numbers, "shares": found, "chance": task.chance, "rows": task.examples}))
        return 0
    print(f"{recipe.kind}, {task.examples} rows of {options.split} after {step} steps; chance {task.chance:.4f} bits")
    for name, one in found.items():
        said = "".join(f", {what} {value:.1f} %" for what, value in one.items() if what != task.metric)
        print(f"{task.metric} {one[task.metric]:.4f} (lower is better){said}, routed share {name}")
    return 0


def _check_shares(folder: str, options: Options, *, heavy: bool) -> None:
    if not all(1e-6 <= share <= 1 for share in options.shares):
        raise ValueError(f"shares are {options.shares}, expected numbers from 1e-6 to 1")
    if options.shares and not heavy:
        raise ValueError(f"{folder} has no heavy branch, and no use for shares={options.shares}")


def _slots(folder: str, options: Options) -> int:
    import torch

    from tevo.slot_attention.recipes import SlotRecipe
    from tevo.slot_attention.training import evaluated, restore
    from tevo.training.recipe import of_run

    scenes = _other_scenes(of_run(Path(folder), SlotRecipe), options)
    recipe, task, model, step = restore(Path(folder), scenes=scenes)
    model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    each = [
        evaluated(
            model,
            task,
            split=options.split,
            batch=recipe.batch,
            num_slots=options.num_slots,
            iterations=options.iterations,
            init_seed=seed,
        )
        for seed in range(options.init_seeds)
    ]
    figures = {name: [one[name] for one in each] for name in each[0]}
    # of other scenes there is no other split
    where = options.split if scenes is None else options.data or "test"
    if options.json:
        name, values = next(iter(figures.items()))
        metric = name.lower().replace("-", "_").replace(" ", "_")
        numbers = {"run": folder, "step": step, "split": where, "metric": metric, "score": mean(values)}
        numbers |= {"figures": figures, "chance": task.chance, "baselines": task.baselines}
        numbers |= {"num_slots": options.num_slots or recipe.num_slots, "rows": task.rows(options.split)}
        print(json.dumps({**numbers, "iterations": options.iterations or recipe.iterations}))
        return 0
    for name, value in {"chance": task.chance, **task.baselines}.items():
        print(f"{name}, on {'valid' if scenes is None else 'the same scenes'}: {100 * value:.1f} %")
    among = "" if options.objects is None else f" with {options.objects[0]} to {options.objects[1]} objects"
    print(
        f"{task.rows(options.split)} scenes of {where}{among}, {options.num_slots or recipe.num_slots} slots, "
        f"{options.iterations or recipe.iterations} rounds, after {step} steps"
    )
    for name, values in figures.items():
        print(f"{name} {100 * mean(values):.1f} %{_spread(values)}")
    return 0


def _spread(values: list[float]) -> str:
    if len(values) == 1 or any(map(math.isnan, values)):
        return ""
    return (
        f" +- {100 * stdev(values):.1f} over {len(values)} draws of the first slots "
        f"({100 * min(values):.1f} to {100 * max(values):.1f})"
    )


def _other_scenes(recipe: SlotRecipe, options: Options) -> SceneSet | None:
    """What the options ask for in place of the recipe's scenes."""
    from tevo.slot_attention.data.sets import Generated, Stored

    data = options.data or (options.objects and recipe.test_data)
    if data:
        return Stored.only(data, objects=options.objects)
    if options.objects is None:
        return None
    if recipe.data:
        raise ValueError(
            f"objects={options.objects} of a run on {recipe.data}, which it was trained on; give scenes to test on as --data"
        )
    return Generated(
        recipe.scenes,
        examples=recipe.examples,
        objects=options.objects,
        size=recipe.size,
        whole_frame=recipe.model == "set_predictor",
    )
