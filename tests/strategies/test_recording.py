"""A log holds events: no weight and no gradient could be read from it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_async import AdaptiveShrink, GossipRingStrategy
from lightning_async.strategies import STRATEGIES, unreplayable
from lightning_async.strategies.facts import digest, knobs_of, knobs_of_groups
from lightning_async.strategies.recording import Recording, fits_in, log_name
from lightning_async.transport.mail import Wait
from tests.strategies import piped
from tests.strategies.lit import Lit, Numbers, loader, trainer
from tests.strategies.ranks import run

EVENTS = {"batch", "at", "post", "take", "folded", "free", "lost", "members", "propose", "decided", "meet", "finish"}
NOTES = {
    "dealt",
    "length",
    "epoch",
    "fetched",
    "start",
    "off",
    "fetching",
    "clock",
    "knobs0",
    "weights",
    "own",
    "consensus",
}
FOR_PEOPLE = {"time", "arrivals", "accounts", "spread", "traffic"}
NUMBERS = {"lr", "momentum", "dampening", "weight_decay"}


def _recorded(folder: str) -> list[float]:
    knobs = {"record": folder, "period": 2, "balance": "equal"}
    t = trainer(2, knobs=knobs, max_epochs=4, accumulate_grad_batches=2)
    lit = Lit()
    t.fit(lit, loader(2), loader(40, shuffle=False))
    return [float(x) for p in lit.parameters() for x in p.detach().flatten()]


def floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for name, one in value.items() if name not in NUMBERS for x in floats(one)]
    if isinstance(value, list):
        return [x for one in value for x in floats(one)]
    return [value] if isinstance(value, float) else []


def test_a_log_holds_events_and_no_weights(tmp_path: Path) -> None:
    weights = run(2, _recorded, str(tmp_path))[0]
    header, *lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    events = [line for line in lines if line[1] != "note"]
    notes = [line[1:] for line in lines if line[1] == "note"]
    assert {event[1] for event in events} <= EVENTS
    assert {note[1] for note in notes} - FOR_PEOPLE <= NOTES
    for_replays = [line for line in lines if line[1] != "note" or line[2] not in FOR_PEOPLE]
    losses = [event[2] for event in events if event[1] == "batch"]
    seconds = [letter[3] for event in events if event[1] == "take" for letter in event[3]]
    assert not set(floats(for_replays)) - set(losses) - set(seconds)
    assert not set(weights) & set(floats([header, lines]))
    assert header["knobs"]["period"] == 2
    assert header["trainer"]["accumulate_grad_batches"] == 2
    assert header["module"] == "tests.strategies.lit:Lit"
    assert [event[2] for event in events if event[1] == "at"] == list(range(1, 121))
    assert [len(note[2]) for note in notes if note[1] == "fetched"] == [2] * len(losses) == [2] * 240
    assert [note[1] for note in notes if note[1] in ("weights", "own", "consensus")] == [
        *["own", "consensus"] * 3,
        *["weights", "own", "consensus"],
    ]
    assert events[-1][1] == "finish"


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_strategy_can_be_made_again_from_its_knobs(kind: type[Any]) -> None:
    assert knobs_of(kind(**knobs_of(kind()))) == knobs_of(kind())


def test_knobs_are_found_where_they_are_kept() -> None:
    knobs: dict[str, Any] = {"period": 3, "max_delay": None, "wire": "bf16", "topology": "exponential"}
    knobs |= {"at_meeting": "keep", "balance": "equal", "buffers": "local", "inner_threads": None}
    knobs |= {"inner": None, "inner_size": None, "staging": 2_000_000, "saves": "cut"}
    for mode, mixing in (("pairwise", 0.25), ("push_sum", None)):
        knobs |= {"mode": mode, "mixing": mixing}
        assert knobs_of(GossipRingStrategy(**knobs)) == knobs  # type: ignore[arg-type]


def test_a_digest_tells_last_bits_apart() -> None:
    weights = torch.randn(1000)
    other = weights.clone()
    other[500] = torch.nextafter(other[500], torch.tensor(9.0))
    assert digest(weights) == digest(weights.clone()) != digest(other)
    assert len(digest(weights)) == 16


def test_what_is_a_number_in_an_optimizer() -> None:
    layer = nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.named_parameters(), lr=torch.tensor(0.5), betas=(0.8, 0.9))
    (group,) = knobs_of_groups(adam)
    assert group["lr"] == 0.5
    assert group["betas"] == [0.8, 0.9]
    assert not {"params", "param_names", "foreach"} & set(group)


class Scribe:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []

    def note_batch(self, loss: float | None = None) -> float | None:
        self.losses.append(loss)
        return loss


@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        ({"loss": torch.tensor(0.5)}, 0.5),
        (torch.tensor([0.5]), 0.5),
        ({"logits": torch.ones(3)}, None),
        ({}, None),
        (None, None),
        (torch.ones(3), None),
        (torch.empty((), device="meta"), None),
    ],
)
def test_a_loss_is_read_if_that_costs_no_wait(outputs: Tensor, loss: float | None) -> None:
    recording, scribe = Recording("folder"), Scribe()
    recording._scribe = scribe  # type: ignore[assignment]
    recording.loss(outputs)
    recording.batch()
    assert scribe.losses == [loss]


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    assert GossipRingStrategy(record=tmp_path).office.recording.on  # type: ignore[arg-type]


def test_names_of_logs() -> None:
    assert [log_name(3), log_name(3, 2)] == ["rank3.jsonl", "fit2.rank3.jsonl"]


def _again(folder: str, epochs: int) -> None:
    t = trainer(2, knobs={"record": folder}, max_epochs=epochs)
    t.fit(Lit(), loader(), loader(40, shuffle=False))


@pytest.mark.few(0)
def test_a_job_that_was_requeued_overwrites_no_log(tmp_path: Path) -> None:
    """Nor does it take the number that only another rank finds taken: hosts may have folders of their own."""
    run(2, _again, str(tmp_path), 1)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["rank0.jsonl", "rank1.jsonl"]
    run(2, _again, str(tmp_path), 1)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert fits_in(tmp_path) == [1, 2]
    runs = [json.loads((tmp_path / log_name(rank, 2)).read_text().splitlines()[0])["run"] for rank in range(2)]
    assert runs[0] == runs[1] != json.loads(first["rank0.jsonl"].splitlines()[0])["run"]


class Words:
    """Rounds in which another rank says a number of its own."""

    def __init__(self, other: int) -> None:
        self.other = other

    def agree(self, word: bytes, *, what: str) -> Wait[dict[int, bytes]]:
        yield from ()
        return {0: word, 1: str(self.other).encode()}


@pytest.mark.parametrize(("other", "agreed"), [(1, 4), (7, 7)])
def test_the_next_number_is_behind_all_that_any_rank_finds(other: int, agreed: int, tmp_path: Path) -> None:
    for name in ("rank0.jsonl", "fit3.rank12.jsonl", "fit9.jsonl", "fit8.rank0.json", "meetings.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(StopIteration) as end:
        next(Recording(tmp_path).number(Words(other)))  # type: ignore[arg-type]
    assert end.value.value == agreed


def test_two_runs_at_once_do_not_share_files(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").touch()
    carrier = SimpleNamespace(me=0, world=1)
    with pytest.raises(RuntimeError, match=r"rank0.jsonl is there already.*give each its own `record=`"):
        Recording(tmp_path).of(carrier, fit=1)  # type: ignore[arg-type]


class Rows(IterableDataset[Any]):
    """A stream of what a pipeline trains on."""

    def __iter__(self) -> Any:
        return zip(piped.INPUTS[:16], piped.TARGETS[:16], strict=True)


class Thaws(BaseFinetuning):
    """The first layer is trained from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.layer[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.layer[0], optimizer)


