"""What cannot be supported is refused early, by a sentence with the value and the remedy."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_async import GossipRingStrategy
from lightning_async.algorithms.gossip import Gossip
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.refusals import refuse_module, refuse_optimizers
from tests.strategies import ranks
from tests.strategies.lit import Lit, loader, trainer

TRAINERS: list[tuple[dict[str, Any], str]] = [
    ({"sync_batchnorm": True}, "`sync_batchnorm=True`.*leave it out"),
]


@pytest.mark.parametrize(("options", "sentence"), TRAINERS)
def test_conflicts_with_the_trainer(options: dict[str, Any], sentence: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer(1, **options)
        with pytest.raises(MisconfigurationException, match=f"strategy='gossip_ring': .*{sentence}"):
            t.fit(Lit(), loader(), loader(40, shuffle=False))


def test_sync_batchnorm_layers() -> None:
    with pytest.raises(MisconfigurationException, match=r"`1` is a SyncBatchNorm.*use BatchNorm"):
        refuse_module(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), "gossip_ring")


def test_optimizers() -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the closure several times"):
        refuse_optimizers([torch.optim.LBFGS([nn.Parameter(torch.zeros(1))])], "gossip_ring")


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"])
def test_sharded_optimizers(name: str) -> None:
    kind = type(name, (torch.optim.SGD,), {})
    for one in (kind, type("Own", (kind,), {})):
        with pytest.raises(MisconfigurationException, match=f"{one.__name__} exchanges state between ranks at every"):
            refuse_optimizers([one([nn.Parameter(torch.zeros(1))], 0.1)], "gossip_ring")


class SpikeDetection(L.Callback):
    """Lightning's own is abstract; what counts is the name in its line of ancestors."""


class MySpikes(SpikeDetection):
    pass


def test_spike_detection() -> None:
    with pytest.raises(MisconfigurationException, match="`SpikeDetection` compares losses of all ranks at every step"):
        trainer(1, callbacks=[MySpikes()]).fit(Lit(), loader(), loader(40, shuffle=False))


def test_precision_plugins_of_other_strategies() -> None:
    kind = type("FSDPPrecision", (Precision,), {})
    for one in (kind, type("Own", (kind,), {})):
        with pytest.raises(MisconfigurationException, match=f"`{one.__name__}` belongs to another strategy"):
            trainer(1, plugins=[one()]).fit(Lit(), loader(), loader(40, shuffle=False))


def test_precision_that_exchanges_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(1)
    monkeypatch.setattr(t.precision_plugin, "precision", "transformer-engine")
    with pytest.raises(MisconfigurationException, match="`precision='transformer-engine'` combines its scales"):
        t.fit(Lit(), loader(), loader(40, shuffle=False))


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_reestimation_with_manual_optimisation() -> None:
    t = trainer(1, knobs={"buffers": "reestimate"})
    with pytest.raises(MisconfigurationException, match="`buffers='reestimate'` runs `training_step` once more"):
        t.fit(Manual(), loader(), loader(40, shuffle=False))


FOREIGN = {
    "another dictionary": (
        {"weights": torch.zeros(3)},
        "it has no 'pytorch-lightning_version' and no 'state_dict', but",
    ),
    "weights": ({"state_dict": {}}, "it has no 'pytorch-lightning_version', but 'state_dict'. A run"),
    "a tensor": (torch.zeros(3), "it holds a Tensor, not a dictionary"),
    "text": (b"hello", r"it cannot be read \("),
    "nothing": (b"", r"it cannot be read \("),
    "half a file": (b"PK\x03\x04 and then nothing", r"it cannot be read \("),
}


REFUSED_OR_TOLD = ("MisconfigurationException", "PeerFailedError")
"""The one rank refuses before the other one looks: then that is told, in the same words."""


def fit_from(path: Path, stage: str = "fit", strategy: str = "gossip_ring") -> None:
    warnings.simplefilter("ignore")
    t = trainer(2, strategy=strategy, max_epochs=1)
    if stage == "fit":
        t.fit(Lit(), loader(), loader(40, shuffle=False), ckpt_path=path)
    else:
        getattr(t, stage)(Lit(), loader(40, shuffle=False), ckpt_path=path)


