"""How slots compete for inputs: from queries q and keys k to weights a (b, h, k, n) that say which slot wins which input.

A strategy may register modules on its owner. Those whose weights for an input depend on its scaled dot products alone are
``local``: the fast forms of :mod:`tevo.functional.slot_attention` hold for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.functional.slot_attention import compete
from tevo.slot_attention.aggregation import Aggregation, Sum, WeightedMean

# smallest marginal of a transport plan, which keeps its logarithm finite
SMALLEST_MARGINAL = 1e-30


class Scene(NamedTuple):
    """What the iterations of one call share.

    Args:
        mask: (b, n) bool, True = real input.
        slot_mask: (b, k) bool, True = real slot.
        marginal: (b, n) logarithm of the mass that each input sends, of a transport plan.
        noise: (b, k, n) of its costs.
    """

    mask: Tensor | None
    slot_mask: Tensor | None
    marginal: Tensor | None = None
    noise: Tensor | None = None


class Competition(Protocol):
    """From queries and keys to weights."""

    @property
    def local(self) -> bool:
        """Whether an input's weights depend on its scaled dot products alone, by :func:`compete`."""
        ...

    @property
    def joint(self) -> bool:
        """Whether heads compete as well."""
        ...

    def aggregation(self) -> Aggregation:
        """What the authors put behind it."""
        ...

    def build(self, owner: nn.Module, dim: int, input_dim: int, heads: int, hidden_dim: int) -> None:
        """Register what is learned."""
        ...

    def scale(self, width: int) -> float:
        """Factor of the queries for heads of that width."""
        ...

    def prepare(self, owner: nn.Module, inputs: Tensor, slots: Tensor, scene: Scene) -> Scene:
        """Before the first iteration, from normalised inputs (b, n, d_in) and initial slots (b, k, d)."""
        ...

    def weights(self, owner: nn.Module, q: Tensor, k: Tensor, slots: Tensor, scene: Scene) -> Tensor:
        """Scaled q (b, h, k, e), k (b, h, n, e) and normalised slots (b, k, d) give weights (b, h, k, n)."""
        ...


class _Softmax:
    """A softmax of scaled dot products: what the forms of it share."""

    @property
    def local(self) -> bool:
        """Yes."""
        return True

    @property
    def joint(self) -> bool:
        """Slots alone compete."""
        return False

    def aggregation(self) -> Aggregation:
        """The weighted mean."""
        return WeightedMean()

    def build(self, owner: nn.Module, dim: int, input_dim: int, heads: int, hidden_dim: int) -> None:
        """Nothing."""

    def prepare(self, owner: nn.Module, inputs: Tensor, slots: Tensor, scene: Scene) -> Scene:
        """Nothing."""
        return scene

    def weights(self, owner: nn.Module, q: Tensor, k: Tensor, slots: Tensor, scene: Scene) -> Tensor:
        """The softmax."""
        return compete(q @ k.mT, joint=self.joint, mask=scene.mask, slot_mask=scene.slot_mask)


@dataclass(frozen=True)
class SlotSoftmax(_Softmax):
    """a = softmax over slots of q k^T / (sqrt(e) temperature), for each head. The paper's; with heads SAVi's.

    Args:
        temperature: > 0; high ones share inputs among slots.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse other temperatures."""
        _positive(type(self).__name__, "temperature", self.temperature)

    def scale(self, width: int) -> float:
        """1 / (sqrt(e) temperature)."""
        return width**-0.5 / self.temperature


@dataclass(frozen=True)
class JointSoftmax(_Softmax):
    """a = softmax over slots and heads together of q k^T / (sqrt(e) temperature): SLATE's.

    Args:
        temperature: > 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse other temperatures."""
        _positive("JointSoftmax", "temperature", self.temperature)

    @property
    def joint(self) -> bool:
        """Heads compete too."""
        return True

    def scale(self, width: int) -> float:
        """1 / (sqrt(e) temperature)."""
        return width**-0.5 / self.temperature


