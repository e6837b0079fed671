from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from tevo.bench.report import headline, render
from tevo.bench.verdicts import BETTER, UNDECIDED, WORSE
from tevo.cli import main


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "link", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(finished) -> str:
    return render(finished[2])


def test_the_report_is_one_well_formed_file_without_scripts_or_anything_fetched(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert {"svg", "table", "math", "details"} <= tags.seen
    assert not {"script", "link", "img", "iframe", "object"} & tags.seen
    for name, value in tags.attributes:
        if name in ("src", "href", "xlink:href"):
            # links to papers are for clicking; pictures refer to parts of themselves
            assert value.startswith(("#", "https://arxiv.org/", "https://")), value
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_ids_are_unique_in_the_page(page):
    ids = [i for i in re.findall(r'<(?:clipPath|path|g|use|linearGradient)[^>]*?\bid="([^"]+)"', page) if i[0] in "mp"]
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(set(clips)) == len(clips) > 3
    assert ids


def test_the_report_says_what_a_reader_asks(finished, page):
    _, _, results = finished
    for text in (
        "How it was made fair",
        "Tuning budget for each part: none",
        "tevo compare softmax mine.py:Mine",
        "(user part)",
        "no card",
        "chance",
        "recipe of recall: softmax",
        "lengths 5 -&gt; 2",
        results["machine"]["processor"],
    ):
        assert text in page, text


def test_the_same_results_give_the_same_report(finished, page):
    assert render(finished[2]) == page


def test_the_headline_follows_the_verdicts(finished):
    results = copy.deepcopy(finished[2])
    name = results["parts"][1]["name"]
    row = results["parts"][1]["tasks"]["recall"]
    for word, text in ((BETTER, "better than"), (WORSE, "worse than"), (UNDECIDED, "not told apart from")):
        row["verdict"] = word
        assert f"{name} ({row['mean']:.3f}) is {text} softmax" in headline(results)[0]
    row["verdict"], row["mean"] = None, None
    assert f"{name} gave no score" in headline(results)[0]


def test_a_failed_training_and_a_missing_measurement_are_shown(finished):
    results = copy.deepcopy(finished[2])
    part = results["parts"][1]
    part["tasks"]["recall"] |= {
        "seeds": [{"seed": 0, "error": "FloatingPointError: the loss is not finite"}],
        "mean": None,
        "interval": None,
        "verdict": None,
        "difference": None,
    }
    part["cost"]["curves"]["train_s"][-1] = None
    part["cost"]["errors"] = {"time at 32": "out of memory"}
    page = render(results)
    assert "failed: FloatingPointError: the loss is not finite" in page
    assert "time at 32 tokens: out of memory" in page


def test_names_are_escaped(finished):
    results = copy.deepcopy(finished[2])
    results["command"] = "tevo compare '<b>x</b>'"
    assert "<b>x</b>" not in render(results)


def test_results_of_another_version_are_refused(finished):
    with pytest.raises(ValueError, match="schema version 0"):
        render({**finished[2], "schema": 0})


def test_a_report_is_rebuilt_from_stored_results(tmp_path, finished, capsys):
    stored, report = tmp_path / "results.json", tmp_path / "out.html"
    stored.write_text(json.dumps(finished[2]))
    assert main(["compare", "--from", str(stored), "--report", str(report)]) == 0
    assert "How it was made fair" in report.read_text()
    assert str(report) in capsys.readouterr().out
