"""Any scenes into arrays that are memory-mapped when read: one .npy file a name, in a folder.

A reader gives scenes one by one; none but the one being written is held. The folder appears under its name when it is
complete, so that a stopped conversion leaves nothing that looks like data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tevo.slot_attention.data.folders import ArrayFile
from tevo.slot_attention.data.layout import Scene

__all__ = ["convert"]


def convert(
    source: Iterable[Scene],
    out: str | os.PathLike[str],
    progress: Callable[[int, int | None], None] | None = None,
) -> ArrayFile:
    """Write all scenes of ``source`` to the folder ``out`` and open it.

    Args:
        source: scenes of the same names, types and shapes: any reader, a list, or a generator expression that keeps
            some of them, ``(s for s in reader if s["visibility"].sum() <= 7)`` for CLEVR's scenes of at most 6 objects.
        out: a folder that does not exist yet.
        progress: called with (scenes done, scenes in all, if the source knows) after each.

    Raises:
        ValueError: ``out`` exists, the source is empty, a scene differs from the first, or a name is no name of a file.
    """
    folder = Path(out)
    if folder.exists():
        raise ValueError(f"convert: {str(out)!r} exists; give a new folder, or remove it first")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    total = len(source) if isinstance(source, Sized) else None
    files: dict[str, tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]] = {}
    done = 0
    try:
        for scene in source:
            if not done:
                for name, values in scene.items():
                    if not name.replace("_", "").isalnum():
                        raise ValueError(f"convert: the name {name!r}, expected letters, digits and underscores")
                    array = _plain(values)
                    files[name] = ((part / f"{name}.npy").open("wb"), array.dtype, array.shape)
                    _header(files[name], 0)
            if scene.keys() != files.keys():
                raise ValueError(f"convert: scene {done} has {sorted(scene)}, the first had {sorted(files)}")
            for name, (file, kind, shape) in files.items():
                array = _plain(scene[name])
                if array.shape != shape or array.dtype != kind:
                    raise ValueError(
                        f"convert: {name!r} of scene {done} is {array.dtype} {array.shape}, of the first it was "
                        f"{kind} {shape}"
                    )
                file.write(array.tobytes())
            done += 1
            if progress is not None:
                progress(done, total)
        if not done:
            raise ValueError("convert: the source has no scenes")
        for name, opened in files.items():
            at = opened[0].tell()
            opened[0].seek(0)
            _header(opened, done)
            if opened[0].tell() + done * opened[1].itemsize * int(np.prod(opened[2])) != at:
                raise RuntimeError(f"the header of {name!r} changed its length")
        (part / "names.json").write_text(json.dumps(list(files)))
    except BaseException:
        _close(files)
        shutil.rmtree(part, ignore_errors=True)
        raise
    _close(files)
    part.rename(folder)
    return ArrayFile(folder)


def _plain(values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _header(opened: tuple[IO[bytes], np.dtype[Any], tuple[int, ...]], rows: int) -> None:
    # numpy pads the header so that the first axis can grow in place
    file, kind, shape = opened
    descr = np.lib.format.dtype_to_descr(kind)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows, *shape)})


def _close(files: dict[str, tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]]) -> None:
    for file, _, _ in files.values():
        file.close()
