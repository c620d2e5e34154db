"""A drain within a validation is one of training: with the network, optimizers and gradients of the last batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.strategies.piped import Piped, loader, trainer, weights
from tests.strategies.ranks import run
from tests.strategies.test_half_steps import Free
from tests.strategies.test_pipeline_checkpoints import SAVING, UNSEEN, SavesAt


def _drained(folder: str, validating: bool) -> list[float]:
    """By a save behind the fourth batch."""
    when: dict[str, Any] = {"save_on_train_epoch_end": False} if validating else {"every_n_train_steps": 4}
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    options = {"val_check_interval": 4} if validating else UNSEEN
    lit, knobs = Piped(), {"semantics": "recompute"}
    trainer(2, knobs=knobs, callbacks=[saver], max_epochs=1, **SAVING, **options).fit(lit, loader(), loader(20))
    return weights(lit)


def test_a_save_at_the_end_of_a_validation_drains_the_pipe_as_in_training(tmp_path: Path) -> None:
    """Modules are validating there, and late gradients are those of the network that trains."""
    found = [run(2, _drained, str(tmp_path / str(validating)), validating) for validating in (True, False)]
    assert [file.name for file in sorted((tmp_path / "True").iterdir())] == ["step=4.ckpt", "step=8.ckpt"]
    assert found[0] == found[1]


class Plain(Free):
    """Goes by one method, and leaves it to hooks that nothing of it is recorded."""

    def train(self, mode: bool = True) -> None:
        Free._show.__wrapped__(self, mode)  # type: ignore[attr-defined]

    def eval(self) -> None:
        self.train(False)


class Schedulefree(Piped):
    """Shows its optimizer's average in validations."""

    def __init__(self, kind: type[Free]) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), 0.01)

    def on_validation_start(self) -> None:
        self.optimizers().eval()  # type: ignore[union-attr]

    def on_validation_end(self) -> None:
        """Behind callbacks that save."""
        self.optimizers().train()  # type: ignore[union-attr]


def _shown(file: Path, validating: bool, precision: str, kind: type[Free]) -> list[float]:
    saves = SavesInMode(file, inference=False) if validating else SavesAt(str(file), 4)
    options = {**({"val_check_interval": 4} if validating else UNSEEN), "precision": precision, "max_epochs": 1}
    lit = Schedulefree(kind)
    trainer(2, callbacks=[saves], limit_train_batches=6, **options).fit(lit, loader(), loader(20))
    return weights(lit)


@pytest.mark.few(0)
@pytest.mark.parametrize(("precision", "kind"), [("32-true", Plain), ("bf16-true", Free)])
def test_a_drain_of_optimizers_that_show_averages_is_one_of_training(
    precision: str, kind: type[Free], tmp_path: Path
) -> None:
    """They step from where they train, and validate what they have shown before."""
    found = [run(2, _shown, tmp_path / f"{v}.ckpt", v, precision, kind) for v in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


class SavesInMode(Callback):
    """In inference mode, as Lightning calls its hooks where its process group is NCCL's, or without."""

    def __init__(self, file: Path, inference: bool) -> None:
        self.file, self.inference = file, inference

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        with torch.inference_mode(self.inference):
            trainer.save_checkpoint(self.file)


def _inferred(file: Path, inference: bool, semantics: str) -> list[float]:
    lit, callbacks = Piped(), [SavesInMode(file, inference)]
    options = {"val_check_interval": 1, "limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 1}
    trainer(2, knobs={"semantics": semantics}, callbacks=callbacks, **options).fit(lit, loader(), loader(20))
    return weights(lit)


@pytest.mark.few(0)
@pytest.mark.parametrize("semantics", ["recompute", "stash"])
def test_a_drain_in_inference_mode_is_one_of_training(semantics: str, tmp_path: Path) -> None:
    """Nothing would be computed again with gradients there, and an optimizer could not go on with what it remembers."""
    assert run(2, _inferred, tmp_path / "x.ckpt", True, semantics) == run(
        2, _inferred, tmp_path / "y.ckpt", False, semantics
    )
