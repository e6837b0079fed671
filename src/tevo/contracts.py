"""The roles: one small class each, with shapes.

Letters: b batch, n tokens or queries, m source tokens or keys, d width, h heads, g key/value heads (divides h),
e key width per head, v value width per head, k clusters or slots, c chunk, V vocabulary. Batch first, heads second,
features last. "#b" means b or 1.

Conventions that hold everywhere:

* ``mask`` ("b m", bool): True = real token, of the sequence that is mixed over (``context`` if given, else ``x``).
  A mixer without the padding claim refuses a mask. A query without any allowed key gets zeros.
* ``at`` ("#b n", int): logical positions of ``x``, default 0..n-1 (left padding, routed tokens, parallel windows).
* ``causal`` is a constructor argument; a class without it has no causal form. With n != m it is aligned bottom-right.
* State is a nested tuple of tensors with the batch as dimension 0 of every leaf, passed in and returned, never kept on
  the module. ``step`` may consume the state it is given. Counters are tensors.
* Parts return one tensor; anything else worth seeing goes through :func:`tevo.tap`.
* A module may have ``after_step()``, called by the training loop after the optimiser.
* A module may have ``no_decay() -> set[str]``: names of its own parameters that weight decay must not touch, beyond the
  rule for all (vectors and scalars are never decayed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from tevo.functional.attention import scores as scaled_scores
from tevo.functional.attention import softmax_weights

State: TypeAlias = "Tensor | tuple[State, ...]"
Sublayer: TypeAlias = Callable[[Tensor], Tensor]

__all__ = [
    "Adapter",
    "ChannelMixer",
    "Heads",
    "Inference",
    "Joinable",
    "LanguageModel",
    "Loss",
    "Normaliser",
    "Objective",
    "Position",
    "Residual",
    "Stack",
    "State",
    "Stateful",
    "Sublayer",
    "TokenMixer",
]


class TokenMixer(nn.Module):
    """Tokens exchange information: ``Mix(X, Y)`` of the block."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) mixed over itself, or over ``context`` (b, m, d), gives (b, n, d)."""
        raise NotImplementedError


@runtime_checkable
class Stateful(Protocol):
    """What a part offers only if its card claims ``exact_state`` or ``lossy_state``."""

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The state before the first token; with ``context`` (b, m, d) the state of cross-attention to it."""
        ...

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d): n = 1 decodes a token, larger n advances a segment. ``mask`` is that of ``x``."""
        ...


@runtime_checkable
class Joinable(Protocol):
    """What a part may offer beside :class:`Stateful`: states after several sequences, put side by side."""

    def join(self, states: Sequence[State], skip: Sequence[int]) -> State:
        """One state that holds all that ``states`` hold, in their order, less the first ``skip[i]`` tokens of each.

        No sequence has seen another; what is stepped from here sees all of them, and stands after the longest.
        """
        ...


class ChannelMixer(nn.Module):
    """Each token is transformed: ``FFN(X1)`` of the block. May be :class:`Stateful` (token shift, routing)."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d)."""
        raise NotImplementedError


