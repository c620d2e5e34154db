"""The server of a slice whose rounds may close without the late: it alone decides who was, so weights are the same.

    PART of m     counts in the round that is open when it comes: once, and never not
    PASS r of m   m has nothing for the rounds up to r                    (r = FOR_GOOD: until all have met)
    ASK r of m    m has waited for round r long enough: it closes without the late, unless one of them would be so for
                  more than `max_skip` rounds in a row
      --> MEAN    to all, when a round closes: the mean over all n ranks, packed again; marked for those who are in it
      --> DONE    to all, when all pass for good: how many rounds there were. The next one is number 1

It has no clock: who waits has one. So it is a function of its letters in their order, and runs beside the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Sum
from lightning_async.algorithms.sheets import Cut
from lightning_async.algorithms.sign_exchange import MEAN, PART
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Message

PASS, ASK, DONE = FIRST_FREE_KIND + 3, FIRST_FREE_KIND + 4, FIRST_FREE_KIND + 5
SERVED = (PART, PASS, ASK)
FOR_GOOD = 1 << 40


class SliceServer:
    """One slice.

    Args:
        me: Whose service this is; it is told what the packing missed when all have met.
        cut: The slice.
        members: All ranks.
        max_skip: Rounds in a row that close without a rank, at most.
        press: Makes what packs, for numbers like these.
        rest: What an earlier packing missed.
    """

    def __init__(
        self,
        me: int,
        cut: Cut,
        members: Sequence[int],
        *,
        max_skip: int,
        press: Callable[[Tensor], Press],
        rest: Tensor | None = None,
    ) -> None:
        self.round = 0
        self._me, self._members, self._max_skip = me, tuple(members), max_skip
        self._rest = rest_of(cut, rest)
        self._press = press(self._rest.vector)
        self._parts = {member: cut.sheet() for member in members}
        self._mean, self._nothing = cut.sheet(), cut.sheet()
        self._in: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self.round = self._asked = 0
        self._passed, self._counted = dict.fromkeys(self._members, 0), dict.fromkeys(self._members, 0)

    def __call__(self, letter: Letter) -> Iterator[tuple[int, Message]]:
        """Hear a letter; close what can be closed. What is answered goes before the next round is packed."""
        message, peer = letter.message, letter.peer
        if message.kind == PART:
            body = message.body
            self._parts[peer].fill(body if body is not None else torch.empty(0, dtype=torch.uint8))
            self._in.add(peer)
        elif message.kind == PASS:
            self._passed[peer] = max(self._passed[peer], message.version)
        else:
            self._asked = max(self._asked, message.version)
        while self._closes():
            yield from self._close()
        if not self._in and all(passed == FOR_GOOD for passed in self._passed.values()):
            yield from self._done()

    def _closes(self) -> bool:
        number = self.round + 1
        late = [m for m in self._members if m not in self._in and self._passed[m] < number]
        if not late:
            return bool(self._in) or any(number <= passed < FOR_GOOD for passed in self._passed.values())
        return self._asked == number and all(number - self._counted[m] <= self._max_skip for m in late)

    def _close(self) -> Iterator[tuple[int, Message]]:
        self.round += 1
        parts = [self._parts[m] for m in self._members if m in self._in] or [self._nothing]
        self._press.pack(Sum(parts, 1 / len(self._members)), self._rest, self._mean)
        inside, self._in = self._in, set()
        for member in self._members:
            if member in inside or self._passed[member] >= self.round:
                self._counted[member] = self.round
        for member in self._members:
            yield member, Message(MEAN, self._mean.body, version=self.round, weight=int(member in inside))

    def _done(self) -> Iterator[tuple[int, Message]]:
        rounds = self.round
        self._begin()
        for member in self._members:
            yield member, Message(DONE, self._rest.vector if member == self._me else None, version=rounds)


def rest_of(cut: Cut, rest: Tensor | None = None) -> Rest:
    """What the packing of a slice has missed so far: of its blocks, in memory of the CPU."""
    first, last = (cut.blocks[0].start, cut.blocks[-1].stop) if cut.blocks else (0, 0)
    vector = torch.zeros(last - first, dtype=cut.dtype) if rest is None else rest.to(cut.dtype).cpu().clone()
    return Rest(vector, base=first)
