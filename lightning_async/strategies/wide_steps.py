"""Half-precision weights are float32 where an optimizer steps them, and there only.

A closure that is called in the midst of that, with its two passes, hooks and clipping, finds them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_async.strategies import compat

Step = Callable[..., Any]
"""An optimizer's `step`: it may be given a closure."""


def widened(step: Step, widen: Callable[[], AbstractContextManager[None]]) -> Step:
    """The same step, inside of `widen()`; its closure outside of it."""

    def step_wide(closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        with ExitStack() as wide:

            def narrow_closure() -> Any:
                wide.close()
                result = closure() if closure is not None else None
                wide.enter_context(widen())
                return result

            wide.enter_context(widen())
            return step(**options) if closure is None else step(narrow_closure, **options)

    return step_wide


@contextmanager
def instead(optimizer: Optimizer, other: Callable[[Step], Step]) -> Iterator[None]:
    """Another step in the place of the optimizer's, which it is made of."""
    step, own = optimizer.step, "step" in vars(optimizer)
    optimizer.step = other(step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            optimizer.step = step  # type: ignore[method-assign]
        else:
            del optimizer.step


def widen_modes(
    optimizer: Optimizer, shown: object, leash: compat.Leash, widen: Callable[[], AbstractContextManager[None]]
) -> None:
    """Optimizers that show other weights for a while (schedule-free: `train()`, `eval()`) make them of their state,
    which is as wide as their steps: these are inside of `widen()`, too. `shown`: as Lightning shows the optimizer."""
    for name in ("train", "eval"):
        if callable(mode := getattr(optimizer, name, None)):
            for owner in (optimizer, shown):
                leash.wrap(owner, name, partial(_in_mode, mode, widen))


def _in_mode(mode: Step, widen: Callable[[], AbstractContextManager[None]], *arguments: Any, **options: Any) -> Any:
    with widen():
        return mode(*arguments, **options)


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """All that it may step."""
    return (p for group in optimizer.param_groups for p in group["params"])
