"""The other strategies: what each makes of what counts, saves, averages and streams. One table, a column for each.

fits    the same fits under every strategy, on two ranks; what both ranks saw goes to the lines
Line    a feature, its value, and a cell for each strategy: a verdict, words, and what must hold
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.profilers import PyTorchProfiler
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, LazySignStrategy
from tests.strategies import lit, piped
from tests.strategies.features.fits import Fitted, Left, Watch, alike, another, held_out, maker, samples, told
from tests.strategies.features.table import Verdict

NAMES = GLOBAL, CYCLIC, LAZY, PIPE = ("async_global", "cyclic_delay", "lazy_sign", "delayed_pipeline")
STRATEGIES = {GLOBAL: AsyncGlobalStrategy, CYCLIC: CyclicDelayStrategy, LAZY: LazySignStrategy}
EVERY, MOST = 8, 20  # steps


@dataclass(frozen=True)
class Cell:
    """What one strategy makes of a feature."""

    verdict: Verdict
    words: str
    holds: Callable[[Any, Any], bool]

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.words}" if self.words else self.verdict.value


@dataclass(frozen=True)
class Line:
    """One feature with one value, under all of them."""

    of: str
    value: str
    cells: dict[str, Cell]

    def row(self, names: Sequence[str]) -> str:
        """For the page, a cell for each of `names`."""
        return f"| {self.of} | {self.value} | {' | '.join(str(self.cells[name]) for name in names)} |\n"


# -- the fits ----------------------------------------------------------------------------------------------------------


class Own(IterableDataset[Any]):
    """A stream that ends sooner on rank 1."""

    def __init__(self, name: str) -> None:
        self.data = piped.loader().dataset if name == PIPE else samples().dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(40 if os.environ["RANK"] == "0" else 16))


class Told(L.Callback):
    """At its third batch, rank 1 is told something."""

    def __init__(self, do: Callable[[L.Trainer], object]) -> None:
        self.do, self.batches, self.epoch = do, 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches, self.epoch = self.batches + 1, trainer.current_epoch
        if (trainer.global_rank, self.batches) == (1, 3):
            self.do(trainer)


class Notes(TorchCheckpointIO):
    """Whether anything is written by the thread that trains."""

    def __init__(self) -> None:
        self.at_once = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.at_once = self.at_once or threading.current_thread() is threading.main_thread()
        super().save_checkpoint(checkpoint, path, storage_options)


def fits(name: str, folder: Path) -> dict[str, Fitted]:
    """The same fits, under one strategy."""

    def fit(callbacks: Sequence[L.Callback] = (), module: Any = None, data: Any = None, **options: Any) -> Fitted:
        return tried(lambda: _fit(name, callbacks, module or _module(name), data, options))

    def saver(part: str, **when: Any) -> ModelCheckpoint:
        return ModelCheckpoint(folder / part, filename="{step}", save_top_k=-1, **when)

    def left(callbacks: Sequence[L.Callback], **options: Any) -> Fitted:
        first = Left()
        found = fit([first, *callbacks], **options)
        return Fitted(found, began=first.began, trained=first.trained)

    notes, by_hand = Notes(), _module(name)
    by_hand.automatic_optimization = False
    ended = Told(lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    across = {"val_check_interval": EVERY, "check_val_every_n_epoch": None, "max_epochs": -1, "max_steps": MOST}
    found = {
        "steps": fit([saver("steps", every_n_train_steps=EVERY)], _scheduled(name, _cycle), **across),
        "time": fit(
            [saver("time", train_time_interval=timedelta(seconds=0.1))], max_time={"seconds": 0.4}, max_epochs=-1
        ),
        "clock": fit(max_steps=120, max_epochs=-1, val_check_interval=timedelta(seconds=0.05)),
        "later": left([saver("later")], plugins=[AsyncCheckpointIO(notes)], max_epochs=1),
        "accumulated": fit(max_epochs=1, accumulate_grad_batches=2, precision="bf16-true"),
        "average": left([EMAWeightAveraging()], max_epochs=1),
        "profiled": fit(max_epochs=2, profiler=PyTorchProfiler(folder / "profiled", "trace")),
        "plateau": fit(module=_scheduled(name, _plateau), max_epochs=3),
        "by hand": fit(module=by_hand, max_epochs=1),
        "whole": fit(module=_stepped_by(name, torch.optim.Adafactor), max_epochs=1),
        "stop": fit([Told(lambda trainer: setattr(trainer, "should_stop", True))], max_epochs=9),
        "stream": fit(data=DataLoader(Own(name), batch_size=4), max_epochs=1),
        "end": Fitted(
            fit([ended, saver("end", save_on_exception=True, every_n_epochs=99)], max_epochs=99), reached=ended.epoch
        ),
    }
    found["later"] |= {"stored": _stored(folder / "later", _module(name)), "at_once": notes.at_once}
    return {
        key: Fitted(value, files=sorted(f.name for f in (folder / key).glob("*.ckpt"))) for key, value in found.items()
    }


def _fit(name: str, callbacks: Sequence[L.Callback], module: Any, data: Any, options: dict[str, Any]) -> Fitted:
    watch, saves = Watch(), any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"callbacks": [*callbacks, watch], "enable_checkpointing": saves, **options}
    if name == PIPE:
        one, loaders = piped.trainer(2, **options), (piped.loader(), piped.loader(20))
    else:
        one, loaders = maker(strategy=STRATEGIES[name](), **options), (samples(), held_out())
    one.fit(module, loaders[0] if data is None else data, loaders[1])
    return Fitted(told(one, module, watch), total=getattr(module, "total", 0))


def _stored(folder: Path, module: Any) -> list[list[float]]:
    """The weights in each checkpoint there, in the order of the module's parameters."""
    states = [torch.load(file, weights_only=True)["state_dict"] for file in folder.glob("*.ckpt")]
    names = [name for name, _ in module.named_parameters()]
    return [torch.cat([state[name].flatten() for name in names]).tolist() for state in states]


