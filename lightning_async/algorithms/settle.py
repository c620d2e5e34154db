"""Before a meeting the mail is drained: each member says who it wrote to, then marks the end of its mail to them.

    agree: "I wrote to 1 and 3"  ->  MARKER on every link that was used, in either direction  ->  serve and fold what
    still comes until a marker came from each partner and every question of mine is answered

Links keep their order, so a marker is behind everything its sender ever posted: when all are in, nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_async.transport.mail import MARKER, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds


def settle(
    mail: Mail, rounds: Rounds, wrote_to: Iterable[int], pump: Callable[[], None], pending: Callable[[], Iterable[int]]
) -> Wait[None]:
    """Drain all links. `pump` folds and serves what is there; `pending` names peers who still owe an answer."""
    mine = set(wrote_to)
    words = yield from rounds.agree(",".join(map(str, sorted(mine))).encode(), what="settle")
    partners = {
        r for r, word in words.items() if r != mail.me and (r in mine or str(mail.me) in word.decode().split(","))
    }
    unmarked, silent = set(partners), set(partners)
    while True:
        unmarked = {r for r in unmarked if r in mail.members() and not mail.post(r, Message(MARKER))}
        for letter in mail.take(MARKER):
            silent.discard(letter.peer)
            mail.folded(letter)
        pump()
        alive = set(mail.members())
        missing = sorted(((silent | set(pending())) & alive) | unmarked)
        if not missing:
            return
        yield f"rank {missing[0]} to finish its mail"
