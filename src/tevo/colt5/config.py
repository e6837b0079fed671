"""The sizes and choices of a CoLT5 model, as Hugging Face knows configurations."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any, TypeAlias

from transformers import PretrainedConfig

from tevo.colt5.routers import ROUTINGS, Budget, Routing, SoftTopK

__all__ = ["CoLT5Config", "Share"]

# a fraction of the length, a number of tokens, or a fraction that grows to a number
Share: TypeAlias = "float | int | list[float | int] | tuple[float, int]"


class CoLT5Config(PretrainedConfig):  # type: ignore[misc]
    """CoLT5: the default is the Base size of the paper's table 7.

    The share of routed tokens (``m``, ``q``, ``v``) is a fraction of the length (1/16), a number of tokens (1024), or both
    ([1/16, 2048]: a fraction, but at most that number).

    Args:
        vocab_size: V, rows of the embedding and of the head.
        dim: width d.
        layers: of the encoder.
        decoder_layers: by default as many.
        light_heads: heads that every token of the encoder uses, within ``radius``.
        heavy_heads: heads that routed tokens use among themselves.
        heads: of the decoder.
        cross_kv_heads: key/value heads of the decoder's attention to the encoder: 1 is multi-query, ``heads`` multi-head.
        head_dim: width of a head.
        light_dim: hidden width of the feed-forward that every token takes.
        heavy_dim: hidden width of the feed-forward that routed tokens take too. The paper prints 8096 for Base; its number
            of parameters is that of 8192.
        hidden_dim: hidden width of the decoder's feed-forward.
        radius: tokens on each side that light attention sees.
        buckets: of relative positions.
        max_distance: tokens from which on all distances share a bucket.
        m: share of tokens that take the heavy feed-forward.
        q: share of tokens that are queries of heavy attention; by default m.
        v: share of tokens that are its keys and values; by default 2 m.
        one_router: whether one router chooses queries and keys, which are the same tokens then; by default there are two.
        rotary: base of rotary positions in both branches of the encoder (:class:`tevo.positions.rope.RoPE`), in place of its
            tables of distances; None for the tables, as in the paper.
        qk_norm: whether the encoder's queries and keys are normalised (:class:`tevo.colt5.layers.NormedTurn`).
        light_kv_heads: key/value heads of light attention, a divisor of ``light_heads``; by default as many.
        heavy_kv_heads: those of heavy attention.
        global_tokens: None for the paper's attention; a number for that of the source note (see :meth:`note`), in which so
            many of the first tokens see and are seen by all.
        routing: how scores choose tokens and become weights, a name of ``routers.ROUTINGS``.
        eps: softness of the soft top-k, > 0; 1 by default. Other routings have none.
        slack: factor of the number of routed tokens in training, >= 1.
        total: factor of the sum of the weights, > 0.
        dropout: probability, of embeddings, sublayers' outputs and hidden units.
        norm_eps: added to the mean square in norms.
        use_cache: whether decoding keeps keys and values.
        tie_word_embeddings: whether the head is the embedding (its logits are then scaled by d^-1/2, as in T5).
        pad_token_id: also begins the decoder's sequences, as in T5.
        eos_token_id: ends sequences.

    Raises:
        ValueError: an argument that is not one of these, or sizes that do not fit together.
    """

    model_type = "colt5"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the trainer adds a list to it)
    attribute_map = {  # noqa: RUF012 (the base class reads it as a plain dictionary)
        "hidden_size": "dim",
        "num_attention_heads": "heads",
        "num_hidden_layers": "layers",
    }

    def __init__(
        self,
        *,
        vocab_size: int = 32128,
        dim: int = 768,
        layers: int = 12,
        decoder_layers: int | None = None,
        light_heads: int = 4,
        heavy_heads: int = 8,
        heads: int = 12,
        cross_kv_heads: int = 1,
        head_dim: int = 64,
        light_dim: int = 1024,
        heavy_dim: int = 8192,
        hidden_dim: int = 2048,
        radius: int = 127,
        buckets: int = 32,
        max_distance: int = 128,
        m: Share = 1 / 16,
        q: Share | None = None,
        v: Share | None = None,
        one_router: bool = False,
        rotary: float | None = None,
        qk_norm: bool = False,
        light_kv_heads: int | None = None,
        heavy_kv_heads: int | None = None,
        global_tokens: int | None = None,
        routing: str = "soft_topk",
        eps: float | None = None,
        slack: float = 9 / 8,
        total: float = 1.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int = 0,
        eos_token_id: int = 1,
        **of_hugging_face: Any,
    ) -> None:
        _refuse_misspelt(of_hugging_face)
        self.vocab_size, self.dim, self.layers = vocab_size, dim, layers
        self.decoder_layers = layers if decoder_layers is None else decoder_layers
        self.light_heads, self.heavy_heads, self.heads = light_heads, heavy_heads, heads
        self.cross_kv_heads, self.head_dim = cross_kv_heads, head_dim
        self.light_dim, self.heavy_dim, self.hidden_dim = light_dim, heavy_dim, hidden_dim
        self.radius, self.buckets, self.max_distance = radius, buckets, max_distance
        self.m, self.q, self.v, self.one_router = m, q, v, one_router
        self.rotary, self.qk_norm = rotary, qk_norm
        self.light_kv_heads, self.heavy_kv_heads = light_kv_heads, heavy_kv_heads
        self.global_tokens, self.routing, self.eps = global_tokens, routing, eps
        self.slack, self.total = slack, total
        self.dropout, self.norm_eps, self.use_cache = dropout, norm_eps, use_cache
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            **{"is_encoder_decoder": True, "decoder_start_token_id": pad_token_id, **of_hugging_face},
        )

    @classmethod
    def base(cls, **changes: Any) -> CoLT5Config:
        """433 M parameters. ``changes`` are arguments of the class."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> CoLT5Config:
        """1463 M parameters."""
        sizes = {"dim": 1024, "layers": 24, "light_heads": 4, "heavy_heads": 12, "heads": 16}
        widths = {"light_dim": 1408, "heavy_dim": 11264, "hidden_dim": 2816}
        return cls(**{**sizes, **widths, **changes})

    @classmethod
    def xl(cls, **changes: Any) -> CoLT5Config:
        """5297 M parameters."""
        sizes = {"dim": 2048, "layers": 24, "light_heads": 8, "heavy_heads": 24, "heads": 32}
        widths = {"light_dim": 2560, "heavy_dim": 20480, "hidden_dim": 5120}
        return cls(**{**sizes, **widths, **changes})

    @classmethod
    def tiny(cls, **changes: Any) -> CoLT5Config:
        """Of bytes in ByT5's scheme, to be trained on a CPU: the paper's ratios at d = 128."""
        sizes = {"vocab_size": 384, "dim": 128, "layers": 4, "decoder_layers": 2, "head_dim": 32}
        widths = {"light_dim": 128, "heavy_dim": 1024, "hidden_dim": 256}
        return cls(**{**sizes, **widths, "light_heads": 1, "heavy_heads": 3, "heads": 4, **changes})

    @classmethod
    def note(cls, **changes: Any) -> CoLT5Config:
        """The source note's own form: weights are a softmax over the routed tokens, s_u(X) = Softmax(TopK(X u^T)), and both
        branches attend to a window and to a few global tokens, without any bias by distance. The sizes are Base's.
        """
        return cls(**{"routing": "softmax_topk", "slack": 1.0, "global_tokens": 1, **changes})

    def budgets(self) -> tuple[Budget, Budget, Budget]:
        """Those of feed-forward, queries, and keys and values."""
        m = _budget("m", self.m)
        q = m if self.q is None else _budget("q", self.q)
        if self.one_router:
            return m, q, q
        if self.v is not None:
            return m, q, _budget("v", self.v)
        return m, q, Budget(min(2 * m.fraction, 1.0), None if m.at_most is None else 2 * m.at_most)

    def new_routing(self) -> Routing:
        """A routing of its own for each router."""
        routing = ROUTINGS[self.routing]()
        if self.eps is not None and isinstance(routing, SoftTopK):
            return SoftTopK(eps=self.eps, solver=routing.solver)
        return routing

    def _check(self) -> None:
        sizes = ("vocab_size", "dim", "layers", "light_heads", "heavy_heads", "heads", "cross_kv_heads", "head_dim")
        for name in (*sizes, "decoder_layers", "light_dim", "heavy_dim", "hidden_dim", "radius"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(
                    f"CoLT5Config got {name}={getattr(self, name)!r}, expected a whole number of at least 1"
                )
        for name, of in (
            ("cross_kv_heads", "heads"),
            ("light_kv_heads", "light_heads"),
            ("heavy_kv_heads", "heavy_heads"),
        ):
            kv_heads, heads = getattr(self, name), getattr(self, of)
            if kv_heads is not None and (type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads):
                raise ValueError(f"CoLT5Config got {name}={kv_heads!r}, expected a divisor of {of}={heads}")
        if self.rotary is not None and (not self.rotary > 0 or self.head_dim % 2):
            raise ValueError(
                f"CoLT5Config got rotary={self.rotary} and head_dim={self.head_dim}, expected a base above 0 and an even head_dim"
            )
        others = (self.rotary, self.qk_norm or None, self.light_kv_heads, self.heavy_kv_heads)
        if self.global_tokens is not None and any(other is not None for other in others):
            raise ValueError(
                f"CoLT5Config got global_tokens={self.global_tokens}, whose attention has no rotary, qk_norm or kv_heads; "
                "leave these out"
            )
        if self.one_router and (self.v is not None or self.global_tokens is not None):
            raise ValueError(
                f"CoLT5Config got one_router=True with v={self.v} and global_tokens={self.global_tokens}, expected neither: the "
                "keys are the queries' tokens then; leave them out"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"CoLT5Config got routing={self.routing!r}, expected one of {', '.join(ROUTINGS)}")
        if self.eps is not None and not isinstance(ROUTINGS[self.routing](), SoftTopK):
            raise ValueError(
                f"CoLT5Config got eps={self.eps}, which routing={self.routing!r} does not have; leave it out"
            )
        if self.global_tokens is not None and self.global_tokens < 0:
            raise ValueError(f"CoLT5Config got global_tokens={self.global_tokens}, expected None, or 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"CoLT5Config got dropout={self.dropout}, expected 0 or more and less than 1")
        for name in ("slack", "norm_eps"):
            least = 1 if name == "slack" else 0
            if not getattr(self, name) >= least:
                raise ValueError(f"CoLT5Config got {name}={getattr(self, name)}, expected at least {least}")
        if not self.total > 0:
            raise ValueError(f"CoLT5Config got total={self.total}, expected a number above 0")
        self.budgets()
        self.new_routing()


def _budget(name: str, share: Share) -> Budget:
    """What :class:`Budget` says, of m, q or v."""
    given: Any = share if isinstance(share, (list, tuple)) and len(share) == 2 else (share, None)
    fraction, at_most = given
    if type(share) is int:
        fraction, at_most = 1.0, share
    try:
        if type(fraction) not in (int, float) or type(at_most) not in (int, type(None)):
            raise ValueError("of another kind")
        return Budget(fraction, at_most)
    except ValueError:
        raise ValueError(
            f"CoLT5Config got {name}={share!r}, expected a fraction of the length from 1e-6 to 1, a number of tokens of at least "
            "1, or a pair of both"
        ) from None


def _refuse_misspelt(given: dict[str, Any]) -> None:
    """Hugging Face keeps any argument as an attribute; one that almost has the name of ours is a mistake."""
    ours = [name for name in signature(CoLT5Config.__init__).parameters if name not in ("self", "of_hugging_face")]
    for name in given:
        near = get_close_matches(name, ours, 1, 0.8)
        if near and not hasattr(PretrainedConfig, name) and name not in PretrainedConfig().__dict__:
            raise ValueError(f"CoLT5Config has no argument {name!r}; did you mean {near[0]!r}?")
