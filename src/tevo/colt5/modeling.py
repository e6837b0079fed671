"""CoLT5 as Hugging Face models: an encoder of conditional layers, T5 v1.1's decoder with multi-query cross-attention.

    X <- X + Attn(RMSNorm(X)),   X <- X + FF(RMSNorm(X))                       encoder, conditional               (1)
    Y <- Y + Self(RMSNorm(Y)),   s_ij = q_i . k_j + B[bucket(j - i)], j <= i   decoder                            (2)
    Y <- Y + Cross(RMSNorm(Y), X),   s_ij = q_i . k_j,   k and v of one head   decoder                            (3)
    Y <- Y + FF(RMSNorm(Y)),   logits = RMSNorm(Y) W_V                         gated GELU, a head of its own      (4)

Scores are not scaled and nothing has a bias. Importing this module makes the Auto classes of transformers know it. State of
generation: the keys and values of (2), 2 h e a token and layer, and of (3), 2 e an input token and layer.
``with tevo.record()`` shows what the routers of each layer choose.

Source: CoLT5 (arXiv 2303.09752), section 3 and table 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple

from tevo.colt5.config import CoLT5Config, Share
from tevo.colt5.layers import (
    ConditionalAttention,
    ConditionalFeedForward,
    ConditionalLayer,
    GatedFeedForward,
    NormedTurn,
    RelativeBias,
)
from tevo.colt5.note import NoteAttention
from tevo.colt5.routers import Budget, Router
from tevo.contracts import Position
from tevo.functional.attention import attention
from tevo.mixers.softmax.multi_head import merge_heads, split_heads
from tevo.norms.rms_norm import RMSNorm
from tevo.positions.rope import RoPE
from tevo.taps import sealed, tap

__all__ = ["CoLT5EncoderModel", "CoLT5ForConditionalGeneration", "CoLT5Model", "CoLT5PreTrainedModel"]


class DecoderAttention(nn.Module):
    """Softmax attention without scale, of which the keys and values are made apart, so that they can be kept.

    Args:
        dim: width d.
        heads: number of heads h.
        kv_heads: heads g of keys and values, a divisor of ``heads``.
        head_dim: width e of a head.
    """

    def __init__(self, *, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's normals: standard deviation (d e)^-1/2 of queries, d^-1/2 of keys and values, (h e)^-1/2 of the output."""
        inner, d = self.q.weight.shape
        nn.init.normal_(self.q.weight, std=(d * inner / self.heads) ** -0.5)
        nn.init.normal_(self.kv.weight, std=d**-0.5)
        nn.init.normal_(self.out.weight, std=inner**-0.5)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (b, m, d) gives k, v (b, g, m, e)."""
        k, v = self.kv(x).chunk(2, -1)
        return split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
        """``x`` (b, n, d), k, v (b, g, m, e), ``allowed`` (#b, 1, #n, m), ``bias`` (1, h, n, m) give (b, n, d)."""
        q = split_heads(self.q(x), self.heads)
        if self.kv_heads == 1 and bias is None:
            # heads that share their keys are so many more queries: the keys are read once, and never repeated
            n = q.shape[2]
            o = attention(q.flatten(1, 2)[:, None], k, v, allowed=allowed, scale=1.0)  # b 1 hn e
            return self.out(merge_heads(o.squeeze(1).unflatten(1, (self.heads, n))))
        return self.out(merge_heads(attention(q, k, v, allowed=allowed, bias=bias, scale=1.0)))


class DecoderLayer(nn.Module):
    """Equations (2), (3) and the first half of (4)."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        d, e = config.dim, config.head_dim
        self.self_attention_norm = RMSNorm(dim=d, eps=config.norm_eps)
        self.self_attention = DecoderAttention(dim=d, heads=config.heads, kv_heads=config.heads, head_dim=e)
        self.cross_attention_norm = RMSNorm(dim=d, eps=config.norm_eps)
        self.cross_attention = DecoderAttention(dim=d, heads=config.heads, kv_heads=config.cross_kv_heads, head_dim=e)
        self.feed_forward_norm = RMSNorm(dim=d, eps=config.norm_eps)
        self.feed_forward = GatedFeedForward(dim=d, hidden_dim=config.hidden_dim, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        encoded: Tensor,
        encoded_mask: Tensor | None,
        bias: Tensor,
        allowed: Tensor,
        cache: EncoderDecoderCache | None,
        index: int,
    ) -> Tensor:
        """``x`` (b, n, d), ``encoded`` (b, m, d), its mask (b, 1, 1, m) give (b, n, d).

        ``bias`` (1, h, n, keys) and ``allowed`` (#b, 1, n, keys) are those of the decoder's own scores.
        """
        y = self.self_attention_norm(x)
        k, v = self.self_attention.keys_values(y)
        if cache is not None:
            k, v = cache.self_attention_cache.update(k, v, index)
        x = x + self.dropout(self.self_attention(y, k, v, allowed=allowed, bias=bias))
        y = self.cross_attention_norm(x)
        k, v = self._encoded_keys_values(encoded, cache, index)
        x = x + self.dropout(self.cross_attention(y, k, v, allowed=encoded_mask, bias=None))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def _encoded_keys_values(
        self, encoded: Tensor, cache: EncoderDecoderCache | None, index: int
    ) -> tuple[Tensor, Tensor]:
        if cache is None:
            return self.cross_attention.keys_values(encoded)
        if cache.is_updated.get(index):
            kept = cache.cross_attention_cache.layers[index]
            return kept.keys, kept.values
        k, v = cache.cross_attention_cache.update(*self.cross_attention.keys_values(encoded), index)
        cache.is_updated[index] = True
        return k, v


class Encoder(nn.Module):
    """Embedding, conditional layers, norm. The whole model has one embedding, and it is here."""

    main_input_name = "input_ids"
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.config = config
        buckets, most = config.buckets, config.max_distance
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        if config.global_tokens is None and config.rotary is None:
            self.light_bias = RelativeBias(heads=config.light_heads, buckets=buckets, max_distance=most)
            self.heavy_bias = RelativeBias(heads=config.heavy_heads, buckets=buckets, max_distance=most)
        self.layers = nn.ModuleList(self._layer() for _ in range(config.layers))
        self.norm = RMSNorm(dim=config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def _layer(self) -> ConditionalLayer:
        c = self.config
        m, q, v = (
            Router(dim=c.dim, budget=budget, routing=c.new_routing(), slack=c.slack, total=c.total)
            for budget in c.budgets()
        )
        v = q if c.one_router else v
        feed_forward = ConditionalFeedForward(
            dim=c.dim, light_dim=c.light_dim, heavy_dim=c.heavy_dim, router=m, dropout=c.dropout
        )
        return ConditionalLayer(
            dim=c.dim, attention=self._attention(q, v), feed_forward=feed_forward, eps=c.norm_eps, dropout=c.dropout
        )

    def _attention(self, q: Router, v: Router) -> ConditionalAttention:
        c = self.config
        if c.global_tokens is not None:
            # is called in the same way
            return NoteAttention(  # type: ignore[return-value]
                dim=c.dim,
                light_heads=c.light_heads,
                heavy_heads=c.heavy_heads,
                head_dim=c.head_dim,
                radius=c.radius,
                global_tokens=c.global_tokens,
                q_router=q,
                kv_router=v,
            )
        tables = (None, None) if c.rotary is not None else (self.light_bias, self.heavy_bias)
        made = ConditionalAttention(
            dim=c.dim,
            light_heads=c.light_heads,
            heavy_heads=c.heavy_heads,
            head_dim=c.head_dim,
            radius=c.radius,
            q_router=q,
            kv_router=v,
            light_bias=tables[0],
            heavy_bias=tables[1],
            light_kv_heads=c.light_kv_heads,
            heavy_kv_heads=c.heavy_kv_heads,
            light_turn=_turn(c),
            heavy_turn=_turn(c),
        )
        for branch, table in zip((made.light, made.heavy), tables, strict=True):
            # the tables are the encoder's, so that a checkpoint has them once, whatever the number of layers
            del branch.bias
            object.__setattr__(branch, "bias", table)
        if c.one_router:
            # for the same reason
            del made.kv_router
            object.__setattr__(made, "kv_router", q)
        return made

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Tokens give (b, n, d), zeros at padding.

        Args:
            input_ids: (b, n).
            attention_mask: (b, n), not zero = real token.
            inputs_embeds: (b, n, d) in place of ``input_ids``.
            forced: (b, n) bool, True = take the heavy branches of all layers (questions, headings).
            forbidden: (b, n) bool, True = never take them (boilerplate).
            output_hidden_states: whether to return the inputs of all layers and the output too.
            output_attentions: weights are never made; refused.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: inputs that do not fit together, float16, or attentions asked for.
        """
        _refuse_attentions(output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("CoLT5's encoder needs exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(
                f"CoLT5's encoder got {_shapes(input_ids=input_ids, inputs_embeds=inputs_embeds)}, expected input_ids (b, n) or "
                f"inputs_embeds (b, n, {self.config.dim})"
            )
        _refuse_float16(x)
        mask = _tokens_mask("attention_mask", attention_mask, x)
        x = self.dropout(x)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # the inputs of all layers would be most of what a long text needs
        states: list[Tensor] = []
        for layer in self.layers:
            states += [x] if keep else []
            x = self._run(layer, x, mask, forced, forbidden)
        x = self.dropout(self.norm(x))
        out = BaseModelOutput(last_hidden_state=x, hidden_states=(*states, x) if keep else None)
        return out if return_dict is None or return_dict else out.to_tuple()

    def _run(
        self, layer: nn.Module, x: Tensor, mask: Tensor | None, forced: Tensor | None, forbidden: Tensor | None
    ) -> Tensor:
        if not (self.gradient_checkpointing and self.training):
            return layer(x, mask=mask, forced=forced, forbidden=forbidden)

        def inner(x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
            # computed twice, but seen once
            with sealed() as seen:
                return layer(x, mask=mask, forced=forced, forbidden=forbidden), seen

        y, seen = self._gradient_checkpointing_func(inner, x)
        for name, values in seen.items():
            for value in values:
                tap(name, value)
        return y


def _turn(config: CoLT5Config) -> Position | None:
    """What is done to queries and keys of one branch of a layer."""
    rotary = None if config.rotary is None else RoPE(base=config.rotary)
    return NormedTurn(head_dim=config.head_dim, eps=config.norm_eps, then=rotary) if config.qk_norm else rotary


class Decoder(nn.Module):
    """Layers and norm over embedded tokens."""

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.config = config
        self.bias = RelativeBias(
            heads=config.heads, buckets=config.buckets, max_distance=config.max_distance, bidirectional=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = RMSNorm(dim=config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        encoded: Tensor,
        *,
        attention_mask: Tensor | None,
        encoder_attention_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``x`` (b, n, d) and ``encoded`` (b, m, d) give (b, n, d), and the inputs of all layers.

        Args:
            x: embedded tokens, those after the ones in the cache.
            encoded: the encoder's output.
            attention_mask: (b, tokens in the cache + n), not zero = real token.
            encoder_attention_mask: (b, m), not zero = real token.
            cache: of earlier tokens; it is added to.
        """
        mask = _tokens_mask("attention_mask", encoder_attention_mask, encoded)
        mask = None if mask is None else mask[:, None, None]  # b 1 1 m
        bias, allowed = self._sight(x, attention_mask, cache)
        x, states = self.dropout(x), []
        for i, layer in enumerate(self.layers):
            states.append(x)
            if self.gradient_checkpointing and self.training:
                # tensors one by one: those inside a tuple would get no gradient where backward is re-entrant
                x = self._gradient_checkpointing_func(layer, x, encoded, mask, bias, allowed, None, i)
            else:
                x = layer(x, encoded, mask, bias, allowed, cache, i)
        return self.dropout(self.norm(x)), tuple(states)

    def _sight(
        self, x: Tensor, attention_mask: Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        """Addend (1, h, n, keys) and permission (#b, 1, n, keys) of the decoder's own scores, the same in all layers."""
        b, n, _ = x.shape
        past: Any = 0 if cache is None else cache.get_seq_length()
        # a cache of fixed size has places to come, and counts in place
        kept: Any = () if cache is None else cache.self_attention_cache.layers
        fixed = getattr(kept[0], "max_cache_len", None) if len(kept) else None
        past = past.clone() if isinstance(past, Tensor) else past
        keys: int = past + n if fixed is None else fixed
        q_at = torch.arange(n, device=x.device)[None] + past  # 1 n
        k_at = torch.arange(keys, device=x.device)[None]  # 1 keys
        allowed = (k_at[:, None, :] <= q_at[:, :, None])[:, None]  # 1 1 n keys
        if attention_mask is not None and attention_mask.ndim == 4:
            # generation with a cache of fixed size makes the whole mask, as bool or as an addend
            real = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            allowed = allowed & real
        elif attention_mask is not None:
            if attention_mask.shape[0] != b or (fixed is None and attention_mask.shape[1] != keys):
                raise ValueError(
                    f"CoLT5 got decoder_attention_mask of shape {tuple(attention_mask.shape)}, expected {(b, keys)}, with the "
                    "tokens in the cache before the new ones"
                )
            real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]))
            allowed = allowed & real[:, None, None]
        return self.bias(q_at, k_at).to(x.dtype), allowed


class CoLT5PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all CoLT5 models share: initial weights, and the budgets of routed tokens."""

    config_class = CoLT5Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ConditionalLayer", "DecoderLayer")
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """T5's: embeddings N(0, 1), all else N(0, 1 / fan-in), tables N(0, 1 / d), norms 1; routers N(0, 1 / d)."""
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, RelativeBias):
            nn.init.normal_(module.table, std=self.config.dim**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=self.config.dim**-0.5)
        elif type(module).__module__.startswith("tevo.") and callable(reset):
            reset()

    def get_input_embeddings(self) -> nn.Embedding:
        """The one embedding, of encoder and decoder."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.encoder.embed_tokens = value

    def set_routed(self, *, m: Share, q: Share | None = None, v: Share | None = None) -> None:
        """Route another share of the tokens from now on; what they mean is told by :class:`CoLT5Config`."""
        changed = CoLT5Config(m=m, q=q, v=v, one_router=self.config.one_router).budgets()
        self.config.m, self.config.q, self.config.v = m, q, v
        for layer in self.encoder.layers:
            layer.feed_forward.router.budget, layer.attention.q_router.budget, layer.attention.kv_router.budget = (
                changed
            )

    @property
    def budgets(self) -> tuple[Budget, Budget, Budget]:
        """Those of feed-forward, queries, and keys and values."""
        return self.config.budgets()


class CoLT5EncoderModel(CoLT5PreTrainedModel):
    """The encoder alone, of a checkpoint of any of the classes."""

    _keys_to_ignore_on_load_unexpected = (r"^decoder\.", r"^lm_head\.")

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """As :class:`Encoder`; ``return_dict`` too."""
        return self.encoder(
            input_ids, attention_mask, inputs_embeds, forced, forbidden, output_hidden_states, output_attentions
        )


class _Seq2Seq(CoLT5PreTrainedModel):
    """Encoder and decoder."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _both(
        self,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None,
        past_key_values: EncoderDecoderCache | None,
        inputs_embeds: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        forced: Tensor | None,
        forbidden: Tensor | None,
        use_cache: bool,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> Seq2SeqModelOutput:
        _refuse_attentions(output_attentions)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, forced, forbidden, output_hidden_states
            )
        encoded = BaseModelOutput(*encoder_outputs) if isinstance(encoder_outputs, tuple) else encoder_outputs
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("CoLT5's decoder needs exactly one of decoder_input_ids, decoder_inputs_embeds and labels")
        x = decoder_inputs_embeds
        if x is None:
            x = self.encoder.embed_tokens(decoder_input_ids)
        if x.ndim != 3 or len(x) != len(encoded.last_hidden_state):
            given = _shapes(decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds)
            rows = len(encoded.last_hidden_state)
            raise ValueError(f"CoLT5's decoder got {given} for {rows} encoded rows, expected as many rows")
        # recomputed layers would add to the cache twice
        cached = use_cache and not (self.decoder.gradient_checkpointing and self.training)
        if not cached:
            past_key_values = None
        elif past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        y, states = self.decoder(
            x,
            encoded.last_hidden_state,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=attention_mask,
            cache=past_key_values,
        )
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return Seq2SeqModelOutput(
            last_hidden_state=y,
            past_key_values=past_key_values,
            decoder_hidden_states=(*states, y) if keep else None,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
        )


class CoLT5Model(_Seq2Seq):
    """Encoder and decoder without a head."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """As :class:`CoLT5ForConditionalGeneration`, but for labels; gives the decoder's output (b, n, d)."""
        return self._both(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            forced=forced,
            forbidden=forbidden,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )


class CoLT5ForConditionalGeneration(_Seq2Seq, GenerationMixin):  # type: ignore[misc]
    """Encoder, decoder and a head: text to text."""

    _tied_weights_keys = {"lm_head.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012 (read as a plain dictionary)
    # the trainer then tells how many labels the whole batch of accumulated steps has
    accepts_loss_kwargs = True

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace it."""
        self.lm_head = value

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels (b, n) one to the right, behind the token that begins sequences; -100 becomes padding."""
        begun = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return begun.masked_fill(begun == -100, self.config.pad_token_id)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Seq2SeqLMOutput:
        """Tokens give logits (b, n, V), and with labels a loss.

        Args:
            input_ids: (b, m), of the encoder.
            attention_mask: (b, m), not zero = real token.
            decoder_input_ids: (b, n); by default those of ``labels``.
            decoder_attention_mask: (b, n), with the tokens in the cache before them; not zero = real token.
            encoder_outputs: of an earlier call.
            past_key_values: of an earlier call; it is added to.
            inputs_embeds: (b, m, d) in place of ``input_ids``.
            decoder_inputs_embeds: (b, n, d) in place of ``decoder_input_ids``.
            labels: (b, n), -100 = not counted.
            forced: (b, m) bool, True = take the heavy branches of the encoder.
            forbidden: (b, m) bool, True = never take them.
            use_cache: whether to return keys and values; by default where there are no labels.
            output_hidden_states: whether to return the inputs of all layers too.
            output_attentions: weights are never made; refused.
            num_items_in_batch: labels that the loss is a mean over; by default those of this call.

        Returns:
            With the loss in nats a label; ``return_dict=False`` gives a plain tuple.

        Raises:
            ValueError: inputs that do not fit together, float16, or attentions asked for.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        out = self._both(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            forced=forced,
            forbidden=forbidden,
            use_cache=self.config.use_cache and labels is None if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        y = out.last_hidden_state
        if self.config.tie_word_embeddings:
            # an embedding of unit variance is sqrt(d) times as wide as a head
            y = y * self.config.dim**-0.5
        logits = self.lm_head(y)
        return Seq2SeqLMOutput(
            loss=None if labels is None else _loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.decoder_hidden_states,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            encoder_hidden_states=out.encoder_hidden_states,
        )


def _loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy of (b, n, V) and labels (b, n), in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    if items is None:
        return F.cross_entropy(wide, labels.flatten())
    return F.cross_entropy(wide, labels.flatten(), reduction="sum") / items


def _tokens_mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Hugging Face's mask of ``x`` (b, n, d) as bool (b, n)."""
    if mask is None:
        return None
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"CoLT5 got {name} of shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}, not zero for real tokens"
        )
    return mask.bool()


def _shapes(**tensors: Tensor | None) -> str:
    return ", ".join(f"{name} of shape {tuple(x.shape)}" for name, x in tensors.items() if x is not None)


def _refuse_attentions(wanted: bool | None) -> None:
    if wanted:
        raise ValueError(
            "CoLT5 got output_attentions=True, but its kernels make no weights; with tevo.record() shows what is routed"
        )


def _refuse_float16(x: Tensor) -> None:
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    lowered = autocast and torch.get_autocast_dtype(kind) == torch.float16
    if x.dtype == torch.float16 or lowered:
        raise ValueError("CoLT5 got float16, in which activations of the T5 family overflow; use bfloat16 or float32")


AutoConfig.register("colt5", CoLT5Config, exist_ok=True)
AutoModel.register(CoLT5Config, CoLT5Model, exist_ok=True)
AutoModelForSeq2SeqLM.register(CoLT5Config, CoLT5ForConditionalGeneration, exist_ok=True)
