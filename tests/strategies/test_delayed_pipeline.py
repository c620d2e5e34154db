"""A pipelined run in the Trainer is the simulator's, to the bit; with one stage it is plain training."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_async.pipeline import compensate, draws
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage
from tests.strategies.piped import INPUTS, TARGETS, WIDTH, Piped, loader, trainer, weights
from tests.strategies.ranks import run

PLAIN = {"strategy": "auto"}


def _fit(devices: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    lit = Piped(**module)
    t = trainer(devices, knobs=knobs, **options)
    arrived: dict[int, torch.dtype] = {}
    for at, block in enumerate(lit.net):
        block.register_forward_pre_hook(lambda _, x, at=at: arrived.setdefault(at, x[0].dtype) and None)
    t.fit(lit, loader(), loader(20))
    return {
        "weights": weights(lit),
        "losses": lit.losses,
        "metrics": {key: float(value) for key, value in t.callback_metrics.items()},
        "step": t.global_step,
        "arrived": arrived.get((0, *getattr(t.strategy, "cuts", ()))[-1]),
        "delays": [a.delay for a in getattr(t.strategy, "arrivals", list)()],
    }


def _context(options: dict[str, Any]) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled="precision" in options)


def _simulated(stages: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same run by hand: two epochs of 8 batches, nothing drained between them."""
    lit, seed = Piped(**module), 5
    lit.log = lambda *a, **k: None  # type: ignore[method-assign]
    chains = [nn.Sequential(*(lit.net[i] for i in span)) for span in spans(even(4, stages), 4)]
    parts: list[list[nn.Module]] = [[chain] for chain in chains]
    parts[0] += [lit.embed, lit.norm]
    parts[-1].append(lit.head)
    batches = list(loader()) * 2
    every, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val")
    chosen = {k: v for k, v in knobs.items() if k in ("order", "wire", "shrink")}

    def own(stage: int) -> list[nn.Parameter]:
        return [p for part in parts[stage] for p in part.parameters()]

    def compute(stage: int, x: Tensor) -> Tensor:
        with _context(options):
            if stage == 0:
                draws.reseed(seed, number[stage], 0)
                x = lit.prepare(x)
            draws.reseed(seed, number[stage], stage + 1)
            return chains[stage](x)  # type: ignore[no-any-return]

    def loss(batch: int, out: Tensor) -> Tensor:
        with _context(options):
            return (lit.head(out) - batches[batch - 1][1]).square().mean()  # type: ignore[no-any-return]

    def update(stage: int) -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(own(stage), clip)
        optimizers[stage].step()

    number = dict.fromkeys(range(stages), 0)
    optimizers = [_only(lit.configure_optimizers(), own(s)) for s in range(stages)]
    places = [
        Stage(
            s,
            stages,
            own(s),
            buffers=[b for part in parts[s] for b in part.buffers()],
            semantics=knobs.get("semantics", "stash"),
            reseed=lambda batch, s=s: number.update({s: batch}),
        )
        for s in range(stages)
    ]
    losses = simulate(
        places,
        [lambda x, s=s: compute(s, x) for s in range(stages)],
        [x for x, _ in batches],
        loss,
        update,
        every=every,
        ends=lambda batch: ((batch - 1) % 8 + 1) % every == 0 or batch % 8 == 0,
        **chosen,
    )
    return {"weights": weights(lit), "losses": losses}


def _only(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    here = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in here]
    return optimizer


CASES: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (2, {}, {}, {}),
    (3, {}, {}, {}),
    (4, {"shrink": 0.5}, {}, {"gradient_clip_val": 0.1}),
    (3, {"order": "forward_first", "wire": "bf16"}, {"optimizer": "adam"}, {}),
    (3, {"shrink": 0.5}, {}, {"accumulate_grad_batches": 3}),
    (2, {}, {}, {"precision": "bf16-mixed"}),
    (3, {"semantics": "hybrid"}, {"optimizer": "adam"}, {}),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("devices", "knobs", "module", "options"), CASES)
