"""A real run of several processes equals its replay in one process, to the bit; here the replay is written by hand.

(`lightning-async replay` does it with the run's own Trainer and strategy: tests/cli/test_replay.py.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_async import SpeedFaults
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import Mode, gossip
from lightning_async.replica import Replica
from lightning_async.transport.replay import ReplayCarrier, replay
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.stage import Program
from tests.strategies.lit import loader, trainer, weights
from tests.strategies.ranks import run

EPOCHS, BATCH = 2, 4


class Net(L.LightningModule):
    """Deterministic, and without buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(batch[1]) - batch[2]).square().mean()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[1])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def _real(n: int, mode: str, wire: str, folder: str) -> list[float]:
    torch.manual_seed(11)
    net = Net()
    faults = SpeedFaults(step_seconds=0.004, slow={n - 1: 3.0})
    knobs = {"mode": mode, "wire": wire, "record": folder}
    t = trainer(n, knobs=knobs, callbacks=[faults], max_epochs=EPOCHS)
    t.fit(net, loader(BATCH))
    t.predict(net, loader(BATCH, shuffle=False))  # a later stage leaves the log as it is
    return weights(net)


def _again(n: int, mode: Mode, wire: str) -> Any:
    """What each member did, as a program on a replaying carrier."""

    def program(carrier: ReplayCarrier) -> Program:
        torch.manual_seed(11)
        net = Net()
        replica, rounds = Replica(net.parameters()), Rounds(carrier, channel=1)
        optimizer = net.configure_optimizers()
        algorithm = gossip(mode, wire=wire)
        data = loader().dataset
        algorithm.begin(replica, carrier, UNIT * BATCH, rounds)
        step = 0
        for epoch, batches in enumerate(carrier.epochs()):
            for samples in batches:
                step += 1
                optimizer.zero_grad()
                net.training_step(default_collate([data[i] for i in samples]), 0).backward()
                yield from algorithm.before_step(replica, carrier, step)
                optimizer.step()
                carrier.note_batch()
                carrier.at(step)
                yield from algorithm.after_step(replica, carrier, step)
            carrier.note_meeting()
            replica.stand_in((yield from algorithm.meet(replica, carrier)))
            replica.stay()
            if epoch + 1 < EPOCHS:
                algorithm.resume(replica, adopted=True)
        return weights(net)

    return program


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "mode", "wire"), [(2, "pairwise", "fp32"), (3, "pairwise", "bf16"), (3, "push_sum", "fp32")]
)
def test_a_real_run_equals_its_replay_to_the_bit(n: int, mode: Mode, wire: str, tmp_path: Path) -> None:
    ended = run(n, _real, n, mode, wire, str(tmp_path))
    logs = {r: (tmp_path / f"rank{r}.jsonl").read_text().splitlines() for r in range(n)}
    replayed = replay(logs, {r: _again(n, mode, wire) for r in range(n)})
    for r in range(n):
        assert replayed[r] == ended[r]
