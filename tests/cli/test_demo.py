"""``tevo demo``: the page from a run, training that ends with its figure, and one sentence for a mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.slot_attention.test_demo import LIVE, SMALL

from tevo.cli import demo, main
from tevo.slot_attention import cost
from tevo.slot_attention import demo as demonstration
from tevo.slot_attention.recipes import PRESETS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(PRESETS, "demo", SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_is_short_starts_with_examples_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(lines[:2]) == demo.EXAMPLES and len(lines) <= 40 and all(len(line) <= 100 for line in lines)
    code = "import sys; from tevo.cli import demo; demo.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["colt"], "error: tevo demo has nothing to show of 'colt'; expected slots or colt5"),
        (["slots", "--out", "no/such/page.html"], "error: --out no/such/page.html: the folder"),
        (["slots", "--run", "nowhere"], "error: nowhere is not a run"),
        (["slots", "--sed", "1"], "error: unknown option '--sed'"),
    ],
)
def test_a_mistake_gets_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith(sentence)


def test_a_copy_without_weights_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "SHIPPED", tmp_path)
    assert main(["demo", "slots", "--out", str(tmp_path / "x.html")]) == 2
    assert "this copy of tevo ships no weights" in capsys.readouterr().err


def test_training_goes_the_ordinary_way_and_ends_with_the_figure(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "slots", "--train", "--seed", "3", "--run", "runs/mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"FG-ARI -?\d+\.\d %", out[-1])
    assert any(line.startswith("chance, on valid") for line in out)
    assert (small / "runs/mine/pictures/index.html").is_file()
    assert '"seed": 3' in (small / "runs/mine/recipe.json").read_text()
    # the same figure as of evaluation
    assert main(["eval", "runs/mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out[-1]
    # and the page of that run, costs measured
    monkeypatch.setattr(cost, "measure", lambda **options: LIVE)
    assert main(["demo", "slots", "--run", "runs/mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any("had up to 3: FG-ARI" in line for line in out)
    assert "2.00 x" in (small / "slots.html").read_text()
