"""Averages over time under a pipeline: each stage averages its own, and what is validated, saved and left is whole."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from lightning_async.strategies import compat, parts, pipe_averages
from lightning_async.strategies.parts import Parts
from lightning_async.strategies.pipe_averages import PipeAverages
from tests.strategies.piped import WIDTH, Piped, loader, trainer, weights
from tests.strategies.ranks import run

DECAY = 0.9
SAVING = {"enable_checkpointing": True}
State = dict[str, list[float]]


class Quiet(Piped):
    """Draws nothing, so that a single process computes the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.0, **options)

    def prepare(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))  # type: ignore[no-any-return]


class Trace(Callback):
    """What each rank has, wherever it is worth knowing: no more than one number of what lives elsewhere."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.validated: list[State] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.steps.append(told(module))

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.validated.append(told(module))


def told(module: L.LightningModule) -> State:
    """What lives on this one of two ranks."""
    last, alone = module.trainer.is_global_zero, module.trainer.world_size == 1
    return {
        name: p.detach().flatten().tolist()
        for name, p in module.named_parameters()
        if alone or last == name.startswith(("net.2", "net.3", "head"))
    }


def _train(
    folder: str | None, epochs: int, resume: str | None = None, every: int | None = None, **options: Any
) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "The dirpath has changed|.*callbacks used to create the checkpoint")
    kind = options.pop("kind", Quiet)
    lit, trace, average = kind(), Trace(), EMAWeightAveraging(decay=DECAY, **options.pop("average", {}))
    saved = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)] if folder else []
    options = {"devices": 2, "max_epochs": epochs, "num_sanity_val_steps": 0} | (SAVING if folder else {}) | options
    t = trainer(callbacks=[average, trace, *saved], **options)
    t.fit(lit, loader(shuffle=kind is Piped), loader(20), ckpt_path=resume)
    return {"end": weights(lit), "own": told(lit), "steps": trace.steps, "validated": trace.validated}


def _in_step(**options: Any) -> Any:
    """The stages' gradients are not late, so a single process computes the same."""
    return {"knobs": {"baseline": "sync"}, **options}


# -- the laws ----------------------------------------------------------------------------------------------------------


def _traced() -> Any:
    return _train(None, 2)


def test_each_stage_averages_its_weights_as_they_are_behind_each_batch() -> None:
    """And validates what it has averaged by then; nothing else is changed by that."""
    last, first = run(2, _traced)
    assert last["end"] == first["end"]
    assert last["own"].keys().isdisjoint(first["own"])
    for rank in (last, first):
        for name, own in rank["own"].items():
            path = torch.tensor([state[name] for state in rank["steps"]])
            average = path[0].clone()
            for at, now in enumerate(path):
                average = DECAY * average + (1 - DECAY) * now if at else average
                if at == 7:
                    assert rank["validated"][0][name] == average.tolist()
            assert own == average.tolist()
            assert not torch.equal(average, path[-1])


def _bare() -> Any:
    lit = Quiet()
    trace = Trace()
    trainer(2, callbacks=[trace], num_sanity_val_steps=0).fit(lit, loader(), loader(20))
    return trace.steps


@pytest.mark.few(0)
def test_weights_are_trained_as_without_an_average() -> None:
    with_average, without = run(2, _traced), run(2, _bare)
    assert [rank["steps"] for rank in with_average] == without


@pytest.mark.few(1)
@pytest.mark.parametrize("average", [{}, {"use_buffers": False, "update_every_n_steps": 3}])
def test_it_is_that_of_a_single_process_where_no_gradient_is_late(average: dict[str, Any], tmp_path: Path) -> None:
    """The file too, with all that plain Lightning writes."""
    ends = run(2, _same, str(tmp_path / "piped"), 2, average)
    (plain,), (alone,) = (run(1, _same, str(tmp_path / f"plain{n}"), n, average) for n in (0, 1))
    assert ends == [plain, plain]
    assert alone == plain
    files = [torch.load(tmp_path / where / "step=8.ckpt", weights_only=True) for where in ("piped", "plain0")]
    for key in ("state_dict", "current_model_state", "averaging_state"):
        piped, alone = (file[key] for file in files)
        assert piped.keys() == alone.keys()
        for name in piped:
            torch.testing.assert_close(piped[name], alone[name], rtol=0, atol=0)


