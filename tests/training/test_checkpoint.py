from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tevo.training import checkpoint


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=generator)
    return {
        "whole": base,
        "tied": base,
        "turned": base.T,
        "row": base[2],
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": base.to(torch.bfloat16),
        "flags": base > 0,
        "bytes": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "complex": torch.complex(base, base),
    }


def save_one(run: Path, step: int = 4) -> Path:
    return checkpoint.save(run, step, some_tensors(), {"note": "naïve", "rate": 0.1, "none": None})


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = checkpoint.load(save_one(tmp_path))
    expected = some_tensors()
    assert found.step == 4
    assert found.meta == {"note": "naïve", "rate": 0.1, "none": None}
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert found.tensors[name].dtype == value.dtype, name
        assert torch.equal(found.tensors[name], value), name


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = save_one(tmp_path / "a"), save_one(tmp_path / "b")
    for name in ("tensors.safetensors", "meta.json", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100):
        save_one(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [10, 100]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000100"


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_one(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        save_one(tmp_path)


def test_strays_of_killed_writers_are_no_checkpoints_and_are_swept(tmp_path: Path) -> None:
    save_one(tmp_path)
    stray = tmp_path / "checkpoints" / ".partial-step-00000008-123"
    stray.mkdir()
    (stray / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / ".partial-recipe.json-123").write_text("{")
    assert checkpoint.steps(tmp_path) == [4]
    assert checkpoint.sweep(tmp_path) == 2
    assert checkpoint.sweep(tmp_path) == 0
    assert sorted(p.name for p in tmp_path.rglob(".partial-*")) == []


def test_any_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = save_one(tmp_path)
    whole = (folder / "manifest.json").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(damaged)
        refusal(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
def test_a_flipped_bit_is_refused_and_the_way_out_is_named(tmp_path: Path, name: str) -> None:
    save_one(tmp_path, 2)
    folder = save_one(tmp_path, 4)
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), max(len(whole) // 60, 1)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        message = refusal(folder)
        assert f"{name} has SHA-256" in message
        assert "delete that folder to go on from step-00000002" in message


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "manifest.json"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_one(tmp_path)
    whole = (folder / name).read_bytes()
    for length in {0, 1, 8, len(whole) // 2, len(whole) - 1}:
        (folder / name).write_bytes(whole[:length])
        assert name in refusal(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_one(tmp_path)
    (folder / name).unlink()
    assert "expected" in refusal(folder) or "manifest.json" in refusal(folder)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    folder = save_one(tmp_path)
    (folder / "extra.bin").write_bytes(b"?")
    assert "extra.bin" in refusal(folder)


def test_another_schema_version_is_refused_by_number(tmp_path: Path) -> None:
    folder = save_one(tmp_path)
    body = json.loads((folder / "manifest.json").read_text())
    del body["sha256"]
    (folder / "manifest.json").write_text(checkpoint._render({**body, "schema": 99}))
    assert "schema version 99, this version of tevo reads 1" in refusal(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
    assert "is a pickle" in refusal(tmp_path / name)
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"a": Canary(canary)}, folder / "model.pt")
    assert "holds the pickle model.pt" in refusal(folder)
    assert not canary.exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_complex128_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor w is complex128"):
        checkpoint.save(tmp_path, 1, {"w": torch.zeros(2, dtype=torch.complex128)}, {})
    assert checkpoint.steps(tmp_path) == []


def test_misfits_are_named() -> None:
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    found = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.float64), "d": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        checkpoint.match(found, expected, where="checkpoint x")
    message = str(caught.value)
    for words in ("lacks c", "unexpected d", "a of shape (3, 2), expected (2, 3)", "1 more fault"):
        assert words in message
    with pytest.raises(ValueError, match=r"b of type torch\.float64, expected torch\.float32"):
        checkpoint.match({"b": found["b"]}, {"b": expected["b"]}, where="checkpoint x")


def test_whichever_operation_fails_earlier_checkpoints_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path, 2)
    save_one(tmp_path, 4)
    failures = 0
    for number in range(100):
        calls = 0

        def counted(original: Callable[..., Any], number: int = number) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number + 1:
                    raise OSError(28, "No space left on device")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
            try:
                save_one(tmp_path, 6 + number)
            except OSError:
                failures += 1
            else:
                break
        # at most the newest checkpoint is new, and every one that is visible is whole
        checkpoint.sweep(tmp_path)
        assert len(checkpoint.steps(tmp_path)) >= 2
        for step in checkpoint.steps(tmp_path):
            checkpoint.load(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert failures >= 8
