"""A replica is this rank's trainable weights as one flat vector: reads copy, writes ADD.

There is no `set_weights`: the rank may have taken steps while a message travelled, and folding must not erase them.
The parameters are views of the flat vector, so optimizers, autograd and state dicts see every shift at no cost.
Shifts happen between optimizer steps, by the training thread (a write between forward and backward raises no error
and is silently wrong).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; each parameter starts on a cache line


class Replica:
    """The trainable parameters of one rank as one flat vector."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        _check(self._parameters)
        first = self._parameters[0]
        step = max(1, ALIGNMENT // first.element_size())
        self._offsets: list[int] = []
        end = 0
        for p in self._parameters:
            self._offsets.append(end)
            end += -(-p.numel() // step) * step
        self._flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        self._own: Tensor | None = None
        self._adopt_views()

    @property
    def numel(self) -> int:
        """Length of the flat vector (with the few elements of padding between parameters, always zero)."""
        return self._flat.numel()

    @property
    def flat(self) -> Tensor:
        """The live vector, for those who only read it and copy at once. It changes at the next step."""
        self.check()
        return self._flat

    def weights(self) -> Tensor:
        """A copy of the weights."""
        return self.flat.clone()

    @torch.no_grad()
    def shift(self, correction: Tensor, factor: float = 1.0) -> None:
        """Add `factor * correction` to the weights."""
        self.flat.add_(correction, alpha=factor)

    def check(self) -> None:
        """Make the parameters views of the flat vector again if something (`p.data = ...`) broke that."""
        size, base = self._flat.element_size(), self._flat.data_ptr()
        pairs = zip(self._parameters, self._offsets, strict=True)
        if any(p.data_ptr() != base + offset * size for p, offset in pairs):
            _check(self._parameters, like=self._flat)
            self._adopt_views()

    def check_complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """Refuse a set of trainable parameters that is not the one this replica was made of."""
        if {id(p) for p in parameters if p.requires_grad} != {id(p) for p in self._parameters}:
            raise RuntimeError(
                "the set of trainable parameters has changed during the run (freezing or unfreezing), and what is "
                "exchanged would no longer be what is trained: freeze before `fit`, and call `fit` once for each phase"
            )

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

    @torch.no_grad()
    def come_back(self) -> None:
        """Show this rank's own weights again, to the bit."""
        if self._own is not None:
            self.flat.copy_(self._own)
            self._own = None

    def stay(self) -> None:
        """The weights that stand in become this rank's own."""
        self._own = None

    @torch.no_grad()
    def _adopt_views(self) -> None:
        for p, offset in zip(self._parameters, self._offsets, strict=True):
            view = self._flat[offset : offset + p.numel()].view(p.shape)
            view.copy_(p)
            p.data = view


def _check(parameters: list[nn.Parameter], like: Tensor | None = None) -> None:
    if not parameters:
        raise ValueError(
            "the module has no trainable parameters: there is nothing to exchange, train it with strategy='auto'"
        )
    like = parameters[0] if like is None else like
    for p in parameters:
        if p.device != like.device:
            raise ValueError(f"all trainable parameters must live on one device, found {like.device} and {p.device}")
        if p.dtype != like.dtype:
            raise ValueError(f"all trainable parameters must have one dtype, found {like.dtype} and {p.dtype}")
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"trainable parameters must be float32 or float64, found {p.dtype}: small corrections vanish in half "
                "precision; use `precision='bf16-mixed'`, which keeps float32 weights"
            )
