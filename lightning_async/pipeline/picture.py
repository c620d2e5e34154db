"""Who computed which batch when, as lines of text: a digit for a batch going forward, its letter on the way back.

    stage 0   0001112223330aa1bb2cc       batch 0 forward, 1, 2, 3, and then a backward (the gradient of 0), ...
    stage 1   ...000aa111bb222cc          dots: it waited, or did something else

Batches are counted from 0 and modulo 10 in the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Timeline = Sequence[tuple[str, int, float, float]]
"""(direction, batch, begin, end) of each pass."""


def draw(timelines: Mapping[int, Timeline], *, first: int = 1, last: int = 8, width: int = 100) -> str:
    """The passes of the batches from `first` to `last`, one line a stage."""
    chosen = {s: [w for w in line if first <= w[1] <= last] for s, line in sorted(timelines.items())}
    begins = [begin for line in chosen.values() for _, _, begin, _ in line]
    ends = [end for line in chosen.values() for _, _, _, end in line]
    if not begins:
        return ""
    scale = width / (max(ends) - min(begins))
    rows = []
    for stage, line in chosen.items():
        cells = ["."] * width
        for direction, batch, begin, end in line:
            at = min(width - 1, int((begin - min(begins)) * scale))
            to = max(at + 1, round((end - min(begins)) * scale))
            cells[at:to] = [_mark(direction, batch)] * (min(to, width) - at)
        rows.append(f"stage {stage}   {''.join(cells)}")
    return "\n".join(rows)


def _mark(direction: str, batch: int) -> str:
    number = (batch - 1) % 10
    return str(number) if direction == "F" else chr(ord("a") + number)
