from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.harness import Case, discover, measure, relative_rms, training

ROOT = Path(__file__).resolve().parents[2]


def sleeper(seconds: float, calls: list[str] | None = None, name: str = ""):
    def run() -> torch.Tensor:
        if calls is not None:
            calls.append(name)
        time.sleep(seconds)
        return torch.ones(3)

    return run


def test_a_variant_that_sleeps_twice_as_long_shows_two():
    result = measure(Case(variants={"short": sleeper(0.02), "long": sleeper(0.04)}, baseline="short"), seconds=10)
    assert result["rounds"] >= 11
    # a sleep overshoots by a fraction of a millisecond, on a loaded machine by a few
    assert 1.7 < result["variants"]["long"]["ratio"] < 2.3
    assert 1.7 < result["variants"]["long"]["ratio_of_minima"] < 2.3
    assert result["variants"]["short"]["ratio"] == 1.0


def test_variants_take_turns_and_short_ones_run_just_before():
    calls: list[str] = []
    lengths = {"a": 0.0, "b": 0.025, "c": 0.0}
    found = measure(Case(variants={n: sleeper(t, calls, n) for n, t in lengths.items()}, baseline="a"), seconds=0.5)
    timed = calls[4 + 6 :]  # after the comparison (the baseline once more) and two warm-ups of each
    assert found["warmed"] == ["a", "c"]
    assert len(timed) >= 33
    assert timed == ["a", "a", "b", "c", "c"] * (len(timed) // 5)


def test_a_short_variant_does_not_pay_for_the_one_before_it():
    paid = []

    def first() -> torch.Tensor:
        paid.clear()
        return torch.ones(3)

    def second() -> torch.Tensor:
        if not paid:
            time.sleep(0.01)
        paid.append(True)
        return torch.ones(3)

    found = measure(Case(variants={"first": first, "second": second}, baseline="first"), seconds=0.5)
    assert found["variants"]["second"]["ratio"] < 100  # 0.01 s are some 10,000 times as long as the first


def test_a_wrong_variant_is_refused_before_timing():
    calls: list[str] = []

    def right() -> torch.Tensor:
        calls.append("right")
        return torch.ones(3)

    def wrong() -> torch.Tensor:
        calls.append("wrong")
        return torch.tensor([1.0, 1.0, 1.001])

    with pytest.raises(ValueError, match=r"variant 'wrong' differs from the baseline 'right' by 5\.8e-04"):
        measure(Case(variants={"right": right, "wrong": wrong}, baseline="right"), seconds=1.0)
    assert calls.count("wrong") == 1


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (torch.full((3,), torch.nan), "differs"),
        (torch.ones(2), "returns shapes"),
        ((torch.ones(3), torch.ones(3)), "returns shapes"),
        (None, "returns NoneType"),
    ],
)
def test_what_cannot_be_equal_is_refused(result, complaint):
    case = Case(variants={"right": lambda: torch.ones(3), "other": lambda: result}, baseline="right")
    with pytest.raises(ValueError, match=complaint):
        measure(case, seconds=1.0)


def test_a_check_of_the_case_takes_the_place_of_the_comparison():
    def check() -> None:
        raise ValueError("not equal")

    with pytest.raises(ValueError, match="not equal"):
        measure(Case(variants={"a": lambda: None}, baseline="a", check=check), seconds=1.0)
    measure(Case(variants={"a": lambda: None}, baseline="a", check=lambda: None), seconds=0.01)


def test_a_variant_whose_time_jumps_is_marked_noisy():
    turns = iter(range(10**6))

    def jumps() -> torch.Tensor:
        time.sleep(0.02 if next(turns) % 3 else 0.002)
        return torch.ones(3)

    result = measure(Case(variants={"steady": sleeper(0.02), "jumps": jumps}, baseline="steady"), seconds=1.0)
    assert "jumps" in result["noisy"]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline is 'b', expected one of a"):
        Case(variants={"a": lambda: None}, baseline="b")


def test_training_returns_the_output_and_every_gradient():
    x, w = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    y, dx, dw = training(lambda a, b: a * b, x, w)()
    assert torch.equal(y, x * w)
    assert torch.allclose(dx / w, dw / x)  # both are the cotangent
    assert relative_rms(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0.0


def test_every_case_file_exports_cases_under_its_own_name():
    for path in (ROOT / "benchmarks" / "cases").glob("[!_]*.py"):
        assert any(name.startswith(f"{path.stem}/") for name in discover()), path.name


def test_a_run_stores_ratios_machine_and_the_command_that_reproduces_it(tmp_path):
    name = "norms/forward/64x256"
    command = [sys.executable, "-m", "benchmarks.run", "--case", name, "--allocator", "tuned", "--seconds", "0.2"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    stored = json.loads((tmp_path / f"{name}.json").read_text())
    assert stored["case"] == name
    record = stored["allocators"]["tuned"]
    assert record["command"] == f"python -m benchmarks.run --case {name} --allocator tuned --threads 2 --seconds 0.2"
    assert record["environment"]["MALLOC_MMAP_THRESHOLD_"] == "100000000000"
    assert record["machine"]["threads"] == 2
    assert record["variants"]["F.layer_norm"]["ratio"] == 1.0
    assert record["rounds"] >= 3


def test_an_unknown_case_is_refused_with_the_names(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--case", "nothing", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no case is called 'nothing'; the cases are" in done.stderr
    assert not list(tmp_path.iterdir())