class Blank(L.LightningModule):
    """A stage that has nothing, between two that have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _blank(callback: type[WeightAveraging]) -> Any:
    lit, average = Blank(), callback()
    trainer(3, callbacks=[average], max_epochs=1).fit(lit, loader())
    found = compat.average_of(average)
    assert found is not None
    return weights(lit), int(found.n_averaged)


@pytest.mark.few(1)
@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
def test_a_stage_without_weights_counts_on(callback: type[WeightAveraging]) -> None:
    found = run(3, _blank, callback)
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 8


def _same(folder: str, devices: int, average: dict[str, Any]) -> Any:
    options = _in_step() if devices else {"strategy": "auto"}
    return _train(folder, 2, devices=devices or 1, average=average, **options)["end"]


# -- files -------------------------------------------------------------------------------------------------------------


def _saves(folder: str, resume: str | None, every: int | None) -> Any:
    found = _train(folder, 2, resume, every, kind=Piped)
    return found["end"], found["steps"], found["validated"]


@pytest.mark.parametrize("every", [8, 5])
@pytest.mark.few(1)
def test_a_run_goes_on_to_the_bit(every: int, tmp_path: Path) -> None:
    """Behind an epoch, and in the middle of one."""
    whole = run(2, _saves, str(tmp_path / "a"), None, every)
    rest = run(2, _saves, str(tmp_path / "b"), str(tmp_path / "a" / f"step={every}.ckpt"), every)
    for (end, steps, validated), (other, others, seen) in zip(whole, rest, strict=True):
        assert other == end
        assert others == steps[every:]
        assert validated[-len(seen) :] == seen


def _plain(file: str) -> Any:
    return _train(None, 2, file, devices=1, strategy="auto")["end"]


def test_plain_lightning_goes_on_from_it(tmp_path: Path) -> None:
    ends = run(2, _in_a_folder, str(tmp_path))
    ((end,),) = [run(1, _plain, str(tmp_path / "step=8.ckpt"))]
    assert end == ends[0]


def _in_a_folder(folder: str) -> Any:
    return _train(folder, 2, **_in_step())["end"]


class Saves(Callback):
    """Saves in the midst of a validation, where the average is in the place of the weights, or at its end."""

    def __init__(self, file: Path, midst: bool) -> None:
        self.file, self.midst = file, midst

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.midst and batch_idx == 1:
            trainer.save_checkpoint(self.file)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.midst:
            trainer.save_checkpoint(self.file)


def _saved(file: Path, midst: bool) -> Any:
    lit, trace, average = Quiet(), Trace(), EMAWeightAveraging(decay=DECAY)
    options: dict[str, Any] = {"val_check_interval": 3, "max_epochs": 1, "num_sanity_val_steps": 0}
    trainer(2, callbacks=[Saves(file, midst), average, trace], **options).fit(lit, loader(), loader(20))
    return weights(lit), trace.steps, trace.validated


@pytest.mark.few(0)
def test_a_save_in_the_midst_of_a_validation_steps_the_weights_and_not_the_average(tmp_path: Path) -> None:
    """Gradients that are on their way are applied before it. The file is that of a save at the validation's end."""
    midst, end = (run(2, _saved, tmp_path / f"{midst}.ckpt", midst) for midst in (True, False))
    assert midst == end
    files = [torch.load(tmp_path / f"{midst}.ckpt", weights_only=True) for midst in (True, False)]
    for key in ("state_dict", "current_model_state", "averaging_state"):
        one, other = (file[key] for file in files)
        assert all(torch.equal(one[name], other[name]) for name in other)


def _twice() -> Any:
    lit, average = Quiet(), EMAWeightAveraging(decay=DECAY)
    t = trainer(2, callbacks=[average], num_sanity_val_steps=0)
    t.fit(lit, loader(), loader(20))
    first = weights(lit)
    t.validate(lit, loader(20))
    assert weights(lit) == first
    t.fit_loop.max_epochs = 3
    t.fit(lit, loader(), loader(20))
    names = {name for name in vars(average) if name in ("_swap_models", "on_save_checkpoint")}
    return first, weights(lit), names


def test_all_take_the_whole_average_home_and_a_second_fit_goes_on() -> None:
    one, other = run(2, _twice)
    assert one == other
    assert one[0] != one[1]
    assert not one[2]


# -- StochasticWeightAveraging -----------------------------------------------------------------------------------------


