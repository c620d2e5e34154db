"""A checkpoint of a pipeline is an ordinary one: the whole state dict, the optimizer over all parameters, on rank 0.

    all ranks      the pipe is drained: what is on its way is applied, so that a run can go on from here to the bit
    all to rank 0  each brings what it answers for: weights and buffers of its stage, its part of the optimizer's state
    rank 0         writes

A rank that loads takes its own part again, by the numbering that the user's optimizer has. So plain Lightning goes on
from it, and a pipeline with another number of stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.strategies import compat, foreign, saved_loops, whole
from lightning_async.strategies.pipe_rounding import PipeRounding
from lightning_async.strategies.pipeline_shown import PipelineShown
from lightning_async.strategies.trainable import train_again, trained_now

KEY = "delayed_pipeline"
"""Our key in a checkpoint: what a plain run has no need of."""
Parts = Mapping[str, Mapping[str, Tensor]]
"""Gradients by name, of what lies before the call and of the rest."""


class PipeSaving(PipelineShown):
    """Gives Lightning's file operations their meaning.

    Attributes:
        resumed: What the checkpoint said that the run goes on from.
        epoch_began: After how many batches the epoch began.
        found: The cuts, where they were measured.
        halted: Whether all are behind a batch and its hooks, for what somebody wished.
        at_home: Whether the fit is over, and each rank has the whole module.
        rounding: What half-precision weights of the own stage hold the rounding of.
    """

    resumed: Mapping[str, Any]
    epoch_began = 0
    found: tuple[int, ...] = ()
    halted = at_home = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.resumed = {}
        self.rounding = PipeRounding()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state, on rank 0. Called by all; the pipe is drained, so that a run can go on from it."""
        if not self.meeting or not self.fitting:
            return super().lightning_module_state_dict()
        turns = self.turns
        self.together(turns.place.rest(turns.batches + turns.passes))  # first: who saves alone must hear of it
        turns.drain()
        turns.even_buffers()
        state = super().lightning_module_state_dict()
        for part in self.together(whole.collect(self.office.rounds, self.answered_for(state), 0)):
            state |= part
        return state

    def answered_for(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of the module's state that this rank brings to the whole."""
        names = self.turns.parts.names() if self.global_rank < self.depth else set()
        return {name: value for name, value in state.items() if name in names}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state over all parameters, as that of the optimizer that the user made."""
        if not self.meeting or not self.fitting:
            return super().optimizer_state(optimizer)
        return self.together(self.turns.parts.optimizer_state(optimizer, self.office.rounds))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """What belongs to the parameters that live here."""
        states = checkpoint["optimizer_states"]
        if self.piped:
            pairs = zip(self.optimizers, states, strict=True)
            states = [self.turns.parts.own_state(optimizer, state) for optimizer, state in pairs]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        for optimizer, state in zip(self.optimizers, states, strict=False):
            self.rounding.remember(optimizer, state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Rank 0 writes an ordinary checkpoint; after an exception there is nothing whole to write, and behind the fit
        only the module is."""
        if self.piped and self.fitting and self.alone:
            if not self.at_home:
                why = "after an exception a rank has its own stage only"
                rank_zero_warn(f"{self.name}: {filepath} is not written: {why}")
                return
            self._leave_out_parts(checkpoint, filepath)
        elif self.piped and self.fitting:
            self.hear_counts()
            between = self._is_over(checkpoint["loops"]["fit_loop"])
            stages = self.together(whole.collect(self.office.rounds, self._between_steps(), 0))
            checkpoint[KEY] = {
                "batches": self.turns.batches,
                "passes": self.turns.passes,
                "epoch_began": self.turns.batches if between else self.epoch_began,
                "seed": self.turns.seed,
                "cuts": list(self.found),
                "kept": self.together(self.keeping()),
                "gradients": self._added_up([stage["gradients"] for stage in stages]),
                "norms": [stage["norms"] for stage in stages[: self.depth]],
                "exact": {name: part for stage in stages for name, part in stage["exact"].items()},
                "counted": list(self.counts.told()),
                "trained": trained_now(self.trainer.lightning_module),
            }
        elif self.fitting:
            checkpoint[KEY] = {"counted": list(self.counts.told())}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _leave_out_parts(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        """Behind the fit the optimizers know their own stage, and none is there to ask."""
        parts = [checkpoint.pop(key, None) for key in ("optimizer_states", "lr_schedulers")]
        if any(parts):
            rank_zero_warn(
                f"{self.name}: {filepath} is saved behind the fit, where a rank has the whole module and its own part "
                "of the optimizer's state: it holds the weights alone. What a run is to go on from, save in the fit"
            )

    def _is_over(self, fit: saved_loops.Loop) -> bool:
        """Whether all batches of the epoch are trained on; let the loops say so too."""
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.halted:
            saved_loops.within_batch(fit)
        if not saved_loops.is_between_epochs(fit):
            if last and saved_loops.is_within_batch(fit):
                compat.count_log_step(fit)
                saved_loops.end_epoch(fit, counted=True)
        elif not last and self.turns.batches > self.epoch_began:
            saved_loops.reopen(fit)
        return last

    def _between_steps(self) -> dict[str, Any]:
        """What this stage knows of steps: the gradients added up to the next, the norms of the last, and what weights
        hold the rounding of. What is outside of the blocks is at both ends, and before the first batch nobody knows
        where it belongs: so that is said too."""
        place, mine = self.turns.place, dict[str, dict[str, Tensor]]({"before": {}, "rest": {}})
        for (name, parameter), gradient in zip(self._named(), place.stage.added_up(), strict=True):
            if gradient is not None and not compat.ends_in_step(self.trainer):
                mine[self._lies_before(parameter)][name] = gradient
        exact = self.answered_for(self.rounding.exact())
        return {"gradients": mine, "norms": vars(place.norms), "exact": exact}

    def _added_up(self, stages: Sequence[Parts]) -> list[Parts]:
        """What each pipeline has added up by now to a step still to come, by name."""
        pipes = [stages[first : first + self.depth] for first in range(0, len(stages), self.depth)]
        return [
            {where: {k: v for part in pipe for k, v in part[where].items()} for where in ("before", "rest")}
            for pipe in pipes
        ]

    def go_on_between_steps(self) -> None:
        """How many steps were taken, and what the checkpoint has of the one under way: as many stages know each other's
        norms; another number of pipelines takes the mean of their gradients."""
        place, norms = self.turns.place, self.resumed.get("norms", [])
        place.updates = self.counts.told_taken()
        if len(norms) == self.depth:
            vars(place.norms).update(norms[self.global_rank % self.depth])
        pipes = self.resumed.get("gradients", [])
        if len(pipes) != self.replicas:
            mean = {where: _mean([pipe[where] for pipe in pipes]) for where in ("before", "rest")}
            pipes = [mean] * self.replicas
        mine = pipes[self.global_rank // self.depth]
        found = [(p, mine[self._lies_before(p)].get(name)) for name, p in self._named()]
        place.stage.go_on_with([None if g is None else g.to(p, copy=True) for p, g in found])

    def _named(self) -> list[tuple[str, Tensor]]:
        """The parameters of this stage, in its own order."""
        names = {id(p): name for name, p in self.trainer.lightning_module.named_parameters()}
        return [(names[id(p)], p) for p in self.turns.place.stage.parameters]

    def _lies_before(self, parameter: Tensor) -> str:
        return "before" if self.index == 0 and self.turns.parts.is_outside(parameter) else "rest"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """Read by all ranks."""
        load = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only, **options)
        checkpoint = foreign.read(load, checkpoint_path, self.name)
        self.resumed = checkpoint.get(KEY, {}) if self.fitting else {}
        self._train_again(checkpoint, checkpoint_path)
        fit = checkpoint.get("loops", {}).get("fit_loop")
        if self.fitting and fit:
            if saved_loops.is_between_epochs(fit):
                saved_loops.close(fit)
            compat.tell_epoch(self.trainer, fit)
            within = self.resumed.get("batches", 0) > self.resumed.get("epoch_began", 0)
            saved_loops.begin_loaders_anew(fit, whatever_they_say=self.piped and within)
        return checkpoint

    def _train_again(self, checkpoint: dict[str, Any], path: Any) -> None:
        """What was thawed when the run was saved is thawed, whatever `setup` froze again."""
        module, saved = self.trainer.lightning_module, self.resumed.get("trained")  # older versions did not save it
        if self.piped and saved and (other := train_again(module, saved, checkpoint["state_dict"])):
            rank_zero_warn(
                f"{self.name}: the run goes on with the parameters that were trained when {path} was saved: it trains "
                f"{other}. To train what the module says now, begin a new run with its weights alone"
            )


def _mean(pipes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for pipe in pipes for name in pipe}
    return {name: sum(pipe[name] for pipe in pipes if name in pipe) / len(pipes) for name in names}  # type: ignore[misc]
