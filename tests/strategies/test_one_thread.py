"""A rank that was forked where torch had computed on several threads computes on one, and its run ends."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async.strategies import one_thread
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import FORK

LIMIT = 60.0


def _computes() -> None:
    torch.ones(1 << 18).add_(1.0)
    torch.ones(512, 512) @ torch.ones(512, 512)


class Multiplies(Lit):
    """Enough to do for several threads."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _computes()
        (self.folder / f"{self.global_rank}").write_text(str(torch.get_num_threads()))
        return super().training_step(batch, batch_idx)


def _notebook(computes: bool, folder: Path) -> None:
    warnings.filterwarnings("ignore", "each rank computes on one thread")
    one_thread.ENOUGH = 0.5 if computes else 30.0
    torch.set_num_threads(2)
    if computes:
        _computes()
    t = trainer(2, strategy="gossip_ring_notebook", max_epochs=1, limit_train_batches=4)
    t.fit(Multiplies(folder), loader(), loader(40, shuffle=False))


def _pipeline(folder: Path) -> None:
    warnings.filterwarnings("ignore", "each rank computes on one thread")
    one_thread.ENOUGH = 0.5
    torch.set_num_threads(2)
    _computes()
    t = piped.trainer(2, knobs={"start_method": "fork"}, max_epochs=1)
    t.fit(piped.Piped(), piped.loader(n=8), piped.loader(n=8))
    (folder / "ended").touch()


def _ends_well(function: Any, *arguments: Any) -> None:
    process = FORK.Process(target=function, args=arguments)  # its ranks end with it (see conftest)
    process.start()
    process.join(LIMIT)
    process.kill()
    process.join()
    assert process.exitcode == 0


@pytest.mark.forks
@pytest.mark.parametrize(("computes", "threads"), [(True, "1"), (False, "2")])
def test_what_was_computed_before_fit_hangs_nobody(computes: bool, threads: str, tmp_path: Path) -> None:
    _ends_well(_notebook, computes, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [threads, threads]


@pytest.mark.forks
def test_nor_a_stage_of_a_pipeline(tmp_path: Path) -> None:
    _ends_well(_pipeline, tmp_path)
    assert (tmp_path / "ended").exists()


def _is_told() -> None:
    one_thread._ends = lambda: False
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match="each rank computes on one thread: .* compute nothing before `fit`"):
        one_thread.spare_the_threads()
    assert torch.get_num_threads() == 1


def test_it_is_told() -> None:
    _ends_well(_is_told)


def test_a_process_that_was_not_forked_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_thread, "_ends", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("it was not forked"))
    one_thread.spare_the_threads()
