"""A rank's rounds where a round may close without it: it sends, and goes on when all servers have counted what it sent.

    rank 0   |--compute--|PART  MEAN 1|--compute--|PART  MEAN 2|--compute--|PART  MEAN 3|
    rank 3   |--------------compute (late for 1 and 2)-------------|PART  MEAN 1, 2, 3|
                             after `deadline`: ASK 1 -->                  ASK 2 -->

Weights after round r are the same on all ranks that are ever there, to the bit: each adds the servers' means in their
order. A rank that two servers counted in two rounds goes on from the later one, and tells the other server that it has
nothing for that round, which need not wait for it then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.algorithms.press import Press, Rest, Source, Sum
from lightning_async.algorithms.sheets import Cut, Sheet, fingerprint
from lightning_async.algorithms.sign_exchange import MEAN, PART, Guard, from_here
from lightning_async.algorithms.sign_server import ASK, DONE, FOR_GOOD, PASS, rest_of
from lightning_async.transport.mail import Mail, Message, Wait


class LateRounds:
    """What one rank knows of its rounds.

    Args:
        press: Packs and unpacks.
        cuts: The slices.
        me: This rank.
        members: All ranks.
        deadline: Seconds that it waits for a server before it asks it to close the round.
        like: The flat vector.
        guard: Raises where those who are missing will never come.
        counted: Told when the last server has counted what was sent, and in which round after those known here.
        serve: Begins this rank's service anew, from what its packing has missed.
    """

    def __init__(
        self,
        press: Press,
        cuts: Sequence[Cut],
        me: int,
        members: Sequence[int],
        *,
        deadline: float,
        like: Tensor,
        guard: Guard,
        counted: Callable[[int, int, int, float], None],
        serve: Callable[[Tensor | None], None],
    ) -> None:
        self.number = self.round = self.missed = 0
        self.rest = Rest(torch.zeros_like(like))
        self.cuts = list(cuts)
        self._press, self._deadline, self._guard, self._told, self._serve = press, deadline, guard, counted, serve
        of = dict(zip(members, cuts, strict=True))
        self._of = {member: of[member] for member in [*from_here(me, members), me] if of[member].nbytes}
        self._out = {server: self._new(server, like) for server in self._of}
        self._like = like
        self._came: dict[int, deque[Sheet]] = {server: deque() for server in self._of}
        self._free: dict[int, list[Sheet]] = {server: [] for server in self._of}
        self._counted: dict[int, int] = {}
        self._said: dict[tuple[int, int], int] = {}
        self._unsent: dict[tuple[int, int], Message] = {}
        self._since = dict.fromkeys(self._of, 0.0)
        self._done: dict[int, int] = {}
        fresh = rest_of(of[me])
        self._base, self._served = fresh.base, fresh.vector
        serve(None)

    def take(self, mail: Mail, source: Source) -> Wait[None]:
        """Send, and wait until it counts."""
        self.number += 1
        self._counted = {}
        means = self._press.means(source, self.rest, self.cuts)
        for server, sheet in self._out.items():
            self._press.pack(source, self.rest, sheet, means)
            self._unsent[server, PART] = Message(PART, sheet.body, step=self.number, version=self.round)
            self._flush(mail)
        self._wait_from_now(mail)
        while behind := self._behind(mail):
            self._ask(mail, behind)
            if not self._guard(mail, behind):
                yield f"rank {behind[0]} in round {self.round + 1} of signs"

    def agreed(self, onto: Tensor) -> Tensor:
        """Add to a vector what was agreed on in all rounds that are known in full, in their order."""
        rounds = min(map(len, self._came.values()))
        for _ in range(rounds):
            self._add(onto, self._came)
        self.missed += max(0, rounds - 1)
        self.round += rounds
        return onto

    def stop(self, mail: Mail) -> Wait[None]:
        """From now on nobody waits for this rank; it has nothing to send until all have met."""
        for server in self._of:
            self._say(server, PASS, FOR_GOOD)
        while self._flush(mail):
            deaf = sorted({server for server, _ in self._unsent})
            if not self._guard(mail, deaf):
                yield f"rank {deaf[0]} to hear that this one stops"

    def finish(self, mail: Mail, onto: Tensor) -> Wait[None]:
        """All have stopped: what was late has been counted, all rounds are known. The next one is number 1."""
        yield from self.stop(mail)
        while missing := [s for s in self._of if self._done.get(s, FOR_GOOD) > self._known(s)]:
            self._listen(mail)
            if not self._guard(mail, missing):
                yield f"rank {missing[0]} to close its last round of signs"
        while waiting := [server for server in self._of if self._came[server]]:
            self._add(onto, waiting)
        self.round, self._done, self._said = 0, {}, {}

    def _behind(self, mail: Mail) -> list[int]:
        """Which servers have not counted this rank's part, or are not as far as those that have."""
        self._flush(mail)
        self._listen(mail)
        target = max(self._counted.values(), default=0)
        for server, counted in self._counted.items():
            if counted < target and self._known(server) < target:
                self._say(server, PASS, target)
        late = [s for s in self._of if s not in self._counted or self._known(s) < target]
        return late + sorted({server for server, _ in self._unsent} - set(late))

    def _ask(self, mail: Mail, behind: Sequence[int]) -> None:
        now = mail.now()
        for server in behind:
            if now - self._since[server] >= self._deadline:
                self._say(server, ASK, self._known(server) + 1)

    # -- mail ---------------------------------------------------------------------------------------------------------

    def _say(self, server: int, kind: int, number: int) -> None:
        """Once; a later word takes the place of one that has not gone yet."""
        if self._said.get((server, kind), 0) < number:
            self._said[server, kind] = number
            self._unsent[server, kind] = Message(kind, version=number)

    def _flush(self, mail: Mail) -> bool:
        """Post what can go, to each server in its order; whether anything stays."""
        stuck: set[int] = set()
        for server, kind in list(self._unsent):
            if server not in stuck and mail.post(server, self._unsent[server, kind]):
                del self._unsent[server, kind]
            else:
                stuck.add(server)
        return bool(self._unsent)

    def _listen(self, mail: Mail) -> None:
        for letter in mail.take(MEAN):
            server, message = letter.peer, letter.message
            sheet = self._free[server].pop() if self._free[server] else self._new(server, self._like)
            sheet.fill(message.body if message.body is not None else torch.empty(0, dtype=torch.uint8))
            self._came[server].append(sheet)
            self._since[server] = mail.now()
            if message.weight:
                self._counted[server] = message.version
                if len(self._counted) == len(self._of):
                    rounds = max(self._counted.values()) - self.round
                    self._told(server, self.round, rounds, letter.seconds)
            mail.folded(letter)
        for letter in mail.take(DONE):
            self._done[letter.peer] = letter.message.version
            if letter.message.body is not None:
                self._served = letter.message.body.clone()
            mail.folded(letter)

    def _known(self, server: int) -> int:
        """How many rounds of a server are known here."""
        return self.round + len(self._came[server])

    def _wait_from_now(self, mail: Mail) -> None:
        self._since = dict.fromkeys(self._of, mail.now())

    # -- sheets -------------------------------------------------------------------------------------------------------

    def _new(self, server: int, like: Tensor) -> Sheet:
        return self._of[server].sheet(device=like.device)

    def _add(self, onto: Tensor, servers: Sequence[int] | dict[int, deque[Sheet]]) -> None:
        for server in servers:
            sheet = self._came[server].popleft()
            self._press.add(Sum([sheet]), self._of[server], Rest(onto))
            self._free[server].append(sheet)

    # -- what the coming rounds depend on -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """At a meeting: what is left over here and at this rank's server."""
        served = {"cuts": fingerprint(self.cuts), "base": self._base, "rest": self._served.clone()}
        return {"rest": self.rest.vector.cpu().clone(), "exchange": served}

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        self.rest.vector.copy_(state["rest"])
        self._served = state["exchange"]["rest"].clone()
        self._serve(self._served)
