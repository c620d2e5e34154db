"""Checkpoints between meetings: nobody stops for one, it holds a state of the whole run, and one lost costs none."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import GossipRingStrategy, SpeedFaults
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cut import unpacked
from lightning_async.algorithms.gossip import gossip
from lightning_async.replica import Replica
from lightning_async.strategies import cuts
from lightning_async.strategies.base import AsyncStrategy
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import Draws, assert_nothing_over, files_of, look_when_put_back, rank

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*multiple `ModelCheckpoint`",
    "ignore:You defined a `validation_step`",
    "ignore:The dirpath has changed",
)
N, EVERY, SAMPLES, BATCH = 3, 8, 960, 4
"""Ranks; steps of the run between two cuts; samples of its one epoch: 80 steps."""


def samples(n: int = SAMPLES) -> DataLoader[Any]:
    """In their order, so that positions are samples."""
    data = TensorDataset(torch.arange(n), INPUTS.repeat(n // 240, 1), TARGETS.repeat(n // 240, 1))
    return DataLoader(data, BATCH)


class Stepwise(Draws):
    """The learning rate goes by the run's steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Diary(L.Callback):
    """What happens on this rank: behind each batch, how many had met, which cut was open, how many files there were."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.entries: list[tuple[int, int | None, int]] = []
        self.seen: list[int] = []
        self.rate = 0.0  # at the first batch
        self.stops: Callable[[L.Trainer, int], None] = lambda trainer, batches: None

    def on_train_batch_start(self, trainer: L.Trainer, *batch: Any) -> None:
        self.rate = self.rate or trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        assert strategy.clock.progress is not None
        number, there = open_cut(strategy), len(list(self.folder.glob("*.ckpt")))
        self.entries.append((strategy.clock.progress.meetings, number, there))
        self.seen += batch[0].tolist()
        (self.folder / f"diary{rank()}.json").write_text(json.dumps([len(self.entries), number]))
        self.stops(trainer, len(self.entries))


def open_cut(strategy: AsyncStrategy) -> int | None:
    """The number of the cut that this rank has begun and not ended."""
    gathering = strategy.cuts._gathering
    return None if gathering is None else gathering.number


def diary_of(folder: Path, rank: int) -> tuple[int, int | None]:
    """How far it has come, for who looks from outside; it may be about to write."""
    try:
        batches, number = json.loads((folder / f"diary{rank}.json").read_text())
    except (OSError, ValueError):
        return 0, None
    return batches, number


def wait_for(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def fit(
    folder: str,
    mode: str = "push_sum",
    path: str | None = None,
    *,
    every: int = EVERY,
    stops: Callable[[L.Trainer, int], None] | None = None,
    io: Any = None,
    module: Callable[[], L.LightningModule] = Stepwise,
    step: float = 0.02,
    n: int = SAMPLES,
    knobs: dict[str, Any] | None = None,
    **saver: Any,
) -> dict[str, Any]:
    diary, world = Diary(folder), int(os.environ["WORLD_SIZE"])
    diary.stops = stops or diary.stops
    saves = ModelCheckpoint(folder, every_n_train_steps=every, **{"filename": "{step}", "save_top_k": -1, **saver})
    t = trainer(
        world,
        knobs={"mode": mode, "saves": "cut", **(knobs or {})},
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[diary, saves, SpeedFaults(step_seconds=step, slow={1: 2.0})],
        plugins=[] if io is None else [io],
    )
    restored = look_when_put_back(t, state_of)
    lit = module()
    t.fit(lit, samples(n), ckpt_path=path)
    weights = Replica(lit.parameters()).weights().tolist()
    told = {"restored": restored[0], "entries": diary.entries, "seen": diary.seen, "weights": weights}
    return told | {"last": saves.last_model_path, "best": saves.best_model_path, "rate": diary.rate}


def state_of(t: L.Trainer) -> dict[str, Any]:
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    letters = [letter for box in getattr(strategy.office.mail, "_boxes", {}).values() for letter in box]
    return {
        "own": strategy.replica.own.tolist(),
        "mass": strategy.algorithm.mass,
        "letters": [(letter.peer, letter.message.kind, letter.message.weight) for letter in letters],
        "steps": strategy.steps,
        "global_step": t.global_step,
    }


def seen_by(told: list[dict[str, Any]]) -> list[int]:
    return [sample for one in told for sample in one["seen"]]


def cuts_in(folder: Path) -> list[Path]:
    """The checkpoints that were saved between meetings, the oldest first."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2] or 0))
    return [path for path in paths if all("cut" in own for own in files_of(path).values())]


