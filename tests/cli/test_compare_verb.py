from __future__ import annotations

import json

import pytest

from tevo.cli import main
from tevo.cli.compare import seconds


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("45", 45), ("2 m", 120)])
def test_budgets_are_read_with_their_unit(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--budget", "soon", "lru"], "error: --budget is 'soon', expected a time such as 90s, 5m or 2h"),
        (["--workers", "slurm", "lru"], "error: --workers is 'slurm', expected local:N"),
        (["--seeds", "1,2,3", "lru"], "error: --seeds is '1,2,3'"),
        (["--lengths", "long", "lru"], "error: --lengths is 'long'"),
        (["--task", "txt", "lru"], "error: unknown task 'txt'"),
        (["lruu", "--dim", "8"], "error: unknown part 'lruu'"),
        (["fnet", "--dim", "8"], "error: fnet has no causal form; mixers that do"),
        (["--budgt", "5m"], "error: tevo compare has no option --budgt"),
        ([], "error: compare got no part"),
        (["lru", "--report", "no/such/folder/out.html"], "error: --report no/such/folder/out.html: the folder"),
        (["--from", "none.json"], "error: --from takes no parts, and needs --report"),
    ],
)
def test_a_mistake_gets_one_sentence(argv, sentence, capsys):
    assert main(["compare", *argv]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(sentence)


def test_dry_run_shows_the_plan_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [
        "compare",
        "lru",
        "--task",
        "recall",
        "--dim",
        "8",
        "--depth",
        "1",
        "--budget",
        "1s",
        "--workers",
        "local:1",
    ]
    assert main([*argv, "--dry-run"]) == 0
    err = capsys.readouterr().err
    for text in ("3 of softmax, 1 of each other part", "about ", "trimmed: seeds of softmax 5 -> 3", "hidden width"):
        assert text in err
    assert list(tmp_path.iterdir()) == []
    assert main([*argv, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seeds"] == [3, 1] and set(plan["models"]["recall"]) == {"softmax", "lru"}
