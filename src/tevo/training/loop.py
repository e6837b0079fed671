"""The training loop, one for all programs, on accelerate.

A step is a pure function of the state and of (seed, step): the global batch comes from the task by (seed, step),
processes and micro-batches take equal slices of its rows, and each slice's loss is weighted by its share of what is
scored in the whole batch, so that any slicing gives the gradient of one big batch:

    L = sum_s (items_s / items) L_s                                                                           (1)

The learning rate is a function of the step (:mod:`tevo.training.optimizers`). What a checkpoint holds is therefore all
there is: weights, the optimiser's moments, random generators, step. A run that was killed goes on from it to the same
bits, given equal device, threads, number of processes and versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from tevo.contracts import Loss, Objective
from tevo.training import checkpoint
from tevo.training.optimizers import ADAMW, Kind, Rate, learning_rate
from tevo.training.progress import Silent, Watch
from tevo.training.recipe import Recipe, differences, read

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Data", "Result", "Trainee", "evaluate", "learning_rate", "parameter_groups", "restore_model", "train"]

_SKIPS_IN_A_ROW = 20


class Data(Protocol):
    """What the loop needs of a task."""

    @property
    def metric(self) -> str:
        """Name of the score."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that determines the rows, ready for JSON: a resumed run must find the same."""

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """Rows of one batch, a pure function of the arguments.

        The model gets "inputs", and "shown" if there is any: what a decoder sees of the answer.
        """

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows of a held-out split."""

    # what the model returns: one tensor, or a named tuple of them
    def score(self, outputs: Any, targets: Tensor, /) -> tuple[Tensor, Tensor]:
        """The metric as (sum, count)."""


class Trainee(nn.Module):
    """Model and objective as one module: what is optimised, saved and, over several processes, wrapped."""

    def __init__(self, *, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """The objective's loss of the model on a slice of a batch."""
        loss: Loss = self.objective(self.model, batch)
        return loss


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of :func:`train` ended.

    Args:
        folder: the run.
        step: optimiser steps done.
        finished: whether those are all.
        signal: number of the signal that ended it early, or None.
        score: the task's metric on the valid split at the last evaluation, or None.
    """

    folder: Path
    step: int
    finished: bool
    signal: int | None = None
    score: float | None = None


def train(
    recipe: Recipe,
    *,
    build: Callable[[], nn.Module],
    objective: Objective,
    task: Data,
    folder: Path,
    watch: Watch | None = None,
    optimizer: Kind = ADAMW,
    rate: Rate = learning_rate,
) -> Result:
    """Train in ``folder`` from its newest checkpoint, or from the start, to the recipe's last step.

    Args:
        recipe: stored as ``recipe.json``; another one in the same folder is refused.
        build: makes the model, called after seeding.
        objective: its parameters, if any, are trained and saved too.
        task: where batches come from.
        folder: holds ``recipe.json``, ``metrics.jsonl`` and ``checkpoints/``.
        watch: is told what happens.
        optimizer: AdamW by default.
        rate: of a recipe's step; by default a warm-up and a cosine.

    Raises:
        ValueError: the folder holds another recipe, other data, a damaged checkpoint, or is in use.
        FloatingPointError: the loss or its gradient is not finite; the batch is kept.
        OSError: the disk refuses.
    """
    watch = watch if watch is not None else Silent()
    threads = torch.get_num_threads()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        accelerator = _accelerator(recipe)
        main = accelerator.is_main_process
        with _locked(folder) if main else nullcontext(), _signals() as caught:
            if main:
                checkpoint.sweep(folder)
                _refuse_another(folder, recipe)
            accelerator.wait_for_everyone()
            newest = checkpoint.latest(folder)
            watch = watch if main else Silent()
            if newest is not None and checkpoint.steps(folder)[-1] >= recipe.steps:
                watch.say(f"{folder} is finished: step {recipe.steps} of {recipe.steps}; nothing is left to do")
                return Result(folder=folder, step=recipe.steps, finished=True, score=_last_score(folder, task.metric))
            found = None if newest is None else checkpoint.load(newest)
            run = _Run(recipe, accelerator, build, objective, task, folder, watch, optimizer, rate)
            run.start(found)
            return run.go(caught)
    finally:
        watch.close()
        torch.set_num_threads(threads)


def parameter_groups(trainee: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; vectors, scalars and what a module's ``no_decay()`` names do not."""
    spared = set()
    for module in trainee.modules():
        no_decay = getattr(module, "no_decay", None)
        if no_decay is None:
            continue
        own = dict(module.named_parameters())
        for name in no_decay():
            if name not in own:
                raise ValueError(
                    f"{type(module).__name__}.no_decay() names {name!r}, which is no parameter of it; "
                    f"its parameters are {', '.join(own) or 'none'}"
                )
            spared.add(id(own[name]))
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in spared]
    rest = [p for p in parameters if p.ndim < 2 or id(p) in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def evaluate(model: nn.Module, task: Data, *, split: str, batch: int) -> float:
    """The task's metric over a whole held-out split. The model's mode and the random generators are left as found."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            # a model that draws in evaluation draws the same each time
            torch.manual_seed(0)
            total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for rows in task.batches(split, batch):
                given = [rows[name].to(device) for name in ("inputs", "shown") if name in rows]
                # scores are float64, which not every device has
                one, items = task.score(_on_cpu(model(*given)), rows["targets"])
                total, count = total + one, count + items
    finally:
        model.train(training)
    return float(total / count)


def restore_model(model: nn.Module, folder: Path) -> int:
    """Load the weights of the newest checkpoint of a run into ``model``.

    Returns:
        the step they are of.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or it is of another model.
    """
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint; expected a run folder that `tevo train` made")
    found = checkpoint.load(newest)
    # a digit changed in the recipe would evaluate something else without a word
    stored, made_by = _digest(folder / "recipe.json"), found.meta.get("recipe_sha256")
    if made_by is not None and stored != made_by:
        raise ValueError(
            f"{folder / 'recipe.json'} is not the one that checkpoint {newest.name} was made with (SHA-256 {stored[:12]}..., "
            f"expected {made_by[:12]}...); undo the change"
        )
    _load(model, _below(found.tensors, "trainee.model."), where=f"checkpoint {newest}")
    return found.step


class _Run:
    """One process's part of a run between two interruptions."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        build: Callable[[], nn.Module],
        objective: Objective,
        task: Data,
        folder: Path,
        watch: Watch,
        optimizer: Kind,
        rate: Rate,
    ) -> None:
        self.kind, self.rate = optimizer, rate
        self.recipe, self.accelerator, self.task, self.folder, self.watch = recipe, accelerator, task, folder, watch
        self.main, self.ranks, self.rank = (
            accelerator.is_main_process,
            accelerator.num_processes,
            accelerator.process_index,
        )
        if recipe.batch % (self.ranks * recipe.accumulate):
            raise ValueError(
                f"batch={recipe.batch} cannot be cut into equal slices for {self.ranks} processes x "
                f"accumulate={recipe.accumulate}; choose a multiple"
            )
        torch.manual_seed(recipe.seed)
        self.trainee = Trainee(model=build(), objective=objective)
        if recipe.checkpoint_activations:
            _checkpoint_activations(self.trainee.model)
        if recipe.compile:
            self.trainee.model.compile()
        if recipe.tensorboard:
            _summary_writer()  # refused before anything is written
        groups = parameter_groups(self.trainee, weight_decay=recipe.weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(self.trainee, self.kind.make(groups, recipe))
        self.trainee.train()
        found = (getattr(module, "after_step", None) for module in self.trainee.modules())
        self.after_steps: list[Callable[[], None]] = [after_step for after_step in found if after_step is not None]
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        self.score: float | None = None
        # the same weights everywhere, other dropout in each process
        if self.rank:
            torch.manual_seed(recipe.seed + (self.rank << 32))

    def start(self, found: checkpoint.Checkpoint | None) -> None:
        """Take up the checkpoint, and say where output goes and how to resume."""
        if found is not None:
            self._restore(found)
        if self.main and not (self.folder / "recipe.json").exists():
            checkpoint.write_file(self.folder / "recipe.json", self.recipe.to_json())
        where = f"from step {self.step}" if found is not None else "from the start"
        self.watch.say(
            f"{self.folder}: training {where} to step {self.recipe.steps}, a checkpoint every {self.recipe.save_every} "
            "steps; run the same command again to resume"
        )
        if found is not None and (changed := _changes(found.meta["environment"], self._environment())):
            self.watch.say(f"resumed, but not bit for bit: {changed}")

    def go(self, caught: list[int]) -> Result:
        """Step until the last step or a signal."""
        recipe = self.recipe
        keep_log = _Metrics(self.folder, self.step, tensorboard=recipe.tensorboard) if self.main else None
        began = time.perf_counter() - self.seconds
        stop: int | None = None
        try:
            while self.step < recipe.steps and stop is None:
                numbers, stop = self._advance(caught)
                self.seconds = time.perf_counter() - began
                last = self.step == recipe.steps
                if keep_log is not None and (last or self.step % recipe.log_every == 0):
                    keep_log.write(self.step, {**numbers, "seconds": round(self.seconds, 3)})
                if last or self.step % recipe.eval_every == 0:
                    # by every process: the others would only wait
                    self.score = self._evaluate()
                    if keep_log is not None:
                        keep_log.write(self.step, {f"valid_{self.task.metric}": self.score})
                self.watch.advance(self.step, recipe.steps, self._shown(numbers))
                if last or stop is not None or self.step % recipe.save_every == 0:
                    self._save(keep_log)
        finally:
            if keep_log is not None:
                keep_log.close()
        finished = self.step == recipe.steps
        if not finished:
            self.watch.say(
                f"stopped at step {self.step} of {recipe.steps}, saved; run the same command again to resume"
            )
        else:
            self.watch.say(f"{self.folder}: finished {recipe.steps} steps; valid {self.task.metric} {self.score:.4f}")
        return Result(
            folder=self.folder, step=self.step, finished=finished, signal=None if finished else stop, score=self.score
        )

    def _advance(self, caught: list[int]) -> tuple[dict[str, float], int | None]:
        """One optimiser step. Returns its numbers, and the signal that asks to stop."""
        recipe, accelerator = self.recipe, self.accelerator
        batch = self.task.batch("train", recipe.seed, self.step, recipe.batch)
        items = max(self._items(batch), 1.0)
        # a task may make more rows of a step than the recipe says, where inputs are short
        rows = len(batch["inputs"]) // (self.ranks * recipe.accumulate)
        first = self.rank * rows * recipe.accumulate
        sums: dict[str, Tensor] = {}
        for micro in range(recipe.accumulate):
            start = first + micro * rows
            part = {name: value[start : start + rows].to(accelerator.device) for name, value in batch.items()}
            share = self._items(part) / items
            with self._no_sync(micro):
                loss = self.wrapped(part)
                # DDP takes the mean over processes, (eq. 1) the sum
                accelerator.backward(loss.total * (share * self.ranks))
            for name, value in {"loss": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() * share
        norm = accelerator.clip_grad_norm_(self.trainee.parameters(), recipe.clip)
        numbers, stop = self._agree(sums, caught)
        numbers["grad_norm"] = float(norm)
        self._refuse_divergence(numbers, batch)
        rate = self.rate(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for after_step in self.after_steps:
            after_step()
        self.step += 1
        return {**numbers, "lr": rate}, stop

    def _items(self, batch: dict[str, Tensor]) -> float:
        return float(self.trainee.objective.items(batch))

    def _no_sync(self, micro: int) -> AbstractContextManager[None]:
        if micro + 1 == self.recipe.accumulate:
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def _agree(self, sums: dict[str, Tensor], caught: list[int]) -> tuple[dict[str, float], int | None]:
        """Sums over all processes, and the signal any of them caught: all must stop at the same step."""
        asked = float(caught[0]) if caught else 0.0
        if self.ranks > 1:
            told = torch.stack([*sums.values(), next(iter(sums.values())).new_zeros(())])
            told[-1] = asked
            everyone = self.accelerator.gather(told[None])  # ranks, numbers
            values, asked = everyone[:, :-1].sum(0).tolist(), float(everyone[:, -1].max())
        else:
            values = [float(value) for value in sums.values()]
        return dict(zip(sums, values, strict=True)), int(asked) or None

    def _refuse_divergence(self, numbers: Mapping[str, float], batch: dict[str, Tensor]) -> None:
        # under fp16 a gradient that overflows is the scaler's to skip, but not for ever
        finite = math.isfinite(numbers["grad_norm"])
        self.skipped = 0 if finite else self.skipped + 1
        patience = _SKIPS_IN_A_ROW if self.recipe.precision == "fp16" else 1
        if math.isfinite(numbers["loss"]) and self.skipped < patience:
            return
        what = "gradient norm" if math.isfinite(numbers["loss"]) else "loss"
        kept = self.folder / f"bad_batch_{self.step:08d}.safetensors"
        if self.main:
            kept.write_bytes(to_safetensors({name: value.contiguous() for name, value in batch.items()}))
        good = checkpoint.latest(self.folder)
        raise FloatingPointError(
            f"the {what} of step {self.step} is not finite; its batch is kept in {kept}, the last good checkpoint is "
            f"{good if good is not None else 'none yet'}; try a lower lr, a longer warmup or precision=fp32"
        )

    def _evaluate(self) -> float:
        rows = self.recipe.batch // (self.ranks * self.recipe.accumulate)
        with self.accelerator.autocast():
            return evaluate(self.trainee.model, self.task, split="valid", batch=rows)

    def _shown(self, numbers: Mapping[str, float]) -> dict[str, float]:
        valid = {f"valid {self.task.metric}": self.score} if self.score is not None else {}
        return {"loss": numbers["loss"], **valid}

    def _save(self, log: _Metrics | None) -> None:
        generators = self._generators()
        if self.main:
            if log is not None:
                log.sync()
            scaler = self.accelerator.scaler
            meta = {
                "recipe_hash": self.recipe.hash,
                "recipe_sha256": _digest(self.folder / "recipe.json"),
                "facts": _as_json(self.task.facts),
                "environment": self._environment(),
                "seconds": self.seconds,
                "score": self.score,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            checkpoint.save(self.folder, self.step, {**self._tensors(), **generators}, meta)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"trainee.{name}": value for name, value in self.trainee.state_dict().items()}
        state = self.optimizer.state
        for name, parameter in self.trainee.named_parameters():
            for key, value in state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _generators(self) -> dict[str, Tensor]:
        """Every process's random generators, named by rank."""
        device = self.accelerator.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        named: dict[str, Tensor] = {}
        for kind, state in states.items():
            everyone = self.accelerator.gather(state.to(device)[None])  # ranks, bytes
            named |= {f"generator.{kind}.{rank}": row.cpu().clone() for rank, row in enumerate(everyone)}
        return named

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        where = f"checkpoint {found.folder}"
        if found.meta["facts"] != _as_json(self.task.facts):
            changed = _changes(found.meta["facts"], _as_json(self.task.facts))
            raise ValueError(f"{where} was made with other data ({changed}); give the run a folder of its own")
        _load(self.trainee, _below(found.tensors, "trainee."), where=where)
        moments = _below(found.tensors, "optimizer.")
        # a parameter that never had a gradient has none
        known = {name: p for name, p in self.trainee.named_parameters() if f"{name}.step" in moments}
        expected = {f"{name}.{key}": v for name, p in known.items() for key, v in self.kind.state(p).items()}
        checkpoint.match(moments, expected, where=where)
        for name, p in known.items():
            kept = self.kind.state(p)
            self.optimizer.state[p] = {k: moments[f"{name}.{k}"].to(v.device, copy=True) for k, v in kept.items()}
        generators = _below(found.tensors, "generator.")
        if f"cpu.{self.rank}" in generators:
            torch.set_rng_state(generators[f"cpu.{self.rank}"])
        if f"cuda.{self.rank}" in generators and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(generators[f"cuda.{self.rank}"], self.accelerator.device)
        if self.accelerator.scaler is not None and found.meta["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(found.meta["scaler"])
        self.step, self.seconds, self.score = found.step, found.meta["seconds"], found.meta["score"]

    def _environment(self) -> dict[str, Any]:
        """What bit-for-bit equality depends on besides the recipe and the data."""
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            "device": f"{device.type} {name}",
            "processes": self.ranks,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


class _Metrics:
    """``metrics.jsonl``: one JSON object a line, no step twice, and TensorBoard events where asked for."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            # a killed run logged steps past its last checkpoint, perhaps half a line
            checkpoint.write_file(path, "".join(f"{json.dumps(r)}\n" for r in _records(path) if r["step"] <= step))
        self._file = path.open("a", encoding="utf-8")
        # events past the checkpoint are of steps that will be done again
        self._board = _summary_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the half line of a killed writer, or a damaged one
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _last_score(folder: Path, metric: str) -> float | None:
    scores = [r.get(f"valid_{metric}") for r in _records(folder / "metrics.jsonl")]
    numbers = [score for score in scores if isinstance(score, float)]
    return numbers[-1] if numbers else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=true needs the package tensorboard; pip install 'tevo[track]'") from error
    return SummaryWriter


def _accelerator(recipe: Recipe) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ValueError("training needs the package accelerate; pip install 'tevo[train]'") from error
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision is 'fp16', which needs a GPU, and there is none; use bf16 or fp32")
    # accelerate keeps the precision of a process's first run for ever; a second run may have another
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate is configured for {accelerator.gradient_accumulation_steps} accumulation steps; "
            "leave that at 1 and set the recipe's accumulate"
        )
    return accelerator


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the kernel lets go of it when the process dies, however it dies."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by process {file.read().strip() or '?'}; wait for it or choose another folder"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _refuse_another(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.json"
    if not path.exists():
        if checkpoint.latest(folder) is not None:
            raise ValueError(f"{folder} has checkpoints but no recipe.json; choose another folder")
        return
    if changed := differences(read(path), recipe):
        name, (old, new) = next(iter(changed.items()))
        more = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
        raise ValueError(
            f"{folder} holds a run with {name}={old!r}, got {name}={new!r}{more}; choose another folder for another run"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that the loop can save first; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may handle signals
        old = {}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _checkpoint_activations(model: nn.Module) -> None:
    if not hasattr(model, "checkpoint_activations"):
        raise ValueError(
            f"{type(model).__name__} has no switch checkpoint_activations; train it with checkpoint_activations=false"
        )
    model.checkpoint_activations = True  # type: ignore[assignment]


def _load(module: nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    checkpoint.match(tensors, module.state_dict(), where=where)
    module.load_state_dict(tensors)


def _on_cpu(outputs: Any) -> Any:
    return outputs.cpu() if isinstance(outputs, Tensor) else type(outputs)(*map(_on_cpu, outputs))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return plain


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    return ", ".join(f"{n} was {old.get(n)}, is {new.get(n)}" for n in names)
