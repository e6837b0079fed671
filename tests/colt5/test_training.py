from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tevo.colt5 import answerer, training
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.routers import SoftTopK
from tevo.objectives.next_token import IGNORED
from tevo.taps import record
from tevo.training.loop import evaluate
from tevo.training.progress import Silent
from tevo.training.recipe import resolve

SMALL = resolve(CoLT5Recipe, preset="tiny", steps=6, save_every=3, eval_every=6, log_every=1, examples=7)
BYTES = CoLT5Recipe(task="modules", lengths=(300,), dim=16, heavy_heads=1, light_dim=16, heavy_dim=16, examples=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert training.run(SMALL, folder=folder).finished
    return folder


def test_inputs_grow_and_held_out_ones_are_of_the_last_phase() -> None:
    task = training.build_task(SMALL)
    shapes = [task.batch("train", 0, step, 8)["inputs"].shape for step in range(6)]
    assert shapes == [(16, 48)] * 4 + [(8, 96)] * 2
    assert [len(rows["inputs"]) for rows in task.batches("valid", 4)] == [4, 3]
    assert {rows["inputs"].shape[1] for rows in task.batches("test", 4)} == {96}


def test_the_decoder_is_shown_what_stands_before_each_token() -> None:
    rows = training.build_task(BYTES).batch("valid", 0, 0, 5)
    targets, shown = rows["targets"], rows["shown"]
    assert (targets == IGNORED).any()
    assert (shown[:, 0] == 0).all()
    kept = targets[:, :-1] != IGNORED
    assert torch.equal(shown[:, 1:][kept], targets[:, :-1][kept])
    assert (shown[:, 1:][~kept] == 0).all()


@pytest.mark.parametrize("routing", ["learned", "static", "random", "none", "dense", "longt5"])
def test_every_trained_number_has_a_gradient_under_every_routing(routing: str) -> None:
    recipe = replace(SMALL, routing=routing)
    task = training.build_task(recipe)
    torch.manual_seed(0)
    model = training.build_model(recipe, task)
    objective = answerer.Answers(recipe, training.build_task(recipe))
    # in the last step the share is what it will be
    objective.step.fill_(recipe.steps - 1)
    loss = objective(model, task.batch("train", 0, recipe.steps - 1, 4))
    loss.total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert set(loss.parts) == ({"exact_match", "sharpness"} if routing == "learned" else {"exact_match"})


def test_no_heavy_branch_is_the_model_whose_heavy_outputs_are_zero() -> None:
    task = training.build_task(SMALL)
    torch.manual_seed(0)
    learned = training.build_model(SMALL, task).eval()
    torch.manual_seed(0)
    none = training.build_model(replace(SMALL, routing="none"), task).eval()
    of_all = {
        re.sub(r"\.light(?=\.)", "", name): value
        for name, value in learned.state_dict().items()
        if ".heavy" not in name
    }
    none.load_state_dict({name: of_all[name] for name in none.state_dict()})
    rows = task.batch("valid", 0, 0, 3)
    assert not torch.allclose(learned(rows["inputs"], rows["shown"]), none(rows["inputs"], rows["shown"]), atol=1e-3)
    with torch.no_grad():
        for layer in learned.model.encoder.layers:
            layer.attention.heavy.out.weight.zero_()
            layer.feed_forward.heavy.out.weight.zero_()
    torch.testing.assert_close(learned(rows["inputs"], rows["shown"]), none(rows["inputs"], rows["shown"]))


def test_learned_and_static_routing_take_as_many_tokens_and_the_dense_model_all() -> None:
    counted = {}
    for routing in ("learned", "static", "dense"):
        recipe = replace(SMALL, routing=routing)
        task = training.build_task(recipe)
        model = training.build_model(recipe, task).eval()
        with record() as seen, torch.no_grad():
            model(*(task.batch("valid", 0, 0, 2)[name] for name in ("inputs", "shown")))
        counted[routing] = [one.shape[1] for one in seen["routed"]]
    # a quarter of 96 as queries and in the feed-forward, half as keys
    assert counted["learned"] == counted["static"] == [24, 48, 24] * 2
    assert counted["dense"] == [96, 96, 96] * 2


def test_evaluation_routes_the_last_share_whatever_was_trained_last() -> None:
    task = training.build_task(SMALL)
    model = training.build_model(SMALL, task)
    model.route(1.0)
    with record() as seen, torch.no_grad():
        rows = task.batch("valid", 0, 0, 2)
        model.train()(rows["inputs"], rows["shown"])
        model.eval()(rows["inputs"], rows["shown"])
    assert [one.shape[1] for one in seen["routed"]] == [96] * 6 + [24, 48, 24] * 2


def test_greedy_decoding_matches_exactly_where_the_shown_answer_does(finished: Path) -> None:
    _, task, model, step = training.open_run(finished)
    assert step == 6
    rows = task.batch("valid", 0, 0, 7)
    with torch.no_grad():
        # the answers of an untrained model are its own: make them the right ones
        own = model.answer(rows["inputs"], most=2)
        shown = torch.nn.functional.pad(own[:, :-1], (1, 0))
        assert torch.equal(model(rows["inputs"], shown).argmax(-1), own)


def test_padding_changes_no_answer() -> None:
    task = training.build_task(BYTES)
    torch.manual_seed(0)
    model = training.build_model(BYTES, task).eval()
    rows = task.batch("valid", 0, 0, 2)
    inputs = torch.nn.functional.pad(rows["inputs"], (0, 13))
    with torch.no_grad():
        a, b = model(rows["inputs"], rows["shown"]), model(inputs, rows["shown"])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    class Stop(Silent):
        def advance(self, step: int, steps: int, numbers: object) -> None:
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(SMALL, folder=tmp_path, watch=Stop())
    assert training.run(SMALL, folder=tmp_path).finished
    a, b = (training.restore(folder)[2].state_dict() for folder in (finished, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [one for _, one in training.curve(finished, "loss")] == [one for _, one in training.curve(tmp_path, "loss")]


def test_a_packed_run_gives_the_same_score(finished: Path, tmp_path: Path) -> None:
    training.pack(finished, tmp_path / "packed")
    scores = []
    for folder in (finished, tmp_path / "packed"):
        _, task, model, _ = training.open_run(folder)
        rows = task.batch("valid", 0, 0, 7)
        with torch.no_grad():
            scores.append(model(rows["inputs"], rows["shown"]))
    # weights in half precision: 11 bits
    torch.testing.assert_close(*scores, rtol=0.0, atol=2e-2)
    assert evaluate(model, task, split="valid", batch=4) == dict(training.curve(finished, "valid_exact_match"))[6]
    (tmp_path / "packed" / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is damaged"):
        training.open_run(tmp_path / "packed")


def test_the_schedules_reach_the_model(finished: Path) -> None:
    _, _, model, _ = training.restore(finished)
    softness = [module.eps for module in model.modules() if isinstance(module, SoftTopK)]
    assert len(softness) == 6 and softness and {round(float(eps), 6) for eps in softness} == {0.3}
    found = training.curve(finished, "sharpness")
    assert found[0] == (1, 1.0) and all(0 < value <= 1 for _, value in found)


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it has no recipe\.json"):
        training.restore(tmp_path)
    (tmp_path / "recipe.json").write_text('{"kind": "lm"}')
    with pytest.raises(ValueError, match="is a run of kind 'lm', expected one of colt5"):
        training.restore(tmp_path)


def test_keys_are_the_multiple_of_queries_that_the_recipe_says_in_training_and_evaluation() -> None:
    task = training.build_task(SMALL)
    inputs = task.batch("valid", 0, 0, 1)["inputs"]
    for keys, share in ((0.5, 1 / 8), (3.0, 3 / 4), (9.0, 1.0)):
        model = training.build_model(replace(SMALL, keys=keys), task)
        model.eval()
        model.encode(inputs)
        assert model.model.budgets[2].fraction == pytest.approx(share)
        model.train()
        model.route(1 / 2)
        assert model.model.budgets[2].fraction == pytest.approx(min(1.0, keys / 2))


def test_a_question_of_the_user_s_becomes_an_input_as_the_task_makes_them() -> None:
    bytes_task, words = training.build_task(BYTES).last, training.build_task(SMALL).last
    tokens = training.question_tokens(bytes_task, "signature of f?", "def f(a, b): ...\n")
    assert bytes_task.text(tokens[0]) == "signature of f?\ndef f(a, b): ...\n"
    inputs = words.batch("valid", 0, 0, 1)["inputs"]
    said = words.text(inputs[0]).split()
    assert torch.equal(training.question_tokens(words, " ".join(said[:3]), " ".join(said[3:])), inputs)
    with pytest.raises(ValueError, match="the word 'python' is none of the 90 that task 'lookup' knows"):
        training.question_tokens(words, "1 python .", "above")
    with pytest.raises(ValueError, match="the question or the text is empty"):
        training.question_tokens(words, " ", "above")


def test_forced_questions_are_among_as_many_routed_tokens() -> None:
    recipe = replace(SMALL, routing="static", forced=True)
    task = training.build_task(recipe)
    model = training.build_model(recipe, task).eval()
    plain = training.build_model(replace(recipe, forced=False), task).eval()
    inputs = task.batch("test", 0, 0, 3)["inputs"]
    routed = []
    for one in (model, plain):
        with record() as seen, torch.no_grad():
            one.encode(inputs)
        routed.append(seen["routed"])
    assert [found.shape for found in routed[0]] == [found.shape for found in routed[1]]
    asked = torch.arange(task.asks)
    assert task.asks == 3
    assert all((row[:, None] == asked).any(0).all() for found in routed[0] for row in found)
    assert not all((row[:, None] == asked).any(0).all() for found in routed[1] for row in found)
