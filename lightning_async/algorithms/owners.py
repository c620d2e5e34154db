"""Who owns which shard is decided on the board, generation by generation; the first word written holds, for everybody.

    generation 1    by a formula; in a run that goes on, whoever acted as the owner at the save
    generation g+1  "shard/<run>/<shard>/<g+1>" = the next live member after the owner, proposed by whoever finds the
                    owner silent or is told by it that it does not own the shard

Only who hears more than half of the members proposes: a member that is cut off must not take everything when it comes
back. Who was never heard is not silent yet: at the beginning it has a while to be. An owner looks for its own
successor, so one that was frozen learns that it is none any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.shards import RUN, first_owner, place, shard_of
from lightning_async.transport.mail import Carrier, founders

A_WHILE = 2.0
"""Seconds from the beginning in which an owner's first word may still be on its way."""


class Owners:
    """One member's view of who owns what.

    Args:
        board: This member's end of the board, and who is live.
        shards: How many shards.
        run: A number that each beginning has of its own, the same on all members.
    """

    def __init__(self, board: Carrier, shards: int, run: int) -> None:
        self._board, self._run, self._began = board, run, board.now()
        self._heard: set[int] = set()
        self._base = run * RUN
        first = founders(board)
        self._owners = [first[first_owner(b, shards, len(first))] for b in range(shards)]
        self._generations = [1] * shards
        self._doubted: set[int] = set()
        self._sought: dict[int, int] = {}
        self._proposed: set[str] = set()

    def were(self, owners: Sequence[int] | None, exchanges: Sequence[Exchange]) -> int:
        """A run goes on: its first generation is of those who acted as owners at the save.

        Returns a place of that generation; 0 where the save does not say whose it is, as older ones do not.
        """
        if owners is None:
            return 0
        self._owners = list(owners)
        for exchange in exchanges:
            exchange.owner = self.owner(exchange.shard.number)
        return self.place(0)

    def owner(self, shard: int) -> int:
        """Who owns a shard, as far as is known here."""
        return self._owners[shard]

    def place(self, shard: int) -> int:
        """The shard with its generation, as it travels."""
        return place(shard, self._base + self._generations[shard])

    def doubt(self, shard: int) -> None:
        """Its owner said that it is not."""
        self._doubted.add(shard)

    def sought(self, at: int) -> None:
        """Somebody asks for a place, or serves it: if it is a later one, there is an owner of whom nobody told here."""
        self._sought[shard_of(at)] = max(at, self._sought.get(shard_of(at), 0))

    def look(self, shard: int) -> bool:
        """Find out whether there is a new owner; ask for one where there must be. True: there is a new one."""
        board, before = self._board, self._generations[shard]
        while self._is_doubtful(shard) or self.owner(shard) == board.me:
            key = f"shard/{self._run}/{shard}/{self._generations[shard] + 1}"
            heir = board.decided(key)
            if heir is None:
                self._propose(shard, key)
                break
            self._owners[shard] = int(heir)
            self._generations[shard] += 1
            self._doubted.discard(shard)
        return self._generations[shard] > before

    def _is_doubtful(self, shard: int) -> bool:
        later = self._sought.get(shard, 0) > self.place(shard)
        return later or shard in self._doubted or self._is_silent(self.owner(shard))

    def _is_silent(self, owner: int) -> bool:
        self._heard.update(live := self._board.live())
        if owner in live:
            return False
        return owner in self._heard or self._board.now() - self._began > A_WHILE

    def _propose(self, shard: int, key: str) -> None:
        """The owner is silent: the next one that is heard."""
        live, owner = self._board.live(), self.owner(shard)
        if not self._is_silent(owner) or key in self._proposed or 2 * len(live) <= len(self._board.members()):
            return
        self._proposed.add(key)
        after = [rank for rank in live if rank > owner]
        self._board.propose(key, str((after or list(live))[0]).encode())
