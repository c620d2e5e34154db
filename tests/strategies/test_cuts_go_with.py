"""What checkpoints between meetings go with: precisions, streams, hooks, callbacks; and what is refused beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy, LazySignStrategy, SpeedFaults
from lightning_async.replica import Replica
from lightning_async.strategies import cut_consensus
from tests.strategies.cut_runs import (
    BATCH,
    IGNORED,
    Stepwise,
    check_consensus,
    check_conserved,
    cuts_in,
    done_of,
    fit,
    seen_by,
)
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import Forked, run
from tests.strategies.resumable import (
    Draws,
    Samples,
    Stateful,
    files_of,
    rank,
)

pytestmark = IGNORED


def _unequal(folder: str, lengths: tuple[int, int], path: str | None) -> dict[str, Any]:
    """Each rank has a stream of its own, of so many batches; whose is over waits for the other one."""
    stream = Stateful(rank(), 2, lengths[rank()])
    data = DataLoader(Samples(stream), BATCH)
    return fit(folder, path=path, data=data, step=0.05)  # who waits looks five times a second


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:rank . had no batch in this epoch")  # of the part that goes on
@pytest.mark.parametrize("lengths", [(30, 4), (4, 30)])
def test_who_has_no_more_in_its_epoch_takes_part_while_it_waits(lengths: tuple[int, int], tmp_path: Path) -> None:
    """Also as the one that begins cuts; and it waits again where the run goes on."""
    first = run(2, _unequal, str(tmp_path), lengths, None)
    paths = cuts_in(tmp_path)
    waited = [path for path in paths if any(file["waits"] for file in files_of(path).values())]
    assert waited
    cut, own = waited[0], files_of(waited[0])
    early = lengths.index(4)
    assert [own[r]["waits"] for r in (0, 1)] == [r == early for r in (0, 1)]
    assert own[early]["steps"] == 4
    main = torch.load(cut, weights_only=True)
    back = run(2, _unequal, str(tmp_path / "same"), lengths, str(cut))
    for r, file in own.items():
        assert back[r]["restored"]["own"] == file["weights"].tolist()
        assert back[r]["restored"]["steps"] == file["steps"]
        assert back[r]["restored"]["global_step"] == main["global_step"]
        assert back[r]["seen"] == first[r]["seen"][file["steps"] * BATCH :]
    assert len({tuple(one["weights"]) for one in back}) == 1


class _Saved(Callback):
    """At which step the last cut was due that was saved before any meeting."""

    at = 0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.at = trainer.strategy.cuts.saved_at  # type: ignore[attr-defined]


def _alone(folder: str, metric: bool) -> tuple[list[str], str, int]:
    """One rank, two callbacks, and one that goes by a metric, at meetings."""
    last = ModelCheckpoint(folder, filename="a{step}", every_n_train_steps=10, save_top_k=1, save_last=True)
    more = ModelCheckpoint(folder, filename="w{step}", every_n_train_steps=15, save_top_k=-1, save_weights_only=True)
    best = ModelCheckpoint(folder, filename="m{step}", every_n_train_steps=25, monitor="train_step")
    saved = _Saved()
    t = trainer(
        1,
        knobs={"saves": "cut"},
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[last, more, *([best] if metric else []), saved, SpeedFaults(step_seconds=0.02)],
    )
    t.fit(Lit(), loader())
    return sorted(path.name for path in Path(folder).glob("*.ckpt")), last.last_model_path, saved.at


@pytest.mark.few(0)
@pytest.mark.parametrize("metric", [False, True])
def test_several_callbacks_and_mere_weights(tmp_path: Path, metric: bool) -> None:
    """60 steps of one rank: a cut is whole a few batches later; a meeting for the metric saves all that is due."""
    ((names, last, saved_at),) = run(1, _alone, str(tmp_path), metric)
    assert metric or saved_at >= 30  # both callbacks' by then
    assert any(name.startswith("m") for name in names) == metric
    assert Path(last).name in names
    assert len([name for name in names if name.startswith("a")]) == 1
    assert any(name.startswith("w") for name in names)
    for name in names:
        main = torch.load(tmp_path / name, weights_only=True)
        assert ("lightning_async" in main) == (not name.startswith("w"))
        Lit().load_state_dict(main["state_dict"])


class ByHand(Stepwise):
    """Two optimizers, each of which steps in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        weights = list(self.parameters())
        return torch.optim.Adam(weights[:2], 0.01), torch.optim.SGD(weights[2:], 0.001)


