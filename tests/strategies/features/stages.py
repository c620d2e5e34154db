"""Scenes: fit, validate, test and predict; checkpoints and what goes on from them."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint

from tests.strategies.features.fits import (
    SAMPLES,
    STEPS,
    Watch,
    alike,
    fit,
    heard,
    held_out,
    maker,
    rank,
    samples,
    stored,
    told,
)
from tests.strategies.features.table import Scene, Verdict, differs, shown, works
from tests.strategies.lit import Lit

SECTION = "Stages and checkpoints"


class Writer(BasePredictionWriter):
    """Keeps what it is given to write."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[int] = []
        self.epoch: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *_: Any) -> None:
        self.batches += indices

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.epoch = indices


def stages(folder: Path) -> dict[str, Any]:
    saved = ModelCheckpoint(folder, filename="{epoch}-{step}", monitor="val", save_last=True)
    watch, writer, lit = Watch(), Writer(), Lit()
    limits = {"limit_test_batches": 2, "limit_predict_batches": 0.67}
    one = maker([saved, watch, writer], enable_checkpointing=True, **limits)
    before = one.validate(lit, held_out(), verbose=False)
    one.fit(lit, samples(), held_out())
    first = told(one, lit, watch)
    after = one.validate(lit, held_out(), verbose=False)
    watch.evaluated = 0
    tested = [one.test(lit, held_out(), ckpt_path=path, verbose=False) for path in (None, "best", "last")]
    counted, watch.evaluated = watch.evaluated, 0
    predicted = one.predict(lit, held_out())
    nothing = one.predict(lit, held_out(), return_predictions=False)
    one.fit_loop.max_epochs = 3
    one.fit(lit, samples(), held_out())
    return {
        "fit": first,
        "again": told(one, lit, watch),
        "validated": [before, after],
        "tested": tested,
        "counted": counted,
        "predicted": None if predicted is None else len(predicted),
        "nothing": nothing,
        "written": (writer.batches, writer.epoch),
        "best": saved.best_model_path,
        "last": saved.last_model_path,
    }


STAGES = Scene(
    SECTION,
    stages,
    [
        works("Trainer.fit", "", lambda a, b: alike(a["fit"], b["fit"])),
        works(
            "Trainer.fit",
            "once more, for another epoch",
            lambda a, b: alike(a["again"], b["again"]) and a["again"].epoch == 3,
        ),
        works(
            "Trainer.validate",
            "before and after `fit`",
            lambda a, b: a["validated"] == b["validated"] and a["validated"][0] != a["validated"][1],
        ),
        works("Trainer.test", "", lambda a, b: a["tested"] == b["tested"] and "test" in a["tested"][0][0]),
        works(
            "ckpt_path",
            'of `test`: None, "best", "last"',
            lambda a, b: len(a["tested"]) == 3 and a["best"] == b["best"] and a["last"] == b["last"],
        ),
        works("limit_test_batches", "2", lambda a, b: a["counted"] == b["counted"] == 6),
        works(
            "Trainer.predict",
            "",
            lambda a, b: a["predicted"] == b["predicted"] == 2 and a["nothing"] is b["nothing"] is None,
            "each rank returns its own part",
        ),
        works("limit_predict_batches", "0.67", lambda a, b: a["predicted"] == 2),
        works(
            "BasePredictionWriter",
            '"batch_and_epoch"',
            lambda a, b: (
                a["written"][0][:8] == list(range(0, 16, 2))
                and b["written"][0][:8] == list(range(1, 16, 2))
                and len(a["written"][1]) > 0
            ),
            "each rank writes its own part",
        ),
        works("enable_checkpointing", "True", lambda a, b: Path(a["best"]).suffix == ".ckpt"),
    ],
    warnings=[
        "Using `DistributedSampler` with the dataloaders",
        "Checkpoint directory",
        "`.test\\(ckpt_path=None\\)`",
        ".*predict returned None.*",
        "You are using `torch.load`",
    ],
)


def registry() -> list[str]:
    """A stand-in for Lightning's model registry, from which all is there; for what it was asked."""
    asked: list[str] = []

    def download_model(name: str, download_dir: str) -> list[str]:
        asked.append(name)
        return [str(path) for path in Path(download_dir).iterdir()]

    sys.modules["litmodels"] = stand_in = ModuleType("litmodels")
    stand_in.__spec__ = ModuleSpec("litmodels", None)
    stand_in.download_model = download_model  # type: ignore[attr-defined]
    return asked


