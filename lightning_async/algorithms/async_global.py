"""Asynchronous global update: members train on their own, push what they have moved, and pull the newest weights.

    member j     x: own weights    base: the server's, as last pulled
      step, step, step
      push       c = x - base  ------------->  shard's owner, on arrival:  W += gamma * Q * c,  version + 1
      step, step                               (its service: beside its own training)
      x += W - (base + c),  base = W  <------  W

The answer is folded as a correction, so the steps that were taken meanwhile stay. W - (base + c) is computed as the
server computes it: with one member it is zero, to the bit. Each shard of the flat vector has its own owner, version and
exchange; nobody waits between meetings. The consensus is W. After BPT-CNN (Chen et al. 2019, AGWU), and what
asynchronous local SGD has learnt since (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT, Algorithm, Shrink
from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.local_steps import LocalSteps, Period, check_local_steps
from lightning_async.algorithms.outer import Rule, outer_rule
from lightning_async.algorithms.owners import Owners
from lightning_async.algorithms.shard_server import OnLate, Rules
from lightning_async.algorithms.shard_service import ShardService, next_of
from lightning_async.algorithms.shards import (
    ANSWER,
    LAST,
    MANY,
    NEWS,
    NOT_HERE,
    PUSH,
    PUT,
    RETIRE,
    SERVED,
    SHOW,
    SHOWN,
    TAKE,
    cut,
)
from lightning_async.algorithms.weighting import Attenuation, law
from lightning_async.algorithms.wire import Wire, codec
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

ALONE = 3
"""So often a member alone pushes before a meeting: what the first one rounds off, the second one brings."""


class AsyncGlobal(Algorithm):
    """The member's side; what it serves is in `shard_service`.

    Args:
        local_steps: Steps between two pushes; "speed": `pace` for the fastest member, fewer for slower ones, so that
            all push equally often; "epoch": at meetings only (the paper's).
        pace: See `local_steps`.
        attenuation: The law of late arrivals (see `weighting`).
        strength: Its parameter.
        max_delay: Arrivals with an excess of more than so many versions are late; None: none are.
        on_late: What becomes of them: "shrink", "drop", or "wait" (fast members wait instead).
        outer: The server's rule (see `outer`); None: "delayed_nesterov" with a momentum, else "sum".
        outer_lr: Its learning rate.
        outer_momentum: Its momentum.
        shards: How many shards; None: as many as members, at most 8.
        mirror_every: Arrivals of a shard between two mirrors of it; None: as many as members.
        wire: What travels: "fp32" or "bf16".
    """

    def __init__(
        self,
        *,
        local_steps: LocalSteps = "speed",
        pace: int = 8,
        attenuation: Attenuation = "poly",
        strength: float | None = None,
        max_delay: int | None = 1000,
        on_late: OnLate = "shrink",
        outer: Rule | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        shards: int | None = None,
        mirror_every: int | None = None,
        wire: Wire = "fp32",
    ) -> None:
        check_local_steps(local_steps, pace)
        _check_late(max_delay, on_late)
        _check_count("shards", shards, "as many as members, at most 8")
        _check_count("mirror_every", mirror_every, "as many as members")
        self.local_steps, self.pace, self.shards, self.mirror_every = local_steps, pace, shards, mirror_every
        self.attenuation, self.strength, self.max_delay, self.on_late = attenuation, strength, max_delay, on_late
        self.outer, self.outer_lr, self.outer_momentum, self.wire = outer, outer_lr, outer_momentum, wire
        make_outer = outer_rule(outer, lr=outer_lr, momentum=outer_momentum)
        self.rules = Rules(attenuation, law(attenuation, strength), max_delay, on_late, make_outer)
        self.codec = codec(wire)
        self.accuracy: Callable[[], float] = perfect
        self._beginnings = 0

    # -- a run --------------------------------------------------------------------------------------------------------

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All have the same weights: those are the server's, version 0."""
        self._beginnings += 1
        self._mass, self._rounds, self._step = mass, rounds, 0
        self._arrivals: list[Arrival] = []
        self._commands: list[Message] = []
        self._images = torch.empty(0, dtype=torch.uint8)
        self.period = Period(self.local_steps, self.pace)
        flat, shards = replica.flat.cpu(), cut(replica.numel, min(self.shards or MANY, mail.world))
        self.owners = Owners(rounds.carrier, len(shards), self._beginnings)
        self.exchanges = [Exchange(shard, replica.flat, self.codec) for shard in shards]
        for exchange in self.exchanges:
            exchange.belongs_to(self.owners.owner(exchange.shard.number), self.owners.place(exchange.shard.number))
        self._told = mail.members(), _or_none(next_of(mail.me, mail.members()))
        mine = {exchange.place: flat[exchange.shard.part] for exchange in self.exchanges if exchange.owner == mail.me}
        mail.serve(SERVED, self._service(mail, mine))

    def _service(self, mail: Mail, mine: Mapping[int, Tensor]) -> ShardService:
        return ShardService(
            mail.me,
            mail.members(),
            mine,
            rules=self.rules,
            codec=self.codec,
            mirror_every=self.mirror_every,
            shrink=self._current_shrink,
        )

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Fold what was answered, and push what is due."""
        self._step = step
        self._pump(replica, mail)
        self.period.stepped(mail, step)
        for exchange in self.exchanges:
            exchange.samples += self._mass // UNIT
            if self._is_due(exchange):
                if exchange.asked and self.on_late == "wait":
                    yield from self._answered(exchange, replica, mail)
                if not exchange.asked:
                    self._push(exchange, replica, mail, PUSH)
        return self.arrived()

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """Push what is left; when all have, pull: the consensus is the server's W."""
        for exchange in self.exchanges:
            yield from self._push_all(exchange, replica, mail)
        yield from self._rounds.agree(b"", what="all is pushed")
        behind = list(self.exchanges)
        while True:
            for exchange in behind:
                yield from self._pull(exchange, replica, mail)
            newest, agreed = yield from self._newest()
            if agreed:
                break
            behind = [x for x, most in zip(self.exchanges, newest, strict=True) if self._lags(x, most)]
        self._images = yield from self._own_images(mail)
        self.period.pause()
        return torch.cat([exchange.base for exchange in self.exchanges])

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """What was pulled is the base of what comes."""
        for exchange in self.exchanges:
            exchange.samples, exchange.clean = 0, self._step

    def averaged_over(self, n: int) -> int:
        """Each arrival counts one n-th."""
        return n

    def arrived(self) -> list[Arrival]:
        """What became of own corrections since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    # -- a state at a meeting -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shards that this member owns. The bases are the consensus."""
        return {
            "method": type(self).__name__,
            "step": self._step,
            "images": self._images,
            "versions": [exchange.version for exchange in self.exchanges],
            "steps": [exchange.step for exchange in self.exchanges],
            "micros": [self.period.micros, self.period.fastest],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method, on the weights of that meeting."""
        if state.get("method") != (mine := type(self).__name__):
            raise ValueError(
                f"the state of {state.get('method', 'another method')} does not fit {mine}: go on with the method that "
                "the run was started with, or start anew from the weights alone"
            )
        self._step, (self.period.micros, self.period.fastest) = state["step"], state["micros"]
        for exchange, version, step in zip(self.exchanges, state["versions"], state["steps"], strict=True):
            exchange.version, exchange.step, exchange.clean = version, step, self._step
        self._images = state["images"].clone()
        self._rounds.carrier.post(self._rounds.carrier.me, Message(PUT, self._images))

    # -- between two steps --------------------------------------------------------------------------------------------

    def _pump(self, replica: Replica, mail: Mail) -> None:
        """Everything but asking: never waits."""
        mail.lost()  # what was asked of the dead is asked of others
        for letter in mail.take(ANSWER):
            for exchange in self.exchanges:
                if exchange.place == letter.message.reference and exchange.asked:
                    self._fold(exchange, letter, replica)
            mail.folded(letter)
        for exchange in self.exchanges:
            if self.owners.look(exchange.shard.number):
                self._move(exchange, mail)
        self._tell(mail)

    def _is_due(self, exchange: Exchange) -> bool:
        """The first pushes of the shards are spread over a period, so that they do not all travel at once."""
        steps = self.period.steps
        if steps is None:
            return False
        early = steps * exchange.shard.number // len(self.exchanges) if exchange.step == 0 else 0
        return self._step - exchange.step >= steps - early

    def _push(self, exchange: Exchange, replica: Replica, mail: Mail, kind: int) -> None:
        exchange.push(replica, mail, self._step, kind=kind, micros=self.period.micros, weight=self._weight)

    def _weight(self) -> int:
        """What a push counts: the paper's law knows no samples."""
        return max(1, round((UNIT if self.attenuation == "paper" else self._mass) * self.accuracy()))

    def _fold(self, exchange: Exchange, letter: Letter, replica: Replica) -> None:
        if letter.message.weight == NOT_HERE:
            self.owners.doubt(exchange.shard.number)
        else:
            self.period.fastest = letter.message.step
        self._arrivals += exchange.fold(letter, replica)

    # -- who owns what ------------------------------------------------------------------------------------------------

    def _move(self, exchange: Exchange, mail: Mail) -> None:
        """A shard has a new owner. If it is this member, its service takes over; if it was, its service forgets."""
        number, before = exchange.shard.number, exchange.place
        exchange.belongs_to(self.owners.owner(number), self.owners.place(number))
        self._commands.append(Message(RETIRE, reference=before))
        if exchange.owner == mail.me:
            first = exchange.base.cpu().clone()
            self._commands.append(Message(TAKE, first, version=exchange.version, reference=exchange.place))

    def _tell(self, mail: Mail) -> None:
        """Let the own service know what it cannot know by letters."""
        known = mail.members(), _or_none(next_of(mail.me, mail.live()))
        if known != self._told:
            self._told = known
            self._commands.append(Message(NEWS, torch.tensor(known[0], dtype=torch.int64), version=known[1]))
        while self._commands and mail.post(mail.me, self._commands[0]):
            self._commands.pop(0)

    # -- meeting ------------------------------------------------------------------------------------------------------

    def _answered(self, exchange: Exchange, replica: Replica, mail: Mail) -> Wait[None]:
        """Until nothing of this shard is under way."""
        self._pump(replica, mail)
        while exchange.asked:
            yield f"rank {exchange.owner}'s answer on shard {exchange.shard.number}"
            self._pump(replica, mail)

    def _push_all(self, exchange: Exchange, replica: Replica, mail: Mail) -> Wait[None]:
        """Until everything that this member moved is in the server's weights, unrounded."""
        yield from self._answered(exchange, replica, mail)
        alone = mail.members() == (mail.me,)
        if self.on_late == "wait":  # the others must hear that this member pauses
            exchange.clean = min(exchange.clean, self._step - 1)
        for _ in range(ALONE if alone else 1):
            while exchange.clean < self._step:
                self._push(exchange, replica, mail, LAST)
                if not exchange.asked:
                    yield f"rank {exchange.owner} to take the last of shard {exchange.shard.number}"
                yield from self._answered(exchange, replica, mail)
            if alone and not torch.equal(replica.flat[exchange.shard.part], exchange.base):
                exchange.clean = self._step - 1

    def _pull(self, exchange: Exchange, replica: Replica, mail: Mail) -> Wait[None]:
        """The newest weights of a shard, unrounded."""
        before = exchange.pulls
        while exchange.pulls == before:
            exchange.pull(mail, self._step)
            if not exchange.asked:
                yield f"rank {exchange.owner} to be asked for shard {exchange.shard.number}"
            yield from self._answered(exchange, replica, mail)

    def _newest(self) -> Wait[tuple[list[tuple[int, int]], bool]]:
        """The newest place and version of each shard that anybody pulled, and whether all pulled those."""
        mine = [(exchange.place, exchange.version) for exchange in self.exchanges]
        word = ",".join(f"{place}:{version}" for place, version in mine)
        words = yield from self._rounds.agree(word.encode(), what="the same weights")
        read = [
            [(int(p), int(v)) for p, v in (one.split(":") for one in w.decode().split(","))] for w in words.values()
        ]
        return [max(column) for column in zip(*read, strict=True)], len(set(words.values())) == 1

    def _lags(self, exchange: Exchange, newest: tuple[int, int]) -> bool:
        if exchange.place < newest[0]:
            self.owners.doubt(exchange.shard.number)
        return (exchange.place, exchange.version) < newest

    def _own_images(self, mail: Mail) -> Wait[Tensor]:
        """What the shards are that this member owns."""
        while not mail.post(mail.me, Message(SHOW)):
            yield "the own service to hear"
        while not (letters := mail.take(SHOWN)):
            yield "the own service to show its shards"
        image = letters[0].message.body
        assert image is not None  # bytes, if only none
        copy = image.clone()
        mail.folded(letters[0])
        return copy

    def _current_shrink(self) -> Shrink:
        return self.shrink


def perfect() -> float:
    """Every correction counts alike."""
    return 1.0


def _or_none(rank: int | None) -> int:
    return -1 if rank is None else rank


def _check_late(max_delay: object, on_late: object) -> None:
    _check_count("max_delay", max_delay, "no bound")
    if on_late not in get_args(OnLate):
        raise ValueError(f"`on_late` must be 'shrink', 'drop' or 'wait', got {on_late!r}")
    if on_late == "wait" and max_delay is None:
        raise ValueError("on_late='wait' needs a `max_delay`: without a bound nobody has to wait for anybody")


def _check_count(name: str, count: object, none: str) -> None:
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, or None for {none}, got {count!r}")
