"""An algorithm is mathematics on one rank's view: tensors and integers come in, corrections and messages go out.

Knobs are in the constructor; all that belongs to a run comes in through `begin` and the hooks' arguments, so that an
algorithm can be built, pickled and tested anywhere. It has no clock, thread, process or Lightning. Each hook is a
generator: where it has to wait it yields the name of what is missing; asynchronous methods never do between meetings.

    begin [load_state_dict] -> ( [gradients] before_step -> optimizer -> after_step )* -> meet [state_dict] -> resume
                                                                                               [renew: another set] -^

A step has one number, from 1 on: `before_step` and `after_step` of one step get the same. Where a run goes on from a
state, the numbers go on too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds

UNIT = 2**32
"""Mass of one sample; masses are integers, so that their sum can be checked exactly."""

Shrink = Callable[[Arrival, Tensor, Fresh], float]
"""Asked before a fold, with the arrival, the correction, and whom to ask how well it agrees with what is fresh; answers
a factor in (0, 1]."""


def no_shrink(arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
    """Every correction counts in full."""
    return 1.0


class Algorithm(ABC):
    """What every method is: four hooks around a rank's steps."""

    shrink: Shrink = staticmethod(no_shrink)
    in_step: bool = False
    """Whether its members wait for each other at every step."""
    takes_gradients: bool = False
    """Whether it steps with the members' gradients itself: `before_step` then comes behind unscaling and clipping, and
    takes them away from the optimizer."""
    shrinks: str = "corrections"
    """What the factors of `shrink` multiply: "corrections" of the weights, "gradients" that a member's optimizer gets,
    "served gradients" that a server's does, or "nothing": it is never asked."""
    kinds: ClassVar[Mapping[int, str]] = {}
    """What its kinds of messages are called where people read them."""
    attends: bool = False
    """Whether the others may need a member while it waits for them to come to a meeting."""
    skipped: int = 0
    """How many exchanges were due and left out, because the one before was still under way."""

    @abstractmethod
    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """A run starts: all replicas are equal, nothing is in flight.

        Args:
            replica: This rank's weights.
            mail: Its end of the links.
            mass: What a step of this rank weighs: UNIT for each of its samples.
            rounds: This algorithm's own rounds, to be kept for the hooks that need them: `meet`, and every step of a
                method in lock-step.
        """

    def renew(self, old: Replica, new: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """What is trained has changed at a meeting: the run goes on with `new`, which is equal everywhere.

        Called between `meet` and `resume`. The parameters that `old` has too are the same ones on all ranks. Most
        methods begin anew; one that holds something back goes on with what it holds of those.
        """
        self.begin(new, mail, mass, rounds)

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """Gradients are there, the optimizer has not run: may change gradients.

        Called once for each step of an optimizer. Where several optimizers step in one batch it is called for each of
        them with the same `step`, which counts batches that ended in a step.

        The gradients are in the `.grad` of the parameters, as backward left them; None where backward did not come.
        They are sums over all batches since the last step of this optimizer: with `accumulate_grad_batches=k`
        Lightning divides each loss by k, so they are the mean over k batches. Lightning's `on_before_optimizer_step`
        and its clipping come afterwards, and see what is left here (under manual optimization backward and clipping
        are the user's, and lie before). With `precision="16-mixed"` they are still multiplied by the scaler's factor,
        and may be infinite: the optimizer then skips the step, and `after_step` follows all the same.
        """
        yield from ()  # never waits
        return []

    @abstractmethod
    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """The optimizer has run `step` times on this rank: fold what came, send what is due. May shift weights."""

    def averaged_over(self, n: int) -> int:
        """Over how many of `n` members a step of one is averaged in the end (see `adam`)."""
        return 1

    def healthy_delay(self, n: int) -> int:
        """The delay that a message has among `n` equal, healthy members; only what is later may be shrunk.

        A pipeline, whose delays are structural and all to be shrunk, says 0.
        """
        return 0

    def accounts(self) -> dict[str, tuple[int, int]]:
        """By name: what this member has, and what it should. Summed over all members, the two must be equal.

        Asked at meetings, when nothing is in flight. Who died took what it had along: such a sum is not checked.
        """
        return {}

    def arrived(self) -> list[Arrival]:
        """What was folded or refused outside of `after_step` (while settling a meeting) since the last call."""
        return []

    @abstractmethod
    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """All members have stopped stepping: drain the mail, settle accounts, return the consensus."""

    def attend(self, replica: Replica, mail: Mail) -> None:
        """If it `attends`: called again and again while the member waits for the others to come to a meeting, behind
        its last step and before `meet`. Never waits; asks its mail at least once."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to do there")

    @abstractmethod
    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """Training goes on after a meeting; `adopted`: every replica is the consensus now, else it kept its own."""

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on beside the weights: tensors, numbers, text, lists and dictionaries.

        Taken at a meeting (after `meet`, before `resume`), when nothing is in flight, so no letter is in it. It loads
        with `torch.load(weights_only=True)`. A method that holds nothing between meetings has none.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, to the bit: called after `begin`, on a replica with the weights of that meeting.

        What follows is the same as after `meet`: `resume`.
        """
        if state:
            raise ValueError(
                f"{type(self).__name__} holds nothing between meetings, and the state of another method does not fit "
                "it: go on with the method that the run was started with, or start anew from the weights alone"
            )