def write(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def refused_on_both(path: Path, sentence: str, *arguments: Any) -> None:
    begin = time.monotonic()
    with ranks.Forked(2, fit_from, path, *arguments) as forked:
        results = forked.results(20.0)
    assert time.monotonic() - begin < 15.0
    assert "MisconfigurationException" in {result.kind for result in results}
    for result in results:
        assert result.kind in REFUSED_OR_TOLD, result.trace
        assert re.search(f"ckpt_path='{path}' is no checkpoint that Lightning saved: {sentence}", result.error)
        assert "load them before `fit`, with `load_state_dict`" in result.error


@pytest.mark.few(3)
@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_checkpoint(tmp_path: Path, content: str) -> None:
    data, sentence = FOREIGN[content]
    refused_on_both(write(tmp_path / "foreign.ckpt", data), sentence)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_foreign_checkpoint_in_other_stages(tmp_path: Path, stage: str) -> None:
    data, sentence = FOREIGN["another dictionary"]
    refused_on_both(write(tmp_path / "foreign.ckpt", data), sentence, stage)


@pytest.mark.few(1)
@pytest.mark.parametrize("strategy", ["async_global", "cyclic_delay", "delayed_pipeline", "lazy_sign"])
def test_a_foreign_checkpoint_of_each_strategy(tmp_path: Path, strategy: str) -> None:
    data, sentence = FOREIGN["text"]
    refused_on_both(write(tmp_path / "foreign.ckpt", data), sentence, "fit", strategy)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_plain_lightning_is_not_foreign(tmp_path: Path) -> None:
    plain = trainer(1, strategy="auto", max_epochs=1)
    plain.fit(Lit(), loader(), loader(40, shuffle=False))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    t, lit = trainer(1, max_epochs=2), Lit()
    t.fit(lit, loader(), loader(40, shuffle=False), ckpt_path=tmp_path / "plain.ckpt")
    assert len(lit.seen) == 240  # of the second epoch only


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        trainer(1).fit(Lit(), loader(), loader(40, shuffle=False), ckpt_path=tmp_path / "none.ckpt")


class Nothing(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Complex(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("lit", "sentence"),
    [(Nothing, "no trainable parameters"), (Complex, r"must have one of the dtypes float16.*found torch.complex64")],
)
@pytest.mark.filterwarnings("ignore")
def test_parameters(lit: type[Lit], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trainer(1).fit(lit(), loader(), loader(40, shuffle=False))


class Elsewhere(nn.Linear):
    """Wherever the module is moved, this layer goes to a device of its own: here, for want of another one, 'meta'."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to("meta"), recurse)  # type: ignore[no-untyped-call]


class Mixed(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.head = Elsewhere(3, 3)


@pytest.mark.parametrize(
    ("lit", "sentence"),
    [
        (Nothing, "the module has no trainable parameters"),
        (Mixed, "all trainable parameters must live on one device, found cpu and meta: move them to one, or freeze"),
    ],
)
def test_parameters_on_two_ranks(lit: type[Lit], sentence: str) -> None:
    """Each finds out by itself, and neither waits for the other."""
    with ranks.Forked(2, fit_unmade, lit, "gossip_ring") as forked:
        results = forked.results(20.0)
    assert "ValueError" in {result.kind for result in results}
    for result in results:
        assert result.kind in ("ValueError", "PeerFailedError"), result.trace
        assert sentence in result.error


class Lazy(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)


class LazyStatistics(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d(affine=False)


class Meta(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, device="meta")


class MetaBuffer(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(3, device="meta"))


class MadeInTime(Meta):
    """As users of large models do it."""

    def configure_model(self) -> None:
        self.head = self.head.to_empty(device="cpu")
        self.head.reset_parameters()


def fit_unmade(lit: type[Lit], strategy: str) -> None:
    warnings.simplefilter("ignore")
    trainer(2, strategy=strategy, max_epochs=1).fit(lit(), loader(), loader(40, shuffle=False))


@pytest.mark.few(3)
@pytest.mark.parametrize("strategy", ["gossip_ring", "delayed_pipeline"])
@pytest.mark.parametrize(
    ("lit", "sentence"),
    [
        (Lazy, "`head.weight` is lazy, .* give the layer its sizes, or run one batch through it in `configure_model`"),
        (LazyStatistics, "`norm.running_mean` is lazy"),
        (
            Meta,
            "`head.weight` is on the device 'meta' and has no numbers; make it on a real device in `configure_model",
        ),
        (MetaBuffer, "`mask` is on the device 'meta'"),
    ],
)
def test_parameters_that_are_not_made_yet(lit: type[Lit], sentence: str, strategy: str) -> None:
    with ranks.Forked(2, fit_unmade, lit, strategy) as forked:
        results = forked.results(20.0)
    assert "MisconfigurationException" in {result.kind for result in results}
    for result in results:
        assert result.kind in REFUSED_OR_TOLD, result.trace
        assert re.search(f"strategy='{strategy}': {sentence}", result.error)


def test_parameters_that_are_made_in_time() -> None:
    ranks.run(2, fit_unmade, MadeInTime, "gossip_ring")


KNOBS = [
    ({"mode": "ring"}, "`mode` must be one of"),
    ({"at_meeting": "leave"}, "`at_meeting` must be one of 'adopt', 'keep', got 'leave'"),
    ({"buffers": "mean"}, "`buffers` must be one of 'average', 'reestimate', 'local', got 'mean'"),
    ({"balance": "fair"}, "`balance` must be 'claim', 'equal', 'incremental' or its knobs, got 'fair'"),
    ({"mode": "sync", "balance": "claim"}, "`balance` must be 'equal' with mode='sync'"),
    ({"start_method": "thread"}, "`start_method` must be one of 'popen', 'spawn', 'fork', 'forkserver', got 'thread'"),
    ({"silence": 0}, "`silence` must be a number of seconds above 0, got 0"),
    ({"patience": "long"}, "`patience` must be a number of seconds above 0, got 'long'"),
    ({"silence": 5.0, "patience": 1.0}, "`patience` must be at least `silence`"),
    ({"meeting_timeout": -1}, "`meeting_timeout` must be a number of seconds above 0, got -1"),
    ({"meeting_timeout": math.nan}, "`meeting_timeout` must be a number of seconds above 0, got nan"),
    ({"grace": -0.1}, "`grace` must be a number of seconds of at least 0, got -0.1"),
    ({"interface": 3}, "`interface` must be the name of a network interface, or None, got 3"),
    ({"record": 3}, "`record` must be the path of a folder, or None, got 3"),
]


@pytest.mark.parametrize(("knobs", "sentence"), KNOBS)
def test_wrong_knobs(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GossipRingStrategy(**knobs)


def test_a_long_ring_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gossip, "ring_limit", 0)
    with pytest.warns(UserWarning, match="1 members on a ring agree slowly"):
        trainer(1, max_epochs=0).fit(Lit(), loader(), loader(40, shuffle=False))


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"`interface` must name a network interface .*, got 'eth77'"):
        trainer(1, knobs={"interface": "eth77"}).fit(Lit(), loader(), loader(40, shuffle=False))


def test_no_keyword_is_swallowed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'find_unused_parameters'"):
        GossipRingStrategy(find_unused_parameters=True)  # type: ignore[call-arg]
    kinds = {p.kind for p in inspect.signature(GossipRingStrategy).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_every_knob_is_documented() -> None:
    knobs = inspect.signature(GossipRingStrategy).parameters
    assert [k for k in knobs if f"        {k}: " not in (GossipRingStrategy.__doc__ or "")] == []


def test_a_strategy_can_be_pickled_before_it_runs() -> None:
    copy = pickle.loads(pickle.dumps(GossipRingStrategy(period=3)))
    assert isinstance(copy, AsyncStrategy)
    assert copy.algorithm.period == 3


def test_names_are_registered_once() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_async.strategies import register

    register()
    assert {"gossip_ring", "gossip_ring_spawn", "gossip_ring_fork"} <= set(StrategyRegistry)
    assert L.Trainer(strategy="gossip_ring", devices=1, accelerator="cpu", logger=False).strategy.name == "gossip_ring"  # type: ignore[attr-defined]
