"""The office is this rank's place in a run: the store it rendezvouses at, its carrier, its rounds, its flags.

    open:   run id from rank 0 (once, over the default group, when all are surely alive)  ->  carrier  ->  rounds
    close:  bye on the board  ->  wait, bounded, for the byes of those that live  ->  threads and links gone

Rank 0 may host the store: leaving first it would take everybody's store along, so it leaves last. A rank that failed
lingers until rank 0 has heard it: under `popen` a child that exits non-zero gets rank 0 killed within seconds, before
rank 0 could say what happened.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not exported by name

from lightning_async.strategies.alike import check_alike
from lightning_async.strategies.knobs import check_seconds, check_text
from lightning_async.strategies.recording import Recording
from lightning_async.strategies.waiting import GLANCE, Flags, drive
from lightning_async.transport.cluster import PIECE, ClusterCarrier, piece_of
from lightning_async.transport.gathering import When
from lightning_async.transport.gloo import reached
from lightning_async.transport.layers import LayeredRounds, Speakers
from lightning_async.transport.mail import Carrier, Mail, Wait
from lightning_async.transport.network import check_network
from lightning_async.transport.pages import Desk, Pages
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.siblings import Siblings

T = TypeVar("T")
CONNECT = 10.0  # seconds to reach a store that is known to be there
ANSWER = 3 * CONNECT  # seconds in which torch has reached it, or says why not; its answer may take as long as a meeting
FAREWELL = 15.0  # seconds that leaving may take
FAREWELL_FAILED = 5.0
PAGES = 3
"""The pages of a member's note: the share's (`feeding.DATA`), the progress's (`clock.PROGRESS`), the callbacks'."""
CALLBACKS = 2
"""The page that is the callbacks'."""
BYE, DIED = b"bye", b"died"


