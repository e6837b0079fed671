"""ELECTRA's loss, row by row: both encoders written out over the real tokens of a row, one position at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean()
    return z / (z.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def _encode(body: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """BERT's blocks over the vectors of one row."""
    if body.widen is not None:
        xs = [_linear(body.widen, x) for x in xs]
    for block in body.encoder.blocks:
        heads, (first, second) = block.mixer.heads, block.residual.norms
        q = [_linear(heads.q, x) for x in xs]
        kv = [_linear(heads.kv, x) for x in xs]
        d = len(q[0])
        e = d // heads.heads
        after = []
        for i, x in enumerate(xs):
            parts = []
            for h in range(heads.heads):
                own = slice(h * e, (h + 1) * e)
                power = [(q[i][own] @ pair[:d][own] / math.sqrt(e)).exp() for pair in kv]
                parts.append(sum(w * pair[d:][own] for w, pair in zip(power, kv, strict=True)) / sum(power))
            y = _norm(first, x + _linear(heads.out, torch.cat(parts)))
            after.append(_norm(second, y + _linear(block.channel.out, _gelu(_linear(block.channel.into, y)))))
        xs = after
    return xs


def _embed(model: nn.Module, ids: list[int]) -> list[Tensor]:
    table = model.embeddings
    return [
        _norm(table.norm, table.word.weight[token] + table.place.weight[i] + table.segment.weight[0])
        for i, token in enumerate(ids)
    ]


