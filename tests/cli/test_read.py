from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tevo.cli import main, verbs


@pytest.mark.parametrize("verb", verbs())
def test_help_is_short_and_starts_with_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--help"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr().out
    assert code == 0
    assert len(out.splitlines()) <= 40, f"`tevo {verb} --help` has {len(out.splitlines())} lines"
    assert out.split("tevo ", 1)[1].startswith(verb)
    assert out[:400].count(f"tevo {verb}") >= 2


def test_top_help_does_not_import_torch_and_is_quick() -> None:
    code = "import sys; from tevo.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    # the goal is 0.3 s on an idle machine; tests share theirs
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["lst"], "error: unknown verb 'lst' (did you mean 'list'?)"),
        (["list", "--rol", "mixer"], "error: tevo list has no option --rol (did you mean '--role'?)"),
        (["show", "rop"], "error: unknown part 'rop' (did you mean 'rope'?)"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(sentence)
    assert len(err.splitlines()) == 1


def test_show_prints_equation_cost_claims_evidence_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "rope"]) == 0
    out = capsys.readouterr().out
    for part in ("theta_j", "cost:", "claims", "evidence", "departures", "citation", "positions/rope.py"):
        assert part in out


def test_show_and_list_give_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "rope", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "rope"
    assert main(["list", "--json", "--role", "block"]) == 0
    assert {row["role"] for row in json.loads(capsys.readouterr().out)} == {"block"}


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m tevo list | head -1", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)
