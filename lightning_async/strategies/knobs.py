"""What the knobs that strategies share may be, said once: a wrong value is refused where it is given, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
AtMeeting = Literal["adopt", "keep"]


def check_word(knob: str, value: object, words: Sequence[str]) -> None:
    """Raise for what is none of these words."""
    if value not in words:
        raise ValueError(f"`{knob}` must be one of {', '.join(map(repr, words))}, got {value!r}")


def check_seconds(knob: str, value: object, *, also_0: bool = False) -> None:
    """Raise for what is no time; one that is not a number would bound no wait."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (value > 0 or (also_0 and value == 0)):
        return
    least = "of at least 0" if also_0 else "above 0"
    raise ValueError(f"`{knob}` must be a number of seconds {least}, got {value!r}")
