"""The journal of a run: what all ranks told at each meeting, a line of JSON each, in one file that rank 0 writes.

    {"run": 1, "group": "delay", "step": 240, "epoch": 3, "at": 12.5, "words": {"0": ..., "1": ...}}
    {"run": 1, "group": "logged", "step": 240, "epoch": 3, "at": 12.6, "words": {"val_loss": 0.31}}

It lies in the folder of the first logger that has one, or where `folder=` says, as `meetings.jsonl`. `lightning-async
report` draws it. A line is small (a kilobyte or two for each rank) and written at meetings only; what was noted between
them, then too, or once a minute.
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

NAME = "meetings.jsonl"
MANY = 64  # lines that are kept back: a minute of sketches


class Journal:
    """The file, and which run this is in it: runs into one folder follow each other."""

    _of: ClassVar[WeakKeyDictionary[Trainer, Journal]] = WeakKeyDictionary()

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._run = 1 + max((line["run"] for line in read(self.path)), default=0)
        self._cut = _ends_in_mid_line(self.path)
        self._began: float | None = None
        self._known: dict[str, float] = {}
        self._lines: list[str] = []

    @classmethod
    def of(cls, trainer: Trainer, folder: str | None) -> Journal | None:
        """The journal of this fit, the same for all callbacks; rank 0 writes it, so only rank 0 has one."""
        if not trainer.is_global_zero:
            return None
        places = (logger.log_dir or logger.save_dir for logger in trainer.loggers)
        place = folder or next(filter(None, places), None)
        if place is None:
            if trainer.loggers and not getattr(trainer, "fast_dev_run", False):
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

    def start(self) -> None:
        """The training starts: the clock counts from the first call on."""
        self._began = time.monotonic() if self._began is None else self._began

    def logged(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """What the module has logged; written if it is news. Every callback asks, one writes."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if finite and finite != self._known:
            self._known = finite
            self.write("logged", step, epoch, finite)

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
        if not self._lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut + "".join(self._lines))
        self._lines.clear()
        self._cut = False


def _ends_in_mid_line(path: Path) -> bool:
    """Whether whoever wrote last was killed on the way: what is appended to that line nobody could read."""
    return path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none where there is no file. The last line of a killed rank may be cut."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
