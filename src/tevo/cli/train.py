"""``tevo train``: train a model from a recipe; the same command again resumes."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tevo.cli._flags import describe, option, parse, split
from tevo.training.recipe import PRESETS, RECIPES, LanguageModelRecipe, Recipe, SlotRecipe, resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

HELP = "train a model; the same command again resumes"
EXAMPLES = (
    "tevo train lm --mixer delta_net --steps 500",
    "tevo train slots --preset laptop --seed 1",
)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the recipe and the run are; everything else is the recipe's."""

    preset: str | None = option(None, "start from a preset")
    recipe: str | None = option(None, "then from a .yaml or .json file; flags come last")
    run: str | None = option(None, "run folder; default: runs/<named by the recipe>")
    dry_run: bool = option(False, "show recipe, parameters, memory and time; train nothing")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit code: 130 after Ctrl-C, 0 after SIGTERM, both with the run saved."""
    if not argv or "-h" in argv or "--help" in argv:
        print(help_text(argv[0] if argv and argv[0] in RECIPES else "lm"))
        return 0
    program, *flags = argv
    if program not in RECIPES:
        raise ValueError(f"unknown program {program!r}; expected one of {', '.join(RECIPES)}, as in `{EXAMPLES[0]}`")
    sources, rest = split(Sources, flags, verb="train")
    cls = RECIPES[program]
    start = resolve(cls, preset=sources.preset, file=None if sources.recipe is None else Path(sources.recipe))
    recipe = parse(cls, rest, default=start, verb="train")
    # so that the run can be evaluated and resumed from anywhere
    given = {name: getattr(recipe, name, "") for name in ("data", "test_data", "tokens", "from_run")}
    paths: dict[str, Any] = {name: str(Path(path).absolute()) for name, path in given.items() if path}
    recipe = replace(recipe, **paths)
    if "from_run" in paths:
        recipe = _program(recipe).complete(recipe)
    folder = Path(sources.run) if sources.run is not None else Path("runs") / run_name(recipe)
    if sources.dry_run:
        return _dry_run(recipe, folder)

    from tevo.training.progress import Console

    result = _program(recipe).run(recipe, folder=folder, watch=Console())
    if result.finished:
        print(f"next: tevo eval {folder}")
        if isinstance(recipe, SlotRecipe):
            _show_figures(folder)
    return 130 if result.signal == signal.SIGINT else 0


def help_text(program: str = "lm") -> str:
    """Two examples, then a line for each flag of a program."""
    presets = f"  presets: {', '.join(PRESETS[program])}"
    return "\n".join([*EXAMPLES, presets, describe(Sources, RECIPES[program])])


def run_name(recipe: Recipe) -> str:
    """A folder name that another recipe would not have."""
    what = [recipe.kind]
    if isinstance(recipe, LanguageModelRecipe):
        what += [recipe.task, re.sub(r"[^\w.-]+", "_", "+".join(dict.fromkeys(recipe.mixer)))[:40].strip("_")]
    elif isinstance(recipe, SlotRecipe):
        what += [re.sub(r"[^\w.-]+", "_", Path(recipe.data).stem)[:40] if recipe.data else recipe.scenes]
    return "-".join([*what, recipe.hash[:8]])


def _program(recipe: Recipe) -> Any:
    """The module that builds and trains what such recipes describe."""
    programs = {"lm": "tevo.training.lm", "slots": "tevo.slot_attention.training", "colt5": "tevo.colt5.training"}
    programs |= dict.fromkeys(("colt5-pretrain", "colt5-finetune"), "tevo.colt5.text_training")
    return import_module(programs[recipe.kind])


def _show_figures(folder: Path) -> None:
    from tevo.slot_attention.training import evaluated, restore

    recipe, task, model, _ = restore(folder)
    for name, value in {"chance": task.chance, **task.baselines}.items():
        print(f"{name}, on valid: {100 * value:.1f} %")
    for name, value in evaluated(model, task, split="test", batch=recipe.batch).items():
        print(f"{name} {100 * value:.1f} %")


def _dry_run(recipe: Recipe, folder: Path) -> int:
    from tempfile import TemporaryDirectory

    from tevo.bench import measure
    from tevo.training.progress import duration

    program = _program(recipe)
    task = program.build_task(recipe)
    model = program.build_model(recipe, task)
    rows = recipe.batch // recipe.accumulate
    inputs = task.batch("train", recipe.seed, 0, rows)["inputs"]
    numbers = measure.parameters(model)
    measured = program.measured(model)
    flops = measure.flops(measured, inputs, backward=True)
    kept = _kept_for_backward(measured, inputs)
    with TemporaryDirectory() as home:
        # the first step warms up, the others are timed
        trial = replace(recipe, steps=4, log_every=1, examples=1, tensorboard=False)
        program.run(trial, folder=Path(home))
        lines = (Path(home) / "metrics.jsonl").read_text().splitlines()
    at = [record["seconds"] for record in map(json.loads, lines) if "seconds" in record]
    seconds = (at[-1] - at[0]) / (len(at) - 1)
    left_out = f", leaving out {', '.join(flops.uncounted)}" if flops.uncounted else ""
    print(recipe.to_json(), end="")
    print(f"run folder      {folder}")
    print(f"parameters      {numbers:,}")
    print(f"FLOPs           {flops * recipe.accumulate:.4g} a step, forward and backward{left_out}")
    print(f"memory          {numbers * 16 / 2**20:,.1f} MiB weights, gradients and moments; {kept} kept")
    print(f"                for backward by a micro-batch of {rows} rows, without checkpointing or mixed precision")
    print(f"time            about {duration(seconds * recipe.steps)}, evaluations aside: {seconds * 1e3:.1f} ms a step")
    return 0


def _kept_for_backward(measured: nn.Module, inputs: Tensor) -> str:
    from tevo.bench import measure

    try:
        return f"{measure.saved_bytes(measured, inputs) / 2**20:,.1f} MiB"
    except RuntimeError as error:
        # a gradient inside the forward pass (MESH) forbids the hooks that count
        if "saved tensor hooks" not in str(error):
            raise
        return "an unknown amount"
