"""Scenes: callbacks that save, and those that stop a run."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)

from tests.strategies.features.fits import (
    STEPS,
    Fitted,
    alike,
    fit,
    heard,
    stored,
)
from tests.strategies.features.table import Scene, Verdict, differs, shown, works
from tests.strategies.lit import Lit

SECTION = "Callbacks"


class Own(Lit):
    """Logs what each rank sees otherwise, and does not say `sync_dist`."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        rises = -((-1) ** self.global_rank) * self.current_epoch
        self.log("own", float(rises))


class Keeps(Checkpoint):
    """Saves by itself. Lightning lets those that save stand behind all others."""

    def __init__(self, file: Path) -> None:
        self.file, self.last = file, False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = trainer.callbacks[-1] is self  # type: ignore[attr-defined]
        trainer.save_checkpoint(self.file)


def saving(folder: Path) -> dict[str, Any]:
    def saves(name: str, **options: Any) -> Fitted:
        saver = ModelCheckpoint(folder / name, filename="{epoch}-{step}", **options)
        found = fit(Own(), callbacks=[saver], enable_checkpointing=True)
        files = sorted(p.name for p in (folder / name).glob("*.ckpt"))
        return Fitted(found, files=files, best=Path(saver.best_model_path).name)

    def keeps() -> Fitted:
        saver = Keeps(folder / "own.ckpt")
        return Fitted(fit(callbacks=[saver], enable_checkpointing=True), kept=stored(saver.file), last=saver.last)

    return {
        "own": keeps(),
        "monitor": saves("monitor", monitor="val", save_top_k=1, save_last=True),
        "unsynced": saves("unsynced", monitor="own", save_top_k=1),
        "steps": saves("steps", every_n_train_steps=5, save_top_k=-1),
        "epochs": saves("epochs", every_n_epochs=2, save_top_k=-1),
        "time": saves("time", train_time_interval=timedelta(seconds=0.02), save_top_k=-1),
        "link": saves("link", save_last="link"),
    }


SAVING = Scene(
    SECTION,
    saving,
    [
        works(
            "ModelCheckpoint",
            '`monitor="val"`',
            lambda a, b: (
                a["monitor"].files == b["monitor"].files
                and a["monitor"].best == b["monitor"].best in a["monitor"].files
                and "last.ckpt" in a["monitor"].files
            ),
        ),
        differs(
            "ModelCheckpoint",
            "`every_n_train_steps=5`",
            "steps of the run; all meet for it and save the consensus",
            lambda a, b: (
                a["steps"].saved == b["steps"].saved == [5, 10, 15, 20]
                and a["steps"].files
                == sorted(f"epoch={s // STEPS if s % STEPS else s // STEPS - 1}-step={s}.ckpt" for s in (5, 10, 15, 20))
            ),
        ),
        shown(
            "ModelCheckpoint",
            '`every_n_train_steps=100` beside `saves="cut"`',
            Verdict.DIFFERS,
            "nobody meets for it: markers cut a state of the run while all train on",
            "strategies/test_cuts.py::test_a_checkpoint_is_written_while_everybody_trains_on_and_the_run_goes_on_from_it",
        ),
        works(
            "ModelCheckpoint",
            "`every_n_epochs=2`",
            lambda a, b: a["epochs"].files == b["epochs"].files == [f"epoch=1-step={2 * STEPS}.ckpt"],
        ),
        differs(
            "ModelCheckpoint",
            "`train_time_interval=`",
            "by the first rank's clock, for all",
            lambda a, b: a["time"].saved == b["time"].saved != [] and len(a["time"].files) == len(a["time"].saved),
        ),
        works(
            "ModelCheckpoint",
            '`save_last="link"`',
            lambda a, b: "last.ckpt" in a["link"].files and a["link"].saved == b["link"].saved,
        ),
        works(
            "ModelCheckpoint",
            "`monitor=` what is logged without `sync_dist`",
            lambda a, b: (
                a["unsynced"].files == b["unsynced"].files == [a["unsynced"].best]
                and a["unsynced"].best == b["unsynced"].best == f"epoch=1-step={2 * STEPS}.ckpt"
            ),
            "each rank has its own value; the best are the first rank's best, and called as it calls them",
        ),
        works(
            "Checkpoint",
            "as a base class",
            lambda a, b: (
                alike(a["own"], b["own"])
                and a["own"].kept == b["own"].kept == a["own"].weights
                and a["own"].last
                and b["own"].last
            ),
        ),
    ],
    warnings=[
        "Checkpoint directory",
        ".*could not find the monitored key",
        "You called `self.log\\('own'",
        ".*sync_dist=True.*",
    ],
)


