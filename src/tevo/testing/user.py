"""A user's part as the subject of the shared checks: what it claims is told, how it is built and called is found out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tevo.card import CLAIMS, Card
from tevo.catalogue.rows import suggest
from tevo.contracts import ChannelMixer, Heads, Normaliser, Position, Residual, Stack, TokenMixer
from tevo.testing.subject import Subject

# roles of a user's part that the checks know, and the contract that tells them apart
CONTRACTS: Mapping[str, type[nn.Module]] = {
    "mixer": TokenMixer,
    "channel": ChannelMixer,
    "position": Position,
    "normaliser": Normaliser,
    "heads": Heads,
    "residual": Residual,
    "stack": Stack,
}
ROLES = (*CONTRACTS, "norm", "block")
# sizes that are tried in turn, (width, heads)
SIZES = ((12, 3), (16, 4), (64, 4), (256, 8))
# other words for the arguments that the checks vary
WORDS = {
    "dim": ("dim", "d_model", "embed_dim", "hidden_size", "n_embd"),
    "heads": ("heads", "num_heads", "n_heads", "nhead", "num_attention_heads"),
    "causal": ("causal", "is_causal"),
}


@dataclass(frozen=True)
class UserSubject(Subject):
    """A part of the user's with what was found out about it.

    Args:
        width: of the tokens, where no argument of the constructor decides it.
        takes: arguments of ``forward`` beside the tokens that the checks may use.
        given: fields of the card that the user stated.
        inferred: sentences that say what was found out.
    """

    width: int = 0
    takes: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    inferred: tuple[str, ...] = ()

    @property
    def house(self) -> bool:
        """Whether the rules of the house are asked of it."""
        return False

    @property
    def costed(self) -> bool:
        """Whether a growth of FLOPs is declared."""
        return "cost" in self.given

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return super().dim if "dim" in self.example or not self.width else self.width

    def call(
        self,
        module: nn.Module,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Run the part with the arguments that it takes."""
        if self.card.role not in ("mixer", "channel", "block", "stack", "norm"):
            return super().call(module, x, context, mask=mask, at=at)
        self._count(x)
        offered = {"context": context, "mask": mask, "at": at}
        y = module(x, **{name: value for name, value in offered.items() if value is not None and name in self.takes})
        return y[0] if isinstance(y, tuple) else y


def user_subject(
    part: nn.Module | Callable[..., nn.Module],
    *,
    role: str | None = None,
    name: str | None = None,
    dim: int | None = None,
    heads: int | None = None,
    options: Mapping[str, object] | None = None,
    claims: Sequence[str] = (),
    **card_fields: Any,
) -> UserSubject:
    """The subject of a user's module, class or factory.

    Args:
        part: a module, or what builds one from any of dim, heads and causal, or from nothing.
        role: one of ``ROLES``; found out from the contract that the class extends, otherwise mixer.
        name: for messages.
        dim: width of the tokens, where it cannot be found out.
        heads: number of heads, of a part that takes it.
        options: further constructor arguments.
        claims: words of ``tevo.card.CLAIMS``; without ``causal`` the part is taken to be bidirectional.
        card_fields: further fields of :class:`~tevo.card.Card`: cost, flops, state, tolerances, sizes.

    Raises:
        ValueError: it cannot be built or called, or lacks an argument that a claim needs.
    """
    cls, label = (copy_of(part), type(part).__name__) if isinstance(part, nn.Module) else (part, _label(part))
    label = name or label
    inferred: list[str] = []
    if role is None:
        kind: object = type(part) if isinstance(part, nn.Module) else part
        found = [r for r, c in CONTRACTS.items() if isinstance(kind, type) and issubclass(kind, c)]
        role = found[0] if found else "mixer"
        inferred.append(f"taken for a {role}" + (f", as it extends {CONTRACTS[role].__name__}" if found else ""))
    if role not in ROLES:
        raise ValueError(
            f"role {role!r} of {label} is unknown{suggest(role, ROLES)}; expected one of {', '.join(ROLES)}"
        )
    for word in claims:
        if word not in CLAIMS:
            raise ValueError(f"unknown claim {word!r}{suggest(word, CLAIMS)}; claims are {', '.join(CLAIMS)}")
    words = tuple(dict.fromkeys(claims if {"causal", "bidirectional"} & set(claims) else (*claims, "bidirectional")))
    card = Card(
        id=label,
        role=role,
        summary="",
        equations=(),
        exports={label: label},
        claims=words,
        **({"cost": "n^2"} | card_fields),
    )
    build, named = adapted(cls, options or {}, label)
    example, module = _build(build, named, label, dim, heads, causal="causal" in words)
    inferred.append(f"built with {_written(example | dict(options or {})) or 'no arguments'}")
    forward = _forward_of(module)
    takes = tuple(word for word in ("context", "mask", "at") if word in forward)
    for claim, word in (("cross", "context"), ("padding", "mask")):
        if claim in words and word not in takes and role in ("mixer", "channel", "block", "stack"):
            raise ValueError(
                f"{label} claims {claim}, but its forward has no argument {word!r}, got ({', '.join(forward)}); "
                f"name it {word}" + (" (True = real token)" if word == "mask" else "")
            )
    if "exact_state" in words and not (hasattr(module, "init_state") and hasattr(module, "step")):
        raise ValueError(f"{label} claims exact_state, but has no init_state(batch) and step(x, state)")
    width = 0
    if "dim" not in example and role in ("mixer", "channel", "block", "stack", "norm"):
        width = dim or _width(module, label)
        inferred.append(f"tokens of width {width}")
    if role in ("mixer", "channel", "block", "stack", "norm"):
        inferred.append(f"called as forward({', '.join(('x', *takes))})")
    subject = UserSubject(
        card,
        label,
        build,
        example,
        width=width,
        takes=takes,
        given=tuple(card_fields),
        inferred=tuple(inferred),
    )
    _try(subject, label)
    return subject


