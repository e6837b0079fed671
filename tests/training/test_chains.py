from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def totals(chains: int, bits: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.training.chains", "--chains", str(chains), "--bits", str(bits)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def check(chains: int, bits: int) -> None:
    found = totals(chains, bits)
    assert found["chains"] == found["chains_killed"] == found["identical"] == chains
    assert found["kills"] >= chains
    assert found["bits_flipped"] == found["refused"] == bits


def test_killed_runs_end_with_the_bits_of_the_uninterrupted_one_and_flipped_bits_are_refused() -> None:
    check(chains=2, bits=20)


@pytest.mark.slow
def test_forty_killed_chains_and_two_hundred_flipped_bits() -> None:
    check(chains=40, bits=200)
