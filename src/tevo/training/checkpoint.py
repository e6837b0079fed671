"""Checkpoints that survive a kill at any moment and notice a single flipped bit.

A checkpoint is a folder ``<run>/checkpoints/step-00000100`` of three files:

* ``tensors.safetensors``: every tensor (weights, optimiser moments, random generators);
* ``meta.json``: everything else;
* ``manifest.json``: schema version, step, and size and SHA-256 of the other two and of itself.

It is written under a temporary name, every file and the folder are fsynced, then it is renamed: under its final name
it is complete or absent. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["KEEP", "SCHEMA", "Checkpoint", "latest", "load", "match", "save", "steps", "sweep", "write_file"]

SCHEMA = 1
KEEP = 2

_TENSORS, _META, _MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
_PREFIX, _PARTIAL = "step-", ".partial-"
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".metadata")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What :func:`load` found: the tensors are on the CPU."""

    folder: Path
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, keep: int = KEEP) -> Path:
    """Write ``<run>/checkpoints/step-<step>`` and drop all but the newest ``keep`` checkpoints.

    Returns:
        the folder written.

    Raises:
        OSError: it could not be written (full disk, no permission); earlier checkpoints are untouched.
        ValueError: a tensor has a type that safetensors cannot hold, or ``meta`` is not JSON.
    """
    home = run / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    final = home / f"{_PREFIX}{step:08d}"
    if final.exists():
        raise FileExistsError(f"checkpoint {final} exists already; a checkpoint is never overwritten")
    partial = home / f"{_PARTIAL}{final.name}-{os.getpid()}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _write_tensors(partial / _TENSORS, tensors)
        text = json.dumps(dict(meta), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        write_file(partial / _META, text)
        body = {"schema": SCHEMA, "step": step, "files": {n: _digest(partial / n) for n in (_META, _TENSORS)}}
        write_file(partial / _MANIFEST, _render(body))
        _sync_folder(partial)
        os.rename(partial, final)
        _sync_folder(home)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in steps(run)[:-keep]:
        _remove(home / f"{_PREFIX}{old:08d}")
    return final


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, after checking every byte of it against its manifest.

    Raises:
        ValueError: it is not a checkpoint, is a pickle, has another schema version, or was damaged.
    """
    if not (folder / _MANIFEST).is_file():
        raise ValueError(_not_a_checkpoint(folder))
    body = _read_manifest(folder)
    present = {p.name for p in folder.iterdir()}
    expected = {_META, _TENSORS, _MANIFEST}
    if present != expected:
        raise ValueError(
            f"checkpoint {folder} holds the files {sorted(present)}, expected {sorted(expected)}{_remedy(folder)}"
        )
    for name in (_META, _TENSORS):
        entry = body["files"][name]
        found = _digest(folder / name)
        if found != entry:
            what = (
                f"is {found['bytes']} bytes long, expected {entry['bytes']}"
                if found["bytes"] != entry["bytes"]
                else f"has SHA-256 {found['sha256'][:12]}..., expected {entry['sha256'][:12]}..."
            )
            raise ValueError(f"checkpoint {folder} is damaged: {name} {what}{_remedy(folder)}")
    try:
        tensors = load_file(folder / _TENSORS)
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read: {error}{_remedy(folder)}") from error
    return Checkpoint(folder=folder, step=body["step"], tensors=tensors, meta=meta)


def match(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str) -> None:
    """Check that ``found`` has the names, shapes and types of ``expected``.

    Raises:
        ValueError: naming the tensors that are missing, unexpected or of another shape or type.
    """
    faults = []
    if missing := sorted(expected.keys() - found.keys()):
        faults.append(f"lacks {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        faults.append(f"has the unexpected {_some(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        a, b = found[name], expected[name]
        if a.shape != b.shape:
            faults.append(f"has {name} of shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        elif a.dtype != b.dtype:
            faults.append(f"has {name} of type {a.dtype}, expected {b.dtype}")
    if faults:
        more = f" (and {len(faults) - 3} more faults)" if len(faults) > 3 else ""
        raise ValueError(f"{where} does not fit this model: it {', '.join(faults[:3])}{more}")


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    home = run / "checkpoints"
    if not home.is_dir():
        return []
    names = [p.name.removeprefix(_PREFIX) for p in home.iterdir() if p.name.startswith(_PREFIX)]
    return sorted(int(n) for n in names if n.isdecimal())


def latest(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = steps(run)
    return run / "checkpoints" / f"{_PREFIX}{found[-1]:08d}" if found else None


def sweep(run: Path) -> int:
    """Remove what writers killed half-way left behind.

    Returns:
        how many strays there were.
    """
    strays = [*run.glob(f"{_PARTIAL}*"), *(run / "checkpoints").glob(f"{_PARTIAL}*")]
    for stray in strays:
        if stray.is_dir():
            shutil.rmtree(stray)
        else:
            stray.unlink()
    return len(strays)


def write_file(path: Path, text: str) -> None:
    """Write a text file so that after a crash it is the old one or the new one, whole."""
    partial = path.with_name(f"{_PARTIAL}{path.name}-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses shared memory (tied weights) and strides, so such tensors are stored as copies
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype == torch.complex128:
            raise ValueError(f"tensor {name} is complex128, which safetensors cannot hold; store it as a pair of reals")
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if place in seen or value.untyped_storage().nbytes() != value.nbytes else value
        seen.add(place)
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(
            f"checkpoint {path.parent.name} could not be written: {error}; earlier ones are intact"
        ) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _render(body: Mapping[str, Any]) -> str:
    # one rendering per content, and a hash of that content: no byte of the manifest can change unnoticed
    text = json.dumps(body, indent=1, sort_keys=True)
    own = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    damaged = f"checkpoint {folder} is damaged: {_MANIFEST} does not match its own SHA-256{_remedy(folder)}"
    try:
        text = (folder / _MANIFEST).read_bytes().decode("utf-8")
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(damaged) from error
    if not isinstance(body, dict):
        raise ValueError(damaged)
    schema = body.get("schema")
    body.pop("sha256", None)
    if _render(body) != text:
        raise ValueError(damaged)
    if schema != SCHEMA:
        raise ValueError(
            f"checkpoint {folder} has schema version {schema}, this version of tevo reads {SCHEMA}; "
            "use the version of tevo that wrote it"
        )
    return body


def _not_a_checkpoint(folder: Path) -> str:
    if folder.is_file():
        with folder.open("rb") as file:
            start = file.read(4)
        if folder.suffix in _PICKLES or start[:2] == b"PK" or start[:1] == b"\x80":
            return (
                f"{folder} is a pickle, which can run code when it is read, so tevo never reads one; "
                "convert it to safetensors where you trust it"
            )
        return f"{folder} is a file, expected a checkpoint folder such as <run>/checkpoints/{_PREFIX}00000100"
    if not folder.exists():
        return f"checkpoint {folder} does not exist"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES or p.name in _PICKLES)
    if pickles:
        return (
            f"{folder} holds the pickle {pickles[0]}, which can run code when it is read, so tevo never reads one; "
            "convert it to safetensors where you trust it"
        )
    return f"{folder} is not a checkpoint: it has no {_MANIFEST}{_remedy(folder)}"


def _remedy(folder: Path) -> str:
    """The way out of a damaged checkpoint: never a silent fallback, always the user's own decision."""
    name = folder.name.removeprefix(_PREFIX)
    if folder.parent.name != "checkpoints" or not name.isdecimal():
        return ""
    older = [s for s in steps(folder.parent.parent) if s < int(name)]
    start = f"{_PREFIX}{older[-1]:08d}" if older else "step 0"
    return f"; delete that folder to go on from {start}"


def _remove(folder: Path) -> None:
    # renamed first, so that a kill half-way leaves a stray and never half a checkpoint
    doomed = folder.with_name(f"{_PARTIAL}{folder.name}-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