def resumed(folder: Path) -> dict[str, Any]:
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1, save_last=True)
    shared = ModelCheckpoint(folder / "team_model", filename="x")
    found = {"first": fit(callbacks=[saves, shared], enable_checkpointing=True, max_epochs=1)}
    alone = stored(folder / "last.ckpt")
    more: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 2}
    for path in ("last", folder / f"step={STEPS // 2}.ckpt"):
        again = ModelCheckpoint(folder, filename="other", save_last=True)
        found["last" if path == "last" else "path"] = fit(callbacks=[again], ckpt_path=path, **more)
    asked, again = registry(), ModelCheckpoint(folder, filename="y")
    more |= {"model_registry": "team/model", "default_root_dir": folder}
    found["registry"] = fit(callbacks=[again], ckpt_path="registry", **more)
    return {**found, "asked": asked, "alone": alone, "hpc": heard(lambda: fit(ckpt_path="hpc"))}


RESUMED = Scene(
    SECTION,
    resumed,
    [
        works(
            "ckpt_path",
            "of `fit`: a path",
            lambda a, b: (
                alike(a["path"], b["path"])
                and a["path"].global_step == 2 * STEPS
                and len(a["path"].seen + b["path"].seen) == SAMPLES * 3 // 2
            ),
            "each rank goes on where it was, also in mid-epoch",
        ),
        works(
            "ckpt_path",
            'of `fit`: "last"',
            lambda a, b: alike(a["last"], b["last"]) and a["last"].global_step == 2 * STEPS,
        ),
        works(
            "ckpt_path",
            'of `fit`: "hpc"',
            lambda a, b: "no HPC checkpoint was found" in a["hpc"],
            "the newest that SLURM's requeue signal left; where there is none, Lightning says so",
        ),
        works(
            "a checkpoint",
            "in plain Lightning",
            lambda a, b: a["alone"] == b["alone"] == a["first"].weights,
            "the `.ckpt` file loads without this package, and holds the consensus",
        ),
        shown(
            "a checkpoint",
            "resumed by the same number of ranks",
            Verdict.WORKS,
            "to the bit, in mid-epoch too",
            "strategies/test_resuming.py::test_a_resumed_run_continues_as_if_it_had_not_stopped",
        ),
        shown(
            "a checkpoint",
            "resumed by another number of ranks",
            Verdict.DIFFERS,
            "from the consensus, with a warning; to its first step each rank adds the mean of the gradients that were "
            "added up to one still to come",
            "strategies/test_added_up.py::test_another_world_adds_the_mean_of_what_all_had_added_up_to_its_first_step",
        ),
        works(
            "ckpt_path",
            'of `fit`: "registry"',
            lambda a, b: alike(a["registry"], b["registry"]) and a["registry"].global_step == 2 * STEPS,
            "tried with a stand-in for the package litmodels. As under `ddp` the other ranks of a host do not wait for "
            "the first one's download: let it be there before",
        ),
        works(
            "model_registry",
            "a name",
            lambda a, b: a["asked"] == ["team/model"] and b["asked"] == [],
            'what `ckpt_path="registry"` means; that litmodels uploads what is saved was not tried',
        ),
    ],
    warnings=[
        "Checkpoint directory",
        "You.re resuming from a checkpoint that ended",
        "The dirpath has changed",
        "Be aware that when using `ckpt_path`",
    ],
)


class Keeps(L.Callback):
    """Saves by itself, in a batch and where all have met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0 and len(_) and _[-1] == 2:
            trainer.save_checkpoint(self.folder / f"between{trainer.global_rank}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / "met.ckpt", weights_only=True)


def by_hand(folder: Path) -> dict[str, Any]:
    found = fit(callbacks=[Keeps(folder)], max_epochs=1)
    met, between = stored(folder / "met.ckpt"), (folder / "between0.ckpt").exists()
    return {"found": found, "met": met, "between": between, "rank": rank()}


BY_HAND = Scene(
    SECTION,
    by_hand,
    [
        works(
            "trainer.save_checkpoint",
            "where all have met",
            lambda a, b: a["met"] == b["met"] == a["found"].weights,
            "the consensus; with `weights_only=True` nothing beside it",
        ),
        differs(
            "trainer.save_checkpoint",
            "in a batch hook",
            "one rank's weights, with a warning",
            lambda a, b: a["between"],
        ),
    ],
    warnings=["gossip_ring: a checkpoint between meetings holds the weights of one rank"],
)


SCENES = [STAGES, RESUMED, BY_HAND]
