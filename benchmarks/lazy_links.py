"""Signs on slow links: 4 hosts in network namespaces, seconds of a step and bytes that left a host's network card.

    limit     max(compute, bytes / bandwidth): compute is the step of `none`, in the same turn
    control   none: the same model and data, no message between steps

Bytes are what the card of each host counted between two steps (/proc/net/dev): payload, headers, acknowledgements,
heartbeats. Beside `lazy_sign` stand `ddp`, its fp16 and PowerSGD hooks, the signs as a hook, and local SGD, which
averages weights after every 8 steps. All variants have the same model and take turns on every bandwidth, the fastest
first; who would need over half a minute a step for its bytes alone is left out. Where `ddp` becomes the better one is
told by straight lines: a step's time on the fastest link, less its bytes, is what it takes on any.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Digits, Work, loaders
from lightning_async import GossipRingStrategy, LazySignStrategy
from lightning_async.callbacks import SignGradients

N = 4
PERIOD = 8
ONE_BUCKET = 2000
"""PyTorch's hooks start collectives in callbacks, which gloo may run in another order on each rank; with one bucket
there is one order only. (With several, PowerSGD ends in a mismatch of sizes.)"""
LESS, MUCH_LESS, SLOWER = 30.0, 3.0, 1.25
LONG = 30.0
"""Seconds of a step that are not waited for."""
VARIANTS = (
    "none",
    "ddp",
    "ddp, fp16",
    "ddp, PowerSGD 1",
    "ddp, PowerSGD 2",
    "ddp, PowerSGD 4",
    "ddp, signs",
    "local SGD",
    "lazy_sign",
    "lazy_sign, periodic",
    "lazy_sign, accumulate",
)
ROLES = {"none": Role.CONTROL, **{name: Role.OTHER for name in VARIANTS if name.startswith(("ddp", "local"))}}
SIGNS: Mapping[str, dict[str, Any]] = {
    "lazy_sign": {},
    "lazy_sign, periodic": {"rule": "periodic", "max_skip": 3},
    "lazy_sign, accumulate": {"rule": "accumulate", "max_skip": 3, "history": 3},
}


@dataclass(frozen=True)
class Setting:
    """A model, links and how long."""

    width: int
    layers: int
    mbits: tuple[float, ...]
    warm: int
    steps: int
    turns: int
    limit: float

    def work(self, variant: str) -> Work:
        """What a rank trains."""
        return Work(N * (self.warm + self.steps + 1), width=self.width, layers=self.layers, step=0.0)


def setting(quick: bool) -> Setting:
    """About a million weights, or 25 million."""
    if quick:
        return Setting(512, 5, (50.0,), 4, 12, 1, 300.0)
    return Setting(2048, 7, (1000.0, 200.0, 100.0, 10.0), 3, PERIOD, 3, 3600.0)


class Meter(Callback):
    """Seconds and bytes between the end of the warm-up and the last step but one."""

    def __init__(self, warm: int, steps: int) -> None:
        self._at = {warm: "begin", warm + steps: "end"}
        self.marks: dict[str, tuple[float, int]] = {}
        self._batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over."""
        self._batches += 1
        if self._batches in self._at:
            self.marks[self._at[self._batches]] = (time.monotonic(), sent())


class Hook(Callback):
    """Registers a communication hook of PyTorch's, on CPUs too."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is wrapped by now."""
        model: Any = trainer.strategy.model
        if self._name == "fp16":
            model.register_comm_hook(None, fp16_compress_hook)
        else:
            rank = int(self._name.rpartition(" ")[2])
            state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook)


