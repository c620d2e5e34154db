"""A stage runs its blocks forward, keeps what is needed, and runs them backward when the gradient of that batch comes.

    x ---> [ blocks ] ---> out          what leaves is cut off from the graph: each stage has graphs of its own
            graph kept
    gx <-- [ blocks ] <--- g * factor   gx goes on to the stage before, already shrunk: factors multiply on the way up

No messages and no clock in here: the same object works in one process and at the ends of links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_async.fresh import Fresh, nothing_fresh
from lightning_async.pipeline import schedule
from lightning_async.pipeline.curvature import Curvature, Tell
from lightning_async.pipeline.stash import Held, Semantics, Stash

Compute = Callable[[Tensor], Tensor]


class Stage:
    """One stage of a pipeline.

    Args:
        index: Which one, from 0.
        stages: How many there are.
        parameters: The weights that its optimizer changes.
        buffers: What its forward pass may change (BatchNorm's statistics): changed once a batch, also if it runs twice.
        semantics: Which weights a late backward pass meets.
        reseed: Sets the random generators for the blocks' pass of a batch, the same each time; None: they go on.
    """

    def __init__(
        self,
        index: int,
        stages: int,
        parameters: Iterable[Tensor],
        *,
        buffers: Iterable[Tensor] = (),
        semantics: Semantics = "stash",
        reseed: Callable[[int], object] | None = None,
    ) -> None:
        self.index, self.stages = index, stages
        self.parameters, self._buffers = list(parameters), list(buffers)
        self.stash = Stash(self.parameters, semantics)
        self._reseed = reseed
        self._sums: list[Tensor | None] = [None] * len(self.parameters)
        self._curvature: Curvature | None = None

    @property
    def delay(self) -> int:
        """Batches between a forward pass and its backward pass."""
        return schedule.delay(self.index, self.stages)

    @property
    def last(self) -> bool:
        """Whether the loss is computed behind this one."""
        return self.index == self.stages - 1

    def forward(self, batch: int, x: Tensor, compute: Compute, *, step: int = 0) -> Tensor:
        """Run a batch forward and keep what its gradient will need. Returns what the next stage gets.

        Args:
            batch: Its number.
            x: What the stage before sent, or what the user's code made for the first stage.
            compute: The blocks, one after the other.
            step: How many updates this stage has seen.
        """
        if self._curvature is not None:
            self._curvature.forward(batch)
        entered = x.detach().requires_grad_() if self.index else x
        if self.stash.semantics == "recompute":
            with torch.no_grad():
                out = self._run(batch, entered, compute)
            self.stash.push(Held(batch, entered, None, lambda: self._run_again(batch, entered, compute), step))
        else:
            with torch.enable_grad(), self.stash.keeping():
                out = self._run(batch, entered, compute)
            self.stash.push(Held(batch, entered, out, None, step))
        return out.detach()

    def enter(self, batch: int, x: Tensor, compute: Compute) -> tuple[Tensor, Tensor]:
        """The last stage: (where the gradient for the stage before will be, what the loss is computed from)."""
        entered = x.detach().requires_grad_() if self.index else x
        with torch.enable_grad():
            return entered, self._run(batch, entered, compute)

    def evaluate(self, batch: int, x: Tensor, compute: Compute) -> Tensor:
        """A pass without a way back."""
        with torch.no_grad():
            return self._run(batch, x, compute)

    def backward(self, batch: int, gradient: Tensor, factor: float = 1.0) -> Tensor | None:
        """Run the oldest batch backward. Returns the gradient for the stage before, if there is one."""
        held = self.stash.pop(batch)
        looked = self._curvature.look(self._sums) if self._curvature is not None else None
        if held.again is None:
            self._run_back(held.out, gradient, factor)
        else:
            buffers = [buffer.clone() for buffer in self._buffers]
            self._run_back(held.again(), gradient, factor)
            with torch.no_grad():  # they have seen this batch once already
                for buffer, old in zip(self._buffers, buffers, strict=True):
                    buffer.copy_(old)
        if self._curvature is not None and looked is not None:
            self._curvature.backward(batch, looked, self._sums, factor)
        return gradient_of(held.entered) if self.index and held.entered is not None else None

    def _run_back(self, out: Tensor | None, gradient: Tensor, factor: float) -> None:
        if out is None or not out.requires_grad:  # all of it is frozen
            return
        gradient = gradient.to(out.dtype)
        self._swap_sums()
        torch.autograd.backward(out, gradient if factor == 1.0 else gradient * factor)
        self._swap_sums()

    def launched(self, batch: int) -> int:
        """How many updates this stage had seen when the oldest batch went forward."""
        return self.stash.oldest(batch).step

    def before_step(self) -> None:
        """The optimizer is about to step: it finds the sum of the gradients since its last step."""
        self.stash.before_step()
        self._swap_sums()

    def after_step(self) -> None:
        """It has stepped: the next sum begins with nothing."""
        for parameter in self.parameters:
            parameter.grad = None
        self._sums = [None] * len(self.parameters)

    def added_up(self) -> list[Tensor | None]:
        """The gradients that were added up by now to a step still to come. On the last stage they lie in `.grad`."""
        return [parameter.grad for parameter in self.parameters] if self.last else list(self._sums)

    def go_on_with(self, gradients: list[Tensor | None]) -> None:
        """The reverse of `added_up`."""
        if not self.last:
            self._sums = list(gradients)
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def watch_curvature(self, tell: Tell) -> bool:
        """Tell from now on how gradients turn along the way of the weights. False: these do not show it."""
        if self.last or self.stash.semantics != "stash":
            return False
        self._curvature = Curvature(self.parameters, self.delay - 1, tell)
        return True

    @property
    def fresh(self) -> Fresh:
        """Whom to ask how well late gradients agree with fresh ones."""
        return nothing_fresh if self.last or self.stash.semantics != "stash" else self._alignment

    def _alignment(self) -> float | None:
        if self._curvature is None:
            self.watch_curvature(lambda turned, went: None)
        return None if self._curvature is None else self._curvature.alignment()

    def drained(self) -> None:
        """No batch is on its way any more."""
        if self._curvature is not None:
            self._curvature.clear()

    def clear(self) -> None:
        """The run is over."""
        self.stash.clear()
        self.after_step()
        self._curvature = None

    def _swap_sums(self) -> None:
        """Sums of gradients stay out of `.grad` between passes, where a validation would clear them."""
        for at, parameter in enumerate(self.parameters):
            parameter.grad, self._sums[at] = self._sums[at], parameter.grad

    def _run(self, batch: int, x: Tensor, compute: Compute) -> Tensor:
        if self._reseed is not None:
            self._reseed(batch)
        before = x._version
        try:
            out = compute(x.view_as(x))
        except RuntimeError as error:
            if "leaf Variable that requires grad" in str(error):
                raise ValueError(self._in_place) from error
            raise
        if x._version != before:
            raise ValueError(self._in_place)
        return self._checked(out)

    def _run_again(self, batch: int, x: Tensor, compute: Compute) -> Tensor:
        """The weights of now, the random numbers of then."""
        with torch.enable_grad(), self.stash.keeping():
            return self._run(batch, x, compute)

    @property
    def _in_place(self) -> str:
        return (
            f"the first block of stage {self.index} changes what it gets in place: another stage, or its own backward "
            "pass, still needs that; use `inplace=False`, or cut the network elsewhere"
        )

    def _checked(self, out: Tensor) -> Tensor:
        if self.last or (isinstance(out, Tensor) and out.is_floating_point()):
            return out
        what = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"stage {self.index} ends with {what}, but what goes from stage to stage must be one floating-point tensor"
            ": cut the network elsewhere, or let the block before the cut return one tensor"
        )


def gradient_of(entered: Tensor) -> Tensor:
    """What goes back to the stage before; zeros where nothing of the loss depends on what it sent."""
    return entered.grad if entered.grad is not None else torch.zeros_like(entered)
