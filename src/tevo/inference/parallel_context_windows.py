"""Parallel context windows: a trained model reads several texts side by side, and what follows sees all of them.

    each window b is read alone, at positions 0 .. C_b - 1                                                   (1)
    the caches of keys and values are joined, longest window first, with its first token only                (2)
    what follows stands at C, C + 1, ..., C = max_b C_b, and attends to all windows and to itself            (3)

With ``right`` all windows end at position C - 1 instead of beginning at 0. No training, and no window longer than the
model knows positions for, less what follows. Cost of the windows alone and of one cache with all of their tokens.
Letters: B windows, C_b tokens of a window.

Source: 2212.10947, section 2, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Inference, Joinable, LanguageModel, State

CARD = Card(
    id="parallel_context_windows",
    role="inference",
    summary="A trained model reads several texts side by side; what follows attends to all of them.",
    equations=(
        r"K = [K^{(1)}_{0:}; K^{(2)}_{1:}; \dots; K^{(B)}_{1:}],\quad C_1 \ge C_b",
        r"p_t = \max_b C_b + t",
        r"o_t = \sum_{j \le t} a_{tj} v_j + \sum_b \sum_{j < C_b} a_{tbj} v^{(b)}_j",
    ),
    exports={"parallel_context_windows": "ParallelContextWindows"},
    cost="n^2",
    claims=("exact_state",),
    examples=({}, {"right": True}),
    reduces_to=("the model alone, after one window",),
    equals=(
        "AI21Labs/Parallel-Context-Windows e6d31005f222, joining of caches and positions around the GPT-2 of "
        "transformers 5.23.0; values in tests/golden/parallel_context_windows_a.npz",
    ),
    departures=(
        "Decoding is the model's own: the released loop needs an old version of its library and one row at a time.",
        "Windows of one row may differ in length, those of the rows of a batch may not.",
    ),
    notes="Every window should begin with the same token, since all but the longest window lose their first one.",
)


@runtime_checkable
class Windowed(LanguageModel, Joinable, Protocol):
    """A language model whose states after several texts can be joined."""


class ParallelContextWindows(Inference):
    """A language model that reads several windows.

    Args:
        model: its mixers must keep keys and values that can be joined (softmax attention does).
        right: windows end at the same position instead of beginning there.
    """

    def __init__(self, *, model: Windowed, right: bool = False) -> None:
        super().__init__()
        if not isinstance(model, Windowed):
            raise ValueError(
                f"ParallelContextWindows joins the states of several windows, which {type(model).__name__} has no join "
                "for; use a model of softmax attention"
            )
        # states that cannot be joined are refused here and not after the windows were read
        model.join([model.init_state(1)], [0])
        self.model, self.right = model, right

    @torch.no_grad()
    def start(self, contexts: Sequence[Tensor]) -> State:
        """Read the windows, token ids (b, C_i), each beginning with the same first token; gives the model's own state.

        Raises:
            ValueError: no window, an empty one, or batches of unequal size.
        """
        self.check_contexts(contexts)
        # of windows of equal length the first comes first
        windows = sorted(contexts, key=lambda window: -window.shape[1])
        longest, states = windows[0].shape[1], []
        for tokens in windows:
            at = torch.arange(tokens.shape[1], device=tokens.device)[None]
            at = at + longest - tokens.shape[1] if self.right else at
            states.append(self.model.step(tokens, self.model.init_state(len(tokens)), at=at)[1])
        return self.model.join(states, [0, *(1 for _ in windows[1:])])  # (eq. 2)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """``tokens`` (b, n) that follow give logits (b, n, V) and the next state."""
        return self.model.step(tokens, state)
