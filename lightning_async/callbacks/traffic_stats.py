"""What went over the wire, as the carrier counted it, and how much of that time training did not notice.

traffic/bytes_sent, bytes_received, messages_sent     payload and headers, of all ranks, since the training began
traffic/kind/ask/bytes_sent                           by kind of message
traffic/rank0/to1/bytes_sent                          by link
traffic/skipped                                       exchanges left out: the one before was still under way
traffic/compression                                   4 bytes a number, over the bytes that it took in the method's mail
traffic/occupancy                                     of the busiest link: the share of time with mail under way
traffic/hidden_seconds, hidden_share                  mail was under way, and its sender trained on

Seconds under way are added up over links; the part of them that is hidden is the part of the clock spent on training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_async.callbacks.stats import Figures, Stats, check_by_rank
from lightning_async.progress.stretch import Stretch
from lightning_async.transport.mail import KIND_NAMES
from lightning_async.transport.traffic import plain

SUMS = {"bytes_out": "bytes_sent", "bytes_in": "bytes_received", "messages_out": "messages_sent"}


class TrafficStats(Stats):
    """Counts bytes and messages by link and kind, skipped exchanges, compression, and how busy links are.

    Args:
        by_rank: Up to so many ranks, figures are also logged for each link; beyond, for all together only.
        folder: Where the journal for `lightning-async report` goes; None: beside the logger's files.
    """

    group = "traffic"
    shown = ("bytes_sent",)
    needs = "nobody counts what its collectives send"

    def __init__(self, *, by_rank: int = 16, folder: str | None = None) -> None:
        super().__init__(folder=folder)
        check_by_rank(by_rank)
        self.by_rank = by_rank
        self._before: dict[str, float] = {}
        self._hidden: dict[int, float] = {}
        self._under_way: dict[int, float] = {}

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Counts are those of this fit."""
        self._world = trainer.world_size
        self._before, self._hidden, self._under_way = {}, {}, {}

    def say(self, stretch: Stretch) -> Any:
        """The table so far; the seconds since the last meeting, in which so much mail was under way."""
        assert self._strategy is not None  # else nobody asks
        table = plain(self._strategy.traffic(), self._strategy.kinds)
        taken = {peer: max((c["seconds_out"] for c in row.values()), default=0.0) for peer, row in table.items()}
        new = {peer: value - self._before.get(peer, 0.0) for peer, value in taken.items()}
        self._before = taken
        noticed = (stretch.exchange + stretch.waited) / stretch.seconds if stretch.seconds else 1.0
        return {
            "links": table,
            "skipped": self._strategy.skipped,
            "seconds": round(stretch.seconds, 6),
            "under_way": {peer: round(value, 6) for peer, value in new.items()},
            "hidden": round(sum(new.values()) * max(0.0, 1 - noticed), 6),
        }

    def conclude(self, words: Mapping[int, Any]) -> Figures:
        """All ranks' tables together, and by link."""
        links = {(rank, peer): row for rank, word in words.items() for peer, row in word["links"].items()}
        counts = [(kind, count) for row in links.values() for kind, count in row.items()]
        figures = _sums(count for _, count in counts)
        for kind in sorted({kind for kind, _ in counts}):
            of_kind = _sums(count for name, count in counts if name == kind)
            figures |= {f"kind/{kind}/{name}": value for name, value in of_kind.items()}
        if self._world <= self.by_rank:
            for (rank, peer), row in links.items():
                figures |= {f"rank{rank}/to{peer}/{name}": value for name, value in _sums(row.values()).items()}
        bodies = [count for kind, count in counts if kind not in KIND_NAMES.values()]
        numbers = sum(4 * count["numbers_out"] for count in bodies)
        sent = sum(count["bytes_out"] for count in bodies)
        figures["skipped"] = float(sum(word["skipped"] for word in words.values()))
        figures["compression"] = numbers / sent if sent else 1.0
        return figures | self._times(words)

    def _times(self, words: Mapping[int, Any]) -> Figures:
        shares = [
            min(1.0, taken / word["seconds"])
            for word in words.values()
            if word["seconds"] > 0
            for taken in word["under_way"].values()
        ]
        for rank, word in words.items():
            self._hidden[rank] = self._hidden.get(rank, 0.0) + word["hidden"]
            self._under_way[rank] = self._under_way.get(rank, 0.0) + sum(word["under_way"].values())
        hidden, under_way = sum(self._hidden.values()), sum(self._under_way.values())
        return {
            "occupancy": max(shares, default=self.figures.get("occupancy", 0.0)),  # a meeting right behind another
            "hidden_seconds": hidden,
            "hidden_share": hidden / under_way if under_way else 0.0,
        }


def _sums(counts: Iterable[Mapping[str, float]]) -> Figures:
    rows = list(counts)
    return {name: float(sum(count[key] for count in rows)) for key, name in SUMS.items()}
