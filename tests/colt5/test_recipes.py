from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tevo.colt5.recipes import CoLT5Recipe
from tevo.training.recipe import PRESETS, read, resolve

THREE = CoLT5Recipe(
    steps=100, lengths=(40, 80, 160), phases=(5, 3, 2), rows=(4, 2, 1), shares=(1.0, 0.0625, 0.03), eps=(1.0, 0.25)
)


def test_phases_are_parts_of_the_steps() -> None:
    assert [THREE.place(step) for step in (0, 49, 50, 79, 80, 99, 500)] == [
        (0, 0, 50),
        (0, 0, 50),
        (1, 50, 80),
        (1, 50, 80),
        (2, 80, 100),
        (2, 80, 100),
        (2, 80, 100),
    ]


def test_the_share_falls_geometrically_from_one_and_rests_at_the_end_of_each_phase() -> None:
    shares = [THREE.share(step) for step in range(100)]
    assert shares[:51] == [1.0] * 51
    assert all(after <= before for before, after in pairwise(shares))
    # 0.8 of 29 steps are 23.2
    assert shares[74:80] == pytest.approx([0.0625] * 6) and shares[73] > 0.0625
    ratios = [after / before for before, after in pairwise(shares[50:74])]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert shares[-1] == pytest.approx(0.03)


def test_a_dense_model_always_takes_all() -> None:
    dense = CoLT5Recipe(routing="dense", shares=(0.1,))
    assert {dense.share(step) for step in range(0, 1500, 100)} == {1.0}


def test_softness_goes_from_the_first_to_the_last_number() -> None:
    assert (THREE.softness(0), THREE.softness(99), THREE.softness(200)) == pytest.approx((1.0, 0.25, 0.25))
    assert THREE.softness(33) == pytest.approx(0.25 ** (1 / 3))


@pytest.mark.parametrize("preset", PRESETS["colt5"])
def test_presets_resolve_and_read_back_equal(preset: str, tmp_path: Path) -> None:
    recipe = resolve(CoLT5Recipe, preset=preset, routing="static")
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read(tmp_path / "recipe.json") == recipe
    assert json.loads(recipe.to_json())["kind"] == "colt5"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"lengths": (10, 20)},
            "phases do not agree: lengths has 2, phases has 1, rows has 1, shares has 1; give each",
        ),
        ({"lengths": (), "phases": (), "rows": (), "shares": ()}, "phases do not agree: lengths has 0"),
        ({"facts": (3, 4)}, "phases do not agree: .*, facts has 2"),
        ({"phases": (0,)}, r"phases are \(0,\), expected at least 1 each"),
        ({"shares": (0.0,)}, r"shares are \(0.0,\), expected numbers from 1e-6 to 1"),
        ({"shares": (1.5,)}, "expected numbers from 1e-6 to 1"),
        ({"eps": (1.0, 0.0)}, "expected numbers above 0"),
        ({"task": "modules", "facts": (3,)}, r"facts are \(3,\) for task=modules, which has none"),
        ({"compile": True}, "compile is true"),
        ({"outlines": (8,)}, r"outlines are \(8,\) for task=lookup, which has none"),
        ({"task": "code", "outlines": (8, 0)}, "phases do not agree: .*, outlines has 2"),
        ({"task": "code", "told": (0.5,)}, "told is .* for task=code, which cannot tell"),
        (
            {"task": "modules", "forced": True},
            "forced is true for task=modules and routing=learned, expected lookup or",
        ),
        ({"routing": "none", "forced": True}, "forced is true for task=lookup and routing=none"),
        ({"looks": (-2,)}, r"looks are \(-2,\) for start=paper, which has none"),
        ({"keys": 0.0}, "keys is 0.0 with one_router=False, expected a multiple above 0"),
        ({"one_router": True}, "keys is 2.0 with one_router=True, expected .* 1 with one router"),
        ({"keys": 1.0, "routing": "longt5"}, "for routing=longt5, which routes nothing"),
        ({"keys": 0.5, "routing": "dense"}, "for routing=dense, which routes nothing or all"),
        ({"cross_kv_heads": 3}, "cross_kv_heads is 3, expected a divisor of heads=4"),
        ({"routing": "longt5", "forced": True}, "forced is true for task=lookup and routing=longt5"),
        ({"heavy_heads": 0}, "heavy_heads is 0, expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a share"),
        ({"what": "sort"}, "what is sort for task=lookup, expected task=rearrange; leave it out"),
        ({"task": "listops", "marked": 3}, "marked is 3 for task=listops, expected task=rearrange"),
        ({"task": "rearrange", "depth": 4}, "depth is 4 for task=rearrange, expected task=listops"),
        ({"children": 4}, "children is 4 for task=lookup, expected task=listops"),
        ({"task": "rearrange", "told": (0.5,)}, "told is .* for task=rearrange, which cannot tell"),
        (
            {"task": "listops", "forced": True},
            "forced is true for task=listops and routing=learned, expected lookup or",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CoLT5Recipe(**options)  # type: ignore[arg-type]


def test_recipes_need_no_torch() -> None:
    code = "import sys; import tevo.training.recipe, tevo.colt5.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_that_came_later_do_not_change_the_content_of_runs_without_them() -> None:
    later = {"outlines", "forced", "keys", "one_router", "cross_kv_heads", "what", "marked", "depth", "children"}
    assert not later & CoLT5Recipe().content().keys()
    assert CoLT5Recipe(keys=1.0).content()["keys"] == 1.0
    assert CoLT5Recipe(forced=True, routing="static").content()["forced"] is True
    assert CoLT5Recipe(task="code", outlines=(9,)).content()["outlines"] == (9,)
    assert CoLT5Recipe(task="rearrange", what="sort").content()["what"] == "sort"
