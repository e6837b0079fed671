from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.chains import final_hash, run_toy
from tests.training.test_loop import Listener

from tevo.training import checkpoint

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def launch(folder: Path, *arguments: object) -> int:
    """Two processes on the CPU, over gloo.

    ``--cpu`` would start a single process whatever ``--num_processes`` says; the variable does what it promises.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(HERE / "distributed.py"), str(folder), *map(str, arguments)]
    root = str(HERE.parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300).returncode


def newest(folder: Path) -> checkpoint.Checkpoint:
    path = checkpoint.latest(folder)
    assert path is not None
    return checkpoint.load(path)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert launch(tmp_path / "two", 0.0, 20) == 0
    run_toy(tmp_path / "one", dropout=0.0, steps=20, save_every=5, accumulate=3)
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert two.meta["environment"]["processes"] == 2
    assert (one.step, two.step) == (20, 20)
    for name, value in one.tensors.items():
        if name.startswith("trainee."):
            # float32 sums over two halves of the batch
            torch.testing.assert_close(two.tensors[name], value, rtol=0, atol=1e-5)


def test_two_processes_killed_and_resumed_end_with_the_same_bits(tmp_path: Path) -> None:
    assert launch(tmp_path / "whole", 0.1, 20) == 0
    assert launch(tmp_path / "cut", 0.1, 20, 13) != 0
    assert newest(tmp_path / "cut").step == 10
    assert launch(tmp_path / "cut", 0.1, 20) == 0
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    generators = newest(tmp_path / "whole").tensors
    assert not torch.equal(generators["generator.cpu.0"], generators["generator.cpu.1"])


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_says_so(tmp_path: Path) -> None:
    assert launch(tmp_path, 0.0, 20, 13) != 0
    listener = Listener()
    assert run_toy(tmp_path, watch=listener, dropout=0.0, steps=20, save_every=5, accumulate=3).finished
    assert "resumed, but not bit for bit: processes was 2, is 1" in listener.lines
