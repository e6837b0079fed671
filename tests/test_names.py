from __future__ import annotations

import inspect
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import fields

import pytest

from tevo import cli
from tevo.bench.tasks import TASKS
from tevo.card import CLAIMS, ROLES
from tevo.catalogue.create import resolve
from tevo.catalogue.rows import rows
from tevo.names import suggest
from tevo.training.recipe import PRESETS, RECIPES

LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def options_of(verb: str) -> list[str]:
    """Every long option that a verb's help names."""
    texts = []
    for argv in ([verb, "--help"], *([[verb, kind, "--help"] for kind in RECIPES] if verb == "train" else [])):
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            cli.main(argv)
        texts.append(out.getvalue())
    return sorted(set(re.findall(r"--[a-z][a-z-]+", "\n".join(texts))))


def vocabularies() -> dict[str, list[str]]:
    """Every set of names that a user may type one of: what it is of -> its names."""
    present = [row for row in rows().values() if row.card]
    parts = [name for row in present if row.card for name in row.card.exports]
    found = {
        "parts": [*dict.fromkeys([*parts, *rows()])],
        "roles": list(ROLES),
        "claims": list(CLAIMS),
        "verbs": cli.verbs(),
        "tasks": list(TASKS),
    }
    for kind, cls in RECIPES.items():
        found[f"presets of {kind}"] = list(PRESETS[kind])
        found[f"keys of {kind}"] = [f.name for f in fields(cls)]
    for verb in cli.verbs():
        found[f"options of {verb}"] = options_of(verb)
    for name in parts:
        found[f"options of {name}"] = list(resolve(name).parameters())
    for name, task in TASKS.items():
        found[f"options of task {name}"] = list(inspect.signature(task).parameters)
    return {what: names for what, names in found.items() if names}


def misspelt(name: str, letters: str) -> Iterator[str]:
    """Every word one edit away: a letter left out, two exchanged, one of ``letters`` added or put in another's place."""
    start = 2 if name.startswith("--") else 0
    for at in range(start, len(name)):
        yield name[:at] + name[at + 1 :]
        if at + 1 < len(name):
            yield name[:at] + name[at + 1] + name[at] + name[at + 2 :]
        for letter in letters:
            yield name[:at] + letter + name[at + 1 :]
            yield name[:at] + letter + name[at:]


def share(letters: str) -> tuple[float, int, list[str]]:
    """Right suggestions, misspellings tried, and the wrong ones."""
    tried, wrong = 0, []
    for what, names in vocabularies().items():
        for name in names:
            for word in dict.fromkeys(misspelt(name, letters)):
                if word in names or not word.strip("-"):
                    continue  # another name is no misspelling
                tried += 1
                if suggest(word, names) != f" (did you mean {name!r}?)":
                    wrong.append(f"{what}: {word!r} for {name!r} got{suggest(word, names)}")
    return 1 - len(wrong) / tried, tried, wrong


def test_one_wrong_letter_gets_the_right_name_at_least_95_times_in_100() -> None:
    right, tried, wrong = share("eq")
    assert tried > 10_000
    assert right >= 0.95, f"{right:.3f} of {tried}: {wrong[:20]}"


@pytest.mark.slow
def test_any_wrong_letter_gets_the_right_name_at_least_95_times_in_100() -> None:
    right, tried, wrong = share(LETTERS)
    assert tried > 100_000
    assert right >= 0.95, f"{right:.3f} of {tried}: {wrong[:20]}"


@pytest.mark.parametrize(
    ("word", "names", "nearest"),
    [
        ("sofmax", ["softmax", "sofa"], "softmax"),
        ("adna", ["adan", "adam"], "adan"),
        ("lenght", ["length", "light"], "length"),
        ("headss", ["heads", "head"], "heads"),
        ("linear_attn", ["linear_attention", "lara"], "linear_attention"),
    ],
)
def test_the_nearest_name_is_suggested(word: str, names: list[str], nearest: str) -> None:
    assert suggest(word, names) == f" (did you mean {nearest!r}?)"


def test_nothing_is_suggested_for_a_word_like_no_other() -> None:
    assert suggest("zzz", ["softmax", "lru"]) == ""
    assert suggest("x", []) == ""
