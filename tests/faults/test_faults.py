from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.faults import run as faults
from tests.faults.run import BAD, RESULTS, Tally

DRAW = 3


def good(tally: Tally, least: int) -> None:
    assert not tally.bad
    assert tally.tried == tally.refused + tally.harmless >= least


def test_no_cut_or_flipped_checkpoint_is_read(tmp_path: Path) -> None:
    tally = Tally()
    faults.damaged_checkpoints(tally, tmp_path, random.Random(DRAW), 90)
    good(tally, 500)
    assert tally.refused == tally.tried


def test_whichever_operation_of_a_save_fails_older_checkpoints_stay(tmp_path: Path) -> None:
    tally = Tally()
    faults.failing_saves(tally, tmp_path, faults.ERRORS[:1])
    good(tally, 20)


def test_a_file_that_may_not_grow_leaves_older_checkpoints(tmp_path: Path) -> None:
    tally = Tally()
    faults.full_disk(tally, tmp_path)
    good(tally, 60)
    assert tally.refused == tally.tried


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    tally = Tally()
    faults.foreign_checkpoints(tally, tmp_path)
    good(tally, 100)
    assert tally.refused == tally.tried


def test_folders_that_cannot_be_written_are_refused_in_a_sentence(tmp_path: Path) -> None:
    tally = Tally()
    faults.forbidden_folders(tally, tmp_path)
    good(tally, 17)
    assert tally.refused == tally.tried


def test_generated_recipes_scenes_and_texts_are_read_or_refused(tmp_path: Path) -> None:
    for name, family, count in (
        ("recipes", faults.malformed_recipes, 120),
        ("scenes", faults.malformed_scenes, 60),
        ("texts", faults.malformed_texts, 60),
    ):
        tally = Tally()
        (tmp_path / name).mkdir()
        family(tally, tmp_path / name, random.Random(DRAW), count)
        good(tally, count)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_every_verb_quietly() -> None:
    tally = Tally()
    faults.closed_outputs(tally)
    good(tally, 100)
    assert tally.harmless == tally.tried


@pytest.mark.slow
def test_runs_survive_failed_operations_damaged_files_and_each_other(tmp_path: Path) -> None:
    for name in ("operations", "damage", "losses", "crowd"):
        (tmp_path / name).mkdir()
    tally = Tally()
    faults.failing_runs(tally, tmp_path / "operations")
    faults.damaged_runs(tally, tmp_path / "damage", random.Random(DRAW), 16)
    faults.poisoned_losses(tally, tmp_path / "losses")
    faults.crowded_folders(tally, tmp_path / "crowd", 2)
    good(tally, 150)


def test_a_harness_that_meets_a_bad_program_says_so() -> None:
    def raises(error: Exception) -> bool:
        raise error

    assert faults.tried(lambda: True)[0] == "harmless"
    assert faults.tried(lambda: False)[0] == "silent corruption"
    assert faults.tried(lambda: raises(ValueError("one sentence")))[0] == "refused"
    assert faults.tried(lambda: raises(ValueError("two\nlines")))[0] == "bare traceback"
    assert faults.tried(lambda: raises(KeyError("x")))[0] == "bare traceback"
    assert faults.commanded(["nosuch"])[0] == "refused"
    assert faults.commanded(["--version"], "another version")[0] == "silent corruption"


def test_the_stored_run_tried_5000_faults_and_none_was_bad() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert stored["tried"] == sum(family["tried"] for family in stored["families"].values()) >= 5000
    assert [stored[kind] for kind in BAD] == [0] * len(BAD)
    assert stored["families"]["malformed recipes"]["tried"] >= 1000
