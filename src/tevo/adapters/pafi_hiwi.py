"""PaFi and HiWi: two ways to adapt a trained model that leave its speed as it was.

PaFi trains the k parameters with the smallest absolute trained value and nothing else; the choice knows no task:

    m = 1[|theta| is among the k smallest],   theta <- theta - lr m grad                                    (1)

HiWi adapts parameters by an adapter of their own, which is thrown away after training:

    W' = W + f(W W_down) W_up                                                                               (2)

W is a batch of row vectors (a bias is one), W_down (d, r), W_up (r, d), f is GELU. By default W are the biases of the
channel mixers. Stored for each task: k values, or the changed biases.

Source: 2305.16742, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tevo.card import Card
from tevo.contracts import Adapter
from tevo.functional.freezing import freeze, owned, trained

CARD = Card(
    id="pafi_hiwi",
    role="adapter",
    summary="Trains the smallest parameters alone (PaFi), or an adapter of parameters that is folded away (HiWi).",
    equations=(
        r"\theta \leftarrow \theta - \eta\, m \odot \nabla,\quad m = \mathbb{1}[|\theta| \text{ among the } k "
        r"\text{ smallest}]",
        r"W' = W + f(W W_{\mathrm{down}}) W_{\mathrm{up}}",
    ),
    exports={"pafi": "PaFi", "hiwi": "HiWi"},
    cost="n^2",
    memory="n",
    claims=("bidirectional", "padding", "merges", "unchanged_at_start"),
    examples=(
        {"part": "pafi"},
        {"part": "pafi", "fraction": 0.2},
        {"part": "hiwi", "rank": 5},
        {"part": "hiwi", "rank": 2, "targets": ("*.channel.*",)},
    ),
    departures=(
        "PaFi's parameters are trained as a list of k values in place of a masked gradient: the steps of any optimiser "
        "are the same, and its state, weight decay and what is stored are those of k values.",
        "The paper leaves HiWi's f open; it is GELU.",
        "The authors' code could not be had: what is excluded (here all but the blocks) and the initial scale of W_down "
        "(here the uniform rule of a linear layer) follow the paper's text alone, and no official values were compared.",
    ),
    notes="HiWi's default needs channel mixers with biases. A fresh head is trained too if named in also=('head.*',).",
)


def smallest(values: Sequence[Tensor], k: int) -> list[Tensor]:
    """Flat indices into each of ``values`` of the ``k`` entries that are smallest in absolute value among all."""
    chosen = torch.cat([v.detach().abs().flatten() for v in values]).topk(k, largest=False).indices.sort().values
    found, start = [], 0
    for v in values:
        found.append(chosen[(chosen >= start) & (chosen < start + v.numel())] - start)
        start += v.numel()
    return found


def adapted(w: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Equation (2): w (..., d), down (d, r), up (r, d)."""
    return w + F.gelu(w @ down) @ up


class Replaced(nn.Module):
    """A parameter with some entries of their own (eq. 1): ``index`` (k,) into the flat parameter, ``values`` (k,)."""

    index: Tensor

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(weight.detach().flatten()[index])

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter with its new entries."""
        return weight.flatten().index_put((self.index,), self.values).view_as(weight)


class Adapted(nn.Module):
    """A parameter under its adapter (eq. 2)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(weight.shape[-1], rank))
        self.up = nn.Parameter(weight.new_empty(rank, weight.shape[-1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_up is zero, so that the model starts as it was."""
        nn.init.kaiming_uniform_(self.down.mT, a=5**0.5)
        nn.init.zeros_(self.up)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter as it is used."""
        return adapted(weight, self.down, self.up)


def fold(model: nn.Module, kind: type[nn.Module]) -> None:
    """Write what a kind of parametrisation makes of its parameters into them, and drop it.

    Raises:
        ValueError: there is none.
    """
    found = False
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name, steps in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            if any(isinstance(step, kind) for step in steps):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                found = True
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing to merge; call attach(model) first")


class PaFi(Adapter):
    """Trains the smallest parameters.

    Args:
        fraction: share of the target parameters' entries that is trained, in (0, 1].
        targets: shell patterns of the names of parameters to choose among; by default all of the blocks.
        also: patterns of parameters that are trained whole, such as a fresh head.
    """

    def __init__(
        self, *, fraction: float = 0.005, targets: Sequence[str] = ("*blocks.*",), also: Sequence[str] = ()
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"PaFi got fraction={fraction}, expected a share in (0, 1]")
        self.fraction, self.targets, self.also = fraction, targets, also

    def attach(self, model: nn.Module) -> list[nn.Parameter]:
        """Give the smallest entries a list of their own; all else is frozen."""
        found = owned(model, self.targets)
        freeze(model, self.also)
        weights = [getattr(module, name) for module, name in found]
        k = max(1, round(self.fraction * sum(w.numel() for w in weights)))
        for (module, name), weight, index in zip(found, weights, smallest(weights, k), strict=True):
            if len(index):
                parametrize.register_parametrization(module, name, Replaced(weight, index))
        return trained(model)

    def merge(self, model: nn.Module) -> None:
        """Write the trained entries back; parameters stay frozen."""
        fold(model, Replaced)


class HiWi(Adapter):
    """Trains an adapter of parameters.

    Args:
        rank: width r of the adapter, >= 1; what is stored after merging does not depend on it.
        targets: shell patterns of the names of parameters to adapt; by default the biases of the channel mixers.
        also: patterns of parameters that are trained whole, such as a fresh head.
    """

    def __init__(self, *, rank: int, targets: Sequence[str] = ("*.channel.*bias",), also: Sequence[str] = ()) -> None:
        if rank < 1:
            raise ValueError(f"HiWi got rank={rank}, expected at least 1")
        self.rank, self.targets, self.also = rank, targets, also

    def attach(self, model: nn.Module) -> list[nn.Parameter]:
        """Put an adapter under each target; all else is frozen."""
        found = owned(model, self.targets)
        freeze(model, self.also)
        for module, name in found:
            parametrize.register_parametrization(module, name, Adapted(getattr(module, name), self.rank))
        return trained(model)

    def merge(self, model: nn.Module) -> None:
        """Compute the parameters once and throw the adapters away; parameters stay frozen."""
        fold(model, Adapted)
