"""Counting as the synchronous run does: the samples of a batch, the batches of an epoch, the positions of a limit.

an epoch with the limit k:   |#### k batches of each of n ranks ####|.......... not used ..........|
                             0                            k * n * batch                          total
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from fractions import Fraction
from typing import Any


def epoch_batches(total: int, *, members: int, batch: int | Fraction, drop_last: bool = False) -> int:
    """How many batches one rank of a synchronous run has; never fewer than the members of this run have on average.

    So a schedule that was made for so many batches is not overrun. Where batches are unlike, `batch` is their mean.
    """
    used = total - total % batch if drop_last else total
    return math.ceil(used / (members * batch))


def limited(limit: float, total: int, *, members: int, batch: int | Fraction, drop_last: bool = False) -> int:
    """How many of the first positions a limit leaves: of so many batches for each rank (int), or of a part (float)."""
    if isinstance(limit, float):
        if limit >= 1.0:
            return total
        batches = epoch_batches(total, members=members, batch=batch, drop_last=drop_last)
        limit = int(batches * limit)
        if limit < 1:
            raise ValueError(
                f"`limit_train_batches` leaves less than one of the {batches} batches that each rank has in an epoch; "
                f"give at least {1 / max(1, batches):.2g}, or a number of batches"
            )
    return min(total, int(int(limit) * members * batch))


def samples_in(batch: Any) -> int | None:
    """How many samples a batch holds: the first dimension of its first tensor, else the length of its first list."""
    found = _first(batch, lambda part: hasattr(part, "shape") and hasattr(part, "dtype"))
    if found is not None:
        return int(found.shape[0]) if len(found.shape) else 1
    found = _first(batch, lambda part: _is_list(part) and not any(_is_list(p) for p in part))
    return len(found) if isinstance(found, Sized) else None


def _first(batch: Any, wanted: Any) -> Any:
    if wanted(batch):
        return batch
    parts = _parts(batch)
    return next((found for part in parts if (found := _first(part, wanted)) is not None), None)


def _is_list(part: Any) -> bool:
    return isinstance(part, Sequence) and not isinstance(part, (str, bytes))


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if hasattr(batch, "__dataclass_fields__"):
        return [getattr(batch, name) for name in batch.__dataclass_fields__]
    return list(batch) if _is_list(batch) else []
