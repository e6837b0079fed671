"""What a check is given: a part of any role, built small, in a seat that makes it a map from tokens to tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.catalogue.rows import Row
from tevo.contracts import Adapter, Heads, Inference, Normaliser, Objective, Position, Residual, State, Stateful
from tevo.functional.masks import positions_of
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.causal_lm import CausalLM
from tevo.models.encoder import Encoder

# heads and width of a head of the seats built around normalisers and positions
SEAT_HEADS, SEAT_WIDTH = 3, 4
# tokens of padding before and after, and dtypes, that checks of all of them go through
PADDINGS = ((0, 3), (4, 0), (2, 1))
PRECISIONS = (torch.float64, torch.float32)
# words of the models built around inference parts
VOCAB = 11


class SeatedPosition(nn.Module):
    """A position in softmax attention: embeds, then attends."""

    def __init__(self, position: Position, *, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.mixer = SoftmaxAttention(dim=dim, heads=heads, position=position, causal=causal)
        self.position = position

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        places = torch.arange(x.shape[1], device=x.device)[None] if at is None else at
        return self.mixer(self.position.embed(x, places), context, mask=mask, at=at)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Tokens seen, and the attention's state."""
        return torch.zeros(batch, dtype=torch.long), self.mixer.init_state(batch, context=context, mask=mask)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        assert isinstance(state, tuple)
        count, inner = state
        assert isinstance(count, Tensor)
        places = positions_of(mask, x.shape[1], count, device=x.device) if at is None else at
        # not those places: how the mixer counts is part of what is checked
        y, inner = self.mixer.step(self.position.embed(x, places), inner, mask=mask, at=at)
        return y, (count + (x.shape[1] if mask is None else mask.sum(1)), inner)


