from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tevo import create, list_systems, load
from tevo.card import Card, read_card
from tevo.catalogue import find, parse_part, rows
from tevo.catalogue.rows import source_files, source_hash


def test_144_rows_and_the_baselines_apart() -> None:
    assert len(list_systems()) == 144
    assert all(row.baseline for row in list_systems(baselines=True)[144:])
    assert all(row.link for row in rows().values())


def test_importing_tevo_imports_neither_torch_nor_a_system() -> None:
    code = "import tevo, sys; tevo.list_systems; print('torch' in sys.modules, 'tevo.mixers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_listing_reads_cards_without_torch() -> None:
    code = "import sys; from tevo.cli import main; main(['list', '--json']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 144


def test_an_unknown_name_gets_the_nearest_match() -> None:
    with pytest.raises(ValueError, match="unknown part 'sofmax' \\(did you mean 'softmax'"):
        create("sofmax", dim=8)


def test_a_planned_name_says_so() -> None:
    planned = next(row.id for row in list_systems() if row.status == "planned")
    with pytest.raises(ValueError, match="not implemented yet"):
        find(planned)


def test_an_unknown_option_gets_the_nearest_match() -> None:
    with pytest.raises(ValueError, match="no option 'head' \\(did you mean 'heads'"):
        create("softmax", dim=8, head=2)


def test_a_fact_is_dropped_and_a_demand_is_not() -> None:
    assert isinstance(create("gelu", facts={"dim": 8, "heads": 3, "grid": None}), nn.Module)
    with pytest.raises(ValueError, match="has no causal form"):
        create("gelu", facts={"dim": 8}, demands={"causal": True})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ValueError, match="learned needs length="):
        create("learned", dim=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aft", ("aft", {})),
        ("aft(window=32)", ("aft", {"window": 32})),
        ("x( a = 'b', c=d , e=(1, 2))", ("x", {"a": "b", "c": "d", "e": (1, 2)})),
    ],
)
def test_parts_are_read_with_their_options(text: str, expected: object) -> None:
    assert parse_part(text) == expected


@pytest.mark.parametrize("text", ["aft(32)", "aft(w=)", "aft(**{})", "aft(w=f(1))"])
def test_a_part_that_cannot_be_read_says_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="write it as name or name"):
        parse_part(text)


def test_a_part_of_the_users_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nclass Mine(nn.Module):\n    def __init__(self, *, dim, causal=False):\n"
        "        super().__init__()\n        self.f = nn.Linear(dim, dim)\n"
        "    def forward(self, x, context=None, *, mask=None, at=None):\n        return self.f(x)\n"
    )
    assert create(f"{file}:Mine", facts={"dim": 6, "heads": 2})(torch.zeros(1, 2, 6)).shape == (1, 2, 6)
    with pytest.raises(ValueError, match="has no class 'Min' \\(did you mean 'Mine'"):
        load(f"{file}:Min")
    with pytest.raises(ValueError, match="no file"):
        load(f"{tmp_path}/other.py:Mine")


def test_a_card_must_be_a_literal(tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text("x = 3\nCARD = Card(id=x)\n")
    with pytest.raises(ValueError, match="must be a literal"):
        read_card(file)


def test_a_card_refuses_unknown_words() -> None:
    fields = {"id": "x", "summary": "", "equations": (), "exports": {"x": "X"}}
    with pytest.raises(ValueError, match="unknown claim"):
        Card(role="mixer", cost="n", claims=("casual",), **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="role is"):
        Card(role="mixr", cost="n", **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost is"):
        Card(role="mixer", cost="n^3", **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory is 'n3'"):
        Card(role="mixer", cost="n", memory="n3", **fields)  # type: ignore[arg-type]


def test_the_hash_covers_what_a_system_imports() -> None:
    names = {path.name for path in source_files("softmax")}
    assert {"softmax.py", "multi_head.py", "attention.py", "masks.py", "contracts.py", "taps.py"} <= names
    assert source_hash("softmax") != source_hash("rope")


def test_lists_filter_by_role_claim_and_pattern() -> None:
    found = list_systems("*", role="position", where=["shift_invariant"], baselines=True)
    assert {"rope", "alibi", "t5_bias"} <= {row.id for row in found}
    assert [row.id for row in list_systems("swiglu", baselines=True)] in ([], ["glu_variants"])
    with pytest.raises(ValueError, match="unknown role 'mixr' \\(did you mean 'mixer'"):
        list_systems(role="mixr")
    with pytest.raises(ValueError, match="unknown claim"):
        list_systems(where=["fast"])
