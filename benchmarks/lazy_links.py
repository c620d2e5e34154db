"""Signs on slow links: 4 hosts in network namespaces, seconds of a step, bytes that left a host, seconds to a target.

    limit     max(compute, bytes / bandwidth + a way there and one back): compute is the step of `none`, in the same run
    control   none: the same model and data, no message between steps

Links of 10, 100 and 200 Mbit/s take 5 ms from host to host, those of 1000 take none; with `--link 100` it is of that
one alone. Bytes are what the card of each host counted between two steps (/proc/net/dev): payload, headers,
acknowledgements, heartbeats. Beside `lazy_sign` stand `ddp`, its bf16 and PowerSGD hooks, the signs as a hook, and
post-local SGD, which averages weights behind every 8th step. The links are fast until all have warmed up; then come
one step to settle and 3 or 8 that count. Who would need over half a minute a step for its bytes alone is left out.

Seconds to a target are a product, not a measurement: steps to the target (`benchmarks.to_target`: a small network on
the digits, in the same run) times the seconds of a step here. Where `ddp` becomes the better one is told by straight
lines: a step's time, less its bytes, is what it takes on any link of this delay.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.hosts import Hosts, available
from benchmarks.launch import Ranks
from benchmarks.rank import say
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.rivals import PERIOD, POST_LOCAL, SIGNS, VARIANTS, built
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.to_target import LR, TARGET, steps_to_target
from benchmarks.work import Digits, Work, loaders
from lightning_async import LazySignStrategy

N = 4
WARM, SETTLE, FEW = 3, 1, 3
LESS, MUCH_LESS, SLOWER = 30.0, 3.0, 1.25
DELAY, FAST = 0.005, 1000.0
"""Seconds from host to host, on links below so many Mbit/s."""
LONG, SLOW = 30.0, 2.0
"""Seconds for the bytes of a step that are not waited for; beyond which few steps are measured."""
AWAITED = 300.0
PRODUCT = "s to target (product)"
ROLES = {"none": Role.CONTROL, **{name: Role.OTHER for name in VARIANTS if name.startswith(("ddp", "post"))}}
SHARES = {"ddp": 1.0, "ddp, bf16": 0.5, POST_LOCAL: 1 / PERIOD, "none": 0.0, "ddp, signs": 1 / 30, "lazy_sign": 1 / 30}
"""Of a ring all-reduce's bytes, about; all others send less."""
IN_ROUNDS = (POST_LOCAL, "lazy_sign, periodic", "lazy_sign, accumulate")
"""Do not do the same at every step: a whole period is measured."""


@dataclass(frozen=True)
class Setting:
    """A model and links."""

    width: int
    layers: int
    mbits: tuple[float, ...]
    variants: tuple[str, ...] = VARIANTS
    limit: float = 600.0

    def work(self, steps: int) -> Work:
        """What a rank trains."""
        return Work(N * (WARM + SETTLE + steps + 1), width=self.width, layers=self.layers, step=0.0)

    def sizes(self) -> dict[str, int]:
        """Numbers of each tensor of the model."""
        with torch.device("meta"):
            return {name: p.numel() for name, p in self.work(1).model().named_parameters()}

    def ring(self) -> float:
        """Bytes that a rank sends in a ring all-reduce of fp32, without headers."""
        return 2 * (N - 1) / N * 4 * sum(self.sizes().values())

    def expected(self, variant: str, mbit: float) -> float:
        """Seconds for which the bytes of a step occupy a link, about."""
        return SHARES.get(variant, 1 / 60) * self.ring() * 8e-6 / mbit

    def steps(self, variant: str, mbit: float) -> int:
        """How many are measured."""
        return FEW if variant not in IN_ROUNDS and self.expected(variant, mbit) > SLOW else PERIOD


def setting(quick: bool) -> Setting:
    """About a million weights, or 25 million."""
    if quick:
        kept = tuple(name for name in VARIANTS if name not in ("ddp, PowerSGD 1", "ddp, PowerSGD 4"))
        return Setting(512, 5, (50.0,), kept)
    return Setting(2048, 7, (1000.0, 200.0, 100.0, 10.0))


# -- on a host --------------------------------------------------------------------------------------------------------


