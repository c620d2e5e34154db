"""What ranks run in the tests of the harness. Nothing is imported that a job does not need: they begin in no time."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.rank import say


def environment(*, more: int) -> dict[str, Any]:
    return {"rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"]), "more": more}


def places() -> list[str]:
    return [os.environ[name] for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]


def fails_on_1() -> str:
    if os.environ["RANK"] == "1":
        raise OSError("no more paper")
    return "fine"


def counts_for_ever() -> None:
    say("begun")
    number = 0
    while True:
        time.sleep(0.01)
        number += 1
        say(str(number))


def counts_in_the_store() -> None:
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    while True:
        say(str(store.add(os.environ["RANK"], 1)))
        time.sleep(0.01)


def average() -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mine = torch.tensor([float(os.environ["GROUP_RANK"])])
    dist.all_reduce(mine)
    dist.destroy_process_group()
    return mine.item() / 2


def sends_for_ever() -> None:
    """On rank 0; it says a number behind each piece. Rank 1 sends headers only."""
    import torch

    from benchmarks import midway
    from lightning_async.transport import link
    from lightning_async.transport.shared import BODY_TAG

    midway.share = lambda wire: wire  # type: ignore[assignment]
    midway.obey()
    wire = link.share(_Nowhere())  # type: ignore[arg-type, call-arg]
    say("begun")
    for number in range(1 << 30):
        wire.send(torch.zeros(1), BODY_TAG if os.environ["RANK"] == "0" else BODY_TAG + 1)
        say(str(number))
        time.sleep(0.01)


class _Nowhere:
    def send(self, tensor: Any, tag: int) -> None:
        say("on its way")
