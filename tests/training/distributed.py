"""One process of a distributed toy run: ``accelerate launch ... distributed.py FOLDER DROPOUT STEPS [LAST]``.

With LAST, the process ends itself with SIGKILL after that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.training.chains import run_toy

from tevo.training.progress import Silent


class KillAt(Silent):
    def __init__(self, last: int) -> None:
        self.last = last

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        if step == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, dropout, steps, *last = sys.argv[1:]
    run_toy(
        Path(folder),
        watch=KillAt(int(last[0]) if last else -1),
        dropout=float(dropout),
        steps=int(steps),
        save_every=5,
        accumulate=3,
    )
