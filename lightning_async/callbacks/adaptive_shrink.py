"""Late contributions count less: a law of their excess delay, asked before each fold, one for each peer.

    arrival -> delay - healthy delay = excess -> law -> factor -> what part of the correction is folded

What is excess depends on the method: a healthy data-parallel run has none and is never shrunk; in a pipeline the delay
is structural, and the law acts on all of it. Where the factors multiply gradients and the optimizer is one of Adam's
family, whose steps are as long whatever its gradients are multiplied by, they multiply its learning rate instead.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_async.algorithms.algorithm import Shrink, no_shrink
from lightning_async.algorithms.scale_free import sees_no_factor
from lightning_async.algorithms.shrink import Law, LawName, Stability, law
from lightning_async.arrival import Arrival
from lightning_async.callbacks.stats import Figures, Stats, check_by_rank
from lightning_async.callbacks.watched import Board, Watched
from lightning_async.fresh import Fresh, nothing_fresh
from lightning_async.progress.stretch import Stretch

OWN = -1
"""The peer under which a rank to which nothing comes late keeps the law that the others go by."""
_PRESSURE = struct.Struct("<d")
_STEPS = ("lr", "momentum")


class AdaptiveShrink(Stats):
    """Multiplies late corrections (in a pipeline: late gradients) by a law of how late they are.

    Logs the factors next to the delays: `shrink/mean`, `shrink/min`, `shrink/from3/mean`, `shrink/excess_mean`.

    Args:
        law: "constant" (beta^e, as FDG), "inverse", "poly", "exp", "hinge", or one that adapts: "relative" (to the
            delays before), "alignment" (to how well what is late agrees with what is fresh), "stability" (to how
            the loss bends, or goes).
        beta: Of `constant`.
        rate: Of `inverse`, `exp` and `hinge`.
        power: Of `poly`.
        knee: Of `hinge`: up to this excess nothing is shrunk.
        healthy: The delay that is no excess; None: what the strategy says.
        by_rank: Up to so many ranks, figures are also logged for each of them; beyond, for all together only.
        folder: Where the journal for `lightning-async report` goes; None: beside the logger's files.
    """

    group = "shrink"
    shown = ("mean",)
    needs = "nothing that is late is folded by itself"

    def __init__(
        self,
        law: LawName = "relative",
        *,
        beta: float = 0.5,
        rate: float = 0.1,
        power: float = 0.5,
        knee: float = 8.0,
        healthy: int | None = None,
        by_rank: int = 16,
        folder: str | None = None,
    ) -> None:
        super().__init__(folder=folder)
        if healthy is not None and (not isinstance(healthy, int) or isinstance(healthy, bool) or healthy < 0):
            raise ValueError(f"`healthy` must be an integer of at least 0, or None, got {healthy!r}")
        check_by_rank(by_rank)
        self.law, self.healthy, self.by_rank = law, healthy, by_rank
        self._knobs = {"beta": beta, "rate": rate, "power": power, "knee": knee}
        self._new_law()  # a wrong knob is told here
        self._laws: dict[int, Law] = {}
        self._sums: dict[int, list[float]] = {}
        self._through_lr = self._missed = self._silent = False
        self._leads = True
        self._latest, self._world, self._inherited = 1.0, 1, 0.0
        self._before: Shrink = no_shrink
        self._rates: dict[int, list[float]] = {}
        self._hooks: list[RemovableHandle] = []
        self._loss: Tensor | None = None
        self._told = -1.0
        self._optimizers: list[Optimizer] = []
        self._every = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to be asked."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._strategy is None:
            return
        if self._strategy.shrink not in (no_shrink, 1.0, self.factor):
            raise MisconfigurationException(
                "AdaptiveShrink: the strategy's `shrink` is set already: take one of the two out"
            )
        self._laws, self._sums, self._world = {}, {}, trainer.world_size
        self._leads = trainer.is_global_zero
        self._before = self._strategy.shrink
        self._strategy.shrink = self.factor
        self._strategy.keep("shrink", _Kept(self))

    def sees(self, strategy: Watched) -> bool:
        """Whether the strategy asks for factors at all."""
        return strategy.shrinks != "nothing"

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Hook in where the law, or the optimizer, needs it."""
        if self._strategy is None:
            return
        self._healthy = self._strategy.healthy_delay if self.healthy is None else self.healthy
        self._inherited = self._strategy.inherited
        self._refuse_unseen(trainer.optimizers)
        self._through_lr = self._strategy.shrinks == "gradients" and any(map(sees_no_factor, trainer.optimizers))
        if self._through_lr:
            self.listen("on_before_optimizer_step", self._slow_down)
            self._hooks = [o.register_step_post_hook(self._speed_up) for o in trainer.optimizers if sees_no_factor(o)]
            if trainer.is_global_zero:
                name = type(trainer.optimizers[0]).__name__
                warnings.warn(
                    f"AdaptiveShrink: {name} takes the same steps whatever its gradients are multiplied by, so the "
                    "factors multiply its learning rate",
                    stacklevel=2,
                )
        if self.law == "stability":
            self._optimizers, self._every = trainer.optimizers, trainer.accumulate_grad_batches
            if not self._through_lr:
                self._strategy.watch_curvature(self._look)
            self.listen("on_train_batch_end", self._observe)

    def end(self, trainer: Trainer) -> None:
        """Nothing is shrunk any more."""
        for optimizer in trainer.optimizers:
            self._speed_up(optimizer)
        while self._hooks:
            self._hooks.pop().remove()
        if self._strategy is not None and self._strategy.shrink == self.factor:
            self._strategy.shrink = self._before

    # -- asked by the algorithm ---------------------------------------------------------------------------------------

    def factor(self, arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        """What part of this arrival counts."""
        mine = self._laws.get(arrival.peer)
        if mine is None:
            mine = self._laws[arrival.peer] = self._new_law()
        if fresh is nothing_fresh and self.law == "alignment" and not self._missed:
            self._missed = True
            warnings.warn(
                "AdaptiveShrink: law='alignment' compares with what is fresh, and here is nothing (in a pipeline: with "
                "semantics='stash' only): it shrinks nothing; use law='stability'",
                stacklevel=2,
            )
        excess = max(0, arrival.delay - self._healthy)
        found = mine.factor(excess, fresh)
        if self._inherited and not self._through_lr:  # others have shrunk it on its way: what is left to do
            found = mine.further(self._inherited * excess, excess)
        sums = self._sums.setdefault(arrival.peer, [0.0, 0.0, 1.0, 0.0])
        sums[0], sums[1], sums[2], sums[3] = sums[0] + 1, sums[1] + found, min(sums[2], found), sums[3] + excess
        self._latest = found
        return 1.0 if self._through_lr else found

    # -- told at meetings ---------------------------------------------------------------------------------------------

    def say(self, stretch: Stretch) -> Any:
        """By peer: how many, sum of factors, smallest factor, sum of excess delays."""
        return {str(peer): sums for peer, sums in list(self._sums.items())}  # a service may fold meanwhile

    def conclude(self, words: Mapping[int, Any]) -> Figures:
        """All ranks' factors of this fit."""
        rows = [(int(peer), sums) for word in words.values() for peer, sums in word.items()]
        figures = _figures([sums for _, sums in rows])
        if self._world <= self.by_rank:
            for rank in range(self._world):
                of_rank = _figures([sums for peer, sums in rows if peer == rank])
                figures |= {f"from{rank}/{name}": value for name, value in of_rank.items()}
        return figures

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_law(self) -> Law:
        return law(self.law, **self._knobs)

    def _refuse_unseen(self, optimizers: list[Optimizer]) -> None:
        """A server's steps are its own: no learning rate of this rank slows them."""
        unseen = [type(_bare(one)).__name__ for one in optimizers if sees_no_factor(one)]
        if unseen and self._strategy is not None and self._strategy.shrinks == "served gradients":
            raise MisconfigurationException(
                f"AdaptiveShrink: {unseen[0]} takes the same steps whatever its gradients are multiplied by, and here "
                "it steps on the server: use push='delta', or SGD"
            )

    def _slow_down(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """For this step only: the gradients are there, the optimizer has not used its learning rate yet."""
        self._speed_up(optimizer)  # a step that fp16's scaler skipped left it slow
        if self._latest < 1 and sees_no_factor(optimizer):
            self._rates[id(_bare(optimizer))] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self._latest

    def _speed_up(self, optimizer: Optimizer, *step: Any) -> None:
        """Before any scheduler looks at the learning rate."""
        rates = self._rates.pop(id(_bare(optimizer)), ())
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    def _observe(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The loss before this one: on a GPU it has been computed by now, and reading it waits for nothing."""
        if self._strategy is not None and not self._strategy.has_replicas:
            self._share_pressure(self._strategy.board, leads=trainer.global_rank == 0)
            if trainer.global_rank:
                return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None and not self._silent and not module.automatic_optimization and trainer.is_global_zero:
            self._silent = True
            warnings.warn(
                "AdaptiveShrink: law='stability' goes by the loss here, and `training_step` returns none: return it, "
                "or use law='relative'",
                stacklevel=2,
            )
        if self._loss is not None:
            for mine in self._laws.values():
                mine.observe(float(self._loss))
        self._loss = loss.detach() if isinstance(loss, Tensor) else None

    def _look(self, turned: float, went: float) -> None:
        """A gradient is a part of those of an update, so what it turns is a part of what they do."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        lr, momentum = (max((float(group.get(name, 0.0)) for group in groups), default=0.0) for name in _STEPS)
        for mine in self._laws.values():
            if isinstance(mine, Stability):
                mine.look(turned * self._every, went, lr=lr, momentum=momentum)

    def _share_pressure(self, board: Board, *, leads: bool) -> None:
        """Of a pipeline only the last stage, rank 0, has a loss. Its note tells the others; nobody waits for it."""
        mine = self._laws.setdefault(OWN, self._new_law()) if leads else None
        if isinstance(mine, Stability) and mine.pressure != self._told:
            self._told = mine.pressure
            board.publish(_PRESSURE.pack(mine.pressure))
        elif not leads and len(note := board.notes().get(0, b"")) == _PRESSURE.size:
            for law in self._laws.values():
                if isinstance(law, Stability):
                    (law.pressure,) = _PRESSURE.unpack(note)


class _Kept:
    """The state of a rank's laws, as the strategy saves it with each rank's own."""

    def __init__(self, shrink: AdaptiveShrink) -> None:
        self._shrink = shrink

    def state_dict(self) -> dict[str, Any]:
        """Of which law, among how many ranks; by peer."""
        mine = self._shrink
        laws = {str(peer): one.state_dict() for peer, one in mine._laws.items()}
        return {"law": mine.law, "world": mine._world, "laws": laws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, if the peers are the same."""
        mine = self._shrink
        if (state["law"], state["world"]) != (mine.law, mine._world):
            if mine._leads:
                warnings.warn(
                    f"AdaptiveShrink: its state was saved with law={state['law']!r} by {state['world']} ranks, and "
                    f"this is {mine.law!r} with {mine._world}: the law begins anew",
                    stacklevel=2,
                )
            return
        for peer, one in state["laws"].items():
            mine._laws[int(peer)] = mine._new_law()
            mine._laws[int(peer)].load_state_dict(one)


def _bare(optimizer: Optimizer) -> Any:
    """Lightning hands out wrappers."""
    return getattr(optimizer, "optimizer", optimizer)


def _figures(rows: list[list[float]]) -> Figures:
    count = sum(row[0] for row in rows)
    if not count:
        return {"count": 0.0}
    return {
        "count": count,
        "mean": sum(row[1] for row in rows) / count,
        "min": min(row[2] for row in rows),
        "excess_mean": sum(row[3] for row in rows) / count,
    }
