"""Slot Attention, end to end: the module, its variants, models, data, metrics. Names are resolved on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "Background": "init",
    "BatchNormalisedSum": "aggregation",
    "BiLevel": "gradient",
    "GumbelSoftmax": "competition",
    "Implicit": "gradient",
    "JointSoftmax": "competition",
    "LearnedQueries": "init",
    "LearnedSum": "aggregation",
    "Mesh": "competition",
    "NormalisedSum": "aggregation",
    "ScaledSum": "aggregation",
    "SharedGaussian": "init",
    "Sinkhorn": "competition",
    "SlotAttention": "module",
    "SlotSoftmax": "competition",
    "Sum": "aggregation",
    "Truncated": "gradient",
    "UnitGaussian": "init",
    "Unrolled": "gradient",
    "WeightedMean": "aggregation",
}

__all__ = [
    "Background",
    "BatchNormalisedSum",
    "BiLevel",
    "GumbelSoftmax",
    "Implicit",
    "JointSoftmax",
    "LearnedQueries",
    "LearnedSum",
    "Mesh",
    "NormalisedSum",
    "ScaledSum",
    "SharedGaussian",
    "Sinkhorn",
    "SlotAttention",
    "SlotSoftmax",
    "Sum",
    "Truncated",
    "UnitGaussian",
    "Unrolled",
    "WeightedMean",
]

if TYPE_CHECKING:
    from tevo.slot_attention.aggregation import (
        BatchNormalisedSum,
        LearnedSum,
        NormalisedSum,
        ScaledSum,
        Sum,
        WeightedMean,
    )
    from tevo.slot_attention.competition import GumbelSoftmax, JointSoftmax, Mesh, Sinkhorn, SlotSoftmax
    from tevo.slot_attention.gradient import BiLevel, Implicit, Truncated, Unrolled
    from tevo.slot_attention.init import Background, LearnedQueries, SharedGaussian, UnitGaussian
    from tevo.slot_attention.module import SlotAttention


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
