"""Texts to show: the pieces are the text, the right answers stand where they are marked, whatever the task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from tests.colt5.test_training import BYTES, SMALL

from tevo.colt5 import reading, training
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.tasks import Code
from tevo.colt5.tasks.code import TOKEN

CODE = CoLT5Recipe(task="code", lengths=(400,), questions=2, names=2000, examples=6, dim=16, light_dim=16, heavy_dim=16)
TEXT = "# α note\nimport os\n\ndef run(self, other, key):\n\treturn other  # …\n\ndef walk(a, b):\n    pass\n"
LINE = "def {} ( <1> , <1.2> , <1.3> ) def {} ( <2> , <2.2> , <2.3> ) \n"


@pytest.fixture(scope="module")
def tasks() -> dict[str, training.Curriculum]:
    recipes = {"code": CODE, "modules": BYTES, "lookup": SMALL, "documents": replace(BYTES, task="documents")}
    return {name: training.build_task(recipe) for name, recipe in recipes.items()}


def test_code_is_read_with_its_layout_and_answers_are_its_words(tasks: dict[str, training.Curriculum]) -> None:
    task = tasks["code"].last
    one = reading.read(task, "signature of run?", TEXT)
    assert "".join(one.pieces) == LINE.format("run", "walk") + TEXT
    assert one.tokens.shape == (1, len(one.pieces))
    assert [
        piece.strip() for piece, token in zip(one.pieces, one.tokens[0].tolist(), strict=True) if token == TOKEN["def"]
    ] == ["def"] * 4
    # what follows "def run (" in the tokens, as the task solves it, and nothing of the other question
    assert one.say(task.solve(one.tokens)[0]) == "self, other, key"
    assert reading.read(task, "walk", TEXT).say(task.solve(reading.read(task, "walk", TEXT).tokens)[0]) == "a, b"


@pytest.mark.parametrize("name", ["code", "modules", "lookup", "documents"])
def test_held_out_questions_have_their_answers_where_they_are_marked(
    name: str, tasks: dict[str, training.Curriculum]
) -> None:
    task = tasks[name]
    found = reading.held_out(task, "test", 3)
    assert len(found) == 3
    for one in found:
        assert one.tokens.shape[0] == 1 and one.marked is not None and one.right
        assert one.tokens.shape[1] == len(one.pieces) == len(one.marked) <= task.length
        shown = "".join(piece for piece, marked in zip(one.pieces, one.marked.tolist(), strict=True) if marked)
        if name == "code":
            assert "".join("".join(shown.split()).replace(")", "").split(":")[0:1]).replace(",", "") in "".join(
                one.right.split(", ")
            )
        elif name == "lookup":
            # marked are values, in the order of the text
            assert set(shown.split()) <= set(one.right.split())
        else:
            assert shown.strip() == one.right
        if isinstance(task.last, Code):
            assert one.say(task.last.solve(one.tokens)[0]) == one.right


@pytest.mark.parametrize("name", ["code", "modules"])
def test_the_long_text_is_a_module_that_holds_the_answer(name: str, tasks: dict[str, training.Curriculum]) -> None:
    task = tasks[name].last
    text, question, right = reading.long_text(task, "test")
    function = question.removeprefix("signature of ").removesuffix("?")
    assert f"def {function}({right}" in " ".join(text.split()) and 8000 < len(text.encode()) < 33000
    one = reading.read(task, question, text)
    said = "".join(one.pieces)
    if isinstance(task, Code):
        assert said.endswith(f"\n{text}") and said.startswith(f"def {function} ( <1> , <1.2> , <1.3> ) def ")
        assert one.say(task.solve(one.tokens)[0]) == right
    else:
        assert said == f"{question}\n{text}"


def test_a_question_that_code_cannot_take_is_refused_in_a_sentence(tasks: dict[str, training.Curriculum]) -> None:
    with pytest.raises(ValueError, match=r"expected 'signature of NAME\?' with the name of a function"):
        reading.read(tasks["code"].last, "what does it do?", TEXT)
    with pytest.raises(ValueError, match=r"the text has no 'absent' that can be asked for, expected one of run, walk$"):
        reading.read(tasks["code"].last, "absent", TEXT)
    with pytest.raises(ValueError, match="the text has no function that can be asked for: defined once, with 2 or 3"):
        reading.read(tasks["code"].last, "run", "def run(self, key=3): pass")


def test_a_page_is_made_of_a_run_on_code(tmp_path: object) -> None:
    from pathlib import Path

    from tevo.colt5 import inspection

    home = Path(str(tmp_path))
    assert training.run(replace(CODE, steps=1, eval_every=1, save_every=1, batch=2), folder=home).finished
    found = inspection.make_page(home, home / "page.html", texts=2, rows=4)
    assert found["rows"] == 4 and "signature of" in (home / "page.html").read_text()
    assert torch.tensor(found["recall"]["all"]).max() <= 1
