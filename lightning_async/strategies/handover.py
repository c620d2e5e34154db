"""The call of the pipelined module is where the stages part: the first one's code ends there, the last one's goes on.

    training_step(batch)        first stage             middle       last stage
      x = prepare(batch)        runs                                 runs (the same random numbers)
      y = self.net(x)           takes x, stops here     relays       gets what arrived, as y
      loss = f(y, batch)                                             runs
      return loss                                                    runs

`stages` names an `nn.Sequential`, whose call it is; or an `nn.ModuleList` whose modules are called in order, or else
`configure_stages()` returns the list: then the call of the first one gives everything, and the others give back
what they get. A step must call it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_async.strategies.compat import Leash

Answer = Callable[[Tensor], Tensor]


class HandedOver(BaseException):
    """The first stage has handed over its input: the user's code stops here. Not an `Exception`: none may catch it."""


class Handover:
    """Finds the pipelined module, and answers its call.

    Attributes:
        name: What the user calls it.
        blocks: Its blocks, in order.
    """

    def __init__(self, module: LightningModule, stages: str | None) -> None:
        self.name, self.blocks, self._chained = _find(module, stages)
        self._answer: Answer | None = None
        self._calls = 0
        self._inside = False

    def take(self, leash: Leash) -> None:
        """Stand in the place of the call for the time of a run."""
        owner = self._chained or self.blocks[0]
        self._forward = leash.wrap(owner, "forward", self._called)
        if self._chained is None:
            for block in self.blocks[1:]:
                self._pass_through(leash, block)

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """In here the call is answered; it must come once."""
        self._answer, self._calls = answer, 0
        try:
            yield
        finally:
            self._answer = None
        if self._calls == 0:
            raise MisconfigurationException(
                f"a step has not called `{self.name}`: the stages part at its call, so each step must call it once"
            )

    def as_they_are(self) -> list[nn.Module]:
        """The blocks, each to be called by itself."""
        return [_Alone(self, block) for block in self.blocks]

    def run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        """The blocks as they are, one after the other."""
        before, self._inside = self._inside, True
        try:
            for block in blocks:
                x = block(x)
            return x
        finally:
            self._inside = before

    def _called(self, *arguments: Any, **named: Any) -> Any:
        if self._inside:
            return self._forward(*arguments, **named)
        if self._answer is None:
            self._refuse_outside()
        self._calls += 1
        if self._calls > 1:
            raise MisconfigurationException(
                f"a step calls `{self.name}` twice: each batch goes through the stages once; put both inputs "
                "into one batch, or call the second network by another name outside of the stages"
            )
        if named or len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            got = [type(argument).__name__ for argument in arguments] + [f"{key}=..." for key in named]
            raise MisconfigurationException(
                f"`{self.name}` must be called with one tensor, got ({', '.join(got)}): what else the blocks need has "
                "to travel in that tensor"
            )
        return self._answer(arguments[0])

    def _pass_through(self, leash: Leash, block: nn.Module) -> None:
        def forward(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return original(*arguments, **named)
            if self._answer is None:
                self._refuse_outside()
            return arguments[0]

        original = leash.wrap(block, "forward", forward)

    def _refuse_outside(self) -> NoReturn:
        raise MisconfigurationException(
            f"`{self.name}` was called outside of a step: its layers are spread over the ranks, and only in "
            "`training_step`, `validation_step`, `test_step` and `predict_step` do all of them take part"
        )


class _Alone(nn.Module):
    """One block, whose call is not the user's."""

    def __init__(self, handover: Handover, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._handover = handover

    def forward(self, x: Tensor) -> Tensor:
        return self._handover.run([self.block], x)


def _find(module: LightningModule, stages: str | None) -> tuple[str, list[nn.Module], nn.Module | None]:
    """(name, blocks, the module whose call it is or None for a chain of calls)."""
    if stages is None:
        configure = getattr(module, "configure_stages", None)
        if not callable(configure):
            raise MisconfigurationException(
                "say where the stages are: `DelayedPipelineStrategy(stages='net')` names an `nn.Sequential` of "
                "your module; or let the module have a method `configure_stages()` that returns the list of its blocks"
            )
        return "configure_stages()", _checked("configure_stages()", list(configure())), None
    try:
        found = module.get_submodule(stages)
    except AttributeError:
        names = ", ".join(repr(n) for n, m in module.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList)))
        raise MisconfigurationException(
            f"`stages={stages!r}` names nothing in {type(module).__name__}; it has these sequences: {names or 'none'}"
        ) from None
    if isinstance(found, nn.ModuleList):
        return stages, _checked(stages, list(found)), None
    if isinstance(found, nn.Sequential) and type(found).forward is nn.Sequential.forward:
        return stages, _checked(stages, list(found)), found
    raise MisconfigurationException(
        f"`stages={stages!r}` must name an `nn.Sequential` or an `nn.ModuleList` whose modules are called in order, got"
        f" {type(found).__name__}; or let the module have a method `configure_stages()`"
    )


def _checked(name: str, blocks: list[Any]) -> list[nn.Module]:
    if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        raise MisconfigurationException(f"`{name}` must hold modules, got {[type(b).__name__ for b in blocks]}")
    if len({id(block) for block in blocks}) < len(blocks):
        raise MisconfigurationException(f"`{name}` holds the same module twice: weights cannot live in two places")
    return blocks