def copy_of(module: nn.Module) -> Callable[[], nn.Module]:
    """What gives a new copy of a module at each call."""

    def again() -> nn.Module:
        return copy.deepcopy(module)

    return again


def adapted(
    cls: Callable[..., nn.Module], options: Mapping[str, object], label: str
) -> tuple[Callable[..., nn.Module], dict[str, str]]:
    """The constructor under the words dim, heads and causal, and word -> its own name for it.

    Raises:
        ValueError: an argument without a default is none of these and not among the options.
    """
    parameters = inspect.signature(cls).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"{label} has no argument {option!r}{suggest(option, parameters)}")
    named = {
        word: next((n for n in names if n in parameters and n not in options), "") for word, names in WORDS.items()
    }
    named = {word: own for word, own in named.items() if own}
    for own, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and own not in options and own not in named.values():
            raise ValueError(
                f"{label} cannot be built: its argument {own!r} has no default and is none of dim, heads and causal; give "
                f"it, as in file.py:{label}({own}=...)"
            )

    def build(**given: object) -> nn.Module:
        return cls(**dict(options), **{named[word]: value for word, value in given.items()})

    kind = inspect.Parameter.KEYWORD_ONLY
    build.__signature__ = inspect.Signature([inspect.Parameter(word, kind) for word in named])  # type: ignore[attr-defined]
    return build, named


def _build(
    build: Callable[..., nn.Module],
    named: Mapping[str, str],
    label: str,
    dim: int | None,
    heads: int | None,
    *,
    causal: bool,
) -> tuple[dict[str, object], nn.Module]:
    """The first of a few sizes with which the part can be built."""
    failures: list[str] = []
    for d, h in SIZES:
        wanted: dict[str, object] = {"dim": dim or d, "heads": heads or h, "causal": causal}
        example = {word: value for word, value in wanted.items() if word in named}
        try:
            module = build(**example)
        except Exception as error:
            failures.append(f"with {_written(example) or 'no arguments'}: {type(error).__name__}: {_first_line(error)}")
            continue
        if not isinstance(module, nn.Module):
            raise ValueError(f"{label} gave a {type(module).__name__}, expected a torch.nn.Module")
        return example, module
    raise ValueError(f"{label} cannot be built {failures[0]}")


def _forward_of(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _width(module: nn.Module, label: str) -> int:
    """The width of tokens that a built module takes.

    Raises:
        ValueError: none fits.
    """
    sizes = [value for name in WORDS["dim"] if isinstance(value := getattr(module, name, None), int)]
    sizes += [p.shape[-1] for p in module.parameters() if p.ndim >= 1]
    for size in dict.fromkeys(sizes):
        x = torch.zeros(2, 5, size, dtype=next((p.dtype for p in module.parameters()), torch.float32))
        try:
            with torch.no_grad():
                y = module(x)
        except Exception:
            continue
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(y, Tensor) and y.shape == x.shape:
            return size
    raise ValueError(f"the width of the tokens that {label} takes cannot be found out; give it as dim")


def _try(subject: UserSubject, label: str) -> None:
    """One call, so that what cannot be used at all is said in a sentence."""
    try:
        module = subject.make(dtype=torch.float32)
        x = subject.inputs(2, subject.sizes()[0], dtype=torch.float32)
        with torch.no_grad():
            y = subject.call(module, x)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{label} cannot be called with tokens of shape (2, {subject.sizes()[0]}, {subject.dim}): "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(
            f"forward of {label} gave a {type(y).__name__}, expected a tensor (b, n, d) or a tuple that begins with it"
        )


def _label(part: object) -> str:
    return str(getattr(part, "__name__", type(part).__name__))


def _written(example: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in example.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
