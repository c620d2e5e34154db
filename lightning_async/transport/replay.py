"""A recorded run, once more: all members in one process, each answered as its log says, to the bit.

    member 0   post -----------> body kept as message 7 of 0 to 1      as far as it comes
    member 1   take -> [(0, 7)]  not there yet: paused, member 0 runs first

What a message contained is not in any log: the sender's replay makes it again. Words of a waiting program are passed
over: the log knows what it was told. The global random generators are each program's own while it runs. The log of a
member that was killed just ends, and so does its replay, without a result.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_async.transport import checks
from lightning_async.transport.log import Divergence, Log
from lightning_async.transport.mail import Letter, Loss, Message, Service
from lightning_async.transport.record import length
from lightning_async.transport.stage import Program, Stage, Stop

__all__ = ["Divergence", "ReplayCarrier", "replay"]


def replay(
    logs: Mapping[int, Iterable[str] | Log],
    programs: Mapping[int, Callable[[ReplayCarrier], Program]],
    *,
    stage: Stage | None = None,
    wanted: Collection[int] | None = None,
) -> dict[int, Any]:
    """Run the programs of all members on their logs.

    Args:
        logs: Each member's log, or its lines of text.
        programs: Makes each member's program, given its carrier: the same that was recorded.
        stage: Where they run.
        wanted: The replay ends when these have ended, or parked; the others run as far as these need them.

    Returns:
        What the programs returned that ended, without those that were killed when they were recorded.
    """
    if set(logs) != set(programs):
        raise ValueError(f"there are logs of members {sorted(logs)} and programs of members {sorted(programs)}")
    read = {rank: log if isinstance(log, Log) else Log(log) for rank, log in sorted(logs.items())}
    for rank, log in read.items():
        _check_log(rank, log)
    stage = Stage() if stage is None else stage
    carriers = {rank: ReplayCarrier(log, stage) for rank, log in read.items()}
    lives = {rank: _life(log, carriers[rank], programs[rank]) for rank, log in read.items()}
    services = {rank: carriers[rank].service() for rank, log in read.items() if log.served}
    stage.is_cut = lambda member: read[member].cut
    stage.kind = next((log.kind for log in read.values()), stage.kind)
    return {actor.member: actor.result for actor in stage.run(lives, wanted, services) if actor.complete}


def _life(log: Log, carrier: ReplayCarrier, program: Callable[[ReplayCarrier], Program]) -> Program:
    """The program, and then a check that its log is at its end too."""
    result = yield from program(carrier)
    if not log.finished:  # it was killed while it slept or computed
        log.end()
        raise Stop
    log.act("finish")
    return result


def _check_log(rank: int, log: Log) -> None:
    if log.me != rank:
        raise ValueError(f"the log given for {log.kind} {rank} was written by {log.name}")
    threads = torch.get_num_threads()
    if log.header["threads"] != threads:
        warnings.warn(
            f"{log.name} was recorded with {log.header['threads']} torch threads and is replayed with {threads}: "
            "sums may differ in their last bits",
            stacklevel=3,
        )


class ReplayCarrier:
    """Answers as recorded; raises `Divergence` where the program does something else than the recorded one did."""

    def __init__(self, log: Log, stage: Stage) -> None:
        self._log = log
        self._stage = stage
        self._posted: dict[tuple[int, int], int] = {}
        self._taken: dict[tuple[int, int], int] = {}
        self._newest: dict[tuple[int, int], Message] = {}  # by peer and kind: only that one can be lost
        self._restored: dict[tuple[int, int], Letter] = {}  # by peer and number
        self._restored_losses: list[Loss] = []
        self._services: list[Service] = []
        self._serving, self._served = -1, 0  # the thread of the service, and the number of its letter

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._log.me

    @property
    def world(self) -> int:
        """How many members the run began with."""
        return self._log.world

    @property
    def speakers(self) -> tuple[int, ...]:
        """Who speaks for each of these."""
        return self._log.speakers

    @property
    def ranks(self) -> int:
        """How many ranks the run began with: a member may have several."""
        return self._log.ranks

    @property
    def ranks_of_members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each member."""
        return self._log.members

    @property
    def asked(self) -> int:
        """How many questions were replayed; whoever waits without asking waits for something else."""
        return self._log.count

    def epochs(self) -> list[list[list[Any]]]:
        """The samples of each batch that was fetched, by epochs."""
        return self._log.epochs()

    def note_fetched(self, sample_ids: Iterable[Any]) -> None:
        """Nothing to do: the samples come from the log."""

    def note_batch(self, loss: float | None = None) -> float | None:
        """Check that a batch was trained on here; returns the recorded loss."""
        recorded: float | None = self._answer("batch")
        return recorded

    def note_factor(self, peer: int, base: int, law: Callable[[], float]) -> float:
        """What a law said that a contribution counts, whatever `law` says."""
        if threading.get_ident() != self._serving:
            return float(self._answer("factor", peer, base))
        said = self._log.counts.get(self._served, [])
        if not said and not self._log.finished and self._served == len(self._log.served):
            raise Stop  # it was killed in the middle of this letter
        if not said or said[0][:2] != [peer, base]:
            self._log.diverge(f"factors {said} for letter {self._served} of its service", f"factor({peer}, {base})")
        return float(said.pop(0)[2])

    def note(self, name: str, value: Any, *, news: bool = False) -> Any:
        """What was noted here under this name, whatever `value` is now; None: nothing."""
        if (recorded := self._log.note(name)) is None:
            self._check_killed()
        return recorded

    def attends(self) -> Iterator[None]:
        """As often as the recorded member looked, and found something."""
        while self.note("attend", None):
            yield

    def meets(self) -> bool:
        """Whether the members met at this point."""
        return self._log.meets()

    def note_meeting(self) -> None:
        """Check that the members meet here."""
        self._act("meet")

    def finish(self) -> None:
        """Nothing to do: that the log is at its end is checked when the program has ended."""

    def folded(self, letter: Letter) -> None:
        """Say that a taken letter has been used."""
        self._act("folded", letter.peer, letter.number)

    def serve(self, kinds: Iterable[int], service: Service) -> None:
        """Letters reach `service` as they did."""
        self._act("serve", sorted(kinds))
        self._services.append(service)
        self._stage.moved()

    def restore(self, letters: Iterable[Letter], losses: Iterable[Loss]) -> None:
        """What an earlier run had under way to this member: its letters are numbered up to 0."""
        self._restored = {(letter.peer, letter.number): letter for letter in letters}
        self._restored_losses = list(losses)

    def service(self) -> Program:
        """What the member's service did: a program of its own, which goes on as far as others need its answers."""
        self._serving = threading.get_ident()
        for number, served in enumerate(self._log.served, start=1):
            self._served = number
            yield 0.0
            while len(self._services) < served.service:
                self._stage.rest(f"{self._log.name} to serve")
            letter = self._letter(served.peer, served.kind, served.number, served.echo, served.seconds)
            for peer, message in self._services[served.service - 1](letter):
                self._keep(peer, message)

    def at(self, step: int) -> None:
        """Tell the carrier this member's own step."""
        self._act("at", step)

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""
        self._act("propose", key, value.hex())

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next tickets."""
        checks.check_amount(amount)
        self._act("draw", counter, amount)

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """Replace this member's note."""
        checks.check_note(note)
        self._act("publish", len(note))

    def wait(self, timeout: float) -> None:
        """Nothing to wait for."""

    def post(self, peer: int, message: Message) -> bool:
        """Whether the message was accepted; if so, it is kept for the peer's replay."""
        checks.check_message(self.me, self.ranks, peer, message, serves=bool(self._services))
        accepted: bool = self._answer("post", peer, message.kind, length(message))
        if accepted:
            self._keep(peer, message)
        return accepted

    def _keep(self, peer: int, message: Message) -> None:
        """For the peer's replay."""
        slot = (peer, message.kind)
        place = self._posted[slot] = self._posted.get(slot, 0) + 1
        body = None if message.body is None else message.body.detach().clone()
        self._newest[slot] = replace(message, body=body)
        self._stage.post((self.me, peer, message.kind, place), self._newest[slot])

    def free(self, peer: int, kind: int) -> bool:
        """Whether `post` would have accepted a message."""
        free: bool = self._answer("free", peer, kind)
        return free

    def take(self, kind: int) -> list[Letter]:
        """The recorded letters, with the bodies that their senders' replays posted."""
        return [
            self._letter(peer, kind, number, echo, seconds)
            for peer, number, echo, seconds in self._answer("take", kind)
        ]

    def _letter(self, peer: int, kind: int, number: int, echo: int, seconds: float) -> Letter:
        """The next one of its kind on this link, when its sender has posted it."""
        if number < 1:
            return replace(self._of_before(peer, number), seconds=seconds)
        place = self._taken[peer, kind] = self._taken.get((peer, kind), 0) + 1
        name = (peer, self.me, kind, place)
        message = self._stage.wait_for(name)
        del self._stage.posts[name]
        return Letter(peer, number, replace(message, echo=echo), seconds)

    def lost(self) -> list[Loss]:
        """The recorded losses, with this member's own posts."""
        told = self._answer("lost")
        before = self._restored_losses[: len(told)]  # all of them come first
        del self._restored_losses[: len(told)]
        return before + [
            Loss(peer, number, replace(self._newest[peer, kind], echo=echo))
            for peer, kind, number, echo in told[len(before) :]
        ]

    def members(self) -> tuple[int, ...]:
        """The ranks that were not declared dead."""
        return tuple(self._answer("members"))

    def live(self) -> tuple[int, ...]:
        """The members that were heard of."""
        return tuple(self._answer("live"))

    def now(self) -> float:
        """What the clock showed."""
        now: float = self._answer("now")
        return now

    def decided(self, key: str) -> bytes | None:
        """The value of `key`."""
        value = self._answer("decided", key)
        return None if value is None else bytes.fromhex(value)

    def forget(self, key: str, *, gone: bool = False) -> None:
        """Nothing that a log would tell."""
        self._log.forget("decided", key)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The recorded draws."""
        return [(first, amount) for first, amount in self._answer("drawn", counter)]

    def notes(self) -> dict[int, bytes]:
        """The recorded notes."""
        return {int(rank): bytes.fromhex(note) for rank, note in self._answer("notes").items()}

    def _of_before(self, peer: int, number: int) -> Letter:
        if (peer, number) not in self._restored:
            letter = f"letter {number} of {self._log.kind} {peer}, of before the run"
            self._log.diverge(letter, "a checkpoint without it")
        return self._restored[peer, number]

    def _act(self, *words: Any) -> None:
        self._check_killed()
        self._log.act(*words)

    def _answer(self, *question: Any) -> Any:
        self._check_killed()
        return self._log.answer(*question)

    def _check_killed(self) -> None:
        if self._stage.ending or self._log.cut:
            raise Stop
