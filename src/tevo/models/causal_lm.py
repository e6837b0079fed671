"""CausalLM: a language model of any parts, with batched generation by state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tevo.catalogue.create import Spec
from tevo.contracts import State
from tevo.functional.masks import check_mask
from tevo.models.encoder import Encoder, Specs, check_tokens


class CausalLM(nn.Module):
    """Predicts the next token from the earlier ones.

    Args:
        vocab: number of token ids V.
        tied: the output layer uses the embedding matrix.
        dim, depth, heads, mixer, channel, position, residual, norm, length, hidden_dim, dropout, stack: as for
            :class:`~tevo.models.encoder.Encoder`.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        depth: int,
        heads: int = 8,
        mixer: Specs = "softmax",
        channel: Specs | None = None,
        position: Spec | None = None,
        residual: Spec | None = None,
        norm: str | None = None,
        length: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        stack: Spec | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.embedding = nn.Embedding(vocab, dim)
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            heads=heads,
            mixer=mixer,
            channel=channel,
            position=position,
            residual=residual,
            norm=norm,
            causal=True,
            length=length,
            hidden_dim=hidden_dim,
            dropout=dropout,
            stack=stack,
        )
        self.head = nn.Linear(dim, vocab, bias=False)
        self.reset_parameters()
        if tied:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Embeddings of standard deviation d^-1/2 (the Transformer's), a small output layer."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)

    def no_decay(self) -> set[str]:
        """Embeddings are not decayed."""
        return {"embedding.weight"}

    @property
    def checkpoint_activations(self) -> bool:
        """Whether blocks compute their activations again in backward instead of keeping them."""
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        self.encoder.checkpoint_activations = on

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """``tokens`` (b, n) int, ``mask`` (b, n) of padding on either side, give logits (b, n, V)."""
        check_tokens("CausalLM", tokens, self.vocab)
        return self.head(self.encoder(self.embedding(tokens), mask=mask))

    def stateful(self) -> bool:
        """Whether decoding keeps a state; otherwise :meth:`generate` runs the whole sequence for each token."""
        return self.encoder.stateful()

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        return self.encoder.init_state(batch)

    def step(
        self, tokens: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``tokens`` (b, n) at positions ``at`` (#b, n); gives logits (b, n, V) and the next state."""
        check_tokens("CausalLM", tokens, self.vocab)
        y, state = self.encoder.step(self.embedding(tokens), state, mask=mask, at=at)
        return self.head(y), state

    def join(self, states: Sequence[State], skip: Sequence[int]) -> State:
        """States after several texts side by side, less the first ``skip[i]`` tokens of each."""
        return self.encoder.join(states, skip)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row of ``prompt``.

        Args:
            prompt: (b, n) int, n >= 1; rows of unequal length are padded on the left.
            new_tokens: how many to add.
            temperature: 0 takes the likeliest token, otherwise logits are divided by it before sampling.
            top_k: sample among the k likeliest tokens only.
            mask: (b, n) bool, True for real tokens.
            generator: source of the sampling.

        Returns:
            (b, n + new_tokens): the prompt and what follows.

        Raises:
            ValueError: empty prompt, wrong mask, a row that ends in padding, negative temperature, top_k < 1.
        """
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"generate needs a prompt of shape (b, n) with n >= 1, got {tuple(prompt.shape)}")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"generate got temperature={temperature}, top_k={top_k}; expected >= 0 and >= 1")
        check_mask("generate", mask, prompt.shape[0], prompt.shape[1])
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "generate continues the last column of the prompt, but some rows end in padding; pad on the left"
            )
        was_training = self.training
        self.eval()
        try:
            out = prompt
            if not self.stateful():
                for _ in range(new_tokens):
                    token = pick(self(out, mask=mask)[:, -1], temperature, top_k, generator)
                    out = torch.cat([out, token], 1)
                    if mask is not None:
                        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                return out
            logits, state = self.step(prompt, self.init_state(len(prompt)), mask=mask)
            for i in range(new_tokens):
                token = pick(logits[:, -1], temperature, top_k, generator)
                out = torch.cat([out, token], 1)
                if i + 1 < new_tokens:
                    logits, state = self.step(token, state)
            return out
        finally:
            self.train(was_training)


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (b, 1) from logits (b, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
