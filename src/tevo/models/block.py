"""Block: one residual wiring around one token mixer and one channel mixer, each chosen by name, class or instance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tevo.catalogue.create import Part, Spec, alternatives, create, resolve
from tevo.contracts import Joinable, Position, Residual, State, Stateful
from tevo.taps import Seen, sealed, tap

Facts = Mapping[str, object]


def build(role: str, spec: Spec | Part, facts: Facts, demands: Facts | None = None) -> nn.Module:
    """A part for a seat; refuses one whose card says another role.

    Raises:
        ValueError: wrong role, missing or unknown arguments, a demand that cannot be met.
    """
    if isinstance(spec, nn.Module):
        return spec
    part = resolve(spec)
    if part.role not in (None, role):
        seat = "stack" if part.role == "stack" else part.role
        raise ValueError(f"{part.name} is a {part.role}, not a {role}; give it as {seat}={part.name!r}")
    return create(part, facts=facts, demands=demands)


def build_mixer(spec: Spec | Part, facts: Facts, *, causal: bool, position: nn.Module | None) -> nn.Module:
    """A token mixer. A normaliser or heads part is put into its seat of softmax attention.

    Raises:
        ValueError: not causal where that is needed, not bidirectional where that is, or no use for the position.
    """
    orders = position is not None and acts_on_scores(position)
    if isinstance(spec, nn.Module):
        if orders:
            raise ValueError(
                f"the built mixer {type(spec).__name__} cannot be given the position {type(position).__name__} any more; "
                "build the mixer with it, or give the mixer's class or name"
            )
        if causal:
            _check_built(spec)
        return spec
    part = resolve(spec)
    demands: dict[str, object] = {}
    if part.role not in (None, "mixer", "normaliser", "heads"):
        raise ValueError(f"{part.name} is a {part.role}, not a mixer; give it as {part.role}={part.name!r}")
    _check_form(part, causal)
    if part.role in ("normaliser", "heads"):
        seated = create(part, facts=facts)
        part = Part(name=part.name, cls=resolve("softmax").cls, options={part.role: seated})
    if causal:
        demands["causal"] = True
    if orders:
        demands["position"] = position
    needs_grid = "grid" in part.parameters() and part.parameters()["grid"].default is inspect.Parameter.empty
    if needs_grid and facts.get("grid") is None and "grid" not in part.options:
        raise ValueError(
            f"{part.name} mixes a grid of rows and columns, which a sequence is not"
            f"{alternatives('mixer', 'causal' if causal else 'bidirectional', without='grid')}; or give grid=(rows, columns)"
        )
    return create(part, facts={**facts, "causal": causal}, demands=demands)


def _check_form(part: Part, causal: bool) -> None:
    """Refuse a part whose card does not claim the form; the seat of a normaliser has one, whatever is put into it."""
    if part.card is None or ("causal" if causal else "bidirectional") in part.card.claims:
        return
    if causal:
        raise ValueError(f"{part.name} has no causal form{alternatives(part.role, 'causal')}")
    raise ValueError(
        f"{part.name} is causal only and cannot be used where all tokens see each other"
        f"{alternatives(part.role, 'bidirectional')}"
    )


def _check_built(spec: nn.Module) -> None:
    """Refuse a built mixer that says of itself that it sees later tokens."""
    if getattr(spec, "causal", None) is False:
        raise ValueError(
            f"{type(spec).__name__} was built with causal=False, but is used causally; build it with causal=True"
        )


def acts_on_scores(position: nn.Module) -> bool:
    """Whether a position works inside attention (turn, bias) and not on the embeddings alone."""
    return any(getattr(type(position), hook, None) not in (None, getattr(Position, hook)) for hook in ("turn", "bias"))


class Block(nn.Module):
    """One block.

    Args:
        dim: width d.
        heads: number of heads, for parts that have any.
        mixer: token mixer; a normaliser or heads part stands for softmax attention with it.
        channel: channel mixer.
        position: a position part; one that acts on embeddings alone is the host's to apply.
        residual: wiring.
        norm: the wiring's norm; None leaves the wiring's own choice.
        causal: tokens see themselves and earlier ones.
        length: greatest length, for parts that are built for one.
        grid: (rows, columns), for mixers of a grid.
        hidden_dim: width inside the channel mixer; None leaves its own choice.
        dropout: probability with which a sublayer's output feature is dropped in training.
        depth: blocks in the stack, for parts whose initial values or norms depend on it.
        index: which of them this is, from 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        mixer: Spec = "softmax",
        channel: Spec = "gelu",
        position: Spec | None = None,
        residual: Spec = "pre_norm",
        norm: str | None = None,
        causal: bool = False,
        length: int | None = None,
        grid: tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        depth: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__()
        facts = {"dim": dim, "heads": heads, "length": length, "grid": grid, "depth": depth, "index": index}
        placed = None if position is None else build("position", position, {**facts, "causal": causal})
        self.mixer = build_mixer(mixer, facts, causal=causal, position=placed)
        wanted = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
        self.channel = build("channel", channel, facts, wanted)
        self.residual = build("residual", residual, {**facts, "sublayers": 2}, {} if norm is None else {"norm": norm})
        self.dropout = dropout
        if isinstance(self.residual, Residual):
            self.residual.initialise(self)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d)."""

        def mix(y: Tensor) -> Tensor:
            return self._drop(self.mixer(y, mask=mask, at=at))

        def transform(y: Tensor) -> Tensor:
            return self._drop(self.channel(tap("channel_input", y), mask=mask))

        return self.residual(x, (mix, transform))

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def stateful(self) -> bool:
        """Whether the block can decode token by token."""
        return isinstance(self.mixer, Stateful)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The mixer's state and the channel mixer's, () if it has none."""
        if not isinstance(self.mixer, Stateful):
            raise ValueError(
                f"{type(self.mixer).__name__} has no state to decode with; run the whole sequence again for each token"
            )
        inner = self.channel.init_state(batch) if isinstance(self.channel, Stateful) else ()
        return self.mixer.init_state(batch), inner

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        assert isinstance(state, tuple)
        mixer_state, channel_state = state

        def mix(y: Tensor) -> Tensor:
            nonlocal mixer_state
            assert isinstance(self.mixer, Stateful)
            y, mixer_state = self.mixer.step(y, mixer_state, mask=mask, at=at)
            return y

        def transform(y: Tensor) -> Tensor:
            nonlocal channel_state
            y = tap("channel_input", y)
            if not isinstance(self.channel, Stateful):
                return self.channel(y, mask=mask)
            y, channel_state = self.channel.step(y, channel_state, mask=mask)
            return y

        return self.residual(x, (mix, transform)), (mixer_state, channel_state)

    def join(self, states: Sequence[State], skip: Sequence[int]) -> State:
        """States after several sequences side by side, less the first ``skip[i]`` tokens of each."""
        mixers, channels = zip(*cast("Sequence[tuple[State, State]]", states), strict=True)
        if not isinstance(self.mixer, Joinable) or any(c != () for c in channels):
            owner = self.channel if isinstance(self.mixer, Joinable) else self.mixer
            raise ValueError(
                f"{type(owner).__name__} keeps a state that cannot be joined with others; use softmax attention without "
                "memory= and a channel mixer without a state"
            )
        return self.mixer.join(mixers, skip), ()


def run_block(block: nn.Module, x: Tensor, *, mask: Tensor | None, at: Tensor | None, recompute: bool) -> Tensor:
    """One block, or one block whose activations are computed again in backward, with each tap seen once."""
    if not recompute:
        return block(x, mask=mask, at=at)

    def inner(x: Tensor) -> tuple[Tensor, Seen]:
        with sealed() as seen:
            return block(x, mask=mask, at=at), seen

    y, seen = checkpoint(inner, x, use_reentrant=False)
    for name, values in seen.items():
        for value in values:
            tap(name, value)
    return y