class Fails(Callback):
    """Rank 1 fails at its first batch of the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch > 0:
            raise ValueError("enough")


def stopping(folder: Path) -> dict[str, Any]:
    early = EarlyStopping("val", patience=1, min_delta=1e9)
    by_train = EarlyStopping("train_epoch", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    timer, by_epoch = Timer(timedelta(seconds=0.1)), Timer(timedelta(seconds=0.1), interval="epoch")
    start = time.monotonic()
    found = {
        "early": fit(callbacks=[early], max_epochs=9),
        "train": fit(callbacks=[by_train], max_epochs=9),
        "timer": fit(callbacks=[timer], max_epochs=-1),
        "epoch timer": fit(callbacks=[by_epoch], max_epochs=-1),
    }
    calls: list[str] = []
    keep = LambdaCallback(
        on_train_batch_end=lambda *_: calls.append("batch"), on_validation_end=lambda *_: calls.append("val")
    )
    found["lambda"] = Fitted(fit(callbacks=[keep], max_epochs=1), calls=calls)
    ended = time.monotonic() - start
    savers = [OnExceptionCheckpoint(folder, filename="broken")]
    savers += [ModelCheckpoint(folder, filename="aside", every_n_epochs=99, save_on_exception=True)]
    sentence = heard(lambda: fit(callbacks=[Fails(), *savers], enable_checkpointing=True, max_epochs=9))
    kept = [(folder / name).exists() for name in ("broken.ckpt", "aside.ckpt.rank0", "aside.ckpt")]
    return {**found, "seconds": ended, "sentence": sentence, "kept": kept}


STOPPING = Scene(
    SECTION,
    stopping,
    [
        works(
            "EarlyStopping",
            "on a value of validation",
            lambda a, b: alike(a["early"], b["early"]) and a["early"].epoch == 2,
        ),
        works(
            "EarlyStopping",
            "on `train_epoch`",
            lambda a, b: alike(a["train"], b["train"]) and a["train"].epoch == 2,
            "log it with `sync_dist=True`",
        ),
        differs(
            "Timer",
            '`interval="step"`',
            "the first rank's clock speaks for all",
            lambda a, b: alike(a["timer"], b["timer"]) and a["timer"].global_step > 0,
        ),
        works(
            "Timer",
            '`interval="epoch"`',
            lambda a, b: alike(a["epoch timer"], b["epoch timer"]) and a["epoch timer"].global_step % STEPS == 0,
        ),
        works(
            "LambdaCallback",
            "",
            lambda a, b: a["lambda"].calls.count("batch") == a["lambda"].batches and "val" in a["lambda"].calls,
        ),
        works("Callback", "as a base class", lambda a, b: a["lambda"].batches > 0),
        works(
            "callbacks",
            "one, or several",
            lambda a, b: alike(a["lambda"], b["lambda"]),
            "two of the strategy's own come before them, so that theirs find all ranks together",
        ),
        differs(
            "OnExceptionCheckpoint",
            "",
            "the weights of the first rank, not the consensus: after an exception nobody waits for anybody",
            lambda a, b: "enough" in a["sentence"] and "enough" in b["sentence"] and a["kept"][0],
        ),
        differs(
            "ModelCheckpoint",
            "`save_on_exception=True`",
            "after an exception the first rank's weights, as `NAME.ckpt.rank0`: what all saved stays where it is, and "
            "`last.ckpt` leads there. On a SIGTERM all meet, and save the consensus",
            lambda a, b: a["kept"][1:] == [True, False],
        ),
    ],
    warnings=["Checkpoint directory"],
)


SCENES = [SAVING, STOPPING]
