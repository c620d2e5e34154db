"""The ranks of one member take one step: each with the mean of all their gradients, the same bits on all.

    backward on each rank    | layer 4 | layer 3 | layer 2 | layer 1 |
    average among siblings             | bucket  |       bucket      | which are there |  -> clipping, optimizer

Beside backward a bucket of parameters leaves when the gradients of all of them are whole, the last layers first, in the
same order on all ranks; nobody waits before backward is over. Then what is missing follows: parameters without a
gradient, and which have one. A parameter counts as used if it is on any rank: then the others bring zeros. On none of
them it has no gradient afterwards either, and the optimizer leaves it alone. If a gradient changed after it had left,
on whichever rank, all bring theirs anew.

Who adds up an element depends on its place alone, not on the buckets: sums are the same to the bit with any buckets.
Gradients that were averaged before stay as they are, since a mean of means is that mean: so it does not matter how
often a gradient that is not used up comes by here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_async.replica import Replica
from lightning_async.transport.mail import Wait

Average = Callable[[Tensor, int, int], Wait[Tensor]]
"""Of a part of a vector on each rank of the member makes the mean, the same bits on all."""
BUCKET = 1 << 22
"""Bytes from which on parameters leave together."""


@dataclass
class _Bucket:
    """Neighbours in the vector; `missing`: how many of their gradients have not come."""

    begin: int
    end: int
    parameters: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0


@dataclass
class _Step:
    """One step under way; `work` is what is done beside backward, and to be ended behind it."""

    buckets: list[_Bucket]
    work: Wait[None]
    put: dict[nn.Parameter, tuple[Tensor, int]] = field(default_factory=dict)


class CommonStep:
    """One rank's gradients on their way through the member: as long as the weights where these are, and, if that is not
    host memory, once more there."""

    def __init__(self) -> None:
        self._vector = self._host = torch.empty(0)
        self._step: _Step | None = None

    @contextmanager
    def beside(self, replica: Replica, average: Average) -> Iterator[None]:
        """Backward in this block, on a CPU: what is whole leaves while the rest is computed. `average` is to follow."""
        step = self._step = self._begun(replica, average)
        bucket_of = {parameter: bucket for bucket in step.buckets for parameter in bucket.parameters}
        places = dict(replica.places)

        @torch.no_grad()
        def whole(parameter: nn.Parameter) -> None:
            if parameter not in step.put:  # else it changed since it left, which is found when backward is over
                assert parameter.grad is not None  # it was just added to
                self._put(parameter, places[parameter])
                step.put[parameter] = parameter.grad, parameter.grad._version
                bucket_of[parameter].missing -= 1
            next(step.work, None)

        hooks = [p.register_post_accumulate_grad_hook(whole) for p in places if p.requires_grad]  # type: ignore[no-untyped-call]
        try:
            yield
        except BaseException:
            self._step = None
            raise
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def average(self, replica: Replica, average: Average) -> Wait[None]:
        """Give every parameter the mean of its gradients on all ranks of the member."""
        step, self._step = self._step or self._begun(replica, average), None
        used = yield from self._averaged(step, replica, average)
        if math.inf in used:
            used = yield from self._averaged(self._begun(replica, average), replica, average)
        mean = self._vector.copy_(self._host)
        for (parameter, at), share in zip(replica.places, used, strict=True):
            if not share:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(mean[at : at + parameter.numel()].view_as(parameter))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _begun(self, replica: Replica, average: Average) -> _Step:
        length, like = replica.numel + len(replica.places), replica.flat
        if (self._vector.numel(), self._vector.dtype, self._vector.device) != (length, like.dtype, like.device):
            self._vector = torch.zeros(length, dtype=like.dtype, device=like.device)
            self._host = self._vector if like.device.type == "cpu" else torch.zeros(length, dtype=like.dtype)
        buckets = _buckets(replica, BUCKET // like.element_size())
        if len(buckets) == 1:  # leaves with the numbers, when backward is over
            buckets[0].end = length
            buckets[0].missing += 1
        return _Step(buckets, self._leave(buckets, average))

    def _leave(self, buckets: list[_Bucket], average: Average) -> Wait[None]:
        """One bucket after the other."""
        for bucket in buckets:
            while bucket.missing:
                yield "this rank's own gradients"
            yield from average(self._host, bucket.begin, bucket.end)

    def _averaged(self, step: _Step, replica: Replica, average: Average) -> Wait[list[float]]:
        """All that has not left, and behind the gradients a number for each: on which part of the ranks it is there."""
        numbers = []
        for parameter, at in replica.places:
            left = step.put.get(parameter)
            if left is None:
                self._put(parameter, at)
                numbers.append(float(parameter.grad is not None))
            else:
                same = parameter.grad is left[0] and left[0]._version == left[1]
                numbers.append(1.0 if same else math.inf)
        self._vector[replica.numel :] = torch.tensor(numbers, dtype=self._vector.dtype)
        self._host.copy_(self._vector)
        for bucket in step.buckets:
            bucket.missing = 0
        yield from step.work
        if len(step.buckets) > 1:
            yield from average(self._host, replica.numel, self._host.numel())
        shares: list[float] = self._host[replica.numel :].tolist()
        return shares

    def _put(self, parameter: nn.Parameter, at: int) -> None:
        place = self._vector[at : at + parameter.numel()]
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(_dense(parameter.grad).reshape(-1))


def _buckets(replica: Replica, numel: int) -> list[_Bucket]:
    """The parameters in the order in which backward usually comes by, in pieces of at least `numel`."""
    buckets: list[_Bucket] = []
    end = replica.numel
    for parameter, at in reversed(replica.places):
        if not buckets or buckets[-1].end - buckets[-1].begin >= numel:
            buckets.append(_Bucket(at, end))
        buckets[-1].begin = end = at
        buckets[-1].parameters.append(parameter)
        buckets[-1].missing += 1
    return buckets


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        raise TypeError(
            "a gradient is sparse, and the ranks of one member average dense ones: make the layer with `sparse=False`, "
            "or leave `inner` out"
        )
    return gradient
