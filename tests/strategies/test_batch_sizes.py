"""With unlike batch sizes on the ranks a step of the run is a batch of each, whoever takes how many."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_async import (
    AsyncGlobalStrategy,
    AsyncStrategy,
    CyclicDelayStrategy,
    GossipRingStrategy,
    LazySignStrategy,
    SpeedFaults,
)
from tests.strategies.lit import Lit, Numbers, loader, trainer
from tests.strategies.ranks import Forked, run


class Seen(L.Callback):
    """At which step of the run this rank validates and saves, and after how many of its samples."""

    def __init__(self) -> None:
        self.validated: list[tuple[int, int]] = []
        self.saved: list[tuple[int, int]] = []

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append((trainer.global_step, len(module.seen)))

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: Any) -> None:
        self.saved.append((trainer.global_step, len(module.seen)))


class Meets(L.Callback):
    """After which of its batches this rank meets the others."""

    def __init__(self) -> None:
        self.at: list[int] = []
        self.meetings = 1  # before the first batch

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        progress = trainer.strategy.clock.progress  # type: ignore[attr-defined]
        if progress.meetings != self.meetings:
            self.meetings = progress.meetings
            self.at.append(progress.own.batches)


def fit(sizes: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Fit with a batch size for each rank, of a shared data set or of streams."""
    options = {
        "slow": {1: 4.0},
        "stream": False,
        "module": Lit(),
        "mine": GossipRingStrategy,
        "knobs": {},
        "path": None,
        **options,
    }
    slow, stream, mine, knobs, path = (options.pop(name) for name in ("slow", "stream", "mine", "knobs", "path"))
    size, seen, module = sizes[int(os.environ["RANK"])], Seen(), options.pop("module")
    faults = SpeedFaults(step_seconds=0.006, slow=slow)
    callbacks, meets = [*options.pop("callbacks", []), faults, seen], Meets()
    data = torch.utils.data.DataLoader(Numbers(10**6), batch_size=size) if stream else loader(size)
    one = trainer(len(sizes), strategy=mine(**knobs), callbacks=[*callbacks, meets], **options)
    one.fit(module, data, loader(40, shuffle=False), ckpt_path=path)
    return {
        "step": one.global_step,
        "seen": len(module.seen),
        "validated": seen.validated,
        "saved": seen.saved,
        "met": meets.at,
    }


def samples_at(found: list[dict[str, Any]], what: str = "validated") -> list[tuple[int, int]]:
    """At which steps of the run they met, and the samples of all by then."""
    steps = [[step for step, _ in one[what]] for one in found]
    assert all(one == steps[0] for one in steps), "all at the same steps"
    return [(at[0][0], sum(samples for _, samples in at)) for at in zip(*(one[what] for one in found), strict=True)]


LONG: dict[str, Any] = {"max_epochs": -1, "check_val_every_n_epoch": None}
"""Points within 32 steps are appointed at the meeting before: on a busy machine too nobody hears of them late."""


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [{0: 4.0}, {1: 4.0}, {}], ids=str)
@pytest.mark.parametrize("mine", [GossipRingStrategy, LazySignStrategy])
@pytest.mark.parametrize("sizes", [(4, 12), (6, 2), (4, 4)], ids=str)
def test_a_step_of_streams_is_a_batch_of_each(
    sizes: tuple[int, int], mine: type[AsyncStrategy], slow: dict[int, float]
) -> None:
    options = {"slow": slow, "mine": mine, "stream": True, "max_steps": 25, "val_check_interval": 10, **LONG}
    found = run(2, fit, sizes, options)
    assert {one["step"] for one in found} == {25}
    assert sum(one["seen"] for one in found) == 25 * sum(sizes)
    assert samples_at(found) == [(10, 10 * sum(sizes)), (20, 20 * sum(sizes))]


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [{0: 4.0}, {1: 4.0}], ids=str)
def test_of_sizes_none_of_which_divides_the_other_one_smaller_batch_too_many_at_most(slow: dict[int, float]) -> None:
    options = {"slow": slow, "stream": True, "max_steps": 25, "val_check_interval": 7, **LONG}
    found = run(2, fit, (6, 4), options)
    assert {one["step"] for one in found} == {25}
    assert 250 <= sum(one["seen"] for one in found) < 250 + 4
    met = samples_at(found)
    assert [step for step, _ in met] == [7, 14, 21]
    assert all(10 * step <= samples < 10 * step + 4 for step, samples in met)