class Meter(Callback):
    """Waits behind the warm-up until the links are slow; then tells seconds and bytes of the steps that count."""

    def __init__(self, steps: int, slow: Path) -> None:
        self._end, self._slow = WARM + SETTLE + steps, slow
        self._steps, self._batches = steps, 0
        self._begun = (0.0, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over."""
        self._batches += 1
        if self._batches == WARM:
            say("warm")
            _wait_for(self._slow)
        if self._batches == WARM + SETTLE:
            self._begun = (time.monotonic(), sent())
        if self._batches == self._end:
            seconds, nbytes = time.monotonic() - self._begun[0], sent() - self._begun[1]
            say(json.dumps({"step": seconds / self._steps, "bytes": nbytes / self._steps}))
            say("measured")


def _wait_for(file: Path) -> None:
    end = time.monotonic() + AWAITED
    while not file.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"the links did not become slow within {AWAITED:g} s")
        time.sleep(0.01)  # between looks, up to the limit


def sent() -> int:
    """Bytes that have left this host."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    counters = {line.partition(":")[0].strip(): line.partition(":")[2].split() for line in lines[2:]}
    return int(counters["eth0"][8]) if "eth0" in counters else 0


def train(work: dict[str, Any], variant: str, steps: int, slow: str) -> None:
    """Train on this rank; the launcher ends it when all have measured."""
    job = Work.read(work)
    strategy, callbacks = built(variant, start=WARM - 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[Meter(steps, Path(slow)), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Digits(job), loaders(job)[0])


# -- the launcher -----------------------------------------------------------------------------------------------------


def run(quick: bool, link: float | None = None) -> Table:
    """All variants on all links, or on one of so many Mbit/s."""
    if (reason := available()) is not None:
        raise SystemExit(f"lazy_links cannot run here: {reason}")
    if link is not None and not link > 0:
        raise ValueError(f"`link` must be above 0 Mbit/s, got {link}")
    chosen = setting(quick)
    rows: list[Row] = []
    claims: list[Claim] = []
    notes = [_trip(mbit) for mbit in ([link] if link else chosen.mbits)]
    targets = steps_to_target(chosen.variants, N)
    for mbit in [link] if link else chosen.mbits:
        kept = [variant for variant in chosen.variants if chosen.expected(variant, mbit) < LONG]
        turns = repeat({variant: partial(_measure, chosen, variant, mbit) for variant in kept}, 1)
        rows += [_row(turns, name, mbit, targets) for name in kept]
        rows += [_left_out(chosen, name, mbit, targets) for name in chosen.variants if name not in kept]
        rows.append(Row(f"{mbit:g} Mbit/s: bytes of lazy_sign", Role.LIMIT, {"s a step": _bound(turns, mbit)}))
        claims += _claims(turns, mbit, chosen.ring(), quick)
        if "ddp" in kept:
            notes += [crossing(turns, name, mbit, targets) for name in SIGNS]
    weights = sum(chosen.sizes().values())
    title = f"{N} hosts, {weights / 1e6:.3g} M weights: a step and what it sends, and seconds to loss {TARGET:g}"
    return Table(title, rows, claims, [*NOTES, _whole(chosen.sizes()), *notes])


def _measure(chosen: Setting, variant: str, mbit: float) -> Measures:
    steps = chosen.steps(variant, mbit)
    with tempfile.TemporaryDirectory() as folder:
        slow = Path(folder, "slow")
        arguments = {"work": chosen.work(steps).arguments(None)["work"], "variant": variant}
        arguments |= {"steps": steps, "slow": str(slow)}
        with (
            Hosts(N, delay=_delay(mbit)) as hosts,
            Ranks(train, N, arguments=arguments, address=hosts.address(0), spawn=hosts.spawn) as ranks,
        ):
            for rank in range(N):
                ranks.wait_for(rank, "warm", timeout=AWAITED)
            hosts.shape(mbit)
            slow.touch()
            for rank in range(N):
                ranks.wait_for(rank, "measured", timeout=chosen.limit)
            records = [json.loads(ranks.heard(rank)[-2]) for rank in range(N)]
    return {"step": fmean(r["step"] for r in records), "bytes": fmean(r["bytes"] for r in records)}


def _delay(mbit: float) -> float:
    return DELAY if mbit < FAST else 0.0


ECHO = """
import socket
server = socket.create_server(("", 7))
while True:
    link, _ = server.accept()
    while word := link.recv(1):
        link.sendall(word)
"""
TRIPS = """
import socket, sys, time
end = time.monotonic() + 30
while True:
    try:
        link = socket.create_connection((sys.argv[1], 7), timeout=10)
        break
    except ConnectionRefusedError:
        assert time.monotonic() < end
        time.sleep(0.01)  # between tries, up to the end above
for _ in range(30):
    start = time.monotonic()
    link.sendall(b"x")
    link.recv(1)
    print(1000 * (time.monotonic() - start))
"""


def _trip(mbit: float) -> str:
    """What a byte takes there and back, in a sentence."""
    with tempfile.TemporaryFile() as log, Hosts(2, mbit=mbit, delay=_delay(mbit)) as hosts:
        hosts.run(1, [sys.executable, "-c", ECHO])
        if hosts.run(0, [sys.executable, "-c", TRIPS, hosts.address(1)], output=log).wait(60):
            raise RuntimeError("no byte came back")
        log.seek(0)
        trips = [float(line) for line in log.read().split()]
    asked = f"{2000 * _delay(mbit):g} ms were asked for" if _delay(mbit) else "without delay"
    return f"{mbit:g} Mbit/s: a byte is there and back in {median(trips):.1f} ms on an idle link, {asked}"


# -- the table --------------------------------------------------------------------------------------------------------


def _bound(turns: Turns, mbit: float, name: str = "lazy_sign") -> float:
    """What a step with these bytes cannot be shorter than."""
    compute = turns.of("none", "step").median
    return compute if name == "none" else max(compute, _travel(turns, name, mbit) + 2 * _delay(mbit))


def _travel(turns: Turns, name: str, mbit: float) -> float:
    """Seconds for which a link of this rate is busy with the bytes of a step."""
    return turns.of(name, "bytes").median * 8e-6 / mbit


def crossing(turns: Turns, name: str, mbit: float, targets: Mapping[str, float]) -> str:
    """From which rate on `ddp` has the shorter step, and is sooner at the target, at the delay of this link."""
    own = {v: max(0.0, turns.of(v, "step").median - _travel(turns, v, mbit)) for v in ("ddp", name)}
    size = {v: turns.of(v, "bytes").median * 8e-6 for v in ("ddp", name)}
    step = _meet((size["ddp"], own["ddp"]), (size[name], own[name]))
    found = f"{mbit:g} Mbit/s, {name}: {_from(step, 'has the shorter step')}"
    if max(targets["ddp"], targets[name]) < float("inf"):
        mine, theirs = targets[name], targets["ddp"]
        product = _meet((theirs * size["ddp"], theirs * own["ddp"]), (mine * size[name], mine * own[name]))
        found += f", {_from(product, 'is sooner at the target')}"
    return found


def _meet(ddp: tuple[float, float], mine: tuple[float, float]) -> float:
    """The rate from which on `size / rate + own` is the less for `ddp`; infinite: from none on, 0: at every rate."""
    size, own = ddp[0] - mine[0], mine[1] - ddp[1]
    if own <= 0:
        return float("inf") if size >= 0 else 0.0
    return max(0.0, size / own)


def _from(rate: float, what: str) -> str:
    if rate == float("inf"):
        return f"ddp {what} at no rate"
    return f"ddp {what} from about {rate:.0f} Mbit/s on" if rate else f"ddp {what} at every rate"


def _row(turns: Turns, name: str, mbit: float, targets: Mapping[str, float]) -> Row:
    step, nbytes = turns.of(name, "step").median, turns.of(name, "bytes").median
    cells: dict[str, Cell] = {
        "s a step": step,
        "kB a step": nbytes / 1000,
        "fewer bytes than ddp": turns.of("ddp", "bytes").median / max(1.0, nbytes) if "ddp" in turns.measures else None,
        "step / ddp": step / turns.of("ddp", "step").median if "ddp" in turns.measures else None,
        "step / bound": step / _bound(turns, mbit, name),
        **_product(targets[name], step),
    }
    return Row(f"{mbit:g} Mbit/s: {name}", ROLES.get(name, Role.RESULT), cells)


def _product(steps: float, step: float) -> dict[str, Cell]:
    if steps == float("inf"):
        return {"steps to target": "never", PRODUCT: "never"}
    return {"steps to target": round(steps), PRODUCT: steps * step}


def _left_out(chosen: Setting, name: str, mbit: float, targets: Mapping[str, float]) -> Row:
    """Who would take too long: the time of its bytes alone."""
    step = chosen.expected(name, mbit)
    cells: dict[str, Cell] = {"s a step": f"> {step:.0f}"}
    product = _product(targets[name], step)
    cells |= {
        key: f"> {cell:.0f}" if key == PRODUCT and isinstance(cell, float) else cell for key, cell in product.items()
    }
    return Row(f"{mbit:g} Mbit/s: {name}, not run", ROLES.get(name, Role.RESULT), cells)


def _claims(turns: Turns, mbit: float, ring: float, quick: bool) -> list[Claim]:
    at = f"{mbit:g} Mbit/s: "
    signs = turns.of("lazy_sign", "bytes").median
    fewer, by = ring / signs, "a ring all-reduce by arithmetic"
    if "ddp" in turns.measures:
        fewer, by = turns.of("ddp", "bytes").median / signs, "ddp"
    lazier = signs / turns.of("lazy_sign, periodic", "bytes").median
    close = turns.of("lazy_sign", "step").median / _bound(turns, mbit)
    claims = [
        Claim(f"{at}signs send at least {LESS:g}x fewer bytes than {by}: {fewer:.1f}", fewer >= LESS),
        Claim(f"{at}one round in four, {MUCH_LESS:g}x fewer again: {lazier:.2f}", lazier >= MUCH_LESS),
    ]
    bound = Claim(f"{at}a step is within {SLOWER:g}x of its bound: {close:.2f}", close <= SLOWER)
    return claims if quick else [*claims, bound]


def _whole(sizes: Mapping[str, int]) -> str:
    """Which tensors travel uncompressed, in a sentence."""
    least = inspect.signature(LazySignStrategy).parameters["min_size"].default
    whole = [f"{name} ({size})" for name, size in sizes.items() if size < least]
    return f"uncompressed with signs, having fewer than {least} numbers: {', '.join(whole) or 'none'}"


NOTES: Sequence[str] = (
    f"to target: a product of steps (measured: a small network, digits, 4 ranks, lr {LR:g}) and this link's s a step.",
    "A delay is made by a process that holds each frame (few kernels have netem); it takes processor time as well.",
    "not run: the bytes alone would take so long.",
)
