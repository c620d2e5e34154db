"""The inner layer of a rank: for the time of a fit, its convolutions compute in tiles on threads of their own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_async.inner.threads import Threads
from lightning_async.inner.tiles import tile


class InnerLayer:
    """Puts a module on threads, and takes it off again.

    Args:
        count: How many; None: the module is left as it is.
    """

    def __init__(self, count: int | None) -> None:
        self._threads = None if count is None else Threads(count)
        self._put_back: Callable[[], None] | None = None

    def begin(self, module: nn.Module) -> None:
        """A fit begins."""
        if self._threads is not None and self._put_back is None:
            self._put_back = tile(module, self._threads)

    def end(self) -> None:
        """It is over: plain convolutions, and no threads. Idempotent."""
        if self._threads is not None and self._put_back is not None:
            self._put_back()
            self._threads.close()
            self._put_back = None
