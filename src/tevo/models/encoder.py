"""Encoder: a stack of blocks over vectors; and a classifier of token sequences on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from tevo.catalogue.create import Spec, resolve
from tevo.contracts import Joinable, Position, Stack, State, Stateful
from tevo.functional.masks import blank, check_mask, positions_of
from tevo.models.block import Block, acts_on_scores, build, run_block

Specs: TypeAlias = "Spec | Sequence[Spec]"


def per_layer(name: str, specs: Specs, depth: int) -> list[Spec]:
    """One spec for each layer.

    Raises:
        ValueError: a list of another length than depth, or one built module for several layers.
    """
    if isinstance(specs, Sequence) and not isinstance(specs, str):
        if len(specs) != depth:
            raise ValueError(f"{name} lists {len(specs)} parts for depth={depth}; give one for each layer")
        return list(specs)
    if isinstance(specs, nn.Module) and depth > 1:
        raise ValueError(
            f"one built {type(specs).__name__} cannot serve depth={depth} layers; give its class or name, or a list with "
            "one instance for each layer"
        )
    return [specs] * depth


def _is_block(spec: Spec) -> bool:
    return not isinstance(spec, nn.Module) and resolve(spec).role == "block"


class Encoder(nn.Module):
    """``depth`` blocks of any parts, over vectors.

    Args:
        dim: width d.
        depth: number of blocks.
        heads: number of heads, for parts that have any.
        mixer: token mixer, or a whole-block system; one for all layers or a list with one for each.
        channel: channel mixer, one or a list; None is GELU feed-forward (a whole-block system has its own).
        position: a position part.
        residual: wiring; None is pre-norm (a whole-block system has its own).
        norm: the wiring's norm; None leaves the wiring's own choice.
        causal: tokens see themselves and earlier ones.
        length: greatest length, for parts that are built for one.
        grid: (rows, columns), for mixers of a grid.
        hidden_dim: width inside the channel mixers; None leaves their own choice.
        dropout: probability with which a sublayer's output feature is dropped in training.
        stack: a part that owns its blocks, in place of all of the above that it does not name.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        mixer: Specs = "softmax",
        channel: Specs | None = None,
        position: Spec | None = None,
        residual: Spec | None = None,
        norm: str | None = None,
        causal: bool = False,
        length: int | None = None,
        grid: tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        stack: Spec | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"Encoder got depth={depth}, expected at least 1 block")
        self.dim = dim
        self.checkpoint_activations = False
        facts: dict[str, object] = {
            "dim": dim,
            "heads": heads,
            "length": length,
            "grid": grid,
            "depth": depth,
            "causal": causal,
        }
        # what a part that owns more than a seat must name, if it is asked for
        demands: dict[str, object] = {"causal": True} if causal else {}
        if dropout:
            demands["dropout"] = dropout
        positions = self._positions(position, facts, depth)
        self.position = positions[0] if positions else None
        self.stack: nn.Module | None = None
        self.blocks = nn.ModuleList()
        if stack is not None:
            if positions and acts_on_scores(positions[0]):
                demands["position"] = positions[0]
            given = {"channel": channel, "residual": residual, "norm": norm, "hidden_dim": hidden_dim}
            demands |= {name: value for name, value in given.items() if value is not None}
            if mixer != "softmax":
                demands["mixer"] = mixer
            self.stack = build("stack", stack, facts, demands)
            return
        channels = per_layer("channel", "gelu" if channel is None else channel, depth)
        mixers = per_layer("mixer", mixer, depth)
        if hidden_dim is not None:
            demands["hidden_dim"] = hidden_dim
        # beside whole blocks, other layers may still use these
        if all(_is_block(spec) for spec in mixers):
            self._refuse(mixers[0], channel=channel, residual=residual, norm=norm)
            if positions and acts_on_scores(positions[0]):
                demands["position"] = positions[0]
        for index, spec in enumerate(mixers):
            own = positions[index % len(positions)] if positions else None
            if _is_block(spec):
                block = build("block", spec, {**facts, "index": index}, demands)
            else:
                block = Block(
                    dim=dim,
                    heads=heads,
                    mixer=spec,
                    channel=channels[index],
                    position=own,
                    residual="pre_norm" if residual is None else residual,
                    norm=norm,
                    causal=causal,
                    length=length,
                    grid=grid,
                    hidden_dim=hidden_dim,
                    dropout=dropout,
                    depth=depth,
                    index=index,
                )
            self.blocks.append(block)

    @staticmethod
    def _positions(position: Spec | None, facts: dict[str, object], depth: int) -> list[nn.Module]:
        """One position for all layers, or one for each, as its card says; a part of the user's serves all layers."""
        if position is None:
            return []
        if isinstance(position, nn.Module):
            return [position]
        card = resolve(position).card
        if card is None or "shared_across_layers" in card.claims:
            return [build("position", position, facts)]
        return [build("position", position, {**facts, "index": index}) for index in range(depth)]

    @staticmethod
    def _refuse(spec: Spec, **given: object) -> None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{resolve(spec).name} is a whole block with its own {name}, got {name}={value!r}; drop it"
                )

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n), ``at`` (#b, n) give (b, n, d), or what the stack gives."""
        check_mask("Encoder", mask, x.shape[0], x.shape[1])
        if at is None:
            at = positions_of(mask, x.shape[1], device=x.device)
        if isinstance(self.position, Position):
            x = self.position.embed(x, at)
        if self.stack is not None:
            return self.stack(x, mask=mask, at=at)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = run_block(block, x, mask=mask, at=at, recompute=recompute)
        return x

    def outputs(self, mask: Tensor | None, n: int) -> tuple[Tensor | None, int]:
        """The mask of the outputs and how many there are, for n inputs with ``mask`` (b, n)."""
        return self.stack.outputs(mask, n) if isinstance(self.stack, Stack) else (mask, n)

    def stateful(self) -> bool:
        """Whether every block can advance step by step."""
        if self.stack is not None:
            return isinstance(self.stack, Stateful)
        return all(b.stateful() if isinstance(b, Block) else isinstance(b, Stateful) for b in self.blocks)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Tokens seen so far (b,), and the state of each block."""
        parts = [self.stack] if self.stack is not None else list(self.blocks)
        for part in parts:
            if not isinstance(part, Stateful):
                raise ValueError(f"{type(part).__name__} has no state to advance step by step")
        like = next(self.parameters())
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        return count, tuple(cast(Stateful, part).init_state(batch) for part in parts)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); ``mask`` (b, n) excludes padding, which takes no position."""
        assert isinstance(state, tuple)
        count, states = state
        assert isinstance(count, Tensor) and isinstance(states, tuple)
        if at is None:
            at = positions_of(mask, x.shape[1], count, device=x.device)
        if isinstance(self.position, Position):
            x = self.position.embed(x, at)
        parts = [self.stack] if self.stack is not None else list(self.blocks)
        after = []
        for part, own in zip(parts, states, strict=True):
            x, own = cast(Stateful, part).step(x, own, mask=mask, at=at)
            after.append(own)
        count = count + (x.shape[1] if mask is None else mask.sum(1))
        return x, (count, tuple(after))

    def join(self, states: Sequence[State], skip: Sequence[int]) -> State:
        """States after several sequences side by side, less the first ``skip[i]`` tokens of each.

        Raises:
            ValueError: a part whose states cannot be joined.
        """
        parts = [self.stack] if self.stack is not None else list(self.blocks)
        counts, layers = zip(*cast("Sequence[tuple[Tensor, tuple[State, ...]]]", states), strict=True)
        joined = []
        for part, own in zip(parts, zip(*layers, strict=True), strict=True):
            if not isinstance(part, Joinable):
                raise ValueError(f"{type(part).__name__} keeps a state that cannot be joined with others")
            joined.append(part.join(own, skip))
        return torch.stack(counts).amax(0), tuple(joined)


class SequenceClassifier(nn.Module):
    """Classifies a sequence of tokens by the mean of the encoder's outputs.

    Args:
        vocab: number of token ids V.
        classes: number of classes.
        dim, depth, heads, mixer, channel, position, residual, norm, length, hidden_dim, dropout, stack: as for
            :class:`Encoder`.
    """

    def __init__(
        self,
        *,
        vocab: int,
        classes: int,
        dim: int,
        depth: int,
        heads: int = 8,
        mixer: Specs = "softmax",
        channel: Specs | None = None,
        position: Spec | None = None,
        residual: Spec | None = None,
        norm: str | None = None,
        length: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        stack: Spec | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            heads=heads,
            mixer=mixer,
            channel=channel,
            position=position,
            residual=residual,
            norm=norm,
            length=length,
            hidden_dim=hidden_dim,
            dropout=dropout,
            stack=stack,
        )
        self.head = nn.Linear(dim, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings of standard deviation d^-1/2 (the Transformer's), a small head."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``tokens`` (b, n) int, ``mask`` (b, n) give logits (b, classes)."""
        check_tokens("SequenceClassifier", tokens, self.embedding.num_embeddings)
        y = self.encoder(self.embedding(tokens), mask=mask)
        mask, _ = self.encoder.outputs(mask, tokens.shape[1])
        return self.head(pool(y, mask))


def pool(y: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of (b, n, d); zeros where there are none."""
    if mask is None:
        return y.mean(1) if y.shape[1] else y.sum(1)
    return blank(y, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def check_tokens(owner: str, tokens: Tensor, vocab: int) -> None:
    """Refuse token ids that are not integers or lie outside the vocabulary (the range is not read while compiling)."""
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"{owner} needs integer token ids, got {tokens.dtype}; convert them with .long()")
    if torch.compiler.is_compiling() or tokens.is_meta or tokens.numel() == 0 or tokens.is_cuda:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"{owner} got token ids from {low} to {high}, but its vocabulary is 0..{vocab - 1}")
