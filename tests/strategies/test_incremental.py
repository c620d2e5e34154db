"""A run with IDPA: a rank four times slower gets what it can do, and each sample is trained on once an epoch."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AsyncGlobalStrategy, GossipRingStrategy, Incremental, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run

KEPT = Incremental(parts=3, partition="kept")


class Epochs(Callback):
    """What a rank saw and owned in each epoch, and how long it waited for the others."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies
        self.seen: list[list[int]] = []
        self.owned: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        module.seen.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, *batch: Any) -> None:
        if self.dies and trainer.current_epoch == 1 and len(module.seen) >= 8:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seen.append(list(module.seen))
        owned = trainer.strategy.feeding.partition()
        self.owned.append([] if owned is None else owned.tolist())


def _fit(
    devices: int,
    balance: Any,
    epochs: int = 3,
    path: str | None = None,
    save: str | None = None,
    dies: int | None = None,
    batch: int = 4,
    method: str = "none",
) -> dict[str, Any]:
    rank, lit = int(os.environ["RANK"]), Lit()
    seen = Epochs(dies=rank == dies)
    callbacks: list[Callback] = [SpeedFaults(step_seconds=0.01, slow={devices - 1: 4.0}), seen]
    if save is not None:
        callbacks.append(ModelCheckpoint(save, filename="it"))
    if method == "async_global":
        strategy: Any = AsyncGlobalStrategy(balance=balance, local_steps="epoch", silence=0.5)
    else:
        strategy = GossipRingStrategy(balance=balance, mode="none", silence=0.5)
    t = trainer(
        devices, strategy=strategy, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=save is not None
    )
    t.fit(lit, loader(batch), loader(40, shuffle=False), ckpt_path=path)
    return {"weights": weights(lit), "seen": seen.seen, "owned": seen.owned}


def of_epoch(ends: list[dict[str, Any]], epoch: int) -> Counter[int]:
    return Counter(index for end in ends for index in end["seen"][epoch])


@pytest.mark.few(1)
@pytest.mark.parametrize("balance", ["incremental", Incremental(parts=4, nominal="probe")])
def test_every_sample_once_an_epoch_and_a_slow_rank_gets_less(balance: Any) -> None:
    ends = run(4, _fit, 4, balance)
    assert all(end["weights"] == ends[0]["weights"] for end in ends[1:])
    for epoch in range(3):
        assert of_epoch(ends, epoch) == Counter(range(240))
    assert len(ends[3]["seen"][2]) < 0.6 * 240 / 4  # 18 if nothing disturbed the ranks


@pytest.mark.few(0)
def test_the_papers_form_adds_a_part_an_epoch_and_moves_nothing() -> None:
    ends = run(4, _fit, 4, Incremental(parts=3, partition="kept"), 4, None, None, None, 2)
    for epoch, total in enumerate([80, 160, 240, 240]):
        assert of_epoch(ends, epoch) == Counter(dict.fromkeys(of_epoch(ends, epoch), 1))
        assert sum(of_epoch(ends, epoch).values()) == total
    for end in ends:
        for before, after in zip(end["owned"], end["owned"][1:], strict=False):
            assert set(before) <= set(after)
        assert [sorted(seen) for seen in end["seen"]] == end["owned"]
    assert len(ends[3]["owned"][2]) < 0.6 * 240 / 4


@pytest.mark.few(0)
@pytest.mark.parametrize("balance", ["incremental", KEPT])
def test_with_a_server_and_one_exchange_an_epoch_as_in_the_paper(balance: Any) -> None:
    ends = run(3, _fit, 3, balance, 3, None, None, None, 4, "async_global")
    assert all(end["weights"] == pytest.approx(ends[0]["weights"]) for end in ends[1:])
    assert of_epoch(ends, 2) == Counter(range(240))


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("balance", ["incremental", KEPT])
def test_the_others_go_on_after_a_death(balance: Any) -> None:
    with Forked(3, _fit, 3, balance, 4, None, None, 1, store=True) as forked:
        results = forked.results(60)
    assert results[1].kind == "gone"
    ends = [r.value for r in results if r.kind is None]
    assert len(ends) == 2, results
    assert of_epoch(ends, 3) == Counter(range(240))


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*does not go on to the bit", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("balance", "before", "after"), [("incremental", 2, 2), ("incremental", 2, 3), (KEPT, 2, 2), (KEPT, 3, 2)]
)
def test_a_resumed_run_knows_speeds_and_owners(balance: Any, before: int, after: int, tmp_path: Path) -> None:
    first = run(before, _fit, before, balance, 2, None, str(tmp_path))
    second = run(after, _fit, after, balance, 4, str(tmp_path / "it.ckpt"))
    assert of_epoch(second, 1) == Counter(range(240))
    if balance is KEPT:
        assert sum(of_epoch(first, 1).values()) == 160
        owned = {rank: set(end["owned"][-1]) for rank, end in enumerate(first)}
        assert all(owned[rank] <= set(second[rank]["owned"][0]) for rank in range(after))
    elif after == before:
        slow = [len(end["seen"][0]) for end in second]
        assert slow[-1] < 0.8 * max(slow)
