"""The knobs of cyclic updates: what each may be, and which of them do not go together."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_async.algorithms.compensation import How
from lightning_async.algorithms.turn_server import Scale

Token = Literal["skip", "strict"]
Push = Literal["gradient", "delta"]


def check_turns(
    *,
    token: Token,
    push: Push,
    scale: Scale,
    strength: float | None,
    compensation: How,
    max_accumulate: int | None,
    warm_up: int,
) -> None:
    """Raise `ValueError` for what is none of them, or has no meaning beside the others."""
    _check_choice("token", token, get_args(Token))
    _check_choice("push", push, get_args(Push))
    _check_choice("scale", scale, get_args(Scale))
    if strength is not None and scale != "delay":
        raise ValueError(f"`strength` has no meaning with scale={scale!r}: leave it out")
    if compensation == "dc" and push == "delta":
        raise ValueError(
            "compensation='dc' is for gradients, and push='delta', the default, pushes moves: give push='gradient' "
            "too, or use compensation='lr'"
        )
    check_count("max_accumulate", max_accumulate, "no bound")
    if not isinstance(warm_up, int) or isinstance(warm_up, bool) or warm_up < 0:
        raise ValueError(f"`warm_up` must be an integer of at least 0, got {warm_up!r}")
    if warm_up and max_accumulate is None:
        raise ValueError("`warm_up` needs a `max_accumulate` to grow to: without a bound nothing warms up")


def check_count(name: str, count: object, none: str) -> None:
    """Raise `ValueError` for what is neither a positive integer nor None."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, or None for {none}, got {count!r}")


def _check_choice(name: str, choice: object, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {choice!r}")
