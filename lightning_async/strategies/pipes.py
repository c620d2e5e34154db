"""Which rank holds which stage: rank 0 the last one, so that loss, logs and files are where they always are.

ranks      0  1  2 | 3  4  5          two replicas of three stages
stages     2  1  0 | 2  1  0
"""

from __future__ import annotations

from typing import TypeVar

from lightning.pytorch import Trainer

from lightning_async.strategies.collectives import Collectives
from lightning_async.strategies.pipe_recording import StageRecording
from lightning_async.strategies.pipe_turns import Turns
from lightning_async.transport.mail import Wait

T = TypeVar("T")


class Pipes(Collectives):
    """Pipelines, seen from one rank.

    Attributes:
        replicas: How many there are.
        fitting: Whether this run trains.
        cuts: The blocks at which the stages behind the first begin, once the network is cut.
    """

    replicas = 1
    fitting = False
    cuts: tuple[int, ...] = ()
    _turns: Turns | None = None

    @property
    def depth(self) -> int:
        """How many stages there are."""
        return self.world_size // self.replicas

    @property
    def index(self) -> int:
        """The stage of this rank: the last one is rank 0's."""
        return self.depth - 1 - self.global_rank % self.depth

    @property
    def piped(self) -> bool:
        """Whether there is more than one rank; a single one is plain training."""
        return self.world_size > 1

    def together(self, waiting: Wait[T]) -> T:
        """Run a `Wait` to its end. Each message leaves at once: a neighbour may have nothing else to do."""
        return self.office.drive(waiting, leaves="at once")

    def ranks_of_pipe(self) -> list[int]:
        """Who holds which stage of this rank's pipeline, first to last."""
        start = self.global_rank // self.depth * self.depth
        return [start + self.depth - 1 - stage for stage in range(self.depth)]

    def ranks_of_stage(self) -> list[int]:
        """Who holds this rank's stage in each replica."""
        return list(range(self.global_rank % self.depth, self.world_size, self.depth))

    @property
    def recording(self) -> StageRecording:
        """Where this rank's events go, if anywhere."""
        found = self.office.recording
        assert isinstance(found, StageRecording)  # it was put there with the office
        return found

    @property
    def trainer(self) -> Trainer:
        """The Trainer that this strategy serves."""
        if self.lightning_module is None:
            raise RuntimeError("there is no trainer before `connect`")
        return self.lightning_module.trainer

    @property
    def turns(self) -> Turns:
        """This rank's batches. There are none before `setup`."""
        if self._turns is None:
            raise RuntimeError("there is no pipeline outside of a run")
        return self._turns

    @property
    def last(self) -> bool:
        """Whether this rank has the loss."""
        return self.index == self.depth - 1
