"""Faults of disk, files, data and users, tried one by one: ``python -m tests.faults.run`` stores the counts.

Every fault must end in one of two ways: refused in one sentence, or without any effect on what is read. What counts as
bad: other contents than were stored without a word (silent corruption), code of a file run (a canary file appears), more
than 60 s (a hang), an exception that the command line does not turn into a sentence (a bare traceback).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tests.mutants.planting import Hangs, limited
from tests.training.chains import ToyTask, final_hash, run_toy
from torch import Tensor

from tevo import cli
from tevo.training import checkpoint
from tevo.training.recipe import PRESETS, RECIPES, LanguageModelRecipe, read

RESULTS = Path(__file__).parent / "results.json"
SECONDS = 60.0
BAD = ("silent corruption", "code execution", "hang", "bare traceback")
# what the command line turns into one sentence and exit code 2
SENTENCES = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)


@dataclass
class Tally:
    """How the faults of one family ended, and the first of each bad kind in words."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)

    def note(self, how: str, what: str) -> None:
        self.tried += 1
        if how in BAD:
            self.bad.setdefault(how, []).append(what)
        elif how == "refused":
            self.refused += 1
        else:
            self.harmless += 1


def tried(run: Callable[[], bool]) -> tuple[str, str]:
    """How a fault ends. ``run`` returns whether what it found is what was stored, or raises."""
    try:
        with limited(SECONDS):
            return ("harmless", "") if run() else ("silent corruption", "other contents were accepted")
    except Hangs:
        return "hang", f"more than {SECONDS:.0f} s"
    except SENTENCES as error:
        text = str(error)
        return (
            ("refused", text) if "\n" not in text and text else ("bare traceback", f"{type(error).__name__}: {text!r}")
        )
    except SystemExit as error:
        return ("harmless", "") if not error.code else ("bare traceback", f"SystemExit: {error.code}")
    except BaseException as error:
        return "bare traceback", f"{type(error).__name__}: {str(error)[:200]}"


def commanded(argv: list[str], wanted: str | None = None) -> tuple[str, str]:
    """How a command line ends; ``wanted`` is what it prints when nothing is wrong."""
    out, err = io.StringIO(), io.StringIO()
    code = -1

    def run() -> bool:
        nonlocal code
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
        return True

    how, what = tried(run)
    if how != "harmless":
        # whatever leaves main() is a traceback to the user
        return ("hang" if how == "hang" else "bare traceback"), f"{' '.join(argv)}: {what}"
    said = err.getvalue().strip()
    if code == 2:
        good = said.startswith("error: ") and "\n" not in said and "Traceback" not in said
        return ("refused", said) if good else ("bare traceback", f"{' '.join(argv)}: {said[:300]!r}")
    if wanted is not None and out.getvalue() != wanted:
        return "silent corruption", f"{' '.join(argv)} printed {out.getvalue()[:200]!r}"
    return "harmless", said


