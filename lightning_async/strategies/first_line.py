"""What rank 0 says before the first step, in one line: who trains, how late anything may be, what it costs, and where
statistics go.

    gossip_ring: 4 members, 8.1 MB of weights each, data by 'claim', at meetings they adopt the consensus; what is later
    than 1000 steps is sent back; a member holds 8.1 MB more on cpu and 108 MB in host memory, and sends 16.2 MB every 2
    steps; statistics of DelayStats go to CSVLogger (logs/version_0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.gossip import Alone, Gossip
from lightning_async.algorithms.late_sign import LateSign
from lightning_async.algorithms.weighting import bound_among
from lightning_async.callbacks.stats import Stats
from lightning_async.pipeline import schedule
from lightning_async.strategies import compat
from lightning_async.strategies.account import Account, short
from lightning_async.strategies.members import sizes
from lightning_async.strategies.pipe_turns import stash_limit

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy
    from lightning_async.strategies.pipe_setup import PipeSetup

IN_STEP = "in lock-step, so nothing is late"


def of_members(strategy: AsyncStrategy) -> str:
    """The line of a run whose members have replicas."""
    replica, members = strategy.replica, strategy.members
    each = sizes(strategy.office.ranks_of_members)
    size = short(replica.numel * replica.flat.element_size())
    adopt = "adopt the consensus" if strategy.at_meeting == "adopt" else "keep their own weights"
    late, cost = bound(strategy.algorithm, members), costs(strategy.account, strategy.root_device)
    return (
        f"{strategy.name}: {members} members{each}, {size} of weights each, data by {strategy.feeding.balance!r}, at "
        f"meetings they {adopt}; {late}; {cost}; {statistics(strategy.trainer)}"
    )


def of_stages(strategy: PipeSetup) -> str:
    """The line of a pipeline."""
    depth, parts = strategy.depth, strategy.turns.parts
    held = [stash_limit(stage, depth, strategy.order) for stage in range(depth)]
    accounts = strategy.accounts_of_stages()
    weights = ", ".join(short(parts.nbytes(stage)) for stage in range(depth))
    old = ", ".join(short(one.device) for one in accounts)
    late = ", ".join(str(schedule.delay(stage, depth)) for stage in range(depth))
    advice = learning(strategy.trainer, depth, strategy.compensate, strategy.baseline)
    return (
        f"{strategy.name}: {depth} stages, {strategy.replicas} replicas, all read the same batches; first to last, "
        f"stages have {weights} of weights and {old} of old ones on {strategy.root_device.type}, their gradients are "
        f"{late} batches late, and they hold {', '.join(map(str, held))} batches ({strategy.semantics}); each has "
        f"{short(max(one.host for one in accounts))} in host memory, and 8 times what a batch is between stages "
        f"for each neighbour; {'; '.join(filter(None, (advice, statistics(strategy.trainer))))}"
    )


def costs(account: Account, device: torch.device) -> str:
    """What a member holds and sends."""
    held = f"a member holds {short(account.device)} more on {device.type} and {short(account.host)} in host memory"
    return f"{held}, and sends {short(account.wire)} {account.when}" if account.wire else f"{held}, and sends nothing"


def bound(algorithm: Algorithm, members: int) -> str:
    """How late anything may be."""
    if isinstance(algorithm, Alone):
        return "nothing is exchanged between meetings"
    if algorithm.in_step:
        return IN_STEP
    if isinstance(algorithm, Gossip):
        late = algorithm.max_delay
        return "no bound on delays" if late is None else f"what is later than {late} steps is sent back"
    if isinstance(algorithm, LateSign):
        most = f"at most {algorithm.max_skip} in a row without the same rank"
        return f"a round waits {algorithm.deadline:g} s for the late, {most}"
    if isinstance(algorithm, CyclicDelay) and algorithm.token == "strict":
        return f"no push is more than {members - 1} versions late"
    if isinstance(algorithm, (AsyncGlobal, CyclicDelay)):
        late, what = bound_among(members, algorithm.max_delay), getattr(algorithm, "on_late", "shrink")
        if late is None:
            return "no bound on delays"
        if what == "wait":
            return f"no push is later than a healthy one by more than {late} versions: fast members wait"
        done = {"shrink": "shrunk", "drop": "dropped"}[what]
        return f"a push that is later than a healthy one by more than {late} versions is {done}"
    return "members meet at the ends of epochs only"


def learning(trainer: Trainer, stages: int, compensate: str, baseline: str) -> str:
    """With what a pipeline learns better, where gradients are more than an update late and nothing is done about it."""
    schedules = [c for c in compat.callbacks(trainer) if isinstance(c, GradientAccumulationScheduler)]
    every = max([trainer.accumulate_grad_batches, *(m for one in schedules for m in one.scheduling.values())])
    parts = 2 * (stages - 1)
    if every >= parts or compensate != "none" or baseline == "sync":
        return ""
    return (
        f"with accumulate_grad_batches={parts}, batches as many times smaller, and compensate='predict' it learns more "
        "like plain training (docs/delayed_pipeline.md)"
    )


def statistics(trainer: Trainer) -> str:
    """Which there are, and where they go."""
    measured = [c for c in compat.callbacks(trainer) if isinstance(c, Stats)]
    if not measured:
        return "no statistics (DelayStats and its like make some)"
    names = ", ".join(type(c).__name__ for c in measured)
    places = [f"{type(one).__name__} ({one.log_dir or one.save_dir or 'no folder'})" for one in trainer.loggers]
    places += sorted({c.folder for c in measured if c.folder is not None})
    return (
        f"statistics of {names} go to {', '.join(places) if places else 'the progress bar alone: there is no logger'}"
    )
