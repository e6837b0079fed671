from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from tevo.bench import compare
from tevo.bench.cells import Grid
from tevo.bench.measure import parameters
from tevo.bench.subjects import LARGEST, fitted, source_of
from tevo.bench.training import train_cell
from tevo.catalogue import list_systems

SIZES = {"vocab": 29, "length": 16, "dim": 24, "depth": 2, "heads": 2}
COMPARABLE = [
    row.id
    for role in ("mixer", "block", "normaliser", "heads", "channel", "position", "residual")
    for row in list_systems(
        role=role, where=["causal"] if role in ("mixer", "block", "normaliser") else [], baselines=True
    )
    if row.card and "grid" not in row.card.claims
]


def one(part: str, sizes=SIZES, position="rope"):
    return fitted([part], sizes=sizes, position=position)[part]


@pytest.mark.parametrize("part", COMPARABLE)
def test_every_part_gets_the_baselines_parameters_within_two_percent(part):
    # fitted together, as compare does it: a part with large parameters of its own makes both models larger
    sizes = {"vocab": 256, "length": 256, "dim": compare.WIDTHS[0], "depth": 2, "heads": 4}
    models = fitted(["softmax", part], sizes=sizes, position="rope")
    goal = parameters(models["softmax"].build())
    found = parameters(models[part].build())
    # a memory of many times the baseline's parameters has no width to give up
    assert found == pytest.approx(goal, rel=0.02) or (found > LARGEST * goal and not models[part].adjustable())
    model = one(part)
    logits = model.build()(torch.zeros(2, SIZES["length"], dtype=torch.long))
    assert logits.shape == (2, SIZES["length"], SIZES["vocab"])


def test_all_models_grow_where_one_has_many_parameters_of_its_own():
    sizes = {"vocab": 256, "length": 256, "dim": 64, "depth": 2, "heads": 4}
    alone = parameters(one("softmax", sizes).build())
    # aft's position biases alone have 2 x 128 x 256 parameters in each of the two blocks
    models = fitted(["softmax", "lru", "aft"], sizes=sizes, position="rope")
    counts = {part: parameters(model.build()) for part, model in models.items()}
    assert models["aft"].hidden_dim == 16 and alone < counts["softmax"] < 2 * alone
    assert all(count == pytest.approx(counts["softmax"], rel=0.02) for count in counts.values())


def test_only_parts_with_a_use_for_positions_get_one():
    def position(part: str) -> str | None:
        return one(part).position

    assert position("softmax") == "rope" and position("multi_query_attention") == "rope"
    assert position("lru") is None and position("rwkv") is None
    assert position("alibi") == "alibi"
    assert position("swiglu") == "rope"
    assert one("softmax", position=None).position is None


def test_a_width_of_the_users_own_is_left_alone():
    assert one("rwkv(hidden_dim=5)").hidden_dim is None


def test_a_part_without_a_causal_form_is_refused_with_alternatives():
    with pytest.raises(ValueError, match=r"fnet has no causal form; mixers that do: .*softmax"):
        one("fnet")


