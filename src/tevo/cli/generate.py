"""``tevo generate``: continue a text with a trained language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tevo.cli._flags import describe, option, parse

HELP = "continue a text with a trained language model"
EXAMPLES = (
    'tevo generate runs/notes --prompt "def main("',
    'tevo generate runs/notes --prompt "The " --tokens 400 --temperature 0.7',
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the verb."""

    prompt: str = option("\n", "text to continue")
    tokens: int = option(200, "tokens to add")
    temperature: float = option(0.8, "0: the likeliest token, otherwise spread of the sampling")
    top_k: int | None = option(None, "sample among the k likeliest tokens only")
    seed: int = option(0, "decides the sampling")


def main(argv: list[str]) -> int:
    """Run the verb."""
    if not argv or "-h" in argv or "--help" in argv:
        print("\n".join([*EXAMPLES, "", "  RUN                      folder that `tevo train` made", describe(Options)]))
        return 0
    folder, *flags = argv
    options = parse(Options, flags, verb="generate")
    if not options.prompt:
        raise ValueError("--prompt is empty, expected at least one character to continue")
    if options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}, expected at least 1")

    import torch

    from tevo.training import lm

    recipe, task, model, _ = lm.restore(Path(folder))
    if task.metric != "bits_per_byte":
        raise ValueError(f"{folder} was trained on {recipe.task}, whose tokens are no text; expected a run on text")
    prompt = torch.tensor([list(options.prompt.encode())])  # 1 n
    out = model.generate(
        prompt,
        new_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(bytes(out[0].tolist()).decode("utf-8", errors="replace"))
    return 0
