"""Optimizer work beside backward: a parameter is stepped as soon as its gradient is whole, while others are computed.

    backward   | layer 3 | layer 2 | layer 1 |
    threads              | step 3  | step 2  | step 1 |          `finish` waits for the last one

Each parameter has an optimizer of its own, so what looks at all gradients at once (clipping by norm, a gradient scaler,
an exchange between ranks before the step) cannot be had with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer

from lightning_async.inner.tasks import Tasks
from lightning_async.inner.threads import Job, Threads


class OverlappedSteps:
    """Steps all parameters during backward.

    Args:
        make: Makes the optimizer of one parameter.
        parameters: All of them.
        threads: Where the steps are computed.
    """

    def __init__(
        self, make: Callable[[list[Tensor]], Optimizer], parameters: Iterable[Tensor], threads: Threads
    ) -> None:
        self._threads = threads
        self._optimizers = {p: make([p]) for p in parameters if p.requires_grad}
        self._hooks = [p.register_post_accumulate_grad_hook(self._begin) for p in self._optimizers]  # type: ignore[no-untyped-call]
        self._jobs: list[Job] = []

    def finish(self) -> None:
        """Wait until all parameters are stepped; to be called after each backward."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            self._threads.wait(job)

    def close(self) -> None:
        """Backward computes gradients only, from now on."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, parameter: Tensor) -> None:
        optimizer = self._optimizers[parameter]

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        self._jobs.append(self._threads.start([step], Tasks([float(parameter.numel())], [()])))
