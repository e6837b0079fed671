"""The program that trains CoLT5 to answer questions over long inputs: from a recipe to phases, model and objective.

In evaluation the model routes the share of the last phase, whatever the step; the decoder is shown the right answer's tokens
before each, so that an answer that is right in all of them is the one that greedy decoding gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import DynamicCache, EncoderDecoderCache

from tevo.colt5.config import CoLT5Config
from tevo.colt5.modeling import CoLT5ForConditionalGeneration
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.routers import SoftTopK
from tevo.colt5.start import copying_start, mimetic_start
from tevo.colt5.tasks import Code, Documents, LongTask, Lookup, Modules, Passkey
from tevo.colt5.tasks.contract import END, PAD, WordTask
from tevo.colt5.tasks.modules import tokens_of
from tevo.colt5.unrouted import LightLayer, LongLayer
from tevo.contracts import Loss, Objective
from tevo.objectives.next_token import IGNORED, next_token_loss
from tevo.taps import record
from tevo.training import checkpoint
from tevo.training.loop import Result, restore_model, train
from tevo.training.progress import Watch
from tevo.training.recipe import read

__all__ = [
    "Answerer",
    "Answers",
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
    "sharpness",
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


class Answerer(nn.Module):
    """A CoLT5 whose padding is token 0, as a function from inputs and what is shown of the answers to logits.

    Args:
        model: the encoder-decoder.
        share: of the tokens that are routed in evaluation; None where nothing is routed.
        forced: the first tokens of an input, which are always among the routed ones.
        keys: keys and values among routed tokens, as a multiple of the queries; None: the configuration's default.
    """

    def __init__(
        self, *, model: CoLT5ForConditionalGeneration, share: float | None, forced: int = 0, keys: float | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.share, self.forced, self.keys = share, forced, keys

    @property
    def checkpoint_activations(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.model.encoder.gradient_checkpointing

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        # the public switches have other names in each release
        self.model._set_gradient_checkpointing(on, partial(recomputed, use_reentrant=False))

    def route(self, share: float) -> None:
        """Route that share from now on, and as many times as much as keys and values."""
        if self.share is not None and self.model.config.m != share:
            self.model.set_routed(m=share, v=None if self.keys is None else min(1.0, self.keys * share))

    def soften(self, eps: float) -> None:
        """Set the softness of every soft top-k."""
        for module in self.model.modules():
            if isinstance(module, SoftTopK):
                module.eps.fill_(eps)

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """``inputs`` (b, n) give the encoder's output (b, n, d), and the mask (b, n) where there is padding."""
        if not self.training and self.share is not None:
            self.route(self.share)
        mask = None if inputs.is_meta else inputs != PAD
        mask = None if mask is None or bool(mask.all()) else mask
        forced = None
        if self.forced:
            forced = (torch.arange(inputs.shape[1], device=inputs.device) < self.forced).expand_as(inputs)
        return self.model.encoder(inputs, mask, forced=forced).last_hidden_state, mask

    def forward(self, inputs: Tensor, shown: Tensor) -> Tensor:
        """``inputs`` (b, n) and ``shown`` (b, t) give logits (b, t, V)."""
        encoded, mask = self.encode(inputs)
        return self.model(
            encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=shown, use_cache=False
        ).logits

    @torch.no_grad()
    def answer(self, inputs: Tensor, *, most: int) -> Tensor:
        """Greedily decoded answers (b, t <= most) to ``inputs`` (b, n), padding behind their ends."""
        encoded, mask = self.encode(inputs)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        token, done, found = inputs.new_full((len(inputs), 1), PAD), inputs.new_zeros(len(inputs)).bool(), []
        for _ in range(most):
            out = self.model(
                encoder_outputs=(encoded,),
                attention_mask=mask,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
            )
            token = out.logits[:, -1:].argmax(-1).masked_fill(done[:, None], PAD)
            found.append(token)
            done = done | (token[:, 0] == END)
            if done.all():
                break
        return torch.cat(found, 1)


class Answers(Objective):
    """Mean negative log-likelihood of the answers' tokens, along the recipe's schedules of share and softness.

    Parts: exact matches of the batch, and the sharpness of the weights where they are learned.

    Args:
        recipe: has the schedules.
        task: says what is exact.
    """

    step: Tensor

    def __init__(self, recipe: CoLT5Recipe, task: Curriculum) -> None:
        super().__init__()
        self.recipe, self.task = recipe, task
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` as :meth:`Curriculum.batch`; the model is an :class:`Answerer`."""
        assert isinstance(model, Answerer)
        step = int(self.step)
        model.route(self.recipe.share(step))
        model.soften(self.recipe.softness(step))
        with record() as seen:
            logits = model(batch["inputs"], batch["shown"])
        targets = batch["targets"]
        right, count = self.task.score(logits.detach(), targets)
        parts = {"exact_match": (right / count).float()}
        if self.recipe.routing == "learned":
            parts["sharpness"] = sharpness(seen["routing_weights"])
        return Loss(next_token_loss(logits, targets), parts)

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Scored targets."""
        return (batch["targets"] != IGNORED).sum()

    def after_step(self) -> None:
        """Count."""
        self.step += 1


def sharpness(weights: list[Tensor]) -> Tensor:
    """Sum of w^2 over sum of w, the mean over routers: 1 where weights are 0 and 1, less the flatter they are."""
    each = [(w.square().sum() / w.sum().clamp(min=1e-12)).float() for w in weights]
    return torch.stack(each).mean()


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


class _OneToken(nn.Module):
    """The logits of the answer's first token."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self.answerer = answerer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answerer(inputs, torch.zeros_like(inputs[:, :1]))


def measured(model: Answerer) -> nn.Module:
    """What a dry run measures: a module from a batch's inputs to one tensor, with a decoder of one token."""
    return _OneToken(model)


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


def stored_recipe(folder: Path) -> CoLT5Recipe:
    """The recipe of a run.

    Raises:
        ValueError: the folder is not a run of CoLT5.
    """
    if not (folder / "recipe.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no recipe.json; expected a folder that `tevo train` made")
    recipe = read(folder / "recipe.json")
    if not isinstance(recipe, CoLT5Recipe):
        raise ValueError(f"{folder} is a run of kind {recipe.kind!r}, expected one of colt5")
    return recipe


def restore(folder: Path) -> tuple[CoLT5Recipe, Curriculum, Answerer, int]:
    """A run's recipe, task and model with the weights of its newest checkpoint, and the step they are of.

    Raises:
        ValueError: the folder is not a run of CoLT5, or its checkpoint is damaged.
    """
    recipe = stored_recipe(folder)
    task = build_task(recipe)
    model = build_model(recipe, task)
    return recipe, task, model, restore_model(model, folder)


def open_run(folder: Path) -> tuple[CoLT5Recipe, Curriculum, Answerer, int]:
    """As :func:`restore`, of a run or a packed one, whose step is the recipe's last; the model is in evaluation mode."""
    if (folder / "weights.safetensors").is_file():
        recipe = stored_recipe(folder)
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
