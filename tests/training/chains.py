"""Chains of training runs killed with SIGKILL and rerun, against one uninterrupted run; and checkpoints with flipped bits.

``python -m tests.training.chains --chains 40 --bits 200`` prints the totals as JSON and fails unless every chain ends
with the bits of the uninterrupted run and every damaged checkpoint is refused.

A kill falls after the first checkpoint is complete and before the last step. Half of the kills fall at a random moment,
half inside a write: as soon as a temporary name is seen, plus a random millisecond or two. Each attempt is a fresh
process forked from a server that has imported torch and computed nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tevo.objectives.next_token import NextToken
from tevo.training import checkpoint
from tevo.training.loop import Result, train
from tevo.training.progress import Watch
from tevo.training.recipe import LanguageModelRecipe, Recipe


class ToyTask:
    """Predict the next of tokens that follow each other by a noisy rule; some targets are not scored."""

    metric = "accuracy"
    vocab = 11

    def __init__(self, *, length: int = 13, rows: int = 12) -> None:
        self.length, self.rows = length, rows
        self.facts: dict[str, Any] = {"task": "toy", "length": length, "rows": rows}

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        rows = [(index, r) for r in range(size)] if split == "train" else [(0, index * size + r) for r in range(size)]
        tokens = torch.stack([self._row(split, seed, *row) for row in rows])
        targets = tokens[:, 1:].clone()
        targets[tokens[:, :-1] == 0] = -100
        return {"inputs": tokens[:, :-1], "targets": targets}

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        for index in range(self.rows // size):
            yield self.batch(split, 0, index, size)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kept = targets != -100
        return ((logits.argmax(-1) == targets) & kept).sum().double(), kept.sum().double()

    def _row(self, split: str, seed: int, index: int, row: int) -> Tensor:
        key = hash((len(split), seed, index, row))  # of integers only: the same in every process
        noise = torch.randint(0, 2, (self.length + 1,), generator=torch.Generator().manual_seed(key))
        return (noise.cumsum(0) + row) % self.vocab


class ToyModel(nn.Module):
    """Two layers of causal softmax attention with dropout, tied embeddings and one parameter that never decays."""

    def __init__(self, *, dropout: float = 0.1, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(ToyTask.vocab, dim)
        self.out = nn.Linear(dim, ToyTask.vocab)
        self.out.weight = self.embed.weight
        # no bias for the keys: its gradient is zero but for rounding, which AdamW would blow up to whole steps
        layers = [(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)) for _ in range(2)]
        self.layers = nn.ModuleList(nn.ModuleList(parts) for parts in layers)
        self.drop = nn.Dropout(dropout)
        self.heads = heads
        self.steps_seen = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # b n d
        for norm, into, out in self.layers:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in into(norm(x)).chunk(3, -1))  # b h n e
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.drop(out(o.transpose(1, 2).flatten(2)))
        return self.out(x)

    def no_decay(self) -> set[str]:
        return {"embed.weight"}

    def after_step(self) -> None:
        self.steps_seen += 1


def toy_recipe(**options: Any) -> Recipe:
    defaults: dict[str, Any] = {"steps": 80, "batch": 6, "save_every": 4, "eval_every": 7, "log_every": 1, "threads": 1}
    return LanguageModelRecipe(**{**defaults, **options})


def run_toy(
    folder: Path, *, dropout: float = 0.1, watch: Watch | None = None, task: ToyTask | None = None, **options: Any
) -> Result:
    return train(
        toy_recipe(**options),
        build=lambda: ToyModel(dropout=dropout),
        objective=NextToken(),
        task=task or ToyTask(),
        folder=folder,
        watch=watch,
    )


def final_hash(folder: Path) -> str:
    """SHA-256 of all tensors of the newest checkpoint: weights, moments and random generators."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    checkpoint.load(newest)
    return json.loads((newest / "manifest.json").read_text())["files"]["tensors.safetensors"]["sha256"]


def run_chains(chains: int, kills: int, *, seed: int, home: Path) -> dict[str, Any]:
    """``chains`` runs, each killed ``kills`` times if its steps last that long and at least once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "accelerate", "tevo.training.loop"])
    draw = random.Random(seed)
    reference = home / "reference"
    _attempt(context, reference).join()
    wanted = final_hash(reference)
    totals = {"chains": chains, "kills": 0, "kills_inside_a_write": 0, "chains_killed": 0, "identical": 0}
    for number in range(chains):
        folder = home / f"chain_{number}"
        killed = 0
        while True:
            process = _attempt(context, folder)
            if killed < kills and not _near_the_end(folder) and _kill(process, folder, draw):
                killed += 1
                totals["kills_inside_a_write"] += any(folder.rglob(".partial-*"))
                continue
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"chain {number} ended with exit code {process.exitcode}")
            break
        totals["kills"] += killed
        totals["chains_killed"] += killed > 0
        totals["identical"] += final_hash(folder) == wanted
        if number:
            shutil.rmtree(folder)
    return totals


def flip_bits(folder: Path, bits: int, *, seed: int, home: Path) -> int:
    """Flip one bit of a copy of a checkpoint, ``bits`` times. Returns how many were refused."""
    draw = random.Random(seed)
    refused = 0
    copy = home / "checkpoints" / folder.name
    shutil.copytree(folder, copy)
    names = sorted(p.name for p in copy.iterdir())
    for number in range(bits):
        path = copy / names[number % len(names)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            checkpoint.load(copy)
        except ValueError as error:
            refused += "\n" not in str(error)
        path.write_bytes(whole)
    checkpoint.load(copy)  # the copy itself is sound
    return refused


def _attempt(context: Any, folder: Path) -> Any:
    process = context.Process(target=_child, args=(folder,))
    process.start()
    return process


def _near_the_end(folder: Path) -> bool:
    return bool(done := checkpoint.steps(folder)) and done[-1] + toy_recipe().save_every >= toy_recipe().steps


def _child(folder: Path) -> None:
    run_toy(folder)


def _kill(process: Any, folder: Path, draw: random.Random) -> bool:
    """Kill between the first checkpoint and the last step. Returns whether the process died of it, unfinished."""
    home = folder / "checkpoints"
    every, last = toy_recipe().save_every, toy_recipe().steps
    while process.is_alive() and not checkpoint.steps(folder):
        time.sleep(0.0005)
    target = draw.randrange(checkpoint.steps(folder)[-1], last - every)
    while process.is_alive() and checkpoint.steps(folder)[-1] + every <= target:
        time.sleep(0.0005)
    if draw.random() < 0.5:
        time.sleep(draw.random() * 0.05)
    else:
        while process.is_alive() and not any(name.startswith(".partial-") for name in os.listdir(home)):
            pass
        time.sleep(draw.random() * 0.005)
    process.kill()
    process.join()
    return process.exitcode == -9 and checkpoint.steps(folder)[-1] < last


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=40)
    parser.add_argument("--kills", type=int, default=5, help="at most, in each chain")
    parser.add_argument("--bits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        totals = run_chains(options.chains, options.kills, seed=options.seed, home=home)
        newest = checkpoint.latest(home / "chain_0")
        assert newest is not None
        totals["bits_flipped"] = options.bits
        totals["refused"] = flip_bits(newest, options.bits, seed=options.seed, home=home / "flips")
    sys.stdout.write(json.dumps(totals) + "\n")
    good = totals["identical"] == totals["chains_killed"] == totals["chains"] and totals["refused"] == options.bits
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
