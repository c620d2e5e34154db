"""A recorded pipeline is replayed to the bit, each stage from its events; what differs first is named by its pass."""

from __future__ import annotations

import os
import re
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lightning_async import AdaptiveShrink, DelayedPipelineStrategy, SpeedFaults
from lightning_async.cli import main
from lightning_async.strategies.facts import knobs_of
from tests.cli import stages
from tests.cli.runs import Said
from tests.strategies.piped import trainer
from tests.strategies.ranks import Forked, run

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*a factor on the gradients")


def _fit(n: int, folder: Path, module: str, knobs: dict[str, Any], options: dict[str, Any], path: str | None) -> None:
    L.seed_everything(7, verbose=False)
    faults = SpeedFaults(step_seconds=0.002, slow={n - 1: 2.0})
    saver = ModelCheckpoint(folder.parent / "saved", filename="{step}", every_n_train_steps=7, save_top_k=-1)
    callbacks = [faults, saver, *options.pop("callbacks", [])]
    strategy = DelayedPipelineStrategy(stages="net", record=str(folder), **knobs)
    data = getattr(stages, options.pop("data"))() if "data" in options else None
    t = trainer(n, strategy=strategy, callbacks=callbacks, enable_checkpointing=True, **options)
    t.fit(getattr(stages, module)(), data, ckpt_path=path)


def record(folder: Path, n: int = 3, module: str = "Stages", path: Path | None = None, **options: Any) -> None:
    """A run with checkpoints, at which the pipe is drained, and validation in mid-epoch."""
    knobs = options.pop("knobs", {})
    run(n, _fit, n, folder, module, knobs, {"val_check_interval": 3, **options}, None if path is None else str(path))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What the command says, and its exit status."""

    def replay(folder: Path, *argv: str, module: str = "Stages") -> tuple[int, str]:
        status = main(["replay", str(folder), "--module", f"tests.cli.stages:{module}", *argv])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return replay


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("n", "module", "options"),
    [
        (3, "Stages", {}),
        (2, "Scheduled", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "knobs": {"clip": "pipe"}}),
        (3, "Stages", {"knobs": {"shrink": 0.5, "semantics": "recompute", "order": "forward_first"}}),
        (4, "Stages", {"knobs": {"replicas": 2, "split": [1]}}),
        (3, "Adam", {"precision": "bf16-mixed", "knobs": {"wire": "bf16", "compensate": "predict", "shrink": 0.7}}),
        (2, "Stages", {"precision": "64-true", "knobs": {"baseline": "sync"}, "accumulate_grad_batches": 4}),
        (2, "Stages", {"limit_train_batches": 5, "callbacks": [GradientAccumulationScheduler({1: 2})]}),
        (2, "Stages", {"max_steps": 11, "knobs": {"split": "auto"}}),
        (3, "Stages", {"val_check_interval": timedelta(seconds=0.01)}),
        (4, "Stages", {"val_check_interval": timedelta(seconds=0.01), "knobs": {"replicas": 2}}),
        (1, "Stages", {}),
        (1, "Streamed", {}),
        (1, "Worked", {}),
        (2, "Worked", {}),
        (3, "Streamed", {}),
        (2, "Endless", {"limit_train_batches": 5, "accumulate_grad_batches": 2}),
    ],
)
def test_whatever_was_trained(n: int, module: str, options: dict[str, Any], tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", n, module, **options)
    status, words = said(tmp_path / "run", module=module)
    assert status == 0, words
    assert "the run is as recorded, to the bit" in words
    steps = n * options.get("max_steps", 2 * options.get("limit_train_batches", 8 if n < 4 else 4))
    assert f"{n} member{'s' * (n > 1)}, {steps} steps" in words
    batches = steps // n * options.get("knobs", {}).get("replicas", 1)
    assert f"compared: {batches} losses" in words


@pytest.mark.few(0)
def test_what_differs_first_is_named_by_its_stage_and_pass(tmp_path: Path, said: Said) -> None:
    """The first stage's weights differ from its tenth batch on: not the loss is named, which the last stage sees."""
    record(tmp_path / "run")
    status, words = said(tmp_path / "run", module="Flipped")
    assert status == 1
    assert re.search(r"first difference: member 2, step 10: the stamp of what its forward pass passed on was", words)
    assert re.search(r"for batch 10 and is [0-9a-f]{8} for batch 10 now", words)
    status, words = said(tmp_path / "run", "--tolerance", "1e9", module="Flipped")
    assert status == 0, words