class SeatedResidual(nn.Module):
    """A residual wiring around token-wise sublayers of its own."""

    def __init__(self, residual: Residual, dim: int, sublayers: int) -> None:
        super().__init__()
        self.residual = residual
        self.sublayers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(sublayers))
        residual.initialise(self)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        return self.residual(x, [self.wrap(layer) for layer in self.sublayers])

    @staticmethod
    def wrap(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The sublayer as the wiring sees it."""
        return lambda y: F.softsign(layer(y))


class SeatedObjective(nn.Module):
    """An objective and the model that it trains, as one module from a batch to the loss."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The total loss, ()."""
        return self.objective(self.model, batch).total

    def batch(self, b: int, n: int, *, seed: int = 1, mask: Tensor | None = None) -> dict[str, Tensor]:
        """A batch of ``b`` random rows of ``n`` tokens."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, int(self.model.vocab), (b, n), generator=generator)  # type: ignore[arg-type]
        return self.objective.corrupt(tokens, mask=mask, generator=generator)


@dataclass(frozen=True)
class Subject:
    """One class of a system with one example of constructor arguments."""

    card: Card
    part: str
    cls: Callable[..., nn.Module]
    example: Mapping[str, object]
    lengths: tuple[int, ...] = ()  # in place of those that fit the part
    rows: int | None = None  # the greatest batch
    paddings: tuple[tuple[int, int], ...] = PADDINGS  # tokens before and after what is real
    precisions: tuple[torch.dtype, ...] = PRECISIONS
    runs: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # what was run through it

    @property
    def house(self) -> bool:
        """Whether the rules of the house are asked of it."""
        return True

    @property
    def costed(self) -> bool:
        """Whether a growth of FLOPs is declared."""
        return True

    @property
    def name(self) -> str:
        """For messages: part(arguments)."""
        return f"{self.part}({', '.join(f'{k}={v!r}' for k, v in self.example.items())})"

    def claims(self, word: str) -> bool:
        """Whether the card makes a claim."""
        return self.card.claims_word(word)

    def accepts(self, argument: str) -> bool:
        """Whether the constructor names an argument."""
        return argument in inspect.signature(self.cls).parameters

    @property
    def seat(self) -> str:
        """What the built module maps: ``tokens`` to tokens, or what a role of another kind takes."""
        return self.card.role if self.card.role in ("objective", "inference") else "tokens"

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        value = self.example.get("dim", self.heads * SEAT_WIDTH)
        assert isinstance(value, int)
        return value

    @property
    def heads(self) -> int:
        """Heads of the seat."""
        value = self.example.get("heads", SEAT_HEADS)
        assert isinstance(value, int)
        return value

    @property
    def seat_causal(self) -> bool:
        """Whether the built module is causal, unless told otherwise."""
        return bool(self.example.get("causal", not self.claims("bidirectional") and self.claims("causal")))

    def sizes(self) -> tuple[int, ...]:
        """Three odd lengths that the part can take."""
        if self.lengths:
            return self.lengths
        if self.card.sizes:
            return self.card.sizes
        grid, length = self.example.get("grid"), self.example.get("length")
        if isinstance(grid, tuple):
            return (grid[0] * grid[1],)
        if isinstance(length, int):
            return tuple(sorted({length, max(1, length - 4), max(1, length // 2)}))
        return (13, 7, 29)

    def boundaries(self) -> tuple[int, ...]:
        """Lengths at which blocks, windows and counts of the part begin or end, as far as it can take them."""
        own = [v for k, v in self.example.items() if type(v) is int and k not in ("dim", "heads") and 1 < v <= 48]
        around = {w for v in (*own, 8, 16, 32) for w in (v - 1, v, v + 1)} | {1, 2, 3, 5}
        longest = self.example.get("length", max(around))
        return tuple(sorted(n for n in around if isinstance(longest, int) and n <= longest))

    def through(self, name: str) -> tuple[Any, ...]:
        """``paddings`` or ``precisions``, for a check that goes through them; noted, so that the few that matter are found."""
        self.runs[name] += 1
        return getattr(self, name)

    def any_length(self) -> bool:
        """Whether lengths 0 and 1 make sense."""
        return not self.card.sizes and "grid" not in self.example

    def make(
        self, *, causal: bool | None = None, dtype: torch.dtype = torch.float64, disturbed: bool = True, seed: int = 0
    ) -> nn.Module:
        """Build the part and its seat.

        Args:
            causal: overrides the example, where the part or its seat has the choice.
            dtype: of all parameters.
            disturbed: move every parameter by a seeded draw, so that no zero or unit initial value hides an error.
            seed: of the initial values.
        """
        torch.manual_seed(seed)
        if self.card.role == "inference":
            return self._reader(dtype, disturbed)
        if self.card.role == "adapter":
            return self.adapted(dtype=dtype, disturbed=disturbed)
        arguments = dict(self.example)
        # an objective's example names its model too, and the length that both are built for
        model = arguments.pop("model", None)
        if model is not None and not self.accepts("length"):
            arguments.pop("length", None)
        if causal is not None and self.accepts("causal"):
            arguments["causal"] = causal
        part = self.cls(**arguments)
        seated: nn.Module = part
        causal = self.seat_causal if causal is None else causal
        if isinstance(part, Normaliser):
            seated = SoftmaxAttention(dim=self.dim, heads=self.heads, normaliser=part, causal=causal)
        elif isinstance(part, Heads):
            seated = SoftmaxAttention(dim=self.dim, heads=part, causal=causal)
        elif isinstance(part, Position):
            seated = SeatedPosition(part, dim=self.dim, heads=self.heads, causal=causal)
        elif isinstance(part, Residual):
            seated = SeatedResidual(part, self.dim, int(str(self.example.get("sublayers", 2))))
        elif isinstance(part, Objective):
            seated = SeatedObjective(part, create(str(model), facts={"length": self.example.get("length")}))
        seated = seated.to(dtype)
        if disturbed:
            disturb(seated)
        return seated.eval()

    def host(self, *, depth: int = 2, dtype: torch.dtype = torch.float64) -> Encoder:
        """The trained model that an adapter is given."""
        torch.manual_seed(0)
        model = Encoder(dim=self.dim, depth=depth, heads=self.heads, hidden_dim=19).to(dtype)
        disturb(model)
        return model.eval()

    def adapted(self, *, depth: int = 2, dtype: torch.dtype = torch.float64, disturbed: bool = True) -> Encoder:
        """The same model with the adapter attached; ``disturbed`` moves what is trained."""
        model, adapter = self.host(depth=depth, dtype=dtype), self.cls(**self.example)
        assert isinstance(adapter, Adapter)
        adapter.attach(model)
        if disturbed:
            disturb(model, trained_only=True)
        return model.eval()

    def _reader(self, dtype: torch.dtype, disturbed: bool) -> nn.Module:
        """The way to use a language model, around a small one; what it keeps texts in holds two."""
        model = CausalLM(vocab=VOCAB, dim=12, depth=2, heads=3, position="rope").to(dtype)
        if disturbed:
            disturb(model)
        part = self.cls(model=model, **self.example).eval()
        remember = getattr(part, "remember", None)
        if isinstance(part, Inference) and callable(remember):
            texts = token_ids(2, 9, seed=5)
            # two entries of equal key and unequal value would leave a choice between them
            texts[:, 0] = torch.tensor([2, 3])
            remember(texts)
        return part

    def _count(self, x: Tensor) -> None:
        """One more input, and its shape; not while compiling, which traces no such notes."""
        if not torch.compiler.is_compiling():
            self.runs["inputs"] += 1
            self.runs["b"], self.runs["n"] = x.shape[:2]

    def part_of(self, seated: nn.Module) -> nn.Module:
        """The part inside its seat."""
        if self.card.role == "normaliser":
            return seated.normaliser  # type: ignore[return-value]
        if self.card.role == "heads":
            return seated.heads  # type: ignore[return-value]
        return getattr(seated, self.card.role, seated)

    def inputs(self, batch: int, n: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        """Signed normal tokens (batch, n, d)."""
        generator = torch.Generator().manual_seed(seed)
        batch = batch if self.rows is None else min(batch, self.rows)
        return torch.randn(batch, n, self.dim, generator=generator, dtype=torch.float64).to(dtype)

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Run the seated part, whatever its role's signature."""
        role = self.card.role
        self._count(x)
        if isinstance(module, SeatedObjective):
            batch = module.batch(*x.shape[:2])
            return module({name: value.to(x.device) for name, value in batch.items()})
        if role == "norm":
            return module(x)
        if role == "channel":
            return module(x, mask=mask)
        if role in ("block", "stack", "adapter"):
            return module(x, mask=mask, at=at)
        return module(x, context, mask=mask, at=at)


def token_ids(batch: int, n: int, *, seed: int = 1) -> Tensor:
    """Random token ids (batch, n), each row beginning with word 1."""
    ids = torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))
    ids[:, :1] = 1
    return ids


def disturb(module: nn.Module, *, trained_only: bool = False) -> None:
    """Move every parameter by a tenth of its own size plus a twentieth, from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if trained_only and not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.add_(noise * (0.1 * parameter.abs() + 0.05))


def subjects(row: Row) -> Iterator[Subject]:
    """Every exported class of a system with every example of its card."""
    import importlib

    from tevo.catalogue.rows import PACKAGE

    assert row.path is not None and row.card is not None
    module = importlib.import_module("tevo." + ".".join(row.path.relative_to(PACKAGE).with_suffix("").parts))
    done = set()
    for part, name in row.card.exports.items():
        if name in done:
            continue
        done.add(name)
        for example in row.card.examples:
            wanted = example.get("part", part)
            if row.card.exports[str(wanted)] == name:
                yield Subject(
                    row.card.of(part), part, getattr(module, name), {k: v for k, v in example.items() if k != "part"}
                )


def stateful(module: nn.Module) -> Stateful:
    """The module, which must have a state.

    Raises:
        AssertionError: it has none.
    """
    if not isinstance(module, Stateful):
        raise AssertionError(f"the card claims a state, but {type(module).__name__} has no init_state and step")
    return module