@pytest.mark.few(1)
@pytest.mark.parametrize(("sizes", "over"), [((4, 12), 0), ((6, 4), 2)], ids=str)
def test_a_limit_ends_the_epochs_of_streams_after_so_many_batches_of_each(sizes: tuple[int, int], over: int) -> None:
    options = {"slow": {0: 4.0}, "stream": True, "max_epochs": 2, "limit_train_batches": 7}
    found = run(2, fit, sizes, options)
    assert {one["step"] for one in found} == {14}
    (first, half), (last, whole) = samples_at(found)
    assert (first, last) == (7, 14)
    assert 0 <= half - 7 * sum(sizes) <= over
    assert 0 <= whole - half - 7 * sum(sizes) <= over


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [{0: 4.0}, {1: 4.0}, {}], ids=str)
def test_a_step_of_a_shared_data_set(slow: dict[int, float]) -> None:
    """15 steps of 16 samples an epoch, the last batches of which may be smaller: it counts for its steps as a whole.

    Who has no more of the epoch leaves the other one alone, and that may be the one with the larger batches. Each goes
    on with a batch at least behind a meeting, so validations count within the epoch: none falls just before the end.
    """
    options = {"slow": slow, "max_epochs": -1, "max_steps": 25, "val_check_interval": 5}
    found = run(2, fit, (4, 12), options)
    assert {one["step"] for one in found} == {25}
    assert 400 <= sum(one["seen"] for one in found) < 400 + 12
    first, second, *_ = samples_at(found)
    assert first == (5, 80)
    assert second[0] == 10
    assert 160 <= second[1] < 160 + 12


def test_those_who_step_together_meet_after_as_many_of_their_steps_whatever_their_batches() -> None:
    """`meet_every` is in samples of all: after four steps of 16."""
    options = {"mine": LazySignStrategy, "stream": True, "knobs": {"meet_every": 64}, "max_steps": 10, **LONG}
    found = run(2, fit, (4, 12), options)
    assert found[0]["met"] == found[1]["met"] == [4, 8, 10]


@pytest.mark.few(1)
@pytest.mark.parametrize("slow", [{0: 4.0}, {1: 4.0}], ids=str)
def test_free_ranks_meet_after_as_many_samples_of_all_whoever_took_them(slow: dict[int, float]) -> None:
    """Each ends its batch, so there may be less than one of each more; that does not add up."""
    options = {"slow": slow, "stream": True, "knobs": {"meet_every": 64}, "max_steps": 36, **LONG}
    found = run(2, fit, (4, 4), options)
    met = [4 * sum(batches) for batches in zip(*(one["met"] for one in found), strict=True)]
    assert len(met) == 5
    assert all(0 <= samples - 64 * k < 2 * 4 for k, samples in enumerate(met[:-1], 1))
    assert met[-1] == 36 * 2 * 4


