"""Charts: well-formed, nothing fetched, values at their places."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tevo import charts
from tevo.charts import Bar, Group

CHARTS = {
    "curve": charts.curve([(1, 44.5), (2, 57.0), (3, 62.6)], label="rounds", mark=2, marked="as trained"),
    "bars": charts.bars([Bar("a <b>", 1.0, "1.0 x", True), Bar("c", 2.5, "2.5 x", False, solid=False)], title="time"),
    "lengths": charts.lengths([Bar("ours", 3e-15, "3e-15", True), Bar("theirs", 6.8, "6.8", False)], title="off by"),
    "lines": charts.lines(
        {"ours": [(0, 0.1), (10, 0.9)], "<b>": [(0, 0.2), (10, 0.9)]}, label="steps", title="match", ours="ours"
    ),
    "dots": charts.dots([Group("ours", [93.0, 94.0], True)], lines={"chance": 0.1, "hue": 79.9}, title="seeds"),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_well_formed_and_fetch_nothing(name: str) -> None:
    root = ElementTree.fromstring(CHARTS[name])
    assert root.tag == "svg"
    assert "http" not in CHARTS[name] and "href" not in CHARTS[name]
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for text in root.iter("text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height


def test_bars_are_as_long_as_their_values() -> None:
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', CHARTS["bars"])]
    assert widths[1] / widths[0] == pytest.approx(2.5, abs=0.01)
    assert "a &lt;b&gt;" in CHARTS["bars"]


def test_each_power_of_ten_is_as_far_from_the_next() -> None:
    text = charts.lengths([Bar(str(e), 10.0**e, "", True) for e in (-9, -6, -3)], title="t")
    ends = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', text)]
    assert ends[1] - ends[0] == pytest.approx(ends[2] - ends[1], abs=0.2)
    # no difference at all stands at the beginning
    nothing = charts.lengths([Bar("0", 0.0, "0", True), Bar("1", 1.0, "1", False)], title="t")
    first, second = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', nothing))
    assert first < second


def test_every_seed_is_a_dot() -> None:
    assert CHARTS["dots"].count("<circle") == 2
    assert "hue 79.9" in CHARTS["dots"]


def test_the_curve_rises_upwards_and_marks_what_was_trained() -> None:
    rows = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', CHARTS["curve"])]
    assert rows == sorted(rows, reverse=True)
    assert "as trained" in CHARTS["curve"]
    assert "as trained" not in charts.curve([(1, 5.0), (2, 6.0)], label="x", mark=7, marked="as trained")


def test_curves_that_end_together_have_names_apart() -> None:
    rows = [
        float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>(?:ours|&lt;b&gt;) 0.90', CHARTS["lines"])
    ]
    assert len(rows) == 2 and abs(rows[0] - rows[1]) >= 13
    assert CHARTS["lines"].count("var(--us)") == 1


def test_a_number_is_short_and_never_in_powers_of_ten() -> None:
    assert [charts.short(x) for x in (3004.2, 101.4, 40.42, 0.01234)] == ["3,004", "101", "40.4", "0.0123"]


def test_names_of_curves_that_end_at_zero_keep_apart_above_the_axis() -> None:
    picture = charts.lines({name: [(0, 1.0), (9, 0.0)] for name in "abc"}, label="step", title="three")
    rows = sorted(float(row) for row in re.findall(r'y="([\d.]+)"[^>]*>[abc] 0.00<', picture))
    assert len(rows) == 3 and rows[-1] <= 204 and all(b - a >= 13 for a, b in pairwise(rows))


def test_a_long_name_of_a_row_of_dots_has_room() -> None:
    name = "the paper's training on the same patches (5 seeds)"
    chart = charts.dots([charts.Group(name, [50.0], False)], lines={}, title="t")
    end = float(re.search(rf'<text x="([\d.]+)"[^>]*>{re.escape(name.replace(chr(39), "&#x27;"))}', chart)[1])
    # letters of 13 px are 6.5 px wide on average
    assert end >= 6.5 * len(name)
    width = float(re.search(r'viewBox="0 0 (\d+)', chart)[1])
    assert end < float(re.search(r'cx="([\d.]+)"', chart)[1]) < width


def test_what_marks_the_training_keeps_away_from_a_low_point_there() -> None:
    def height(points: list[tuple[int, float]]) -> float:
        chart = charts.curve(points, label="x", mark=1, marked="as trained")
        return float(re.search(r'y="([\d.]+)"[^>]*>as trained', chart)[1])

    assert height([(1, 10.0), (2, 90.0)]) < height([(1, 90.0), (2, 10.0)])
