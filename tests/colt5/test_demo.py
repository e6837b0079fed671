"""The page: from runs, with what is missing named, and one sentence for a mistake."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.colt5.test_reading import CODE
from tests.colt5.test_training import BYTES, SMALL

from tevo.cli import main
from tevo.colt5 import cost, demo, reading, training
from tevo.colt5.recipes import CoLT5Recipe

LIVE: dict[str, Any] = {
    "forms": {
        "CoLT5 (tevo)": {"forward_s": 0.1, "forward_bytes": 1 << 24},
        "LongT5, transient-global (transformers)": {"forward_s": 0.4, "forward_bytes": 1 << 27},
        "dense (fused attention)": {"error": "out of memory"},
    },
    "shape": "a shape",
    "threads": 1,
    "rounds": 2,
    "skipped": [],
}
HUMAN = "def first(a, b):\n    return a\n\ndef second(c, d):\n    return '\N{BLACK STAR}'\n"


def _cell(routing: str, seed: int, score: float) -> dict[str, Any]:
    curves = {"exact_match": [[5, score / 2], [9, score]]}
    known = {"exact_match": score, "rows": 200, "chance": 0.1, "baselines": {"one": 0.2}}
    return {"routing": routing, "seed": seed, "recipe": {"task": "lookup"}, "curves": curves, **known}


RECORD: dict[str, Any] = {
    "command": "the command",
    "cells": [_cell("learned", 0, 0.9), _cell("learned", 1, 0.8), _cell("static", 0, 0.3)],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    few: dict[str, Any] = {"steps": 2, "eval_every": 2, "save_every": 2, "examples": 5, "batch": 2}
    small = replace(SMALL, **few)
    recipes: dict[str, CoLT5Recipe] = {
        "learned": small,
        "static": replace(small, routing="static"),
        "none": replace(small, routing="none"),
        "bytes": replace(BYTES, **few),
        "code": replace(CODE, **few),
    }
    for name, recipe in recipes.items():
        assert training.run(recipe, folder=home / name).finished
    return home


def test_the_page_shows_question_maps_switch_record_and_cost_and_fetches_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "measure", lambda **options: LIVE)
    monkeypatch.setattr(demo, "read_record", lambda folder: RECORD)
    runs = ["--run", str(home / "learned"), "--static-run", str(home / "static")]
    assert main(["demo", "colt5", *runs, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"(src|href)=|https?:", page) is None
    # the question's maps, and both sides of five questions
    assert page.count('class="tabs"') == 1 + 2 * 5
    assert "4.0 x" in page and "8.0 x" in page and "out of memory" in page
    assert "exact match in % of every seed" in page and "the command" in page
    assert "Missing" not in page
    said = capsys.readouterr().out
    assert "Of 5 held-out questions answered right, with equally many routed tokens: learned routing" in said
    assert "not on the page" not in said


def test_what_is_missing_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "colt5", "--run", str(home / "none"), "--no-cost", "--out", str(tmp_path / "page.html")]
    assert main(argv) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="missing"') >= 4 and "This model routes nothing" in page
    said = capsys.readouterr().out
    assert "not on the page: static routing" in said


def test_a_file_and_a_question_of_the_user_s_are_shown_whole(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(HUMAN * 20)
    asked = ["--text", str(tmp_path / "own.py"), "--question", "signature of second?"]
    argv = ["demo", "colt5", "--run", str(home / "bytes"), *asked, "--no-cost", "--out", str(tmp_path / "page.html")]
    assert main(argv) == 0
    page = (tmp_path / "page.html").read_text()
    shown = re.sub(r"<[^>]+>", "", page.split('<div class="text">')[1].split("</div>")[0])
    assert shown.startswith("signature of second?\n" + HUMAN) and shown.count("def second") == 20
    assert "tokens read and answered in" in capsys.readouterr().out


def test_the_parameters_of_a_function_of_the_user_s_are_asked_for(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(HUMAN)
    asked = ["--text", str(tmp_path / "own.py"), "--question", "second"]
    argv = ["demo", "colt5", "--run", str(home / "code"), *asked, "--no-cost", "--out", str(tmp_path / "page.html")]
    assert main(argv) == 0
    page = (tmp_path / "page.html").read_text()
    shown = re.sub(r"<[^>]+>", "", page.split('<div class="text">')[1].split("</div>")[0])
    assert shown.startswith("def second ( &lt;1&gt; , ") and shown.endswith(HUMAN[-20:])
    assert "tokens read and answered in" in capsys.readouterr().out


def test_the_default_text_of_a_module_holds_the_answer_to_its_question(home: Path) -> None:
    _, task, _, _ = training.open_run(home / "bytes")
    text, question, answer = reading.long_text(task.last, "test")
    name = question.removeprefix("signature of ").removesuffix("?")
    assert f"def {name}({answer})" in text
    assert 8000 < len(text.encode()) < 33000


def test_the_default_text_of_words_is_the_first_test_input(home: Path) -> None:
    _, task, _, _ = training.open_run(home / "learned")
    text, question, answer = reading.long_text(task.last, "test")
    rows = task.batch("test", 0, 0, 1)
    tokens = training.question_tokens(task.last, question, text)
    assert tokens.tolist() == rows["inputs"].tolist() and answer == task.last.text(rows["targets"][0])


def test_the_shipped_runs_are_what_the_record_is_about() -> None:
    record = demo.read_record(demo.SHIPPED)
    assert record is not None
    for routing in ("learned", "static"):
        recipe, _, _, _ = training.open_run(demo.SHIPPED / routing)
        assert recipe.routing == routing and any(
            cell["recipe"] == json.loads(recipe.to_json()) for cell in record["cells"]
        )
    assert sum(path.stat().st_size for path in demo.SHIPPED.rglob("*.safetensors")) < 5e6


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--run", "nowhere"],
            "nowhere is not a run: it has no recipe.json; train a model with `tevo train colt5 --preset",
        ),
        (["--out", "no/such/page.html"], "--out no/such/page.html: the folder"),
        (["--run", "bytes", "--text", "own.py"], "--text needs a --question about it, such as 'signature of"),
        (
            ["--run", "code", "--text", "own.py", "--question", "third"],
            "the text has no 'third' that can be asked for, expected one of first, second",
        ),
        (
            ["--run", "code", "--text", "bare.py", "--question", "signature of first?"],
            "the text has no function that can be asked for: defined once, with 2 or 3 parameters",
        ),
        (["--run", "learned", "--static-run", "bytes"], "bytes was trained on another task than learned"),
        (["--run", "learned", "--question", "2 baben ."], "the word '2' is none of the"),
        (["--sed", "1"], "unknown option '--sed'"),
    ],
)
def test_a_mistake_gets_one_sentence(
    argv: list[str],
    sentence: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    (home / "own.py").write_text(HUMAN)
    (home / "bare.py").write_text("first = 1\n")
    assert main(["demo", "colt5", "--no-cost", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and sentence in err[0]


def test_a_copy_without_weights_says_how_to_make_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SHIPPED", tmp_path)
    assert main(["demo", "colt5", "--out", str(tmp_path / "x.html")]) == 2
    assert "this copy of tevo ships no weights of CoLT5" in capsys.readouterr().err
