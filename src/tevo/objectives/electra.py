"""ELECTRA: tokens that a small generator replaced are to be told from the original ones, at every position.

    m = x with [MASK] at 85 % of k chosen positions C, k = 15 % of the tokens                        (1)
    p_G = softmax(E act(W h_G(m)) + b),   c = x with c_i ~ p_G(. | m, i) for i in C                   (2)
    y_i = 1 if c_i != x_i else 0,   D_i = sigmoid(w . gelu(W' h_D(c)_i))                              (3)
    L = mean_C -log p_G(x_i | m, i) + 50 mean_i [-y_i log D_i - (1 - y_i) log(1 - D_i)]              (4)

Generator and discriminator share the embeddings; the discriminator is what is kept. No gradient passes through the
sampled tokens. The second mean is over all tokens that are not padding, special ones too. Cost of both encoders.

Source: 2003.10555, sections 2 and 3, and its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.contracts import Loss, Objective
from tevo.functional.masks import check_mask, positions_of
from tevo.models.encoder import Encoder, check_tokens
from tevo.taps import tap

CARD = Card(
    id="electra",
    role="objective",
    summary="Replaces masked-token prediction by telling replaced tokens from original ones, at every position.",
    equations=(
        r"L = \mathrm{mean}_{i \in C}\, -\log p_G(x_i \mid m) + \lambda\, \mathrm{mean}_i\, \mathrm{BCE}(D_i(c), [c_i \ne x_i])",
        r"c_i \sim p_G(\cdot \mid m)\ (i \in C),\quad c_i = x_i\ (i \notin C)",
    ),
    exports={"electra": "Electra", "electra_encoder": "ElectraEncoder"},
    cost="n^2",
    claims=("bidirectional", "padding"),
    examples=(
        {
            "part": "electra",
            "model": "electra_encoder(vocab=11, dim=12, depth=2, heads=3, embedding_dim=6, hidden_dim=19)",
            "vocab": 11,
            "dim": 12,
            "depth": 1,
            "embedding_dim": 6,
            "generator_dim": 8,
            "generator_heads": 2,
            "mask_token": 3,
            "special": (0, 1),
            "length": 13,
        },
        {
            "part": "electra",
            "model": "electra_encoder(vocab=7, dim=8, depth=1, heads=1)",
            "vocab": 7,
            "dim": 8,
            "depth": 2,
            "generator_dim": 8,
            "mask_token": 6,
            "rate": 0.3,
            "length": 13,
        },
        {
            "part": "electra",
            "model": "electra_encoder(vocab=13, dim=10, depth=1, heads=2, segments=1)",
            "vocab": 13,
            "dim": 10,
            "depth": 1,
            "generator_dim": 6,
            "generator_heads": 3,
            "mask_token": 2,
            "keep": 0.5,
            "weight": 7.0,
            "length": 11,
        },
    ),
    equals=(
        "transformers 5.23.0 ElectraForMaskedLM and ElectraForPreTraining with shared embeddings, losses and gradients; "
        "values in tests/golden/electra_a.npz",
    ),
    departures=(
        "Positions are chosen without replacement; the released code may choose one twice and averages what it writes.",
        "Means divide by the exact counts; the released code adds 1e-6 to them.",
        "The paper's comparisons (smaller losses, other generators, adversarial training) and Electric are not built.",
    ),
    notes=(
        "items() counts real tokens. The mean over chosen positions follows it only where rows have the same share of "
        "them, as rows of equal length have."
    ),
)


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, and a norm: shared by generator and discriminator.

    Args:
        vocab: number of token ids V.
        dim: width of the embeddings.
        length: greatest length, in tokens.
        segments: number of segments told apart.
        eps: of the norm.
    """

    def __init__(self, *, vocab: int, dim: int, length: int, segments: int = 2, eps: float = 1e-12) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, dim)
        self.place = nn.Embedding(length, dim)
        self.segment = nn.Embedding(segments, dim)
        self.norm = create("layer_norm", dim=dim, eps=eps)

    def forward(self, tokens: Tensor, segments: Tensor | None, mask: Tensor | None) -> Tensor:
        """``tokens``, ``segments`` (b, n) int, ``mask`` (b, n) give (b, n, width)."""
        n, most = tokens.shape[1], self.place.num_embeddings
        if n > most:
            raise ValueError(f"ElectraEncoder was built for length={most} tokens, got n={n}; rebuild with length>={n}")
        at = positions_of(mask, n, device=tokens.device)
        kind = torch.zeros_like(tokens) if segments is None else segments
        return self.norm(self.word(tokens) + self.place(at) + self.segment(kind))