class Heads(nn.Module):
    """Finer seat of softmax attention: how tokens become queries, keys and values, and how heads become tokens."""

    def split(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (b, n, d), ``context`` (b, m, d) give q (b, h, n, e), k (b, g, m, e), v (b, g, m, v)."""
        raise NotImplementedError

    def merge(self, o: Tensor) -> Tensor:
        """``o`` (b, h, n, v) gives (b, n, d)."""
        raise NotImplementedError


class Normaliser(nn.Module):
    """Finer seat of softmax attention: scores and how they become weights. Neutral form: scaled dot product, softmax.

    A class whose weights of a query depend on other queries' scores sets ``causal_form = False``.
    """

    causal_form: ClassVar[bool] = True

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Turned q (b, h, n, e), k (b, h, m, e) give scores (b, h, n, m), before the position bias."""
        return scaled_scores(q, k)

    def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Scores (b, h, n, m) and ``allowed`` (bool, broadcastable to them) give weights (b, h, n, m).

        A row without an allowed key gives zeros; the row of a query that is padding is one.
        """
        return softmax_weights(scores, allowed)


class Position(nn.Module):
    """Where order enters. Each of the three hooks is neutral unless overridden.

    The bias is added to the scaled scores and sees q, k before ``turn``; a paper's other scaling goes into ``turn``.
    A part whose card claims ``shared_across_layers`` is built once per model, otherwise once per layer.
    """

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """Token embeddings ``x`` (b, n, d) at positions ``at`` (#b, n) give (b, n, d)."""
        return x

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Q (b, h, n, e) at ``q_at`` (#b, n), k (b, g, m, e) at ``k_at`` (#b, m), same shapes back."""
        return q, k

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor | None:
        """An addend (#b, #h, n, m) of the scaled scores, or None."""
        return None


class Residual(nn.Module):
    """How the sublayers of a block are wired: residual connections and norms (pre, post, ReZero, B2T, parallel)."""

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """``x`` (b, n, d) through all sublayers of the block, each (b, n, d) -> (b, n, d).

        A wiring that needs a norm after the last block (pre-norm) applies it itself in the block whose ``index`` is the
        last of ``depth``; a block built without these facts has none.
        """
        raise NotImplementedError

    def initialise(self, block: nn.Module) -> None:
        """The wiring's own rule for the initial weights of a freshly built block; neutral unless overridden."""


class Stack(nn.Module):
    """Owns its blocks, because layers pass more than x to each other or the length changes."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d) gives (b, p, d)."""
        raise NotImplementedError

    def outputs(self, mask: Tensor | None, n: int) -> tuple[Tensor | None, int]:
        """The mask (b, p) of the outputs (None: all real) and p, for inputs with ``mask`` (b, n)."""
        return mask, n


class Loss(NamedTuple):
    """``total`` is minimised (nats per predicted item unless a name says bits); ``parts`` are logged."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """What is minimised. It opens :func:`tevo.record` itself where it needs taps, and owns its extra networks."""

    def corrupt(self, tokens: Tensor, *, mask: Tensor | None = None, generator: torch.Generator) -> dict[str, Tensor]:
        """Whole rows of ``tokens`` (b, n) as a batch: what is shown, what is asked, and every random draw.

        Apart from ``forward``, so that a batch is a function of its seed, and leaks can be looked for. Every entry has
        the batch as dimension 0.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` as the task makes it."""
        raise NotImplementedError

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items of a batch the loss is a mean of: the weight of a slice in a whole batch. Rows by default."""
        first = next(iter(batch.values()))
        return torch.tensor(float(len(first)), device=first.device)


@runtime_checkable
class LanguageModel(Protocol):
    """What an :class:`Inference` part asks of a model: :class:`~tevo.models.causal_lm.CausalLM` has it."""

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        ...

    def step(
        self, tokens: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``tokens`` (b, n) at positions ``at`` (#b, n); gives logits (b, n, V) and the next state."""
        ...


class Inference(nn.Module):
    """How a trained language model is used: it reads contexts, then steps as a model does.

    With one context, and what it adds turned off, it is the model after that context. It takes ``model``, a
    :class:`LanguageModel`, which it never changes, and records no gradient.
    """

    def start(self, contexts: Sequence[Tensor]) -> State:
        """Read ``contexts``, each of token ids (b, C_i), C_i >= 1; gives the state before what follows them."""
        raise NotImplementedError

    def check_contexts(self, contexts: Sequence[Tensor]) -> None:
        """Refuse no context, an empty one, and batches of unequal size."""
        if not contexts or any(c.ndim != 2 or c.shape[1] == 0 or len(c) != len(contexts[0]) for c in contexts):
            raise ValueError(
                f"{type(self).__name__} got contexts of shapes {[tuple(c.shape) for c in contexts]}; expected at least "
                "one, each (b, C) with C >= 1 and the same b"
            )

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance by ``tokens`` (b, n) that follow; gives scores (b, n, V) and the next state.

        A softmax of the scores is the distribution of the next token: they are logits, or log-probabilities.
        """
        raise NotImplementedError


class Adapter:
    """Cheap adaptation of a trained model. What it trains lives in the model, so that it is saved with it."""

    def attach(self, model: nn.Module) -> list[nn.Parameter]:
        """Change ``model`` in place and freeze it; gives what is left to train: all that requires a gradient."""
        raise NotImplementedError

    def merge(self, model: nn.Module) -> None:
        """Write what was learned into the model's own parameters: same outputs, and names and shapes as before.

        Only where the card claims ``merges``.
        """
        raise ValueError(f"{type(self).__name__} changes how the model computes and cannot be merged into its weights")
