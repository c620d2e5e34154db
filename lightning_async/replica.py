"""A replica is this rank's trainable weights as one flat vector: reads copy, writes ADD.

There is no `set_weights`: the rank may have taken steps while a message travelled, and folding must not erase them
(`go_to` is for those whose ranks wait for each other).
The parameters are views of the flat vector, so optimizers, autograd and state dicts see every shift at no cost. The
vector has the widest of their dtypes, at least float32; parameters that are narrower hold its rounding, and are its
parts while an optimizer steps them (`rounding.py`).
Shifts happen between optimizer steps, by the training thread (a write between forward and backward raises no error
and is silently wrong).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_async.rounding import Rounded

ALIGNMENT = 64  # bytes; each parameter starts on a cache line
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Replica:
    """The trainable parameters of one rank as one flat vector.

    Attributes:
        moves: How often it was moved by what came from elsewhere, so not by an optimizer.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        _check(self._parameters)
        dtype = reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        step = max(1, ALIGNMENT // dtype.itemsize)
        ends = [0]
        for p in self._parameters:
            ends.append(ends[-1] + -(-p.numel() // step) * step)
        self._flat = torch.zeros(ends[-1], dtype=dtype, device=self._parameters[0].device)
        starts = zip(self._parameters, ends[:-1], strict=True)
        parts = [(p, self._flat[at : at + p.numel()].view(p.shape)) for p, at in starts]
        self._places = tuple((p, at) for p, at in zip(self._parameters, ends[:-1], strict=True))
        self._views = [(p, part, part.data_ptr()) for p, part in parts if p.dtype == dtype]
        self._rounded = Rounded((p, part) for p, part in parts if p.dtype != dtype)
        self._own: Tensor | None = None
        self.moves = 0
        self._adopt_views()

    @property
    def numel(self) -> int:
        """Length of the flat vector (with the few elements of padding between parameters, always zero)."""
        return self._flat.numel()

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._flat.device

    @property
    def flat(self) -> Tensor:
        """The live vector, for those who only read it and copy at once. It changes at the next step."""
        self.check()
        return self._flat

    def weights(self) -> Tensor:
        """A copy of the weights."""
        return self.flat.clone()

    @torch.no_grad()
    def shift(self, correction: Tensor, factor: float = 1.0, *, at: int = 0) -> None:
        """Add `factor * correction` to the weights, from element `at` on."""
        self.moves += 1
        self.flat[at : at + correction.numel()].add_(correction, alpha=factor)
        self._rounded.show()

    @torch.no_grad()
    def mend(self, weights: Tensor, *, at: int = 0) -> None:
        """Put `weights` where own ones are not finite: no sum would make them so again."""
        self.moves += 1
        part = self.flat[at : at + weights.numel()]
        part.copy_(torch.where(torch.isfinite(part), part, weights))
        self._rounded.show()

    @property
    def places(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """The parameters in their order, each with where it begins in the flat vector."""
        return self._places

    @torch.no_grad()
    def go_to(self, weights: Tensor, *, at: int = 0) -> None:
        """Be `weights` from element `at` on, to the bit. For methods whose ranks move by nothing else: in lock-step, or
        where a server takes the steps. Nothing is under way that this would erase."""
        self.moves += 1
        self.flat[at : at + weights.numel()].copy_(weights)
        self._rounded.show()

    def check(self) -> None:
        """Take in what others did to the parameters: steps of narrow ones, and `p.data = ...`, which breaks a view."""
        for p, _, address in self._views:
            if p.data_ptr() != address:
                self._adopt_views()
                break
        self._rounded.carry_over()

    def widened(self, parameters: Iterable[Tensor], *, gradients: bool = True) -> AbstractContextManager[None]:
        """A block in which those `parameters` that are narrow are their parts of the vector (`Rounded.widened`)."""
        return self._rounded.widened(parameters, gradients=gradients)

    @property
    def narrow(self) -> bool:
        """Whether there are parameters that are narrower than the flat vector."""
        return bool(self._rounded)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Of a vector like the flat one, what belongs to each parameter, in their order."""
        return [vector[at : at + p.numel()] for p, at in self._places]

    def carried(self, vector: Tensor, old: Replica) -> Tensor:
        """A vector like the flat one of `old` as one like this one's: 0 where a parameter is not in both."""
        of_old = {id(p): part for (p, _), part in zip(old.places, old.parts(vector), strict=True)}
        carried = torch.zeros_like(self._flat)
        for (p, _), part in zip(self._places, self.parts(carried), strict=True):
            if id(p) in of_old:
                part.copy_(of_old[id(p)])
        return carried

    @torch.no_grad()
    def take_over(self, vector: Tensor, old: Replica) -> None:
        """Be `vector` where a parameter is in `old` too, whose flat one it is like: narrow ones show no more than its
        rounding."""
        mine = {id(p): part for (p, _), part in zip(self._places, self.parts(self.flat), strict=True)}
        for (p, _), part in zip(old.places, old.parts(vector), strict=True):
            if id(p) in mine:
                mine[id(p)].copy_(part)
        self._rounded.show()

    def holds(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the trainable ones among `parameters` are those that this replica was made of."""
        return {id(p) for p in parameters if p.requires_grad} == {id(p) for p in self._parameters}

    def let_go(self) -> None:
        """This replica is at its end: parameters that are frozen now no longer keep its vector alive."""
        for p, _, _ in self._views:
            if not p.requires_grad:
                p.data = p.data.clone()

    # -- for evaluation: other weights stand in for a while, then the own ones come back to the bit --------------------

    @property
    def away(self) -> bool:
        """Whether other weights stand in for this rank's own."""
        return self._own is not None

    @property
    def own(self) -> Tensor:
        """This rank's own weights, also while others stand in, for those who only read them and copy at once."""
        return self.flat if self._own is None else self._own

    def keep_aside(self, own: Tensor) -> None:
        """Let the weights that are shown now stand in for `own`, which come back later (a resumed run)."""
        if own.shape != self._flat.shape:
            raise ValueError(f"the weights to keep aside have {own.numel()} elements, this replica {self.numel}")
        self._own = own.detach().to(self._flat, copy=True)

    @torch.no_grad()
    def stand_in(self, weights: Tensor) -> None:
        """Show `weights` (the consensus) in the parameters, and keep this rank's own aside."""
        if self._own is None:
            self._own = self.weights()
        self.flat.copy_(weights)
        self._rounded.show()

    @torch.no_grad()
    def come_back(self) -> None:
        """Show this rank's own weights again, to the bit."""
        if self._own is not None:
            self.flat.copy_(self._own)
            self._rounded.show()
            self._own = None

    def stay(self) -> None:
        """The weights that stand in become this rank's own."""
        self._own = None

    @torch.no_grad()
    def _adopt_views(self) -> None:
        for p, part, _ in self._views:
            if (p.dtype, p.device) != (part.dtype, part.device):
                raise ValueError(
                    f"a trainable parameter was {part.dtype} on {part.device} when `fit` began, and is {p.dtype} on "
                    f"{p.device} now: convert or move the module before `fit`"
                )
            part.copy_(p)
            p.data = part


def _check(parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError(
            "the module has no trainable parameters: there is nothing to exchange, train it with strategy='auto'"
        )
    for p in parameters:
        if p.device != parameters[0].device:
            raise ValueError(
                f"all trainable parameters must live on one device, found {parameters[0].device} and {p.device}: move "
                f"them to one, or freeze those that stay"
            )
        if p.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"trainable parameters must have one of the dtypes {known}, found {p.dtype}: freeze it")
