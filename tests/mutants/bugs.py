"""Planted bugs: mistakes that people make, each as a change of one piece of source and the check that must see it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from tests.mutants.planting import Failure, caught

from tevo.catalogue.rows import PACKAGE


@dataclass(frozen=True)
class Bug:
    """``old`` (which occurs once in the file) is replaced by ``new``; ``check`` of ``system`` must fail."""

    kind: str
    system: str
    file: str
    old: str
    new: str
    check: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.system}: {self.kind}"


SOFTMAX, MULTI_HEAD = "mixers/softmax/softmax.py", "mixers/softmax/multi_head.py"
CORE, MASKS = "functional/attention.py", "functional/masks.py"
LINEAR, LINEAR_CORE = "mixers/linear/linear_attention.py", "functional/linear_attention.py"
AFT, RWKV, LRU = "mixers/linear/aft.py", "blocks/rwkv.py", "mixers/recurrent/lru.py"

BUGS = (
    # masks and causality
    Bug("causal mask one too far right", "explicit_sparse_attention", MASKS, ".tril(m - n)", ".tril(m - n + 1)", "causal"),
    Bug("causal mask hides the token itself", "qk_norm", MASKS, ".tril(m - n)", ".tril(m - n - 1)", "exact_state"),
    Bug("causal mask aligned top-left", "rope", CORE, ".tril(m - n)", ".tril()", "exact_state"),
    Bug("causal mask aligned top-left in cross use", "softmax", CORE, ".tril(m - n)", ".tril()", "oracle"),
    Bug("causal forgotten beside a bias", "alibi", CORE, "if causal and not fused_causal and n > 1:", "if False:", "causal"),
    Bug("mask and triangle joined by or", "alibi", CORE, "allowed & triangle", "allowed | triangle", "padding"),
    Bug("padding not blanked, NaN times zero", "softmax", MASKS, "x.masked_fill(~mask[..., None], 0.0)", "x", "padding"),
    Bug("mask inverted", "softmax", SOFTMAX, "else mask[:, None, None, :]", "else ~mask[:, None, None, :]", "padding"),
    Bug("mask of batch row 0 for all", "softmax", SOFTMAX, "else mask[:, None, None, :]",
        "else mask[:1, None, None, :]", "oracle"),
    Bug("mask ignored", "multi_head", SOFTMAX, "else mask[:, None, None, :]", "else None", "padding"),
    Bug("masked by a small number only", "explicit_sparse_attention", CORE,
        "weights.masked_fill(~allowed, 0.0)", "weights", "no_allowed_key"),
    Bug("running maximum over the future", "aft", AFT, "if _narrow(w, k):", "if True:", "nan_contained"),
    Bug("future keys in the same block", "aft", AFT, ".triu(1)", ".triu(2)", "causal"),
    Bug("strictly earlier keys only", "linear_attention", LINEAR_CORE, "scores = scores.tril()",
        "scores = scores.tril(-1)", "exact_state"),
    Bug("chunk sees its own future", "linear_attention", LINEAR_CORE, "scores = scores.tril()",
        "scores = scores.tril(1)", "causal"),
    Bug("convolution wraps round", "hyena", "functional/fft_conv.py", "size = _fast_size(n + max(h.shape[1] - 1, ahead))",
        "size = _fast_size(n)", "causal"),
    Bug("short convolution centred", "hyena", "functional/fft_conv.py", "x = torch.cat([state, u], 1)",
        "x = torch.cat([state[:, 1:], u, u[:, -1:]], 1) if reach else u", "causal"),
    Bug("taps not flipped", "hyena", "functional/fft_conv.py", "h.flip(-1)[:, None]", "h[:, None]", "oracle"),
    Bug("window one token too narrow", "longt5", "functional/local_attention.py", "r = min(radius, n - 1)",
        "r = min(radius, n - 1) - (radius > 1)", "oracle"),
    Bug("token shift by none", "rwkv", RWKV, "x], 1)[:, :-1]", "x], 1)[:, 1:]", "oracle"),
    # scales, axes, shapes
    Bug("missing scale", "explicit_sparse_attention", CORE, "q.shape[-1] ** -0.5 if scale is None else scale",
        "1.0 if scale is None else scale", "scores"),
    Bug("scaled by the width of the model", "kerple", CORE, "q.shape[-1] ** -0.5 if scale is None",
        "(q.shape[1] * q.shape[-1]) ** -0.5 if scale is None", "exact_state"),
    Bug("softmax over queries", "qk_norm", CORE, "return s.softmax(-1)", "return s.softmax(-2)", "oracle"),
    Bug("heads merged in the wrong order", "multi_head", MULTI_HEAD, "o.transpose(1, 2).flatten(-2)",
        "o.permute(0, 2, 3, 1).flatten(-2)", "oracle"),
    Bug("heads split across tokens", "linear_attention", MULTI_HEAD, "x.unflatten(-1, (heads, -1)).transpose(1, 2)",
        "x.reshape(x.shape[0], heads, x.shape[1], -1)", "causal"),
    Bug("keys and values exchanged", "multi_query_attention", "mixers/softmax/multi_query_attention.py",
        "k, v = self.kv(context).chunk(2, dim=-1)", "v, k = self.kv(context).chunk(2, dim=-1)", "oracle"),
    Bug("heads assigned to the wrong group", "multi_query_attention", CORE, "k.repeat_interleave(h // g, dim=1)",
        "k.repeat(1, h // g, 1, 1)", "written_out_weights"),
    Bug("lost bias of the projections", "multi_head", MULTI_HEAD, "nn.functional.linear(x, weight, bias)",
        "nn.functional.linear(x, weight)", "every_parameter_gets_a_gradient"),
    Bug("bias of the first row for all", "transformer_xl", "positions/transformer_xl.py",
        "content = self.u[:, None] @ spread(k, h).mT", "content = self.u[:, None] @ spread(k[:1], h).mT",
        "batch_consistency"),
    Bug("float32 cast inside", "linear_attention", LINEAR, "x = x.to(torch.promote_types(x.dtype, torch.float32))",
        "x = x.to(torch.float32)", "oracle"),
    Bug("float32 cast that is cast back", "rope", "positions/rope.py",
        "wide = torch.promote_types(x.dtype, torch.float32)\n    theta", "wide = torch.float32\n    theta", "oracle"),
    Bug("denominator detached", "linear_attention", LINEAR, "(y[..., -1:] + eps)", "(y[..., -1:].detach() + eps)", "oracle"),
    Bug("threshold's gradient cut through the scores", "explicit_sparse_attention",
        "mixers/softmax/explicit_sparse_attention.py", "return softmax_weights(s, kept",
        "return softmax_weights(s.detach(), kept", "oracle"),
    Bug("columns' terms without gradient", "sinkformer", "mixers/softmax/sinkformer.py",
        "g = g.detach() if detach else g", "g = g.detach()", "oracle"),
    Bug("epsilon forgotten", "linear_attention", LINEAR, "(y[..., -1:] + eps)", "y[..., -1:]", "oracle"),
    Bug("wrong broadcast of the batch's masks", "linear_attention", LINEAR, "~mask[:, None, :, None]",
        "~mask[:1, None, :, None]", "oracle"),
    Bug("features that can be negative", "linear_attention", LINEAR, "x.relu() + x.clamp(max=0).exp()", "x + 1", "oracle"),
    Bug("in-place change of the input", "fnet", "mixers/spectral/fnet.py", "y = fourier_mix(x)",
        "y = fourier_mix(x.mul_(1.0).add_(0.5) if not x.requires_grad else x)", "shape_and_dtype"),
    Bug("Fourier rest not reversed along tokens", "fnet", "mixers/spectral/fnet.py", "rest[..., 1:, :].flip(-2)",
        "rest[..., 1:, :]", "oracle"),
    # state
    Bug("state of a step not carried on", "linear_attention", LINEAR, "return self.heads.merge(y.to(x.dtype)), (S,)",
        "return self.heads.merge(y.to(x.dtype)), (state[0],)", "exact_state"),
    Bug("state starts at one", "lru", LRU, "return (self.D.new_zeros(batch", "return (self.D.new_ones(batch", "exact_state"),
    Bug("state of a pass kept for the next", "rwkv", RWKV,
        "return self.step(x, self.init_state(x.shape[0]), mask=mask, at=at)[0]",
        "self._kept = getattr(self, '_kept', None) or self.init_state(x.shape[0])\n"
        "        y, self._kept = self.step(x, self._kept, mask=mask, at=at)\n        return y", "deterministic"),
    Bug("positions restart at each step", "rope", SOFTMAX, "positions_of(mask, n, seen[:, :past].sum(1), device=x.device)",
        "positions_of(mask, n, device=x.device)", "exact_state"),
    Bug("ALiBi of zero while decoding", "alibi", "positions/alibi.py", "return -(slopes * distance).to(q.dtype)",
        "return -(slopes * distance * (q.shape[2] > 1)).to(q.dtype)", "exact_state"),
    Bug("keys turned twice while decoding", "rope", SOFTMAX, "turn_keys=not cache_turned", "turn_keys=True", "exact_state"),
    Bug("padding counted as tokens while decoding", "rope", SOFTMAX, "seen[:, :past].sum(1)", "count", "padded_continuation"),
    Bug("cache doubles over its entries", "softmax", "functional/cache.py", "cache.narrow(dim, past, n).copy_(new)",
        "cache.narrow(dim, max(past - 1, 0), n).copy_(new)", "exact_state"),
    Bug("padding moves the recurrence", "lru", LRU, "a = lam if keep is None else torch.where(keep[..., None], lam, 1.0)",
        "a = lam if keep is None else lam.expand(*keep.shape, -1)", "padded_continuation"),
    Bug("padding writes into the fast weights", "delta_net", "mixers/linear/delta_net.py",
        "beta = beta.masked_fill(~mask[:, None], 0.0)", "pass", "padded_continuation"),
    Bug("decay forgotten under padding", "rwkv", RWKV, "top = top + (n - count)[:, None] * w.detach()", "pass", "padded_prefill"),
    Bug("segment memory that grows for ever", "transformer_xl", SOFTMAX, "slice(max(0, both.shape[1] - self.memory), None)",
        "slice(None)", "official"),
    # positions
    Bug("relative bias with its sign turned", "t5_bias", "positions/t5_bias.py",
        "offset = k_at[:, None, :] - q_at[:, :, None]", "offset = q_at[:, :, None] - k_at[:, None, :]", "oracle"),
    Bug("buckets one too late", "t5_bias", "positions/t5_bias.py", "far = exact + (ratio", "far = exact + 1 + (ratio", "oracle"),
    Bug("scale not undone", "t5_bias", "positions/t5_bias.py", "return q * q.shape[-1] ** 0.5, k", "return q, k", "oracle"),
    Bug("slopes of all heads equal", "alibi", "positions/alibi.py", "-8 * (h + 1) / lower", "-8 / lower", "oracle"),
    Bug("slopes start at one", "alibi", "positions/alibi.py", "-8 * (h + 1) / lower", "-8 * h / lower", "oracle"),
    Bug("positions are ignored", "rope", "positions/rope.py", "angle = at[:, None, :, None].to(wide) * theta",
        "angle = 0 * at[:, None, :, None].to(wide) * theta", "position_matters"),
    Bug("absolute positions in a relative part", "kerple", "positions/kerple.py",
        "(q_at[:, :, None] - k_at[:, None, :]).abs()[:, None]", "(q_at[:, :, None] + 0 * k_at[:, None, :])[:, None]",
        "oracle"),
    Bug("absolute slopes in a relative part", "alibi", "positions/alibi.py",
        "(q_at[:, :, None] - k_at[:, None, :]).abs()[:, None]", "(0 * q_at[:, :, None] + k_at[:, None, :]).square()[:, None]",
        "shift_invariant"),
    Bug("wavelengths from the full width", "rope", "positions/rope.py", "dtype=wide) / half)",
        "dtype=wide) / (2 * half))", "oracle"),
    Bug("bias added after the scale", "transformer_xl", "positions/transformer_xl.py", "(content + place) * e**-0.5",
        "content * e**-0.5 + place", "oracle"),
    # wiring and channels
    Bug("double residual", "pre_norm", "residuals/pre_norm.py", "x = x + sublayer(norm(x))",
        "x = x + x + sublayer(norm(x))", "oracle"),
    Bug("post-norm wired as pre-norm", "post_norm", "residuals/post_norm.py", "x = norm(x + sublayer(x))",
        "x = x + sublayer(norm(x))", "oracle"),
    Bug("norm shared by the sublayers", "pre_norm", "residuals/pre_norm.py", "x = x + sublayer(norm(x))",
        "x = x + sublayer(self.norms[0](x))", "every_parameter_gets_a_gradient"),
    Bug("skip from the sublayer before", "b2t_connection", "residuals/b2t_connection.py",
        "a = norm(x + y if s == last else y)", "a = norm(a + y if s == last else y)", "oracle"),
    Bug("alpha without effect at the start", "rezero", "residuals/rezero.py", "x = x + alpha * sublayer(x)",
        "x = x + (1 + alpha) * sublayer(x)", "identity_at_start"),
    Bug("gate and value exchanged", "glu_variants", "channels/glu_variants.py", "w, v = self.into(x).chunk(2, dim=-1)",
        "v, w = self.into(x).chunk(2, dim=-1)", "oracle"),
    Bug("tanh form of the gate", "glu_variants", "channels/glu_variants.py", "return F.gelu(z)",
        'return F.gelu(z, approximate="tanh")', "oracle"),
    Bug("norm over tokens", "feed_forward", "channels/feed_forward.py", "return self.out(F.relu(self.into(x)))",
        "return self.out(F.relu(self.into(x - x.mean(1, keepdim=True))))", "token_wise"),
    Bug("noise in evaluation", "feed_forward", "channels/feed_forward.py", "return self.out(F.relu(self.into(x)))",
        "return self.out(F.relu(F.dropout(self.into(x), 0.1)))", "deterministic"),
    Bug("slots numbered by the wrong half", "product_key_memory", "channels/product_key_memory.py",
        "place[:, :, 0, :, None] * keys + place[:, :, 1, None, :]", "place[:, :, 1, None, :] * keys + place[:, :, 0, :, None]",
        "oracle"),
    Bug("mean of squares over the batch", "rms_norm", "functional/norms.py", "return F.rms_norm(x, weight.shape, weight, eps)",
        "return x * (x.square().mean() + eps).rsqrt() * weight", "batch_consistency"),
    Bug("a lost head", "multi_head", MULTI_HEAD, "return self.out(merge_heads(o))",
        "return self.out(merge_heads(o * (torch.arange(o.shape[1]) < o.shape[1] - 1)[:, None, None] if o.shape[1] > 1 else o))",
        "oracle"),
    Bug("quadratic where linear is declared", "linear_attention", LINEAR,
        "y = causal_read(q, k, v, self.eps) if self.causal else read(q, summarise(k, v), self.eps)",
        "a = (q @ k.mT).tril() if self.causal else q @ k.mT\n"
        "        y = (a @ v) / (a.sum(-1, keepdim=True) + self.eps)", "flops"),
)  # fmt: skip


def plant(bug: Bug) -> tuple[ast.Module, ast.Module]:
    """The original and the changed tree of a bug's file."""
    text = (PACKAGE / bug.file).read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.old!r} occurs {text.count(bug.old)} times in {bug.file}, expected once")
    return ast.parse(text), ast.parse(text.replace(bug.old, bug.new))


def seen(bug: Bug, *, by_any: bool = False) -> Failure | None:
    """The check that sees the bug (the one it names, or any), None if it goes unseen."""
    return caught(
        bug.system, PACKAGE / bug.file, plant(bug), (lambda name: True) if by_any else (lambda name: name == bug.check)
    )
