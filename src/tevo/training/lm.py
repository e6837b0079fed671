"""The language-model program: from a recipe to its task, model and objective."""

from __future__ import annotations

import inspect
from pathlib import Path

from tevo.bench.tasks import TASKS, Task
from tevo.bench.tasks import task as make_task
from tevo.models.causal_lm import CausalLM
from tevo.objectives.next_token import NextToken
from tevo.training.loop import Result, restore_model, train
from tevo.training.progress import Watch
from tevo.training.recipe import LanguageModelRecipe, of_run

__all__ = ["build_model", "build_task", "measured", "restore", "run"]


def build_task(recipe: LanguageModelRecipe) -> Task:
    """The task that the recipe names.

    Raises:
        ValueError: no such task, or data for a task that has no use for any.
    """
    options: dict[str, object] = {"length": recipe.length, "examples": recipe.examples}
    if recipe.data:
        if recipe.task in TASKS and "data" not in inspect.signature(TASKS[recipe.task]).parameters:
            raise ValueError(f"task {recipe.task!r} makes its own data and has no use for data={recipe.data!r}")
        options["data"] = recipe.data
    return make_task(recipe.task, **options)


def build_model(recipe: LanguageModelRecipe, task: Task) -> CausalLM:
    """A freshly initialised model; torch's global generator decides its weights."""
    return CausalLM(
        vocab=task.vocab,
        dim=recipe.dim,
        depth=recipe.depth,
        heads=recipe.heads,
        mixer=recipe.mixer[0] if len(recipe.mixer) == 1 else list(recipe.mixer),
        channel=recipe.channel,
        position=recipe.position,
        residual=recipe.residual,
        norm=recipe.norm,
        hidden_dim=recipe.hidden_dim,
        length=task.length,
        dropout=recipe.dropout,
    )


def measured(model: CausalLM) -> CausalLM:
    """What a dry run measures: a module from a batch's inputs to one tensor."""
    return model


def run(recipe: LanguageModelRecipe, *, folder: Path, watch: Watch | None = None) -> Result:
    """Train the recipe's model in ``folder``, from its newest checkpoint on."""
    task = build_task(recipe)
    return train(
        recipe,
        build=lambda: build_model(recipe, task),
        objective=NextToken(),
        task=task,
        folder=folder,
        watch=watch,
    )


def restore(folder: Path) -> tuple[LanguageModelRecipe, Task, CausalLM, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Raises:
        ValueError: the folder is not a language model's run, or its checkpoint is damaged.
    """
    recipe = of_run(folder, LanguageModelRecipe)
    task = build_task(recipe)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)