def check_conserved(path: Path, mode: str, n: int = N) -> None:
    """The main file is the mass-weighted mean of what all had, and of what was under way to them."""
    main, own = torch.load(path, weights_only=True), files_of(path)
    parts = {r: unpacked(file["cut"]) for r, file in own.items()}
    assert len({part.number for part in parts.values()}) == 1
    assert len(parts) == n
    method = gossip(mode)  # type: ignore[arg-type]
    method.mass = UNIT * BATCH
    total, mass = torch.zeros_like(own[0]["weights"], dtype=torch.float64), 0
    for r, file in own.items():
        held = file["parts"]["algorithm"]["mass"]
        total, mass = total + file["weights"].double() * held / UNIT, mass + held
        for letter in parts[r].letters:
            if (worth := method.worth(letter.message)) is not None:
                total, mass = total + worth.vector, mass + worth.mass
    assert mass == n * UNIT * BATCH
    lit = Draws()
    lit.load_state_dict(main["state_dict"])
    torch.testing.assert_close(Replica(lit.parameters()).flat, (total / mass * UNIT).float(), rtol=1e-5, atol=1e-6)
    means = [torch.stack([file["buffers"][name] for file in own.values()]) for name, _ in lit.named_buffers()]
    for mean, buffer in zip(means, lit.buffers(), strict=True):
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, mean.mean(0))
    check_counts(main, own)


def check_counts(main: dict[str, Any], own: dict[int, Any]) -> None:
    """The run's step is that of all ranks' batches, and so is what is done of the epoch."""
    shared = main["lightning_async"]
    batches = sum(file["steps"] for file in own.values())
    assert shared["progress"]["agreed"][:2] == [batches, batches]
    assert main["global_step"] == batches // len(own)
    done = sum(int(amount) for _, amount in shared["data"]["done"])
    assert done == batches * BATCH
    for file in own.values():
        assert {**file["parts"]["progress"], "scheduled": 0} == {**shared["progress"], "scheduled": 0}


