"""Each knob of `lazy_sign` is one of few words, or a number within bounds, or is refused in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from lightning_async.algorithms.sheets import SCALES
from lightning_async.algorithms.sign_notices import MOST
from lightning_async.algorithms.sign_rules import RULES
from lightning_async.algorithms.sign_trigger import News
from lightning_async.algorithms.signs import BITS

Compress = Literal["update", "gradient"]
Compressor = Literal["sign", "none"]
Form = Literal["auto", "slices", "gather"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "rule": tuple(RULES),
    "compress": get_args(Compress),
    "compressor": get_args(Compressor),
    "scale": SCALES,
    "form": get_args(Form),
    "news": get_args(News),
}
LEAST = {"block": BITS, "min_size": 0, "history": 1, "max_skip": 0, "ahead": 0, "warm_up": 0, "threads": 1}


def check(**knobs: object) -> None:
    """Raise for a value that its knob cannot have."""
    for name, value in knobs.items():
        if name in CHOICES:
            _check_choice(name, value)
        elif name in LEAST:
            _check_integer(name, value)
        else:
            _check_weight(name, value)


def _check_choice(name: str, value: object) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < LEAST[name]:
        raise ValueError(f"`{name}` must be an integer of at least {LEAST[name]}, got {value!r}")
    if name == "block" and value % BITS:
        raise ValueError(f"`block` must be a multiple of {BITS}, got {value}")
    if name == "ahead" and value > MOST:
        raise ValueError(f"`ahead` must be at most {MOST} rounds, got {value}")


def stretched(value: float | None, default: float) -> float:
    """What `stretch` is, where None is the default."""
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2:
        raise ValueError(f"`stretch` must be above 0 and below 2, where what is held back would grow, got {value!r}")
    return value


def weights(value: object, history: int) -> tuple[float, ...] | None:
    """What `history_weights` is, one for each round."""
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple)) and len(value) == history and all(map(_is_weight, value))
    if not numbers or not any(value):  # type: ignore[arg-type]
        raise ValueError(
            f"`history_weights` must be a list of {history} numbers of at least 0, one for each round of `history`, "
            f"and not all 0, or None for all alike, got {value!r}"
        )
    return tuple(value)  # type: ignore[arg-type]


def _check_weight(name: str, value: object) -> None:
    if not _is_weight(value):
        raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}")


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