def tried(fit: Callable[[], Fitted]) -> Fitted:
    """What the rank saw, or the sentence with which it was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Fitted(fit(), said="")
        except BaseException as refusal:
            return Fitted(said=str(refusal) or type(refusal).__name__)


def _module(name: str) -> Any:
    return piped.Piped() if name == PIPE else lit.Lit()


def _scheduled(name: str, make: Callable[[Any, int], dict[str, Any]]) -> Any:
    module = _module(name)

    def configure() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        module.total = int(module.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"interval": "step", **make(optimizer, module.total)}}

    module.configure_optimizers = configure
    return module


def _stepped_by(name: str, kind: Any) -> Any:
    module = _module(name)
    module.configure_optimizers = lambda: kind(module.parameters())
    return module


def _cycle(optimizer: Any, total: int) -> dict[str, Any]:
    return {"scheduler": OneCycleLR(optimizer, 0.01, total_steps=total)}


def _plateau(optimizer: Any, total: int) -> dict[str, Any]:
    return {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=1e9), "monitor": "val", "frequency": 4}


# -- what must hold ----------------------------------------------------------------------------------------------------


def of_both(key: str, holds: Callable[[Any], bool] = lambda one: True) -> Callable[[Any, Any], bool]:
    """Both ranks end alike, and each as it should."""
    return lambda a, b: (
        not a[key].said and not b[key].said and alike(a[key], b[key]) and holds(a[key]) and holds(b[key])
    )


def works(key: str, holds: Callable[[Any], bool] = lambda one: True, words: str = "") -> Cell:
    """As with `ddp`."""
    return Cell(Verdict.WORKS, words, of_both(key, holds))


def differs(key: str, words: str, holds: Callable[[Any], bool] = lambda one: True) -> Cell:
    """Otherwise than with `ddp`."""
    return Cell(Verdict.DIFFERS, words, of_both(key, holds))


def refused(key: str, sentence: str) -> Cell:
    """Every rank hears this sentence."""
    return Cell(Verdict.REFUSED, sentence, lambda a, b: sentence in a[key].said and sentence in b[key].said)


def served(cell: Cell) -> dict[str, Cell]:
    """The same under both whose ranks serve global weights, between whose meetings all are free."""
    return {GLOBAL: cell, CYCLIC: cell}


def _line(of: str, value: str, everywhere: Cell | None = None, **cells: Cell) -> Line:
    return Line(of, value, {name: cells.get(name) or everywhere for name in NAMES})  # type: ignore[misc]


def _at(attribute: str) -> Callable[[Any], bool]:
    return lambda one: list(one[attribute]) == [EVERY, 2 * EVERY]


def _validates(one: Any) -> bool:
    """In mid-run, as no count of batches would have it: an epoch has 12 or 8."""
    return bool(one.validated) and one.global_step == 120


def _cycled(one: Any) -> bool:
    """The schedule has the run's length, and ended where one rank's schedule ends."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    twin = OneCycleLR(optimizer, 0.01, total_steps=MOST)
    for _ in range(MOST):
        optimizer.step()
        twin.step()
    return bool(one.total == MOST and round(one.rates[-1], 9) == round(optimizer.param_groups[0]["lr"], 9))


def _later(one: Any) -> bool:
    """One file, which holds what the fit left, and by no thread that trains."""
    return one.stored == [one.left] and not one.at_once


def _averages(a: Any, b: Any) -> bool:
    """What both end with is not what training left; without an average it is."""
    return of_both("average", another)(a, b) and of_both("later", lambda one: not another(one))(a, b)