def test_many_processes_are_the_simulator_to_the_bit(
    devices: int, knobs: dict[str, Any], module: dict[str, Any], options: dict[str, Any]
) -> None:
    ends = run(devices, _fit, devices, knobs, module, options)
    expected = _simulated(devices, knobs, module, options)
    assert ends[0]["losses"] == expected["losses"]
    assert ends[0]["weights"] == expected["weights"]
    for end in ends[1:]:
        assert end["weights"] == ends[0]["weights"]
        assert end["metrics"] == ends[0]["metrics"]
        assert end["step"] == ends[0]["step"] == len(expected["losses"]) - 10 * (len(options) and "acc" in str(options))
    assert ends[-1]["losses"] == []
    assert ends[0]["metrics"]["batches"] == 8, "what is logged before the call counts once"
    assert ends[0]["arrived"] == (torch.bfloat16 if "precision" in options else torch.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_stage_is_plain_training_to_the_bit(optimizer: str) -> None:
    (one,) = run(1, _fit, 1, {}, {"optimizer": optimizer}, {})
    (plain,) = run(1, _fit, 1, {}, {"optimizer": optimizer}, PLAIN)
    assert one["losses"] == plain["losses"]
    assert one["weights"] == plain["weights"]
    assert one["metrics"] == plain["metrics"]


@pytest.mark.few(0)
def test_the_baseline_is_plain_accumulation() -> None:
    """Drained after each update, no gradient is late: what is left of the pipe is where the layers are. The last stage
    draws the noise that its loss asks for as the first one does."""
    module, options = {"dropout": 0.0, "noisy": 1.0}, {"accumulate_grad_batches": 4}
    piped = run(3, _fit, 3, {"baseline": "sync"}, module, options)
    (plain,) = run(1, _quiet_fit, module, {**options, **PLAIN})
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(piped[0]["losses"]), torch.tensor(plain["losses"]), **close)
    torch.testing.assert_close(torch.tensor(piped[2]["weights"]), torch.tensor(plain["weights"]), **close)


