"""A run without epochs in mind, killed and resumed: no completed sample is lost, none is trained on twice."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_async import (
    AsyncGlobalStrategy,
    CyclicDelayStrategy,
    DelayedPipelineStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    SpeedFaults,
)
from tests.strategies.lit import Lit, Numbers, loader, trainer
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import files_of

SAVED = "saved"
MINE: dict[str, Any] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
    "lazy_sign": LazySignStrategy,
    "delayed_pipeline": partial(DelayedPipelineStrategy, stages="layer"),
    "meets often": partial(GossipRingStrategy, meet_every=56),
}
FREE = ["gossip_ring", "async_global", "cyclic_delay", "meets often"]
KILLED = -signal.SIGKILL
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:.*not resumable", "ignore:rank 1 had no batch in this epoch"
)


class Diary(L.Callback):
    """Writes down what this rank trains on, and when it saves; survives a SIGKILL.

    The first rank that finds the run at step `kill_at` kills all, wherever they are.
    """

    def __init__(self, folder: Path, part: int, kill_at: int | None) -> None:
        self.folder, self.part, self.kill_at = folder, part, kill_at

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.file = (self.folder / f"{self.part}.{trainer.global_rank}").open("w", buffering=1)
        (self.folder / f"pid.{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, _: Any, batch: Any, __: int) -> None:
        self.file.write(" ".join(map(str, batch[0].tolist())) + "\n")
        if self.kill_at is not None and trainer.global_step >= self.kill_at:
            pids = {int((self.folder / f"pid.{rank}").read_text()) for rank in range(trainer.world_size)}
            for pid in sorted(pids, key=os.getpid().__eq__):  # itself last
                os.kill(pid, signal.SIGKILL)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.file.write(f"{SAVED} {trainer.global_step}\n")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.file.close()


def train(
    name: str,
    folder: Path,
    part: int,
    kill_at: int | None,
    path: str | None,
    balance: str | None,
    length: float = math.inf,
) -> tuple[int, list[int]]:
    """From one's own stream without a `balance`, rank 1's of this length; else from the shared samples."""
    steps: list[int] = []
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    faults = SpeedFaults(step_seconds=0.01, slow={1: 4.0})
    t = trainer(
        int(os.environ["WORLD_SIZE"]),
        strategy=MINE[name](**({"balance": balance} if name in FREE and balance else {})),
        callbacks=[Diary(folder, part, kill_at), faults, saver],
        enable_checkpointing=True,
        max_steps=45,
        max_epochs=-1,
        val_check_interval=10,
        check_val_every_n_epoch=None,
    )
    module = Lit()
    module.on_validation_epoch_end = lambda: steps.append(t.global_step)  # type: ignore[method-assign]
    t.fit(
        module,
        loader() if balance else DataLoader(Numbers(length if os.environ["RANK"] == "1" else math.inf), batch_size=4),
        loader(40, shuffle=False),
        ckpt_path=path,
    )
    return t.global_step, steps


def kill_and_resume(name: str, folder: Path, *data: Any, n: int = 2) -> None:
    """Killed behind the second of the four saves, and resumed from there; all that was to come comes."""
    with Forked(n, train, name, folder, 1, 26, None, *data) as killed:
        for process in killed.processes:
            process.join(60)
        assert [process.exitcode for process in killed.processes] == [KILLED] * n
    assert sorted(p.name for p in folder.glob("*.ckpt")) == ["step=10.ckpt", "step=20.ckpt"]
    found = run(n, train, name, folder, 2, None, str(folder / "step=20.ckpt"), *data)
    assert [steps for steps, _ in found] == [45] * n
    assert all(validated == found[0][1] for _, validated in found)
    assert found[0][1][-2:] == [30, 40], "validated where it was to be, after the resume too"
    saved = {file.name: file for file in folder.glob("*.ckpt")}
    assert sorted(saved) == [f"step={step}.ckpt" for step in (10, 20, 30, 40)], "saved where it was to be, too"
    for step in (30, 40):
        main = torch.load(file := saved[f"step={step}.ckpt"], weights_only=True)
        assert main["global_step"] == step
        if name != "delayed_pipeline":  # its stages are one whole, in one file
            assert sorted(files_of(file)) == list(range(n))


def entries(folder: Path, part: int, until: str | None = None, ranks: Sequence[int] = (0, 1)) -> list[int]:
    """What these ranks trained on, up to a save."""
    found: list[int] = []
    for rank in ranks:
        for line in (folder / f"{part}.{rank}").read_text().splitlines():
            if line == until:
                break
            found += [] if line.startswith(SAVED) else map(int, line.split())
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "balance"),
    [
        *product(("gossip_ring", "async_global"), ("claim", "equal")),
        ("lazy_sign", "its own"),
        *product(("cyclic_delay",), ("equal", "claim")),
    ],
)
def test_what_was_saved_and_what_came_after_the_resume_make_whole_epochs(
    tmp_path: Path, name: str, balance: str
) -> None:
    kill_and_resume(name, tmp_path, balance)
    before, after = entries(tmp_path, 1, f"{SAVED} 20"), entries(tmp_path, 2)
    assert len(before) == 20 * 8
    assert len(after) == 25 * 8
    counts = Counter(before + after)
    assert set(counts) == set(range(240)), "every sample of the first epoch"
    assert max(counts.values()) == 2, "none more than once an epoch"
    assert sum(counts.values()) == 45 * 8


@pytest.mark.few(0)
@pytest.mark.parametrize("name", ["gossip_ring", "async_global"])
def test_so_they_do_on_four_ranks(tmp_path: Path, name: str) -> None:
    """45 steps are three epochs there."""
    kill_and_resume(name, tmp_path, "claim", n=4)
    before, after = (entries(tmp_path, part, until, range(4)) for part, until in ((1, f"{SAVED} 20"), (2, None)))
    assert (len(before), len(after)) == (20 * 16, 25 * 16)
    assert Counter(before + after) == dict.fromkeys(range(240), 3)


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("gossip_ring", math.inf),
        ("meets often", 20),  # while rank 1 has no more, too
        ("gossip_ring", 20),
        *product(("cyclic_delay",), (math.inf, 20)),
        ("lazy_sign", math.inf),
        *product(("async_global",), (math.inf, 20)),
    ],
)
def test_streams_go_on_where_each_rank_completed_its_last_sample(tmp_path: Path, name: str, length: float) -> None:
    kill_and_resume(name, tmp_path, None, length)
    before = [entries(tmp_path, 1, f"{SAVED} 20", [rank]) for rank in range(2)]
    after = [entries(tmp_path, 2, None, [rank]) for rank in range(2)]
    for one, more in zip(before, after, strict=True):
        assert one + more == list(range(len(one + more))), "each sample of the stream once, none left out"
    assert (sum(map(len, before)), sum(map(len, after))) == (20 * 8, 25 * 8)
    if length == 20:
        assert len(before[1] + after[1]) == 20
    for part, all_of, first in ((1, before, 10), (2, after, 30)) if length > 20 else ():
        # the way to the first point is shared out before speeds are known
        to_first = [entries(tmp_path, part, f"{SAVED} {first}", [rank]) for rank in range(2)]
        fast, slow = (len(one) - len(other) for one, other in zip(all_of, to_first, strict=True))
        assert slow > 0, "the slow rank trains on when all are killed, and when they have resumed"
        assert fast > 1.2 * slow if name in FREE else fast == slow, "the fast rank did not wait for the slow one"


@pytest.mark.few(0)
@pytest.mark.parametrize("balance", [None, "its own"], ids=["stream", "data set"])
def test_the_stages_of_a_pipeline_go_on_behind_the_last_batch_that_was_saved(
    tmp_path: Path, balance: str | None
) -> None:
    """All stages train on the same batches."""
    kill_and_resume("delayed_pipeline", tmp_path, balance)
    before, after = (
        [entries(tmp_path, part, until, [rank]) for rank in range(2)] for part, until in ((1, f"{SAVED} 20"), (2, None))
    )
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert (len(before[0]), len(after[0])) == (20 * 4, 25 * 4)
    if balance is None:
        assert before[0] + after[0] == list(range(45 * 4))
    else:
        assert len({*before[0], *after[0]}) == 45 * 4, "an epoch has 60 batches: none came twice"
