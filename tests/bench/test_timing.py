from __future__ import annotations

import sys

import pytest

from tevo.bench.timing import Server, alternate, measure_lengths

SOFTMAX = {"dim": 12, "heads": 3, "mixer": "softmax"}


def test_parts_alternate_in_reverse_order():
    assert alternate(["a", "b", "c"], 0) + alternate(["a", "b", "c"], 1) == ["a", "b", "c", "c", "b", "a"]


def test_every_part_is_measured_at_every_length_and_failures_are_results():
    seen = []
    found = measure_lengths(
        {"softmax": SOFTMAX, "broken": {**SOFTMAX, "mixer": "fnet"}}, [16, 32], rounds=2, done=seen.append
    )
    assert found == seen and len(found) == 2 * 2 * 3
    for entry in found:
        if entry["part"] == "broken":
            assert "no causal form" in entry["error"]
        elif entry["what"] == "time":
            middle, fastest = entry["train_s"]
            assert 0 < fastest <= middle
            # a training pass holds a forward pass
            assert entry["forward_s"][1] < entry["train_s"][0]
        else:
            assert entry["forward_bytes"] >= 0 and entry["train_bytes"] >= 0
    # what failed at one length is not tried at longer ones
    assert all(e["error"].startswith("not tried") for e in found if e["part"] == "broken" and e["length"] == 32)
    # a rerun measures nothing again
    assert measure_lengths({"softmax": SOFTMAX}, [16, 32], known=[e for e in found if e["part"] == "softmax"]) == [
        e for e in found if e["part"] == "softmax"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is exact to the page on Linux alone")
def test_peak_memory_is_that_of_the_tensors(tmp_path):
    part = tmp_path / "part.py"
    part.write_text(
        "import torch\n"
        "class Big(torch.nn.Module):\n"
        "    def __init__(self, *, dim, causal=True):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x, context=None, *, mask=None, at=None):\n"
        "        big = torch.ones(16 * 2**20 // 4)\n"
        "        return x * self.scale * big[0]\n"
    )
    job = {"what": "memory", "build": {"dim": 8, "mixer": f"{part}:Big"}, "length": 4, "batch": 1, "threads": 1}
    with Server() as server:
        found = server.run(job)
    # the kernel counts pages in lots of 64 for each thread, and everything else is small
    assert found["forward_bytes"] == pytest.approx(16 * 2**20, abs=2**20)


def test_a_job_that_takes_too_long_is_given_up(tmp_path):
    part = tmp_path / "part.py"
    part.write_text(
        "import time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    def __init__(self, *, dim, causal=True):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x, context=None, *, mask=None, at=None):\n"
        "        time.sleep(60 * (x.shape[1] > 16))\n"
        "        return x * self.scale\n"
    )
    job = {"what": "time", "build": {"dim": 8, "mixer": f"{part}:Slow"}, "length": 17, "batch": 1, "threads": 1}
    with Server(patience=5.0) as server:
        assert server.run(job) == {"error": "took longer than 5 s"}
        # the server lives on
        assert "forward_s" in server.run({**job, "build": SOFTMAX})


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_running_out_of_memory_is_a_result(tmp_path):
    part = tmp_path / "part.py"
    part.write_text(
        "import torch\n"
        "class Huge(torch.nn.Module):\n"
        "    def __init__(self, *, dim, causal=True):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x, context=None, *, mask=None, at=None):\n"
        "        return x * self.scale * torch.empty(2**50 // 4 * (x.shape[1] > 16) + 1)[0]\n"
    )
    job = {"what": "memory", "build": {"dim": 8, "mixer": f"{part}:Huge"}, "length": 17, "batch": 1, "threads": 1}
    with Server() as server:
        assert server.run(job) == {"error": "out of memory"}
