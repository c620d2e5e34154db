"""Lightning's own loops over a fed loader: an epoch goes on where a checkpoint left it, whenever that was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_async.data.share import Balance
from lightning_async.strategies.feeding import Feeding
from lightning_async.strategies.recording import Recording
from tests.data.epoch_bench import Clock, FakeBoard, at_once

N, BATCH = 50, 8


def office(world: int = 1) -> Any:
    desk: Any = FakeBoard(Clock(), 1).desks()[0]
    desk.world = world
    return SimpleNamespace(
        carrier=desk,
        desk=lambda page: desk,
        drive=at_once,
        recording=Recording(None),
        size=1,
        members=world,
        speaks=True,
        siblings=None,
    )


class Fed(SingleDeviceStrategy):
    """One device whose training data go through a feeding."""

    def __init__(self, balance: Balance = "claim") -> None:
        super().__init__(device=torch.device("cpu"))
        self.feeding, self.office = Feeding(balance), office()

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if not trainer.training:
            return dataloader
        return self.feeding.share_out(dataloader, self.office, lambda: trainer.current_epoch)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        own = {"feeding": self.feeding.state_dict(), "loaders": self.feeding.loader_states()}
        super().save_checkpoint({**checkpoint, **own}, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self.feeding.load_state_dict(checkpoint["feeding"])
        self.feeding.load_loader_states(checkpoint["loaders"])
        return checkpoint


class Lit(LightningModule):
    def __init__(self, *, estimates: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []
        self.estimates = estimates

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        share = self.trainer.strategy.feeding.share  # type: ignore[attr-defined]
        self.seen.append((share.epoch if share is not None else -1, batch[0].long().tolist()))
        return (self.weight * batch[0]).sum()

    def validation_step(self, *_: Any) -> None:
        self.validated.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimates:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 1e-3)


class Interruption(Exception):  # noqa: N818
    """The run is cut short."""


class Saves(Callback):
    """Tells the feeding of each batch, as a strategy does; saves in one hook, at one batch, and stops there."""

    def __init__(self, hook: str, path: Path, epoch: int = 1, batch: int | None = None) -> None:
        self.hook, self.path, self.epoch, self.batch = hook, path, epoch, batch

    def save(self, trainer: Any, hook: str, batch: int | None = None) -> None:
        if (
            hook == self.hook
            and batch == self.batch
            and trainer.current_epoch == self.epoch
            and not trainer.sanity_checking
        ):
            trainer.save_checkpoint(self.path)
            raise Interruption

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.strategy.feeding.completed(batch)
        self.save(trainer, "on_train_batch_end", batch_idx)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer, "on_train_epoch_end")


def loader(batch: int = BATCH, n: int = N, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(n))), batch_size=batch, shuffle=True, **options)


def fit(lit: Lit, callback: Callback, path: Path | None = None, data: Any = None, **options: Any) -> Fed:
    balance = options.pop("balance", "claim")
    trainer = Trainer(
        strategy=(strategy := Fed(balance)),
        callbacks=[callback],
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    held_out = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=4)
    with suppress(Interruption):
        trainer.fit(lit, loader() if data is None else data, held_out, ckpt_path=path, weights_only=True)
    return strategy


WHERE = [("on_train_batch_end", 0), ("on_train_batch_end", 3), ("on_train_batch_end", 6), ("on_train_epoch_end", None)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("balance", ["claim", "equal"])
@pytest.mark.parametrize("estimates", [False, True])
@pytest.mark.parametrize(
    ("hook", "batch", "validate"),
    [
        *((hook, batch, validate) for hook, batch in WHERE for validate in (True, False)),
        ("on_validation_end", None, True),
    ],
)
def test_every_sample_of_every_epoch_is_trained_on_once(
    hook: str, batch: int | None, validate: bool, estimates: bool, balance: Balance, tmp_path: Path
) -> None:
    first, second, path = Lit(estimates=estimates), Lit(estimates=estimates), tmp_path / "it.ckpt"
    options: dict[str, Any] = {"limit_val_batches": float(validate), "balance": balance}
    fit(first, Saves(hook, path, batch=batch), **options)
    fit(second, Saves("", path), path, **options)
    seen = Counter((epoch, sample) for epoch, samples in [*first.seen, *second.seen] for sample in samples)
    assert seen == Counter((epoch, sample) for epoch in range(3) for sample in range(N))


class Numbers(IterableDataset[torch.Tensor]):
    """A stream with a state; at its end it begins again."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < N:
            self.at += 1
            yield torch.tensor(float(self.at - 1))
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Batches(Numbers):
    """A loader with a state of its own, which is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        for numbers in batched(super().__iter__(), BATCH):
            yield [torch.stack(numbers)]


def batched(numbers: Iterator[torch.Tensor], n: int) -> Iterator[list[torch.Tensor]]:
    while batch := list(islice(numbers, n)):
        yield batch


def collated(numbers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack(numbers)]


STREAMS: dict[str, Callable[[], Any]] = {
    "loader": Batches,
    "data set": lambda: DataLoader(Numbers(), batch_size=BATCH, collate_fn=collated),
}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before", "ignore:`Batches` is not a")
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("estimates", [False, True])
@pytest.mark.parametrize(("hook", "batch"), [*WHERE, ("on_validation_end", None)])
def test_a_stream_goes_on_behind_the_last_batch_that_was_trained_on(
    hook: str, batch: int | None, estimates: bool, stream: str, tmp_path: Path
) -> None:
    first, second, path = Lit(estimates=estimates), Lit(estimates=estimates), tmp_path / "it.ckpt"
    fit(first, Saves(hook, path, batch=batch), data=STREAMS[stream]())
    fit(second, Saves("", path), path, data=STREAMS[stream]())
    assert [sample for _, samples in [*first.seen, *second.seen] for sample in samples] == 3 * list(range(N))


def shared_out(feeding: Feeding, data: Any, world: int = 1, epoch: int = 0) -> Any:
    return feeding.share_out(data, office(world), lambda: epoch)


def drawn(feeding: Feeding, data: Any, batches: int = 1) -> Any:
    """An iterator of which at most so many batches are trained on, with one more fetched ahead."""
    iterator = iter(data)
    batch = next(iterator, None)
    while batch is not None and feeding.batches < batches:
        ahead = next(iterator, None)
        feeding.completed(batch)
        batch = ahead
    return iterator


@pytest.mark.parametrize(
    ("limit", "positions", "batches"), [(1.0, 50, 4), (2, 32, 2), (1, 16, 1), (0.5, 32, 2), (9, 50, 4)]
)
def test_limit_is_that_of_a_synchronous_run(limit: float, positions: int, batches: int) -> None:
    feeding = Feeding("claim")
    feeding.limit = limit
    data = shared_out(feeding, loader(), world=2)
    assert feeding.epoch_batches() is None
    drawn(feeding, data, 9)
    assert feeding.epoch_batches() == batches
    assert feeding.samples == positions
    assert feeding.dry


def test_the_batches_of_an_epoch_go_by_the_mean_of_what_all_say() -> None:
    said: dict[str, bytes] = {}

    def agree(word: bytes, *, what: str) -> Any:
        said[what] = word
        yield from ()
        return {0: word, 2: b"25"}  # rank 1 is dead

    feeding, rounds = Feeding("claim"), SimpleNamespace(agree=agree)
    feeding.limit = 1
    data = shared_out(feeding, loader(), world=3)
    assert list(feeding.agree(rounds)) == []
    assert list(said.values()) == [str(BATCH).encode()]
    drawn(feeding, data, 99)
    assert feeding.samples == 49, "3 * 16.5 samples"
    assert feeding.epoch_batches() == 1


class OfThree:
    """Rounds in which the others say this."""

    def __init__(self, *others: bytes) -> None:
        self.others = others

    def agree(self, word: bytes, *, what: str) -> Any:
        yield from ()
        return dict(enumerate([word, *self.others]))


@pytest.mark.parametrize(
    ("limit", "others", "accumulated", "steps"),
    [
        (1.0, [b"8 3", b"8 4"], 1, 5),  # 7, 3 and 4 batches
        (1.0, [b"8 3", b"8 4"], 3, 6),  # 3, 1 and 2 steps, each of 3 batches
        (1.0, [b"16 3", b"8 4"], 1, 5),  # 17 batches of 8, four of which are a step
        (1.0, [b"8 7", b"8 7"], 3, 7),
        (1.0, [b"8", b"8 4"], 1, 7),  # one does not know
        (4, [b"8 3", b"8 4"], 1, 4),
        (6, [b"8 3", b"8 4"], 1, 5),
    ],
)
def test_streams_foresee_what_all_have(limit: float, others: list[bytes], accumulated: int, steps: int) -> None:
    feeding, rounds = Feeding("claim"), OfThree(*others)
    feeding.limit = limit
    feeding.watch(loader())
    assert list(feeding.agree(rounds)) == []  # type: ignore[arg-type]
    assert feeding.foreseen(accumulated) == steps


def test_counts_are_of_batches_and_the_samples_in_them() -> None:
    feeding = Feeding("claim")
    drawn(feeding, shared_out(feeding, loader()), 7)
    assert (feeding.batches, feeding.samples) == (7, N)
    feeding.close()
    assert (feeding.batches, feeding.samples) == (0, 0)


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (DataLoader(TensorDataset(torch.arange(9.0)), batch_sampler=[[1, 2, 3], [4], [5, 6, 7]]), 7),
        (DataLoader(Numbers(), batch_size=7), N),
        (DataLoader(["a", "b", "c"], batch_size=2), 3),  # type: ignore[arg-type]
    ],
)
def test_batches_of_any_kind_are_counted_by_their_samples(data: Any, samples: int) -> None:
    feeding = Feeding("claim")
    drawn(feeding, shared_out(feeding, data), 100)
    assert feeding.samples == samples
    assert feeding.dry


def test_state_before_any_data_is_that_of_no_epoch() -> None:
    feeding = Feeding("claim")
    assert feeding.state_dict()["epoch"] == -1
    assert feeding.loader_states() == []
    assert not feeding.dry
    feeding.load_state_dict(feeding.state_dict())
    assert len(next(iter(shared_out(feeding, loader())))[0]) == BATCH


def test_what_is_left_tells_whether_an_epoch_is_over() -> None:
    feeding = Feeding("claim")
    iterator = drawn(feeding, shared_out(feeding, loader(drop_last=True)), 2)
    assert feeding.left(feeding.state_dict()) == 4 * BATCH
    for batch in iterator:
        feeding.completed(batch)
    feeding.completed()
    assert feeding.left(feeding.state_dict()) == 0


def test_several_loaders_to_share_are_refused_and_streams_are_not() -> None:
    feeding = Feeding("claim")
    shared_out(feeding, DataLoader(Numbers()))
    shared_out(feeding, loader())
    with pytest.raises(MisconfigurationException, match="several training loaders cannot be shared out"):
        shared_out(feeding, loader())


def test_reloaded_loaders_replace_those_before() -> None:
    feeding = Feeding("claim")
    drawn(feeding, shared_out(feeding, loader()), 2)
    again = shared_out(feeding, loader(), epoch=0)
    assert feeding.share is not None
    assert sum(len(batch[0]) for batch in again) == N - 2 * BATCH  # the epoch under way goes on
    drawn(feeding, shared_out(feeding, DataLoader(Numbers())), feeding.batches + 2)
    assert feeding.share is None
    assert feeding.loader_states() == [{"at": 2}]


@pytest.mark.parametrize("kind", ["note", "watch"])
def test_loaders_that_nobody_drew_from_are_replaced_too(kind: str) -> None:
    feeding = Feeding("claim")
    feeding.replace()
    getattr(feeding, kind)(loader(n=80))
    getattr(feeding, kind)(loader(n=96))
    assert feeding.epoch_batches() == 12, "of the longer one of two that are drawn from together"
    feeding.replace()
    getattr(feeding, kind)(loader(n=40))
    assert feeding.epoch_batches() == 5


def test_state_that_advances_unseen_is_told() -> None:
    with pytest.warns(UserWarning, match="`Numbers` has a state, but its copies in the workers advance unseen"):
        shared_out(Feeding("claim"), DataLoader(Numbers(), num_workers=1))


def test_a_loader_of_the_ranks_own_is_watched() -> None:
    feeding = Feeding("claim")
    drawn(feeding, feeding.watch(loader()), 7)
    assert (feeding.batches, feeding.samples, feeding.epoch_batches()) == (7, N, 7)
    assert feeding.dry
