"""Scenes: the callbacks that come with Lightning."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from tests.strategies.features.fits import (
    STEPS,
    Fitted,
    Watch,
    alike,
    fit,
    heard,
    held_out,
    lines,
    maker,
    rank,
    samples,
    told,
)
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import Lit

SECTION = "Callbacks"


class Own(Lit):
    """Logs what each rank sees otherwise, and does not say `sync_dist`."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        falls = (-1) ** self.global_rank * self.current_epoch
        self.log("own", float(falls))


def saving(folder: Path) -> dict[str, Any]:
    def saves(name: str, **options: Any) -> Fitted:
        saver = ModelCheckpoint(folder / name, filename="{epoch}-{step}", **options)
        found = fit(Own(), callbacks=[saver], enable_checkpointing=True)
        files = sorted(p.name for p in (folder / name).glob("*.ckpt"))
        return Fitted(found, files=files, best=Path(saver.best_model_path).name)

    return {
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
            "Checkpoint",
            "as a base class",
            lambda a, b: issubclass(ModelCheckpoint, Checkpoint) and alike(a["monitor"], b["monitor"]),
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
    """Rank 1 fails at its third batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and args[-1] == 2:
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
    saver = OnExceptionCheckpoint(folder, filename="broken")
    sentence = heard(lambda: fit(callbacks=[Fails(), saver], enable_checkpointing=True, max_epochs=9))
    return {**found, "seconds": ended, "sentence": sentence, "kept": (folder / "broken.ckpt").exists()}


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
            lambda a, b: "enough" in a["sentence"] and "enough" in b["sentence"] and a["kept"],
        ),
    ],
    warnings=["Checkpoint directory"],
)


class Backbone(Lit):
    """Has a backbone to thaw, and freezes it by itself where a test asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0], self.backbone(batch[1]), batch[2]), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


class Thaws(BaseFinetuning):
    """Thaws the backbone at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


def _thawed(trainer: L.Trainer, module: L.LightningModule) -> bool:
    return all(p.requires_grad for p in module.backbone.parameters())  # type: ignore[union-attr]


def averaging(folder: Path) -> dict[str, Any]:
    return {
        "ema": fit(callbacks=[EMAWeightAveraging(decay=0.9)]),
        "mean": fit(callbacks=[WeightAveraging()]),
        "swa": fit(callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=3),
        "backbone": fit(Backbone(), callbacks=[BackboneFinetuning(1, verbose=False)], look=_thawed),
        "thaws": fit(Backbone(), callbacks=[Thaws()], look=_thawed),
        "accumulate": fit(callbacks=[GradientAccumulationScheduler({1: 4})]),
        "plain": fit(),
    }


AVERAGED = "averages of all ranks become their mean before they are validated, saved, or left as the result"
AVERAGING = Scene(
    SECTION,
    averaging,
    [
        *[
            works(
                kind, "", lambda a, b, k=key: alike(a[k], b[k]) and a[k].metrics["val"] == b[k].metrics["val"], AVERAGED
            )
            for kind, key in (("EMAWeightAveraging", "ema"), ("WeightAveraging", "mean"))
        ],
        works(
            "StochasticWeightAveraging",
            "",
            lambda a, b: alike(a["swa"], b["swa"]),
            "it averages what all hold after a meeting",
        ),
        *[
            works(
                kind,
                "",
                lambda a, b, k=key: alike(a[k], b[k]) and not a[k].looked[0] and a[k].looked[-1] and b[k].looked[-1],
                "thaws at a meeting; exchange begins anew with the new set",
            )
            for kind, key in (("BackboneFinetuning", "backbone"), ("BaseFinetuning", "thaws"))
        ],
        works(
            "GradientAccumulationScheduler",
            "{1: 4}",
            lambda a, b: (
                alike(a["accumulate"], b["accumulate"])
                and a["accumulate"].epochs[0] == STEPS
                and 3 <= a["accumulate"].epochs[1] - STEPS <= 4
            ),
        ),
    ],
    warnings=["Swapping scheduler", ".*lr_scheduler.step.*"],
)


def _masks(trainer: L.Trainer, module: L.LightningModule) -> tuple[float, ...]:
    return tuple(float(x) for name, b in module.named_buffers() if name.endswith("_mask") for x in b.flatten())


def pruned(folder: Path) -> dict[str, Any]:
    def run(way: str, **options: Any) -> Fitted:
        torch.manual_seed(7)
        lit = Lit()
        layers = [(lit.layer[0], "weight"), (lit.layer[2], "weight")]
        torch.manual_seed(rank())
        return fit(
            lit,
            callbacks=[ModelPruning(way, parameters_to_prune=layers, amount=0.5, **options)],
            max_epochs=3,
            look=_masks,
        )

    return {
        "plain": run("l1_unstructured", use_lottery_ticket_hypothesis=False),
        "lottery": run("l1_unstructured"),
        "random": heard(lambda: run("random_unstructured")),
        "structured": heard(lambda: run("random_structured", use_global_unstructured=False, pruning_dim=0)),
    }


def _zeros(found: Fitted) -> int:
    return sum(w == 0.0 for w in found.weights[:64])


def _prunes(a: Any, b: Any, key: str) -> bool:
    masks = {look for one in (a, b) for look in one[key].looked if look}
    return (
        alike(a[key], b[key])
        and a[key].looked[-1] == b[key].looked[-1]
        and {x for mask in masks for x in mask} == {0.0, 1.0}
    )


PRUNED = Scene(
    SECTION,
    pruned,
    [
        works(
            "ModelPruning",
            '`"l1_unstructured"`',
            lambda a, b: _prunes(a, b, "plain") and _zeros(a["plain"]) > 16,
            "by the consensus: the same weights on all ranks",
        ),
        works(
            "ModelPruning",
            "with the lottery ticket's reset",
            lambda a, b: _prunes(a, b, "lottery"),
            "to what each rank began with: seed all ranks alike, as for `ddp`",
        ),
        refused(
            "ModelPruning",
            '"random_unstructured"',
            "`ModelPruning` with `RandomUnstructured` draws another mask on each rank; use 'l1_unstructured' or "
            "'ln_structured', which go by weights that are equal on all ranks by then",
            key="random",
        ),
        refused(
            "ModelPruning",
            '"random_structured"',
            "`ModelPruning` with `random_structured` draws another mask on each rank; use 'l1_unstructured' or "
            "'ln_structured', which go by weights that are equal on all ranks by then",
            key="structured",
        ),
    ],
)


class Bar(ProgressBar):
    """A bar of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self.shown.append(self.get_metrics(trainer, module).get("train_step"))


