"""A CoLT5 as a function from inputs and what is shown of the answers to logits, and the loss that trains it."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import DynamicCache, EncoderDecoderCache

from tevo.colt5.modeling import CoLT5ForConditionalGeneration
from tevo.colt5.routers import SoftTopK
from tevo.colt5.tasks.contract import END, PAD
from tevo.contracts import Loss, Objective
from tevo.objectives.next_token import IGNORED, next_token_loss
from tevo.taps import record

__all__ = ["Answerer", "Answers", "Schedules", "Scores", "measured", "sharpness"]


class Schedules(Protocol):
    """What a recipe says of each step."""

    @property
    def routing(self) -> str:
        """How tokens are routed."""
        ...

    def share(self, step: int) -> float:
        """Routed share."""
        ...

    def softness(self, step: int) -> float:
        """Eps of the soft top-k."""
        ...


class Scores(Protocol):
    """A task that says which answers are exact."""

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Exact matches, and of how many."""
        ...


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

    Parts: the sharpness of the weights where they are learned, and exact matches of the batch where ``task`` counts them.

    Args:
        recipe: has the schedules.
        task: says what is exact; None: exact matches are not counted.
    """

    step: Tensor

    def __init__(self, recipe: Schedules, task: Scores | None = None) -> None:
        super().__init__()
        self.recipe, self.task = recipe, task
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` of inputs, shown and targets; the model is an :class:`Answerer`."""
        assert isinstance(model, Answerer)
        step = int(self.step)
        model.route(self.recipe.share(step))
        model.soften(self.recipe.softness(step))
        with record() as seen:
            logits = model(batch["inputs"], batch["shown"])
        targets, parts = batch["targets"], {}
        if self.task is not None:
            right, count = self.task.score(logits.detach(), targets)
            parts["exact_match"] = (right / count).float()
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