@pytest.mark.few(0)
def test_other_data_and_other_weights_are_told(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", 2)
    status, words = said(tmp_path / "run", module="Other")
    assert status == 1
    assert "before its first step" in words
    status, words = said(tmp_path / "run", module="Fewer")
    assert status == 2
    assert "the data set of the run had 60 samples, this one has 40" in words


@pytest.mark.filterwarnings("ignore:.* this run cannot be replayed")
def test_what_no_log_of_a_pipeline_holds_is_refused(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", 2, max_epochs=1, callbacks=[AdaptiveShrink("inverse")])
    status, words = said(tmp_path / "run")
    assert status == 2
    assert "this run cannot be replayed, since AdaptiveShrink.factor shrinks gradients, by factors that" in words


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:.* this run cannot be replayed, since it trains on several loaders")
def test_two_loaders_with_numbers_are_refused(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", 2, "Two", reload_dataloaders_every_n_epochs=1)
    status, words = said(tmp_path / "run", module="Two")
    assert status == 2
    assert "since it trains on several loaders of numbered samples" in words


@pytest.mark.few(0)
@pytest.mark.parametrize("n", [1, 2])
def test_a_loader_that_is_longer_in_the_next_epoch(n: int, tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", n, "Growing", reload_dataloaders_every_n_epochs=1)
    status, words = said(tmp_path / "run", module="Growing")
    assert status == 0, words
    assert f"{n * (5 + 8)} steps" in words


@pytest.mark.few(0)
def test_the_batch_that_a_stream_gave_to_be_measured_with(tmp_path: Path, said: Said) -> None:
    options: dict[str, Any] = {"knobs": {"split": "auto"}, "limit_train_batches": 5}
    record(tmp_path / "run", 2, data="counted", **options)
    status, words = said(tmp_path / "run", "--data", "tests.cli.stages:counted")
    assert status == 0, words


def _on_other_data(folder: Path) -> None:
    L.seed_everything(7, verbose=False)
    strategy = DelayedPipelineStrategy(stages="net", record=str(folder / "run"))
    t, lit = trainer(2, strategy=strategy, max_epochs=1), stages.Stages()
    t.fit(lit)
    if t.global_rank == 0:
        torch.save(lit.state_dict(), folder / "weights.pt")
    t.fit_loop.max_epochs = 2
    t.fit(lit, stages.rows())


@pytest.mark.few(0)
def test_a_second_fit_on_other_data(tmp_path: Path, said: Said) -> None:
    """Numbers, then a stream: neither trained on both."""
    run(2, _on_other_data, tmp_path)
    assert said(tmp_path / "run", "--fit", "1")[0] == 0
    argv = ["--fit", "2", "--ckpt", str(tmp_path / "weights.pt"), "--data", "tests.cli.stages:rows"]
    status, words = said(tmp_path / "run", *argv)
    assert status == 0, words


@pytest.mark.few(1)
def test_a_stream_that_ends_early_is_told(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run", 2, "Endless", max_epochs=1, limit_train_batches=9)
    status, words = said(tmp_path / "run", module="Streamed")
    assert status in (1, 2), words
    assert "the run is as recorded" not in words
    status, words = said(tmp_path / "run")
    assert status == 2
    assert "the run trained on streams" in words


@pytest.mark.few(0)
@pytest.mark.parametrize("module", ["Stages", "Streamed", "Worked"])
def test_a_run_that_went_on_in_mid_epoch_is_replayed_from_its_checkpoint(
    module: str, tmp_path: Path, said: Said
) -> None:
    record(tmp_path / "first", module=module, max_epochs=1)
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    record(tmp_path / "run", module=module, path=saved)
    status, words = said(tmp_path / "run", "--ckpt", str(saved), module=module)
    assert status == 0, words
    assert "3 members, 27 steps" in words
    status, words = said(tmp_path / "run", module=module)
    assert status == 2
    assert "give it by --ckpt" in words


def _killed(folder: Path) -> None:
    class Dies(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_rank == 1 and trainer.strategy.turns.batches == 9:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)

    _fit(3, folder, "Stages", {"silence": 0.5, "patience": 2.0}, {"callbacks": [Dies()]}, None)


def test_the_logs_of_a_run_whose_stage_was_killed_are_replayed_as_far_as_they_came(tmp_path: Path, said: Said) -> None:
    with Forked(3, _killed, tmp_path / "run", store=True) as forked:
        first, _, last = forked.results()
    assert "rank 1 died, and its stage with it" in first.error + last.error
    status, words = said(tmp_path / "run")
    assert status == 0, words
    assert "member 1's log ends behind step 9: it was stopped or killed" in words


@pytest.mark.few(0)
def test_one_member_alone_and_the_first_steps(tmp_path: Path, said: Said) -> None:
    record(tmp_path / "run")
    status, words = said(tmp_path / "run", "--until", "5")
    assert status == 0, words
    assert "as recorded, to the bit, until step 5: 3 members, 15 steps" in words
    status, words = said(tmp_path / "run", "--member", "1", "--watch")
    assert status == 0, words
    assert "member 1 is as recorded" in words


def test_a_pipeline_can_be_made_again_from_its_knobs() -> None:
    knobs = {"stages": "net", "split": [1, 3], "shrink": 0.5, "replicas": 2, "wire": "bf16", "clip": "pipe"}
    made = knobs_of(DelayedPipelineStrategy(**knobs))  # type: ignore[arg-type]
    assert knobs.items() <= made.items()
    assert knobs_of(DelayedPipelineStrategy(**made)) == made


def test_a_log_holds_no_weights(tmp_path: Path) -> None:
    """Batches, messages, stamps; nothing that a weight could be read from."""
    record(tmp_path / "run", 2, max_epochs=1)
    size = sum((tmp_path / "run" / f"rank{r}.jsonl").stat().st_size for r in range(2))
    module = stages.Stages()
    weights = {float(x) for p in module.parameters() for x in p.detach().flatten()} - {0.0, 1.0}
    text = "".join((tmp_path / "run" / f"rank{r}.jsonl").read_text() for r in range(2))
    assert not [w for w in weights if repr(w) in text]
    assert size < 120_000
    assert torch.is_tensor(module.net[0][0].weight)
