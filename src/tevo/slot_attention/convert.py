"""Weights of others as state dicts of the house.

Keras stores dense kernels (in, out), convolution kernels (rows, columns, in, out), transposed ones
(rows, columns, out, in), and the gates of a GRU in the order z, r, h with both bias rows in one array; here they are
(out, in), (out, in, rows, columns), (in, out, rows, columns) and r, z, n with two biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["from_keras"]

# layer of the reference -> layer of the house; those of the slot module may stand behind "slot_attention."
_SLOTS = {
    "norm_inputs": "norm_inputs",
    "norm_slots": "norm_slots",
    "norm_mlp": "norm_mlp",
    "project_q": "q",
    "project_k": "k",
    "project_v": "v",
    "mlp.0": "mlp.0",
    "mlp.1": "mlp.2",
}
_AROUND = {
    **{f"encoder_cnn.{i}": f"encoder.convolutions.{i}" for i in range(4)},
    "encoder_pos.dense": "encoder.position.project",
    "layer_norm": "encoder.norm",
    "feedforward.0": "encoder.mlp.0",
    "feedforward.1": "encoder.mlp.2",
    **{f"decoder_cnn.{i}": f"decoder.convolutions.{i}" for i in range(6)},
    "decoder_pos.dense": "decoder.position.project",
    "mlp_classifier.0": "head.0",
    "mlp_classifier.1": "head.2",
}
_LAYERS = {**_AROUND, **_SLOTS, **{f"slot_attention.{name}": f"slot_attention.{to}" for name, to in _SLOTS.items()}}
_NAMES = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def from_keras(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """State dict of the slot module, the autoencoder or the set predictor from the reference's arrays by name.

    Args:
        arrays: names such as ``project_q.kernel`` (module) or ``encoder_cnn.0.kernel``,
            ``slot_attention.project_q.kernel``, ``mlp_classifier.1.bias`` (models).

    Raises:
        ValueError: an unknown name, or an array of a shape that the layer does not have in the reference.
    """
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        for key, value in _entry(name, np.asarray(array)).items():
            state[key] = torch.from_numpy(np.array(value, order="C"))
    return state


def _entry(name: str, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    layer, _, kind = name.rpartition(".")
    if kind in ("slots_mu", "slots_log_sigma") and layer in ("", "slot_attention"):
        return {name: array}
    if layer in ("gru", "slot_attention.gru"):
        return _gru(name, layer, kind, array)
    if layer not in _LAYERS or kind not in _NAMES:
        raise ValueError(f"from_keras got the unknown name {name!r}; give the names of the reference's variables")
    dimensions = 1 if kind != "kernel" else 4 if "_cnn." in layer else 2
    if array.ndim != dimensions:
        raise ValueError(f"from_keras got {name} of shape {array.shape}, expected {dimensions} dimensions as in Keras")
    if kind == "kernel":
        array = array.transpose(3, 2, 0, 1) if dimensions == 4 else array.T
    return {f"{_LAYERS[layer]}.{_NAMES[kind]}": array}


def _gru(name: str, layer: str, kind: str, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if array.ndim != 2 or array.shape[1] % 3 or (kind == "bias" and len(array) != 2):
        raise ValueError(
            f"from_keras got {name} of shape {array.shape}, expected (rows, 3 x slot width), of the bias with two rows: a "
            "GRU with reset_after=True"
        )
    z, r, n = np.split(array, 3, axis=1)
    gates = np.concatenate([r, z, n], axis=1)
    if kind == "kernel":
        return {f"{layer}.weight_ih": gates.T}
    if kind == "recurrent_kernel":
        return {f"{layer}.weight_hh": gates.T}
    if kind == "bias":
        return {f"{layer}.bias_ih": gates[0], f"{layer}.bias_hh": gates[1]}
    raise ValueError(f"from_keras got the unknown name {name!r}; give the names of the reference's variables")
