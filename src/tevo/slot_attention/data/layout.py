"""What a scene is, whoever made it: a dictionary of arrays under the official names.

"image" uint8 (h, w, c); "ids" uint8 (h, w), 0 the background and i the i-th object where it is seen; then the factors in
the official order, (E,) or (E, k), entity 0 the background and empty places zero, as "visibility" tells. A batch has b in
front. The official files hold E masks of 0 and 255 in place of "ids": :func:`masks` and :func:`ids_of` lead there and back.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Images", "Scene", "ids_of", "masks"]

Images: TypeAlias = npt.NDArray[np.uint8]
Scene: TypeAlias = dict[str, npt.NDArray[Any]]


def masks(ids: Images, entities: int) -> Images:
    """The official masks (..., E, h, w, 1) of 0 and 255 from ids (..., h, w).

    Raises:
        ValueError: an id has no mask.
    """
    if ids.size and int(ids.max()) >= entities:
        raise ValueError(
            f"masks: ids go up to {int(ids.max())}, entities={entities}; expected entities > the greatest id"
        )
    every = np.arange(entities, dtype=np.uint8)[:, None, None]  # E 1 1
    return ((ids[..., None, :, :] == every) * np.uint8(255))[..., None]


def ids_of(masks: Images) -> Images:
    """Ids (..., h, w) from masks (..., E, h, w, 1): the first entity of each pixel; 0 where there is none."""
    return masks[..., 0].astype(bool).argmax(-3).astype(np.uint8)