Goes = dict[str, Any]
GOES_WITH: dict[str, tuple[int, str, Goes, dict[str, Any]]] = {
    # ranks, mode, the Trainer's, `fit`'s
    "by hand": (2, "push_sum", {}, {"module": ByHand, "every": 16}),
    "alone": (1, "push_sum", {}, {}),
    "none": (2, "none", {}, {}),
    "bf16-true": (2, "push_sum", {"precision": "bf16-true"}, {}),
    "bf16-mixed": (2, "push_sum", {"precision": "bf16-mixed"}, {}),
    "accumulated": (2, "pairwise", {"accumulate_grad_batches": 3}, {"every": 6}),
    "clipped": (2, "pairwise", {"gradient_clip_val": 0.5}, {}),
    "bf16 on the wire": (2, "push_sum", {}, {"knobs": {"wire": "bf16"}}),
    "kept": (2, "push_sum", {}, {"knobs": {"at_meeting": "keep"}}),
    "equal": (3, "push_sum", {}, {"knobs": {"balance": "equal"}}),
    "meetings": (2, "push_sum", {}, {"knobs": {"meet_every": 200}}),
}


def _goes_with(folder: str, path: str | None, case: str) -> dict[str, Any]:
    """Sums travel in pieces: of 16 elements, or those of all others together are one vector."""
    cut_consensus.PIECE = 64
    warnings.filterwarnings("ignore", message=".*does not go on to the bit")
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")  # Lightning's own
    _, mode, options, more = GOES_WITH[case]
    return fit(folder, mode, path, options=options, step=0.01, n=480, **more)


@pytest.mark.few(0)
@pytest.mark.parametrize("case", GOES_WITH)
def test_a_run_goes_on_from_a_cut_whatever_it_trains_with(case: str, tmp_path: Path) -> None:
    """By the same ranks from what each had, by others from the consensus, in half precision from all of it."""
    n, mode, options, _ = GOES_WITH[case]
    rounding = 2**-8 if options.get("precision") == "bf16-true" else 1e-5
    run(n, _goes_with, str(tmp_path), None, case)
    paths = cuts_in(tmp_path)
    for path in paths:
        check_consensus(path, mode, n, rounding)
    cut = paths[0]
    main, own = torch.load(cut, weights_only=True), files_of(cut)
    assert main["global_step"] == main["lightning_async"]["progress"]["agreed"][1] // n
    back = run(n, _goes_with, str(tmp_path / "same"), str(cut), case)
    for r, file in own.items():
        restored = back[r]["restored"]
        assert restored["own"] == file["weights"].tolist()
        assert restored["mass"] == file["parts"]["algorithm"]["mass"]
        assert (restored["steps"], restored["global_step"]) == (file["steps"], main["global_step"])
    other = run(3 - min(n, 2), _goes_with, str(tmp_path / "other"), str(cut), case)
    lit = Draws()
    lit.load_state_dict(main["state_dict"])
    of_all = main["lightning_async"]["consensus"]
    assert bool(of_all) == (case == "bf16-true")
    for name, parameter in lit.named_parameters():
        parameter.data = of_all.get(name, parameter.data)
    for one in other:
        assert one["restored"]["own"] == Replica(lit.parameters()).flat.tolist()
    for told in (back, other):
        seen = sorted(done_of(main) + seen_by(told))
        assert set(seen) == {*range(480)}
        assert len(seen) < 480 + (len(told) if case == "equal" else 1), "equal shares may need a sample twice"


