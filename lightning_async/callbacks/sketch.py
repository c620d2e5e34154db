"""A sketch of a replica: a few numbers, from which anybody can estimate how far replicas are apart.

    weights   x1  x2  x3  x4 ...        s_k = sum of +-x over the coordinates of bucket k: 32 numbers, 128 bytes
                 the same signs, buckets and coordinates on every rank, from one seed
    E |s - s'|^2 = |x - x'|^2           one pair: good to 25 %; the mean over several ranks to less

Of large modules a part of the coordinates is looked at, the same on every rank, and the estimate is scaled up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

BUCKETS = 32
MOST = 65536  # coordinates that are looked at
_FORM = struct.Struct(f"<{BUCKETS}f")


class Sketch:
    """Makes and compares sketches of modules with these parameters."""

    def __init__(self, parameters: Iterable[Tensor], seed: int = 0) -> None:
        self._parameters = list(parameters)
        random = torch.Generator().manual_seed(seed)
        self.numbers = sum(p.numel() for p in self._parameters)
        part = min(1.0, MOST / max(1, self.numbers))
        self._picks = [self._pick(p, part, random) for p in self._parameters]
        looked_at = sum(len(pick) for pick in self._picks)
        self._scale = (self.numbers / max(1, looked_at)) ** 0.5
        signs = torch.randint(0, 2, (looked_at,), generator=random) * 2.0 - 1
        self._signs = signs * self._scale
        self._buckets = torch.randint(0, BUCKETS, (looked_at,), generator=random)

    @torch.no_grad()
    def of(self) -> bytes:
        """The sketch of the parameters as they are now."""
        parts = [p.detach().reshape(-1)[pick] for p, pick in zip(self._parameters, self._picks, strict=True)]
        values = torch.cat([part.float() for part in parts]).cpu() * self._signs
        return _FORM.pack(*torch.zeros(BUCKETS).index_add_(0, self._buckets, values).tolist())

    def spread(self, sketches: Mapping[int, bytes]) -> float:
        """About the rms distance of the replicas to their mean, by coordinate; NaN with fewer than two."""
        rows = [_FORM.unpack(one) for one in sketches.values() if len(one) == _FORM.size]
        if len(rows) < 2:
            return float("nan")
        return float(_distance(rows) / self.numbers**0.5)

    @staticmethod
    def _pick(parameter: Tensor, part: float, random: torch.Generator) -> Tensor:
        count = parameter.numel()
        if part >= 1:
            return torch.arange(count, device=parameter.device)
        few = max(1, round(part * count)) if count else 0
        return torch.randint(0, max(1, count), (few,), generator=random).to(parameter.device)


def _distance(rows: Sequence[Sequence[float]]) -> float:
    points = torch.tensor(rows, dtype=torch.float64)
    return float((points - points.mean(0)).square().sum(1).mean().sqrt())
