"""What goes into a checkpoint, and how a CheckpointIO writes it: at once, or later in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_async.strategies.writer import Writer

T = TypeVar("T")


def dump(trainer: Trainer) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` would give the strategy now, hooks included. Nothing is copied."""
    found: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return found


def writes_later(io: object) -> bool:
    """Whether this CheckpointIO returns before its files are written."""
    return _later(io) is not None


def behind_writes(io: object, job: Callable[[], object]) -> None:
    """Do this behind what a CheckpointIO has still to write: in its own thread if it has one, else now."""
    later = _later(io)
    if later is None or later._executor is None:
        job()
    else:
        later._executor.submit(job)


def in_its_thread(io: object, job: Callable[[], T]) -> Future[T]:
    """Have a late writer's own thread do this, in its turn; what goes wrong in it is that writer's error."""
    later = _later(io)
    if later is None:
        raise ValueError(f"{io!r} does not write later: it has no thread")

    def guarded(job: Callable[[], T]) -> T:
        try:
            return job()
        except BaseException as error:
            later._error = error
            raise

    later._ensure_setup()
    assert later._executor is not None  # as of now
    return later._executor.submit(guarded, job)


def let_write(io: object, writer: Writer) -> None:
    """A late writer has this one's thread until its `teardown`, and not one that Python waits for without bound.

    One of the latter's kind is there where something was saved since the last run: what it has still to write, it does
    first.
    """
    later = _later(io)
    if later is None or isinstance(before := later._executor, Writer):
        return
    if before is not None:
        writer.submit(before.shutdown)
    later._executor = writer  # type: ignore[assignment]  # `submit` and `shutdown` are all it asks for


def being_written(io: object) -> str:
    """The file that a late writer is at; "" if that is not known."""
    later = _later(io)
    return "" if later is None else getattr(later._executor, "path", "")


def late_error(io: object) -> BaseException | None:
    """Why a CheckpointIO that writes later could not; it keeps that for ever."""
    later = _later(io)
    return None if later is None else later._error


def write_when(io: object, ready: Callable[[], bool], write: Callable[[], object]) -> None:
    """What `write` has a late writer write is written if `ready` says so, which is asked in the writer's own thread."""
    later = _later(io)
    if later is None:
        raise ValueError(f"{io!r} does not write later: write now")
    later._ensure_setup()
    executor = later._executor
    later._executor = _Gate(executor, ready)  # type: ignore[assignment]  # for this call: `submit` is all it asks for
    try:
        write()
    finally:
        later._executor = executor


@dataclass(frozen=True)
class _Gate:
    executor: Any
    ready: Callable[[], bool]

    def submit(self, job: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        return self.executor.submit(self._do, job, *args, **kwargs)

    def _do(self, job: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        return self.ready() and job(*args, **kwargs)


def with_inner(io: Any, kind: type[object], other: Callable[[], Any]) -> Any:
    """This CheckpointIO with another one in the place of a `kind`, also inside of Lightning's wrappers."""
    if type(io) is kind:
        return other()
    if isinstance(io, _WrappingCheckpointIO):
        io._checkpoint_io = with_inner(io.checkpoint_io, kind, other)
    return io


def _later(io: object) -> AsyncCheckpointIO | None:
    while io is not None:
        if isinstance(io, AsyncCheckpointIO):
            return io
        io = getattr(io, "checkpoint_io", None)
    return None
