"""Signs for plain `DistributedDataParallel`: a communication hook with error feedback, bucket by bucket.

    from lightning_async.hooks import SignState, sign_hook
    model = DistributedDataParallel(model)
    model.register_comm_hook(SignState(), sign_hook)

    bucket 0   pack --all_to_all--.          (travels while backward goes on)
    bucket 1        pack --all_to_all--.
    last bucket          pack --all_to_all--> each serves its slice: mean, packed again --all_gather--> gradients

The second stage of all buckets runs in the hook of the last one, in the thread that runs backward: a collective that is
waited for in a future's callback can block the process group's own threads. What is not finite reaches all ranks as
NaN, as with `ddp`, and is not fed back.

What is held back is of the gradients' own unit, and is sent once: no gradient scaler (its scale changes, and a step
that it skips loses what was sent), one optimizer, a gradient for every parameter at every step.
"""

# Without `from __future__ import annotations`: `ddp` reads the hook's annotations and wants types, not their names.

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Sum, Values
from lightning_async.algorithms.sheets import Cut, Sheet, Span, cuts, fingerprint
from lightning_async.algorithms.signs import BITS, BLOCK

FIRST = 2
"""So many steps are not packed: after the first one `ddp` makes its buckets anew."""


class SignState:
    """What the hook keeps between steps, on one rank.

    Args:
        process_group: Who exchanges; None: the default group.
        block: Numbers of a block, which has one scale.
        min_size: Parameters with fewer numbers travel whole.
        first: So many steps travel whole at first, at least 2.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        block: int = BLOCK,
        min_size: int = 1024,
        first: int = FIRST,
    ) -> None:
        if not _integer(block) or block < BITS or block % BITS:
            raise ValueError(f"`block` must be a multiple of {BITS}, got {block!r}")
        if not _integer(min_size) or min_size < 0:
            raise ValueError(f"`min_size` must be an integer of at least 0, got {min_size!r}")
        if not _integer(first) or first < FIRST:
            raise ValueError(
                f"`first` must be an integer of at least {FIRST} (ddp makes its buckets anew after a step), "
                f"got {first!r}"
            )
        self.process_group, self.block, self.min_size, self.first = process_group, block, min_size, first
        self.step = 0
        self._buckets: dict[int, _Bucket] = {}
        self._waiting: list[tuple[_Bucket, dist.Work, torch.futures.Future[Tensor]]] = []
        self._saved: Mapping[int, Mapping[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The step, and what is not sent yet; each rank has its own."""
        return {"step": self.step, "rests": {i: bucket.rests() for i, bucket in self._buckets.items()} or self._saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the same model, ranks, buckets and knobs: the first steps travel whole again.

        (A new ddp makes its buckets anew after a step, and the rests are those of the buckets that it has then.)
        """
        self.step, self._saved = 0, state["rests"]
        self._buckets = {}

    def bucket(self, bucket: dist.GradBucket) -> "_Bucket":  # type: ignore[name-defined]
        """What is kept for a bucket."""
        found = self._buckets.get(bucket.index())
        if found is None or found.sizes != [p.numel() for p in bucket.parameters()]:
            found = self._buckets[bucket.index()] = _Bucket(bucket, self)
            found.load(self._saved.get(bucket.index(), {}))
        return found


def sign_hook(
    state: SignState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Exchange one bucket's gradients as signs and scales."""
    if state.step < state.first:
        state.step += int(bucket.is_last())
        return _whole(state, bucket.buffer())
    kept, future = state.bucket(bucket), _future(bucket.buffer())
    state._waiting.append((kept, kept.send(bucket.buffer()), future))
    if bucket.is_last():
        state.step += 1
        waiting, state._waiting = state._waiting, []
        for one, work, promised in waiting:
            work.wait()
            promised.set_result(one.serve())
    return future


class _Bucket:
    """The sheets and rests of one bucket."""

    def __init__(self, bucket: dist.GradBucket, state: SignState) -> None:  # type: ignore[name-defined]
        self._group, buffer = state.process_group, bucket.buffer()
        self._me, self._n = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.sizes = [p.numel() for p in bucket.parameters()]
        base = buffer.storage_offset()
        places = [(int(g.storage_offset() - base), g.numel()) for g in bucket.gradients()]
        spans = [Span(at, at + size, i) for i, (at, size) in enumerate(places)]
        self._dtype = buffer.dtype if buffer.dtype in (torch.float32, torch.float64) else torch.float32
        like = torch.empty(0, dtype=self._dtype, device=buffer.device)
        self._cuts = cuts(spans, parts=self._n, dtype=self._dtype, min_size=state.min_size, block=state.block)
        self._press = Press(like, block=state.block)
        self._gradient = like.new_zeros(buffer.numel())
        self._rest = Rest(torch.zeros_like(self._gradient))
        blocks = self._cuts[self._me].blocks
        first, last = (blocks[0].start, blocks[-1].stop) if blocks else (0, 0)
        self._served = Rest(like.new_zeros(last - first), base=first)
        self._lay_out(buffer.device)
        self._buffer: Tensor = buffer

    def _lay_out(self, device: torch.device) -> None:
        """One buffer for all that is sent, one for all that comes; sheets begin at whole numbers."""
        sizes, mine = [_padded(cut) for cut in self._cuts], self._cuts[self._me]
        longest = max(sizes)
        self._out, self._out_sizes = torch.zeros(sum(sizes), dtype=torch.uint8, device=device), sizes
        self._in, self._in_sizes = self._out.new_zeros(self._n * _padded(mine)), [_padded(mine)] * self._n
        self._mean, self._means = self._out.new_zeros(longest), self._out.new_zeros(self._n * longest)
        at = [sum(sizes[:i]) for i in range(self._n)]
        self._out_sheets = [_sheet(cut, self._out, start) for cut, start in zip(self._cuts, at, strict=True)]
        self._in_sheets = [_sheet(mine, self._in, i * _padded(mine)) for i in range(self._n)]
        self._mean_sheets = [_sheet(cut, self._means, i * longest) for i, cut in enumerate(self._cuts)]

    def send(self, buffer: Tensor) -> dist.Work:
        """Pack all slices and start the first stage."""
        self._buffer = buffer
        self._gradient.copy_(buffer)
        for sheet in self._out_sheets:
            self._press.pack(Values(self._gradient), self._rest, sheet, tells=True)
        work: dist.Work | None = dist.all_to_all_single(
            self._in, self._out, self._in_sizes, self._out_sizes, group=self._group, async_op=True
        )
        assert work is not None  # async_op
        return work

    def serve(self) -> Tensor:
        """The mean of this rank's slice, packed again; then all slices, in the place of the gradients."""
        cut = self._cuts[self._me]
        self._press.pack(Sum(self._in_sheets, 1 / self._n), self._served, _sheet(cut, self._mean, 0), tells=True)
        dist.all_gather(list(self._means.view(self._n, -1)), self._mean, group=self._group)
        gradient = Rest(self._gradient.zero_())
        for sheet in self._mean_sheets:
            self._press.add(Sum([sheet]), sheet.cut, gradient)
        self._buffer.copy_(self._gradient)
        return self._buffer

    def rests(self) -> dict[str, Any]:
        """What is not sent yet here, and at this rank's server."""
        rests = {"rest": self._rest.vector.cpu().clone(), "served": self._served.vector.cpu().clone()}
        return {"cuts": fingerprint(self._cuts), **rests}

    def load(self, rests: Mapping[str, Any]) -> None:
        """Go on from there, or raise where it is of other numbers."""
        mine = fingerprint(self._cuts)
        if rests.get("cuts", mine) != mine:  # older states did not say
            raise ValueError(
                "what is held back is of other buckets: go on with the model, number of ranks, `bucket_cap_mb`, "
                "`block` and `min_size` that were saved, or without this state"
            )
        for name, kept in (("rest", self._rest), ("served", self._served)):
            if name in rests:
                kept.vector.copy_(rests[name])


def _padded(cut: Cut) -> int:
    return -(-cut.nbytes // 8) * 8


def _sheet(cut: Cut, buffer: Tensor, start: int) -> Sheet:
    return Sheet(cut, buffer[start : start + cut.nbytes])


def _whole(state: SignState, buffer: Tensor) -> torch.futures.Future[Tensor]:
    n = dist.get_world_size(state.process_group)
    work = dist.all_reduce(buffer.div_(n), group=state.process_group, async_op=True)
    assert work is not None  # async_op
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def _future(buffer: Tensor) -> torch.futures.Future[Tensor]:
    devices: list[int | str | torch.device] | None = [buffer.device] if buffer.device.type == "cuda" else None
    return torch.futures.Future(devices=devices)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
