from __future__ import annotations

import json
from pathlib import Path

import pytest

from tevo.cli import main

MINE = '''
import torch
from torch import nn


class RunningMean(nn.Module):
    """The mean of what came so far, through a gate."""

    def __init__(self, dim, heads=2, causal=True):
        super().__init__()
        self.value, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return torch.sigmoid(self.gate(x)) * self.value(x).cumsum(1) / counts


class Leaky(RunningMean):
    def forward(self, x):
        return super().forward(x) + 1e-3 * x.mean(1, keepdim=True)


class Windowed(RunningMean):
    def __init__(self, dim, window):
        super().__init__(dim)


class Crooked(RunningMean):
    def forward(self, x):
        raise RuntimeError("shapes\\nof all kinds")


five = 5
'''


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "my_part.py"
    file.write_text(MINE)
    return str(file)


def test_a_correct_part_of_the_users_passes(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{mine}:RunningMean", "--causal"]) == 0
    out = capsys.readouterr().out
    assert "checks hold" in out and "FAILED" not in out
    assert "built with dim=12, heads=3, causal=True" in out and "claims causal" in out


def test_a_future_leak_of_a_thousandth_is_named_with_the_smallest_input(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{mine}:Leaky", "--causal"]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    found = next(i for i, line in enumerate(lines) if line.startswith("B  causal "))
    assert "FAILED" in lines[found]
    assert "output 0 depends on later inputs" in lines[found + 1]
    assert lines[found + 2].startswith("smallest input: x of shape (1, 2, 1)")


def test_without_the_claim_the_same_part_is_not_asked(mine: str) -> None:
    assert main(["check", f"{mine}:Leaky"]) == 0


def test_options_are_written_with_the_part(mine: str) -> None:
    assert main(["check", f"{mine}:Windowed(window=3)", "--causal", "--group", "B"]) == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "tevo check needs a part"),
        (["{mine}:Leeky"], "has no class 'Leeky' (did you mean 'Leaky'?)"),
        (["nowhere.py:Leaky"], "no file 'nowhere.py'"),
        (["{mine}:Windowed"], "Windowed cannot be built: its argument 'window' has no default"),
        (["{mine}:Crooked"], "Crooked cannot be called with tokens of shape (2, 13, 12): RuntimeError: shapes"),
        (["{mine}:five"], "is a int, expected a class, a factory or a module"),
        (["{mine}:Leaky", "--padding"], "its forward has no argument 'mask'"),
        (["{mine}:Leaky", "--group", "X"], "unknown group 'X'; groups are A interface"),
        (["{mine}:Leaky", "--casual"], "tevo check has no option --casual (did you mean '--causal'?)"),
        (["softmax", "--causal"], "--causal says something of a part of yours, but softmax is of the catalogue"),
        (["softmax", "--workers", "0"], "--workers is 0, expected at least 1"),
        (["sofmax"], "unknown part 'sofmax' (did you mean 'softmax'"),
        (["no_such*"], "no present system matches 'no_such*'"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    mine: str, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *(a.format(mine=mine) for a in argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and sentence in err
    assert len(err.splitlines()) == 1


def test_a_file_that_cannot_be_imported_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_at_all\n")
    assert main(["check", f"{file}:X"]) == 2
    assert "broken.py cannot be imported: ModuleNotFoundError" in capsys.readouterr().err


def test_a_system_of_the_catalogue_is_checked_once_per_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outcomes = []
    for extra in ([], [], ["--fresh"]):
        assert main(["check", "rms_norm", "--json", *extra]) == 0
        outcomes.append(json.loads(capsys.readouterr().out))
    assert [outcome["parts"][0]["stored"] for outcome in outcomes] == [False, True, False]
    assert len({outcome["total"]["cases"] for outcome in outcomes}) == 1
    assert outcomes[0]["total"]["inputs"] > outcomes[0]["total"]["cases"] > 0


@pytest.mark.slow
def test_several_systems_at_a_time_give_what_one_after_the_other_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for workers in ("2", "1"):
        assert main(["check", "*_norm", "--group", "A", "--fresh", "--json", "--workers", workers]) == 0
        found.append(json.loads(capsys.readouterr().out))
    parts = [
        [(part["part"], [(r["check"], r["cases"]) for r in part["results"]]) for part in f["parts"]] for f in found
    ]
    assert parts[0] == parts[1] and len(parts[0]) > 3
    assert found[0]["total"]["cases"] == found[1]["total"]["cases"]


def test_explain_says_of_every_check_what_it_asks_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    from tevo.testing import CHECKS

    assert main(["check", "--explain"]) == 0
    out = capsys.readouterr().out
    for check in CHECKS:
        assert check.asks in out and check.why, check.name
