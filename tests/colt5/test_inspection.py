"""What was routed: against loops, numpy's correlation and maps with known weights; the page is whole and fetches nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tests.colt5.test_training import BYTES, SMALL

from tevo.cli import main
from tevo.colt5 import inspection, reading, training
from tevo.taps import record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert training.run(SMALL, folder=folder).finished
    return folder


def test_choices_are_what_the_routers_tapped(folder: Path) -> None:
    _, task, model, _ = training.open_run(folder)
    rows = task.batch("valid", 0, 0, 3)
    found = inspection.choices(model, rows["inputs"])
    with record() as seen, torch.no_grad():
        model(rows["inputs"], rows["shown"])
    assert found.weights.shape == found.routed.shape == (2, 3, 3, 96)
    for i, (at, weights) in enumerate(zip(seen["routed"], seen["routing_weights"], strict=True)):
        layer, router = divmod(i, 3)
        for row in range(3):
            expected = dict(zip(at[row].tolist(), weights[row].tolist(), strict=True))
            assert found.routed[layer, router, row].nonzero()[:, 0].tolist() == sorted(expected)
            for token, weight in expected.items():
                assert float(found.weights[layer, router, row, token]) == pytest.approx(weight)
    assert float(found.weights[~found.routed].abs().max()) == 0


def test_what_one_router_chooses_is_shown_for_queries_and_keys() -> None:
    recipe = replace(SMALL, keys=1.0, one_router=True)
    task = training.build_task(recipe)
    torch.manual_seed(0)
    model = training.build_model(recipe, task).eval()
    found = inspection.choices(model, task.batch("valid", 0, 0, 2)["inputs"])
    assert found.weights.shape == (2, 3, 2, 96)
    assert torch.equal(found.weights[:, 0], found.weights[:, 1])
    assert not torch.equal(found.weights[:, 0], found.weights[:, 2])


def test_padding_is_never_among_the_choices() -> None:
    task = training.build_task(BYTES)
    torch.manual_seed(0)
    model = training.build_model(BYTES, task).eval()
    inputs = torch.nn.functional.pad(task.batch("valid", 0, 0, 2)["inputs"], (0, 100))
    found = inspection.choices(model, inputs)
    assert not (found.routed & (inputs == 0)).any()


def test_recall_counts_marked_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    routed, marked = torch.rand(2, 3, 4, 13, generator=generator) < 0.4, torch.rand(4, 13, generator=generator) < 0.3
    found = inspection.recall(routed, marked)
    for layer in range(2):
        for router in range(3):
            hits = [routed[layer, router, b, n].item() for b in range(4) for n in range(13) if marked[b, n]]
            assert float(found[layer, router]) == pytest.approx(sum(hits) / len(hits))


def test_agreement_is_pearson_s_correlation_over_real_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 4, 13, generator=generator, dtype=torch.float64)
    real = torch.rand(4, 13, generator=generator) < 0.8
    found = inspection.agreement(weights, real)
    for layer in range(2):
        expected = np.corrcoef(weights[layer][:, real].numpy())
        for pair, (i, j) in enumerate(inspection.PAIRS):
            assert float(found[layer, pair]) == pytest.approx(expected[i, j], abs=1e-12)


def test_the_survey_s_recall_of_all_tokens_is_the_routed_share_and_it_is_json(folder: Path) -> None:
    _, task, model, _ = training.open_run(folder)
    found = inspection.survey(model, task, batch=4, rows=7)
    assert found["recall"]["all"] == [[0.25, 0.5, 0.25]] * 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    # batches do not matter
    again = inspection.survey(model, task, batch=7, rows=7)
    assert again["recall"] == found["recall"] and again["rows"] == 7


def test_static_routing_has_no_correlation_where_weights_are_constant() -> None:
    task = training.build_task(SMALL)
    model = training.build_model(replace(SMALL, routing="static", shares=(1.0, 1.0)), task).eval()
    assert inspection.survey(model, task, rows=4)["agreement"] == [[None] * 3] * 2


def test_the_pieces_of_a_text_put_together_are_the_text() -> None:
    task = training.build_task(BYTES)
    text = 'f?\nx = "αβ—✓" # ok'.encode() + b"\xff!"
    tokens = torch.cat([torch.tensor(list(text)) + 3, torch.zeros(4, dtype=torch.long)])
    pieces = reading.pieces_of(task.last, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == 'f?\nx = "αβ—✓" # ok\N{REPLACEMENT CHARACTER}!'
    words = training.build_task(SMALL)
    inputs = words.batch("valid", 0, 0, 1)["inputs"][0]
    assert "".join(reading.pieces_of(words.last, inputs)).split() == words.last.text(inputs).split()


def test_a_map_keeps_the_text_and_darkens_with_weight() -> None:
    pieces = ["a", "<", "b", "c", "d"]
    html = inspection.heat_map(pieces, torch.tensor([0.0, 0.5, 0.5, 1.0, 0.01]), torch.tensor([0, 0, 1, 0, 0]).bool())
    assert html == 'a<i class="w3">&lt;</i><i class="w3 m">b</i><i class="w5">c</i><i class="w1">d</i>'
    assert inspection.heat_map(["a", "b"], torch.zeros(2)) == "ab"


def test_the_page_is_whole_and_fetches_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", "colt5", str(folder), "--out", str(tmp_path / "page.html"), "--scenes", "2"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"(src|href)=|https?:", page) is None
    assert page.count('class="tabs"') == 2 and "keys and values with queries" in page
    assert page.count("<svg") == 2
    # 2 texts, each of 2 layers and then of 3 routers for each
    assert page.count('<div class="pane">') == 2 * (2 + 6)
    _, task, _, _ = training.open_run(folder)
    shown = re.sub(r"<[^>]+>", "", page.split('<div class="text">')[1].split("</div>")[0])
    assert shown.split() == task.last.text(task.batch("test", 0, 0, 1)["inputs"][0]).split()
    assert "page.html" in capsys.readouterr().out


def test_a_model_that_routes_nothing_has_no_picture() -> None:
    task = training.build_task(SMALL)
    model = training.build_model(replace(SMALL, routing="none"), task)
    with pytest.raises(ValueError, match="this model has no heavy branch"):
        inspection.choices(model, task.batch("valid", 0, 0, 1)["inputs"])


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        ("learned", "; learned routing of 0.25 of them; step"),
        ("longt5", "; LongT5's encoder; step"),
        ("none", "no heavy branch"),
    ],
)
def test_a_run_is_said_to_route_what_it_routes(routing: str, said: str) -> None:
    assert said in inspection.describe_run(replace(SMALL, routing=routing), 3)
    assert inspection.describe_run(replace(SMALL, task="rearrange", what="sort", facts=()), 3).startswith(
        "rearrange, sort, 96"
    )