class Office:
    """Opens and closes with every `fit`, `validate`, `test` or `predict`.

    Attributes:
        ranks_of_members: The ranks of each member, the first of which speaks for it; empty: each rank is one. To be set
            before it opens.
        piece: The longest piece in which a body travels, in bytes.
        shared_memory: Whether long bodies to ranks of this host go through memory; likewise. For measurements.
        siblings: This rank among the ranks of its member, where a member has several.
    """

    ranks_of_members: tuple[tuple[int, ...], ...] = ()
    shared_memory = True
    siblings: Siblings | None = None

    def __init__(
        self,
        *,
        interface: str | None,
        staging: int | None = None,
        silence: float,
        patience: float,
        limit: float,
        limit_knob: str = "meeting_timeout",
        grace: float = 10.0,
        record: str | None,
    ) -> None:
        check_seconds("grace", grace, also_0=True)
        self.grace = grace
        for knob, value in (("silence", silence), ("patience", patience), (limit_knob, limit)):
            check_seconds(knob, value)
        if patience < silence:
            raise ValueError(f"`patience` must be at least `silence` ({silence}), got {patience}")
        self.piece = PIECE if staging is None else piece_of(staging)
        check_text("interface", interface, "the name of a network interface")
        self.interface, self.silence, self.patience, self.limit = interface, silence, patience, limit
        self.recording = Recording(record)
        self._run: str | None = None
        self._count = 0
        self._members: tuple[int, ...] | None = None
        self._nodes: tuple[int, ...] | None = None
        self._carrier: ClusterCarrier | None = None
        self._fails = False

    @property
    def fails(self) -> bool:
        """Whether the run ends by an accident, as far as this rank knows; also when it has left. One that was told to
        end, and did not come to its end within its grace, is over too."""
        if (carrier := self._carrier) is not None:
            aborted = carrier.decided("abort") is not None
            self._fails = bool(aborted or self.flags.failed or self.flags.overdue or carrier.failed)
        return self._fails

    @property
    def is_open(self) -> bool:
        """Whether there is a run to talk to."""
        return self._carrier is not None

    @property
    def carrier(self) -> ClusterCarrier:
        """This rank's mail and board."""
        if self._carrier is None:
            raise RuntimeError("the office is closed: there is no run")
        return self._carrier

    def open(
        self, environment: ClusterEnvironment | None, me: int, world: int, device: torch.device, *, fitting: bool
    ) -> None:
        """Take this rank's place. Called on every rank, in every stage."""
        if self.is_open or environment is None:
            return
        if self._run is None:
            self._run = _run_id(device)
        self._count += 1
        host, port = environment.main_address, environment.main_port
        store = reached(
            lambda: TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT)),
            f"{host}:{port}",
            seconds=ANSWER + self.limit,
        )
        self._carrier = ClusterCarrier(
            store=store,
            me=me,
            world=world,
            run=f"{self._run}.{self._count}",
            members=self._members,
            peers=_first_peers(me, self.ranks_of_members or tuple((r,) for r in range(world))),
            silence=self.silence,
            patience=self.patience,
            late=None if self._count == 1 else math.inf,  # a wait for it has its own bound: `limit`
            interface=self.interface,
            fragment_bytes=self.piece,
            shared_memory=self.shared_memory,
        )
        self._carrier.start()
        self.flags = Flags(self._carrier, grace=self.grace)
        self.rounds = Rounds(self._carrier)
        seen = self._layered(self._carrier)
        self._pages = Pages(seen, PAGES)
        self.recording.flags = self.flags
        fit = self.drive(self.recording.number(self.rounds)) if fitting and self.recording.on else None
        recorded = self.recording.of(seen, fit=fit, run=f"{self._run}.{self._count}", members=self.ranks_of_members)
        self.mail: Mail = recorded
        self.algorithms_rounds = Rounds(recorded, channel=1)

    def _layered(self, carrier: ClusterCarrier) -> Carrier:
        """The carrier as members see each other on it; where they have several ranks, as their speakers do."""
        self.siblings = None
        if all(len(ranks) == 1 for ranks in self.ranks_of_members):
            return carrier
        speakers = tuple(ranks[0] for ranks in self.ranks_of_members)
        self.siblings = Siblings(carrier, next(ranks for ranks in self.ranks_of_members if carrier.me in ranks))
        self.rounds = LayeredRounds(carrier, self.siblings, speakers)
        self.flags.siblings = self.siblings.others
        return cast(Carrier, Speakers(carrier, speakers))

    @property
    def size(self) -> int:
        """How many ranks this rank's member has."""
        return 1 if self.siblings is None else len(self.siblings.ranks)

    @property
    def members(self) -> int:
        """How many members the run begins with."""
        return len(self.ranks_of_members) or self.carrier.world

    def nodes(self, mine: int, world: int, device: torch.device) -> tuple[int, ...]:
        """The node of each rank: they tell each other once, when all are surely alive."""
        if self._nodes is None:
            self._nodes = _nodes(mine, world, device)
        return self._nodes

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its member: always, where members have one rank each."""
        return self.siblings is None or self.siblings.speaks

    def desk(self, number: int) -> Desk:
        """The board with a page of the note for one's own."""
        return self._pages.desk(number)

    def drive(
        self,
        waiting: Wait[T],
        sign: Callable[[], object] | None = None,
        heed: Callable[[], object] | None = None,
        *,
        leaves: When = "together",
    ) -> T:
        """Run a `Wait` to its end; see `waiting.drive`. Its short mail `leaves` then."""
        with self.carrier.gathered(leaves):
            return drive(waiting, self.flags, limit=self.limit, sign=sign, heed=heed)

    def send(self) -> None:
        """What was to leave later leaves now."""
        if self.is_open:
            self.carrier.send()

    def check_complete(self, world: int) -> None:
        """Refuse a further stage after a death: Lightning's own set-up would wait for the dead."""
        if self._members is not None and len(self._members) < world:
            dead = ", ".join(str(r) for r in range(world) if r not in self._members)
            raise RuntimeError(
                f"rank {dead} died in an earlier stage of this Trainer, and Lightning sets up a new one with them all: "
                "start a new run from the checkpoint"
            )

    @property
    def first(self) -> int:
        """The first rank that lives, and speaks for its member: it writes what one rank writes."""
        members = self._carrier.members() if self._carrier is not None else (0,)
        speakers = {ranks[0] for ranks in self.ranks_of_members}
        return next((rank for rank in members if rank in speakers), members[0])

    @property
    def is_left(self) -> bool:
        """Whether a rank has left the run that did not die."""
        gone = set(self._members or range(self.carrier.world)).difference(self.carrier.members())
        return bool(gone.difference(self.carrier.deaths))

    def check_network(self, nodes: int) -> None:
        """Refuse a network by which the others cannot be reached, before anybody waits for them."""
        check_network(self.interface, nodes=nodes)

    def check_alike(self, mine: Mapping[str, Any]) -> None:
        """Stop here if the ranks are not of one version, method and knobs."""
        self.drive(check_alike(mine, self.rounds))

    def glance(self, timeout: float) -> None:
        """Wait a moment for something new, and stop here if somebody stopped the run."""
        self.listen()
        self.carrier.wait(min(timeout, GLANCE))

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        if self.is_open:
            self.flags.raise_if_set()

    def sigterm(self) -> None:
        """From the signal handler: only a flag is set; the next look tells the others."""
        if self.is_open:
            self.flags.sigterm = True

    def announce(self, exception: BaseException) -> None:
        """Tell the others that this rank stops."""
        if self.is_open:
            self.flags.announce(exception)

    def traffic(self) -> Mapping[Any, Any]:
        """What the carrier counted."""
        return self._carrier.traffic() if self._carrier is not None else {}

    def close(self) -> None:
        """Leave, politely but within seconds. Idempotent."""
        self._fails = self.fails
        carrier, self._carrier = self._carrier, None
        if carrier is None:
            return
        try:
            self._members = self._farewell(carrier)
        finally:
            carrier.close()
            self.recording.close()  # behind the last letter that a service got

    def _farewell(self, carrier: ClusterCarrier) -> tuple[int, ...]:
        """Rank 0 waits for everybody's bye, a failed rank for rank 0's. Who was not heard of lately may only be busy.
        Returns who did not die in this run.

        Who left is not among the carrier's members any more, like the dead: what tells them apart is who wrote first.
        """
        everybody = self._members or tuple(range(carrier.world))
        first = carrier.members()[0]
        self.flags.heed()
        carrier.propose(f"bye/{carrier.me}", BYE)
        if self.flags.unheard:  # nor is this one
            return everybody
        stopped = self.flags.failed is not None or carrier.decided("abort") is not None
        soon = stopped or self.flags.told_to_end  # a SIGKILL follows: who could not come within the grace may not now
        end = carrier.now() + (FAREWELL_FAILED if soon else FAREWELL)
        while carrier.now() < end and (carrier.failed is None or carrier.fault is not None):
            gone = [r for r in everybody if r not in carrier.members()]
            for rank in gone:
                carrier.propose(f"bye/{rank}", DIED)
            awaited = set(gone) | {carrier.me} | ({first} if stopped else set())
            lingers = carrier.me == first and not self.flags.orphaned  # the others train on, perhaps for days
            awaited |= set(carrier.live() if soon else everybody) & set(everybody) if lingers else set()
            over = all(carrier.decided(f"bye/{r}") is not None for r in awaited)
            self.flags.heed()  # what was said before a bye is there with it
            if over:
                break
            carrier.wait(0.1)
        return tuple(r for r in everybody if carrier.decided(f"bye/{r}") != DIED)