class Plain(Quiet):
    """Without BatchNorm, so that every epoch trains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm, self.net[1][1] = nn.Identity(), nn.Identity()  # type: ignore[assignment]


class Epochs(Callback):
    """What each rank has as an epoch starts."""

    def __init__(self) -> None:
        self.found: list[State] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.found.append(told(module))


def _swa(
    kind: type[Piped], devices: int = 2, folder: str | None = None, resume: str | None = None, **options: Any
) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "The dirpath has changed|.*callbacks used to create|Detected call of `lr_sch")
    lit, epochs = kind(), Epochs()
    swa = StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2)
    saved = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    options |= SAVING if folder else {}
    t = trainer(devices, callbacks=[epochs, swa, *saved], max_epochs=4, num_sanity_val_steps=0, **options)
    t.fit(lit, loader(), loader(20), ckpt_path=resume)
    return {
        "end": weights(lit),
        "own": told(lit),
        "state": {name: value.tolist() for name, value in lit.state_dict().items()},
        "epochs": epochs.found,
        "rates": [group["lr"] for group in t.optimizers[0].param_groups],
        "epoch": t.current_epoch,
        "losses": lit.losses,
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [Quiet, Plain, Piped])
def test_swa_leaves_the_mean_of_each_stages_weights_as_epochs_start(kind: type[Piped]) -> None:
    """Where there is BatchNorm, with statistics of all batches that went through the averaged stages."""
    ranks = run(2, _swa, kind)
    assert ranks[0]["end"] == ranks[1]["end"]
    assert ranks[0]["rates"] == ranks[1]["rates"]
    for rank in ranks:
        assert rank["epoch"] == (4 if kind is Plain else 5)
        for name, own in rank["own"].items():
            mean = torch.tensor([state[name] for state in rank["epochs"][1:4]]).mean(0)
            torch.testing.assert_close(torch.tensor(own), mean, rtol=1e-5, atol=1e-6)
            assert own != rank["epochs"][3][name]
    if kind is Quiet:
        _has_statistics_of_all_batches(ranks[0]["state"])


def _has_statistics_of_all_batches(state: dict[str, Any]) -> None:
    lit = Quiet()
    lit.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    norms = [layer for layer in lit.modules() if isinstance(layer, nn.BatchNorm1d)]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for x, _ in loader():
            lit.net(lit.prepare(x))
    for name, value in lit.state_dict().items():
        torch.testing.assert_close(torch.tensor(state[name]), value, rtol=1e-5, atol=1e-6)
    assert len(norms) == 2


@pytest.mark.few(1)
def test_swa_is_that_of_a_single_process_where_no_gradient_is_late(tmp_path: Path) -> None:
    piped = run(2, partial(_swa, Plain, 2, str(tmp_path / "piped"), knobs={"baseline": "sync"}))
    ((plain),) = run(1, partial(_swa, Plain, 1, str(tmp_path / "plain"), strategy="auto"))
    assert [one["end"] for one in piped] == [plain["end"]] * 2
    assert piped[0]["rates"] == plain["rates"]
    averages = []
    for where in ("piped", "plain"):
        file = torch.load(tmp_path / where / "epoch=2.ckpt", weights_only=True)
        (state,) = [one for name, one in file["callbacks"].items() if name.startswith("Stochastic")]
        averages.append(state["average_model_state"])
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[1])


@pytest.mark.few(0)
@pytest.mark.parametrize("epoch", [1, 0])
def test_a_run_with_swa_goes_on_to_the_bit(epoch: int, tmp_path: Path) -> None:
    whole = run(2, _swa, Quiet, 2, str(tmp_path / "a"))
    rest = run(2, _swa, Quiet, 2, str(tmp_path / "b"), str(tmp_path / "a" / f"epoch={epoch}.ckpt"))
    for one, other in zip(whole, rest, strict=True):
        assert other["end"] == one["end"]
        assert other["epochs"] == one["epochs"][epoch + 1 :]
        assert other["losses"] == one["losses"][8 * (epoch + 1) :]


def _taken(device: str | None, root: str) -> tuple[nn.Module, list[bool], compat.Leash]:
    """The copy in which SWA averages, on the last of two stages, and which of its weights live there."""
    lit, swa = Piped(), StochasticWeightAveraging(0.02, device=device)
    t = L.Trainer(callbacks=[swa], logger=False, enable_checkpointing=False, accelerator="cpu")
    swa.setup(t, lit, "fit")
    mine = Parts(lit, list(lit.net), [range(2), range(2, 4)], 1)
    mine.send_away()
    strategy = SimpleNamespace(trainer=t, turns=SimpleNamespace(parts=mine), root_device=torch.device(root))
    leash = compat.Leash(t)
    PipeAverages(strategy).take(leash)  # type: ignore[arg-type]
    copy = compat.average_of_epochs(swa)
    assert copy is not None
    return copy, mine.here(), leash


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_lives_elsewhere_stands_where_the_average_will_be_moved_to(
    device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its way there one number in the place of all would become as many."""
    asked: list[str] = []

    def away(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
        asked.append(str(device))
        return parts.away(parameter)

    monkeypatch.setattr(pipe_averages, "away", away)
    copy, here, leash = _taken(device, "meta")
    assert asked == [device or "meta"] * here.count(False)
    held = [p.untyped_storage().nbytes() // 4 for p in copy.parameters()]
    assert held == [p.numel() if mine else 1 for mine, p in zip(here, copy.parameters(), strict=True)]
    leash.restore()


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cuda"])
def test_what_lives_elsewhere_takes_no_room_on_a_gpu(device: str | None) -> None:
    copy, here, leash = _taken(device, "cuda")
    held = [p.untyped_storage().nbytes() // 4 for p in copy.to("cuda").parameters()]
    assert held == [p.numel() if mine else 1 for mine, p in zip(here, copy.parameters(), strict=True)]
    leash.restore()