def sent() -> int:
    """Bytes that have left this host."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    counters = {line.partition(":")[0].strip(): line.partition(":")[2].split() for line in lines[2:]}
    return int(counters["eth0"][8]) if "eth0" in counters else 0


def train(work: dict[str, Any], variant: str, warm: int, steps: int) -> dict[str, float]:
    """Train on this rank."""
    job, meter = Work.read(work), Meter(warm, steps)
    callbacks: list[Callback] = [meter]
    strategy: Any = "ddp"
    if variant in SIGNS:
        strategy = LazySignStrategy(**SIGNS[variant])
    elif variant == "none":
        strategy = GossipRingStrategy(mode="none", balance="equal")
    elif variant == "local SGD":
        strategy = GossipRingStrategy(mode="none", balance="equal", meet_every=PERIOD * N * job.batch)
    elif variant == "ddp, signs":
        callbacks.append(SignGradients())
    elif variant != "ddp":
        callbacks.append(Hook(variant.partition(", ")[2]))
        strategy = DDPStrategy(bucket_cap_mb=ONE_BUCKET)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Digits(job), loaders(job)[0])
    (begin, before), (end, after) = meter.marks["begin"], meter.marks["end"]
    return {"step": (end - begin) / steps, "bytes": (after - before) / steps}


def run(quick: bool) -> Table:
    """All variants on all bandwidths."""
    if (reason := available()) is not None:
        raise SystemExit(f"lazy_links cannot run here: {reason}")
    chosen, left_out = setting(quick), ("ddp, PowerSGD 2", "ddp, PowerSGD 4") if quick else ()
    rows: list[Row] = []
    claims: list[Claim] = []
    kept = [variant for variant in VARIANTS if variant not in left_out]
    fastest: Turns | None = None
    for mbit in chosen.mbits:
        kept = [v for v in kept if fastest is None or _travel(fastest, v, mbit) < LONG]
        turns = repeat({variant: partial(_measure, chosen, variant, mbit) for variant in kept}, chosen.turns)
        rows += [_row(turns, name, mbit) for name in turns.measures]
        rows.append(Row(f"{mbit:g} Mbit/s: bytes at this rate", Role.LIMIT, {"s a step": _bound(turns, mbit)}))
        claims += _claims(turns, mbit, quick)
        fastest = fastest or turns
    assert fastest is not None
    crossings = [_crossing(fastest, name, chosen.mbits[0]) for name in SIGNS]
    weights = sum(p.numel() for p in chosen.work("ddp").model().parameters())
    return Table(
        f"{N} hosts, {weights / 1e6:.3g} M weights: a step and what it sends", rows, claims, [*NOTES, *crossings]
    )


def _measure(chosen: Setting, variant: str, mbit: float) -> Measures:
    arguments = {"work": chosen.work(variant).arguments(None)["work"], "variant": variant}
    arguments |= {"warm": chosen.warm, "steps": chosen.steps}
    with (
        Hosts(N, mbit=mbit) as hosts,
        Ranks(train, N, arguments=arguments, address=hosts.address(0), spawn=hosts.spawn) as ranks,
    ):
        records = ranks.values(timeout=chosen.limit)
    return {"step": fmean(r["step"] for r in records), "bytes": fmean(r["bytes"] for r in records)}


def _bound(turns: Turns, mbit: float, name: str = "lazy_sign") -> float:
    """What a step with these bytes cannot be shorter than."""
    return max(turns.of("none", "step").median, _travel(turns, name, mbit))


def _travel(turns: Turns, name: str, mbit: float) -> float:
    """Seconds for which a link of this rate is busy with the bytes of a step."""
    return turns.of(name, "bytes").median * 8e-6 / mbit


def _crossing(turns: Turns, name: str, mbit: float) -> str:
    """From which rate on a step of `ddp` is the shorter one."""
    more = turns.of("ddp", "bytes").median - turns.of(name, "bytes").median
    own = {v: turns.of(v, "step").median - _travel(turns, v, mbit) for v in ("ddp", name)}
    if own[name] <= own["ddp"]:
        return f"{name}: at no rate is a step of ddp shorter"
    return f"{name}: a step of ddp is shorter from about {more * 8e-6 / (own[name] - own['ddp']):.0f} Mbit/s on"


def _row(turns: Turns, name: str, mbit: float) -> Row:
    step, nbytes = turns.of(name, "step").median, turns.of(name, "bytes").median
    cells: dict[str, Cell] = {
        "s a step": step,
        "kB a step": nbytes / 1000,
        "fewer bytes than ddp": turns.of("ddp", "bytes").median / max(1.0, nbytes) if "ddp" in turns.measures else None,
        "step / ddp": str(turns.ratio(name, "ddp", "step")) if "ddp" in turns.measures else None,
        "step / bound": step / _bound(turns, mbit, name),
    }
    return Row(f"{mbit:g} Mbit/s: {name}", ROLES.get(name, Role.RESULT), cells)


def _claims(turns: Turns, mbit: float, quick: bool) -> list[Claim]:
    if "ddp" not in turns.measures:
        return []
    fewer = turns.ratio("ddp", "lazy_sign", "bytes")
    lazier = turns.ratio("lazy_sign", "lazy_sign, periodic", "bytes")
    close = turns.of("lazy_sign", "step").median / _bound(turns, mbit)
    claims = [
        Claim(f"{mbit:g} Mbit/s: signs send at least {LESS:g}x fewer bytes than ddp: {fewer}", fewer.median >= LESS),
        Claim(f"{mbit:g} Mbit/s: one round in four, {MUCH_LESS:g}x fewer again: {lazier}", lazier.median >= MUCH_LESS),
    ]
    bound = Claim(f"{mbit:g} Mbit/s: a step is within {SLOWER:g}x of its bound: {close:.2f}", close <= SLOWER)
    return claims if quick else [*claims, bound]


NOTES = ["Links have no delay of their own here: the kernel of the machine must have netem for that."]
