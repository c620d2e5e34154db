"""Every fit is a run of its own in its journal, and what a killed one left does no harm to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_async import DelayStats
from lightning_async.callbacks.journal import Journal, read
from lightning_async.cli.story import tell
from tests.callbacks.measured import journal


class Nowhere(Logger):
    """Sends what it gets to a server."""

    @property
    def name(self) -> str:
        return "nowhere"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Gone."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Gone."""


def logging_to(*loggers: Logger) -> Trainer:
    """A Trainer as a journal sees it."""

    class Fake:
        is_global_zero = True

    fake = Fake()
    vars(fake)["loggers"] = list(loggers)
    return cast(Trainer, fake)


class DelayStatsToo(DelayStats):
    """Another callback of the same fit, and so of the same run."""

    shown = ()


def small(**options: Any) -> Trainer:
    """Three batches and no logger."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    short = {"accelerator": "cpu", "devices": 1, "limit_train_batches": 3, "limit_val_batches": 0, "max_epochs": 1}
    return Trainer(logger=False, **{**quiet, **short, **options})


def test_each_fit_of_a_trainer_is_a_run(tmp_path: Path) -> None:
    stats = [DelayStats(folder=str(tmp_path)), DelayStatsToo(folder=str(tmp_path))]
    t = small(callbacks=list(stats))
    for epochs in (1, 2):
        t.fit_loop.max_epochs = epochs
        t.fit(BoringModel())
    met = [line for line in journal(tmp_path) if line["group"] == "delay"]
    assert [line["run"] for line in met] == [1, 1, 2, 2]
    pieces = tell(tmp_path).pieces[0]
    assert len(pieces) == 4


def test_what_a_killed_run_left_is_not_written_on(tmp_path: Path) -> None:
    whole = json.dumps({"run": 4, "group": "logged", "step": 1, "epoch": 0, "at": 0.5, "words": {"a": 1.0}})
    (tmp_path / "meetings.jsonl").write_text(whole + "\n" + whole[:20])
    known = Journal(tmp_path)
    for value in (2.0, 3.0):
        known.write("logged", 2, 0, {"a": value})
    lines = read(tmp_path / "meetings.jsonl")
    assert [(line["run"], line["words"]["a"]) for line in lines] == [(4, 1.0), (5, 2.0), (5, 3.0)]
    assert "\n\n" not in (tmp_path / "meetings.jsonl").read_text()


def test_the_first_logger_that_has_a_folder(tmp_path: Path) -> None:
    found = Journal.of(logging_to(Nowhere(), CSVLogger(tmp_path, name="", version="")), None)
    assert found is not None
    assert found.path == tmp_path / "meetings.jsonl"


def test_no_logger_has_a_folder(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger of this run has a folder, so there is no journal"):
        assert Journal.of(logging_to(Nowhere()), None) is None
    assert Journal.of(logging_to(), None) is None
    assert Journal.of(logging_to(Nowhere()), str(tmp_path)) is not None


def test_where_it_cannot_be_written_the_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    stats = DelayStats(folder=str(tmp_path / "file"))
    t = small(callbacks=[stats])
    with pytest.warns(UserWarning, match="cannot be written .*: the training goes on without it") as said:
        t.fit(BoringModel())
    assert t.global_step == 3
    assert stats.figures
    assert len([one for one in said if "cannot be written" in str(one.message)]) == 1


def test_a_rehearsal_leaves_no_journal(tmp_path: Path) -> None:
    small(callbacks=[DelayStats(folder=str(tmp_path))], fast_dev_run=True).fit(BoringModel())
    assert not list(tmp_path.iterdir())


class Logs(BoringModel):
    """Logs a loss of each epoch and one of each validation; one of them never changes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 5.0)


def test_what_was_logged_is_noted_when_it_was(tmp_path: Path) -> None:
    callbacks = [DelayStats(folder=str(tmp_path)), DelayStatsToo(folder=str(tmp_path))]
    small(callbacks=callbacks, max_epochs=3, limit_val_batches=1).fit(Logs())
    words = [line["words"] for line in journal(tmp_path) if line["group"] == "logged"]
    logged = [{name: value for name, value in word.items() if "loss" in name} for word in words]
    assert logged == [word for epoch in range(3) for word in ({"val_loss": 5.0}, {"loss": float(epoch)})]


def test_what_comes_behind_a_fit_is_none_of_it(tmp_path: Path) -> None:
    t = small(callbacks=[DelayStats(folder=str(tmp_path))], limit_val_batches=1)
    t.fit(Logs())
    before = journal(tmp_path)
    t.validate(BoringModel(), verbose=False)
    assert journal(tmp_path) == before


def test_it_knows_of_which_run_it_is(tmp_path: Path) -> None:
    small(callbacks=[DelayStats(folder=str(tmp_path))]).fit(BoringModel())
    assert (tell(tmp_path).strategy, tell(tmp_path).world) == ("single_device", 1)


@pytest.mark.parametrize("spoiled", [b"\xff\xfe\x80\n", b"\0" * 600, b"3\n", b'{"run": 1}\n', b'[1, "a"]\n'])
def test_what_is_no_line_of_a_journal_is_passed_over(spoiled: bytes, tmp_path: Path) -> None:
    whole = json.dumps({"run": 1, "group": "logged", "step": 1, "epoch": 0, "at": 0.5, "words": {"a": 1.0}})
    strange = json.dumps({"run": 1, "group": "weather", "step": 1, "epoch": 0, "at": 0.5, "words": {"a": 1.0}})
    (tmp_path / "meetings.jsonl").write_bytes(f"{whole}\n{strange}\n".encode() + spoiled)
    assert tell(tmp_path).losses == {"a": [(0.5, 1.0)]}
