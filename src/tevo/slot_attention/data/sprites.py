"""Squares, ellipses and hearts that hide each other, made like the three public Multi-dSprites sets: 64 x 64 pixels.

A sprite has one of 6 scales 0.5..1, 40 angles 0..2 pi (both ends, as dSprites) and 32 x 32 places, one pixel apart; at
scale 1 the square's side is 22 pixels, the ellipse's half axes are 14 and 7, and the heart is

    (u^2 + v^2 - 1)^3 <= u^2 v^3,        u = x / 12, v = -y / 12 + 0.28

each hard-edged: a pixel belongs to it if half of 4 x 4 points do. Later sprites lie on earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tevo.bench.tasks.contract import Draws, below
from tevo.slot_attention.data.draws import Doubles, Indices, chosen, draws, uniform
from tevo.slot_attention.data.layout import Images, Scene

__all__ = ["VARIANTS", "hsv_to_rgb", "multi_dsprites_like"]

SIZE, PATCH, POINTS = 64, 32, 4
SHAPES, SCALES, ANGLES, PLACES = 3, 6, 40, 32
MOST = 5  # sprites drawn for every scene, so that the variants share their random numbers
DRAWS = 1 + 3 + 8 * MOST


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How many sprites, and the colours.

    Args:
        least: sprites at least.
        most: sprites at most; one entity more with the background.
        channels: of the image.
    """

    least: int
    most: int
    channels: int = 3


VARIANTS = {
    "binarized": Variant(least=2, most=3, channels=1),
    "colored_on_grayscale": Variant(least=2, most=5),
    "colored_on_colored": Variant(least=1, most=4),
}


def multi_dsprites_like(seed: int, indices: Indices, *, variant: str = "colored_on_grayscale") -> Scene:
    """Scenes ``indices`` (b,) of the endless set of ``seed``.

    "binarized": 2 to 3 white sprites on black, one channel. "colored_on_grayscale": 2 to 5 sprites, hue, saturation and
    value uniform, on a uniform grey. "colored_on_colored": 1 to 4 sprites, red, green and blue of all uniform.

    Args:
        seed: which set; any integer.
        indices: scene numbers, >= 0.
        variant: one of ``VARIANTS``.

    Returns:
        "image" (b, 64, 64, c), "ids" (b, 64, 64), and float32 factors of E entities, the background first: "x", "y" and
        "orientation" as dSprites has them (0..1, and radians), "shape" 1 square, 2 ellipse, 3 heart, "color" (b, E, c)
        in 0..1, "visibility" (listed, if only behind others), "scale". A sprite may be wholly hidden.

    Raises:
        ValueError: indices that are not integers >= 0, or no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"multi_dsprites_like: variant={variant!r}, expected one of {', '.join(VARIANTS)}")
    kind, numbers = VARIANTS[variant], chosen("multi_dsprites_like", indices)
    b, entities = len(numbers), 1 + kind.most
    raw = draws(f"multi_dsprites_like {variant}", seed, numbers, DRAWS)
    count = kind.least + below(raw[:, 0], kind.most - kind.least + 1)
    sprite = raw[:, 4:].reshape(b, MOST, 8)[:, : kind.most]
    listed = np.arange(kind.most) < count[:, None]  # b most
    shape, scale, angle, x, y = (
        below(sprite[..., i], n) for i, n in enumerate((SHAPES, SCALES, ANGLES, PLACES, PLACES))
    )
    colours = np.concatenate([_background(variant, raw[:, 1:4])[:, None], _colour(variant, sprite[..., 5:])], 1)
    colours = colours[..., : kind.channels]  # b E c
    ids, rows, inside = np.zeros((b, SIZE, SIZE), np.uint8), np.arange(b)[:, None, None], np.arange(PATCH)
    bank = _bank()
    for i in range(kind.most):
        window = (rows, (y[:, i, None] + inside)[:, :, None], (x[:, i, None] + inside)[:, None, :])
        drawn = bank[shape[:, i], scale[:, i], angle[:, i]] & listed[:, i, None, None]
        ids[window] = np.where(drawn, np.uint8(i + 1), ids[window])
    image = np.round(255 * colours).astype(np.uint8)[rows, ids]

    def factor(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        return np.pad(np.where(listed, values, 0), ((0, 0), (1, 0))).astype(np.float32)

    seen = np.ones((b, entities), np.float32)
    seen[:, 1:] = listed
    return {
        "image": image,
        "ids": ids,
        "x": factor(x / (PLACES - 1)),
        "y": factor(y / (PLACES - 1)),
        "shape": factor(shape + 1.0),
        "color": np.where(seen[..., None] > 0, colours, 0).astype(np.float32),
        "visibility": seen,
        "orientation": factor(np.linspace(0, 2 * np.pi, ANGLES)[angle]),
        "scale": factor(np.linspace(0.5, 1, SCALES)[scale]),
    }


def hsv_to_rgb(hsv: Doubles) -> Doubles:
    """Red, green, blue (..., 3) in 0..1 from hue, saturation and value (..., 3) in 0..1, by exact arithmetic only."""
    h, s, v = hsv[..., 0, None], hsv[..., 1, None], hsv[..., 2, None]
    k = (np.array([5.0, 3.0, 1.0]) + 6 * h) % 6
    rgb: Doubles = v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)
    return rgb


def _colour(variant: str, raw: Draws) -> Doubles:
    if variant == "binarized":
        return np.ones(raw.shape)
    return hsv_to_rgb(uniform(raw)) if variant == "colored_on_grayscale" else uniform(raw)


def _background(variant: str, raw: Draws) -> Doubles:
    if variant == "binarized":
        return np.zeros(raw.shape)
    return uniform(raw[:, :1].repeat(3, axis=1)) if variant == "colored_on_grayscale" else uniform(raw)


@cache
def _bank() -> Images:
    # every sprite at every scale and angle, on 32 x 32 pixels around its centre
    points = (np.arange(PATCH * POINTS) + 0.5) / POINTS - PATCH / 2
    y, x = np.meshgrid(points, points, indexing="ij")
    bank = np.zeros((SHAPES, SCALES, ANGLES, PATCH, PATCH), bool)
    for j, angle in enumerate(np.linspace(0, 2 * np.pi, ANGLES)):
        cos, sin = np.cos(angle), np.sin(angle)
        for i, scale in enumerate(np.linspace(0.5, 1, SCALES)):
            u, v = (cos * x + sin * y) / scale, (cos * y - sin * x) / scale
            p, q = u / 12, 0.28 - v / 12
            for k, part in enumerate(
                (
                    np.maximum(abs(u), abs(v)) <= 11,
                    (u / 14) ** 2 + (v / 7) ** 2 <= 1,
                    (p * p + q * q - 1) ** 3 <= p * p * q**3,
                )
            ):
                covered = part.reshape(PATCH, POINTS, PATCH, POINTS).sum((1, 3))
                bank[k, i, j] = 2 * covered >= POINTS * POINTS
    return bank
