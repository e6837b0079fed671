"""The program that trains CoLT5 to answer questions over long inputs: from a recipe to phases, model and objective.

In evaluation the model routes the share of the last phase, whatever the step; the decoder is shown the right answer's tokens
before each, so that an answer that is right in all of them is the one that greedy decoding gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tevo.colt5.answerer import Answerer, Answers, measured
from tevo.colt5.config import CoLT5Config
from tevo.colt5.modeling import CoLT5ForConditionalGeneration
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.start import copying_start, mimetic_start
from tevo.colt5.tasks import Code, Documents, ListOps, LongTask, Lookup, Modules, Passkey, Rearrange
from tevo.colt5.tasks.contract import END, PAD, WordTask
from tevo.colt5.tasks.modules import tokens_of
from tevo.colt5.unrouted import LightLayer, LongLayer
from tevo.objectives.next_token import IGNORED
from tevo.training import checkpoint
from tevo.training.loop import Result, restore_model, train
from tevo.training.progress import Watch
from tevo.training.recipe import of_run

__all__ = [
    "Curriculum",
    "build_model",
    "build_task",
    "curve",
    "measured",
    "open_run",
    "pack",
    "question_tokens",
    "restore",
    "run",
]

# what a model that routes nothing in the end is made with does not matter
_ROUTINGS = {"learned": "soft_topk", "random": "random"}


class Curriculum:
    """A task in phases: train batches are of the step's phase, held-out ones of the last.

    Args:
        recipe: says which task, and the phases.
    """

    metric = LongTask.metric
    higher_is_better = LongTask.higher_is_better

    def __init__(self, recipe: CoLT5Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.task
        self.tasks = [_task(recipe, phase) for phase in range(len(recipe.lengths))]
        self.last = self.tasks[-1]
        self.vocab, self.examples, self.length = self.last.vocab, self.last.examples, self.last.length
        self.facts: dict[str, Any] = {"phases": [task.facts for task in self.tasks]}

    @cached_property
    def answer_length(self) -> int:
        """Tokens t of the longest answer, its end among them."""
        return self.last.batch("valid", 0, 0, 1)["targets"].shape[1]

    @property
    def asks(self) -> int:
        """Tokens of the questions at the beginning of an input."""
        assert isinstance(self.last, Code | Lookup)
        return self.last.begin

    @property
    def chance(self) -> float:
        """Of the last phase."""
        return self.last.chance

    @property
    def baselines(self) -> dict[str, float]:
        """Of the last phase, on the valid split."""
        return self.last.baselines

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """As :meth:`tevo.bench.tasks.Task.batch`; in training ``index`` is the step, and a phase may have more rows.

        Returns:
            "inputs" (b, n), "targets" (b, t), and "shown" (b, t): the targets one to the right.
        """
        if split != "train":
            return _shown(self.last.batch(split, seed, index, size))
        phase = self.recipe.place(index).phase
        return _shown(self.tasks[phase].batch(split, seed, index, size * self.recipe.rows[phase]))

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows of a held-out split, once each."""
        for index in range(-(-self.examples // size)):
            yield self.batch(split, 0, index, size)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Exact matches and rows."""
        return self.last.score(logits, targets)


def _task(recipe: CoLT5Recipe, phase: int) -> LongTask:
    length, examples = recipe.lengths[phase], recipe.examples
    facts = recipe.facts[phase] if recipe.facts else None
    told = recipe.told[phase] if recipe.told else 0.0
    if recipe.task == "code":
        return Code(
            length=length,
            questions=recipe.questions,
            names=recipe.names,
            parameters=recipe.parameters,
            outline=recipe.outlines[phase] if recipe.outlines else 0,
            examples=examples,
        )
    if recipe.task == "modules":
        return Modules(ask=recipe.ask, length=length, examples=examples)
    if recipe.task == "passkey":
        return Passkey(length=length, examples=examples)
    if recipe.task == "listops":
        return ListOps(length=length, depth=recipe.depth, children=recipe.children, examples=examples)
    if recipe.task == "rearrange":
        return Rearrange(what=recipe.what, length=length, marked=recipe.marked, values=recipe.values, examples=examples)
    if recipe.task == "documents":
        # as many as have the room that each has in 2,048 tokens of 16
        return Documents(length=length, examples=examples, documents=max(1, length // 128) if facts is None else facts)
    return Lookup(
        length=length,
        questions=recipe.questions,
        facts=facts,
        hops=recipe.hops,
        names=recipe.names,
        values=recipe.values,
        told=told,
        examples=examples,
    )


def _shown(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    before = F.pad(rows["targets"][:, :-1], (1, 0), value=PAD)
    return {**rows, "shown": before.masked_fill(before == IGNORED, PAD)}


def build_task(recipe: CoLT5Recipe) -> Curriculum:
    """The recipe's task, phase by phase."""
    return Curriculum(recipe)


def build_model(recipe: CoLT5Recipe, task: Curriculum) -> Answerer:
    """A freshly initialised model; torch's global generator decides its weights."""
    learned = recipe.routing == "learned"
    share = 1.0 if recipe.routing == "dense" else recipe.shares[-1]
    keys = None if recipe.one_router or recipe.keys == 2 else recipe.keys
    config = CoLT5Config(
        vocab_size=task.vocab,
        dim=recipe.dim,
        layers=recipe.layers,
        decoder_layers=recipe.decoder_layers,
        light_heads=recipe.light_heads,
        heavy_heads=recipe.heavy_heads,
        heads=recipe.heads,
        cross_kv_heads=recipe.cross_kv_heads,
        head_dim=recipe.head_dim,
        light_dim=recipe.light_dim,
        heavy_dim=recipe.heavy_dim,
        hidden_dim=recipe.hidden_dim,
        radius=recipe.radius,
        m=share,
        v=None if keys is None else min(1.0, keys * share),
        one_router=recipe.one_router,
        routing=_ROUTINGS.get(recipe.routing, "static"),
        eps=recipe.eps[-1] if learned else None,
        dropout=recipe.dropout,
        tie_word_embeddings=recipe.tied,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = CoLT5ForConditionalGeneration(config)
    if recipe.start != "paper":
        mimetic_start(model, looks=recipe.looks)
    if recipe.start == "copying":
        copying_start(model)
    if recipe.routing in ("none", "longt5"):
        layers: list[Any] = list(model.encoder.layers)
        model.encoder.layers = nn.ModuleList(
            (LightLayer if recipe.routing == "none" else LongLayer)(of=layer) for layer in layers
        )
        del model.encoder.heavy_bias
        if recipe.routing == "longt5":
            del model.encoder.light_bias
        return Answerer(model=model, share=None)
    return Answerer(model=model, share=share, forced=task.asks if recipe.forced else 0, keys=keys)


def run(recipe: CoLT5Recipe, *, folder: Path, watch: Watch | None = None) -> Result:
    """Train the recipe's model in ``folder``, from its newest checkpoint on."""
    task = build_task(recipe)
    return train(
        recipe,
        build=lambda: build_model(recipe, task),
        objective=Answers(recipe, task),
        task=task,
        folder=folder,
        watch=watch,
    )


def restore(folder: Path) -> tuple[CoLT5Recipe, Curriculum, Answerer, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Raises:
        ValueError: the folder is not a run of CoLT5, or its checkpoint is damaged.
    """
    recipe = of_run(folder, CoLT5Recipe)
    task = build_task(recipe)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)


def open_run(folder: Path) -> tuple[CoLT5Recipe, Curriculum, Answerer, int]:
    """As :func:`restore`, of a run or a packed one, whose step is the recipe's last; the model is in evaluation mode."""
    if (folder / "weights.safetensors").is_file():
        recipe = of_run(folder, CoLT5Recipe)
        task = build_task(recipe)
        model, step = build_model(recipe, task), recipe.steps
        try:
            weights = load_file(folder / "weights.safetensors")
            # computed with in full precision
            weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        except SafetensorError as error:
            raise ValueError(f"{folder}/weights.safetensors is damaged ({error}); pack the run again") from error
        checkpoint.match(weights, model.state_dict(), where=f"{folder}/weights.safetensors")
        model.load_state_dict(weights)
    else:
        recipe, task, model, step = restore(folder)
    return recipe, task, model.eval(), step


def pack(run: Path, folder: Path) -> None:
    """Write the recipe and the weights of a run, without its optimiser and in half precision, into ``folder``."""
    recipe, _, model, _ = restore(run)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(folder / "recipe.json", recipe.to_json())
    kept = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in kept.items()}, folder / "weights.safetensors")


def question_tokens(task: LongTask, question: str, text: str) -> Tensor:
    """A question and a text of the user's as an input (1, n), in the order of the task's own.

    Raises:
        ValueError: nothing to read, or a word that a task of words does not have.
    """
    if not text.strip() or not question.strip():
        raise ValueError("the question or the text is empty; expected a line and at least one word")
    if isinstance(task, Modules):
        return torch.from_numpy(tokens_of(f"{question.strip()}\n{text}".encode()))[None]
    assert isinstance(task, WordTask)
    places = {word: token for token, word in enumerate(task.words)}
    words = (f"{text} {question}" if getattr(task, "question_last", False) else f"{question} {text}").split()
    strange = [word for word in words if places.get(word, END) in (PAD, END)]
    if strange:
        raise ValueError(
            f"the word {strange[0]!r} is none of the {len(places) - 2} that task {task.name!r} knows; for text of your own "
            "train on task=modules, whose tokens are bytes"
        )
    return torch.tensor([[places[word] for word in words]])


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one of the numbers in a run's metrics.jsonl."""
    found = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers: Mapping[str, Any] = json.loads(line)
        if numbers.get(name) is not None:
            found.append((int(numbers["step"]), float(numbers[name])))
    return found
