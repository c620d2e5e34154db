"""What lives as long as the run is kept out of the garbage collector's sight while it trains.

A full collection walks every object of the process and holds Python's lock all the while: many steps' time once torch
and Lightning are loaded, in which this rank neither steps nor answers its peers. It comes after so many new objects, so
in mid-run, on each rank at another time. Set aside, what was there before the first step is not walked any more.
"""

from __future__ import annotations

import gc


class Garbage:
    """Sets the process's objects aside for the time of a run, unless somebody else did."""

    def __init__(self) -> None:
        self._ours = False

    def set_aside(self) -> None:
        """Before the first step."""
        if gc.get_freeze_count() == 0:
            gc.freeze()
            self._ours = True

    def put_back(self) -> None:
        """After the run. Idempotent."""
        if self._ours:
            gc.unfreeze()
            self._ours = False
