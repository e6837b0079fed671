"""Handwritten digits over photographs: real shapes on real textures, with masks that are known.

The glyphs are scikit-learn's 1,797 digits of 8 x 8 grey values; the textures are the two photographs that come with it,
or the user's own. A glyph is enlarged three times by interpolation and belongs to a pixel where it is at least half
black; its colour has any hue, with saturation and value of at least a half. Later digits lie on earlier ones.

Glyphs and textures of "test" are never those of "train": the last fifth of the digits, the last quarter of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tevo.bench.tasks.contract import below
from tevo.slot_attention.data.draws import Indices, among, chosen, draws, uniform
from tevo.slot_attention.data.layout import Images, Scene
from tevo.slot_attention.data.sprites import hsv_to_rgb

__all__ = ["digits_on_textures"]

SIZE, GLYPH, TIMES, MOST = 64, 8, 3, 6
PATCH = GLYPH * TIMES
SPLITS = ("train", "test")
DRAWS = 4 + 6 * MOST


def digits_on_textures(
    seed: int,
    indices: Indices,
    *,
    digits: tuple[int, int] = (2, 4),
    split: str = "train",
    textures: Sequence[Images] | None = None,
) -> Scene:
    """Scenes ``indices`` (b,) of the endless set of ``seed``.

    Args:
        seed: which set; any integer.
        indices: scene numbers, >= 0.
        digits: fewest and most, within 1..6.
        split: "train" or "test", which share neither glyphs nor textures.
        textures: colour images uint8 (h, w, 3) to cut backgrounds from, 256 pixels wide and 64 high at least; None for
            scikit-learn's photographs.

    Returns:
        "image" (b, 64, 64, 3), "ids" (b, 64, 64), and float32 factors of 1 + most entities, the background first: "x",
        "y" (pixels, left and top edge of the 24 x 24 square), "shape" 1 + the digit, "color" (b, E, 3) in 0..1,
        "visibility". A digit may be hidden by another.

    Raises:
        ValueError: indices that are not integers >= 0, an option that cannot be, or scikit-learn is not installed.
    """
    least, most = digits
    if not 1 <= least <= most <= MOST:
        raise ValueError(f"digits_on_textures: digits={digits}, expected 1 <= fewest <= most <= {MOST}")
    if split not in SPLITS:
        raise ValueError(f"digits_on_textures: split={split!r}, expected 'train' or 'test'")
    numbers = chosen("digits_on_textures", indices)
    photos = [_part(photo, split) for photo in (_photographs() if textures is None else textures)]
    if not photos:
        raise ValueError("digits_on_textures: textures is empty, expected at least one image")
    glyphs, labels = _glyphs()
    cut = len(labels) * 4 // 5
    first, there = (0, cut) if split == "train" else (cut, len(labels) - cut)
    b = len(numbers)
    raw = draws(f"digits_on_textures {split}", seed, numbers, DRAWS)
    count = least + below(raw[:, 0], most - least + 1)
    listed = np.arange(most) < count[:, None]  # b most
    each = raw[:, 4:].reshape(b, MOST, 6)[:, :most]
    glyph = first + below(each[..., 0], there)
    x, y = below(each[..., 1], SIZE - PATCH + 1), below(each[..., 2], SIZE - PATCH + 1)
    hsv = uniform(each[..., 3:])
    hsv[..., 1:] = 0.5 + 0.5 * hsv[..., 1:]
    colour = hsv_to_rgb(hsv)
    image, ids = _backgrounds(photos, raw[:, 1:4]), np.zeros((b, SIZE, SIZE), np.uint8)
    rows, inside = np.arange(b)[:, None, None], np.arange(PATCH)
    for i in range(most):
        window = (rows, (y[:, i, None] + inside)[:, :, None], (x[:, i, None] + inside)[:, None, :])
        drawn = glyphs[glyph[:, i]] & listed[:, i, None, None]
        ids[window] = np.where(drawn, np.uint8(i + 1), ids[window])
        ink = np.round(255 * colour[:, i]).astype(np.uint8)[:, None, None]
        image[window] = np.where(drawn[..., None], ink, image[window])

    def factor(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        shown = listed.reshape(*listed.shape, *[1] * (values.ndim - 2))
        wide = ((0, 0), (1, 0), *[(0, 0)] * (values.ndim - 2))
        return np.pad(np.where(shown, values, 0), wide).astype(np.float32)

    visible = factor(np.ones(listed.shape))
    visible[:, 0] = 1
    return {
        "image": image,
        "ids": ids,
        "x": factor(x),
        "y": factor(y),
        "shape": factor(1 + labels[glyph]),
        "color": factor(colour),
        "visibility": visible,
    }


def _part(photo: Images, split: str) -> Images:
    if (
        photo.dtype != np.uint8
        or photo.ndim != 3
        or photo.shape[2] != 3
        or min(photo.shape[0], photo.shape[1] // 4) < SIZE
    ):
        raise ValueError(
            f"digits_on_textures: a texture is {photo.dtype} {photo.shape}, expected uint8 (h, w, 3) with h >= {SIZE} "
            f"and w >= {4 * SIZE}"
        )
    edge = photo.shape[1] * 3 // 4
    return photo[:, :edge] if split == "train" else photo[:, edge:]


def _backgrounds(photos: Sequence[Images], raw: npt.NDArray[np.uint64]) -> Images:
    which = below(raw[:, 0], len(photos))
    sizes = np.array([photo.shape[:2] for photo in photos])[which]
    top, left = (among(raw[:, 1 + i], sizes[:, i] - SIZE + 1) for i in range(2))
    cut = [photos[p][t : t + SIZE, s : s + SIZE] for p, t, s in zip(which, top, left, strict=True)]
    return np.stack(cut) if cut else np.zeros((0, SIZE, SIZE, 3), np.uint8)


@cache
def _glyphs() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    # which of 24 x 24 pixels each digit covers, and which digit it is
    data = _sklearn().load_digits()
    grey = np.asarray(data.images, np.int64)  # 0 to 16
    # linear interpolation between the centres of the coarse pixels, white beyond them, in integers: thirds along each axis
    weight = np.maximum(TIMES - abs(np.arange(PATCH)[:, None] - 1 - TIMES * np.arange(GLYPH)), 0)  # 24 8
    return 2 * (weight @ grey @ weight.T) >= 16 * TIMES**2, np.asarray(data.target, np.int64)


@cache
def _photographs() -> tuple[Images, ...]:
    datasets = _sklearn()
    try:
        return tuple(np.asarray(image, np.uint8) for image in datasets.load_sample_images().images)
    except ImportError:
        raise ValueError(
            "digits_on_textures: reading photographs needs Pillow; install it with: pip install 'tevo[report]', or give "
            "textures of your own"
        ) from None


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError(
            "digits_on_textures needs scikit-learn's digits and photographs; install it with: "
            "pip install 'tevo[tasks,report]'"
        ) from None
    return datasets