def _quiet_fit(module: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Plainly, with the pipeline's random numbers."""
    lit = Piped(**module)
    prepare, number = lit.prepare, iter(range(1, 100))

    def seeded(x: Tensor) -> Tensor:
        if lit.training:
            draws.reseed(5, next(number), 0)
        return prepare(x)

    lit.prepare = seeded  # type: ignore[method-assign]
    trainer(1, **options).fit(lit, loader(), loader(20))
    return {"weights": weights(lit), "losses": lit.losses}


def _replicated(replicas: int, depth: int) -> dict[str, Any]:
    lit = Piped(dropout=0.0)
    lit.prepare = lambda x: lit.embed(x)  # type: ignore[method-assign]
    lit.net[1] = nn.Linear(WIDTH, WIDTH)  # no statistics of batches, which are halves here
    t = trainer(replicas * depth, knobs={"replicas": replicas}, max_epochs=1)
    data: Any = loader(4, n=56)
    if replicas == 1:
        shares = [list(DistributedSampler(data.dataset, 2, share)) for share in (0, 1)]  # as Lightning shuffles them
        batches = [[*shares[0][at : at + 4], *shares[1][at : at + 4]] for at in range(0, 28, 4)]
        data = DataLoader(data.dataset, batch_sampler=batches)
    t.fit(lit, data, loader(20))
    return {"weights": weights(lit), "losses": lit.losses, "val": float(t.callback_metrics["val"])}


def test_replicas_stay_equal_and_are_one_pipeline_on_the_joined_batches() -> None:
    ends, (one, _) = run(4, _replicated, 2, 2), run(2, _replicated, 1, 2)
    assert all(end["weights"] == ends[0]["weights"] for end in ends)
    assert all(end["val"] == ends[0]["val"] for end in ends)
    assert [len(end["losses"]) for end in ends] == [7, 0, 7, 0]
    close = {"rtol": 1e-5, "atol": 1e-5}
    both = (torch.tensor(ends[0]["losses"]) + torch.tensor(ends[2]["losses"])) / 2
    torch.testing.assert_close(both, torch.tensor(one["losses"]), **close)
    torch.testing.assert_close(torch.tensor(ends[0]["weights"]), torch.tensor(one["weights"]), **close)


class Gathered(Callback):
    """What BatchNorm has gathered on a stage, behind each batch and in each validation."""

    def __init__(self) -> None:
        self.trained: list[list[float]] = []
        self.validated: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.trained.append(_held(trainer))

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self.validated.append(_held(trainer))


def _held(trainer: Any) -> list[float]:
    return [float(x) for buffer in trainer.strategy.turns.parts.all_buffers().values() for x in buffer.flatten()]


def _gathered() -> Any:
    lit, seen = Piped(), Gathered()
    t = trainer(4, knobs={"replicas": 2}, callbacks=[seen], num_sanity_val_steps=0)
    t.fit(lit, loader(), loader(20))
    return seen.trained, seen.validated, weights(lit)


@pytest.mark.few(0)
def test_where_replicas_rest_what_batchnorm_has_gathered_becomes_the_mean() -> None:
    """Of each stage over the replicas, and with that they train on."""
    ranks = run(4, _gathered)
    assert all(end == ranks[0][2] for _, _, end in ranks)
    for one, other in (ranks[::2], ranks[1::2]):
        for last, batch in ((3, 0), (7, 3)):
            both = torch.tensor([one[0][last], other[0][last]], dtype=torch.float64)
            assert not torch.equal(*both)
            assert one[1][batch] == other[1][batch] == both.mean(0).float().tolist()


class LateBuffer(Piped):
    """Has one that is replaced by others of unlike lengths, and one that the second pipeline registers as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.net[1] = torch.nn.Identity()  # type: ignore[assignment]
        self.net[0].register_buffer("cache", torch.zeros(1))

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_rank >= 2 and not hasattr(self.net[0], "late"):
            self.net[0].register_buffer("late", torch.ones(2))
        self.net[0].cache = torch.full((2 + self.global_rank,), float(self.global_rank))


def _late_buffers() -> Any:
    warnings.filterwarnings("ignore", ".*unlike buffers")
    lit = LateBuffer()
    trainer(4, knobs={"replicas": 2, "waiting_timeout": 20}, max_epochs=1).fit(lit, loader(), loader(20))
    return [p.tolist() for p in lit.parameters()], lit.net[0].cache.tolist(), hasattr(lit.net[0], "late")


@pytest.mark.few(0)
def test_a_pipeline_does_not_wait_for_buffers_that_the_other_does_not_have() -> None:
    """At the end all have the first pipeline's; what that does not have stays where it is."""
    ranks = run(4, _late_buffers)
    assert all(found == ranks[0][0] for found, _, _ in ranks)
    assert [cache for _, cache, _ in ranks] == [[1.0] * 3] * 4
    assert [late for *_, late in ranks] == [False, False, True, True]


class StopsItself(Piped):
    """Wishes to stop in mid-epoch, or where an epoch begins, on one rank."""

    def __init__(self, rank: int, *, at_start: bool = False) -> None:
        super().__init__()
        self.rank, self.at_start = rank, at_start

    def on_train_epoch_start(self) -> None:
        if self.global_rank == self.rank and self.at_start and self.current_epoch == 1:
            self.trainer.should_stop = True

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == self.rank and not self.at_start and self.trainer.global_step == 3:
            self.trainer.should_stop = True


def _stops(ranks: int, rank: int, knobs: dict[str, Any], at_start: bool = False) -> tuple[int, list[float]]:
    lit = StopsItself(rank, at_start=at_start)
    t = trainer(ranks, max_epochs=5, knobs=knobs)
    t.fit(lit, loader(2), loader(20))
    return t.global_step, weights(lit)


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_who_stops_in_mid_epoch_stops_all_after_the_same_batch(rank: int) -> None:
    ends = run(3, _stops, 3, rank, {})
    assert all(end == ends[0] for end in ends)
    assert 3 < ends[0][0] <= 3 + 2 * 4 + 1


@pytest.mark.few(0)
@pytest.mark.parametrize("rank", [0, 3])
def test_who_stops_stops_all_replicas_after_the_same_batch(rank: int) -> None:
    ends = run(4, _stops, 4, rank, {"replicas": 2})
    assert all(end == ends[0] for end in ends)
    assert 3 < ends[0][0] <= 3 + 2 * 2 + 2


def test_who_stops_before_the_first_batch_of_an_epoch_stops_all_after_the_same_batch() -> None:
    ends = run(2, _stops, 2, 1, {}, True)
    assert all(end == ends[0] for end in ends)
    assert 30 < ends[0][0] <= 30 + 2 * 2 + 1


def _late(knobs: dict[str, Any], optimizer: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", ".*a factor on the gradients changes nothing")
    return _fit(3, knobs, {"optimizer": optimizer}, {})


@cache
def _uncorrected(optimizer: str) -> list[float]:
    losses: list[float] = run(3, _late, {}, optimizer)[0]["losses"]
    return losses


@pytest.mark.few(0)
@pytest.mark.parametrize(
    ("knobs", "optimizer"),
    [
        ({"compensate": "lr", "anneal": 8}, "sgd"),
        ({"compensate": "predict"}, "adam"),
        ({"compensate": "nesterov"}, "sgd"),
        ({"shrink": 0.5}, "adam"),
        ({"semantics": "recompute"}, "sgd"),
    ],
)
def test_corrections_change_the_run_but_for_its_last_stage_at_first(knobs: dict[str, Any], optimizer: str) -> None:
    losses, bare = run(3, _late, knobs, optimizer)[0]["losses"], _uncorrected(optimizer)
    assert losses != bare
    assert losses[:2] == bare[:2]  # no earlier stage has stepped yet


@pytest.mark.few(0)
def test_weights_are_predicted_for_the_steps_that_shrinking_leaves() -> None:
    """Adam's steps of no length lead nowhere."""
    bare, ahead = (
        run(3, _late, {"shrink": 1e-6, "compensate": how}, "adam")[0]["losses"] for how in ("none", "predict")
    )
    assert ahead == pytest.approx(bare, rel=1e-4)


def _predicts() -> list[float]:
    seen, original = [], compensate.predicted

    def predicted(optimizer: torch.optim.Optimizer, late: float) -> Any:
        seen.append(late)
        return original(optimizer, late)

    compensate.predicted = predicted  # in this process, which is forked for this run
    parts = GradientAccumulationScheduler({1: 4})
    trainer(2, knobs={"compensate": "predict"}, callbacks=[parts]).fit(Piped(), loader(), loader(20))
    return seen


@pytest.mark.few(0)
def test_weights_are_predicted_by_the_accumulation_of_now() -> None:
    """A gradient that is a batch late is a quarter of an update late where four batches make one."""
    assert run(2, _predicts)[1] == [1.0] * 8 + [0.25] * 8


@pytest.mark.few(0)
def test_delays_are_shown() -> None:
    ends = run(3, _fit, 3, {}, {}, {})
    assert ends[0]["delays"] == []
    assert ends[1]["delays"][:4] == [0, 1, 1, 1]
    assert ends[2]["delays"][:5] == [0, 1, 2, 3, 3]


class Listens(Piped):
    """Remembers the squared norms of the gradients with which its optimizer stepped."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.norms: list[float] = []

        def note(*_: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(float(sum(g.square().sum() for g in gradients)))

        optimizer.register_step_post_hook(note)
        return optimizer


def _clips(clip: str) -> float:
    lit = Listens(lr=0.0, dropout=0.0)
    lit.prepare = lambda x: lit.embed(x)  # type: ignore[method-assign]  # the same gradient from each batch
    batch = TensorDataset(INPUTS[:8].repeat(14, 1), TARGETS[:8].repeat(14, 1))
    t = trainer(3, knobs={"clip": clip}, gradient_clip_val=0.01, max_epochs=1, limit_val_batches=0)
    t.fit(lit, DataLoader(batch, 8), loader(20))
    return lit.norms[-1]


@pytest.mark.parametrize(("clip", "times"), [("pipe", 1), ("stage", 3)])
@pytest.mark.few(0)
def test_what_is_clipped_by_norm(clip: str, times: int) -> None:
    """All of the pipe together, or each of its three stages."""
    assert sum(run(3, _clips, clip)) == pytest.approx(times * 0.01**2, rel=1e-2)
