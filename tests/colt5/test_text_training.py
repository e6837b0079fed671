"""Pre-training, and fine-tuning from it, by the command: resumed bit for bit, scored, asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.training.chains import final_hash

from tevo.cli import eval, generate, main, train
from tevo.colt5 import text_training
from tevo.colt5.text_recipes import TextRecipe
from tevo.colt5.training import curve
from tevo.training import checkpoint
from tevo.training.progress import Silent
from tevo.training.recipe import of_run

# seconds: of all sizes the least
SMALL = ["--dim", "16", "--layers", "1", "--heavy-heads", "1", "--heads", "2", "--length", "64", "--batch", "4"]
STEPS = ["--steps", "6", "--save-every", "2", "--eval-every", "6", "--examples", "5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("text")
    (home / "notes.txt").write_text("".join(f"{i} bottles of beer on the wall.\n" for i in range(600)))
    rows = [{"document": f"a = {i};", "question": "a?", "answers": [str(i), f"it is {i}"]} for i in range(40)]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = ["colt5-pretrain", "--preset", "tiny", "--data", str(home / "notes.txt"), *SMALL, *STEPS]
    assert train.main([*before, "--run", str(home / "before")]) == 0
    after = ["colt5-finetune", "--data", str(home / "questions.jsonl"), "--length", "64", "--answer", "8", *STEPS]
    after += ["--batch", "4", "--threads", "1", "--from-run", str(home / "before")]
    assert train.main([*after, "--run", str(home / "after")]) == 0
    return home


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    newest = checkpoint.latest(folder)
    assert newest is not None
    return {k: v for k, v in checkpoint.load(newest).tensors.items() if k.startswith("trainee.model.")}


class Pulled(Silent):
    def advance(self, step: int, steps: int, numbers: object) -> None:
        if step == 3:
            raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(home: Path, kind: str, tmp_path: Path) -> None:
    recipe = of_run(home / kind, TextRecipe)
    with pytest.raises(RuntimeError, match="pulled"):
        text_training.run(recipe, folder=tmp_path, watch=Pulled())
    assert text_training.run(recipe, folder=tmp_path).finished
    assert final_hash(tmp_path) == final_hash(home / kind)


def test_fine_tuning_begins_with_the_other_run_s_weights_and_sizes(home: Path, tmp_path: Path) -> None:
    recipe = of_run(home / "after", TextRecipe)
    assert (recipe.dim, recipe.layers, recipe.vocab, recipe.routing) == (16, 1, 384, "learned")
    # a step so small that nothing moves; share and dropout are fine-tuning's own
    text_training.run(replace(recipe, steps=1, lr=1e-12), folder=tmp_path)
    before, after = weights(home / "before"), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-9)
    assert recipe.shares == (1 / 16, 1 / 16) and recipe.dropout == 0.1


def test_a_regular_text_is_learned(home: Path, tmp_path: Path) -> None:
    recipe = of_run(home / "before", TextRecipe)
    result = text_training.run(replace(recipe, steps=80, save_every=80, eval_every=80), folder=tmp_path)
    # chance is log2 384 = 8.6 bits; six steps leave it above 6
    assert result.score is not None
    assert result.score < 4.5 < 6.0 < curve(home / "before", "valid_bits_per_target")[-1][1]


def test_runs_are_scored(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval.main([str(home / "before"), "--split", "valid", "--shares", "0.125", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score"] == found["shares"]["0.125"]["bits_per_target"]
    assert found["score"] == curve(home / "before", "valid_bits_per_target")[-1][1]
    assert found["shares"]["1"]["bits_per_target"] != found["score"] and found["rows"] == 5
    assert eval.main([str(home / "after")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("colt5-finetune, 4 rows of test after 6 steps")
    assert "exact_match" in lines[1] and "rougeL" in lines[1] and lines[1].endswith("routed share 0.0625")


def test_generated_answers_are_scored_against_all_right_ones(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, task, model, _ = text_training.restore(home / "after")
    right = {one.input: one.outputs[1] for one in task.records["test"]}

    def told(inputs: torch.Tensor, *, most: int) -> torch.Tensor:
        said = [task.encode(right[task.tokens.text(row)]) for row in inputs]
        return torch.cat([torch.nn.functional.pad(one, (0, 16 - one.shape[1])) for one in said])

    monkeypatch.setattr(model, "answer", told)
    found = text_training.generated(model, task, split="test", batch=3)
    assert found["exact_match"] == found["f1"] == found["rougeL"] == 100


def test_a_file_of_the_user_s_is_asked_about(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--input", str(home / "notes.txt"), "--question", "how many?", "--tokens", "5"]
    assert generate.main([str(home / "after"), *asked]) == 0
    _, task, model, _ = text_training.restore(home / "after")
    tokens = model.eval().answer(task.encode("how many?\n" + (home / "notes.txt").read_text()), most=5)
    assert capsys.readouterr().out == task.tokens.text(tokens[0]) + "\n"


def test_a_dry_run_trains_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(home / "notes.txt"), "--run", str(tmp_path / "x"), "--dry-run"]
    assert train.main(["colt5-pretrain", "--preset", "tiny", *SMALL, *data]) == 0
    assert "parameters" in capsys.readouterr().out and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "colt5-finetune"], "needs questions and answers; give a .jsonl"),
        (
            ["train", "colt5-finetune", "--data", "questions.jsonl", "--from-run", "before", "--dim", "32"],
            "dim=32, but ",
        ),
        (
            ["train", "colt5-finetune", "--data", "questions.jsonl", "--from-run", "before", "--vocab", "300"],
            "which the run begins from, has 384; leave it out",
        ),
        (["train", "colt5-finetune", "--data", "questions.jsonl", "--from-run", "."], "is not a run"),
        (["train", "colt5-pretrain", "--tokens", "notes.txt"], "is no tokenizer.json"),
        (["generate", "before", "--input", "notes.txt", "--question", "x"], "fine-tune it first"),
        (["generate", "after"], "answers questions; give --input FILE and --question"),
        (["eval", "before", "--num-slots", "3"], "is no run of slots, and has no use for num_slots=3"),
        (["eval", "before", "--shares", "2"], "shares are (2.0,), expected numbers from 1e-6 to 1"),
    ],
)
def test_a_mistake_gets_one_sentence(
    argv: list[str], sentence: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and sentence in err[0]