def averages() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "shrunk pipeline": lambda: AdaptiveShrink("inverse"),
    "averaged pipeline": averages,
    "averaged": averages,
    "thawed": Thaws,
}
LAST_EPOCH = "its last epoch takes BatchNorm's statistics, and trains nothing"


def _warned(kind: str, folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [CALLBACKS[kind]()] if kind in CALLBACKS else []
        if "pipeline" in kind:
            t = piped.trainer(2, knobs={"record": folder}, max_epochs=2, callbacks=callbacks)
            data = TensorDataset(piped.INPUTS[:16], piped.TARGETS[:16]) if callbacks else Rows()
            t.fit(piped.Piped(), DataLoader(data, batch_size=4))
        else:
            own = {"use_distributed_sampler": kind != "own split", "callbacks": callbacks}
            t = trainer(2, knobs={"record": folder}, max_epochs=2, **own)
            both = [loader(n=40), DataLoader(Numbers(40), batch_size=4)]
            fed = {"both": both, "stream": both[1]}.get(kind, both[0])
            t.fit(Pairs() if kind == "both" else Lit(), fed)
    return [str(warning.message) for warning in caught if "replayed" in str(warning.message)]


class Pairs(Lit):
    """Takes the first of two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("stream", None),
        ("own split", None),
        ("both", "it trains on a shared data set and on a stream together"),
        ("pipeline", None),
        ("shrunk pipeline", "AdaptiveShrink.factor shrinks gradients, by factors that a pipeline's log does not hold"),
        ("averaged pipeline", LAST_EPOCH),
        ("averaged", LAST_EPOCH),
        ("thawed", "Thaws changes what is trained, and a replay leaves the run's callbacks out"),
    ],
)
def test_what_cannot_be_replayed_is_said_once_when_the_run_begins(kind: str, why: str | None, tmp_path: Path) -> None:
    first, second = run(2, _warned, kind, str(tmp_path))
    assert not second
    if why is None:
        assert not first
    else:
        assert len(first) == 1
        assert f"for `lightning-async report` and `audit` only: this run cannot be replayed, since {why}" in first[0]
        for rank in range(2):
            lines = [json.loads(line) for line in (tmp_path / log_name(rank)).read_text().splitlines()[1:]]
            names = [line[2] for line in lines if line[1] == "note"]
            assert names.index("unreplayable") < names.index("start")
            assert any(why in line[3] for line in lines if line[1:3] == ["note", "unreplayable"])


def test_which_callbacks_no_replay_can_do_without() -> None:
    """SWA alone is no reason: what it writes is in no step."""
    without = nn.Sequential(nn.Linear(2, 2))
    for callback, module, epochs, reason in [
        (ModelPruning("l1_unstructured"), without, 2, "ModelPruning changes what is trained"),
        (averages(), without, 2, None),
        (averages(), Lit(), 2, LAST_EPOCH),
        (averages(), Lit(), -1, None),
        (AdaptiveShrink("inverse"), Lit(), 2, None),
    ]:
        trainer = SimpleNamespace(callbacks=[callback], lightning_module=module, max_epochs=epochs)
        found = list(unreplayable.reasons(trainer, "numbers"))  # type: ignore[arg-type]
        assert len(found) == (reason is not None)
        assert reason is None or reason in found[0]
