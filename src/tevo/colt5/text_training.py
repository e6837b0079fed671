"""The programs that pre-train CoLT5 on text and fine-tune it on questions: from a recipe to task, model and objective."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from tevo.colt5.answerer import Answerer, Answers, measured
from tevo.colt5.config import CoLT5Config
from tevo.colt5.modeling import CoLT5ForConditionalGeneration
from tevo.colt5.objectives import Denoising, vocab_for
from tevo.colt5.records import Records
from tevo.colt5.scorers import score_set
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.text_recipes import SIZES, FinetuneRecipe, PretrainRecipe, TextRecipe
from tevo.colt5.tokens import tokens_from
from tevo.training import checkpoint
from tevo.training.loop import Result, restore_model, train
from tevo.training.optimizers import OPTIMIZERS, SCHEDULES
from tevo.training.progress import Watch
from tevo.training.recipe import of_run

__all__ = ["build_model", "build_task", "complete", "generated", "measured", "restore", "run"]

TextTask: TypeAlias = "Denoising | Records"
R = TypeVar("R", bound=TextRecipe)


def build_task(recipe: TextRecipe) -> TextTask:
    """The recipe's texts or records.

    Raises:
        ValueError: there is nothing to read, or too little.
    """
    tokens = tokens_from(recipe.tokens)
    if isinstance(recipe, FinetuneRecipe):
        if not recipe.data:
            raise ValueError(
                "colt5-finetune needs questions and answers; give a .jsonl, .csv, .tsv or .zip file as --data"
            )
        return Records(
            data=recipe.data,
            test_data=recipe.test_data,
            tokens=tokens,
            vocab=recipe.vocab or _vocab(recipe),
            length=recipe.length,
            answer=recipe.answer,
            examples=recipe.examples,
        )
    assert isinstance(recipe, PretrainRecipe)
    return Denoising(
        mixture=recipe.mixture,
        length=recipe.length,
        vocab=recipe.vocab or _vocab(recipe),
        data=recipe.data,
        examples=recipe.examples,
        tokens=tokens,
    )


def build_model(recipe: TextRecipe, task: TextTask) -> Answerer:
    """A freshly initialised model; torch's global generator decides its weights."""
    share = 1.0 if recipe.routing == "dense" else recipe.shares[-1]
    sizes = {name: getattr(recipe, name) for name in SIZES if name not in ("routing", "tied", "tokens")}
    config = CoLT5Config(
        **sizes,
        vocab_size=task.vocab,
        m=share,
        routing="soft_topk" if recipe.routing == "learned" else "static",
        dropout=recipe.dropout,
        tie_word_embeddings=recipe.tied,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = Answerer(model=CoLT5ForConditionalGeneration(config), share=share)
    model.soften(recipe.softness(recipe.steps))
    return model


def complete(recipe: R) -> R:
    """With the sizes, the tokens and the vocabulary of the run that it begins from, if there is one.

    Raises:
        ValueError: a size was asked for that the run does not have, or it is no run of text.
    """
    if not isinstance(recipe, FinetuneRecipe) or not recipe.from_run:
        return recipe
    folder = Path(recipe.from_run)
    start = of_run(folder, TextRecipe)
    plain = {f.name: f.default for f in fields(recipe)}
    for name in SIZES:
        asked, has = getattr(recipe, name), getattr(start, name)
        if asked not in (plain[name], has):
            raise ValueError(f"{name}={asked!r}, but {folder}, which the run begins from, has {has!r}; leave it out")
    vocab = start.vocab or _vocab(start)
    if recipe.vocab not in (0, vocab):
        raise ValueError(f"vocab={recipe.vocab}, but {folder}, which the run begins from, has {vocab}; leave it out")
    return replace(recipe, vocab=vocab, **{name: getattr(start, name) for name in SIZES})


def _vocab(recipe: TextRecipe) -> int:
    """Rows of the embedding: those of sentinels are for pre-training, and for what begins from it."""
    tokens = tokens_from(recipe.tokens)
    if isinstance(recipe, PretrainRecipe):
        return vocab_for(tokens, mixture=recipe.mixture, length=recipe.length)
    return tokens.size


def run(recipe: TextRecipe, *, folder: Path, watch: Watch | None = None) -> Result:
    """Train the recipe's model in ``folder``, from its newest checkpoint on."""
    task = build_task(recipe)
    start = Path(recipe.from_run) if isinstance(recipe, FinetuneRecipe) and recipe.from_run else None
    if start is not None:
        task.facts["from_run"] = _weights_of(start)

    def build() -> Answerer:
        model = build_model(recipe, task)
        if start is not None:
            restore_model(model, start)
            model.soften(recipe.softness(0))
        return model

    return train(
        recipe,
        build=build,
        objective=Answers(recipe),
        task=task,
        folder=folder,
        watch=watch,
        optimizer=OPTIMIZERS[recipe.optimizer],
        rate=SCHEDULES[recipe.schedule],
    )


def _weights_of(folder: Path) -> str:
    """The hash of the newest checkpoint's tensors, from its manifest."""
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint; expected a run folder that `tevo train` made")
    files = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"]
    return str(files["tensors.safetensors"]["sha256"])


def restore(folder: Path) -> tuple[TextRecipe, TextTask, Answerer, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Raises:
        ValueError: the folder is not a run of CoLT5 on text, or its checkpoint is damaged.
    """
    recipe = of_run(folder, TextRecipe)
    task = build_task(recipe)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)


def generated(model: Answerer, task: Records, *, split: str, batch: int) -> dict[str, float]:
    """Exact match, F1 and ROUGE, in %, of greedily decoded answers to a held-out split, against all right ones."""
    device = next(model.parameters()).device
    model.eval()
    said: dict[Hashable, str] = {}
    for rows in task.batches(split, batch):
        for tokens in model.answer(rows["inputs"].to(device), most=task.answer_length).cpu():
            said[len(said)] = task.tokens.text(tokens)
    right: dict[Hashable, tuple[str, ...]] = {i: one.outputs for i, one in enumerate(task.records[split][: len(said)])}
    found = {name: score_set(said, right, metric=name) for name in ("exact_match", "f1", "rouge")}
    return {name: value for one in found.values() for name, value in one.items()}
