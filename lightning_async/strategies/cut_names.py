"""What callbacks call the files of cuts: on every rank a name is one of a file that is whole.

    rank 0    its callbacks say where to | files are written ... the main file is whole: says so | what it replaces goes
    others    .......................... | write their own files ................... hear it: theirs are called so, too

At a meeting all callbacks are asked alike, so all take the names of the first that lives, also of files that are still
on their way. Where those do not come, because it died or could not write, the names from before come back; so they do
where a run ends before the files are begun that rank 0's callbacks were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies.late_files import DIED, WRITTEN
from lightning_async.strategies.saved import names_of, take_names
from lightning_async.transport.mail import Carrier


@dataclass
class Told:
    """What was said of the files of one cut.

    Attributes:
        number: The cut's.
        first: The rank that writes its main file.
        names: What that rank calls the files of each callback.
        whole: Whether they came; None as long as nobody knows.
    """

    number: int
    first: int
    names: list[dict[str, Any]]
    whole: bool | None = None


class Names:
    """The names of one rank's callbacks.

    Args:
        callbacks: Those whose saves are cuts.
        carrier: This rank's mail and board.
    """

    def __init__(self, callbacks: Sequence[ModelCheckpoint], carrier: Carrier) -> None:
        self._callbacks, self._carrier = callbacks, carrier
        self._told: Told | None = None
        self._before: list[dict[str, Any]] = []
        self._asked: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # by callback: before and behind that

    def now(self) -> list[dict[str, Any]]:
        """What they are."""
        return [names_of(callback) for callback in self._callbacks]

    def asked(self, callback: ModelCheckpoint, before: dict[str, Any]) -> None:
        """A callback of the first rank has named its files of a cut that nobody was told of yet.

        Args:
            callback: Which.
            before: What its names were.
        """
        self._asked[self._callbacks.index(callback)] = before, names_of(callback)

    def told(self, told: Told) -> None:
        """The files of a cut are on their way, so those of the one before are whole."""
        if self._told is not None:
            self._end(self._told, whole=True)
        before = {i: old for i, (old, _) in self._asked.items()}
        self._told, self._before, self._asked = told, [before.get(i, now) for i, now in enumerate(self.now())], {}

    def look(self) -> bool | None:
        """What became of those on their way, each once; None: nothing is known. Of the dead the board decides it."""
        told, carrier = self._told, self._carrier
        if told is None or told.whole is not None:
            return None
        word = carrier.decided(key(told.number))
        if word is None and told.first not in carrier.members():
            carrier.propose(key(told.number), DIED)
        if word is None:
            return None
        self._end(told, whole=word == WRITTEN)
        return told.whole

    @property
    def open(self) -> bool:
        """Whether files are on their way."""
        return self._told is not None and self._told.whole is None

    def says(self) -> dict[str, Any] | None:
        """What this rank knows, for a meeting."""
        return None if self._told is None else asdict(self._told)

    def meet(self, said: Mapping[str, Any] | None) -> None:
        """At a meeting that is what counts: what the first that lives says. A later cut has become none with its
        first rank."""
        told = self._told
        if told is None or said is None:
            return
        if told.number > said["number"]:
            self._end(told, whole=False)
        elif told.number == said["number"] and said["whole"] is not None:
            self._end(told, whole=said["whole"])

    def forget(self) -> None:
        """The fit is over: what is not known to be whole by now is not there, and what was not told was not begun."""
        for i, (before, behind) in self._asked.items():
            _rename(self._callbacks[i], behind, before)
        self._asked = {}
        self.look()
        if self._told is not None:
            self._end(self._told, whole=False)
        self._told = None

    def _end(self, told: Told, *, whole: bool) -> None:
        if told.whole is not None:
            return
        told.whole = whole
        self._carrier.forget(key(told.number))
        old, new = (self._before, told.names) if whole else (told.names, self._before)
        for callback, one, other in zip(self._callbacks, old, new, strict=False):
            _rename(callback, one, other)


def _rename(callback: ModelCheckpoint, old: dict[str, Any], new: dict[str, Any]) -> None:
    """What a callback has saved itself since stays as it is."""
    if names_of(callback) == old:
        take_names(callback, new)


def key(number: int) -> str:
    """Where on the board it says whether the files of a cut are whole."""
    return f"cut/{number}/whole"
