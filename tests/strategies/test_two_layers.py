"""Members of several ranks: siblings are equal to the bit at every step, one member is ddp, each sample counts once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric

from lightning_async import AsyncGlobalStrategy, CyclicDelayStrategy, GossipRingStrategy
from lightning_async.algorithms import common_step
from lightning_async.callbacks import SpeedFaults
from lightning_async.strategies.waiting import PeerFailedError
from lightning_async.transport.siblings import PART
from tests.strategies.lit import INPUTS, TARGETS, ByHand, Lit, Numbers, loader, trainer, weights
from tests.strategies.ranks import run

pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with")


class Plain(Lit):
    """Without BatchNorm, whose statistics ddp takes from rank 0, and with an optimizer of the test's choice."""

    def __init__(self, optimizer: str = "sgd", **options: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.optimizer, self.options = optimizer, {"lr": 0.002, **options}

    def configure_optimizers(self) -> Any:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        return kinds[self.optimizer](self.parameters(), **self.options)


class PlainByHand(Plain, ByHand):
    """The same, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Watches(Callback):
    """A fingerprint of the weights, and the learning rate, after every batch."""

    def __init__(self) -> None:
        self.prints: list[tuple[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *arguments: Any) -> None:
        flat = torch.cat([p.detach().float().flatten() for p in module.parameters()])
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.prints.append((hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:12], rate))


def _fit(n: int, knobs: dict[str, Any] | None, make: Any, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]) if knobs is not None else 0)
    lit, watches = make(), Watches()
    if knobs is not None and os.environ["RANK"] == "0":
        torch.manual_seed(0)
        lit = make()
    options = {"callbacks": [watches, *options.pop("callbacks", [])], **options}
    samples = options.pop("samples", 240)
    data = loader(batch, shuffle=False, n=samples) if knobs is not None else own_share(n, batch)
    strategy: Any = "ddp"
    if knobs is not None:
        strategy = KINDS[knobs.get("of", "gossip_ring")](**{name: knobs[name] for name in knobs if name != "of"})
    t = trainer(n, strategy=strategy, use_distributed_sampler=knobs is not None, **options)
    t.fit(lit, data, loader(40, shuffle=False))
    end = {"weights": weights(lit), "prints": watches.prints, "seen": lit.seen, "val": float(t.callback_metrics["val"])}
    if knobs is not None:
        end |= {
            "arrivals": len(strategy.arrivals()),
            "steps": strategy.steps,
            "metric": float(t.callback_metrics["metric"]),
        }
    return end


def own_share(n: int, batch: int) -> DataLoader[Any]:
    """This rank's samples for ddp: those that it has as one of a member's ranks."""
    mine = slice(int(os.environ["RANK"]), None, n)
    return DataLoader(TensorDataset(torch.arange(240)[mine], INPUTS[mine], TARGETS[mine]), batch_size=batch)


def fit(n: int, knobs: dict[str, Any] | None, make: Any = Plain, batch: int = 4, **options: Any) -> list[Any]:
    return run(n, _fit, n, knobs, make, batch, options)


TWO = {"inner_size": 2}
KINDS: dict[str, Any] = {
    "gossip_ring": GossipRingStrategy,
    "async_global": AsyncGlobalStrategy,
    "cyclic_delay": CyclicDelayStrategy,
}


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "knobs",
    [
        {"mode": "pairwise"},
        {"mode": "pairwise", "at_meeting": "keep"},
        {"mode": "push_sum"},
        {"of": "async_global"},
        {"of": "async_global", "local_steps": 2, "on_late": "wait"},
        {"mode": "none", "at_meeting": "keep"},
        {"of": "cyclic_delay", "push": "gradient"},
        {"of": "cyclic_delay", "push": "delta"},
        {"of": "cyclic_delay", "push": "gradient", "token": "strict"},
        {"mode": "sync"},
        {"of": "async_global", "mode": "sync", "local_steps": 2},
    ],
    ids=str,
)
def test_siblings_are_equal_at_every_step_and_each_sample_is_seen_once(knobs: dict[str, Any]) -> None:
    slow = SpeedFaults(step_seconds=0.002, slow={2: 3.0, 3: 3.0})
    ends = fit(4, {**TWO, **knobs}, Lit, callbacks=[slow])
    for one, other in ((0, 1), (2, 3)):
        assert ends[one]["prints"] == ends[other]["prints"]
        assert ends[one]["steps"] == ends[other]["steps"] > 0
    assert ends[0]["prints"] != ends[2]["prints"] or knobs.get("mode") == "sync"
    for end in ends[1:]:
        for key in ("weights", "val", "metric"):
            assert end[key] == ends[0][key]
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen.values()) == {2}
    assert len(seen) == 240
    if knobs.get("mode") not in ("none", "sync"):
        assert ends[0]["arrivals"] > 0
    assert ends[1]["arrivals"] == ends[3]["arrivals"] == 0  # a member hears by its speaker


@cache
def by_ddp(n: int, make: Any = Plain, **options: Any) -> dict[str, Any]:
    end: dict[str, Any] = fit(n, None, make, **options)[0]
    return end


def _adam() -> Plain:
    return Plain("adam")


@pytest.mark.few(2)
@pytest.mark.parametrize("make", [Plain, _adam, PlainByHand])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}])
def test_one_member_of_two_ranks_is_ddp_to_the_bit(make: Any, options: dict[str, Any]) -> None:
    if options and make is PlainByHand:
        pytest.skip("Lightning refuses to accumulate by hand")
    for end in fit(2, TWO, make, **options):
        assert end["weights"] == by_ddp(2, make, **options)["weights"]
        assert end["val"] == pytest.approx(by_ddp(2, make, **options)["val"])


@pytest.mark.few(0)
@pytest.mark.parametrize(("make", "options"), [(Plain, {"accumulate_grad_batches": 4}), (_adam, {}), (PlainByHand, {})])
def test_and_so_it_is_where_gradients_leave_beside_backward(
    make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_step, "BUCKET", 64)
    for end in fit(2, TWO, make, **options):
        assert end["weights"] == by_ddp(2, make, **options)["weights"]


class Looks(Callback):
    """How many numbers of gradients have left in a batch when the first layer's is computed, the last of all."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        look = lambda _: self.left.append(self.count(trainer) - self.before)  # noqa: E731
        self.hook = module.layer[0].weight.register_hook(look)

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.before = self.count(trainer)

    def count(self, trainer: L.Trainer) -> int:
        tables = trainer.strategy.traffic().values()
        return sum(kinds[PART].numbers_out for kinds in tables if PART in kinds)  # counted as they are posted

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.hook.remove()


class Clips(Plain):
    """Changes gradients behind backward, past autograd's own count of changes."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.data.clamp_(-0.01, 0.01)


def _looks(make: Any) -> tuple[list[int], Any]:
    looks, lit = Looks(), make()
    t = trainer(2, strategy=GossipRingStrategy(inner_size=2), callbacks=[looks], max_epochs=1, limit_train_batches=6)
    t.fit(lit, loader(4, shuffle=False), loader(40, shuffle=False))
    return looks.left, weights(lit)


@pytest.mark.parametrize(("make", "early"), [(Plain, True), (Clips, False)])
def test_a_bucket_leaves_before_backward_has_ended_but_not_where_a_hook_may_change_it(
    make: Any, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_step, "BUCKET", 64)
    (left, mine), (of_the_owner, theirs) = run(2, _looks, make)
    assert mine == theirs
    assert len(left) == 6
    assert (left[0] > 0) == early  # of the first bucket, which belongs to the other one
    assert early or not any(left + of_the_owner)


@pytest.mark.few(0)
@pytest.mark.parametrize(
    "knobs", [{"of": "async_global"}, {"of": "cyclic_delay", "push": "gradient", "token": "strict"}], ids=str
)
def test_and_so_it_is_with_a_server_of_its_own(knobs: dict[str, Any]) -> None:
    for end in fit(2, {**TWO, **knobs}):
        assert end["weights"] == by_ddp(2)["weights"]


@pytest.mark.few(0)
def test_one_member_of_three_ranks_is_ddp_to_rounding() -> None:
    mine, theirs = fit(3, {"inner_size": 3}), by_ddp(3)
    assert mine[0]["weights"] == pytest.approx(theirs["weights"], rel=1e-5, abs=1e-6)
    assert mine[0]["prints"] == mine[1]["prints"] == mine[2]["prints"]


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(0)
@pytest.mark.parametrize("balance", ["claim", "equal", "incremental"])
@pytest.mark.parametrize("samples", [229, 230, 26])
def test_what_does_not_divide_is_filled_up_inside_and_nobody_hangs(samples: int, balance: str) -> None:
    slow = SpeedFaults(step_seconds=0.002, slow={2: 3.0, 3: 3.0})
    ends = fit(4, {**TWO, "balance": balance}, batch=3, samples=samples, callbacks=[slow], accumulate_grad_batches=2)
    assert len({tuple(end["weights"]) for end in ends}) == 1
    assert [len(ends[r]["seen"]) for r in (0, 2)] == [len(ends[r]["seen"]) for r in (1, 3)]
    seen = Counter(index for end in ends for index in end["seen"])
    assert len(seen) == samples
    assert all(seen[index] >= 2 for index in range(samples))
    assert sum(seen.values()) <= 2 * (samples + 2 * (2 if balance != "incremental" else 10) + 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"knobs": TWO, "use_distributed_sampler": False}, "leave one of the two out"),
        ({"knobs": {"inner_size": 3}}, "`inner_size=3` does not divide the 2 ranks of this run"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(options: dict[str, Any], sentence: str) -> None:
    assert all(sentence in said for said in run(2, _refused, options, False))


def test_a_stream_cannot_be_split() -> None:
    assert all("a stream (an IterableDataset" in said for said in run(2, _refused, {"knobs": TWO}, True))


def _refused(options: dict[str, Any], streams: bool) -> str:
    data: Any = DataLoader(Numbers(40), batch_size=4) if streams else loader()
    with pytest.raises((MisconfigurationException, PeerFailedError)) as error:
        trainer(2, **options).fit(Lit(), data, loader(40, shuffle=False))
    return str(error.value)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"inner": "rack"}, "`inner` must be one of 'node', got 'rack'"),
        ({"inner": "node", "inner_size": 2}, "give `inner='node'` .* or `inner_size=2`, not both"),
        ({"inner_size": 0}, "`inner_size` must be an integer of at least 1, or None, got 0"),
    ],
)
def test_knobs_that_mean_nothing(knobs: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GossipRingStrategy(**knobs)


# -- a node ------------------------------------------------------------------------------------------------------------


def _sizes(inner: Any, devices: int) -> tuple[int, int]:
    t = trainer(devices, knobs={"inner": inner}, max_epochs=1)
    t.fit(Lit(), loader(n=40), loader(40, shuffle=False))
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    return strategy.members, strategy.office.size


def test_the_ranks_of_a_node_are_one_member_and_by_default_each_is_one() -> None:
    assert run(2, _sizes, "node", 2) == [(1, 2)] * 2
    assert run(2, _sizes, None, 2) == [(2, 1)] * 2


def _on_nodes() -> tuple[int, tuple[int, ...]]:
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2), "LOCAL_WORLD_SIZE": "2"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    t = trainer(2, num_nodes=2, knobs={"inner": "node"}, max_epochs=1, callbacks=[watch := Members()])
    t.fit(Lit(), loader(n=40), loader(40, shuffle=False))
    return watch.seen


class Members(Callback):
    """How many members there are, and which ranks are this rank's."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.seen = strategy.members, strategy.office.siblings.ranks


def test_each_node_is_a_member() -> None:
    assert run(4, _on_nodes) == [(2, (0, 1)), (2, (0, 1)), (2, (2, 3)), (2, (2, 3))]


def _validates_after() -> list[float]:
    lit = Lit()
    t = trainer(2, knobs=TWO)
    t.fit(lit, loader(), loader(40, shuffle=False))
    t.validate(lit, loader(40, shuffle=False), verbose=False)
    t.fit_loop.max_epochs = 3
    t.fit(lit, loader(), loader(40, shuffle=False))
    return weights(lit)


@pytest.mark.few(0)
def test_other_stages_have_ranks_and_a_second_fit_has_members_again() -> None:
    one, other = run(2, _validates_after)
    assert one == other


# -- what travels ------------------------------------------------------------------------------------------------------


class Counts(Callback):
    """The bytes that this rank sent to each other one by the end of the run, without headers."""

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        table = trainer.strategy.traffic()  # type: ignore[attr-defined]
        self.sent = {p: sum(c.bytes_out for k, c in kinds.items() if k) for p, kinds in table.items()}


def _sent(n: int, knobs: dict[str, Any]) -> dict[int, int]:
    lit, counts = Lit(lr=1e-6), Counts()
    lit.layer = torch.nn.Sequential(torch.nn.Linear(8, 4000), torch.nn.BatchNorm1d(4000), torch.nn.Linear(4000, 1))
    t = trainer(n, knobs={"mode": "none", **knobs}, callbacks=[counts])
    t.fit(lit, loader(40), loader(40, shuffle=False))
    return counts.sent


@pytest.mark.few(0)
def test_between_members_travels_what_travels_between_two_ranks() -> None:
    two, four = run(2, _sent, 2, {}), run(4, _sent, 4, TWO)
    assert four[0][2] == two[0][1] > 0
    assert four[2][0] == two[1][0] > 0
    assert four[0].get(3, 0) == four[1].get(2, 0) == four[1].get(3, 0) == four[3].get(1, 0) == 0


# -- metrics -----------------------------------------------------------------------------------------------------------


class Lists(Plain):
    """A metric that keeps all it saw: more than goes as a word."""

    def __init__(self) -> None:
        super().__init__()
        self.all = CatMetric()
        self.whole: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.all.update(batch[0].float().repeat(1000))

    def on_validation_epoch_end(self) -> None:
        self.whole = self.all.compute().tolist()
        self.all.reset()


def _lists() -> tuple[list[float], set[int]]:
    torch.manual_seed(0)
    lit, peers = Lists(), set[int]()
    t = trainer(4, knobs={"inner_size": 2, "mode": "none"}, max_epochs=1, num_sanity_val_steps=0)
    close = t.strategy.office.close  # type: ignore[attr-defined]

    def look_and_close() -> None:
        sent = t.strategy.traffic()  # type: ignore[attr-defined]
        peers.update(peer for peer, kinds in sent.items() if any(count.messages_out for count in kinds.values()))
        close()

    t.strategy.office.close = look_and_close  # type: ignore[attr-defined]
    t.fit(lit, loader(shuffle=False), loader(20, shuffle=False))
    return lit.whole, peers


@pytest.mark.few(0)
def test_a_metric_that_keeps_all_it_saw_opens_no_links_between_all_ranks() -> None:
    """A fourth of 240 samples a thousand times is 240 kB for each rank."""
    ends = run(4, _lists)
    assert all(Counter(whole) == dict.fromkeys(range(240), 1000) for whole, _ in ends)
    assert all(whole == ends[0][0] for whole, _ in ends)
    assert [peers for _, peers in ends] == [{1, 2}, {0}, {0, 3}, {2}]
