"""Compare parts: plan what the budget allows, train the cells, measure cost against length, judge.

All models are equal but for the part: sizes, parameters (within 2 %), order of the data, hyper-parameters, training
tokens. The baseline is softmax attention; its seeds give the noise that a difference must exceed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tevo import __version__
from tevo.bench.cells import Cell, Grid
from tevo.bench.measure import crossing, fit_exponent, flops, parameters, state_bytes
from tevo.bench.subjects import BASELINE, TOLERANCE, Model, fitted
from tevo.bench.tasks import TASKS, Task
from tevo.bench.timing import measure_lengths
from tevo.bench.training import METRICS, cell_recipe, make_task, recipe_of
from tevo.bench.verdicts import interval, judge
from tevo.catalogue.create import resolve
from tevo.catalogue.rows import suggest
from tevo.models.encoder import Encoder
from tevo.objectives.next_token import next_token_loss
from tevo.training.checkpoint import write_file
from tevo.training.progress import duration

__all__ = ["Plan", "Request", "collect", "folder_of", "make_plan", "measure_cost", "run_cells"]

Say = Callable[[str], None]

MEGABYTE = 1 << 20
# widths tried from the left until the least plan fits the budget
WIDTHS = (96, 64)
LENGTHS = (256, 512, 1024, 2048, 4096)
FEWER_LENGTHS = (256, 1024, 4096)
MORE_LENGTHS = (*LENGTHS, 8192, 16384)
# seeds of the baseline and of the others: what a verdict needs at the least, and what it should have
LEAST_SEEDS, FULL_SEEDS = (3, 1), (5, 3)
# lengths at which FLOPs are counted, long enough for terms linear in n to fade
FLOP_LENGTHS = (4096, 8192, 16384)
STATE_LENGTHS = (256, 1024)
# workers slow each other down; starting them takes a while; so does one measurement
CROWDING, START_SECONDS, MEASUREMENT_SECONDS = 1.15, 8.0, 0.7


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. A finished comparison is found again by it.

    Args:
        parts: the compared parts; the baseline is added where it is missing.
        tasks: names of tasks.
        budget: seconds that the whole should take.
        data: the text task's file or folder; empty for the standard library.
        seeds: of the baseline and of the others; None lets the budget decide.
        lengths: tokens at which cost is measured; None lets the budget decide.
        position: what parts with a use for positions get; None for nothing.
        channel: channel mixer of all models; None for the host's.
        dim: width; None lets the budget decide.
        depth, heads: of the trained models.
        workers: processes that train at the same time; None for one on each core.
    """

    parts: tuple[str, ...]
    tasks: tuple[str, ...] = ("text",)
    budget: float = 300.0
    data: str = ""
    seeds: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None
    position: str | None = "rope"
    channel: str | None = None
    dim: int | None = None
    depth: int = 2
    heads: int = 4
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{suggest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
        for name, values in (("part", self.parts), ("task", self.tasks)):
            if not values:
                raise ValueError(f"compare got no {name}; name at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"compare got a {name} twice: {', '.join(values)}; name each once")
        if self.data and "text" not in self.tasks:
            raise ValueError(f"data={self.data!r} is for the text task, which is not among {', '.join(self.tasks)}")
        if not 0 < self.budget < math.inf:
            raise ValueError(f"budget is {self.budget} s, expected a time above 0")
        if self.seeds is not None and min(self.seeds) < 1:
            raise ValueError(f"seeds are {self.seeds}, expected at least 1")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"lengths are {self.lengths}, expected at least one, each of 1 token or more")
        for name, least in (("dim", self.dim), ("depth", self.depth), ("heads", self.heads), ("workers", self.workers)):
            if least is not None and least < 1:
                raise ValueError(f"{name} is {least}, expected at least 1")

    def everyone(self) -> tuple[str, ...]:
        """The parts, the baseline first."""
        return (BASELINE, *(part for part in self.parts if part != BASELINE))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be run.

    Args:
        request: what it answers.
        models: task -> part -> model.
        tasks: task -> its name and options.
        training: task -> fields of the training recipe.
        seeds: of the baseline and of the others.
        lengths: at which cost is measured.
        workers, threads: processes, and threads of each.
        seconds: task -> part -> estimate for one cell.
        total: estimate of the whole.
        trimmed: sentences on what the budget took away.
    """

    request: Request
    models: Mapping[str, Mapping[str, Model]]
    tasks: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, int]
    lengths: tuple[int, ...]
    workers: int
    threads: int
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    total: float = 0.0
    trimmed: tuple[str, ...] = ()

    def seeds_of(self, part: str) -> int:
        """How many seeds a part gets."""
        return self.seeds[0 if part == BASELINE else 1]

    @cached_property
    def cells(self) -> list[tuple[str, str, int, dict[str, Any]]]:
        """(task, part, seed, recipe) of every cell, first seeds first, so that an early end leaves something of all."""
        found = []
        for seed in range(max(self.seeds)):
            for task, models in self.models.items():
                for part, model in models.items():
                    if seed < self.seeds_of(part):
                        recipe = cell_recipe(model, task=self.tasks[task], training=self.training[task], seed=seed)
                        found.append((task, part, seed, recipe))
        return found

    def facts(self) -> dict[str, Any]:
        """The plan as JSON."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts

    def describe(self) -> list[str]:
        """What will be run and for how long, in lines for a person."""
        lines = []
        any_model = next(iter(next(iter(self.models.values())).values()))
        for task, models in self.models.items():
            training = self.training[task]
            tokens = training["steps"] * training["batch"] * any_length(models)
            lines.append(
                f"{task}: {len(models)} models of width {any_model.dim}, depth {any_model.depth}; each sees {tokens:,} "
                f"tokens in {training['steps']} steps of {training['batch']} x {any_length(models)}"
            )
            if models[BASELINE].hidden_dim is not None:
                lines.append(f"{task}: all models are made larger, so that each part's own parameters find room")
        lines.append(
            f"seeds: {self.seeds[0]} of {BASELINE}, {self.seeds[1]} of each other part; "
            f"{len(self.cells)} trainings by {self.workers} workers of {self.threads} thread"
            + "s"
            * (self.threads != 1)
        )
        lines.append(f"then time and memory at {', '.join(f'{n:,}' for n in self.lengths)} tokens")
        lines.append(f"about {duration(self.total)} in all, budget {duration(self.request.budget)}")
        lines += [f"trimmed: {text}" for text in self.trimmed]
        if self.total > self.request.budget:
            lines.append(
                "that is more than the budget, but the least from which a verdict follows; name fewer parts or tasks, or "
                "stop with Ctrl-C: finished cells are kept"
            )
        return lines


def any_length(models: Mapping[str, Model]) -> int:
    """Tokens per training sequence, the same for all models of a task."""
    return next(iter(models.values())).length


def folder_of(request: Request) -> Path:
    """Where a comparison is kept, unless the user says where."""
    text = json.dumps(asdict(request), sort_keys=True)
    return Path("runs") / f"compare-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def make_plan(request: Request, folder: Path, *, say: Say = lambda text: None) -> Plan:
    """Resolve all models, time a few steps of each, and fit seeds, steps, lengths and width into the budget.

    A plan that the folder holds for the same request is kept, so that finished cells stay part of it.

    Raises:
        ValueError: a part is unknown or cannot be used in a causal language model.
    """
    began = time.perf_counter()
    stored = folder / "plan.json"
    if stored.is_file():
        kept = json.loads(stored.read_text(encoding="utf-8"))
        if kept["request"] != json.loads(json.dumps(asdict(request))):
            raise ValueError(f"{folder} holds another comparison; give --folder another name")
        # the parts' code may have changed: models are fitted again, choices stay
        fresh = _models(request, kept["dim"])
        return Plan(
            request=request,
            models=fresh,
            tasks=kept["tasks"],
            training=kept["training"],
            seeds=tuple(kept["seeds"]),
            lengths=tuple(kept["lengths"]),
            workers=kept["workers"],
            threads=kept["threads"],
            seconds=kept["seconds"],
            total=kept["total"],
            trimmed=tuple(kept["trimmed"]),
        )
    cores = torch.get_num_threads()
    workers = request.workers or cores
    threads = max(1, cores // workers)
    best = None
    for dim in WIDTHS if request.dim is None else (request.dim,):
        models = _models(request, dim)
        say(f"timing a few steps of {len(request.everyone())} models of width {dim}")
        seconds = _calibrate(request, models, threads)
        plan = _fit(request, models, seconds, workers, threads, time.perf_counter() - began)
        best = plan if best is None or plan.total < best.total else best
        if plan.total <= request.budget:
            break
    assert best is not None
    dim = next(iter(best.models[request.tasks[0]].values())).dim
    trimmed = list(best.trimmed)
    if request.dim is None and dim != WIDTHS[0]:
        trimmed.append(f"width {WIDTHS[0]} -> {dim}")
    best = replace(best, trimmed=tuple(trimmed))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(stored, json.dumps({**best.facts(), "dim": dim}, indent=1) + "\n")
    return best


def _options(request: Request, name: str) -> dict[str, Any]:
    """A task's name and options."""
    if name == "text":
        data = {"data": str(Path(request.data).expanduser().absolute())} if request.data else {}
        return {"name": name, "length": 256, "examples": 256, **data}
    if name == "recall":
        return {"name": name, "length": 32, "vocab": 16, "pairs": 4, "examples": 512}
    return {"name": name, "examples": 512}


def _training(name: str, length: int, scale: int) -> dict[str, Any]:
    """A task's training, the same for all parts; the rates come from a few trials with the baseline alone."""
    if name == "text":
        batch = 8
        steps = scale * math.ceil(MEGABYTE / (batch * length))
        chosen = {"batch": batch, "lr": 3e-3, "warmup": 0.1}
    else:
        steps = 300 * scale
        chosen = {"batch": 64, "lr": 4e-3, "warmup": 0.05}
    # one evaluation at the end; a few checkpoints, from which a killed cell goes on
    every = {"eval_every": steps, "save_every": max(1, steps // 4), "log_every": max(1, steps // 120)}
    return {"steps": steps, **chosen, **every}


def _models(request: Request, dim: int) -> dict[str, dict[str, Model]]:
    models = {}
    for name in request.tasks:
        made = _task(_options(request, name))
        sizes = {
            "vocab": made.vocab,
            "length": made.length,
            "dim": dim,
            "depth": request.depth,
            "heads": request.heads,
        }
        models[name] = fitted(request.everyone(), sizes=sizes, position=request.position, channel=request.channel)
    return models


def _task(options: Mapping[str, Any]) -> Task:
    return make_task(json.dumps(options, sort_keys=True))


def _calibrate(
    request: Request, models: Mapping[str, Mapping[str, Model]], threads: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """Task -> part -> seconds of a training step, and of an evaluation."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            name: {part: _time_steps(model, _task(_options(request, name)), name) for part, model in row.items()}
            for name, row in models.items()
        }
    finally:
        torch.set_num_threads(before)


def _time_steps(model: Model, task: Task, name: str) -> tuple[float, float]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        lm = model.build()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)
    batch = _training(name, task.length, 1)["batch"]
    times = []
    for step in range(4):
        start = time.perf_counter()
        rows = task.batch("train", 0, step, batch)
        next_token_loss(lm(rows["inputs"]), rows["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    with torch.no_grad():
        task.score(lm(rows["inputs"]), rows["targets"])
    # the first step warms up
    return median(times[1:]), (time.perf_counter() - start) * task.examples / batch


def _fit(
    request: Request,
    models: Mapping[str, Mapping[str, Model]],
    steps: Mapping[str, Mapping[str, tuple[float, float]]],
    workers: int,
    threads: int,
    spent: float,
) -> Plan:
    """The largest plan within the budget, or the least there is."""
    levels: list[tuple[int, tuple[int, int], tuple[int, ...]]] = [
        (1, LEAST_SEEDS, FEWER_LENGTHS),
        (1, (5, 1), FEWER_LENGTHS),
        (1, (5, 1), LENGTHS),
        (1, (5, 2), LENGTHS),
        (1, FULL_SEEDS, LENGTHS),
        *((2**k, FULL_SEEDS, LENGTHS if k < 2 else MORE_LENGTHS) for k in range(1, 12)),
    ]
    options = {name: _options(request, name) for name in request.tasks}
    chosen = None
    for scale, seeds, lengths in levels:
        training = {name: _training(name, any_length(models[name]), scale) for name in request.tasks}
        seconds = {
            name: {part: training[name]["steps"] * step + score for part, (step, score) in row.items()}
            for name, row in steps.items()
        }
        plan = Plan(
            request=request,
            models=models,
            tasks=options,
            training=training,
            seeds=request.seeds or seeds,
            lengths=request.lengths or lengths,
            workers=workers,
            threads=threads,
            seconds=seconds,
        )
        plan = replace(plan, total=spent + _estimate(plan))
        if chosen is not None and plan.total > request.budget:
            break
        chosen = plan
    assert chosen is not None
    trimmed = []
    for what, got, full in zip((BASELINE, "the other parts"), chosen.seeds, FULL_SEEDS, strict=True):
        if request.seeds is None and got < full:
            trimmed.append(f"seeds of {what} {full} -> {got}")
    if request.lengths is None and len(chosen.lengths) < len(LENGTHS):
        trimmed.append(f"lengths {len(LENGTHS)} -> {len(chosen.lengths)}")
    return replace(chosen, trimmed=tuple(trimmed))


def _estimate(plan: Plan) -> float:
    """Seconds of all trainings and measurements."""
    each = [plan.seconds[task][part] for task, part, _, _ in plan.cells]
    training = max(sum(each) / plan.workers, max(each)) * CROWDING
    # time in two rounds, memory in one; long sequences take longer
    jobs = 3 * len(plan.request.everyone()) * sum(1 + n / 4096 for n in plan.lengths)
    return START_SECONDS + training + jobs * MEASUREMENT_SECONDS


@dataclass(frozen=True)
class Status:
    """Where a cell stands: ``waiting``, ``running`` with a share of its steps, ``done`` or ``failed``."""

    task: str
    part: str
    seed: int
    word: str
    share: float = 0.0
    score: float | None = None
    error: str = ""
    folder: str = ""


def statuses(plan: Plan, grid: Grid) -> list[Status]:
    """Where every cell of a plan stands."""
    found = []
    for task, part, seed, recipe in plan.cells:
        cell = grid.add(recipe)
        result = cell.result()
        if result is None:
            share = _share(cell, plan.training[task]["steps"])
            found.append(Status(task, part, seed, "running" if cell.held() else "waiting", share))
        elif "error" in result:
            found.append(Status(task, part, seed, "failed", 1.0, None, result["error"], str(cell.folder)))
        else:
            found.append(Status(task, part, seed, "done", 1.0, result["score"]))
    return found


def _share(cell: Cell, steps: int) -> float:
    path = cell.folder / METRICS
    try:
        last = path.read_text(encoding="utf-8").splitlines()[-1]
        return float(json.loads(last)["step"]) / steps
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0


def run_cells(plan: Plan, folder: Path, *, show: Callable[[Sequence[Status]], None], every: float = 0.5) -> None:
    """Let workers compute all cells that have no result yet.

    Raises:
        KeyboardInterrupt: Ctrl-C; workers have saved what they were at.
        OSError: workers died again and again.
        ValueError: what training needs is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs the package accelerate; pip install 'tevo[train]'")
    grid = Grid(folder)
    grid.order([grid.add(recipe).name for _, _, _, recipe in plan.cells])
    show(now := statuses(plan, grid))
    left = sum(status.word in ("waiting", "running") for status in now)
    if not left:
        return
    running = [_worker(folder, plan.threads) for _ in range(min(plan.workers, left))]
    deaths = 0
    try:
        while running:
            time.sleep(every)
            for worker in [w for w in running if w.poll() is not None]:
                running.remove(worker)
                if worker.returncode in (0, 130):
                    continue
                # killed from outside: its cell is free again
                deaths += 1
                if deaths > 2 * plan.workers:
                    raise OSError(
                        f"workers died {deaths} times, the last with code {worker.returncode}; see {folder / 'workers.log'}"
                    )
                running.append(_worker(folder, plan.threads))
            show(statuses(plan, grid))
    finally:
        for worker in running:
            worker.terminate()
        for worker in running:
            worker.wait()
    if any(status.word == "waiting" for status in statuses(plan, grid)):
        raise KeyboardInterrupt


def _worker(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tevo.bench.worker", str(folder), "--threads", str(threads), "--with-parent"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "workers.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def measure_cost(plan: Plan, folder: Path, *, done: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Time and peak memory of one block of every part's first model at every length; continues where it was left.

    Args:
        plan: names parts and lengths.
        folder: keeps the measurements.
        done: is given how many of how many are there.
    """
    builds = {part: _block(model) for part, model in plan.models[plan.request.tasks[0]].items()}
    threads = plan.workers * plan.threads
    what = json.dumps([builds, threads], sort_keys=True)
    path = folder / f"cost-{hashlib.sha256(what.encode()).hexdigest()[:10]}.jsonl"
    known = _lines(path)
    expected = len(builds) * len(plan.lengths) * 3
    count = len(known)
    with path.open("a", encoding="utf-8") as file:

        def keep(entry: Mapping[str, Any]) -> None:
            nonlocal count
            file.write(json.dumps(entry) + "\n")
            file.flush()
            count += 1
            done(count, expected)

        done(count, expected)
        return measure_lengths(builds, plan.lengths, threads=threads, known=known, done=keep)


def _block(model: Model) -> dict[str, Any]:
    """Arguments of an encoder of one such block, its length left open."""
    return {name: value for name, value in model.parts().items() if name != "length" and value is not None}


def _lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                # half a line of a process that was killed
                break
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in found))
    return found


def collect(plan: Plan, folder: Path, cost: Sequence[Mapping[str, Any]], *, command: str) -> dict[str, Any]:
    """All results of a comparison as JSON: what the report is made from."""
    grid = Grid(folder)
    scores: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, part, seed, recipe in plan.cells:
        result = grid.add(recipe).result()
        if result is not None:
            scores.setdefault((task, part), []).append({"seed": seed, **result})
    tasks = {}
    for name, options in plan.tasks.items():
        made = _task(options)
        training = plan.training[name]
        tasks[name] = {
            "metric": made.metric,
            "higher_is_better": made.higher_is_better,
            "chance": made.chance,
            "baselines": made.baselines,
            "facts": made.facts,
            "answers": _answers(made) if made.metric == "accuracy" else None,
            "training": dict(training),
            "tokens": training["steps"] * training["batch"] * made.length,
        }
    parts = [_part_facts(plan, part, scores, tasks, cost) for part in plan.request.everyone()]
    return {
        "schema": 1,
        "version": __version__,
        "command": command,
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "baseline": BASELINE,
        "tolerance": TOLERANCE,
        "request": json.loads(json.dumps(asdict(plan.request))),
        "seeds": list(plan.seeds),
        "lengths": list(plan.lengths),
        "trimmed": list(plan.trimmed),
        "machine": _machine(plan),
        "tasks": tasks,
        "parts": parts,
        "recipes": {
            f"{task}: {part}": {
                "model": asdict(model),
                "training": json.loads(
                    recipe_of(
                        cell_recipe(model, task=plan.tasks[task], training=plan.training[task], seed=0),
                        threads=plan.threads,
                    ).to_json()
                ),
            }
            for task, models in plan.models.items()
            for part, model in models.items()
        },
    }


def _answers(task: Task) -> int:
    """Scored tokens of the valid split."""
    none = torch.zeros(1)
    return int(
        sum(float(task.score(none.expand(*r["targets"].shape, task.vocab), r["targets"])[1]) for r in _held(task))
    )


def _held(task: Task) -> list[dict[str, torch.Tensor]]:
    return list(task.batches("valid", 64))


def _part_facts(
    plan: Plan,
    part: str,
    scores: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    tasks: Mapping[str, Mapping[str, Any]],
    cost: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    found = resolve(part)
    card = found.card
    per_task = {}
    for name, facts in tasks.items():
        rows = scores.get((name, part), [])
        ours = [row["score"] for row in rows if "score" in row]
        theirs = [row["score"] for row in scores.get((name, BASELINE), []) if "score" in row]
        verdict = judge(ours, theirs, higher_is_better=facts["higher_is_better"], answers=facts["answers"])
        model = plan.models[name][part]
        per_task[name] = {
            "seeds": [dict(row) for row in rows],
            "mean": sum(ours) / len(ours) if ours else None,
            "interval": interval(ours, theirs, facts["answers"]),
            "verdict": None if part == BASELINE or not ours else verdict.word,
            "difference": None if not ours or not theirs else verdict.difference,
            "band": verdict.band,
            **_model_facts(model, plan.models[name][BASELINE]),
        }
    first = plan.models[plan.request.tasks[0]]
    return {
        "name": part,
        "title": found.row.name if found.row else part,
        "card": None
        if card is None
        else {
            "summary": card.summary,
            "equations": list(card.equations),
            "cost": card.cost,
            "notes": card.notes,
            "departures": list(card.departures),
            "status": found.row.status if found.row else "",
            "source": found.row.link if found.row else "",
        },
        "tasks": per_task,
        "cost": _cost_facts(part, plan.lengths, cost),
        "growth_of_flops": _flop_growth(first[part]),
        "state": _state(first[part]),
    }


def _model_facts(model: Model, baseline: Model) -> dict[str, Any]:
    """Parameters against the baseline's, chosen width, FLOPs per token."""
    lm = model.build()
    ours, theirs = parameters(lm), parameters(baseline.build())
    facts: dict[str, Any] = {
        "parameters": ours,
        "ratio": ours / theirs,
        "hidden_dim": model.hidden_dim,
        "position": model.position,
    }
    try:
        counted = flops(lm, torch.zeros(1, model.length, dtype=torch.long))
    except ValueError as error:
        return {**facts, "flops_per_token": None, "uncounted": str(error)}
    return {**facts, "flops_per_token": counted / model.length, "uncounted": ", ".join(counted.uncounted)}


def _flop_growth(model: Model) -> float | None:
    """Fitted exponent of the FLOPs of one block; None where they cannot be counted."""
    try:
        with torch.device("meta"):
            blocks = [Encoder(**{"causal": True, **_block(model), "depth": 1, "length": n}) for n in FLOP_LENGTHS]
        return fit_exponent(
            FLOP_LENGTHS, [flops(b, torch.empty(1, n, model.dim)) for b, n in zip(blocks, FLOP_LENGTHS, strict=True)]
        )
    except (ValueError, RuntimeError, NotImplementedError):
        return None


def _state(model: Model) -> dict[str, int] | None:
    """Bytes of one block's decoding state after some lengths; None without a state."""
    found = {}
    for n in STATE_LENGTHS:
        block = Encoder(**{"causal": True, **_block(model), "depth": 1, "length": n})
        try:
            size = state_bytes(block, torch.randn(1, n, model.dim))
        except (ValueError, RuntimeError, NotImplementedError):
            return None
        if size is None:
            return None
        found[str(n)] = size
    return found


def _cost_facts(part: str, lengths: Sequence[int], cost: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Curves over the lengths, their growth, and where they fall below the baseline's."""
    curves = {name: [_value(part, n, name, cost) for n in lengths] for name in _CURVES}
    base = {name: [_value(BASELINE, n, name, cost) for n in lengths] for name in _CURVES}
    errors = {
        f"{row['what']} at {row['length']:,}": row["error"]
        for row in cost
        if row["part"] == part and "error" in row and row["round"] == 0
    }
    crossings = {name: crossing(lengths, curves[name], base[name]) for name in _CURVES}
    return {
        "curves": curves,
        "growth": {name: fit_exponent(lengths, values) for name, values in curves.items()},
        "crossing": None
        if part == BASELINE
        else {name: {"length": c.length, "from_start": c.from_start} for name, c in crossings.items()},
        "noisy": sorted({row["length"] for row in cost if row["part"] == part and _noisy(row)}),
        "errors": errors,
    }


_CURVES = ("forward_s", "train_s", "forward_bytes", "train_bytes")


def _value(part: str, length: int, name: str, cost: Sequence[Mapping[str, Any]]) -> float | None:
    """The fastest pass of all rounds, or the peak memory."""
    found = [row[name] for row in cost if row["part"] == part and row["length"] == length and name in row]
    if not found:
        return None
    return min(value[1] for value in found) if name.endswith("_s") else float(min(found))


def _noisy(row: Mapping[str, Any]) -> bool:
    """Whether the middle repeat took half as long again as the fastest."""
    return any(row[name][0] > 1.5 * row[name][1] for name in ("forward_s", "train_s") if name in row)


def _machine(plan: Plan) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "training": f"{plan.workers} processes of {plan.threads} threads",
        "measuring": f"{plan.workers * plan.threads} threads, CPU",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
