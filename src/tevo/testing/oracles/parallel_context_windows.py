"""Parallel context windows as one pass with an explicit mask and positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# constructor arguments at which one context gives the model alone
PLAIN: dict[str, object] = {}


def reference(part: nn.Module, contexts: Sequence[Tensor], task: Tensor) -> Tensor:
    """Next-token probabilities (b, n, V) at ``task`` (b, n) after ``contexts`` (b, C_i)."""
    rows = [_row(part.model, [c[b] for c in contexts], task[b], part.right) for b in range(len(task))]
    return torch.stack(rows).softmax(-1)


def _row(model: nn.Module, windows: Sequence[Tensor], task: Tensor, right: bool) -> Tensor:
    """Logits (n, V) of one row: all windows and the task in one pass."""
    longest = max(len(window) for window in windows)
    tokens, places, owner = [], [], []
    # of windows of equal length the first comes first
    for rank, window in enumerate(sorted(windows, key=lambda w: -len(w))):
        for t, token in enumerate(window.tolist()):
            # all first tokens but one are there for their own window only
            tokens.append(token)
            places.append(t + (longest - len(window) if right else 0))
            owner.append((rank, t))
    for t, token in enumerate(task.tolist()):
        tokens.append(token)
        places.append(longest + t)
        owner.append((-1, t))
    n = len(tokens)
    attend = torch.zeros(n, n, dtype=torch.bool)
    for i, (own, t) in enumerate(owner):
        for j, (other, s) in enumerate(owner):
            if own == other:
                attend[i, j] = s <= t
            elif own == -1:
                attend[i, j] = s > 0 or other == 0
    x, at = model.embedding(torch.tensor([tokens])), torch.tensor([places])
    if model.encoder.position is not None:
        x = model.encoder.position.embed(x, at)
    for block in model.encoder.blocks:
        x = _block(block, x, at, attend[None])
    return model.head(x)[0, n - len(task) :]


def _block(block: nn.Module, x: Tensor, at: Tensor, attend: Tensor) -> Tensor:
    """A pre-norm block whose attention sees what ``attend`` says."""
    causal, block.mixer.causal = block.mixer.causal, False
    x = x + block.mixer(block.residual.norms[0](x), at=at, attend=attend)
    block.mixer.causal = causal
    x = x + block.channel(block.residual.norms[1](x))
    return x if block.residual.final is None else block.residual.final(x)


class TanhGELU(nn.Module):
    """The feed-forward of GPT-2."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(..., d) gives (..., d)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The released joining of caches around the package transformers' GPT-2: caches, logits, one greedy step."""
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention
    from tevo.models.causal_lm import CausalLM

    mixers = [SoftmaxAttention(dim=12, heads=MultiHead(dim=12, heads=3, bias=True), causal=True) for _ in range(2)]
    model = CausalLM(
        vocab=19, dim=12, depth=2, heads=3, mixer=mixers, channel=TanhGELU, position="learned", length=24, tied=True
    )
    model = model.double().eval()
    own = "w.transformer."
    with torch.no_grad():
        model.embedding.weight.copy_(arrays[f"{own}wte.weight"])
        model.encoder.position.table.copy_(arrays[f"{own}wpe.weight"])
        for i, block in enumerate(model.encoder.blocks):
            heads, layer = block.mixer.heads, f"{own}h.{i}."
            norms = [(norm, f"ln_{j + 1}") for j, norm in enumerate(block.residual.norms)]
            for module, name in (
                (heads.out, "attn.c_proj"),
                (block.channel.into, "mlp.c_fc"),
                (block.channel.out, "mlp.c_proj"),
                *norms,
            ):
                weight = arrays[f"{layer}{name}.weight"]
                module.weight.copy_(weight.T if weight.ndim == 2 else weight)
                module.bias.copy_(arrays[f"{layer}{name}.bias"])
            for part in ("weight", "bias"):
                q, kv = arrays[f"{layer}attn.c_attn.{part}"].split([12, 24], -1)
                getattr(heads.q, part).copy_(q if part == "bias" else q.T)
                getattr(heads.kv, part).copy_(kv if part == "bias" else kv.T)
        final = model.encoder.blocks[-1].residual.final
        final.weight.copy_(arrays[f"{own}ln_f.weight"])
        final.bias.copy_(arrays[f"{own}ln_f.bias"])
        windows = [arrays[f"in.window{i}"] for i in range(3)]
        for case in ("left", "right"):
            reader = system.ParallelContextWindows(model=model, right=case == "right")
            state = reader.start(windows)
            for i, (cache, _) in enumerate(state[1]):
                for name, ours in zip("kv", cache[:2], strict=True):
                    yield f"{case}.cache.{name}{i}", ours, arrays[f"{case}.cache.{name}{i}"], 1e-10
            count = state[0].clone()
            places = count[:, None] + torch.arange(6)[None]
            theirs = arrays[f"{case}.out.task_position_ids"]
            yield f"{case}.out.task_position_ids", places.double(), theirs.double(), 0.0
            logits, state = reader.step(arrays["in.task"], state)
            yield f"{case}.out.logits", logits, arrays[f"{case}.out.logits"], 1e-10
            token = logits[:, -1].argmax(-1, keepdim=True)
            yield f"{case}.out.step1_token", token.double(), arrays[f"{case}.out.step1_token"].double(), 0.0
            logits, _ = reader.step(token, state)
            yield f"{case}.out.step1_logits", logits, arrays[f"{case}.out.step1_logits"], 1e-10