class OneHot(Lit):
    """Each batch of rank r moves coordinate r by one: how far the consensus moves there is what its samples count."""

    def __init__(self) -> None:
        super().__init__(lr=1.0)
        self.layer = torch.nn.Linear(int(os.environ["WORLD_SIZE"]), 1, bias=False)  # type: ignore[assignment]
        torch.nn.init.zeros_(self.layer.weight)  # type: ignore[arg-type]
        self.moved: list[tuple[int, list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += batch[0].tolist()
        return -self.layer.weight[0, self.global_rank]  # type: ignore[index]

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_end(self) -> None:
        self.moved.append((len(self.seen), self.layer.weight[0].tolist()))  # type: ignore[index]


def weigh(sizes: tuple[int, ...], mine: type[AsyncStrategy], knobs: dict[str, Any]) -> list[tuple[int, list[float]]]:
    """After how many of this rank's samples the consensus was where, at the meetings behind the first 10 steps."""
    module = OneHot()
    streams = {"stream": True, "max_steps": 30, "val_check_interval": 10, "num_sanity_val_steps": 0, **LONG}
    fit(sizes, {"mine": mine, "knobs": knobs, "module": module, "slow": {0: 4.0}, **streams})
    return module.moved


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("mine", "knobs"),
    [
        (GossipRingStrategy, {}),
        (GossipRingStrategy, {"mode": "push_sum"}),
        (GossipRingStrategy, {"mode": "none"}),
        (CyclicDelayStrategy, {}),
        (AsyncGlobalStrategy, {"attenuation": "none"}),
    ],
    ids=str,
)
def test_one_sample_counts_the_same_whatever_the_size_of_its_batch(
    mine: type[AsyncStrategy], knobs: dict[str, Any]
) -> None:
    """A batch of 12 moves the consensus three times as far as one of 4, which also comes from a slow rank: a step of
    the run takes 16 samples and a step of one, with ddp's learning rate.

    Behind the first meeting: a server knows what others' pushes weigh from their first ones on.
    """
    found = run(2, weigh, (4, 12), mine, knobs)
    for r, moved in enumerate(found):
        (before, there), (after, here) = moved[0], moved[-1]
        assert (here[r] - there[r]) / (after - before) == pytest.approx(1 / 16, rel=1e-5)


def saves(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    logger = CSVLogger(folder / "logs", name="", version=str("path" in options))
    more = {"stream": True, "slow": {0: 4.0}, "enable_checkpointing": True, "logger": logger, **LONG}
    return fit((4, 12), {**more, "callbacks": [saver, EMAWeightAveraging()], **options})


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable", "ignore:Experiment logs")
@pytest.mark.filterwarnings("ignore:`DataLoader` has no state, so this run begins its stream anew")
def test_saved_logged_and_gone_on_with(tmp_path: Path) -> None:
    found = run(2, saves, tmp_path, {"max_steps": 20})
    assert samples_at(found, "saved") == [(10, 160), (20, 320)]
    again = run(2, saves, tmp_path, {"max_steps": 35, "path": tmp_path / "step=10.ckpt"})
    assert samples_at(again, "saved") == [(20, 160), (30, 320)]
    assert sum(one["seen"] for one in again) == 25 * 16
    taken = [one["seen"] / size for one, size in zip(again, (4, 12), strict=True)]
    first = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    assert first["global_step"] == 10
    with (tmp_path / "logs" / "True" / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["progress/samples"]][-1]
    assert float(last["progress/samples"]) == 35 * 16
    assert float(last["progress/batch"]) == 16, "a step is a batch of each, whoever took it"
    before = [samples / size for (_, samples), size in zip([one["saved"][0] for one in found], (4, 12), strict=True)]
    assert float(last["progress/updates"]) == sum(taken) + sum(before), "one by one"


def test_unlike_sizes_of_one_data_set_are_refused_where_all_step_together() -> None:
    """Equal shares of it are then unequal numbers of batches: said before the first of them, by each or by who
    read both words first."""
    with Forked(2, fit, (4, 12), {"mine": LazySignStrategy, "slow": {}, "max_epochs": 1}) as forked:
        results = forked.results()
    kinds = {result.kind for result in results}
    assert "MisconfigurationException" in kinds
    assert kinds <= {"MisconfigurationException", "PeerFailedError"}, results
    for result in results:
        assert "give all ranks one batch_size, or take a mode in which nobody waits" in result.error
        assert "on rank 0: 4, on rank 1: 12" in result.error