def test_a_changed_part_is_another_cell(tmp_path):
    path = tmp_path / "part.py"
    path.write_text("a = 1")
    path.with_name("b.py").write_text("a = 2")
    path.write_text("class A: pass")
    first = source_of(f"{path}:A")
    path.write_text("class A: x = 1")
    assert source_of(f"{path}:A") != first


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": ("txt",)}, "unknown task 'txt'"),
        ({"parts": ()}, "no part"),
        ({"parts": ("lru", "lru")}, "a part twice"),
        ({"data": "x", "tasks": ("recall",)}, "is for the text task"),
        ({"budget": 0.0}, "budget is 0.0 s"),
        ({"seeds": (0, 1)}, "expected at least 1"),
        ({"lengths": ()}, "expected at least one"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare.Request(**{"parts": ("lru",), **options})


def test_the_baseline_is_always_there_and_first():
    assert compare.Request(parts=("lru", "softmax")).everyone() == ("softmax", "lru")
    assert compare.Request(parts=("lru",)).everyone() == ("softmax", "lru")


def fit(budget: float, **options) -> compare.Plan:
    request = compare.Request(parts=("softmax", "lru"), budget=budget, **options)
    models = {"text": fitted(request.everyone(), sizes={**SIZES, "length": 256}, position="rope")}
    steps = {"text": dict.fromkeys(request.everyone(), (0.02, 1.0))}
    return compare._fit(request, models, steps, 2, 1, spent=3.0)


def test_the_budget_takes_seeds_and_lengths_away_and_says_so():
    tight, roomy = fit(1.0), fit(1000.0)
    assert tight.seeds == (3, 1) and tight.lengths == compare.FEWER_LENGTHS
    assert len(tight.trimmed) == 3
    assert roomy.seeds == (5, 3) and roomy.trimmed == () and roomy.total <= 1000
    assert roomy.training["text"]["steps"] > tight.training["text"]["steps"]


@pytest.mark.parametrize("budget", [1.0, 100.0, 1000.0])
def test_every_cell_of_the_text_task_sees_a_mebibyte(budget):
    plan = fit(budget)
    training = plan.training["text"]
    assert training["steps"] * training["batch"] * 256 >= 2**20


def test_what_the_user_chose_is_not_trimmed():
    plan = fit(1.0, seeds=(4, 2), lengths=(64, 128))
    assert plan.seeds == (4, 2) and plan.lengths == (64, 128) and plan.trimmed == ()


def test_all_cells_of_a_seed_share_data_and_hyper_parameters(small_plan):
    rows = [recipe for _, _, seed, recipe in small_plan.cells if seed == 0]
    assert len(rows) == 2
    assert rows[0]["task"] == rows[1]["task"] and rows[0]["training"] == rows[1]["training"]
    differing = {k for k in rows[0]["model"] if rows[0]["model"][k] != rows[1]["model"][k]}
    assert differing <= {"part", "mixer", "position", "hidden_dim"}


def test_a_cell_gives_the_same_score_whenever_it_is_computed(tmp_path, finished):
    plan, folder, _ = finished
    _, _, _, recipe = plan.cells[0]
    stored = Grid(folder).add(recipe).result()
    (tmp_path / "cell").mkdir()
    torch.set_num_threads(stored["threads"])
    again = train_cell(recipe, tmp_path / "cell")
    assert again["score"] == stored["score"] and again["curve"] == stored["curve"]


def test_results_hold_what_a_reader_asks_for(finished):
    plan, _, results = finished
    json.dumps(results, allow_nan=False)
    softmax, mine = results["parts"]
    assert softmax["name"] == "softmax" and mine["card"] is None
    row = softmax["tasks"]["recall"]
    assert len(row["seeds"]) == 3 and row["verdict"] is None
    assert row["mean"] == pytest.approx(sum(s["score"] for s in row["seeds"]) / 3)
    # the curve ends at the last step, and its losses are in bits
    assert row["seeds"][0]["curve"][-1][0] == 4
    other = mine["tasks"]["recall"]
    assert abs(other["ratio"] - 1) <= results["tolerance"] and other["hidden_dim"] is not None
    assert other["verdict"] is not None and other["band"] > 0
    assert row["flops_per_token"] > 0
    assert softmax["state"]["1024"] > 3 * softmax["state"]["256"] and mine["state"] is None
    assert softmax["growth_of_flops"] == pytest.approx(2, abs=0.1) and mine["growth_of_flops"] == pytest.approx(1)
    assert results["tasks"]["recall"]["answers"] == 8 * 2
    assert all(s > 0 for s in mine["cost"]["curves"]["train_s"])
    assert set(results["recipes"]) == {f"recall: {part}" for part in plan.request.everyone()}


def test_a_plan_in_the_folder_is_kept_and_another_request_is_refused(tmp_path, mine):
    request = compare.Request(
        parts=("softmax", mine), tasks=("recall",), dim=8, depth=1, seeds=(2, 1), lengths=(16,), budget=30.0, workers=1
    )
    first = compare.make_plan(request, tmp_path)
    second = compare.make_plan(request, tmp_path)
    assert second.facts() == first.facts()
    assert [recipe for *_, recipe in second.cells] == [recipe for *_, recipe in first.cells]
    with pytest.raises(ValueError, match="holds another comparison"):
        compare.make_plan(replace(request, budget=31.0), tmp_path)


@pytest.mark.slow
def test_a_killed_worker_costs_one_cell_and_ctrl_c_keeps_the_finished(tmp_path, small_plan):
    plan = replace(small_plan, training={"recall": {**small_plan.training["recall"], "steps": 40, "eval_every": 40}})
    killed = []

    def kill_one(now):
        running = [s for s in now if s.word == "running"]
        if running and not killed:
            grid = Grid(tmp_path)
            for cell in grid.cells():
                if cell.held():
                    pid = json.loads((cell.folder / "claim").read_text())["pid"]
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    compare.run_cells(plan, tmp_path, show=kill_one, every=0.02)
    assert len(killed) == 1
    assert [s.word for s in compare.statuses(plan, Grid(tmp_path))] == ["done"] * 4

    again = replace(plan, seeds=(5, 3))
    begun = time.monotonic()

    def interrupt(now):
        if sum(s.word == "done" for s in now) >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.run_cells(again, tmp_path, show=interrupt, every=0.02)
    assert time.monotonic() - begun < 120
    before = [s for s in compare.statuses(again, Grid(tmp_path)) if s.word == "done"]
    assert len(before) >= 5
    compare.run_cells(again, tmp_path, show=lambda now: None)
    after = compare.statuses(again, Grid(tmp_path))
    assert [s.word for s in after] == ["done"] * 8
    assert all(s in after for s in before)
