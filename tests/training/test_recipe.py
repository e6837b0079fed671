from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tevo.training.recipe import PRESETS, LanguageModelRecipe, Recipe, SlotRecipe, differences, read, resolve


def written(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, **flags: object) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(LanguageModelRecipe, file=path, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_lose_to_preset_to_file_to_flags(tmp_path: Path) -> None:
    file = written(tmp_path, "steps: 7\ndim: 24\n")
    found = resolve(LanguageModelRecipe, preset="tiny", file=file, dim=36)
    assert found.clip == LanguageModelRecipe().clip
    assert found.length == PRESETS["lm"]["tiny"]["length"] != LanguageModelRecipe().length
    assert found.steps == 7 != PRESETS["lm"]["tiny"]["steps"]
    assert found.dim == 36


@pytest.mark.parametrize("preset", PRESETS["slots"])
def test_every_preset_of_slots_is_a_recipe_that_reads_back(tmp_path: Path, preset: str) -> None:
    recipe = resolve(SlotRecipe, preset=preset)
    file = written(tmp_path, recipe.to_json(), "recipe.json")
    assert read(file) == recipe
    with pytest.raises(ValueError, match="this program's recipes are of LanguageModelRecipe"):
        resolve(LanguageModelRecipe, file=file)


@pytest.mark.parametrize("preset", PRESETS["lm"])
def test_presets_are_valid(preset: str) -> None:
    resolve(LanguageModelRecipe, preset=preset)


def test_an_unknown_key_is_refused_with_line_and_nearest_match(tmp_path: Path) -> None:
    file = written(tmp_path, "# mine\nsteps: 7\nwieght_decay: 0.1\n")
    assert (
        refusal(file) == f"{file}:3: unknown key 'wieght_decay' (did you mean 'weight_decay'?); see `tevo train --help`"
    )


@pytest.mark.parametrize("field", [f.name for f in fields(LanguageModelRecipe)])
def test_one_wrong_letter_suggests_the_right_key(field: str) -> None:
    wrong = field[:-1] + ("x" if field[-1] != "x" else "y") if len(field) > 2 else field + "x"
    with pytest.raises(ValueError, match=f"did you mean '{field}'"):
        resolve(LanguageModelRecipe, **{wrong: 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 7\nlr: 0.1\nsteps: 8\n", ":3: key 'steps' was given on line 1 already"),
        ("steps: !!python/object/apply:os.system ['true']\n", ":1: steps holds a"),
        ("mixer: !!python/name:os.system ''\n", ":1: mixer holds a tag:yaml.org,2002:python/name:os.system"),
        ("mixer:\n  name: softmax\n", ":1: mixer holds a"),
        ("mixer: [[softmax]]\n", ":1: mixer holds a"),
        ("- steps\n", ":1: expected keys and values"),
        ("steps: 7\n  lr: 3\n", ":2: "),
        ("steps: seven\n", ":1: steps is 'seven', expected a whole number"),
        ("steps: true\n", ":1: steps is True, expected a whole number"),
        ("steps: 1.5\n", ":1: steps is 1.5, expected a whole number"),
        ("lr: .nan\n", ":1: lr is nan, expected a finite number"),
        ("lr: fast\n", ":1: lr is 'fast', expected a finite number"),
        ("mixer: no\n", ":1: mixer is False, expected text (put it in quotes)"),
        ("compile: 1\n", ":1: compile is 1, expected true or false"),
        ("betas: [0.9]\n", ":1: betas has 1 values, expected 2"),
        ("precision: fp8\n", ":1: precision is 'fp8', expected one of fp32, bf16, fp16"),
        ("kind: image\n", ":1: kind is 'image'"),
        ("kind: [lm]\n", ":1: kind is ['lm']"),
        ("lr: -1\n", "lr is -1.0, expected a finite number above 0"),
        ("batch: 5\naccumulate: 2\n", "batch=5 cannot be cut into accumulate=2"),
        ("mixer: [softmax, softmax, aft]\n", "mixer names 3 systems for depth=4 layers"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(written(tmp_path, text))


@pytest.mark.parametrize("kind", ["lmm", "[lm]", "7", "null"])
def test_a_stored_recipe_of_no_known_kind_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"kind: {kind}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml:1: unknown kind "):
        read(path)


def test_aliases_cannot_grow_into_a_bomb(tmp_path: Path) -> None:
    rows = ["a: &a [x, x, x, x, x, x, x, x]"] + [
        f"{c}: &{c} [{', '.join(['*' + p] * 8)}]" for p, c in pairwise("abcdefgh")
    ]
    assert ":2: b holds a" in refusal(written(tmp_path, "\n".join(rows)))


def test_unreadable_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "none.yaml")
    assert "not a .yaml, .yml or .json" in refusal(written(tmp_path, "steps: 7", "recipe.txt"))
    (tmp_path / "latin.yaml").write_bytes(b"data: \xe9\n")
    assert "is not valid" in refusal(tmp_path / "latin.yaml")
    assert "is not valid" in refusal(written(tmp_path, "mixer: " + "[" * 20000))
    assert "expected at most" in refusal(written(tmp_path, "#" * (2 << 20)))


def test_yaml_says_what_json_says(tmp_path: Path) -> None:
    yaml = written(tmp_path, "lr: 1e-3\nmixer: [softmax, aft]\ndepth: 2\nposition: null\n")
    json = written(tmp_path, '{"lr":\t1e-3, "mixer": ["softmax", "aft"],\n\t"depth": 2, "position": null}', "r.json")
    assert resolve(LanguageModelRecipe, file=yaml) == resolve(LanguageModelRecipe, file=json)
    assert resolve(LanguageModelRecipe, file=yaml).lr == 0.001


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert resolve(LanguageModelRecipe, file=written(tmp_path, "# nothing\n")) == LanguageModelRecipe()


def test_one_name_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert resolve(LanguageModelRecipe, file=written(tmp_path, "mixer: aft(window=3)\n")).mixer == ("aft(window=3)",)


positive = st.integers(min_value=1, max_value=10**9)
text = st.text(st.characters(exclude_categories=("Cs", "Cc")))


@given(
    steps=positive,
    lr=st.floats(min_value=1e-300, max_value=1e300),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    data=text,
    channel=st.none() | text,
    compile=st.booleans(),
)
def test_recipe_to_json_and_back_is_the_same_recipe(tmp_path_factory: Any, **values: Any) -> None:
    recipe = LanguageModelRecipe(**values)
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    path.write_text(recipe.to_json(), encoding="utf-8")
    again = read(path)
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.to_json() == recipe.to_json()


def test_the_hash_tells_recipes_apart_but_not_circumstances() -> None:
    recipe = LanguageModelRecipe()
    hashes = {
        recipe.hash,
        replace(recipe, seed=1).hash,
        replace(recipe, mixer=("aft",)).hash,
        replace(recipe, lr=2e-3).hash,
    }
    assert len(hashes) == 4
    assert replace(recipe, threads=3).hash == recipe.hash
    assert differences(recipe, replace(recipe, threads=3)) == {}
    assert differences(recipe, replace(recipe, lr=0.5, dim=8)) == {"lr": (0.001, 0.5), "dim": (128, 8)}


def test_every_field_has_a_line_of_help() -> None:
    assert issubclass(LanguageModelRecipe, Recipe)
    for field in fields(LanguageModelRecipe):
        assert field.metadata["help"], field.name