def _ended(a: Any, b: Any) -> bool:
    """Both were stopped by the signal, at one place, and not by the end of their epochs."""
    one, other = a["end"], b["end"]
    return bool(one.said) and one.said == other.said and bool(one.files) and max(one.reached, other.reached) < 98


OF_THE_RUN = "steps of the run"
LINES = [
    _line(
        "`max_steps`",
        str(MOST),
        works("steps", lambda one: one.global_step == MOST),
        **served(differs("steps", OF_THE_RUN, lambda one: one.global_step == MOST)),
    ),
    _line(
        "`val_check_interval`",
        f"{EVERY}, `check_val_every_n_epoch=None`",
        works("steps", _at("validated")),
        **served(differs("steps", "batches of all ranks", _at("validated"))),
    ),
    _line(
        "`ModelCheckpoint`",
        f"`every_n_train_steps={EVERY}`",
        works("steps", lambda one: one.files == [f"step={2 * EVERY}.ckpt", f"step={EVERY}.ckpt"]),
        **served(differs("steps", OF_THE_RUN, _at("saved"))),
    ),
    _line(
        "`OneCycleLR` by step",
        "`total_steps=trainer.estimated_stepping_batches`",
        works("steps", _cycled),
        **served(differs("steps", "stepped by the run", _cycled)),
    ),
    _line(
        "`ReduceLROnPlateau` by step",
        "",
        differs("plateau", "asked at meetings", lambda one: one.rates[-1] < one.rates[0]),
        delayed_pipeline=refused("plateau", "use interval='epoch'"),
    ),
    _line(
        "`max_time`, `train_time_interval`",
        "",
        differs("time", "by the first rank's clock", lambda one: bool(one.files)),
        delayed_pipeline=differs("time", "all ask each other after every batch", lambda one: bool(one.files)),
    ),
    _line(
        "`val_check_interval`",
        "`timedelta(seconds=0.05)`",
        differs("clock", "by the first rank's clock; all at one meeting", _validates),
        delayed_pipeline=differs("clock", "by the first rank's clock, all after the same batch", _validates),
    ),
    _line(
        "`should_stop`, on one rank",
        "",
        differs("stop", "all stop at a meeting", lambda one: one.epoch == 1),
        delayed_pipeline=differs("stop", "all stop after the same batch", lambda one: one.epoch == 1),
    ),
    _line(
        "SIGTERM to one rank",
        "`ModelCheckpoint(save_on_exception=True)`",
        Cell(Verdict.WORKS, "all save, and stop", _ended),
    ),
    _line("`AsyncCheckpointIO`", "", works("later", _later)),
    _line(
        "`accumulate_grad_batches`, `precision`",
        '2, `"bf16-true"`',
        differs("accumulated", "stepped in float32"),
        **served(differs("accumulated", "each rank its own batches; exchanged and stepped in float32")),
        lazy_sign=differs("accumulated", "exchanged and stepped in float32"),
    ),
    _line("`PyTorchProfiler`", "", works("profiled")),
    _line(
        "`EMAWeightAveraging`",
        "",
        Cell(Verdict.WORKS, "", _averages),
        delayed_pipeline=Cell(Verdict.WORKS, "each stage averages its own, behind each batch", _averages),
    ),
    _line(
        "manual optimisation", "", works("by hand"), delayed_pipeline=refused("by hand", "use automatic optimisation")
    ),
    _line(
        "`Adafactor`",
        "needs whole tensors",
        works("whole"),
    ),
    _line(
        "streams of unequal lengths",
        "",
        **served(differs("stream", "who runs dry comes to the others' meetings")),
        lazy_sign=refused("stream", "where all ranks take each step together they need equal numbers of batches"),
        delayed_pipeline=refused("stream", "all stages must be given the same batches"),
    ),
]
HEAD = """## With the other strategies

The same fits under each, on two ranks; what both ranks saw is compared with what the line says. That all which a run
goes on from comes back to the bit is tested for each of them too. So is, with `delayed_pipeline` as it is and with
the others under a recorded schedule (the same messages at the same steps), that what comes behind a checkpoint on two
ranks, of an epoch's end or of the middle of one, is equal to the bit to what comes there in the run that was not
interrupted. Mirrors of shards, from which nothing is computed while all live, are left out of that: a run that goes
on sends them anew, and a push that waits for one may come later.

"""


def section() -> str:
    """This part of the page."""
    return HEAD + table(NAMES, LINES)


def table(names: Sequence[str], lines: Sequence[Line]) -> str:
    """Lines under a head, a column for each of `names`."""
    head = f"| feature | value | {' | '.join(f'`{name}`' for name in names)} |\n|{' --- |' * (2 + len(names))}\n"
    return head + "".join(line.row(names) for line in lines)