@dataclass(frozen=True)
class GumbelSoftmax(_Softmax):
    """a = softmax over slots of (q k^T / sqrt(e) + g) / temperature, g standard Gumbel in training, 0 in evaluation.

    Args:
        temperature: > 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse other temperatures."""
        _positive("GumbelSoftmax", "temperature", self.temperature)

    @property
    def local(self) -> bool:
        """The noise is drawn for keys that exist."""
        return False

    def scale(self, width: int) -> float:
        """1 / (sqrt(e) temperature)."""
        return width**-0.5 / self.temperature

    def weights(self, owner: nn.Module, q: Tensor, k: Tensor, slots: Tensor, scene: Scene) -> Tensor:
        """The softmax with noise."""
        logits = q @ k.mT
        if owner.training:
            logits = logits - torch.empty_like(logits).exponential_().log() / self.temperature
        return compete(logits, mask=scene.mask, slot_mask=scene.slot_mask)


@dataclass(frozen=True)
class Sinkhorn:
    """a = a transport plan from inputs to slots at the cost |q - k|, entropy-regularised.

        p = -cost / t;  ``rounds`` times: u = log alpha - logsumexp over slots (p + v), v = log beta - logsumexp over inputs
        (p + u);  a = exp(p + u + v)

    with marginals alpha (inputs) and beta (slots), each k times the softmax of an MLP. The update is the sum a v. One head.

    Args:
        rounds: of both halves.
        temperature: t > 0.
        marginal: total mass of either marginal; by default the number of (real) slots.
    """

    rounds: int = 5
    temperature: float = 1.0
    marginal: float | None = None

    def __post_init__(self) -> None:
        """Refuse other temperatures, and no rounds."""
        _positive(type(self).__name__, "temperature", self.temperature)
        _positive(type(self).__name__, "rounds", self.rounds)

    @property
    def local(self) -> bool:
        """Inputs compete for the slots' mass."""
        return False

    @property
    def joint(self) -> bool:
        """There is one head."""
        return False

    def aggregation(self) -> Aggregation:
        """The plan's sums are its marginals already."""
        return Sum()

    def build(self, owner: nn.Module, dim: int, input_dim: int, heads: int, hidden_dim: int) -> None:
        """``slot_marginals`` and ``input_marginals``: MLPs to one number, without bias at the end."""
        if heads != 1:
            raise ValueError(
                f"{type(self).__name__} makes one plan, got heads={heads}; build SlotAttention with heads=1"
            )
        for name, width in (("slot_marginals", dim), ("input_marginals", input_dim)):
            mlp = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1, bias=False))
            owner.add_module(name, mlp)

    def scale(self, width: int) -> float:
        """Distances are not scaled."""
        return 1.0

    def prepare(self, owner: nn.Module, inputs: Tensor, slots: Tensor, scene: Scene) -> Scene:
        """The marginal of the inputs."""
        return scene._replace(marginal=self._marginal(owner, "input_marginals", inputs, scene.mask, slots, scene))

    def weights(self, owner: nn.Module, q: Tensor, k: Tensor, slots: Tensor, scene: Scene) -> Tensor:
        """The plan (b, 1, k, n)."""
        beta = self._marginal(owner, "slot_marginals", slots, scene.slot_mask, slots, scene)
        # the form by a product of matrices, which torch takes for more than 25 keys, loses digits and fixes n in a graph
        cost = torch.cdist(q[:, 0], k[:, 0], compute_mode="donot_use_mm_for_euclid_dist")
        plan = self._plan(cost, beta, scene)
        if scene.mask is not None:
            plan = plan.masked_fill(~scene.mask[:, None], 0.0)
        if scene.slot_mask is not None:
            plan = plan.masked_fill(~scene.slot_mask[..., None], 0.0)
        return plan[:, None]

    def _marginal(
        self, owner: nn.Module, name: str, items: Tensor, mask: Tensor | None, slots: Tensor, scene: Scene
    ) -> Tensor:
        """Logarithms (b, items)."""
        # the module may be held in half precision, and its sums over inputs are not to be taken in it
        logits = owner.get_submodule(name)(items.to(next(owner.get_submodule(name).parameters()).dtype)).squeeze(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if mask is not None:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        total: Tensor | float = slots.shape[1] if self.marginal is None else self.marginal
        if self.marginal is None and scene.slot_mask is not None:
            total = scene.slot_mask.sum(-1, keepdim=True)
        return (total * logits.softmax(-1)).clamp(min=SMALLEST_MARGINAL).log()

    def _plan(self, cost: Tensor, beta: Tensor, scene: Scene) -> Tensor:
        """Cost (b, k, n), beta (b, k) give the plan (b, k, n)."""
        assert scene.marginal is not None
        return sinkhorn(cost / self.temperature, scene.marginal, beta, self.rounds, _start(beta, scene))[0]


@dataclass(frozen=True)
class Mesh(Sinkhorn):
    """Sinkhorn after its cost has been moved to where the plan has less entropy H, so that ties are broken.

        cost <- cost + noise;  ``descents`` times: cost <- cost - rate g / |g|,  g = d H(plan(cost)) / d cost

    at t = 1, with v kept from one plan to the next; g is a constant to the gradient.

    Args:
        descents: steps on the entropy.
        rate: size of a step.
        noise: standard deviation of what is added to the cost; one draw serves all iterations of a call.
    """

    descents: int = 4
    rate: float = 8.0
    noise: float = 0.001

    def prepare(self, owner: nn.Module, inputs: Tensor, slots: Tensor, scene: Scene) -> Scene:
        """The marginal of the inputs, and the noise."""
        scene = super().prepare(owner, inputs, slots, scene)
        return scene._replace(noise=self.noise * self.draw(inputs, slots.shape[1]))

    def draw(self, inputs: Tensor, k: int) -> Tensor:
        """Standard normal (b, k, n) for ``inputs`` (b, n, d_in)."""
        return torch.randn(inputs.shape[0], k, inputs.shape[1], dtype=inputs.dtype, device=inputs.device)

    def _plan(self, cost: Tensor, beta: Tensor, scene: Scene) -> Tensor:
        assert scene.marginal is not None and scene.noise is not None
        alpha = scene.marginal

        def entropy(cost: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            plan, v = sinkhorn(cost, alpha, beta, self.rounds, v)
            return torch.special.entr(plan.clamp(1e-20, 1.0)).mean((1, 2)).sum(), v

        cost, v = cost + scene.noise, _start(beta, scene)
        for _ in range(self.descents):
            slope, v = torch.func.grad(entropy, has_aux=True)(cost, v)
            slope = F.normalize(slope.detach().flatten(1) + 1e-20, dim=1).view_as(cost)
            cost = cost - self.rate * slope
        return sinkhorn(cost / self.temperature, alpha, beta, self.rounds, v)[0]


def sinkhorn(cost: Tensor, alpha: Tensor, beta: Tensor, rounds: int, v: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (b, k, n) of ``cost`` (b, k, n) and the slots' potential v (b, k), from the one given.

    ``alpha`` (b, n) and ``beta`` (b, k) are logarithms of the marginals.
    """
    u = torch.zeros_like(alpha)
    for _ in range(rounds):
        u = alpha - (v[..., None] - cost).logsumexp(1)
        v = beta - (u[:, None] - cost).logsumexp(2)
    return (u[:, None] + v[..., None] - cost).exp(), v


def _start(beta: Tensor, scene: Scene) -> Tensor:
    """Zeros, but nothing for a masked slot."""
    v = torch.zeros_like(beta)
    return v if scene.slot_mask is None else v.masked_fill(~scene.slot_mask, math.log(SMALLEST_MARGINAL))


def _positive(owner: str, name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{owner} got {name}={value}, expected a number above 0")