@pytest.mark.parametrize("mode", ["push_sum", "pairwise"])
@pytest.mark.few(1)
def test_a_checkpoint_is_written_while_everybody_trains_on_and_the_run_goes_on_from_it(
    mode: str, tmp_path: Path
) -> None:
    first = run(N, fit, str(tmp_path), mode)
    before = first[0]["entries"][0][0]  # meetings that all had had before the first batch
    assert len([1 for met, _, there in first[0]["entries"] if met == before and there]) > 1, "nobody met for it"
    assert sorted(seen_by(first)) == list(range(SAMPLES))
    paths = cuts_in(tmp_path)
    for path in paths:
        check_conserved(path, mode)
    (best,) = {one["best"] for one in first}
    assert Path(best).exists(), "all ranks know the last one by its name"
    assert_nothing_over_but(tmp_path, "diary")
    cut = paths[len(paths) // 2]
    main, own = torch.load(cut, weights_only=True), files_of(cut)
    check_resumed(cut, main, own, run(N, fit, str(tmp_path / "same"), mode, str(cut)))
    other = run(2, resumed_by_others, str(tmp_path / "other"), mode, str(cut))
    for one in other:
        lit = Draws.load_from_checkpoint(cut, map_location="cpu", weights_only=True)
        assert one["restored"]["own"] == Replica(lit.parameters()).flat.tolist()
    assert sorted(done_of(main) + seen_by(other)) == list(range(SAMPLES))


def resumed_by_others(folder: str, mode: str, path: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*does not go on to the bit")
    return fit(folder, mode, path)


def assert_nothing_over_but(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}*"):
        path.unlink()
    assert_nothing_over(folder)


def done_of(main: dict[str, Any]) -> list[int]:
    ranges = main["lightning_async"]["data"]["done"].tolist()
    return [position for at, amount in ranges for position in range(at, at + amount)]


def check_resumed(cut: Path, main: dict[str, Any], own: dict[int, Any], back: list[dict[str, Any]]) -> None:
    """Each rank is what it was, with what was under way to it as its first mail; each sample is trained on once."""
    for r, file in own.items():
        restored = back[r]["restored"]
        assert restored["own"] == file["weights"].tolist(), "its own weights"
        assert restored["mass"] == file["parts"]["algorithm"]["mass"]
        assert restored["steps"] == file["steps"]
        assert restored["global_step"] == main["global_step"]
        letters = [(letter["peer"], letter["message"]["kind"]) for letter in file["cut"]["letters"]]
        assert sorted(one[:2] for one in restored["letters"]) == sorted(letters)
    ahead = [math.log(one["rate"] / 0.01) / math.log(0.99) - main["global_step"] for one in back]
    assert all(-1e-3 < steps < 10 for steps in ahead), "no schedule is behind; who recorded last may have heard of more"
    mass = sum(one["restored"]["mass"] + sum(weight for _, kind, weight in one["restored"]["letters"] if kind == 16)
               for one in back) if main["lightning_async"]["algorithm"] == "PushSum" else N * UNIT * BATCH  # fmt: skip
    assert mass == N * UNIT * BATCH
    assert sorted(done_of(main) + seen_by(back)) == list(range(SAMPLES))
    assert len({tuple(one["weights"]) for one in back}) == 1, "at the end all are the consensus"


# -- faults ------------------------------------------------------------------------------------------------------------


def _stopped(folder: str) -> dict[str, Any]:
    """Rank 2 is stopped before its third batch, until somebody lets it go on."""

    def stop(trainer: L.Trainer, batches: int) -> None:
        if rank() == 2 and batches == 3:
            Path(folder, "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    return fit(folder, stops=stop, every=4)


@pytest.mark.few(0)
def test_a_stopped_rank_stops_nobody_while_a_cut_is_open(tmp_path: Path) -> None:
    """No clock decides: the others come on by so many batches while it stands, and then the cut is whole."""
    with Forked(N, _stopped, str(tmp_path), store=True) as forked:
        wait_for((tmp_path / "stopped").exists)
        wait_for(lambda: diary_of(tmp_path, 0)[1] is not None)
        (mine, number), (other, _) = diary_of(tmp_path, 0), diary_of(tmp_path, 1)
        wait_for(lambda: diary_of(tmp_path, 0)[0] >= mine + 25 and diary_of(tmp_path, 1)[0] >= other + 12)
        assert diary_of(tmp_path, 0)[1] == number
        assert not list(tmp_path.glob("*.ckpt"))
        forked.signal(2, signal.SIGCONT)
        told = forked.values()
    assert sorted(seen_by(told)) == list(range(SAMPLES))
    paths = cuts_in(tmp_path)
    assert paths
    for path in paths:
        check_conserved(path, "push_sum")


class KilledAtMain(TorchCheckpointIO):
    """Rank 0 is killed in the place of writing its second main file."""

    def __init__(self) -> None:
        self.mains = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.mains += os.path.basename(path) == "x.ckpt"
        if self.mains == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


X: dict[str, Any] = {"filename": "x", "save_top_k": 1, "enable_version_counter": False}


def _killed(folder: str) -> dict[str, Any]:
    return fit(folder, io=KilledAtMain() if rank() == 0 else None, **X)


def _again(folder: str) -> dict[str, Any]:
    return fit(folder, path=f"{folder}/x.ckpt", step=0.004, **X)


@pytest.mark.few(0)
def test_a_kill_in_the_middle_of_a_cut_leaves_the_one_before(tmp_path: Path) -> None:
    with Forked(N, _killed, str(tmp_path), store=True) as forked:
        forked.processes[0].join(40)
        assert forked.processes[0].exitcode == -signal.SIGKILL
    check_conserved(tmp_path / "x.ckpt", "push_sum")
    index = torch.load(tmp_path / "x.ckpt.ranks/index.ckpt", weights_only=True)
    assert len(index["saves"]) == 2, "the one before, and the one that was under way"
    main, own = torch.load(tmp_path / "x.ckpt", weights_only=True), files_of(tmp_path / "x.ckpt")
    check_resumed(tmp_path / "x.ckpt", main, own, run(N, _again, str(tmp_path)))
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["global_step"] > main["global_step"]
    assert_nothing_over_but(tmp_path, "diary")


def _dies(folder: str, dead: int) -> dict[str, Any]:
    """This rank dies in the place of its first record."""

    def die(trainer: L.Trainer, batches: int) -> None:
        if rank() == dead and batches == 1:
            strategy = trainer.strategy
            assert isinstance(strategy, AsyncStrategy)
            assert strategy.cuts._mail is not None
            strategy.cuts._mail._state = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]

    cuts.AGAIN = 0.2
    return fit(folder, stops=die, step=0.01, n=2400, knobs={"silence": 0.3, "patience": 5.0})


@pytest.mark.few(0)
@pytest.mark.parametrize("dead", [1, 0])
def test_those_who_live_give_it_up_and_cut_again(dead: int, tmp_path: Path) -> None:
    with Forked(N, _dies, str(tmp_path), dead, store=True) as forked:
        results = forked.results()
    living = [r for r in range(N) if r != dead]
    assert [one.kind for one in results] == ["gone" if r == dead else None for r in range(N)], results
    for path in cuts_in(tmp_path):
        assert torch.load(path, weights_only=True)["lightning_async"]["ranks"] == living
        assert {unpacked(file["cut"]).members for file in files_of(path).values()} == {tuple(living)}
    assert cuts_in(tmp_path)


def _met_meanwhile(folder: str) -> dict[str, Any]:
    """Rank 0's disk takes the index of a cut only when all have met."""
    met = Event()

    class Waits(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert "index" not in os.path.basename(path) or met.wait(30)
            super().save_checkpoint(checkpoint, path, storage_options)

    def arm(trainer: L.Trainer, batches: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        if batches == 1:
            meet = strategy.cuts.meet
            strategy.cuts.meet = lambda: met.set() or meet()  # type: ignore[method-assign,func-returns-value]

    return fit(folder, stops=arm, io=Waits())


@pytest.mark.few(0)
def test_a_meeting_finds_a_cut_that_is_to_be_written(tmp_path: Path) -> None:
    """What it says is as of the cut, and not of the meeting at which the others hear of it."""
    run(2, _met_meanwhile, str(tmp_path))
    (path,) = cuts_in(tmp_path)
    check_conserved(path, "push_sum", 2)


def _told_to_end(folder: str, which: int) -> dict[str, Any]:
    sent: list[int] = []

    def terminate(trainer: L.Trainer, batches: int) -> None:
        if rank() == which and not sent and any(Path(folder).glob("*.ckpt")):
            sent.append(batches)
            os.kill(os.getpid(), signal.SIGTERM)

    return fit(folder, stops=terminate)


@pytest.mark.few(0)
@pytest.mark.parametrize("which", [0, 2])
def test_a_run_that_is_told_to_end_leaves_whole_files(which: int, tmp_path: Path) -> None:
    """Behind the first checkpoint, when the next cut may be open."""
    with Forked(N, _told_to_end, str(tmp_path), which, store=True) as forked:
        results = forked.results()
    assert {one.kind for one in results} == {"SIGTERMException"}, results
    assert cuts_in(tmp_path)
    for path in cuts_in(tmp_path):
        check_conserved(path, "push_sum")
    assert_nothing_over_but(tmp_path, "diary")


def _full(folder: str) -> dict[str, Any]:
    """Rank 2's disk is full."""

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            raise OSError(28, "No space left on device")

    return fit(folder, io=Full() if rank() == 2 else None)


@pytest.mark.few(0)
def test_who_cannot_write_ends_the_run_and_no_main_file_is_there(tmp_path: Path) -> None:
    with Forked(N, _full, str(tmp_path), store=True) as forked:
        results = forked.results()
    assert results[2].kind == "OSError", results
    assert {results[0].kind, results[1].kind} == {"PeerFailedError"}, results
    assert "No space left" in results[0].error
    assert not list(tmp_path.glob("*.ckpt"))


# -- what it goes with -------------------------------------------------------------------------------------------------


class _Saved(Callback):
    """At which step the last cut was due that was saved before any meeting."""

    at = 0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.at = trainer.strategy.cuts.saved_at  # type: ignore[attr-defined]


def _alone(folder: str, metric: bool) -> tuple[list[str], str, int]:
    """One rank, two callbacks, and one that goes by a metric, at meetings."""
    last = ModelCheckpoint(folder, filename="a{step}", every_n_train_steps=10, save_top_k=1, save_last=True)
    more = ModelCheckpoint(folder, filename="w{step}", every_n_train_steps=15, save_top_k=-1, save_weights_only=True)
    best = ModelCheckpoint(folder, filename="m{step}", every_n_train_steps=25, monitor="train_step")
    saved = _Saved()
    t = trainer(
        1,
        knobs={"saves": "cut"},
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[last, more, *([best] if metric else []), saved, SpeedFaults(step_seconds=0.02)],
    )
    t.fit(Lit(), loader())
    return sorted(path.name for path in Path(folder).glob("*.ckpt")), last.last_model_path, saved.at


@pytest.mark.few(0)
@pytest.mark.parametrize("metric", [False, True])
def test_several_callbacks_and_mere_weights(tmp_path: Path, metric: bool) -> None:
    """60 steps of one rank: a cut is whole a few batches later; a meeting for the metric saves all that is due."""
    ((names, last, saved_at),) = run(1, _alone, str(tmp_path), metric)
    assert metric or saved_at >= 30  # both callbacks' by then
    assert any(name.startswith("m") for name in names) == metric
    assert Path(last).name in names
    assert len([name for name in names if name.startswith("a")]) == 1
    assert any(name.startswith("w") for name in names)
    for name in names:
        main = torch.load(tmp_path / name, weights_only=True)
        assert ("lightning_async" in main) == (not name.startswith("w"))
        Lit().load_state_dict(main["state_dict"])


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"plugins": [AsyncCheckpointIO()]}, "`AsyncCheckpointIO` would write in another one: leave it out"),
    ({}, {"callbacks": [EMAWeightAveraging()]}, "`EMAWeightAveraging` puts other weights into a checkpoint"),
    ({}, {"callbacks": [BackboneFinetuning()]}, "`BackboneFinetuning` puts other weights"),
]


@pytest.mark.parametrize(("knobs", "options", "sentence"), REFUSED, ids=[one[2][:24] for one in REFUSED])
def test_what_does_not_go_with_cuts(knobs: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    class WithBackbone(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(2, 2)

    t = trainer(1, knobs={"saves": "cut", **knobs}, **options)
    with pytest.raises(MisconfigurationException, match=f"strategy='gossip_ring': `saves='cut'`: .*{sentence}"):
        t.fit(WithBackbone(), loader())


def test_weights_that_are_too_long_for_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.strategies.refusals.LONGEST", 400)
    wide = trainer(1, knobs={"saves": "cut", "wire": "bf16"})
    with pytest.raises(MisconfigurationException, match=r"`saves='cut'`: each rank would send .* save at meetings"):
        wide.fit(Lit(), loader())


def test_what_saves_may_be() -> None:
    with pytest.raises(ValueError, match="`saves` must be one of 'meeting', 'cut', got 'cuts'"):
        GossipRingStrategy(saves="cuts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`saves='cut'` is for ranks that run free.*take mode='pairwise'"):
        GossipRingStrategy(mode="sync", saves="cut")


def test_a_cut_that_nothing_asks_for_is_said() -> None:
    with pytest.warns(UserWarning, match="`saves='cut'` is for `ModelCheckpoint"):
        trainer(1, knobs={"saves": "cut"}, max_epochs=1).fit(Lit(), loader())
