"""Published variants as models, by name: ``preset("bo-qsa")``. Each builder says where its numbers are from.

Weights start as this house's modules do, and convolutions are padded as the reference's, whatever the source has.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tevo.names import suggest
from tevo.slot_attention.aggregation import WeightedMean
from tevo.slot_attention.competition import Mesh
from tevo.slot_attention.gradient import BiLevel
from tevo.slot_attention.init import LearnedQueries
from tevo.slot_attention.invariant import Translation, invariant_autoencoder
from tevo.slot_attention.models import SlotAutoencoder, SlotEncoder, SlotSetPredictor
from tevo.slot_attention.module import SlotAttention

__all__ = ["PRESETS", "DropPath", "bo_qsa", "isa_t", "mesh", "preset"]


class DropPath(nn.Module):
    """Stochastic depth: in training each row of a batch is zeroed with a probability, the others scaled to keep the mean.

    Args:
        probability: in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"DropPath got probability={probability}, expected 0 or more, below 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (b, ...), the same shape back."""
        if not self.training or not self.probability:
            return x
        kept = 1 - self.probability
        return x * x.new_empty(x.shape[0], *(1 for _ in x.shape[1:])).bernoulli_(kept) / kept


def bo_qsa() -> SlotAutoencoder:
    """BO-QSA, the mixture decoder's form for ShapeStacks: learned queries, bi-level gradient, eps 1 in the mean, drop-path.

    128 x 128 pixels, 8 slots. Queries have no noise, as in the authors' test; in training they let the buffer
    ``slot_attention.slots_sigma`` fall as (1 + cos(pi t)) / 2 over 30,000 steps. They train with Adam at 4e-4, 5,000 steps
    of warm-up, halved every 50,000, clipped at 1, batch 128, for 250,000 steps.

    Departure: the MLP before the slots is 64 wide inside, theirs 128.

    Source: 2210.08990; YuLiu-LY/BO-QSA, commit e5414ee, ``models/slot_attn.py``, ``train/train_mixture_dec.py`` and
    ``scripts/train/mix_dec_shapestacks.sh``.
    """
    size, dim = (128, 128), 64
    model = SlotAutoencoder(image_size=size, num_slots=8, dim=dim)
    model.encoder = SlotEncoder(image_size=size, channels=dim, strides=(2, 1, 1, 1))
    model.slot_attention = SlotAttention(
        dim=dim,
        num_slots=8,
        hidden_dim=128,
        norm_eps=1e-5,
        init=LearnedQueries(std=None),
        aggregation=WeightedMean(eps=0.0, offset=1.0),
        gradient=BiLevel(),
    )
    assert model.slot_attention.mlp is not None
    model.slot_attention.mlp.append(DropPath(0.2))
    return model


def mesh() -> SlotSetPredictor:
    """The reference's set predictor with MESH: 5 rounds of Sinkhorn, 4 descents of size 8 on the plan's entropy.

    The released code has object discovery only, so the numbers of the slot module are from there, the model around it is the
    reference's. They train with Adam at 4e-4, clipped at 0.1, batch 64.

    Source: 2301.13197; davzha/MESH, commit c7e8320, ``config/model/slot_attention/mesh.yaml``.
    """
    model = SlotSetPredictor()
    model.slot_attention = SlotAttention(dim=64, num_slots=10, hidden_dim=128, norm_eps=1e-5, competition=Mesh())
    return model


def isa_t() -> SlotAutoencoder:
    """Invariant Slot Attention whose slots know no place, in the authors' form for Tetrominoes.

    35 x 35 pixels, 4 learned queries that start at random places, and an MLP of each pixel as decoder. They train on 512
    images in [0, 1], with Adam at 4e-4, 5,000 steps of warm-up, the cosine to 0, an error that is summed over an image
    clipped at 0.05, batch 64, for 20,000 steps.

    Source: 2302.04973; google-research, commit 4c42994, ``invariant_slot_attention/configs/tetrominoes/equiv_transl.py``.
    """
    return invariant_autoencoder(image_size=(35, 35), frame=Translation(), num_slots=4)


PRESETS: dict[str, Callable[[], SlotAutoencoder | SlotSetPredictor]] = {
    "bo-qsa": bo_qsa,
    "isa-t": isa_t,
    "mesh": mesh,
}


def preset(name: str) -> SlotAutoencoder | SlotSetPredictor:
    """A freshly initialised model by its name in ``PRESETS``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{suggest(name, PRESETS)}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()
