"""The verbs on a run of CoLT5: trained by the command, scored, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tevo.cli import eval, generate, main, train
from tevo.colt5 import training

SMALL = ["--steps", "4", "--eval-every", "4", "--save-every", "4", "--examples", "6"]
BYTES = [
    *("--task", "modules", "--lengths", "300", "--phases", "1", "--rows", "1", "--shares", "0.25"),
    *("--dim", "16", "--light-dim", "16", "--heavy-dim", "16"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    assert train.main(["colt5", "--preset", "tiny", *SMALL, "--run", str(home / "words")]) == 0
    static = ["--routing", "none", "--seed", "1", "--run", str(home / "none")]
    assert train.main(["colt5", "--preset", "tiny", *SMALL, *static]) == 0
    assert train.main(["colt5", *BYTES, *SMALL, "--batch", "2", "--run", str(home / "bytes")]) == 0
    return home


def test_a_run_is_scored_at_other_shares_than_trained(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval.main([str(runs / "words"), "--split", "valid", "--shares", "0.25", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["shares"]) == ["0.25", "1"]
    assert found["score"] == found["shares"]["0.25"] == training.curve(runs / "words", "valid_exact_match")[-1][1]
    assert found["chance"] == 1 / 8 and found["rows"] == 6 and found["length"] == 96
    assert eval.main([str(runs / "words")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("lookup, 96 words; learned routing of 0.25 of them; step 4 of 4, seed 0")
    assert out[-1].endswith("% of 6 on test, routed share 0.25")


def test_a_file_of_the_user_s_is_read_and_asked_about(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "def run(a, b):\n    return a\n" * 9
    (tmp_path / "text.py").write_text(text)
    asked = ["--input", str(tmp_path / "text.py"), "--question", "signature of run?"]
    assert generate.main([str(runs / "bytes"), *asked, "--tokens", "5"]) == 0
    _, task, model, _ = training.open_run(runs / "bytes")
    tokens = model.answer(training.question_tokens(task.last, "signature of run?", text), most=5)
    assert capsys.readouterr().out == task.last.text(tokens[0]) + "\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["eval", "words", "--num-slots", "3"], "is no run of slots, and has no use for num_slots=3"),
        (["eval", "words", "--shares", "2"], "shares are (2.0,), expected numbers from 1e-6 to 1"),
        (["eval", "none", "--shares", "0.5"], "has no heavy branch, and no use for shares=(0.5,)"),
        (["generate", "words"], "answers questions; give --input FILE and --question"),
        (["generate", "words", "--temperature", "0.1"], "is no run of lm, and has no use for temperature=0.1"),
        (["generate", "words", "--input", "absent.txt", "--question", "1 x ."], "No such file or directory"),
        (["view", "colt5", "none"], "this model has no heavy branch"),
        (["view", "colt5", "words", "--num-slots", "4"], "tevo view colt5 has no use for num_slots=4"),
    ],
)
def test_a_mistake_gets_one_sentence(
    argv: list[str],
    sentence: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    assert main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and sentence in err[0]


def test_a_dry_run_tells_what_the_last_phase_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["colt5", "--preset", "tiny", "--run", str(tmp_path / "x"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "FLOPs" in out and not (tmp_path / "x").exists()


def test_learned_and_static_routing_cost_equal_flops() -> None:
    from tevo.bench.measure import flops
    from tevo.colt5.recipes import CoLT5Recipe
    from tevo.training.recipe import resolve

    counted = {}
    for routing in ("learned", "static", "none", "dense"):
        recipe = resolve(CoLT5Recipe, preset="tiny", routing=routing)
        task = training.build_task(recipe)
        model = training.build_model(recipe, task).eval()
        counted[routing] = int(flops(training.measured(model), torch.zeros(2, 96, dtype=torch.long)))
    # routers score each token: 2 d for each of them
    assert counted["learned"] - counted["static"] == 2 * 6 * 32 * 2 * 96
    assert counted["none"] < counted["static"] < counted["dense"]
