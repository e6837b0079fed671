"""Time and extra memory of one encoder layer over a long text, CoLT5 beside LongT5 and a dense one, on the machine at hand.

All have the width and the heads of :meth:`tevo.colt5.CoLT5Config.tiny`; a dense feed-forward is twice as wide as the light one
and a quarter of the heavy one, as in the paper. The dense layer is this house's softmax attention without a position bias,
which torch's fused kernel computes. LongT5 with transient-global attention is that of the package ``transformers``, where it
is installed. Times are taken in one process, the layers in turn; memory, what a pass adds to the resident set at its peak, in
a process of its own for each.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from tevo.bench import timing

__all__ = ["FORMS", "PEER", "SHAPE", "measure"]

SHAPE = {"tokens": 16384, "width": 128, "heads": 4, "radius": 127}
PEER = "LongT5, transient-global (transformers)"
FORMS = ("CoLT5 (tevo)", PEER, "dense (fused attention)")
# the module itself, which is also run
_HERE = "tevo.colt5.cost"
_LEAST_ROUNDS, _PATIENCE = 2, 60
# tokens of the pass before the first that is timed
_SHORT = 1024


def measure(
    *,
    threads: int,
    seconds: float = 6.0,
    shape: Mapping[str, int] = SHAPE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time in seconds and memory in bytes of a forward pass of every form.

    Args:
        threads: of torch.
        seconds: after which no further round of timing is begun.
        shape: tokens, width, heads, radius.
        say: is told what is being measured.

    Returns:
        "forms": form -> forward_s, forward_bytes, or "error"; "shape" in words, "threads", "rounds", and "skipped": why a form
        was not measured.
    """
    there = importlib.util.find_spec("transformers") is not None
    names = [name for name in FORMS if there or name != PEER]
    job = {"shape": dict(shape), "threads": threads, "seconds": seconds}
    say("measuring time")
    times = timing.child(_HERE, {**job, "what": "time", "forms": names}, patience=_PATIENCE)
    say("measuring memory")
    jobs = [{**job, "what": "memory", "forms": [name]} for name in names]
    # what a process adds to its own memory does not depend on the others, unlike time
    with ThreadPoolExecutor() as pool:
        memory = pool.map(lambda one: timing.child(_HERE, one, patience=_PATIENCE), jobs)
    none = {"error": times.get("error", "no answer")}
    forms: dict[str, dict[str, Any]] = {
        name: times.get(name, none) | found for name, found in zip(names, memory, strict=True)
    }
    words = "one text of {tokens:,} tokens, one layer of width {width} with {heads} heads, float32, without gradients"
    skipped = [] if there else ["LongT5 is not measured: the package transformers is missing; pip install 'tevo[hf]'"]
    return {
        "forms": forms,
        "shape": words.format(**shape),
        "threads": threads,
        "rounds": times.get("rounds", 0),
        "skipped": skipped,
    }


def _pass(name: str, shape: Mapping[str, int]) -> Callable[[], None]:
    """A forward pass without a graph."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, shape["tokens"], shape["width"])
    layer = {FORMS[0]: _colt5, PEER: _longt5, FORMS[2]: _dense}[name](shape)
    layer.eval()

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return forward


def _colt5(shape: Mapping[str, int]) -> Any:
    from tevo.colt5.layers import ConditionalAttention, ConditionalFeedForward, ConditionalLayer, RelativeBias
    from tevo.colt5.routers import Budget, Router

    d, h = shape["width"], shape["heads"]
    m, v = Budget(1 / 16), Budget(1 / 8)
    attention = ConditionalAttention(
        dim=d,
        light_heads=h // 4,
        heavy_heads=h - h // 4,
        head_dim=d // h,
        radius=shape["radius"],
        q_router=Router(dim=d, budget=m),
        kv_router=Router(dim=d, budget=v),
        light_bias=RelativeBias(heads=h // 4),
        heavy_bias=RelativeBias(heads=h - h // 4),
    )
    feed_forward = ConditionalFeedForward(dim=d, light_dim=d, heavy_dim=8 * d, router=Router(dim=d, budget=m))
    return ConditionalLayer(dim=d, attention=attention, feed_forward=feed_forward)


def _longt5(shape: Mapping[str, int]) -> Any:
    import torch
    from transformers import LongT5Config, LongT5EncoderModel

    d, h = shape["width"], shape["heads"]
    config = LongT5Config(
        vocab_size=8,
        d_model=d,
        d_kv=d // h,
        d_ff=2 * d,
        num_heads=h,
        num_layers=1,
        local_radius=shape["radius"],
        encoder_attention_type="transient-global",
        feed_forward_proj="gated-gelu",
    )
    encoder = LongT5EncoderModel(config)

    class Embedded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return encoder(inputs_embeds=x)

    encoder.eval()
    return Embedded()


def _dense(shape: Mapping[str, int]) -> Any:
    from tevo.colt5.layers import GatedFeedForward
    from tevo.colt5.longt5 import LongT5Layer
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    d, h = shape["width"], shape["heads"]
    attention: Any = SoftmaxAttention(dim=d, heads=h)
    return LongT5Layer(dim=d, attention=attention, feed_forward=GatedFeedForward(dim=d, hidden_dim=2 * d))


def _times(names: list[str], shape: Mapping[str, int], seconds: float) -> dict[str, Any]:
    # what a first pass takes longer than others, it does for a short text too
    for name in names:
        _pass(name, {**shape, "tokens": min(_SHORT, shape["tokens"])})()
    runs = {name: _pass(name, shape) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    began, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
        rounds += 1
    found: dict[str, Any] = {name: {"forward_s": median(times)} for name, times in taken.items()}
    return {**found, "rounds": rounds}


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    if job["what"] == "time":
        return _times(job["forms"], job["shape"], job["seconds"])
    timing._return_pages()
    return {"forward_bytes": timing._peak_bytes(_pass(job["forms"][0], job["shape"]))}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.loads(sys.argv[1]))))
