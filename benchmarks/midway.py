"""A rank that is frozen or killed in the middle of a message: it does it to itself, where the message is half sent.

    launcher   writes the signal's number into the rank's file `midway`
    rank       begins to send a piece of a long message | finds the number, signals itself | (header of the piece)

A signal from outside falls where it falls. This one falls when the piece is on its way and the header that tells of it
is not: the peer's receive stands, part of the body lies in buffers of the network or in the memory they share, and the
rest comes never, or only when the rank goes on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from benchmarks.launch import MIDWAY
from benchmarks.rank import FOLDER, say
from lightning_async.transport.gloo import Connection, Pending, Standing
from lightning_async.transport.shared import BODY_TAG, share


class Struck:
    """A connection of a link that looks, in the middle of each long message, whether the rank is to end there.

    Args:
        wire: The connection.
        order: Where the launcher writes the signal's number.
    """

    def __init__(self, wire: Connection, order: Path) -> None:
        self._wire, self._order = wire, order

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send; a piece of a long message may be the last that this rank does for a while."""
        work = self._wire.send(tensor, tag)
        if tag == BODY_TAG and self._order.exists():
            number = int(self._order.read_text(encoding="ascii"))
            self._order.unlink()
            say(MIDWAY)
            os.kill(os.getpid(), signal.Signals(number))
        return work

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """As the connection does."""
        return self._wire.receive(tensor, tag)

    def stand(self, buffer: Tensor, tag: int) -> Standing:
        """As the connection does."""
        return self._wire.stand(buffer, tag)

    def cancel(self) -> None:
        """As the connection does."""
        self._wire.cancel()


def obey() -> None:
    """From now on all links of this rank look for the launcher's word; to be called before there is any."""
    order = Path(os.environ[FOLDER], f"{os.environ['RANK']}.{MIDWAY}")
    patch("lightning_async.transport.link.share", lambda *wire, **knobs: Struck(share(*wire, **knobs), order)).start()