def check_backend(name: object) -> None:
    """Raise for what is no backend of torch's; one for each kind of device may be given: `cpu:gloo,cuda:nccl`."""
    known = [backend for backend in dist.Backend.backend_list if backend != dist.Backend.UNDEFINED]
    asked = [part.split(":")[-1].lower() for part in name.split(",")] if isinstance(name, str) else [""]
    if name is not None and not set(asked) <= set(known):
        raise ValueError(f"`process_group_backend` must be one of {', '.join(map(repr, known))}, or None, got {name!r}")


def _first_peers(me: int, members: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """To whom links are opened at once: a speaker's neighbours among speakers, and all of its member."""
    speakers = [ranks[0] for ranks in members]
    inside = next(ranks for ranks in members if me in ranks)
    at, n = speakers.index(inside[0]), len(speakers)
    beside = {speakers[at - 1], speakers[(at + 1) % n]} if me == inside[0] else set()
    return tuple(r for r in sorted({*beside, *inside}) if r != me)


def _nodes(mine: int, world: int, device: torch.device) -> tuple[int, ...]:
    found = [torch.full((1,), mine, dtype=torch.int64, device=device) for _ in range(world)]
    if dist.is_initialized():
        dist.all_gather(found, found[0].clone())
    return tuple(int(node) for node in found)


def _run_id(device: torch.device) -> str:
    """A number of rank 0's, so that a stray process of another run is turned away."""
    number = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.broadcast(number, src=0)
    return f"{int(number):x}"
