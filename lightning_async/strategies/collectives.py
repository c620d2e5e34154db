"""Lightning's collectives go over all that live while they meet; between meetings each rank answers for itself alone.

    MEETING   barrier, broadcast, reduce, reduce_boolean_decision, all_gather     rounds over the members
    alone     nobody is waited for: one's own value; `all_gather`, which has none, is refused

Never through the default process group: its ranks would have to be at one place at all times.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_async.strategies import words
from lightning_async.strategies.environments import UnevenNodesEnvironment, UnevenSLURMEnvironment
from lightning_async.strategies.office import Office
from lightning_async.transport import attempts
from lightning_async.transport.mail import Wait
from lightning_async.transport.network import by

T = TypeVar("T")


class Collectives(DDPStrategy):
    """A DDPStrategy whose ranks are together only where they meet.

    Attributes:
        name: The strategy's name, for sentences.
        office: This rank's place in the run.
        alone: Whether this rank goes on by itself.
        apart: Whether tensors are not reduced for a while, since not all have them.
        timeout: How long ranks that start may wait for each other.
    """

    name = "async"
    office: Office
    timeout: timedelta
    alone = apart = False

    @property
    def meeting(self) -> bool:
        """Whether all that live are here."""
        return not self.alone and self.office.is_open

    def setup_distributed(self) -> None:
        """All ranks of this attempt find each other, and none of an earlier one. Lightning leaves what is there."""
        with by(self.office.interface):
            if (at := self.cluster_environment) is not None:
                # not every launcher has asked these whether they have a place for each rank
                if isinstance(at, (UnevenNodesEnvironment, UnevenSLURMEnvironment)):
                    at.validate_settings(self.num_processes, self.num_nodes)
                me, world, backend = at.global_rank(), at.world_size(), self.process_group_backend
                place = at.main_address, at.main_port
                attempts.join(*place, me, world, device=self.root_device, backend=backend, timeout=self.timeout)
            super().setup_distributed()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Of all ranks, wherever they are: Lightning counts equally many on each node."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def together(self, waiting: Wait[T]) -> T:
        """Run what waits for the others to its end."""
        return self.office.drive(waiting)

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes what one rank writes: the first that lives."""
        return self.global_rank == self.office.first

    def teardown(self) -> None:
        """What was refused for being on the device meta cannot be moved to the CPU, and its refusal is what is told."""
        try:
            super().teardown()
        except NotImplementedError:
            module = self.lightning_module
            if module is None or not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
                raise

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all that live; between meetings, for nobody."""
        if self.meeting:
            self.together(self.office.rounds.barrier())

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object (text, numbers, lists, dictionaries); between meetings, one's own.

        Lightning's rank 0 is the one that speaks for all: where it is dead, the first that lives.
        """
        src = self.office.first if src == 0 else src
        return self.together(words.broadcast(self.office.rounds, obj, src)) if self.meeting else obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Combine a tensor of all that live; between meetings, one's own."""
        if not isinstance(tensor, Tensor) or not self.meeting or self.apart:
            return tensor
        return self.together(words.reduce(self.office.rounds, tensor, reduce_op))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """All (or any) of those that live; between meetings, one's own."""
        if not self.meeting:
            return decision
        return self.together(words.decide(self.office.rounds, decision, all))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """One tensor of each rank that lives; at meetings only."""
        if not self.meeting:
            raise MisconfigurationException(
                f"strategy={self.name!r}: `all_gather` between meetings would wait for ranks that are at other steps; "
                "call it in validation or at the end of an epoch, or use `ddp`"
            )
        return self.together(words.gather(self.office.rounds, tensor))
