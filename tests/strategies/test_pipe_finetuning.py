"""What a callback thaws in mid-run, and gives the optimizer as a new group, each stage trains where it lives."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn

from tests.strategies.piped import Piped, loader, trainer, weights
from tests.strategies.ranks import run

THAWS = 1  # in this epoch
AT = {"blocks": ("net.0.", "net.2."), "before": ("embed.",), "behind": ("head.",), "named": ("net.0.", "net.2.")}


class Tuned(Piped):
    """A backbone in the blocks, before the call, or behind it; the optimizer has the rest."""

    def __init__(self, where: str) -> None:
        super().__init__(dropout=0.0)
        for p in (self.net[0][0].bias, self.net[1][0].bias, self.net[2][0].bias):
            nn.init.zeros_(p)  # another layer's numbers are no reason to leave one out
        parts = {
            "blocks": [self.net[0], self.net[2]],
            "before": [self.embed, self.norm],
            "behind": [self.head],
            "named": [self.net[0], self.net[2]],
        }
        self.named = where == "named"
        self.backbone = nn.ModuleList(parts[where])
        self.own: list[dict[str, list[float]]] = []

    def prepare(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        found: list[Any] = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return torch.optim.SGD(found if self.named else [p for _, p in found], 0.05, momentum=0.9)

    def on_train_batch_end(self, *args: Any) -> None:
        mine = ("net.2", "net.3", "head") if self.trainer.is_global_zero else ("embed", "norm", "net.0", "net.1")
        found = {name: p.flatten().tolist() for name, p in self.named_parameters() if name.startswith(mine)}
        self.own.append(found)


class NamedFinetuning(BackboneFinetuning):
    """Gives an optimizer that knows its parameters' names those of the backbone too."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == THAWS:
            self.make_trainable(pl_module.backbone)
            names = {id(p): name for name, p in pl_module.named_parameters()}
            named = [(names[id(p)], p) for p in pl_module.backbone.parameters()]
            optimizer.add_param_group({"params": named, "lr": 0.01})


def _tune(where: str, devices: int = 2, folder: str | None = None, resume: str | None = None, **options: Any) -> Any:
    for sentence in ("The dirpath has changed", ".*callbacks used to create", ".*the run goes on with the parameters"):
        warnings.filterwarnings("ignore", sentence)
    kind = NamedFinetuning if where == "named" else BackboneFinetuning
    lit, tuning = Tuned(where), kind(THAWS, lambda epoch: 1.5, verbose=False)
    saved = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    options = {"max_epochs": 3, "enable_checkpointing": bool(folder), **options}
    t = trainer(devices, callbacks=[tuning, *saved], **options)
    t.fit(lit, loader(), loader(20), ckpt_path=resume)
    return {
        "end": weights(lit),
        "own": lit.own,
        "groups": [(group["lr"], len(group["params"])) for group in t.optimizers[0].param_groups],
        "losses": lit.losses,
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("where", AT)
def test_it_is_that_of_a_single_process_where_no_gradient_is_late(where: str, tmp_path: Path) -> None:
    piped = run(2, partial(_tune, where, 2, str(tmp_path / "piped"), knobs={"baseline": "sync"}))
    (plain,) = run(1, partial(_alone, where, str(tmp_path / "plain")))
    assert [one["end"] for one in piped] == [plain["end"]] * 2
    for one in piped:
        assert [rate for rate, _ in one["groups"]] == [rate for rate, _ in plain["groups"]]
    files = [torch.load(tmp_path / name / "epoch=1.ckpt", weights_only=True) for name in ("piped", "plain")]
    groups = [
        [(group["params"], group.get("param_names")) for group in file["optimizer_states"][0]["param_groups"]]
        for file in files
    ]
    assert groups[0] == groups[1]
    assert all((names is not None) is (where == "named") for _, names in groups[0])
    assert len(groups[0]) == 2
    states = [file["optimizer_states"][0]["state"] for file in files]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k]["momentum_buffer"], states[1][k]["momentum_buffer"]) for k in states[0])
    tuned = [[state for name, state in file["callbacks"].items() if "Finetuning" in name] for file in files]
    assert tuned[0] == tuned[1]
    assert tuned[0]


def _those_that_it_has_not(optimizer: Any, params: Any) -> list[Any]:
    had = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in params if id(p) not in had]


def _alone(where: str, folder: str) -> Any:
    """Without Lightning's mistake of a layer for another one that has the same numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseFinetuning, "filter_on_optimizer", staticmethod(_those_that_it_has_not))
        return _tune(where, 1, folder, strategy="auto")


@pytest.mark.few(0)
@pytest.mark.parametrize("where", AT)
def test_it_thaws_where_it_lives_and_a_run_goes_on_to_the_bit(where: str, tmp_path: Path) -> None:
    whole = run(2, _tune, where, 2, str(tmp_path / "a"))
    assert whole[0]["end"] == whole[1]["end"]
    assert [rate for rate, _ in whole[0]["groups"]] == [rate for rate, _ in whole[1]["groups"]]
    for one in whole:
        for name in (name for name in one["own"][0] if name.startswith(AT[where])):
            path = [state[name] for state in one["own"]]
            assert path[0] == path[8 * THAWS - 1] != path[-1]
    for epoch in (0, 1):
        file = str(tmp_path / "a" / f"epoch={epoch}.ckpt")
        for one, other in zip(whole, run(2, _tune, where, 2, str(tmp_path / f"b{epoch}"), file), strict=True):
            assert other["end"] == one["end"]
            assert other["own"] == one["own"][8 * (epoch + 1) :]
            assert other["groups"] == one["groups"]
