"""`len(trainer.train_dataloader)` is ddp's while batches are trained on, and does not bound what a rank trains on."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, Numbers, loader, trainer
from tests.strategies.ranks import run

RANKS, SAMPLES = 2, 60


class Asks(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[int] = set()
        self.sentences: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.lengths.add(len(self.trainer.train_dataloader))  # type: ignore[arg-type]
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.lengths.add(len(self.trainer.train_dataloader))  # type: ignore[arg-type]

    def on_train_epoch_start(self) -> None:
        try:
            len(self.trainer.train_dataloader)  # type: ignore[arg-type]
        except TypeError as error:
            self.sentences.add(str(error))


def fit(options: dict[str, Any], strategy: str) -> tuple[set[int], set[str], list[int]]:
    warnings.simplefilter("ignore")
    lit = Asks()
    faults = SpeedFaults(step_seconds=0.01, slow={1: 5.0})
    trainer(RANKS, strategy=strategy, max_epochs=3, callbacks=[faults]).fit(lit, loader(n=SAMPLES, **options))
    return lit.lengths, lit.sentences, lit.seen


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}, {"drop_last": True}])
def test_the_length_of_a_synchronous_run(options: dict[str, Any]) -> None:
    length = math.ceil(SAMPLES / RANKS / 4)
    fast, slow = run(RANKS, fit, options, "gossip_ring")
    assert fast[0] == slow[0] == {length}
    assert max(len(fast[2]), len(slow[2])) > 3 * 4 * length, "it bounds the rank that came first"
    assert sorted(fast[2] + slow[2]) == sorted(3 * list(range(SAMPLES)))
    assert all("how many batches this rank has is not known before the epoch is over" in s for s in fast[1] | slow[1])
    assert fast[1]


@pytest.mark.few(0)
def test_it_is_the_length_that_ddp_tells() -> None:
    (plain, sentences, _), _ = run(RANKS, fit, {}, "ddp")
    assert plain == {math.ceil(SAMPLES / RANKS / 4)}
    assert sentences == set()


class Own(Lit):
    """What Lightning foresees, and behind which steps of an epoch it validated.

    It may save at the end of the first epoch, and ask how long the run is before the loops know where it goes on.
    """

    def __init__(self, lengths: tuple[int, ...], path: Path | None = None, *, asks: bool = False) -> None:
        super().__init__()
        self.lengths, self.foreseen, self.path, self.asks = lengths, 0.0, path, asks
        self.validated: list[tuple[int, int]] = []
        self.began = 0

    def train_dataloader(self) -> Any:
        return loader(n=self.lengths[min(self.trainer.current_epoch, len(self.lengths) - 1)])

    def configure_optimizers(self) -> Any:
        if self.asks:
            assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        self.foreseen = self.trainer.estimated_stepping_batches

    def on_train_epoch_start(self) -> None:
        self.began = self.trainer.global_step

    def on_train_epoch_end(self) -> None:
        if self.path is not None and self.trainer.current_epoch == 0:
            self.trainer.save_checkpoint(self.path)

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.current_epoch, self.trainer.global_step - self.began))


def _own(lengths: tuple[int, ...], options: dict[str, Any]) -> tuple[float, list[tuple[int, int]], list[int]]:
    warnings.simplefilter("ignore")
    own = {name: options.pop(name) for name in ("path", "asks") if name in options}
    start = options.pop("start", None)
    lit = Own(lengths, **own)
    trainer(RANKS, **options).fit(lit, val_dataloaders=loader(40, shuffle=False), ckpt_path=start)
    return lit.foreseen, lit.validated, lit.seen


def test_a_loader_of_the_user_s_own_has_the_length_that_it_says() -> None:
    options = {"use_distributed_sampler": False, "limit_train_batches": 10, "max_epochs": 3, "val_check_interval": 0.5}
    for foreseen, validated, _ in run(RANKS, _own, (SAMPLES,), options):
        assert foreseen == 30
        assert validated == [(epoch, step) for epoch in range(3) for step in (5, 10)]


@pytest.mark.few(0)
@pytest.mark.parametrize("lengths", [(64, 160, 32), (160, 64)])
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("interval", "fed"), [(0.5, True), (4, True), (0.5, False)])
def test_loaders_that_are_made_anew_are_validated_by_their_own_length(
    lengths: tuple[int, ...], interval: float, fed: bool, asks: bool, tmp_path: Path
) -> None:
    """Also by a run that goes on from the end of an epoch."""
    options: dict[str, Any] = {"max_epochs": len(lengths), "val_check_interval": interval}
    options |= {"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": fed}
    steps = [length // 4 // (RANKS if fed else 1) for length in lengths]
    every = [int(n * interval) if isinstance(interval, float) else interval for n in steps]
    points = [range(one, n + 1, one) for n, one in zip(steps, every, strict=True)]
    expected = [(epoch, step) for epoch, found in enumerate(points) for step in found]
    path = tmp_path / "end.ckpt"
    for _, validated, _ in run(RANKS, _own, lengths, {**options, "path": path}):
        assert validated == expected
    resumed = run(RANKS, _own, lengths, {**options, "start": path, "asks": asks})
    for _, validated, _ in resumed:
        assert validated == [(epoch, step) for epoch, step in expected if epoch > 0]
    samples = Counter(index for _, _, seen in resumed for index in seen)
    assert samples == Counter(index for n in lengths[1:] for index in range(n) for _ in range(1 if fed else RANKS))


class Streaming(Own):
    """A stream of its own for each epoch; the state of one that came to its end is not a beginning."""

    def train_dataloader(self) -> Any:
        return DataLoader(Numbers(self.lengths[self.trainer.current_epoch]), batch_size=4)


def _streaming(path: Path, resume: bool) -> list[int]:
    warnings.simplefilter("ignore")
    lit = Streaming((16, 24), None if resume else path)
    options = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    trainer(1, **options).fit(lit, ckpt_path=path if resume else None)
    return lit.seen


def test_a_stream_that_is_made_anew_begins_in_a_run_that_goes_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    assert run(1, _streaming, path, False) == [[*range(16), *range(24)]]
    assert run(1, _streaming, path, True) == [[*range(24)]]