class Renamed(Stepwise):
    """Its checkpoint is for another package; that of a part of the weights for all to see."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"theirs.{name}": value for name, value in state.items()}
        checkpoint["row"] = state["layer.0.weight"][:1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("theirs."): value for name, value in state.items()}


def _renamed(folder: str, path: str | None) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*does not go on to the bit")
    return fit(folder, path=path, module=Renamed, step=0.01, n=480)


@pytest.mark.few(0)
def test_names_that_a_hook_changes_hold_the_consensus(tmp_path: Path) -> None:
    run(2, _renamed, str(tmp_path), None)
    path = cuts_in(tmp_path)[0]
    main = torch.load(path, weights_only=True)
    assert all(name.startswith("theirs.") for name in main["state_dict"])
    main["state_dict"] = {name.removeprefix("theirs."): value for name, value in main["state_dict"].items()}
    whole = tmp_path / "plain.ckpt"
    torch.save(main, whole)
    (tmp_path / "plain.ckpt.ranks").symlink_to(f"{path}.ranks")
    check_conserved(whole, "push_sum", 2)
    (back,) = run(1, _renamed, str(tmp_path / "other"), str(path))
    lit = Draws()
    lit.load_state_dict(main["state_dict"])
    assert back["restored"]["own"] == Replica(lit.parameters()).flat.tolist()


class Halved(Stepwise):
    """Its checkpoint holds half of what is trained."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["layer.0.weight"] = state["layer.0.weight"] / 2


class Hooked(Stepwise):
    """So does its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_halve)


def _halve(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state["layer.0.weight"] = state["layer.0.weight"] / 2


def _refused(folder: str, module: Any) -> None:
    fit(folder, module=module, step=0.01, n=480)


@pytest.mark.few(0)
@pytest.mark.parametrize("module", [Halved, Hooked])
def test_what_a_hook_makes_of_the_weights_is_refused_on_every_rank(module: Any, tmp_path: Path) -> None:
    with Forked(2, _refused, str(tmp_path), module, store=True) as forked:
        results = forked.results()
    assert {one.kind for one in results} <= {"MisconfigurationException", "PeerFailedError"}, results
    assert all("makes `layer.0.weight` of what is trained" in one.error for one in results), results
    assert not list(tmp_path.glob("*.ckpt"))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"plugins": [AsyncCheckpointIO()]}, "`AsyncCheckpointIO` would write in another one: leave it out"),
    ({}, {"callbacks": [EMAWeightAveraging()]}, "`EMAWeightAveraging` puts other weights into a checkpoint"),
    ({}, {"callbacks": [BackboneFinetuning()]}, "`BackboneFinetuning` puts other weights"),
]


@pytest.mark.parametrize(("knobs", "options", "sentence"), REFUSED, ids=[one[2][:24] for one in REFUSED])
def test_what_does_not_go_with_cuts(knobs: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    class WithBackbone(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(2, 2)

    t = trainer(1, knobs={"saves": "cut", **knobs}, **options)
    with pytest.raises(MisconfigurationException, match=f"strategy='gossip_ring': `saves='cut'`: .*{sentence}"):
        t.fit(WithBackbone(), loader())


def test_what_saves_may_be() -> None:
    with pytest.raises(ValueError, match="`saves` must be one of 'meeting', 'cut', got 'cuts'"):
        GossipRingStrategy(saves="cuts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`saves='cut'` is for ranks that run free.*take mode='pairwise'"):
        GossipRingStrategy(mode="sync", saves="cut")


@pytest.mark.parametrize("kind", [AsyncGlobalStrategy, CyclicDelayStrategy, LazySignStrategy])
def test_methods_that_cannot_be_cut_say_so(kind: Any) -> None:
    assert kind(saves="meeting").saves == "meeting"
    with pytest.raises(ValueError, match=r"`saves='cut'` is for strategy='gossip_ring': .*Leave it out, and all meet"):
        kind(saves="cut")
    with pytest.raises(ValueError, match="`saves` must be one of 'meeting', 'cut', got 'cuts'"):
        kind(saves="cuts")


def test_a_cut_that_nothing_asks_for_is_said() -> None:
    with pytest.warns(UserWarning, match="`saves='cut'` is for `ModelCheckpoint"):
        trainer(1, knobs={"saves": "cut"}, max_epochs=1).fit(Lit(), loader())
