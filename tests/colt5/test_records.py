"""Records as batches: each once an epoch, similar lengths together, the same from (seed, step) alone."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tevo.colt5.records import Records, edges_of
from tevo.colt5.tokens import ByteTokens
from tevo.objectives.next_token import IGNORED


def written(folder: Path, count: int = 60, name: str = "data.jsonl") -> Path:
    rows = [{"input": f"{i:03d}?" + "x" * (i * 37 % 190), "output": f"{i:03d}"} for i in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def records(path: Path, **options: object) -> Records:
    given = {"length": 150, "answer": 9, "examples": 50, "vocab": 300, **options}
    return Records(data=str(path), tokens=ByteTokens(), **given)  # type: ignore[arg-type]


def names(inputs: torch.Tensor) -> list[str]:
    """The first three bytes of each row."""
    return ["".join(chr(int(token) - 3) for token in row[:3]) for row in inputs]


def test_edges_halve_down_to_the_shortest() -> None:
    assert edges_of(2048) == [32, 64, 128, 256, 512, 1024, 2048]
    assert edges_of(150) == [38, 75, 150]
    assert edges_of(16) == [16]


def test_an_epoch_has_every_row_once_and_fills_up_its_last_batch(tmp_path: Path) -> None:
    task = records(written(tmp_path))
    assert len(task.records["train"]) == 48
    for epoch in range(3):
        seen = Counter(name for at in range(10) for name in names(task.batch("train", 4, epoch * 10 + at, 5)["inputs"]))
        assert set(seen) == {one.input[:3] for one in task.records["train"]}
        # 48 rows in 10 batches of 5
        assert sorted(seen.values()) == [1] * 46 + [2] * 2


def test_rows_of_similar_lengths_are_together_padded_to_their_bucket(tmp_path: Path) -> None:
    task = records(written(tmp_path, 600))
    padded = mixed = real = 0
    for at in range(96):
        inputs = task.batch("train", 0, at, 5)["inputs"]
        lengths = (inputs != 0).sum(1)
        width, buckets = inputs.shape[1], set(np.searchsorted(task.edges, lengths.numpy()).tolist())
        assert width in task.edges and width == min(edge for edge in task.edges if edge >= lengths.max())
        padded, real, mixed = padded + inputs.numel(), real + int(lengths.sum()), mixed + (len(buckets) > 1)
    # only rows that a bucket has left over share a batch with longer ones
    assert mixed < len(task.edges) and real / padded > 0.7


def test_batches_follow_from_seed_and_step_alone(tmp_path: Path) -> None:
    path = written(tmp_path)
    task = records(path)
    far = task.batch("train", 7, 23, 5)
    for at in range(23):
        task.batch("train", 7, at, 5)
    fresh = records(path)
    for name, value in far.items():
        assert torch.equal(task.batch("train", 7, 23, 5)[name], value)
        assert torch.equal(fresh.batch("train", 7, 23, 5)[name], value)
    orders = {tuple(names(task.batch("train", seed, at, 48)["inputs"])) for seed in range(2) for at in range(2)}
    assert len(orders) == 4


def test_inputs_and_answers_are_cut_and_end(tmp_path: Path) -> None:
    task = records(written(tmp_path), length=40, answer=3)
    rows = [task.batch("train", 0, at, 5) for at in range(10)]
    for one in rows:
        last = one["inputs"].gather(1, (one["inputs"] != 0).sum(1, keepdim=True) - 1)
        assert (last == 1).all() and one["inputs"].shape[1] <= 40
        # 3 digits do not fit: 2 and the end
        assert one["targets"].tolist() == [[*[ord(c) + 3 for c in name[:2]], 1] for name in names(one["inputs"])]
        assert torch.equal(one["shown"][:, 1:], one["targets"][:, :-1]) and not one["shown"][:, 0].any()
    assert task.facts["inputs cut"]["train"] == sum(len(one.input) > 39 for one in task.records["train"])
    tokens = task.encode("0" * 100)
    assert tokens.shape == (1, 40) and tokens[0, -1] == 1


def test_what_is_held_out_is_no_row_of_training_and_the_same_for_every_seed(tmp_path: Path) -> None:
    task = records(written(tmp_path))
    parts = [{one.input for one in task.records[split]} for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [48, 6, 6] and len(set.union(*parts)) == 60
    whole = torch.cat([(b["targets"]) for b in task.batches("valid", 4)])
    assert len(whole) == 6 and torch.equal(whole, task.batch("valid", 3, 0, 6)["targets"])
    lengths = [len(one.input) for one in task.records["valid"]]
    assert lengths == sorted(lengths)
    other = records(tmp_path / "data.jsonl", test_data=str(written(tmp_path, 8, "more.jsonl")))
    assert [len(other.records[split]) for split in ("train", "valid", "test")] == [60, 4, 4]


def test_one_of_several_right_answers_is_drawn_in_training_and_the_first_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"document": f"{i:03d}", "question": "q", "answers": ["ab", "cd"]} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = records(path)
    drawn = Counter(int(t) for at in range(40) for t in task.batch("train", 0, at, 4)["targets"][:, 0])
    # half of 160, within five standard deviations
    assert set(drawn) == {100, 102} and abs(drawn[100] - 80) < 5 * 40**0.5
    assert {int(t) for t in task.batch("valid", 0, 0, 4)["targets"][:, 0]} == {100}
    assert (task.batch("valid", 0, 0, 1)["targets"] != IGNORED).sum() == 3


def test_a_zip_s_validation_is_held_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for split, count in (("train", 5), ("validation", 4), ("test", 2)):
            rows = [
                {"id": str(i), "input": f"{split} {i}", "output": "" if split == "test" else "y"} for i in range(count)
            ]
            archive.writestr(f"set/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = records(tmp_path / "set.zip")
    assert [len(task.records[split]) for split in ("train", "valid", "test")] == [5, 2, 2]
    assert all(one.input.startswith("validation") for split in ("valid", "test") for one in task.records[split])


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves no record with an answer for 'train'; give at least 3"):
        records(written(tmp_path, 2))
    with pytest.raises(ValueError, match="vocab=100, expected at least 259"):
        records(written(tmp_path), vocab=100)
    with pytest.raises(ValueError, match="'valid' has 6 rows, and no batch 3 of 2"):
        records(written(tmp_path)).batch("valid", 0, 3, 2)
