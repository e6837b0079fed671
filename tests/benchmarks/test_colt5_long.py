"""Long inputs: the exponent, the rows and their measurement at a small size, and the page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import colt5_long as long
from tevo.colt5.estimate import Estimate

SIZES = {256: 3.0, 512: 7.0, 1024: 11.0, 2048: 29.0}


def test_the_exponent_is_that_of_a_fitted_line_of_logarithms() -> None:
    assert long.exponent({n: 5.0 * n**1.7 for n in SIZES}) == pytest.approx(1.7)
    slope, _ = np.polyfit(np.log(list(SIZES)), np.log(list(SIZES.values())), 1)
    assert long.exponent(SIZES) == pytest.approx(slope)


def test_octaves_are_exponents_between_neighbours() -> None:
    assert long.octaves(dict(reversed(SIZES.items()))) == pytest.approx(
        [math.log2(b / a) for a, b in ((3, 7), (7, 11), (11, 29))]
    )


def test_the_summary_leaves_out_rows_of_a_held_m_and_types_of_one_length() -> None:
    row = {"what": "encode", "dtype": "float32", "m": 1 / 16, "seconds": 2.0}
    cells: list[dict[str, Any]] = [{**row, "n": n, "extra": size} for n, size in SIZES.items()]
    others = [
        {**cells[-1], "m": long.HELD, "extra": 1.0},
        {**cells[-1], "what": "generate"},
        {**cells[-1], "dtype": "bfloat16"},
    ]
    told = long.summary([*cells, *others])
    assert list(told) == ["float32"]
    assert told["float32"]["extra"] == long.exponent(SIZES) and told["float32"]["seconds"] == pytest.approx(0)


def test_m_is_held_at_what_the_longest_but_one_has() -> None:
    rows = long.rows()
    assert rows["encode/float32/65536/held"]["m"] == [1 / 16, 2048]
    assert rows["encode/float32/65536"]["n"] == rows["generate/float32/1"]["n"] == 65536


def test_rows_are_measured_once_stored_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long, "DTYPES", ("float32",))
    monkeypatch.setattr(long, "GENERATED", {1: 3, 2: 4})
    monkeypatch.setattr(long, "THREADS", torch.get_num_threads())
    # which has tests of its own, and takes most of the time here
    monkeypatch.setattr(long, "estimate", lambda config, *, n, dtype, targets: Estimate(1, 1, targets, n, 1.0))
    rows = long.rows(size="tiny", lengths=(200, 300))
    measured = []

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        measured.append(row)
        return long.measure(row)

    monkeypatch.setattr(long, "rows", lambda: rows)
    monkeypatch.setattr(long, "in_fresh_process", measure)
    out = tmp_path / "found.json"
    for pattern, known in (("encode/*/200", 1), ("*", 5), ("*", 5)):
        monkeypatch.setattr(sys, "argv", ["colt5_long", "--out", str(out), "--rows", pattern])
        assert long.main() == 0
        stored = json.loads(out.read_text())
        assert len(stored["cells"]) == known and stored["planned"] == 5
        assert f"{known} of 5 rows are stored" in long.page(stored)
    assert len(measured) == 5
    assert [cell["name"] for cell in stored["cells"]] == list(rows)
    for cell in stored["cells"][3:]:
        # the encoder, and one step for each token, of which the median is among those after the first
        assert cell["seconds"] > cell["encoder_seconds"] + cell["token_seconds"] > cell["token_seconds"] > 0
    assert [cell["estimate"]["cache"] for cell in stored["cells"]] == [1, 1, 1, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere peaks of memory cannot be set back")
def test_memory_in_a_fresh_process_is_near_the_estimate() -> None:
    found = long.in_fresh_process({"what": "encode", "size": "tiny", "dtype": "float32", "m": 1 / 16, "n": 8192})
    # kernels and allocator keep some MiB for themselves; 8192 tokens of width 128 are 4 MiB in each of the layers' states
    assert 0.8 < found["extra"] / found["estimate"]["peak"] < 1.5
    assert found["peak_rss"] > found["extra"] + found["estimate"]["weights"]


def test_the_page_tells_the_numbers_of_the_record() -> None:
    row = {"dtype": "float32", "m": 1 / 16, "load": 0.5, "seconds": 12.34, "extra": 3 * 2**29, "peak_rss": 5 * 2**30}
    told = {"weights": 2**31, "peak": 2**30, "cache": 0, "flops": 4_560_000_000_000, "seconds": 6.17}
    cells = [
        {**row, "what": "encode", "n": 8192, "load": 2.5, "estimate": told},
        {**row, "what": "encode", "n": 65536, "m": [1 / 16, 2048], "estimate": told},
        {**row, "what": "generate", "n": 65536, "beams": 4, "new": 8, "encoder_seconds": 9.87, "token_seconds": 0.1234}
        | {"estimate": told},
    ]
    machine = {"cpu": "some", "cores": 4, "threads": 2, "system": "one", "python": "3", "torch": "2"}
    summary = {"float32": {"extra": 0.987, "extra_octaves": [0.9, 1.05], "seconds": 1.2}}
    stored = {"cells": cells, "machine": machine, "planned": 4, "command": "c", "transformers": "5", "summary": summary}
    text = long.page(stored)
    assert "(2.00 GiB in float32)" in text
    assert "| float32 | 8,192 | n/16 | 1.50 | 5.00 | 1.50 | 12.3 | 4.56 | 2.00 |" in text
    assert "| float32 | 65,536 | at most 2,048 | 1.50 |" in text
    assert "| float32 | 65,536 | 4 beams | 8 | 9.9 | 0.123 | 12.3 | 1.50 | 5.00 |" in text
    assert "n^0.99 (from one length to the next 0.90, 1.05), seconds as n^1.20" in text
    assert "some, 4 cores, 2 threads" in text and "0.5 to 2.5" in text
    assert "3 of 4 rows are stored; `c` goes on with the missing 1." in text
    assert "Command: `c`" in long.page({**stored, "planned": 3})


def test_the_stored_record_is_linear_in_memory_and_fits_16_gb() -> None:
    stored = json.loads(long.TARGET.read_text(encoding="utf-8"))
    assert stored["summary"] == long.summary(stored["cells"])
    assert stored["summary"]["float32"]["extra"] == pytest.approx(1.0, abs=0.1)
    reached = [cell for cell in stored["cells"] if cell["n"] == 65536]
    assert {"encode", "generate"} == {cell["what"] for cell in reached}
    assert all(cell["peak_rss"] <= 16e9 for cell in stored["cells"])