def watching(folder: Path) -> dict[str, Any]:
    table = CSVLogger(folder, name="", version="")
    throughput = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)
    rates = LearningRateMonitor(logging_interval="step")
    stats = DeviceStatsMonitor(cpu_stats=True)
    watch = Watch()
    one = maker([throughput, rates, stats, watch], logger=table, log_every_n_steps=4)
    one.accelerator.get_device_stats = lambda device: {"load": 0.5}  # type: ignore[method-assign]  # psutil may lack
    lit = Lit()
    one.fit(lit, samples(), held_out())
    bars = {}
    for name, bar in (("tqdm", TQDMProgressBar()), ("rich", RichProgressBar()), ("own", Bar())):
        quiet = {"enable_progress_bar": True, "enable_model_summary": True}
        summary = RichModelSummary() if name == "rich" else ModelSummary(max_depth=2)
        bars[name] = Fitted(fit(callbacks=[bar, summary], max_epochs=1, **quiet), shown=len(getattr(bar, "shown", [])))
    return {"first": told(one, lit, watch), "table": lines(folder / "metrics.csv") if rank() == 0 else [], **bars}


def _has(table: list[dict[str, str]], part: str) -> list[float]:
    return [float(value) for row in table for name, value in row.items() if part in name]


WATCHING = Scene(
    SECTION,
    watching,
    [
        differs(
            "ThroughputMonitor",
            "",
            "measures the first rank; its figures for all are that times the number of ranks",
            lambda a, b: (
                _has(a["table"], "train/samples_per_sec")
                == [2 * own for own in _has(a["table"], "train/device/samples_per_sec")]
                != []
            ),
        ),
        works("LearningRateMonitor", "", lambda a, b: {*_has(a["table"], "lr-SGD")} == {0.01}),
        works("DeviceStatsMonitor", "", lambda a, b: {*_has(a["table"], "load")} == {0.5}),
        works(
            "TQDMProgressBar",
            "",
            lambda a, b: alike(a["tqdm"], b["tqdm"]),
            "the total is a forecast, since the share follows the speed",
        ),
        works("RichProgressBar", "", lambda a, b: alike(a["rich"], b["rich"]), "the same"),
        works("ProgressBar", "as a base class", lambda a, b: a["own"].shown == a["own"].batches),
        works("ModelSummary", "", lambda a, b: alike(a["tqdm"], b["tqdm"])),
        works("RichModelSummary", "", lambda a, b: alike(a["rich"], b["rich"])),
    ],
    warnings=["Checkpoint directory", "When using the `ThroughputMonitor`", "Experiment logs directory"],
)


class Spikes(SpikeDetection):
    """The user's way to say what a spike is."""


class Sized(Lit):
    """Has what a tuner changes."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return samples(self.batch_size)


def tuned(folder: Path) -> dict[str, Any]:
    return {
        "spikes": heard(lambda: fit(callbacks=[Spikes()])),
        "rate": heard(lambda: fit(callbacks=[LearningRateFinder()])),
        "size": heard(lambda: fit(Sized(), callbacks=[BatchSizeFinder()])),
        "lr_find": heard(lambda: Tuner(maker()).lr_find(Lit(), samples(), held_out())),
        "scale": heard(lambda: Tuner(maker()).scale_batch_size(Sized())),
        "after": fit(max_epochs=1),
    }


FINDS = (
    "`LearningRateFinder` (`Tuner.lr_find`) sweeps the learning rate over steps that ranks take together; find it on "
    "one device with `strategy='auto'`: it holds here as it does with `ddp`"
)
SIZES = (
    "`BatchSizeFinder` tries sizes until the memory of a device is full; find the size on one device with "
    "`strategy='auto'`"
)
TUNED = Scene(
    SECTION,
    tuned,
    [
        refused(
            "SpikeDetection",
            "",
            "`SpikeDetection` compares losses of all ranks at every step; leave it out, or use it with `ddp`",
            key="spikes",
        ),
        refused("LearningRateFinder", "", FINDS, key="rate"),
        refused("BatchSizeFinder", "", SIZES, key="size"),
        refused("Tuner.lr_find", "", FINDS, key="lr_find"),
        refused(
            "Tuner.scale_batch_size",
            "",
            "Tuning the batch size is currently not supported with distributed strategies.",
            key="scale",
        ),
    ],
)

SCENES = [SAVING, STOPPING, AVERAGING, PRUNED, WATCHING, TUNED]
