"""Scenes in folders, zips and .npz files: CLEVR as published, images beside id images, arrays.

Objects come as the factors of the public CLEVR file with masks, whatever the source: bytes with 0 for an empty place,

    size      large 1, small 2                          shape     sphere 1, cylinder 2, cube 3
    material  rubber 1, metal 2                         color     red 1, cyan, green, blue, brown, gray, purple, yellow 8

The one-hot targets of set prediction take the classes in another order, that of ``TARGETS``.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tevo.slot_attention.data.layout import Images, Scene

__all__ = ["CODES", "TARGETS", "ArrayFile", "ClevrFolder", "ImageFolder", "factors_of", "root_of", "set_targets"]

OBJECTS = 10  # of a CLEVR scene at most
GREATEST = 1 << 26  # pixels of an image
CODES: Mapping[str, tuple[str, ...]] = {
    "size": ("large", "small"),
    "material": ("rubber", "metal"),
    "shape": ("sphere", "cylinder", "cube"),
    "color": ("red", "cyan", "green", "blue", "brown", "gray", "purple", "yellow"),
}
TARGETS: Mapping[str, tuple[str, ...]] = {
    "size": ("large", "small"),
    "material": ("rubber", "metal"),
    "shape": ("cube", "sphere", "cylinder"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
}


class ImageFolder:
    """``images/*.png`` beside ``masks/*.png``, 0 the background and i the i-th object; ``scenes.json`` if it is there.

    ``scenes.json`` is a list with "image", "mask" and "objects" for each scene, and gives the order and the factors;
    without it, images and masks of the same name in alphabetical order, and no factors.

    Args:
        path: a folder, or a .zip of its content.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._root = root_of(path, "ImageFolder")
        if (self._root / "scenes.json").exists():
            scenes = _json(self._root / "scenes.json", self.path)
            if not isinstance(scenes, list) or not all(isinstance(s, dict) for s in scenes):
                raise ValueError(f"{os.fspath(path)}: scenes.json is no list of scenes")
            self._scenes: list[dict[str, Any]] = scenes
        else:
            pictures = self._root / "images"
            names = sorted(p.name for p in pictures.iterdir() if p.name.endswith(".png")) if pictures.exists() else []
            self._scenes = [{"image": f"images/{name}", "mask": f"masks/{name}"} for name in names]
        if not self._scenes:
            raise ValueError(f"{os.fspath(path)}: no scenes.json and no images/*.png, expected either")

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, number: int) -> Scene:
        entry = self._scenes[number]
        where = f"{os.fspath(self.path)}, scene {number}"
        image = _picture(self._root, entry.get("image"), "RGB", where)
        ids = _picture(self._root, entry.get("mask"), "L", where)
        if ids.shape != image.shape[:2]:
            raise ValueError(f"{where}: the mask is {ids.shape}, the image {image.shape[:2]}; expected the same size")
        return {"image": image, "ids": ids, **(factors_of(entry["objects"], where) if "objects" in entry else {})}

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))


class ClevrFolder:
    """CLEVR as published: ``images/val/CLEVR_val_000000.png`` and ``scenes/CLEVR_val_scenes.json``. No masks.

    Args:
        path: the folder with ``images`` and ``scenes``, or a .zip of its content.
        split: "train" or "val"; the test split has no scenes.
    """

    def __init__(self, path: str | os.PathLike[str], *, split: str = "train") -> None:
        self.path, self.split = path, split
        self._root = root_of(path, "ClevrFolder")
        listing = self._root / "scenes" / f"CLEVR_{split}_scenes.json"
        if not listing.exists():
            raise ValueError(f"{os.fspath(path)}: no scenes/CLEVR_{split}_scenes.json; split is 'train' or 'val'")
        whole = _json(listing, path)
        scenes = whole.get("scenes") if isinstance(whole, dict) else None
        if not isinstance(scenes, list) or not all(isinstance(s, dict) for s in scenes):
            raise ValueError(f"{os.fspath(path)}: CLEVR_{split}_scenes.json has no list 'scenes'")
        self._scenes: list[dict[str, Any]] = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, number: int) -> Scene:
        entry, where = self._scenes[number], f"{os.fspath(self.path)}, scene {number}"
        name = entry.get("image_filename")
        if not isinstance(name, str):
            raise ValueError(f"{where}: 'image_filename' is {name!r}, expected the name of a file")
        image = _picture(self._root, f"images/{self.split}/{name}", "RGB", where)
        return {"image": image, **factors_of(entry.get("objects"), where)}

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))


class ArrayFile:
    """A .npz file, or a folder of .npy files as :func:`tevo.slot_attention.data.convert` writes it (memory-mapped).

    "image" uint8 (n, h, w, c) and whatever else has n rows. Nothing is ever unpickled.

    Args:
        path: the .npz file or the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        where = Path(path)
        try:
            if where.is_dir():
                files = {p.stem: p for p in sorted(where.glob("*.npy"))}
                names = _json(where / "names.json", path) if (where / "names.json").exists() else sorted(files)
                self.arrays: dict[str, npt.NDArray[Any]] = {
                    name: np.load(files[name], mmap_mode="r", allow_pickle=False) for name in names
                }
            else:
                # opened here, because numpy leaves a damaged one open
                with where.open("rb") as file, np.load(file, allow_pickle=False) as opened:
                    self.arrays = {name: opened[name] for name in opened.files}
        # a damaged header raises whatever numpy's parsers do, the tokenizer's errors among them
        except Exception as e:
            raise ValueError(f"{os.fspath(path)}: no readable .npz file or folder of .npy files ({e})") from None
        image = self.arrays.get("image")
        if image is None or image.dtype != np.uint8 or image.ndim != 4:
            kind = "none" if image is None else f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"{os.fspath(path)}: 'image' is {kind}, expected uint8 (n, h, w, c)")
        for name, values in self.arrays.items():
            if not values.ndim or len(values) != len(image):
                raise ValueError(
                    f"{os.fspath(path)}: {name!r} has shape {values.shape}, expected {len(image)} rows as 'image'"
                )

    def __len__(self) -> int:
        return len(self.arrays["image"])

    def __getitem__(self, number: int) -> Scene:
        return {name: np.array(values[number]) for name, values in self.arrays.items()}

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))

    def batch(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Scene:
        """Scenes ``numbers`` (b,), each array with b in front."""
        rows = np.asarray(numbers, dtype=np.int64)
        return {name: np.array(values[rows]) for name, values in self.arrays.items()}


def factors_of(objects: object, where: str = "scene") -> Scene:
    """The public factors of 11 entities, the background first, from a scene file's list of objects.

    Raises:
        ValueError: more than 10 objects, or one without the published fields.
    """
    if not isinstance(objects, list) or len(objects) > OBJECTS:
        given = f"{len(objects)} of them" if isinstance(objects, list) else repr(objects)
        raise ValueError(f"{where}: 'objects' is {given}, expected a list of at most {OBJECTS}")
    e = 1 + OBJECTS
    scene: Scene = {name: np.zeros(e, np.float32) for name in ("x", "y", "z")}
    scene |= {"pixel_coords": np.zeros((e, 3), np.float32), "rotation": np.zeros(e, np.float32)}
    scene |= {name: np.zeros(e, np.uint8) for name in CODES}
    scene["visibility"] = np.zeros(e, np.float32)
    scene["visibility"][: 1 + len(objects)] = 1
    for i, entry in enumerate(objects, start=1):
        try:
            # a number beyond float32 is an error, not infinity
            with np.errstate(over="raise"):
                place = entry["coords_3d"] if "coords_3d" in entry else entry["3d_coords"]
                for axis, value in zip(("x", "y", "z"), place, strict=True):
                    scene[axis][i] = value
                scene["pixel_coords"][i] = entry["pixel_coords"]
                scene["rotation"][i] = entry["rotation"]
                for name, classes in CODES.items():
                    scene[name][i] = 1 + classes.index(entry[name])
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise ValueError(
                f"{where}: object {i} is not as published ({type(error).__name__}: {error}); expected shape, size, "
                f"material, color, rotation, 3d_coords and pixel_coords"
            ) from None
    return scene


def set_targets(scene: Scene) -> npt.NDArray[np.float32]:
    """Targets (..., 10, 19) of set prediction from CLEVR factors (..., 11): coordinates as (c + 3) / 6, then one-hot
    size 2, material 2, shape 3 and colour 8 in the order of ``TARGETS``, then 1 for an object; empty places zero.
    """
    real = scene["visibility"][..., 1:, None].astype(np.float32)
    parts = [(np.stack([scene[a][..., 1:] for a in ("x", "y", "z")], -1) + 3) / 6]
    for name, classes in TARGETS.items():
        code = [1 + CODES[name].index(c) for c in classes]
        parts.append(scene[name][..., 1:, None] == np.array(code))
    targets: npt.NDArray[np.float32] = np.concatenate([*parts, real], -1).astype(np.float32) * real
    return targets


def root_of(path: str | os.PathLike[str], who: str) -> Path | zipfile.Path:
    """The folder, or the content of the .zip: that of its one folder where it holds nothing else.

    Raises:
        ValueError: ``path`` is neither.
    """
    if os.path.isdir(path):
        return Path(path)
    try:
        root = zipfile.Path(zipfile.ZipFile(path))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{who}: {os.fspath(path)!r} is neither a folder nor a .zip ({error})") from None
    entries = list(root.iterdir())
    alone = len(entries) == 1 and entries[0].is_dir() and entries[0].name not in ("images", "scenes")
    return entries[0] if alone else root


def _json(file: Path | zipfile.Path, path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{os.fspath(path)}: {file.name} is no readable JSON ({error})") from None


def _picture(root: Path | zipfile.Path, name: object, mode: str, where: str) -> Images:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("reading images needs Pillow; install it with: pip install 'tevo[report]'") from None
    if not isinstance(name, str):
        raise ValueError(f"{where}: the name of an image is {name!r}, expected a path such as 'images/00000.png'")
    parts = name.split("/")
    if ".." in parts or "" in parts or "\0" in name or ":" in name:
        raise ValueError(f"{where}: the image {name!r} lies outside the folder; expected a path inside it")
    try:
        with Image.open(io.BytesIO(root.joinpath(*parts).read_bytes())) as picture:
            if picture.width * picture.height > GREATEST:
                raise ValueError(f"{picture.width} x {picture.height} pixels, expected at most {GREATEST}")
            # ids are numbers and must not be turned into brightness
            if mode == "L" and picture.mode not in ("L", "P"):
                raise ValueError(f"mode {picture.mode}, expected 8 bits of ids")
            return np.array(picture if mode == "L" else picture.convert("RGB"), dtype=np.uint8)
    except (
        *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, TypeError),
        *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise ValueError(f"{where}: {name} cannot be read ({error})") from None