def reference(objective: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Equations (1) to (4), with sums over rows and one division at the end."""
    nats, bits = [], []
    for b in range(len(batch["tokens"])):
        real = [i for i in range(batch["tokens"].shape[1]) if bool(batch["mask"][b, i])]
        x = [int(batch["tokens"][b, i]) for i in real]
        h = _encode(objective.generator, _embed(model, [int(batch["masked"][b, i]) for i in real]))
        c = list(x)
        for j, position in enumerate(batch["positions"][b].tolist()):
            if not bool(batch["chosen"][b, j]):
                continue
            i = real.index(position)
            top = _norm(objective.norm, _gelu(_linear(objective.narrow, h[i])))
            logits = [
                word @ top + bias for word, bias in zip(model.embeddings.word.weight, objective.bias, strict=True)
            ]
            nats.append(sum(logit.exp() for logit in logits).log() - logits[x[i]])
            noisy = [float(logit.detach()) + float(g) for logit, g in zip(logits, batch["noise"][b, j], strict=True)]
            c[i] = noisy.index(max(noisy))
        for i, y in enumerate(_encode(model.body, _embed(model, c))):
            score = _linear(objective.verdict, _gelu(_linear(objective.hidden, y)))[0]
            probability = 1 / (1 + (-score).exp())
            bits.append(-(probability if c[i] != x[i] else 1 - probability).log())
    return sum(nats) / len(nats) + objective.weight * sum(bits) / len(bits)


def corruption(objective: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """What must hold of a batch: which tokens were chosen, and that those are hidden."""
    hidden = chosen = 0
    for tokens, masked, real, positions, counts in zip(
        *(batch[name].tolist() for name in ("tokens", "masked", "mask", "positions", "chosen")), strict=True
    ):
        picked = [p for p, counted in zip(positions, counts, strict=True) if counted]
        most = max(1, round(sum(real) * objective.rate))
        open_ = [i for i, token in enumerate(tokens) if real[i] and token not in objective.special]
        yield "as many tokens are chosen as the rate says", len(picked) == min(most, len(open_))
        yield "chosen tokens are different, real and not special", len(set(picked) & set(open_)) == len(picked)
        for i, (token, shown) in enumerate(zip(tokens, masked, strict=True)):
            if i not in picked:
                yield "tokens that are not chosen are shown as they are", shown == token
            elif token != objective.mask_token:
                yield "a chosen token is shown as the mask, or kept", shown in (token, objective.mask_token)
                chosen, hidden = chosen + 1, hidden + (shown == objective.mask_token)
    share = 1 - objective.keep
    # five standard errors of a binomial count
    yield (
        "chosen tokens are hidden but for the share kept",
        abs(hidden - chosen * share) <= 5 * (chosen * share * (1 - share)) ** 0.5,
    )


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Both losses, hidden vectors, samples, and gradients of all parameters of the total and of the generator's loss."""
    model = system.ElectraEncoder(
        vocab=29, dim=12, depth=2, heads=3, length=17, embedding_dim=6, hidden_dim=19
    ).double()
    objective = system.Electra(
        vocab=29,
        dim=12,
        depth=2,
        mask_token=4,
        special=(0, 2, 3),
        embedding_dim=6,
        generator_dim=8,
        generator_heads=2,
        generator_hidden_dim=13,
    ).double()
    pairs: list[tuple[Tensor, str]] = []
    shared = "disc.electra.embeddings."
    table = model.embeddings
    pairs += [
        (table.word.weight, f"{shared}word_embeddings.weight"),
        (table.place.weight, f"{shared}position_embeddings.weight"),
        (table.segment.weight, f"{shared}token_type_embeddings.weight"),
        (table.norm.weight, f"{shared}LayerNorm.weight"),
        (table.norm.bias, f"{shared}LayerNorm.bias"),
        (objective.bias, "gen.generator_lm_head.bias"),
    ]
    stacked: list[tuple[Tensor, list[str]]] = []
    modules = [
        (objective.norm, "gen.generator_predictions.LayerNorm"),
        (objective.narrow, "gen.generator_predictions.dense"),
        (objective.hidden, "disc.discriminator_predictions.dense"),
        (objective.verdict, "disc.discriminator_predictions.dense_prediction"),
    ]
    for body, prefix in ((model.body, "disc"), (objective.generator, "gen")):
        modules.append((body.widen, f"{prefix}.electra.embeddings_project"))
        for i, block in enumerate(body.encoder.blocks):
            own = f"{prefix}.electra.encoder.layer.{i}."
            modules += [
                (block.mixer.heads.q, f"{own}attention.self.query"),
                (block.mixer.heads.out, f"{own}attention.output.dense"),
                (block.residual.norms[0], f"{own}attention.output.LayerNorm"),
                (block.channel.into, f"{own}intermediate.dense"),
                (block.channel.out, f"{own}output.dense"),
                (block.residual.norms[1], f"{own}output.LayerNorm"),
            ]
            for kind in ("weight", "bias"):
                names = [f"{own}attention.self.{part}.{kind}" for part in ("key", "value")]
                stacked.append((getattr(block.mixer.heads.kv, kind), names))
    for module, name in modules:
        pairs += [(module.weight, f"{name}.weight"), (module.bias, f"{name}.bias")]
    with torch.no_grad():
        for parameter, name in pairs:
            parameter.copy_(arrays[f"w.{name}"])
        for parameter, names in stacked:
            parameter.copy_(torch.cat([arrays[f"w.{name}"] for name in names]))
    where = [row.nonzero()[:, 0] for row in arrays["in.chosen"]]
    positions = torch.stack(where)
    batch = {
        "tokens": arrays["in.ids"],
        "masked": arrays["in.masked_ids"],
        "positions": positions,
        "chosen": torch.ones_like(positions, dtype=torch.bool),
        "noise": arrays["in.gumbel"].gather(1, positions[..., None].expand(-1, -1, 29)),
        "mask": arrays["in.attention_mask"].bool(),
    }
    real = batch["mask"][..., None]
    from tevo.taps import record

    with record() as seen:
        loss = objective(model, batch)
    hidden = model(seen["corrupted"][0], mask=batch["mask"])
    narrow = objective.generator(table(batch["masked"], None, batch["mask"]), batch["mask"])
    logits = objective.predictions(model, batch)
    theirs = arrays["out.gen_logits_all"].gather(1, positions[..., None].expand(-1, -1, 29))
    yield "out.corrupted", seen["corrupted"][0], arrays["out.corrupted"].to(torch.long), 0.0
    yield "out.gen_hidden", narrow * real, arrays["out.gen_hidden"] * real, 1e-10
    yield "out.gen_logits at the chosen positions", logits, theirs, 1e-10
    yield "out.disc_hidden", hidden * real, arrays["out.disc_hidden"] * real, 1e-10
    yield "out.disc_logits", (seen["replaced"][0] * real[..., 0]), arrays["out.disc_logits_all"] * real[..., 0], 1e-10
    yield "mlm.out.loss", loss.parts["generator"], arrays["mlm.out.loss"], 1e-10
    yield "disc.out.loss", loss.parts["discriminator"], arrays["disc.out.loss"], 1e-10
    yield "total.out.loss", loss.total, arrays["total.out.loss"], 1e-10
    leaves = [p for p, _ in pairs] + [p for p, _ in stacked]
    gradients = torch.autograd.grad(loss.total, leaves)
    for gradient, name in zip(gradients, [n for _, n in pairs], strict=False):
        yield f"total.grad.w.{name}", gradient, arrays[f"total.grad.w.{name}"], 1e-10
    for gradient, (_, names) in zip(gradients[len(pairs) :], stacked, strict=True):
        wanted = torch.cat([arrays[f"total.grad.w.{name}"] for name in names])
        yield f"total.grad.w.{names[0]} and value", gradient, wanted, 1e-10
    objective.weight = 0.0
    mine = torch.autograd.grad(objective(model, batch).total, leaves)
    for gradient, name in zip(mine, [n for _, n in pairs], strict=False):
        if f"mlm.grad.w.{name}" in arrays:
            yield f"mlm.grad.w.{name}", gradient, arrays[f"mlm.grad.w.{name}"], 1e-10
