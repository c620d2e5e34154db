"""Who sends is said some rounds ahead, so that a round in which nobody does costs nobody a wait.

    round     1           2           3           4                        (ahead = 1)
    rank 0    says 2:no   says 3:yes  says 4:no
                   `---------> here when round 2 begins, unless it travels longer than a step takes

Without notice (`ahead` 0) a round begins with a wait for everybody's word. A word may be posted while earlier ones are
still on the way, or known to be there only by an answer that is: so there are slots for twice as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_async.algorithms.sign_exchange import Guard
from lightning_async.transport.mail import FIRST_FREE_KIND, Mail, Message, Wait

NOTICE = FIRST_FREE_KIND + 8
MOST = 8
"""How many rounds ahead, at most."""


class Notices:
    """What the ranks have said of coming rounds."""

    def __init__(self, me: int, members: Sequence[int], *, ahead: int) -> None:
        self.ahead = ahead
        self._me, self._members = me, tuple(members)
        self._said: dict[int, dict[int, bool]] = {}
        self._unsent: dict[tuple[int, int], Message] = {}

    def say(self, mail: Mail, number: int, sends: bool) -> None:
        """Tell all whether this rank sends in this round."""
        self._said.setdefault(number, {})[self._me] = sends
        word = Message(NOTICE + number % len(self._kinds()), version=number, weight=int(sends))
        self._unsent |= {(number, peer): word for peer in self._members if peer != self._me}
        self._flush(mail)

    def senders(self, mail: Mail, number: int, guard: Guard) -> Wait[tuple[int, ...]]:
        """Who sends in this round. Returns when all others can know it too: nobody waits for a word not posted."""
        while True:
            self._flush(mail)
            self._listen(mail)
            said = self._said.setdefault(number, {})
            missing = [m for m in self._members if m not in said]
            missing += sorted(peer for due, peer in self._unsent if due <= number)
            if not missing:
                del self._said[number]
                return tuple(m for m in self._members if said[m])
            if not guard(mail, missing):
                yield f"rank {missing[0]} to say whether it sends in round {number}"

    # -- at a meeting nothing is in flight, so what was said ahead is said once more, to be known and saved -----------

    def words(self) -> str:
        """What this rank has said of rounds to come."""
        return ",".join(f"{number}:{int(said[self._me])}" for number, said in self._ahead())

    def adopt(self, words: Mapping[int, str]) -> None:
        """All have said so; nothing is left to be posted."""
        self._unsent = {}
        for member, word in words.items():
            for pair in filter(None, word.split(",")):
                number, sends = pair.split(":")
                self._said.setdefault(int(number), {})[member] = sends == "1"

    def drop(self, mail: Mail) -> None:
        """Give back the letters that say what `adopt` has said."""
        for kind in self._kinds():
            for letter in mail.take(kind):
                mail.folded(letter)

    def state_dict(self) -> dict[int, dict[int, bool]]:
        """What all have said of rounds to come."""
        return {number: dict(said) for number, said in self._ahead()}

    def load_state_dict(self, state: Mapping[int, Mapping[int, bool]]) -> None:
        """Go on from there."""
        self._said = {number: dict(said) for number, said in state.items()}

    def _ahead(self) -> list[tuple[int, dict[int, bool]]]:
        return sorted((number, said) for number, said in self._said.items() if self._me in said)

    def _kinds(self) -> range:
        return range(NOTICE, NOTICE + 2 * self.ahead + 1)

    def _flush(self, mail: Mail) -> None:
        self._unsent = {key: word for key, word in self._unsent.items() if not mail.post(key[1], word)}

    def _listen(self, mail: Mail) -> None:
        for kind in self._kinds():
            for letter in mail.take(kind):
                self._said.setdefault(letter.message.version, {})[letter.peer] = bool(letter.message.weight)
                mail.folded(letter)
