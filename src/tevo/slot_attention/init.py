"""Where Slot Attention's slots start. A strategy registers its parameters on the module and draws (b, k, d) from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class Init(Protocol):
    """Registers ``slots_*`` parameters on its owner, and draws initial slots from them."""

    def build(self, owner: nn.Module, dim: int, num_slots: int) -> None:
        """Register the parameters, without values."""
        ...

    def reset(self, owner: nn.Module) -> None:
        """Give them their initial values."""
        ...

    def draw(self, owner: nn.Module, noise: Tensor) -> Tensor:
        """Initial slots (b, k, d) from standard normal ``noise`` (b, k, d)."""
        ...


@dataclass(frozen=True)
class SharedGaussian:
    """s = mu + exp(log_sigma) * noise, one mu and log_sigma (d) for all slots. The paper's."""

    def build(self, owner: nn.Module, dim: int, num_slots: int) -> None:
        """``slots_mu`` and ``slots_log_sigma``, (1, 1, d)."""
        for name in ("slots_mu", "slots_log_sigma"):
            owner.register_parameter(name, nn.Parameter(torch.empty(1, 1, dim)))

    def reset(self, owner: nn.Module) -> None:
        """The reference's Glorot rule sees 1 input and d outputs in the shape (1, 1, d)."""
        for name in ("slots_mu", "slots_log_sigma"):
            parameter = owner.get_parameter(name)
            bound = (6 / (1 + parameter.shape[-1])) ** 0.5
            nn.init.uniform_(parameter, -bound, bound)

    def draw(self, owner: nn.Module, noise: Tensor) -> Tensor:
        """``noise`` (b, k, d) for any k."""
        return _own(owner, "slots_mu") + _own(owner, "slots_log_sigma").exp() * noise


@dataclass(frozen=True)
class UnitGaussian:
    """s = noise: no parameters."""

    def build(self, owner: nn.Module, dim: int, num_slots: int) -> None:
        """Nothing."""

    def reset(self, owner: nn.Module) -> None:
        """Nothing."""

    def draw(self, owner: nn.Module, noise: Tensor) -> Tensor:
        """``noise`` (b, k, d) for any k."""
        return noise


@dataclass(frozen=True)
class LearnedQueries:
    """s_k = mu_k + sigma * noise * sg(mu_k): a learned query for each slot, noisy if sigma > 0.

    Args:
        std: standard deviation of the initial queries; None: Glorot uniform over (slots, d), as an embedding.
        sigma: initial value of the buffer ``slots_sigma``, which a training loop may anneal; BO-QSA goes from 1 to 0.
    """

    std: float | None = 1.0
    sigma: float = 0.0

    def build(self, owner: nn.Module, dim: int, num_slots: int) -> None:
        """``slots_queries`` (1, k, d) and the buffer ``slots_sigma``."""
        owner.register_parameter("slots_queries", nn.Parameter(torch.empty(1, num_slots, dim)))
        owner.register_buffer("slots_sigma", torch.tensor(float(self.sigma)))

    def reset(self, owner: nn.Module) -> None:
        """Normal or Glorot."""
        queries = owner.get_parameter("slots_queries")
        if self.std is None:
            bound = (6 / (queries.shape[1] + queries.shape[2])) ** 0.5
            nn.init.uniform_(queries, -bound, bound)
        else:
            nn.init.normal_(queries, std=self.std)

    def draw(self, owner: nn.Module, noise: Tensor) -> Tensor:
        """``noise`` (b, k, d) for k up to the number of queries: the first k are used."""
        queries = _own(owner, "slots_queries")
        k = noise.shape[1]
        if k > queries.shape[1]:
            raise ValueError(
                f"LearnedQueries has queries for {queries.shape[1]} slots, got num_slots={k}; ask for fewer, or build the "
                "module with more"
            )
        queries = queries[:, :k]
        return queries + owner.get_buffer("slots_sigma") * noise * queries.detach()


@dataclass(frozen=True)
class Background:
    """s_1 is a learned query, for the background; the other slots start as ``others`` says.

    Args:
        others: a strategy for slots 2 to k.
    """

    others: Init = field(default_factory=SharedGaussian)

    def build(self, owner: nn.Module, dim: int, num_slots: int) -> None:
        """``slots_background`` (1, 1, d), and what the others need."""
        owner.register_parameter("slots_background", nn.Parameter(torch.empty(1, 1, dim)))
        self.others.build(owner, dim, max(1, num_slots - 1))

    def reset(self, owner: nn.Module) -> None:
        """A unit normal for the background."""
        nn.init.normal_(owner.get_parameter("slots_background"))
        self.others.reset(owner)

    def draw(self, owner: nn.Module, noise: Tensor) -> Tensor:
        """``noise`` (b, k, d); that of the first slot is not used."""
        first = _own(owner, "slots_background").expand(noise.shape[0], -1, -1)
        return torch.cat([first, self.others.draw(owner, noise[:, 1:])], 1)


def _own(owner: nn.Module, name: str) -> Tensor:
    """A parameter of the owner, or the tensor that ``torch.func.functional_call`` has put in its place."""
    value = getattr(owner, name)
    assert isinstance(value, Tensor)
    return value
