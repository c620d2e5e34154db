"""The consensus is what all that live are one in: rank 0's weights at the start, the algorithm's at every meeting.

alone      come              whoever comes out of turn says so; who is here, how far all are, what is due
           reach             the mail is drained; weights: the algorithm's, buffers: means
MEETING    the consensus stands in: validation, metrics, checkpoints see it; what is trained may change
           renewed           with what is trained from here on, all begin anew
           leave             own weights again, unless the consensus was adopted
alone
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Wish
from lightning_async.progress.tally import ZERO, Tally
from lightning_async.replica import Replica
from lightning_async.strategies import words
from lightning_async.strategies.alike import creed, plan
from lightning_async.strategies.buffers import average_buffers, broadcast_frozen
from lightning_async.strategies.saved import agree_on_saved
from lightning_async.strategies.telling import Telling
from lightning_async.strategies.trainable import check_unchanged, renewed
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Consensus:
    """One rank's way to a meeting and back.

    Attributes:
        last: Of the last meeting, how far the replicas were apart, how many seconds it took, and for how many of them
            this rank waited.
        telling: What callbacks tell each other there.
        rewritten: Whether a callback writes other weights over the consensus before this meeting ends, the same ones on
            all ranks.
    """

    rewritten = False
    _home = False

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.last: dict[str, float] = {}
        self.telling = Telling(partial(getattr, strategy, "office"), self._trained)
        self._strategy = strategy

    def begin(self, model: torch.nn.Module, replica: Replica) -> None:
        """Give every rank the first one's weights and buffers, if the ranks are alike."""
        self.rewritten = self._home = False
        trainer = self._strategy.trainer
        limit = self._strategy.clock.limit(trainer)
        self._strategy.office.check_alike(creed(self._strategy) | plan(trainer, limit))
        self._strategy.together(self._equalise(model, replica))

    def _equalise(self, model: torch.nn.Module, replica: Replica) -> Wait[None]:
        office = self._strategy.office
        source = office.carrier.members()[0]
        weights = yield from office.rounds.broadcast(replica.flat.cpu(), source)
        replica.stand_in(weights)
        replica.stay()
        yield from broadcast_frozen(model, office.rounds, source)
        yield from average_buffers(model, office.rounds, weight=int(office.carrier.me == source))

    def come(self) -> Outcome:
        """Who is here, how far all have come, and what is to be done. Whoever has ended its epoch waits for the others
        as long as they get on, and has an ear for wishes all the time: what comes behind its word calls the others."""
        strategy = self._strategy
        progress, office = strategy.clock.progress, strategy.office
        if progress is None:
            raise RuntimeError("there is nothing to meet for outside of `fit`")
        strategy.clock.summon(strategy.trainer)
        progress.whole = strategy.clock.whole_epoch(strategy.trainer)
        words_of_all = office.rounds.agree(progress.word(), what="roll call")
        in_step = strategy.algorithm.in_step  # then nobody is further away than one step
        heed = None if in_step else partial(self._heed, progress)
        return progress.settle(office.drive(words_of_all, sign=progress.sign, heed=heed))

    def _heed(self, progress: Progress) -> None:
        """What falls due meanwhile, and what the others need of this rank before they can come."""
        strategy = self._strategy
        office, algorithm = strategy.office, strategy.algorithm
        strategy.clock.summon(strategy.trainer)
        progress.overhear()
        if progress.ended:
            strategy.cuts.attend()
        if algorithm.attends and office.speaks:
            for _ in office.recording.attends():
                algorithm.attend(strategy.replica, office.mail)

    def reach(self) -> Wish:
        """All that live stop here and see the consensus; nothing is in flight. Returns what was asked for."""
        strategy = self._strategy
        recording, carrier = strategy.office.recording, strategy.office.carrier
        check_unchanged(strategy.trainer.lightning_module, strategy.replica)
        began = carrier.now()
        self.telling.arrive()
        outcome = self.come()
        strategy.together(strategy.cuts.meet())
        recording.meeting(strategy.replica)
        consensus = strategy.together(strategy.voice.meet(strategy.replica, strategy.office.mail))
        strategy.stepping.arrived(strategy.voice.arrived())
        apart = self._adopt(consensus)
        recording.met(strategy.replica)
        if strategy.at_meeting == "adopt":
            strategy.replica.stay()
        self.last = {"spread": apart**0.5, "seconds": carrier.now() - began, "idle": self.telling.idle}
        strategy.alone = False
        strategy.clock.conclude(strategy.trainer, outcome)
        return outcome.wishes

    def _adopt(self, consensus: Tensor) -> float:
        """Let the consensus stand in, with buffers that fit; how far apart the replicas were, squared."""
        strategy = self._strategy
        rounds, carrier = strategy.office.rounds, strategy.office.carrier
        apart = strategy.together(self._tell(strategy.replica, consensus.cpu()))
        strategy.office.recording.met_with(strategy, apart)
        if strategy.buffers != "local":
            strategy.together(average_buffers(strategy.trainer.lightning_module, rounds))
        strategy.feeding.met(deaths=len(carrier.members()) < strategy.world_size)
        strategy.replica.stand_in(consensus)
        return apart

    def _tell(self, replica: Replica, consensus: Tensor) -> Wait[float]:
        own = replica.flat.cpu()

        def by_parameter() -> list[float]:
            pairs = zip(replica.parts(own), replica.parts(consensus), strict=True)
            return [float((a - b).double().square().sum()) for a, b in pairs]

        return self.telling.exchange(words.mean_square(own, consensus), by_parameter)

    def _trained(self) -> Tally:
        progress = self._strategy.clock.progress
        return ZERO if progress is None else progress.own

    def leave(self) -> Replica:
        """Own weights again, unless they are the consensus; those that are trained from here on."""
        strategy = self._strategy
        office, algorithm = strategy.office, strategy.voice
        strategy.together(strategy.clock.leave(strategy.trainer))
        settled = strategy.clock.closing.settled  # nothing could change since all said so
        replica = strategy.replica if settled else self.renewed()
        if self.rewritten:  # what is held back, or served, is of weights that are no more
            self.rewritten = False
            algorithm.begin(replica, office.mail, strategy.feeding.mass, office.algorithms_rounds)
            strategy.together(office.rounds.barrier())
        replica.check()  # a callback may have put other tensors in the place of the weights, and keep those
        adopted = not replica.away
        replica.come_back()
        algorithm.resume(replica, adopted=adopted)
        office.recording.set_off(strategy.trainer)
        self.telling.set_off()
        return replica

    def renewed(self) -> Replica:
        """The weights of what is trained from here on; if that has changed since all met, the method begins anew with
        it. Called by all: as they leave, and before they save, since a run that goes on from the file trains that."""
        strategy, module = self._strategy, self._strategy.trainer.lightning_module
        office, algorithm, old = strategy.office, strategy.voice, strategy.replica
        if self._home or (new := strategy.together(renewed(module, old, office.rounds))) is None:
            return old
        begin = partial(algorithm.renew, old) if new.alike else algorithm.begin
        begin(new.replica, office.mail, strategy.feeding.mass, office.algorithms_rounds)
        strategy.together(office.rounds.barrier())  # what is posted to who has not begun its old service would get
        return new.replica

    def take_home(self) -> None:
        """The run ends: every rank keeps the consensus, and the first one's names of the checkpoints."""
        strategy = self._strategy
        rounds = strategy.office.rounds
        self._home = True
        strategy.replica.stay()
        strategy.office.recording.finish()
        if strategy.buffers == "reestimate":
            module = strategy.trainer.lightning_module
            strategy.together(strategy.statistics.take_anew(module, strategy.training_step, rounds))
        strategy.together(agree_on_saved(strategy.trainer, rounds))
        strategy.together(strategy.checkpoints.settle())
        strategy.together(strategy.cuts.settle())
