from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.chains import ToyModel, ToyTask, final_hash, run_toy, toy_recipe
from torch import Tensor, nn

from tevo.contracts import Loss, Objective
from tevo.objectives.next_token import NextToken
from tevo.training import checkpoint
from tevo.training.loop import evaluate, learning_rate, parameter_groups, train
from tevo.training.progress import Silent

SHORT: dict[str, Any] = {"steps": 12, "save_every": 4, "eval_every": 5}


class Listener(Silent):
    """Keeps what is said, and does something after a step."""

    def __init__(self, *, at: int = 0, act: Any = None) -> None:
        self.lines: list[str] = []
        self.at, self.act = at, act

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        if step == self.at and self.act is not None:
            self.act()


def weights(folder: Path) -> dict[str, Tensor]:
    newest = checkpoint.latest(folder)
    assert newest is not None
    return {k: v for k, v in checkpoint.load(newest).tensors.items() if k.startswith("trainee.")}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_hard() -> None:
    raise RuntimeError("pulled the plug")


def test_steps_are_those_of_adamw_written_out(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=6, eval_every=100, save_every=100, clip=0.5)
    run_toy(tmp_path, dropout=0.0, steps=6, eval_every=100, save_every=100, clip=0.5)
    torch.manual_seed(recipe.seed)
    model = ToyModel(dropout=0.0)
    task = ToyTask()
    names = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in names.items()}
    for step in range(6):
        batch = task.batch("train", recipe.seed, step, recipe.batch)
        logits = model(batch["inputs"]).log_softmax(-1)
        scored = batch["targets"] != -100
        picked = logits.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
        grads = torch.autograd.grad(-picked[scored].mean(), list(names.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        warm = round(0.05 * 6)
        rate = 1e-3 if step < warm else 1e-3 * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / (5 - warm)))
        with torch.no_grad():
            for (name, p), g in zip(names.items(), grads, strict=True):
                g = g * min(1.0, 0.5 / norm)
                m, v = moments[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                if p.ndim >= 2 and name != "embed.weight":
                    p.mul_(1 - rate * 0.1)
                hat_m, hat_v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
                p.sub_(rate * hat_m / (hat_v.sqrt() + 1e-8))
    for name, p in names.items():
        # float32, six steps: the order of sums differs; AdamW divides tiny moments by each other
        torch.testing.assert_close(weights(tmp_path)[f"trainee.model.{name}"], p.detach(), rtol=1e-4, atol=2e-6)


def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    run_toy(tmp_path / "whole", **SHORT)
    for at in (4, 7, 8, 11):
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run_toy(tmp_path / f"cut_{at}", watch=Listener(at=at, act=stop_hard), **SHORT)
        assert run_toy(tmp_path / f"cut_{at}", **SHORT).finished
        assert final_hash(tmp_path / f"cut_{at}") == final_hash(tmp_path / "whole")


def test_dropout_makes_the_random_generator_matter(tmp_path: Path) -> None:
    run_toy(tmp_path / "a", **SHORT)
    run_toy(tmp_path / "b", dropout=0.0, **SHORT)
    assert final_hash(tmp_path / "a") != final_hash(tmp_path / "b")


def test_resumed_metrics_hold_each_step_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_toy(tmp_path, watch=Listener(at=7, act=stop_hard), **SHORT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('7\n{"stop": 6}\n{"step": "6"}\n')  # damaged lines
        file.write('{"step": 8, "lo')  # a writer killed half-way
    run_toy(tmp_path, **SHORT)
    found = records(tmp_path)
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in found if "valid_accuracy" in r] == [5, 10, 12]
    seconds = [r["seconds"] for r in found if "seconds" in r]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = run_toy(tmp_path, **SHORT)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    listener = Listener()
    again = run_toy(tmp_path, watch=listener, **SHORT)
    assert again == first
    assert listener.lines == [f"{tmp_path} is finished: step 12 of 12; nothing is left to do"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_the_first_line_says_where_output_goes_and_how_to_resume(tmp_path: Path) -> None:
    listener = Listener()
    run_toy(tmp_path, watch=listener, **SHORT)
    assert str(tmp_path) in listener.lines[0]
    assert "run the same command again to resume" in listener.lines[0]


@pytest.mark.parametrize("name", ["with spaces", "ünï/cödé", "a" * 200])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    assert run_toy(tmp_path / name, **SHORT).finished


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"):
        run_toy(tmp_path / "run", **SHORT)


def test_another_recipe_in_the_same_folder_is_refused_by_key(tmp_path: Path) -> None:
    run_toy(tmp_path, **SHORT)
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.001, got lr=0\.5; choose another folder"):
        run_toy(tmp_path, **SHORT, lr=0.5)


def test_a_recipe_that_cannot_be_built_leaves_no_claim(tmp_path: Path) -> None:
    def refuse() -> nn.Module:
        raise ValueError("no such part")

    with pytest.raises(ValueError, match="no such part"):
        train(toy_recipe(lr=0.5), build=refuse, objective=NextToken(), task=ToyTask(), folder=tmp_path)
    assert run_toy(tmp_path, **SHORT).finished


def test_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_toy(tmp_path, watch=Listener(at=7, act=stop_hard), **SHORT)
    with pytest.raises(ValueError, match=r"made with other data \(rows was 12, is 18\)"):
        run_toy(tmp_path, task=ToyTask(rows=18), **SHORT)


def test_another_thread_count_resumes_and_says_that_bits_may_differ(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_toy(tmp_path, watch=Listener(at=7, act=stop_hard), **SHORT)
    listener = Listener()
    assert run_toy(tmp_path, watch=listener, **SHORT, threads=2).finished
    assert "resumed, but not bit for bit: threads was 1, is 2" in listener.lines


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run_toy(tmp_path, **SHORT, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by process 4711"):
            run_toy(tmp_path, **SHORT)
    assert run_toy(tmp_path, **SHORT).finished


def test_a_damaged_newest_checkpoint_is_refused_and_the_older_one_is_named(tmp_path: Path) -> None:
    run_toy(tmp_path / "whole", **SHORT)
    with pytest.raises(RuntimeError):
        run_toy(tmp_path / "cut", watch=Listener(at=11, act=stop_hard), **SHORT)
    newest = checkpoint.latest(tmp_path / "cut")
    assert newest is not None and newest.name == "step-00000008"
    (newest / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"damaged: meta\.json .* to go on from step-00000004"):
        run_toy(tmp_path / "cut", **SHORT)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run_toy(tmp_path / "cut", **SHORT)
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_toy(tmp_path, watch=Listener(at=7, act=stop_hard), **SHORT)
    with pytest.raises(ValueError, match=r"model\.embed\.weight of shape \(11, 12\), expected \(11, 24\)"):
        train(
            toy_recipe(**SHORT),
            build=lambda: ToyModel(dim=24),
            objective=NextToken(),
            task=ToyTask(),
            folder=tmp_path,
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    run_toy(tmp_path / "whole", **SHORT)
    before = signal.getsignal(number)
    listener = Listener(at=6, act=lambda: os.kill(os.getpid(), number))
    stopped = run_toy(tmp_path / "cut", watch=listener, **SHORT)
    assert (stopped.signal, stopped.finished, stopped.step) == (number, False, 7)
    assert "stopped at step 7 of 12, saved; run the same command again to resume" in listener.lines
    assert signal.getsignal(number) is before
    assert run_toy(tmp_path / "cut", **SHORT).finished
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")


def test_a_second_interrupt_is_immediate(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, watch=Listener(at=6, act=twice), **SHORT)
    assert checkpoint.steps(tmp_path) == [4]


class FailsAt(Objective):
    """Next token, but the loss of one step is not finite."""

    def __init__(self, *, call: int, value: float) -> None:
        super().__init__()
        self.call, self.value, self.calls = call, value, 0
        self.inner = NextToken()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        self.calls += 1
        loss = self.inner(model, batch)
        return Loss(loss.total * (self.value if self.calls == self.call else 1.0), {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_batch_and_good_checkpoint_kept(tmp_path: Path, value: float) -> None:
    with pytest.raises(FloatingPointError) as caught:
        train(
            toy_recipe(**SHORT),
            build=ToyModel,
            objective=FailsAt(call=7, value=value),
            task=ToyTask(),
            folder=tmp_path,
        )
    assert "the loss of step 6 is not finite" in str(caught.value)
    assert "step-00000004" in str(caught.value)
    kept = load_file(tmp_path / "bad_batch_00000006.safetensors")
    for name, rows in ToyTask().batch("train", 0, 6, 6).items():
        assert torch.equal(kept[name], rows)
    good = weights(tmp_path)
    assert all(bool(value.isfinite().all()) for value in good.values())
    assert run_toy(tmp_path, **SHORT).finished


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    for accumulate in (1, 2, 6):
        run_toy(tmp_path / str(accumulate), dropout=0.0, accumulate=accumulate, **SHORT)
    whole = weights(tmp_path / "1")
    for accumulate in (2, 6):
        for name, value in weights(tmp_path / str(accumulate)).items():
            # float32 sums in another order, amplified by AdamW where a moment is tiny
            torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-5)
        losses = [[r["loss"] for r in records(tmp_path / f) if "loss" in r] for f in ("1", str(accumulate))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_how_often_one_evaluates_changes_no_weight(tmp_path: Path) -> None:
    run_toy(tmp_path / "often", steps=12, eval_every=1)
    run_toy(tmp_path / "once", steps=12, eval_every=100)
    assert final_hash(tmp_path / "often") == final_hash(tmp_path / "once")


def test_the_score_is_the_pooled_metric_of_the_whole_split() -> None:
    torch.manual_seed(0)
    model, task = ToyModel(), ToyTask()
    right, scored = 0, 0
    for batch in task.batches("valid", 1):
        with torch.no_grad():
            guesses = model.eval()(batch["inputs"])[0].argmax(-1).tolist()
        for guess, target in zip(guesses, batch["targets"][0].tolist(), strict=True):
            right += guess == target
            scored += target != -100
    model.train()
    assert evaluate(model, task, split="valid", batch=4) == right / scored
    assert model.training


def test_the_rate_rises_to_its_peak_and_falls_to_its_end() -> None:
    recipe = toy_recipe(steps=100, lr=0.2, warmup=0.1, final_lr=0.25)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.02 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == rates[10] == 0.2
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)
    assert rates[10 + 89 // 2] == pytest.approx(0.125, rel=0.02)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (7, 1.0), (7, 0.0)])
def test_the_rate_is_positive_at_the_edges(steps: int, warmup: float) -> None:
    recipe = toy_recipe(steps=steps, warmup=warmup)
    assert all(0 < learning_rate(recipe, step) <= recipe.lr for step in range(steps))


def test_vectors_scalars_and_named_parameters_do_not_decay() -> None:
    model = ToyModel()
    model.gain = nn.Parameter(torch.ones(()))
    decayed, spared = parameter_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {f"layers.{i}.{j}.weight" for i in (0, 1) for j in (1, 2)}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_a_name_that_is_no_parameter_is_refused() -> None:
    class Wrong(nn.Linear):
        def no_decay(self) -> set[str]:
            return {"wieght"}

    with pytest.raises(ValueError, match=r"Wrong\.no_decay\(\) names 'wieght'"):
        parameter_groups(nn.Sequential(Wrong(2, 2)), weight_decay=0.1)


def test_modules_are_told_after_each_step(tmp_path: Path) -> None:
    models: list[ToyModel] = []

    def build() -> ToyModel:
        models.append(ToyModel())
        return models[-1]

    train(toy_recipe(**SHORT), build=build, objective=NextToken(), task=ToyTask(), folder=tmp_path)
    assert models[0].steps_seen == 12


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ToyModel has no switch checkpoint_activations"):
        run_toy(tmp_path, **SHORT, checkpoint_activations=True)
    with pytest.raises(ValueError, match="batch=6 cannot be cut into accumulate=4"):
        run_toy(tmp_path, **SHORT, accumulate=4)


def test_without_accelerate_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"needs the package accelerate; pip install 'tevo\[train\]'"):
        run_toy(tmp_path, **SHORT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do fp16")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp16.*needs a GPU"):
        run_toy(tmp_path, **SHORT, precision="fp16")


def test_bf16_differs_from_fp32_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run_toy(tmp_path / "fp32", **SHORT)
    run_toy(tmp_path / "whole", **SHORT, precision="bf16")
    with pytest.raises(RuntimeError):
        run_toy(tmp_path / "cut", watch=Listener(at=7, act=stop_hard), **SHORT, precision="bf16")
    run_toy(tmp_path / "cut", **SHORT, precision="bf16")
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole") != final_hash(tmp_path / "fp32")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "whole").values())


class Weighted(Objective):
    """An objective with a parameter of its own and a part to log."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        nats = NextToken()(model, batch).total
        return Loss(nats * self.log_weight.exp() + self.log_weight.square(), {"nats": nats})


def test_an_objective_with_parameters_is_trained_saved_and_logged(tmp_path: Path) -> None:
    objective = Weighted()
    train(toy_recipe(**SHORT), build=ToyModel, objective=objective, task=ToyTask(), folder=tmp_path)
    stored = weights(tmp_path)["trainee.objective.log_weight"]
    assert torch.equal(stored, objective.log_weight.detach())
    assert stored != 0
    assert all("nats" in r for r in records(tmp_path) if "loss" in r)


def test_training_learns(tmp_path: Path) -> None:
    run_toy(tmp_path, dropout=0.0, steps=80, lr=1e-2)
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]


def test_tensorboard_holds_each_step_or_its_absence_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match=r"needs the package tensorboard; pip install 'tevo\[track\]'"):
            run_toy(tmp_path, **SHORT, tensorboard=True)
        assert run_toy(tmp_path, **SHORT).finished
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError):
        run_toy(tmp_path, watch=Listener(at=7, act=stop_hard), **SHORT, tensorboard=True)
    run_toy(tmp_path, **SHORT, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_keeps_its_names(tmp_path: Path) -> None:
    run_toy(tmp_path / "whole", **SHORT, compile=True)
    with pytest.raises(RuntimeError):
        run_toy(tmp_path / "cut", watch=Listener(at=7, act=stop_hard), **SHORT, compile=True)
    run_toy(tmp_path / "cut", **SHORT, compile=True)
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    run_toy(tmp_path / "plain", **SHORT)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "whole").keys()
    # other code was run: compiled dropout draws other numbers
    assert final_hash(tmp_path / "plain") != final_hash(tmp_path / "whole")
