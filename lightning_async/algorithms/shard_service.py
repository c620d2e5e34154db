"""A member's service: the shards that it owns, and mirrors of those of the member before it.

    PUSH, LAST, PULL of everybody  -->  the shard's server, if this member owns that place; else NOT_HERE
    every m / 2 arrivals           -->  MIRROR to the next member, when it has said that the last one is there; what
                                        would be more than m in no mirror waits for that (`mirroring`)
    a place that succeeds a mirror -->  its owner is dead or frozen, and this member is the heir: taken over at once
    TAKE of the own member         -->  the same, where there is no mirror, or an old one: from the member's own base;
                                        who is asked for such a place first tells its member (SOUGHT)
    RETIRE of the own member       -->  there is a later place: serve no older one; what it was is kept until a meeting

It is a function of the letters that reach it, in their order (see `mail.Mail.serve`). What it cannot know by letters
(who lives, who took over) its own member tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_async.algorithms.algorithm import Shrink, no_shrink
from lightning_async.algorithms.images import bundle, unbundle
from lightning_async.algorithms.mirroring import Mirroring
from lightning_async.algorithms.shard_server import Rules, ShardServer, version_of
from lightning_async.algorithms.shards import (
    ANSWER,
    LAST,
    MIRROR,
    MIRRORED,
    NEWS,
    NOT_HERE,
    PULL,
    PUSH,
    PUT,
    RETIRE,
    SHOW,
    SHOWN,
    SOUGHT,
    TAKE,
    before,
    same_generation,
    shard_of,
    succeeds,
)
from lightning_async.algorithms.wire import EXACT, Wires
from lightning_async.transport.mail import Letter, Message

Answers = Iterable[tuple[int, Message]]
ROUNDS = 8
"""So many arrivals of each member may be in no mirror; one for half as many costs the links a few per cent."""


@dataclass
class Owned:
    """A shard in this member's hands.

    Attributes:
        server: The shard.
        mirroring: How far its mirror is behind.
        held: Arrivals that wait: for slower members, or for a mirror.
    """

    server: ShardServer
    mirroring: Mirroring = field(default_factory=Mirroring)
    held: list[Letter] = field(default_factory=list)


class ShardService:
    """What one member serves.

    Args:
        me: The member.
        members: Who lives.
        owned: The first weights of the shards that it owns, by their places.
        mirrored: The same of those whose first mirrors it holds.
        blank: Makes zeros of the size and dtype of a shard.
        rules: How arrivals are treated.
        codec: How corrections and answers travel; between a member and its own service nothing is cut off.
        mirror_every: Arrivals that may be in no mirror; None: eight for each member.
        shrink: Who is asked before each merge, at that time.
    """

    def __init__(
        self,
        me: int,
        members: tuple[int, ...],
        owned: Mapping[int, Tensor],
        mirrored: Mapping[int, Tensor],
        *,
        blank: Callable[[int], Tensor],
        rules: Rules,
        codec: Wires,
        mirror_every: int | None = None,
        shrink: Callable[[], Shrink] = lambda: no_shrink,
    ) -> None:
        self._me, self._members, self._rules, self._codec = me, members, rules, codec
        self._every, self._shrink, self._blank = mirror_every, shrink, blank
        self._next = next_of(me, members)
        self._retired: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._former: dict[int, Owned] = {}
        self._lag = self._most
        self.owned = {at: Owned(self._new(weights.clone(), shard_of(at))) for at, weights in owned.items()}
        self._mirrors = {
            shard_of(at): (at, self._new(weights.clone(), shard_of(at)).image()) for at, weights in mirrored.items()
        }

    def __call__(self, letter: Letter) -> Answers:
        """Do what the letter asks for."""
        kind = letter.message.kind
        if kind in (PUSH, LAST):
            return self._pushed(letter)
        return {
            PULL: self._pulled,
            MIRROR: self._keep,
            MIRRORED: self._mirrored,
            NEWS: self._hear,
            TAKE: self._take,
            RETIRE: self._retire,
            SHOW: self._show,
            PUT: self._put,
        }[kind](letter)

    # -- of everybody -------------------------------------------------------------------------------------------------

    def _pushed(self, letter: Letter) -> Answers:
        owned = self._owned(letter)
        if owned is None:
            return [_not_here(letter)]
        if not self._may_go(owned, letter):
            owned.held.append(_kept(letter))
            return self._mirror(owned, letter.message.reference)  # a shard that was just inherited has none yet
        return self._let_go(owned, self._merge(owned, letter))

    def _merge(self, owned: Owned, letter: Letter) -> Answers:
        server, m = owned.server, letter.message
        assert m.body is not None  # a push always has a body
        own = letter.peer == self._me
        codec = self._codec.of(shard_of(m.reference))
        exact = own or m.kind == LAST
        correction = (EXACT if exact else codec).decode(m.body, server.weights.dtype)
        said = server.arrive(letter, correction, last=m.kind == LAST)
        owned.mirroring.fresh += 1
        weights = server.weights if own else codec.answer(server.weights)
        return [_answer(letter, server, weights, said), *self._mirror(owned, m.reference)]

    def _let_go(self, owned: Owned, answers: Answers = ()) -> Answers:
        """Of those that wait, in the order of their arrival, whoever may go on now; after these answers, which have the
        weights of their own versions."""
        while (free := next((x for x in owned.held if self._may_go(owned, x)), None)) is not None:
            owned.held.remove(free)
            answers = [*_apart(answers, owned.server.weights), *self._merge(owned, free)]
        return answers

    def _may_go(self, owned: Owned, letter: Letter) -> bool:
        full = self._next is not None and owned.mirroring.is_full(self._most)
        return not full and not owned.server.must_wait(letter.message.version)

    def _pulled(self, letter: Letter) -> Answers:
        owned = self._owned(letter)
        if owned is None:
            return [_not_here(letter), *self._sought(letter)]
        server = owned.server
        server.handed_out(letter.peer)
        newest = server.newest(letter.peer)
        return [_answer(letter, server, server.weights, max(0, server.orphaned), newest)]

    def _sought(self, letter: Letter) -> Answers:
        """Who asks has read that this member is the heir, and there is no mirror to be one by: its own member, which
        may have missed nobody, hears of it once."""
        at = letter.message.reference
        if letter.peer == self._me or at <= max(self._oldest(at), self._wanted.get(shard_of(at), 0)):
            return []
        self._wanted[shard_of(at)] = at
        return [(self._me, Message(ANSWER, weight=SOUGHT, reference=at))]

    # -- mirrors ------------------------------------------------------------------------------------------------------

    def _mirror(self, owned: Owned, at: int) -> Answers:
        version = owned.server.version
        if self._next is None or not owned.mirroring.is_due(self._most):
            return []
        owned.mirroring.left(version)
        return [(self._next, Message(MIRROR, owned.server.image(), version=version, reference=at))]

    @property
    def _most(self) -> int:
        return ROUNDS * len(self._members) if self._every is None else self._every

    def _keep(self, letter: Letter) -> Answers:
        m = letter.message
        assert m.body is not None  # a mirror always has a body
        known = self._mirrors.get(shard_of(m.reference))
        if m.reference >= self._oldest(m.reference) and (known is None or known[0] <= m.reference):
            self._mirrors[shard_of(m.reference)] = m.reference, m.body.clone()
        return [(letter.peer, Message(MIRRORED, version=m.version, reference=m.reference))]

    def _mirrored(self, letter: Letter) -> Answers:
        m = letter.message
        owned = self.owned.get(m.reference)
        if owned is None or letter.peer != self._next:
            return []
        owned.mirroring.came(m.version)
        return [*self._let_go(owned), *self._mirror(owned, m.reference)]

    # -- of the own member --------------------------------------------------------------------------------------------

    def _hear(self, letter: Letter) -> Answers:
        body, before = letter.message.body, self._next
        assert body is not None  # it is the list of those that live
        alive = body.tolist()
        if letter.peer == self._me:
            self._members = tuple(alive)
            self._next = letter.message.version if letter.message.version >= 0 else None
        else:  # somebody has heard of a death; perhaps of fewer than this member
            self._members = tuple(rank for rank in self._members if rank in alive)
            self._next = self._next if self._next in self._members else next_of(self._me, self._members)
        answers: list[tuple[int, Message]] = []
        for at, owned in self.owned.items():
            owned.server.hear(self._members)
            owned.held = [held for held in owned.held if held.peer in self._members]
            if self._next != before:  # the new one has no mirror yet
                owned.mirroring.anew(self._most)
            answers += [*self._let_go(owned), *self._mirror(owned, at)]
        return answers

    def _take(self, letter: Letter) -> Answers:
        m = letter.message
        assert m.body is not None  # the weights to begin with, where there is no mirror
        owned = self._owned(letter)
        if owned is None:
            mirror = self._mirrors.get(shard_of(m.reference))
            if mirror is not None and mirror[0] < m.reference:
                del self._mirrors[shard_of(m.reference)]  # the member's own weights are newer
            owned = self.owned[m.reference] = self._without_mirror(m.body.clone(), shard_of(m.reference))
            owned.server.version = owned.server.orphaned = m.version
        return self._mirror(owned, m.reference)

    def _owned(self, letter: Letter) -> Owned | None:
        """The shard at this place. Who asks for a place that succeeds a mirror's has read that this member is the heir:
        it takes over at once, wherever its own member is, if the mirror is no older than one may be; else its member
        has to say what weights it has."""
        at, version = letter.message.reference, letter.message.version
        if at in self.owned:
            return self.owned[at]
        mirror = self._mirrors.get(shard_of(at))
        late = before(at) < self._oldest(at)
        if not late and mirror is not None and succeeds(at, mirror[0]) and version_of(mirror[1]) + self._lag >= version:
            owned = self.owned[at] = self._without_mirror(self._blank(shard_of(at)), shard_of(at))
            owned.server.become(mirror[1])
            owned.server.hear(self._members)
            del self._mirrors[shard_of(at)]
        return self.owned.get(at)

    def _retire(self, letter: Letter) -> Answers:
        """Also of places that this service took over by itself, and its member never knew of."""
        now = letter.message.reference
        number = shard_of(now)
        self._retired[number] = max(before(now), self._oldest(now))
        if (mirror := self._mirrors.get(number)) is not None:  # nobody takes an older place over by it any more
            self._mirrors[number] = max(mirror[0], before(now)), mirror[1]
        older = {at: self.owned.pop(at) for at in [*self.owned] if shard_of(at) == number and at < now}
        self._former = {at: one for at, one in self._former.items() if shard_of(at) != number or not older} | older
        held = [letter for owned in older.values() for letter in owned.held]
        for owned in older.values():
            owned.held.clear()
        return [_not_here(one) for one in held]

    def _oldest(self, at: int) -> int:
        """Of this shard, the oldest place whose mirror may be taken over: others come from who is long succeeded."""
        return self._retired.get(shard_of(at), 0)

    def _show(self, letter: Letter) -> Answers:
        """The images of its shards. Of one that was retired when all had agreed on its weights nobody else has any."""
        asked, shown = letter.message.body, self.owned
        if asked is not None:
            places, here, self._former = asked.tolist(), {**self._former, **self.owned}, {}
            shown = {at: here[at] for at in places if at in here}
        images = {shard_of(at): owned.server.saved() for at, owned in shown.items()}
        return [(self._me, Message(SHOWN, bundle(images)))]

    def _put(self, letter: Letter) -> Answers:
        m = letter.message
        assert m.body is not None  # images
        images = unbundle(m.body)
        if m.reference:
            places = [same_generation(number, m.reference) for number in images]
            blank = {at: Owned(self._new(self._blank(shard_of(at)), shard_of(at))) for at in places}
            self.owned = {at: self.owned.get(at, blank[at]) for at in places}
            self._mirrors = {number: mirror for number, mirror in self._mirrors.items() if version_of(mirror[1])}
        answers: list[tuple[int, Message]] = []
        for at, owned in self.owned.items():
            if shard_of(at) in images:
                owned.server.go_on(images[shard_of(at)])
                owned.server.hear(self._members)
                owned.mirroring.anew(self._most)
                answers += self._mirror(owned, at)
        return answers

    def _without_mirror(self, weights: Tensor, number: int) -> Owned:
        """Taken over."""
        owned = Owned(self._new(weights, number))
        owned.server.unheard = set(self._members)
        owned.mirroring.anew(self._most)
        return owned

    def _new(self, weights: Tensor, number: int) -> ShardServer:
        return ShardServer(self._rules, weights, self._members, shrink=self._shrink)


def next_of(me: int, ranks: Iterable[int]) -> int | None:
    """The one behind this, going round; None where there is no other."""
    others = [rank for rank in ranks if rank != me]
    return next((rank for rank in others if rank > me), others[0] if others else None)


def _answer(letter: Letter, server: ShardServer, weights: Tensor, said: int, newest: int = 0) -> tuple[int, Message]:
    m = letter.message
    answer = Message(
        ANSWER,
        weights,
        step=server.fastest,
        version=server.version,
        echo=m.step,
        samples=newest,
        weight=said,
        reference=m.reference,
    )
    return letter.peer, answer


def _apart(answers: Answers, weights: Tensor) -> Answers:
    """They are posted later, and the weights are about to change."""
    for whom, message in answers:
        yield whom, replace(message, body=weights.clone()) if message.body is weights else message


def _not_here(letter: Letter) -> tuple[int, Message]:
    m = letter.message
    return letter.peer, Message(ANSWER, echo=m.step, weight=NOT_HERE, reference=m.reference)


def _kept(letter: Letter) -> Letter:
    """A copy that outlives the fold of the letter."""
    body = letter.message.body
    return replace(letter, message=replace(letter.message, body=None if body is None else body.clone()))