class ElectraEncoder(nn.Module):
    """The discriminator: a BERT-like encoder whose embeddings may be narrower than its blocks.

    Args:
        vocab: number of token ids V.
        dim: width d.
        depth: number of blocks.
        heads: number of heads.
        length: greatest length, in tokens.
        embedding_dim: width of the embeddings; None is dim.
        hidden_dim: width inside the feed-forwards; None is 4 dim.
        segments: number of segments told apart.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        depth: int,
        heads: int,
        length: int = 512,
        embedding_dim: int | None = None,
        hidden_dim: int | None = None,
        segments: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        width = dim if embedding_dim is None else embedding_dim
        self.embeddings = Embeddings(vocab=vocab, dim=width, length=length, segments=segments)
        self.body = Body(width=width, dim=dim, depth=depth, heads=heads, hidden_dim=hidden_dim, dropout=dropout)
        reset(self)

    def forward(self, tokens: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``tokens``, ``segments`` (b, n) int, ``mask`` (b, n) give (b, n, d)."""
        check_tokens("ElectraEncoder", tokens, self.vocab)
        check_mask("ElectraEncoder", mask, *tokens.shape)
        return self.body(self.embeddings(tokens, segments, mask), mask)


class Body(nn.Module):
    """Blocks over embeddings of ``width``, which a linear map brings to ``dim`` where they differ."""

    def __init__(self, *, width: int, dim: int, depth: int, heads: int, hidden_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(width, dim) if width != dim else None
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            heads=heads,
            mixer="multi_head(bias=True)",
            residual="post_norm",
            norm="layer_norm(eps=1e-12)",
            hidden_dim=hidden_dim,
            dropout=dropout,
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` (b, n, width), ``mask`` (b, n) give (b, n, d)."""
        y: Tensor = self.encoder(x if self.widen is None else self.widen(x), mask=mask)
        return y


def reset(module: nn.Module) -> None:
    """Matrices normal with standard deviation 0.02, truncated at 2 of them, zero biases, as in the released code."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def replaced_token_loss(scores: Tensor, replaced: Tensor, real: Tensor) -> Tensor:
    """The second mean of equation (4): ``scores`` (b, n) before the sigmoid, ``replaced`` and ``real`` (b, n) bool."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    each = F.binary_cross_entropy_with_logits(wide, replaced.to(wide.dtype), reduction="none")
    return each.masked_fill(~real, 0.0).sum() / real.sum().clamp(min=1)


class Electra(Objective):
    """Replaced-token detection; owns the generator and both heads, and trains an :class:`ElectraEncoder`.

    Args:
        vocab: number of token ids V.
        dim: width d of the model that is trained.
        depth: blocks of the generator; the paper takes as many as the model has.
        mask_token: the id of [MASK].
        special: ids that are never chosen, such as those of [CLS], [SEP] and [PAD].
        embedding_dim: width of the model's embeddings; None is dim.
        generator_dim: width of the generator; None is dim / 4, the paper's for its small and large models.
        generator_heads: heads of the generator.
        generator_hidden_dim: width inside its feed-forwards; None is 4 generator_dim.
        rate: share of the tokens of a row that is chosen; 0.25 for the paper's large model.
        keep: share of the chosen tokens that is shown to the generator unmasked.
        weight: lambda of equation (4).
        dropout: probability with which a feature of the generator's sublayers is dropped in training.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        depth: int,
        mask_token: int,
        special: tuple[int, ...] = (),
        embedding_dim: int | None = None,
        generator_dim: int | None = None,
        generator_heads: int = 1,
        generator_hidden_dim: int | None = None,
        rate: float = 0.15,
        keep: float = 0.15,
        weight: float = 50.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= mask_token < vocab or not 0 < rate <= 1 or not 0 <= keep <= 1 or weight < 0:
            raise ValueError(
                f"Electra got mask_token={mask_token}, rate={rate}, keep={keep}, weight={weight} for vocab={vocab}; expected "
                "0 <= mask_token < vocab, 0 < rate <= 1, 0 <= keep <= 1 and weight >= 0"
            )
        width = dim if embedding_dim is None else embedding_dim
        inner = max(1, dim // 4) if generator_dim is None else generator_dim
        self.vocab, self.mask_token, self.special = vocab, mask_token, tuple(special)
        self.rate, self.keep, self.weight = rate, keep, weight
        self.generator = Body(
            width=width, dim=inner, depth=depth, heads=generator_heads, hidden_dim=generator_hidden_dim, dropout=dropout
        )
        self.narrow = nn.Linear(inner, width)
        self.norm = create("layer_norm", dim=width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.hidden = nn.Linear(dim, dim)
        self.verdict = nn.Linear(dim, 1)
        reset(self)

    def corrupt(self, tokens: Tensor, *, mask: Tensor | None = None, generator: torch.Generator) -> dict[str, Tensor]:
        """Which tokens are chosen, what the generator is shown, and the noise by which it samples.

        Returns:
            ``tokens`` and ``masked`` (b, n), ``positions`` (b, k) and ``chosen`` (b, k) bool, which of them count,
            ``noise`` (b, k, V) of the standard Gumbel distribution, and ``mask`` (b, n).
        """
        check_tokens("Electra", tokens, self.vocab)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        open_ = real & ~torch.isin(tokens, torch.tensor(self.special, dtype=tokens.dtype, device=tokens.device))
        k = (real.sum(1) * self.rate).round().long().clamp(min=1).minimum(open_.sum(1))
        most = int(k.max()) if len(k) else 0
        draw = torch.rand(tokens.shape, generator=generator).masked_fill(~open_, -1.0)
        positions = draw.topk(most, dim=1).indices  # b k
        chosen = torch.arange(most)[None] < k[:, None]
        hidden = chosen & (torch.rand(chosen.shape, generator=generator) >= self.keep)
        here = tokens.gather(1, positions)
        masked = tokens.scatter(1, positions, here.masked_fill(hidden, self.mask_token))
        uniform = torch.rand(*chosen.shape, self.vocab, generator=generator, dtype=torch.float64)
        noise = -(-uniform.clamp(min=1e-300).log()).log()
        return {
            "tokens": tokens,
            "masked": masked,
            "positions": positions,
            "chosen": chosen,
            "noise": noise,
            "mask": real,
        }

    def predictions(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The generator's logits (b, k, V) at the chosen positions (eq. 2)."""
        mask = batch["mask"]
        embeddings: Embeddings = model.embeddings  # type: ignore[assignment]
        h = self.generator(embeddings(batch["masked"], batch.get("segments"), mask), mask)
        h = h.gather(1, batch["positions"][..., None].expand(-1, -1, h.shape[-1]))
        return F.linear(self.norm(F.gelu(self.narrow(h))), embeddings.word.weight, self.bias)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` as :meth:`corrupt` gives it, and ``segments`` (b, n) if there are any."""
        tokens, positions, chosen = batch["tokens"], batch["positions"], batch["chosen"]
        answers = tokens.gather(1, positions)
        logits = self.predictions(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
        generator = nats.masked_fill(~chosen.flatten(), 0.0).sum() / chosen.sum().clamp(min=1)
        # the largest of logits plus Gumbel noise is a draw from their softmax
        sampled = (logits.detach() + batch["noise"]).argmax(-1)
        corrupted = tap("corrupted", tokens.scatter(1, positions, sampled.where(chosen, answers)))
        h = model(corrupted, segments=batch.get("segments"), mask=batch["mask"])
        scores = tap("replaced", self.verdict(F.gelu(self.hidden(h))).squeeze(-1))
        discriminator = replaced_token_loss(scores, corrupted != tokens, batch["mask"])
        total = generator + self.weight * discriminator  # (eq. 4)
        return Loss(total, {"generator": generator.detach(), "discriminator": discriminator.detach()})

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Tokens that are not padding."""
        return batch["mask"].sum()
