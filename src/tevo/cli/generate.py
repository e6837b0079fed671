"""``tevo generate``: continue a text with a language model, or answer a question about a long one with CoLT5."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tevo.cli._flags import describe, option, parse, refuse_others

HELP = "continue a text (lm), or answer a question about a long one (colt5)"
EXAMPLES = (
    'tevo generate runs/notes --prompt "The " --tokens 400 --temperature 0.7',
    'tevo generate runs/modules --input module.py --question "signature of main?"',
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the verb."""

    prompt: str = option("\n", "lm: text to continue")
    tokens: int = option(200, "tokens to add, or of an answer at most")
    temperature: float = option(0.8, "lm: 0: the likeliest token, otherwise spread of the sampling")
    top_k: int | None = option(None, "lm: sample among the k likeliest tokens only")
    seed: int = option(0, "lm: decides the sampling")
    input: str = option("", "colt5: file with the text")
    question: str = option("", "colt5: what is asked about it, in the words of the model's task")


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

    from tevo.training.recipe import RECIPES, read

    stored = Path(folder) / "recipe.json"
    # a folder that is no run is refused by each of them
    kind = read(stored).kind if stored.is_file() else "lm"
    refuse_others(options, kind, RECIPES, folder=folder)
    if kind == "colt5-pretrain":
        raise ValueError(
            f"{folder} was pre-trained to fill in what is missing; fine-tune it first, as tevo train --help says"
        )
    said = {"colt5": _answered, "colt5-finetune": _answered_from_text}.get(kind, _continued)
    print(said(Path(folder), options))
    return 0


def _continued(folder: Path, options: Options) -> str:
    import torch

    from tevo.training import lm

    recipe, task, model, _ = lm.restore(folder)
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
    return bytes(out[0].tolist()).decode("utf-8", errors="replace")


def _answered_from_text(folder: Path, options: Options) -> str:
    from tevo.colt5.records import Records
    from tevo.colt5.text_training import restore

    text = _text(folder, options)
    _, task, model, _ = restore(folder)
    assert isinstance(task, Records)
    # the question first, as records have it
    tokens = model.eval().answer(task.encode(f"{options.question}\n{text}"), most=options.tokens)
    return task.tokens.text(tokens[0])


def _text(folder: Path, options: Options) -> str:
    if not options.input or not options.question:
        raise ValueError(f"{folder} answers questions; give --input FILE and --question, as in `{EXAMPLES[1]}`")
    return Path(options.input).read_bytes().decode("utf-8", errors="replace")


def _answered(folder: Path, options: Options) -> str:
    text = _text(folder, options)

    from tevo.colt5.reading import read as read_text
    from tevo.colt5.training import open_run

    _, task, model, _ = open_run(folder)
    reading = read_text(task.last, options.question, text)
    return reading.say(model.answer(reading.tokens, most=options.tokens)[0])