# --- checkpoints ---------------------------------------------------------------------------------------------------


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(300, 217, generator=generator),
        "half": torch.randn(31, 17, generator=generator).to(torch.bfloat16),
        "bytes": torch.randint(0, 256, (5056,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }


META = {"note": "naïve", "rate": 0.1, "none": None, "list": [1, 2.5, "x"]}


def is_stored(folder: Path, step: int, seed: int = 0) -> bool:
    """Whether a checkpoint holds what was saved."""
    found, wanted = checkpoint.load(folder), some_tensors(seed)
    same = all(torch.equal(found.tensors[name], value) for name, value in wanted.items())
    return same and found.tensors.keys() == wanted.keys() and found.meta == META and found.step == step


def damaged_checkpoints(tally: Tally, home: Path, draw: random.Random, flips: int) -> None:
    """Files cut at every 4 KB and at every byte of the small ones, and single bits flipped anywhere."""
    folder = checkpoint.save(home / "run", 100, some_tensors(), META)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        stride = 4096 if len(whole) > 4096 else 1
        for length in range(0, len(whole), stride):
            path.write_bytes(whole[:length])
            tally.note(*tried(lambda: is_stored(folder, 100)))
        for extra in (b"\0", b"x" * 4096):
            path.write_bytes(whole + extra)
            tally.note(*tried(lambda: is_stored(folder, 100)))
        for _ in range(flips // 3):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            tally.note(*tried(lambda: is_stored(folder, 100)))
        path.write_bytes(whole)
    assert is_stored(folder, 100)


class FailsAt:
    """Lets calls through until the n-th, which fails."""

    def __init__(self, number: int, error: int) -> None:
        self.left, self.error, self.fired = number, error, False

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise OSError(self.error, os.strerror(self.error))
            return original(*args, **kwargs)

        return call


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")


@contextlib.contextmanager
def failing_disk(number: int, error: int) -> Iterator[FailsAt]:
    """The n-th operation that changes the disk fails: of the os module, of files opened to write, of safetensors."""
    fails = FailsAt(number, error)
    plain_open = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = plain_open(path, mode, *args, **kwargs)
        if "r" in mode and "+" not in mode:
            return file
        file.write = fails.around(file.write) if mode == "w" else file.write  # type: ignore[method-assign]
        return file

    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, fails.around(getattr(os, name))))
        stack.enter_context(mock.patch.object(Path, "open", fails.around(opened)))
        stack.enter_context(mock.patch.object(checkpoint, "save_file", fails.around(checkpoint.save_file)))
        yield fails


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


def failing_saves(tally: Tally, home: Path, errors: tuple[int, ...] = ERRORS) -> None:
    """The n-th operation of a save fails, for every n, as a full disk, a broken one and a forbidden one."""
    for error in errors:
        for number in range(1, 200):
            run = home / f"{error}-{number}"
            checkpoint.save(run, 1, some_tensors(1), META)
            checkpoint.save(run, 2, some_tensors(2), META)

            def attempt(run: Path = run, number: int = number, error: int = error) -> bool:
                with failing_disk(number, error) as fails:
                    try:
                        checkpoint.save(run, 3, some_tensors(3), META)
                    finally:
                        nonlocal fired
                        fired = fails.fired
                return True

            fired = False
            how, what = tried(attempt)
            if not fired:
                shutil.rmtree(run)
                break
            if how in ("refused", "harmless"):
                # nothing but whole checkpoints in sight, the two before it or it and the newer of them
                how, what = tried(lambda run=run: after_a_failed_save(run))
                how = "refused" if how == "harmless" else "silent corruption"
            tally.note(how, f"operation {number}, {os.strerror(error)}: {what}")
            shutil.rmtree(run)


def after_a_failed_save(run: Path) -> bool:
    """Whether every checkpoint in sight is whole, at least the newest old one is, and the next save works."""
    checkpoint.sweep(run)
    found = checkpoint.steps(run)
    whole = all(is_stored(run / "checkpoints" / f"step-{step:08d}", step, step) for step in found)
    checkpoint.save(run, 9, some_tensors(9), META)
    newest = checkpoint.latest(run)
    assert newest is not None
    return whole and 2 in found and is_stored(newest, 9, 9) and not list(run.rglob(".partial-*"))


