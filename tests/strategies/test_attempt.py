"""torchrun starts the ranks of a run that failed anew, in the store that the first ones have used: the run goes on."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.store import Store
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked


class Dies(Lit):
    """Rank `victim` is killed in the second epoch of the first attempt."""

    def __init__(self, victim: int | None) -> None:
        super().__init__()
        self.victim = victim

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (self.global_rank, self.trainer.current_epoch, batch_idx) == (self.victim, 1, 2):
            os.kill(os.getpid(), signal.SIGKILL)


def _fit(folder: Path, victim: int | None) -> Any:
    lit = Dies(victim)
    saver = ModelCheckpoint(folder, save_last=True)
    t = trainer(2, callbacks=[saver], enable_checkpointing=True)
    t.fit(lit, loader(), loader(40, shuffle=False), ckpt_path="last" if victim is None else None)
    return weights(lit), t.global_step


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_is_started_anew_where_it_was(victim: int, tmp_path: Path) -> None:
    with closing(Store()) as store:
        with Forked(2, _fit, tmp_path, victim, store=store) as forked:
            forked.processes[victim].join(30)  # then torchrun ends the others
            assert forked.processes[victim].exitcode == -signal.SIGKILL
        with Forked(2, _fit, tmp_path, None, store=store) as forked:
            found = forked.values(30)
    assert found[0] == found[1]
    assert found[0][1] == 60


def _pipe(_: object) -> Any:
    module = piped.Piped()
    piped.trainer(2, max_epochs=1).fit(module, piped.loader(n=8), piped.loader(n=8))
    return weights(module)


def test_so_is_a_pipeline() -> None:
    with closing(Store()) as store:
        found = []
        for _ in range(2):
            with Forked(2, _pipe, None, store=store) as forked:
                found.append(forked.values(30))
    assert found[0] == found[1]
