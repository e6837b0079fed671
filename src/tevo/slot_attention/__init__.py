"""Slot Attention, end to end: the module, its variants, models, data, metrics. Names are resolved on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "AdaptiveDecoder": "adaptive",
    "Background": "init",
    "BatchNormalisedSum": "aggregation",
    "BiLevel": "gradient",
    "FeatureAutoencoder": "features",
    "FeatureFile": "features",
    "GumbelSoftmax": "competition",
    "Implicit": "gradient",
    "InvariantSlotAttention": "invariant",
    "JointSoftmax": "competition",
    "LearnedQueries": "init",
    "LearnedSum": "aggregation",
    "Mesh": "competition",
    "NormalisedSum": "aggregation",
    "PatchDecoder": "patches",
    "PatchEncoder": "patches",
    "ProbabilisticSlotAttention": "mixture",
    "ScaledSum": "aggregation",
    "SharedGaussian": "init",
    "Sinkhorn": "competition",
    "SlotAttention": "module",
    "SlotAutoencoder": "models",
    "SlotMixture": "mixture",
    "SlotSetPredictor": "models",
    "SlotSoftmax": "competition",
    "SparseReconstruction": "adaptive",
    "Sum": "aggregation",
    "Truncated": "gradient",
    "UnitGaussian": "init",
    "Unrolled": "gradient",
    "WeightedMean": "aggregation",
    "ari": "metrics",
    "average_precision": "metrics",
    "average_precision_per_image": "metrics",
    "fg_ari": "metrics",
    "from_keras": "convert",
    "from_lucidrains": "convert",
    "from_pretrained": "hub",
    "from_savi": "convert",
    "from_slate": "convert",
    "hungarian_huber": "matching",
    "mean_best_overlap": "metrics",
    "mean_iou": "metrics",
    "preset": "presets",
    "save_pretrained": "hub",
}

__all__ = [
    "AdaptiveDecoder",
    "Background",
    "BatchNormalisedSum",
    "BiLevel",
    "FeatureAutoencoder",
    "FeatureFile",
    "GumbelSoftmax",
    "Implicit",
    "InvariantSlotAttention",
    "JointSoftmax",
    "LearnedQueries",
    "LearnedSum",
    "Mesh",
    "NormalisedSum",
    "PatchDecoder",
    "PatchEncoder",
    "ProbabilisticSlotAttention",
    "ScaledSum",
    "SharedGaussian",
    "Sinkhorn",
    "SlotAttention",
    "SlotAutoencoder",
    "SlotMixture",
    "SlotSetPredictor",
    "SlotSoftmax",
    "SparseReconstruction",
    "Sum",
    "Truncated",
    "UnitGaussian",
    "Unrolled",
    "WeightedMean",
    "ari",
    "average_precision",
    "average_precision_per_image",
    "fg_ari",
    "from_keras",
    "from_lucidrains",
    "from_pretrained",
    "from_savi",
    "from_slate",
    "hungarian_huber",
    "mean_best_overlap",
    "mean_iou",
    "preset",
    "save_pretrained",
]

if TYPE_CHECKING:
    from tevo.slot_attention.adaptive import AdaptiveDecoder, SparseReconstruction
    from tevo.slot_attention.aggregation import (
        BatchNormalisedSum,
        LearnedSum,
        NormalisedSum,
        ScaledSum,
        Sum,
        WeightedMean,
    )
    from tevo.slot_attention.competition import GumbelSoftmax, JointSoftmax, Mesh, Sinkhorn, SlotSoftmax
    from tevo.slot_attention.convert import from_keras, from_lucidrains, from_savi, from_slate
    from tevo.slot_attention.features import FeatureAutoencoder, FeatureFile
    from tevo.slot_attention.gradient import BiLevel, Implicit, Truncated, Unrolled
    from tevo.slot_attention.hub import from_pretrained, save_pretrained
    from tevo.slot_attention.init import Background, LearnedQueries, SharedGaussian, UnitGaussian
    from tevo.slot_attention.invariant import InvariantSlotAttention
    from tevo.slot_attention.matching import hungarian_huber
    from tevo.slot_attention.metrics import (
        ari,
        average_precision,
        average_precision_per_image,
        fg_ari,
        mean_best_overlap,
        mean_iou,
    )
    from tevo.slot_attention.mixture import ProbabilisticSlotAttention, SlotMixture
    from tevo.slot_attention.models import SlotAutoencoder, SlotSetPredictor
    from tevo.slot_attention.module import SlotAttention
    from tevo.slot_attention.patches import PatchDecoder, PatchEncoder
    from tevo.slot_attention.presets import preset


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