def full_disk(tally: Tally, home: Path) -> None:
    """The kernel refuses to let any file grow past a size, for every 4 KB of it: real failed writes."""
    size = len(checkpoint.save(home / "whole", 1, some_tensors(), META).joinpath("tensors.safetensors").read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [*range(0, 400, 40), *range(4096, size, 4096)]:
        run = home / str(limit)
        checkpoint.save(run, 2, some_tensors(2), META)

        def attempt(run: Path = run, limit: int = limit) -> bool:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                checkpoint.save(run, 3, some_tensors(3), META)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return False

        how, what = tried(attempt)
        if how == "refused":
            how, what = tried(lambda run=run: after_a_failed_save(run))
            how = "refused" if how == "harmless" else "silent corruption"
        tally.note(how, f"files of at most {limit} bytes: {what}")
        shutil.rmtree(run)


def foreign_checkpoints(tally: Tally, home: Path) -> None:
    """Pickles in every disguise, each of which would leave a canary behind if it were read."""
    canary = home / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{canary}'",)

    payload = pickle.dumps(Bomb())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", payload)
    for kind, content in (("raw", payload), ("zip", archive.getvalue())):
        for suffix in ("", ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".safetensors", ".npz", ".npy", ".json", ".yaml"):
            path = home / f"foreign-{kind}{suffix}"
            path.write_bytes(content)
            tally.note(*tried(lambda path=path: is_stored(path, 1)))
            inside = home / f"run-{kind}{suffix}" / "checkpoints" / "step-00000001"
            inside.mkdir(parents=True)
            (inside / f"tensors{suffix}").write_bytes(content)
            tally.note(*tried(lambda inside=inside: is_stored(inside, 1)))
            tally.note(*commanded(["data", "convert", str(path), "--out", str(home / "out")]))
            tally.note(*commanded(["train", "lm", "--recipe", str(path)]))
            tally.note(*commanded(["eval", str(inside.parent.parent)]))
    if canary.exists():
        tally.bad.setdefault("code execution", []).append("a pickle was run")


# --- runs ----------------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"steps": 12, "save_every": 4, "eval_every": 12, "log_every": 2}


def failing_runs(tally: Tally, home: Path) -> None:
    """The n-th operation of a whole training run fails, for every n; run again it must end with the same bits."""
    run_toy(home / "reference", **SHORT)
    wanted = final_hash(home / "reference")
    for number in range(1, 400):
        run = home / f"run-{number}"
        fired = False

        def attempt(run: Path = run, number: int = number) -> bool:
            nonlocal fired
            with failing_disk(number, errno.ENOSPC) as fails:
                try:
                    run_toy(run, **SHORT)
                finally:
                    fired = fails.fired
            return True

        how, what = tried(attempt)
        if not fired:
            break
        if how in ("refused", "harmless"):
            how, what = tried(lambda run=run: bool(run_toy(run, **SHORT)) and final_hash(run) == wanted)
            how = {"harmless": "refused", "refused": "bare traceback"}.get(how, how)
        tally.note(how, f"operation {number} of a run: {what}")
        shutil.rmtree(run, ignore_errors=True)


def damaged_runs(tally: Tally, home: Path, draw: random.Random, flips: int) -> None:
    """Bits flipped, and ends cut off, in recipe.json and metrics.jsonl of a run that is then evaluated and resumed."""
    run = home / "lm"
    small = ["--task", "recall", "--length", "24", "--dim", "8", "--depth", "1", "--heads", "2", "--examples", "8"]
    train = [
        "train",
        "lm",
        *small,
        "--steps",
        "4",
        "--batch",
        "2",
        "--log-every",
        "1",
        "--threads",
        "1",
        "--run",
        str(run),
    ]
    how, what = commanded(train)
    assert how == "harmless", what
    evaluate = ["eval", str(run), "--json"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(evaluate) == 0
    path = run / "recipe.json"
    whole = path.read_bytes()
    digits = [at for at, byte in enumerate(whole) if chr(byte).isdigit()]
    for number in range(flips + len(digits)):
        damaged = spoiled(whole, draw, number)
        if number >= flips:
            # another number where a number was: still a recipe
            damaged = bytearray(whole)
            at = digits[number - flips]
            damaged[at] = ord("0") + (whole[at] - ord("0") + 1) % 10
        path.write_bytes(damaged)
        tally.note(*commanded(evaluate, out.getvalue()))
        tally.note(*commanded(train))
        path.write_bytes(whole)
    reference, cut = home / "reference", home / "cut"
    run_toy(reference, **{**SHORT, "steps": 8})
    wanted = final_hash(reference)
    shutil.copytree(reference, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    for name in ("metrics.jsonl", "lock"):
        whole = (cut / name).read_bytes()
        for number in range(flips):
            resumed = home / "resumed"
            shutil.copytree(cut, resumed)
            (resumed / name).write_bytes(spoiled(whole, draw, number))
            tally.note(*tried(lambda resumed=resumed: goes_on(resumed, wanted)))
            shutil.rmtree(resumed)


def spoiled(whole: bytes, draw: random.Random, number: int) -> bytearray:
    """A bit flipped; every eighth time the end cut off."""
    damaged = bytearray(whole)
    if number % 8 or len(whole) < 2:
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    else:
        del damaged[draw.randrange(len(whole)) :]
    return damaged


def goes_on(run: Path, wanted: str) -> bool:
    """Whether a run resumed from its middle ends with the wanted bits and metrics that hold each later step once."""
    run_toy(run, **{**SHORT, "steps": 8})
    run_toy(run, **{**SHORT, "steps": 8})  # finished: only looked at
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    later = [step for step in steps if step > 4]
    return final_hash(run) == wanted and steps == sorted(steps) and {6, 8} <= set(later)


def poisoned_losses(tally: Tally, home: Path) -> None:
    """A loss that is not finite at each step: stopped with the batch kept, and resumed from the last good checkpoint."""

    class Poisoned(ToyTask):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

        def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
            rows = super().batch(split, seed, index, size)
            if split == "train" and index == self.step:
                # nothing is scored, and the mean over nothing is not a number
                rows["targets"] = rows["targets"].clone().fill_(-100)
            return rows

    from tests.training import chains

    for value in (float("nan"), float("inf"), -float("inf")):
        for step in range(12):
            run = home / f"{value}-{step}"

            def attempt(run: Path = run, step: int = step, value: float = value) -> bool:
                forward, seen = chains.NextToken.forward, [0]

                def poisoned(self: Any, model: Any, batch: Any) -> Any:
                    loss = forward(self, model, batch)
                    seen[0] += 1
                    return loss._replace(total=loss.total * value) if seen[0] == step + 1 else loss

                with mock.patch.object(chains.NextToken, "forward", poisoned):
                    run_toy(run, **SHORT)
                return False

            how, what = tried(attempt)
            if how == "refused":
                newest = checkpoint.latest(run)
                good = f"step {step} " in what and (run / f"bad_batch_{step:08d}.safetensors").is_file()
                good &= checkpoint.steps(run) == list(range(4, step + 1, 4))[-2:]
                good &= newest is None or bool(checkpoint.load(newest))
                how = "refused" if good else "silent corruption"
            tally.note(how, f"loss {value} at step {step}: {what}")
            shutil.rmtree(run, ignore_errors=True)


def _toy_in_a_process(folder: Path, said: Any) -> None:
    try:
        run_toy(folder, **{**SHORT, "steps": 60})
        said.put("finished")
    except ValueError as error:
        said.put(f"refused {error}")
    except BaseException as error:
        said.put(f"{type(error).__name__} {error}")


def crowded_folders(tally: Tally, home: Path, rounds: int) -> None:
    """Two processes in one run folder: one trains, the other is told so, and the run is that of one alone."""
    context = multiprocessing.get_context("fork")
    for number in range(rounds):
        folder, said = home / f"crowd-{number}", context.Queue()
        both = [context.Process(target=_toy_in_a_process, args=(folder, said)) for _ in range(2)]
        for process in both:
            process.start()
        words = sorted(said.get(timeout=SECONDS) for _ in both)
        for process in both:
            process.join()
        alone = words == ["finished", "finished"] or (words[0] == "finished" and "is in use by process" in words[1])
        whole = checkpoint.latest(folder) is not None and bool(final_hash(folder))
        tally.note("refused" if alone and whole else "silent corruption", f"two processes: {words}")


def forbidden_folders(tally: Tally, home: Path) -> None:
    """Run folders that cannot be written: without permission, below a file, on a device, of a name too long."""
    closed = home / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    home.chmod(0o755)
    (home / "file").write_text("x")
    places = [home / "file" / "run", Path("/proc/run"), Path("/dev/null/run"), home / ("x" * 300), home / "a\0b"]
    for place in places:
        tally.note(*tried(lambda place=place: not run_toy(place, **SHORT)))
        tally.note(*commanded(["train", "lm", "--task", "recall", "--dim", "8", "--steps", "1", "--run", str(place)]))
        tally.note(*commanded(["data", "make", "tetrominoes_like", "--scenes", "2", "--out", str(place)]))
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        for place in (closed, closed / "run"):
            tally.note(*tried(lambda place=place: not run_toy(place, **SHORT)))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


# --- files from elsewhere ------------------------------------------------------------------------------------------

WORDS = ["lr", "steps", "mixer", "seed", "betas", "nosuch", "lr ", "", "kind", "task", "data", "precision", "threads"]
VALUES = [
    "1", "-1", "1e-3", "1e400", "nan", ".inf", "true", "null", "''", "text", "[1, 2]", "[]", "[[1]]", "{a: 1}", "1_000", "0x10",
    "99999999999999999999999", "!!python/object/apply:os.system ['touch CANARY']", "!!python/name:os.system", "!!binary aGk=",
    "&a [*a]", "*b", "<<: {}", "|\n  x", ">\n  y", "'", '"', "[", "{", "2026-01-01", "- x", "\t1", "\x00", "é", "\ud7ff", "1:30",
    "!!set {a}", "!!omap []", "!!float x", "!!int '1'", "%TAG", "---", "...", "@x", "`x`", "? a", ": b", "#", "\\", "/etc/passwd",
]  # fmt: skip


def malformed_recipes(tally: Tally, home: Path, draw: random.Random, count: int) -> None:
    """Generated YAML and JSON: wrong keys, types, ranges, tags, aliases, broken syntax, random bytes."""
    canary = home / "canary"
    valid = LanguageModelRecipe().to_json()
    for number in range(count):
        suffix = draw.choice((".yaml", ".yml", ".json"))
        path = home / f"r{suffix}"
        if number % 4 == 0:
            content = bytearray(valid.encode())
            for _ in range(draw.randrange(1, 4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif number % 4 == 1:
            content = bytearray(valid.encode()[: draw.randrange(len(valid))])
        elif number % 8 == 2:
            content = bytearray(draw.randbytes(draw.randrange(400)))
        else:
            lines = [f"{draw.choice(WORDS)}: {draw.choice(VALUES)}" for _ in range(draw.randrange(1, 6))]
            content = bytearray("\n".join(lines).replace("CANARY", str(canary)).encode("utf-8", "surrogatepass"))
        path.write_bytes(content)

        def attempt(path: Path = path) -> bool:
            recipe = read(path)
            # whatever is accepted is a recipe that reads back
            path.with_name("back.json").write_text(recipe.to_json())
            return read(path.with_name("back.json")) == recipe

        tally.note(*tried(attempt))
        if number % 10 == 0:
            # the same file through the command line; the task that does not exist keeps a good one from training
            tally.note(*commanded(["train", "lm", "--recipe", str(path), "--task", "nosuch"]))
    if canary.exists():
        tally.bad.setdefault("code execution", []).append("a tag of a recipe was run")


def malformed_scenes(tally: Tally, home: Path, draw: random.Random, count: int) -> None:
    """Scenes as .npz, folders of arrays and TFRecords with bytes changed, cut and added, through ``tevo data convert``."""
    from tevo.slot_attention.data import convert, tetrominoes_like

    scenes = tetrominoes_like(0, range(3))
    np.savez(home / "good.npz", **scenes)
    stored = home / "stored"
    convert(({name: values[i] for name, values in scenes.items()} for i in range(3)), stored)
    bad = io.BytesIO()
    canary = home / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{canary}'",)

    np.savez(bad, image=np.array([Bomb(), Bomb()], dtype=object))
    seeds = {
        ".npz": (home / "good.npz").read_bytes(),
        ".npz ": bad.getvalue(),
        ".tfrecords": draw.randbytes(300),
        ".zip": (home / "good.npz").read_bytes(),
    }
    members = sorted(p for p in stored.iterdir() if p.is_file())
    whole = {path: path.read_bytes() for path in members}
    for number in range(count):
        out = home / "out"
        if number % 3 == 2:
            path = draw.choice(members)
            path.write_bytes(changed(whole[path], draw, head=200))
            tally.note(*commanded(["data", "convert", str(stored), "--out", str(out)]))
            path.write_bytes(whole[path])
        else:
            suffix = draw.choice(list(seeds))
            source = home / f"bad{suffix.strip()}"
            source.write_bytes(changed(seeds[suffix], draw))
            tally.note(*commanded(["data", "convert", str(source), "--out", str(out)]))
        shutil.rmtree(out, ignore_errors=True)
    if canary.exists():
        tally.bad.setdefault("code execution", []).append("an object array was unpickled")


def changed(content: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """One to three edits: a bit, a byte, a cut, an insertion, a repetition; in the first ``head`` bytes every other time."""
    out = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        reach = min(len(out), head) if head is not None and draw.random() < 0.5 else len(out)
        at = draw.randrange(reach) if reach else 0
        kind = draw.randrange(5)
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and out:
            out[at] = draw.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = draw.randbytes(draw.randrange(1, 9))
        else:
            out[at:at] = out[at : at + draw.randrange(1, 99)]
    return bytes(out)


def malformed_texts(tally: Tally, home: Path, draw: random.Random, count: int) -> None:
    """Text that is none: random bytes, NUL, byte-order marks, one endless line, nothing; and strange folders."""
    from tevo.data.text import SPLITS, files_corpus

    pieces = [
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"\n",
        b"\r\n",
        b"a" * 5000,
        b"\xf0\x9f\x98",
        b"word ",
        b"\x1b[2J",
        b"",
    ]
    for number in range(count):
        path = home / f"t{number % 7}"
        content = b"".join(draw.choice([*pieces, draw.randbytes(30)]) for _ in range(draw.randrange(9)))
        path.write_bytes(content)

        def attempt(path: Path = path, content: bytes = content) -> bool:
            corpus = files_corpus(path)
            joined = b"".join(bytes(corpus.splits[split]) for split in SPLITS)
            return joined == content.removeprefix(b"\xef\xbb\xbf")

        tally.note(*tried(attempt))
    for place in (home / "none", Path("/dev/null"), Path("/dev/zero"), Path("/proc/self/mem"), home / "x\0y"):
        tally.note(*commanded(["train", "lm", "--data", str(place), "--dry-run"]))
    (home / "loop").mkdir()
    (home / "loop" / "again").symlink_to(home / "loop")
    os.mkfifo(home / "loop" / "pipe")
    for place in (home / "loop", home / "loop" / "pipe"):
        tally.note(*commanded(["train", "lm", "--data", str(place), "--dry-run"]))


# --- the command line ----------------------------------------------------------------------------------------------


class ClosedAfter(io.TextIOBase):
    """A standard output whose reader leaves after n writes."""

    def __init__(self, writes: int) -> None:
        self.left, self.closed_fd = writes, os.open(os.devnull, os.O_WRONLY)

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return len(text)

    def fileno(self) -> int:
        return self.closed_fd


def closed_outputs(tally: Tally) -> None:
    """The reader of each verb's output leaves after n writes, for every n."""
    reading = [["--help"], ["--version"], ["list"], ["list", "--json"], ["show", "softmax"], ["doctor"]]
    for argv in [*reading, *([verb, "--help"] for verb in cli.verbs())]:
        for writes in range(200):
            stdout = ClosedAfter(writes)

            def attempt(argv: list[str] = argv, stdout: ClosedAfter = stdout) -> bool:
                with contextlib.redirect_stdout(stdout):
                    return cli.main(argv) == 0

            how, what = tried(attempt)
            tally.note(how, f"{' '.join(argv)} with stdout closed after {writes} writes: {what}")
            os.close(stdout.closed_fd)
            if stdout.left >= 0:
                break


def mistyped_commands(tally: Tally) -> None:
    """Verbs, options and parts with one letter left out."""
    from tevo.catalogue import rows

    for verb in cli.verbs():
        for at in range(len(verb)):
            tally.note(*commanded([verb[:at] + verb[at + 1 :]]))
    for name in rows():
        for at in range(len(name)):
            tally.note(*commanded(["show", name[:at] + name[at + 1 :]]))
    for kind, cls in RECIPES.items():
        for name in cls.__dataclass_fields__:
            option = "--" + name.replace("_", "-")
            for at in range(2, len(option)):
                tally.note(*commanded(["train", kind, option[:at] + option[at + 1 :], "1", "--task", "nosuch"]))
        for preset in PRESETS[kind]:
            tally.note(*commanded(["train", kind, "--preset", preset + "x"]))


def families(draw: random.Random, scale: float = 1.0) -> dict[str, Callable[[Tally, Path], None]]:
    """Every family of faults; ``scale`` shrinks what is drawn at random, not what is enumerated."""

    def many(count: int) -> int:
        return max(1, round(count * scale))

    return {
        "damaged checkpoints": lambda tally, folder: damaged_checkpoints(tally, folder, draw, many(2100)),
        "failed operations of a save": failing_saves,
        "full disk in a save": full_disk,
        "pickles": foreign_checkpoints,
        "failed operations of a run": failing_runs,
        "damaged run folders": lambda tally, folder: damaged_runs(tally, folder, draw, many(40)),
        "losses that are not finite": poisoned_losses,
        "two processes in a folder": lambda tally, folder: crowded_folders(tally, folder, many(10)),
        "folders that cannot be written": forbidden_folders,
        "malformed recipes": lambda tally, folder: malformed_recipes(tally, folder, draw, many(1500)),
        "malformed scenes": lambda tally, folder: malformed_scenes(tally, folder, draw, many(1000)),
        "malformed texts": lambda tally, folder: malformed_texts(tally, folder, draw, many(500)),
        "closed standard output": lambda tally, folder: closed_outputs(tally),
        "mistyped commands": lambda tally, folder: mistyped_commands(tally),
    }


def main(names: list[str]) -> int:
    """Try the named families, or all of them, and store the counts; those of the others stay."""
    torch.set_num_threads(1)
    every = families(random.Random(0))
    if unknown := [name for name in names if name not in every]:
        sys.stderr.write(f"error: no families {unknown}; they are {', '.join(every)}\n")
        return 2
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))["families"] if names and RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        for name in names or every:
            folder, tally, began = Path(home) / name.replace(" ", "_"), Tally(), time.perf_counter()
            folder.mkdir()
            # drawn anew, so that a family alone is what it is among all
            families(random.Random(0))[name](tally, folder)
            stored[name] = {
                "tried": tally.tried,
                "refused": tally.refused,
                "harmless": tally.harmless,
                **{kind: len(tally.bad.get(kind, [])) for kind in BAD},
                "first": {kind: items[:5] for kind, items in tally.bad.items()},
                "seconds": round(time.perf_counter() - began),
            }
            sys.stdout.write(f"{name}: {json.dumps(stored[name])}\n")
            sys.stdout.flush()
            shutil.rmtree(folder, ignore_errors=True)
    totals = {kind: sum(family[kind] for family in stored.values()) for kind in ("tried", *BAD)}
    RESULTS.write_text(json.dumps({**totals, "families": stored}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(totals) + "\n")
    return 1 if any(totals[kind] for kind in BAD) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
