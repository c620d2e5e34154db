"""The journal of a run: what all ranks told at each meeting, a line of JSON each, in one file that rank 0 writes.

    {"run": 1, "group": "run", "step": 0, "epoch": 0, "at": 0.0, "words": {"strategy": "gossip_ring", ...}}
    {"run": 1, "group": "delay", "step": 240, "epoch": 3, "at": 12.5, "words": {"0": ..., "1": ...}}
    {"run": 1, "group": "logged", "step": 240, "epoch": 3, "at": 12.6, "words": {"val_loss": 0.31}}

It lies in the folder of the first logger that has one, or where `folder=` says, as `meetings.jsonl`. `lightning-async
report` draws it. A line is small (a kilobyte or two for each rank) and written at meetings only; what was noted between
them, then too, or once a minute. Where it cannot be written (a full disk) that is said once, and the training goes on.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from lightning_async.callbacks.watched import watched

NAME = "meetings.jsonl"
MANY = 64  # lines that are kept back: a minute of sketches


class Journal:
    """The file, and which run this is in it: runs into one folder follow each other."""

    _of: ClassVar[WeakKeyDictionary[Trainer, Journal]] = WeakKeyDictionary()

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._began: float | None = None
        self._known: dict[str, float] = {}
        self._first: dict[str, str] = {}
        self._place = ""
        self._lines: list[str] = []
        self._lost = False
        self._run, self._cut = 1, False
        try:
            self._run += max((line["run"] for line in read(self.path)), default=0)
            self._cut = _ends_in_mid_line(self.path)
        except OSError as error:
            self._give_up(error)

    @classmethod
    def of(cls, trainer: Trainer, folder: str | None) -> Journal | None:
        """The journal of this fit, the same for all callbacks; rank 0 writes it, so only rank 0 has one."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return None
        places = (logger.log_dir or logger.save_dir for logger in trainer.loggers)
        place = folder or next(filter(None, places), None)
        if place is None:
            if trainer.loggers:
                warnings.warn(
                    "no logger of this run has a folder, so there is no journal for `lightning-async report`: say by "
                    "`folder=` of the callback where it goes",
                    stacklevel=3,
                )
            return None
        known = cls._of.get(trainer)
        if known is None or known.path.parent != Path(place):
            known = cls._of[trainer] = cls(Path(place))
        return known

    @classmethod
    def close(cls, trainer: Trainer) -> None:
        """The fit is over; the next one of this Trainer is a run of its own."""
        journal = cls._of.pop(trainer, None)
        if journal is not None:
            journal._flush()

    def start(self, trainer: Trainer) -> None:
        """The training starts: the clock counts from the first call on."""
        if self._began is None:
            self._began = time.monotonic()
            seen = watched(trainer)
            members = trainer.world_size if seen is None else seen.members
            words = {"strategy": _name(trainer.strategy), "world": trainer.world_size, "members": members}
            self.write("run", trainer.global_step, trainer.current_epoch, words)

    def logged(self, step: int, epoch: int, values: Mapping[str, float], *, behind: str) -> None:
        """What the module has logged, behind a validation or an epoch. Every callback asks, one writes.

        Lightning keeps what it was told: behind a validation, what an epoch logged is that of the epoch before. So what
        did not change is news only where it was seen first.
        """
        place = f"{step} {epoch} {behind}"
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if place == self._place:
            return
        self._place = place
        news = {name: value for name, value in finite.items()
                if self._known.get(name) != value or self._first[name] == behind}  # fmt: skip
        self._first = {**dict.fromkeys(finite, behind), **self._first}
        self._known |= finite
        if news:
            self.write("logged", step, epoch, news)

    def write(self, group: str, step: int, epoch: int, words: Mapping[Any, Any]) -> None:
        """One group's words of one meeting."""
        self._add(group, step, epoch, words)
        self._flush()

    def note(self, group: str, step: int, epoch: int, words: Mapping[Any, Any]) -> None:
        """The same in mid-epoch, where no step waits for a disk: written with the next words, or when many are kept."""
        self._add(group, step, epoch, words)
        if len(self._lines) >= MANY:
            self._flush()

    def _add(self, group: str, step: int, epoch: int, words: Mapping[Any, Any]) -> None:
        at = round(time.monotonic() - (self._began or time.monotonic()), 3)
        line = {"run": self._run, "group": group, "step": step, "epoch": epoch, "at": at}
        self._lines.append(json.dumps({**line, "words": words}) + "\n")

    def _flush(self) -> None:
        if self._lines and not self._lost:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._cut + "".join(self._lines))
            except OSError as error:
                self._give_up(error)
        self._lines.clear()
        self._cut = False

    def _give_up(self, error: OSError) -> None:
        """Statistics are no reason to end a training."""
        self._lost = True
        warnings.warn(
            f"the journal for `lightning-async report` cannot be written ({error}): the training goes on without it; "
            "say by `folder=` of the callback where there is room for it",
            stacklevel=2,
        )


def _ends_in_mid_line(path: Path) -> bool:
    """Whether whoever wrote last was killed on the way: what is appended to that line nobody could read."""
    return path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none where there is no file. Of a killed rank the last one may be cut."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            known = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(known, dict) and all(isinstance(known.get(name), kind) for name, kind in _KINDS.items()):
            found.append(known)
    return found


_KINDS: dict[str, Any] = {"run": int, "group": str, "at": (int, float), "words": dict}


def _name(strategy: object) -> str:
    """As the Trainer's argument would say it."""
    names = (getattr(strategy, name, None) for name in ("name", "strategy_name"))
    return next((name for name in names if isinstance(name, str)), "")
