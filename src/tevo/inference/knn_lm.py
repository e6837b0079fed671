"""kNN-LM: the tokens that followed the nearest contexts of a datastore vote on the next one.

    k_t = f(w_<=t), v_t = w_{t+1}  for every position of the stored texts                                   (1)
    D_i = |f(c) - k_i|^2,  N = the k nearest                                                                (2)
    p_knn(w) = sum_{i in N, v_i = w} exp(-D_i / T) / sum_{i in N} exp(-D_i / T)                             (3)
    p(w) = s p_knn(w) + (1 - s) p_lm(w)                                                                     (4)

f is the input of the model's last channel mixer: after attention, and in a pre-norm model after its norm. No training.
Search is exact: O(M d) for each token, over M stored entries in pieces. Letters: M entries, k neighbours.

Source: 1911.00172, sections 2 and 3, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Inference, LanguageModel, State
from tevo.taps import record

CARD = Card(
    id="knn_lm",
    role="inference",
    summary="The tokens that followed similar contexts in a datastore vote on the next one.",
    equations=(
        r"p_{\mathrm{kNN}}(w) \propto \sum_{i \in \mathcal{N}} \mathbb{1}[v_i = w]\, e^{-\lVert f(c) - k_i \rVert^2 / T}",
        r"p(w) = \lambda\, p_{\mathrm{kNN}}(w) + (1 - \lambda)\, p_{\mathrm{LM}}(w)",
    ),
    exports={"knn_lm": "KNNLM"},
    cost="n^2",
    claims=("exact_state",),
    examples=(
        {"neighbours": 8},
        {"neighbours": 3, "share": 0.65, "temperature": 2.5},
        {"share": 1.0},
        {"neighbours": 1, "share": 0.1},
    ),
    reduces_to=("the model alone, with share=0",),
    equals=(
        "urvashik/knnlm 8afab92bfcc8, get_knn_log_prob and combine_knn_and_vocab_probs with an exact index; values in "
        "tests/golden/knn_lm_a.npz",
    ),
    departures=(
        "Search is exact; the paper's index (inverted lists of quantised keys) is not built, so that large stores are "
        "slower and no neighbour is missed.",
        "A word without a neighbour has probability zero in the vote; the released code gives it log-probability -10000.",
        "Similarity by dot product, another setting of the released code, is not offered.",
        "A temperature T was added; the paper's is 1.",
    ),
    notes="Do not evaluate on texts that are stored: each position would find itself.",
)

# entries that one product of queries and keys covers
PIECE = 65536


def nearest(q: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equation (2): queries (..., d) and keys (M, d) give squared distances (..., k), smallest first, and indices."""
    flat = q.flatten(0, -2)
    best = flat.new_empty(len(flat), 0)
    index = torch.empty(len(flat), 0, dtype=torch.long, device=q.device)
    for start in range(0, len(keys), PIECE):
        piece = keys[start : start + PIECE].to(q.dtype)
        # |q|^2 is the same for all keys
        rank = piece.square().sum(-1) - 2 * flat @ piece.mT
        places = torch.arange(start, start + len(piece), device=q.device).expand(len(flat), -1)
        best, index = torch.cat([best, rank], 1), torch.cat([index, places], 1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        index = index.take_along_dim(order, 1)
    # the expanded square loses digits where keys are near; on the few that are kept the plain form is cheap
    exact = (flat[:, None] - keys[index].to(q.dtype)).square().sum(-1)
    exact, order = exact.sort(1)
    shape = (*q.shape[:-1], exact.shape[1])
    return exact.reshape(shape), index.take_along_dim(order, 1).reshape(shape)


def vote(distances: Tensor, values: Tensor, vocab: int, temperature: float) -> Tensor:
    """Equation (3): squared distances and next tokens (..., k) of neighbours give log-probabilities (..., V)."""
    weights = (-distances / temperature).softmax(-1)
    return weights.new_zeros(*weights.shape[:-1], vocab).scatter_add(-1, values, weights).log()


def interpolate(knn: Tensor, lm: Tensor, share: float) -> Tensor:
    """Equation (4): log-probabilities (..., V) of both."""
    ours, rest = (math.log(p) if p else -math.inf for p in (share, 1 - share))
    return torch.logaddexp(knn + ours, lm + rest)


class KNNLM(Inference):
    """A language model with a datastore: tensors ``keys`` (M, d) and ``values`` (M,), filled by :meth:`remember`.

    Args:
        model: a language model of blocks, which show the input of their channel mixers.
        neighbours: entries k that vote.
        share: weight s of the vote, in [0, 1]: 0.25 for texts of the model's own kind, more for others.
        temperature: T of squared distances.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self, *, model: LanguageModel, neighbours: int = 1024, share: float = 0.25, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if neighbours < 1 or not 0 <= share <= 1 or temperature <= 0:
            raise ValueError(
                f"KNNLM got neighbours={neighbours}, share={share}, temperature={temperature}; expected neighbours >= 1, "
                "0 <= share <= 1 and temperature > 0"
            )
        self.model, self.neighbours, self.share, self.temperature = model, neighbours, share, temperature
        # not part of the state dict: a store may be larger than the model, and has a size of its own
        self.register_buffer("keys", torch.empty(0, 0), persistent=False)
        self.register_buffer("values", torch.empty(0, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def remember(self, tokens: Tensor, *, skip: int = 0) -> None:
        """Store what followed each position of ``tokens`` (b, n), rows being texts of their own (eq. 1).

        Args:
            tokens: token ids.
            skip: first positions of each text that are read but not stored, for want of context.
        """
        _, f, _ = self._read(tokens, self.model.init_state(len(tokens)))
        keys = f[:, skip:-1].flatten(0, 1)
        self.keys = torch.cat([self.keys, keys]) if len(self.keys) else keys
        self.values = torch.cat([self.values.to(tokens.device), tokens[:, skip + 1 :].flatten().long()])

    def _read(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Logits (b, n, V), f (b, n, d), and the next state."""
        with record() as seen:
            logits, state = self.model.step(tokens, state)
        f = seen.get("channel_input", [])
        if not f or f[-1].shape[:2] != tokens.shape:
            raise ValueError(
                f"KNNLM looks contexts up by the input of the last channel mixer, which {type(self.model).__name__} does "
                "not show; use a model of blocks with a mixer and a channel mixer each"
            )
        return logits, f[-1], state

    @torch.no_grad()
    def start(self, contexts: Sequence[Tensor]) -> State:
        """Read the contexts, token ids (b, C_i), one after another; gives the model's own state."""
        self.check_contexts(contexts)
        return self.model.step(torch.cat(list(contexts), 1), self.model.init_state(len(contexts[0])))[1]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """``tokens`` (b, n) give log-probabilities (b, n, V) and the next state.

        Raises:
            ValueError: nothing is stored.
        """
        if not len(self.keys):
            raise ValueError("KNNLM has an empty datastore; call remember(tokens) with texts first")
        logits, f, state = self._read(tokens, state)
        distances, found = nearest(f, self.keys, self.neighbours)
        votes = vote(distances, self.values[found], logits.shape[-1], self.temperature)
        return interpolate(votes, logits.log_softmax(-1), self.share), state
