"""What Lightning's loop asks of a strategy for a batch, and what that is in a pipeline.

              last stage                                      the others
step          the user's, with what arrived as the call's     a turn in the pipe (`pipe_turns`), and a zero for a loss
backward      Lightning's, then the gradient goes back        none: it comes with a gradient from behind
optimizer     Lightning's                                     none: it comes with the last gradient of a group
data          the same batches on all; the order of each epoch is drawn alike
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.algorithms.algorithm import no_shrink
from lightning_async.data.counts import samples_in
from lightning_async.pipeline import draws
from lightning_async.strategies import compat, unreplayable, whole
from lightning_async.strategies.at_rest import Resting
from lightning_async.strategies.facts import digest, name_of
from lightning_async.strategies.garbage import Garbage
from lightning_async.strategies.pipe_averages import PipeAverages
from lightning_async.strategies.pipe_data import FromMidEpoch, stamp_of, under_way
from lightning_async.strategies.pipe_recording import Held

Timeline = list[tuple[str, int, float, float]]


class PipeBatches(Resting):
    """The batches of one rank, as Lightning's loop sees them.

    Attributes:
        timelines: The first passes of each stage, after a fit.
    """

    timelines: dict[int, Timeline]
    _stepped = -1
    _here = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.timelines = {}
        self._garbage = Garbage()
        self.averages = PipeAverages(self)

    def listen(self) -> None:
        """Stop here if somebody stopped the run."""
        self.office.listen()

    def process_dataloader(self, dataloader: object) -> object:
        """Its iterator is made next; where a run goes on in mid-epoch, as the one that was made then."""
        if not self.trainer.training:
            return dataloader
        if not self.piped:
            return self.recording.noted(self, dataloader)
        compat.set_sampler_epoch(self.trainer, dataloader)
        began = self.turns.batches if self.begun else self.epoch_began  # `begun`: it is loaded anew for the next epoch
        draws.reseed(self.turns.seed, began, draws.ITERATOR)
        done = self.turns.batches - began
        noted = self.recording.noted(self, dataloader, done=done)
        return FromMidEpoch(noted) if done else noted

    def epoch_started(self) -> None:
        """What hooks draw at its start is the same where a run goes on with it."""
        if self.piped:
            self.epoch_began = self.turns.batches
            draws.reseed(self.turns.seed, self.turns.batches, draws.BETWEEN)
            if self.averages.takes_statistics():
                self.turns.drain()
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                self.turns.only_forward = True

    def skip_done(self, fetcher: Any) -> None:
        """Where a run goes on in mid-epoch: what it was trained on is fetched in vain, from the random numbers of then.
        All loaders together: the order of each is drawn with its first batch, and a short one begins again. Behind the
        first epoch Lightning makes a new iterator right after this, if there is nothing to go on with."""
        for batch in range(self.epoch_began, self.turns.batches):
            draws.reseed(self.turns.seed, batch, draws.FETCH)
            compat.skip_batch(fetcher)
        under_way(fetcher.combined_loader)
        draws.reseed(self.turns.seed, self.epoch_began, draws.ITERATOR)

    def fetch_next(self) -> None:
        """A batch is fetched next: from random numbers of its own, whatever hooks and validations drew."""
        draws.reseed(self.turns.seed, self.turns.batches, draws.FETCH)

    def on_train_start(self) -> None:
        """Right before the first batch."""
        self._garbage.set_aside()
        self.batches_alone, self._stepped = 0, -1
        self.begin_log()
        if (law := self._law_of_shrinking()) is not None:
            self.recording.cannot_be_replayed(
                f"{law} shrinks gradients, by factors that a pipeline's log does not hold"
            )
        for why in unreplayable.reasons(self.trainer, self.recording.fed):
            self.recording.cannot_be_replayed(why)
        self.recording.start(self)
        if self.piped:
            self.begun = True
            self.put_back(self.resumed.get("kept", {}))
            self.go_on_between_steps()
        if not self.last and self.lr_scheduler_configs:
            for optimizer in self.optimizers:  # its first real step comes late: without this torch would warn
                optimizer.zero_grad()
                optimizer.step()

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Note what the batch is, while it is here; its samples are counted once, on the last stage."""
        if self.trainer.training:
            self.recording.taking()
            if self.last:
                self._here = samples_in(batch) or 0
        if self._turns is not None and self.index in (0, self.depth - 1):
            self.turns.stamp = stamp_of(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        step = partial(super().training_step, *args, **kwargs)
        self.set_off()
        self.samples, self._here = self.samples + self._here, 0
        self._note_knobs()
        return self.turns.train(step, self.precision_plugin.train_step_context) if self.piped else step()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        self.recording.strayed()
        step = partial(super().validation_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.val_step_context) if self.piped else step()

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`."""
        step = partial(super().test_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.test_step_context) if self.piped else step()

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `turns`; rank 0 has the predictions."""
        step = partial(super().predict_step, *args, **kwargs)
        return self.turns.evaluate(step, self.precision_plugin.predict_step_context) if self.piped else step()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Of the last stage alone: the others have no loss."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self.piped:
            self.turns.went_back()
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The step that Lightning's loop asks for: on the last stage as ever, elsewhere it comes with the gradient."""
        if not self.last:
            return closure()
        self._note_knobs()

        def closure_then_average() -> Any:
            result = closure()
            self.turns.average()
            return result

        closure_here = closure_then_average if self.piped else closure
        with self.rounding.stepping(optimizer):
            taken = super().optimizer_step(optimizer, closure_here, model, **kwargs)
        batch = self.turns.batches if self.piped else self.batches_alone
        self.updates += batch != self._stepped  # with several optimizers too, a batch is one step
        self._stepped = batch
        return taken

    def step_now(self, optimizer: Optimizer) -> None:
        """The step of a stage before the last: its gradients are there. Hooks and clipping as ever."""
        self._note_knobs()
        with self.turns.around_step(optimizer), self.rounding.stepping(optimizer):
            super().optimizer_step(optimizer, lambda: None)

    def batch_ended(self, outputs: Any) -> None:
        """One batch is trained on."""
        recording = self.recording
        if self.last:
            recording.loss(outputs)
        recording.batch()
        self.batches_alone += not self.piped
        step = self.turns.batches if self.piped else self.batches_alone
        self.office.mail.at(step)
        recording.stepped(step, self.held)
        self.log_batch()

    @property
    def held(self) -> Held:
        """The weights that live here."""
        return Held(self.turns.parts.own if self.piped else self.trainer.lightning_module.parameters)

    def begins_with(self) -> dict[str, Any]:
        """What a log says of this rank before its first batch. The data are counted where they end."""
        own = {"weights": digest(self.held.flat), "mass": 1, "shrink": self._law_of_shrinking()}
        seed = self.turns.seed if self.piped else 0
        return {**own, "cuts": list(self.cuts), "seed": seed, "counts": self.last, "fed": self.recording.fed}

    def _law_of_shrinking(self) -> str | None:
        """The name of the law that a callback set; None: there is none, or a number of the user's."""
        shrink = self.shrink
        return None if shrink is no_shrink or isinstance(shrink, (int, float)) else name_of(shrink)

    def _note_knobs(self) -> None:
        for optimizer in self.optimizers:
            self.recording.step_with(optimizer, self.optimizers)

    def on_train_end(self) -> None:
        """Every rank takes the whole module home."""
        self.recording.finish()
        if self.piped:
            passes = self.together(whole.gather(self.office.rounds, list(self.turns.place.timeline)))
            self.timelines = {self.depth - 1 - rank: line for rank, line in enumerate(passes[: self.depth])}
            self.take_home()

    def take_home(self) -> None:
        """The whole module from all stages."""
        state = self.trainer.lightning_module.state_dict()
        for part in self.together(whole.gather(self.office.rounds, self.answered_for(state))):
            state |= part
        self.turns.parts.take_home(state)
        self.together(self.averages.take_home())
        self.at_home = True

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What rank 0 has is the run's."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """There is one model, so one tensor."""
        return tensor.unsqueeze(0)
