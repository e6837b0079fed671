"""MEFT: a trained stack becomes reversible, so that training adapters keeps no activations of its layers.

    two streams, h_1 = h_2 = x;  each layer:   y_1 = lambda h_1 + F(h_2),   y_2 = beta h_2 + G(y_1)         (1)
    undone by   h_2 = (y_2 - G(y_1)) / beta,   h_1 = (y_1 - F(h_2)) / lambda                                (2)
    output (h_1 + h_2) / 2                                                                                  (3)

    MEFT1   F = trained layer, G = adapter;  y_1 and y_2 are swapped after each layer
    MEFT2   F = adapter, G = trained layer;  swapped
    MEFT3   F = attention block, G = feed-forward block

    A(x) = W_2 GELU(W_1 x + b_1) + b_2;  a trained layer also has one beside its channel mixer, and the attention block
    of MEFT3 one behind its mixer: m + A(m)                                                                 (4)

Only adapters are trained. In backward each layer's inputs are computed back from its outputs (eq. 2): about one more
forward pass, and the bytes kept do not grow with the depth. Each layer divides by lambda and beta: with small factors
the model starts near the trained one, and rounding grows by 1 / (lambda beta) for each layer.

Source: 2306.00477, section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tevo.card import Card
from tevo.contracts import Adapter, Sublayer
from tevo.contracts import Stack as StackContract
from tevo.functional.freezing import freeze, trained
from tevo.functional.masks import blank
from tevo.models.block import Block
from tevo.models.encoder import Encoder
from tevo.residuals.post_norm import PostNorm
from tevo.residuals.pre_norm import PreNorm
from tevo.taps import sealed

CARD = Card(
    id="meft",
    role="adapter",
    summary="Turns a trained stack into a reversible one with adapters: activations are computed back, not kept.",
    equations=(
        r"y_1 = \lambda h_1 + F(h_2),\quad y_2 = \beta h_2 + G(y_1)",
        r"h_2 = (y_2 - G(y_1)) / \beta,\quad h_1 = (y_1 - F(h_2)) / \lambda",
    ),
    exports={"meft1": "MEFT1", "meft2": "MEFT2", "meft3": "MEFT3"},
    cost="n^2",
    memory="n",
    claims=("bidirectional", "padding", "recomputes"),
    examples=(
        {"part": "meft1", "rank": 5},
        {"part": "meft1", "rank": 2, "factors": (0.9, 0.7)},
        {"part": "meft2", "rank": 3, "factors": (0.9, 0.7)},
        {"part": "meft3", "rank": 5, "factors": (0.9, 0.7)},
    ),
    equals=(
        "BaohaoLiao/mefts 1d1c96160594 on the BERT layers of transformers 4.57.1, gradients of both its reversible and "
        "its ordinary backward; values in tests/golden/meft_a.npz",
    ),
    departures=(
        "Adapters have neither the dropout nor the optional norm of the released code.",
        "States of the random generators are kept and restored where the released code sets new seeds, so that a step "
        "leaves the global generator as ordinary dropout does.",
        "Inputs that were computed back are compared with the true ones at the bottom, and a difference above 1 % is an "
        "error: the released code goes on with wrong gradients.",
        "MEFT3 splits a layer into its two blocks, which is done for the pre-norm and post-norm wirings only.",
    ),
    notes=(
        "Deep stacks need factors near 1 or few recomputed layers. The output is the mean of two streams, of which one "
        "starts near the trained model with small factors. Taps inside recomputed layers carry no gradient. "
        "A model with it decodes by whole passes."
    ),
)

# greatest RMS difference between inputs and what is computed back, relative to the inputs; inputs below the least size
# are not compared, since norms (which add 1e-5 to the variance) take them for nothing
LARGEST_ERROR, LEAST_SIZE = 0.01, 0.003


class Bottleneck(nn.Module):
    """Equation (4), A(x)."""

    def __init__(self, *, dim: int, rank: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, rank), nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal matrices of standard deviation 0.02 and zero biases, as in the released code: near zero."""
        for linear in (self.into, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) gives (..., d)."""
        return self.out(F.gelu(self.into(x)))


class Beside(nn.Module):
    """A trained channel mixer with an adapter of the same input."""

    def __init__(self, channel: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.channel, self.adapter = channel, adapter

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        return self.channel(x, mask=mask) + self.adapter(x)


class Behind(nn.Module):
    """A trained mixer with an adapter of its output."""

    def __init__(self, mixer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mixer, self.adapter = mixer, adapter

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        y = self.mixer(x, mask=mask, at=at)
        return y + self.adapter(y)


class Layer(nn.Module):
    """One reversible layer: ``f`` and ``g`` of equation (1), and whether its outputs are swapped."""

    swap = True

    def __init__(self, block: Block, *, dim: int, rank: int) -> None:
        super().__init__()
        self.block = block
        block.channel = Beside(block.channel, Bottleneck(dim=dim, rank=rank))

    def f(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """F, (b, n, d) gives (b, n, d)."""
        raise NotImplementedError

    def g(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """G, (b, n, d) gives (b, n, d)."""
        raise NotImplementedError


class LayerFirst(Layer):
    """F is the trained layer, G an adapter."""

    def __init__(self, block: Block, *, dim: int, rank: int) -> None:
        super().__init__(block, dim=dim, rank=rank)
        self.adapter = Bottleneck(dim=dim, rank=rank)

    def f(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The trained layer."""
        return self.block(x, mask=mask, at=at)

    def g(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The adapter."""
        return self.adapter(x)


class AdapterFirst(Layer):
    """F is an adapter, G the trained layer."""

    def __init__(self, block: Block, *, dim: int, rank: int) -> None:
        super().__init__(block, dim=dim, rank=rank)
        self.adapter = Bottleneck(dim=dim, rank=rank)

    def f(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The adapter."""
        return self.adapter(x)

    def g(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The trained layer."""
        return self.block(x, mask=mask, at=at)


class Halves(Layer):
    """F is the attention block, G the feed-forward block, each with its share of the wiring."""

    swap = False

    def __init__(self, block: Block, *, dim: int, rank: int) -> None:
        if not isinstance(block.residual, PreNorm | PostNorm):
            raise ValueError(
                f"MEFT3 cannot split the wiring {type(block.residual).__name__} into an attention and a feed-forward block; "
                "use MEFT1 or MEFT2, or a model with pre_norm or post_norm"
            )
        super().__init__(block, dim=dim, rank=rank)
        block.mixer = Behind(block.mixer, Bottleneck(dim=dim, rank=rank))

    def f(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The attention block."""
        return self._half(0, x, lambda y: self.block._drop(self.block.mixer(y, mask=mask, at=at)))

    def g(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The feed-forward block, and the stack's last norm if it is the block's."""
        y = self._half(1, x, lambda y: self.block._drop(self.block.channel(y, mask=mask)))
        final = getattr(self.block.residual, "final", None)
        return y if final is None else final(y)

    def _half(self, index: int, x: Tensor, sublayer: Sublayer) -> Tensor:
        wiring = self.block.residual
        assert isinstance(wiring, PreNorm | PostNorm)
        norm = wiring.norms[index]
        return x + sublayer(norm(x)) if isinstance(wiring, PreNorm) else norm(x + sublayer(x))


class Pass:
    """One forward pass through layers, and what undoing it needs beside its outputs.

    Args:
        layers: reversible layers.
        factors: lambda and beta.
        mask, at: as for the layers.
    """

    def __init__(
        self, layers: Sequence[Layer], factors: tuple[float, float], mask: Tensor | None, at: Tensor | None
    ) -> None:
        self.layers, self.factors, self.mask, self.at = layers, factors, mask, at
        self.parameters = list({id(p): p for layer in layers for p in trained(layer)}.values())
        # states of the generators before each F and G of a pass that draws
        self.noise: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, h1: Tensor, h2: Tensor, *, noted: bool) -> tuple[Tensor, Tensor]:
        """Equation (1) through all layers; with ``noted`` it can be undone."""
        scale, shift = self.factors
        for layer in self.layers:
            self._note(h1, noted and layer.training)
            y1 = scale * h1 + layer.f(h2, self.mask, self.at)
            self._note(h1, noted and layer.training)
            y2 = shift * h2 + layer.g(y1, self.mask, self.at)
            h1, h2 = (y2, y1) if layer.swap else (y1, y2)
        return h1, h2

    def _note(self, x: Tensor, draws: bool) -> None:
        if draws:
            self.noise.append((torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None))

    def backward(
        self, h1: Tensor, h2: Tensor, x: Tensor, d1: Tensor, d2: Tensor, automatic: tuple[bool, torch.dtype]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """From the outputs, the input of both streams and the outputs' gradients, those of inputs and parameters.

        Raises:
            RuntimeError: what is computed back differs too much from the input.
        """
        found: dict[int, Tensor] = {}
        scale, shift = self.factors
        noise = list(self.noise)
        for layer in reversed(self.layers):
            y1, y2, d1, d2 = (h2, h1, d2, d1) if layer.swap else (h1, h2, d1, d2)
            own = trained(layer)
            g, through = self._again(layer.g, y1, d2, own, found, noise, automatic)
            d1 = d1 + through
            h2 = (y2 - g) / shift  # (eq. 2)
            f, through = self._again(layer.f, h2, d1, own, found, noise, automatic)
            h1 = (y1 - f) / scale
            d1, d2 = scale * d1, shift * d2 + through
        self._compare(h1, h2, x)
        return d1, d2, [found.get(id(p)) for p in self.parameters]

    def _again(
        self,
        part: Any,
        x: Tensor,
        d: Tensor,
        parameters: Sequence[nn.Parameter],
        found: dict[int, Tensor],
        noise: list[tuple[Tensor, Tensor | None]],
        automatic: tuple[bool, torch.dtype],
    ) -> tuple[Tensor, Tensor]:
        """F or G once more, with the gradient of its input; those of parameters are added to ``found``."""
        x = x.detach().requires_grad_()
        with ExitStack() as around:
            around.enter_context(torch.enable_grad())
            # what is tapped was seen in the forward pass
            around.enter_context(sealed())
            around.enter_context(torch.autocast(x.device.type, dtype=automatic[1], enabled=automatic[0]))
            if noise:
                cpu, cuda = noise.pop()
                around.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, x.device)
            y = part(x, self.mask, self.at)
        through, *grads = torch.autograd.grad(y, [x, *parameters], d.to(y.dtype), allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                before = found.get(id(parameter))
                found[id(parameter)] = grad if before is None else before + grad
        return y.detach(), through

    def _compare(self, h1: Tensor, h2: Tensor, x: Tensor) -> None:
        true = blank(x, self.mask)
        size = true.square().mean().sqrt()
        gap = torch.stack([(blank(h, self.mask) - true).square().mean().sqrt() for h in (h1, h2)]).amax()
        if not bool((gap <= LARGEST_ERROR * size) | (size < LEAST_SIZE)) and x.numel():
            raise RuntimeError(
                f"MEFT computed inputs back from {len(self.layers)} layers with a relative error of {float(gap / size):.1e}, "
                f"at most {LARGEST_ERROR} gives usable gradients; choose factors nearer 1 than {self.factors} or set "
                "recomputed= to fewer layers"
            )


class Recomputed(torch.autograd.Function):
    """A :class:`Pass` that keeps its outputs and the input of both streams alone."""

    @staticmethod
    def forward(run: Pass, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams begin as ``x``; the parameters are named for their gradients."""
        return run.forward(x, x, noted=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what undoing the pass begins with."""
        run, x, *_ = inputs
        device = x.device.type
        ctx.run = run
        ctx.automatic = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(*output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and the parameters."""
        run: Pass = ctx.run
        h1, h2, x = ctx.saved_tensors
        d1, d2, found = run.backward(h1, h2, x, d1, d2, ctx.automatic)
        return None, d1 + d2, *found


class Stack(StackContract):
    """Reversible layers in the place of a trained encoder's blocks.

    Args:
        layers: reversible layers.
        factors: lambda and beta of equation (1).
        recomputed: how many of the first layers compute their activations again in training.
    """

    def __init__(self, layers: Sequence[Layer], *, factors: tuple[float, float], recomputed: int) -> None:
        super().__init__()
        self.layers, self.factors, self.recomputed = nn.ModuleList(layers), factors, recomputed

    def streams(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` (b, n, d) gives both streams (b, n, d)."""
        layers = cast("list[Layer]", list(self.layers))
        # while compiling, activations are the compiler's to keep or to compute again
        k = self.recomputed if torch.is_grad_enabled() and not torch.compiler.is_compiling() else 0
        h1 = h2 = x
        if k:
            run = Pass(layers[:k], self.factors, mask, at)
            h1, h2 = cast("tuple[Tensor, Tensor]", Recomputed.apply(run, x, *run.parameters))
        return Pass(layers[k:], self.factors, mask, at).forward(h1, h2, noted=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d)."""
        h1, h2 = self.streams(x, mask=mask, at=at)
        return (h1 + h2) / 2  # (eq. 3)


class _MEFT(Adapter):
    """What the three have in common; ``layer`` is each one's own."""

    layer: type[Layer]

    def __init__(
        self,
        *,
        rank: int,
        factors: tuple[float, float],
        recomputed: int | None,
        also: Sequence[str],
    ) -> None:
        if rank < 1 or min(factors) <= 0 or (recomputed is not None and recomputed < 0):
            raise ValueError(
                f"{type(self).__name__} got rank={rank}, factors={factors}, recomputed={recomputed}; expected rank >= 1, "
                "factors > 0 and recomputed >= 0 or None"
            )
        self.rank, self.factors, self.recomputed, self.also = rank, factors, recomputed, also

    def attach(self, model: nn.Module) -> list[nn.Parameter]:
        """Put the model's blocks into a reversible stack with adapters; all else is frozen.

        Raises:
            ValueError: a model without exactly one encoder of blocks, or with fewer layers than are to be recomputed.
        """
        encoders = [module for module in model.modules() if isinstance(module, Encoder)]
        blocks = [block for encoder in encoders for block in encoder.blocks]
        if len(encoders) != 1 or not blocks or not all(isinstance(block, Block) for block in blocks):
            raise ValueError(
                f"{type(self).__name__} needs a model with one encoder of blocks, each a mixer and a channel mixer; "
                f"{type(model).__name__} has {len(encoders)} encoders with {len(blocks)} blocks"
            )
        recomputed = len(blocks) if self.recomputed is None else self.recomputed
        if recomputed > len(blocks):
            raise ValueError(
                f"{type(self).__name__} got recomputed={recomputed}, but the model has {len(blocks)} layers"
            )
        (encoder,) = encoders
        freeze(model, self.also)
        like = next(encoder.parameters())
        layers = [self.layer(cast(Block, block), dim=encoder.dim, rank=self.rank) for block in blocks]
        stack = Stack(layers, factors=self.factors, recomputed=recomputed).to(like)
        encoder.stack, encoder.blocks = stack.train(encoder.training), nn.ModuleList()
        return trained(model)


class MEFT1(_MEFT):
    """F is the trained layer, G an adapter.

    Args:
        rank: width r of the adapters.
        factors: lambda and beta; the released script's.
        recomputed: how many of the first layers compute their activations again; None is all, 0 is none.
        also: shell patterns of parameters that are trained too, such as a fresh head.
    """

    layer = LayerFirst

    def __init__(
        self,
        *,
        rank: int = 8,
        factors: tuple[float, float] = (0.1, 1.0),
        recomputed: int | None = None,
        also: Sequence[str] = (),
    ) -> None:
        super().__init__(rank=rank, factors=factors, recomputed=recomputed, also=also)


class MEFT2(_MEFT):
    """F is an adapter, G the trained layer; arguments as for :class:`MEFT1`."""

    layer = AdapterFirst

    def __init__(
        self,
        *,
        rank: int = 8,
        factors: tuple[float, float] = (1.0, 0.1),
        recomputed: int | None = None,
        also: Sequence[str] = (),
    ) -> None:
        super().__init__(rank=rank, factors=factors, recomputed=recomputed, also=also)


class MEFT3(_MEFT):
    """F is the attention block, G the feed-forward block; arguments as for :class:`MEFT1`."""

    layer = Halves

    def __init__(
        self,
        *,
        rank: int = 8,
        factors: tuple[float, float] = (0.1, 0.1),
        recomputed: int | None = None,
        also: Sequence[str] = (),
    ) -> None:
        super().__init__(rank=rank, factors=factors, recomputed=recomputed, also=also)
