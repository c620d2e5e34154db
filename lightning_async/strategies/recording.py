"""The event log of a run: one file a rank in one folder, events only; without a folder nothing is recorded.

What is recorded is what the algorithm asked its carrier and was told, and which samples each step was taken on. That
is all a replay needs: weights and gradients follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from lightning_async.transport.mail import Carrier
from lightning_async.transport.record import RecordingCarrier


class Recording:
    """Where this rank's events go, if anywhere."""

    def __init__(self, folder: str | None) -> None:
        if folder is not None and not isinstance(folder, str):
            raise ValueError(f"`record` must be the path of a folder, or None, got {folder!r}")
        self._folder = folder
        self._fits = 0
        self._file: TextIO | None = None
        self._recorder: RecordingCarrier | None = None

    @property
    def on(self) -> bool:
        """Whether events are written."""
        return self._folder is not None

    def of(self, carrier: Carrier, *, fitting: bool) -> Carrier:
        """The carrier that the algorithm gets: one that writes down its answers, or the carrier itself.

        Only a fit is recorded, and a later one on the same Trainer has a file of its own: nothing is overwritten.
        """
        if self._folder is None or not fitting:
            return carrier
        self._fits += 1
        name = f"rank{carrier.me}.jsonl" if self._fits == 1 else f"fit{self._fits}.rank{carrier.me}.jsonl"
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        self._file = (Path(self._folder) / name).open("w", encoding="utf-8")
        self._recorder = RecordingCarrier(carrier, self._file)
        return self._recorder

    def step(self, step: int, samples: Iterable[int]) -> None:
        """The samples a step was taken on."""
        if self._recorder is not None:
            self._recorder.note_step(step, samples)

    def meeting(self) -> None:
        """The members meet."""
        if self._recorder is not None:
            self._recorder.note_meeting()

    def finish(self) -> None:
        """The training ended, and not by an accident."""
        if self._recorder is not None:
            self._recorder.finish()

    def close(self) -> None:
        """Nothing more is written. Idempotent."""
        if self._file is not None:
            self._file.close()
        self._file = self._recorder = None
