"""A gradient belongs to the weights its batch was run forward with, also when the optimizer has stepped since.

    forward of batch b        the graph keeps what it needs: activations, and weights as they are now
    steps of the optimizer    each takes new storage for the weights; graphs keep the old one
    backward of batch b       meets exactly the weights of its forward pass

    "stash"      as drawn: the exact gradient of a late batch
    "recompute"  only the inputs are kept, and backward runs the blocks once more with the weights of now: no graphs
                 and no old weights in memory, a third more arithmetic, another (also late) gradient
    "hybrid"     the graph is kept and the weights change under it: old activations, new weights. What the code of the
                 FDG paper does; here to reproduce its results

Nobody counts versions: old weights live as long as a graph that needs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Semantics = Literal["stash", "recompute", "hybrid"]
Saved = tuple[Tensor, int | None]


@dataclass(slots=True)
class Held:
    """A batch between its two passes: where it entered, what came out, and how to run it again."""

    batch: int
    entered: Tensor | None
    out: Tensor | None
    again: Callable[[], Tensor] | None = None
    step: int = 0

    @property
    def has_graph(self) -> bool:
        """Whether old weights may be needed for it."""
        return any(end is not None and end.grad_fn is not None for end in (self.entered, self.out))


class Stash:
    """The batches of one stage that went forward and not yet backward, oldest first.

    Args:
        parameters: The weights that the optimizer of this stage changes.
        semantics: Which weights a late backward pass meets.
    """

    def __init__(self, parameters: Iterable[Tensor], semantics: Semantics = "stash") -> None:
        if semantics not in get_args(Semantics):
            raise ValueError(f"`semantics` must be 'stash', 'recompute' or 'hybrid', got {semantics!r}")
        self.semantics = semantics
        self.most = 0
        self._parameters = list(parameters)
        self._held: deque[Held] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Graphs made in here outlive the optimizer's steps."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}

        def pack(tensor: Tensor) -> Saved:
            ours = tensor.untyped_storage().data_ptr() in own
            return tensor.detach(), None if ours else tensor._version  # a parameter itself would follow its new storage

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield

    def push(self, held: Held) -> None:
        """A batch went forward."""
        self._held.append(held)
        self.most = max(self.most, len(self._held))

    def pop(self, batch: int) -> Held:
        """Take the oldest batch out."""
        held = self.oldest(batch)
        self._held.popleft()
        return held

    def oldest(self, batch: int) -> Held:
        """The oldest batch, which must be this one: links keep their order, and so do batches."""
        if not self._held or self._held[0].batch != batch:
            oldest = self._held[0].batch if self._held else "none"
            raise RuntimeError(f"the gradient of batch {batch} came, but the oldest batch in the stash is {oldest}")
        return self._held[0]

    def before_step(self) -> None:
        """The optimizer is about to change the weights in place: leave the old storage to the graphs that hold it."""
        if self.semantics != "hybrid" and any(held.has_graph for held in self._held):
            for parameter in self._parameters:
                parameter.data = parameter.data.clone()

    def clear(self) -> None:
        """Forget what is held: the run is over."""
        self._held.clear()


def _unpack(saved: Saved) -> Tensor:
    """Torch leaves its own check for changes in place to those who pack; weights may change, nothing else may."""
    tensor, version = saved
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "one of the tensors needed for a backward pass has been changed by an in-place operation: replace that "
            f"operation (shape {tuple(tensor.shape)}, {version} changes when it was kept, {tensor._version} now)"
        )
    return tensor
