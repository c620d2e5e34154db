"""The few parts of torch.distributed that the carrier stands on, with types: a wire between two, and a store of keys.

torch's own stubs lack `clone`, `send` and `recv` of these classes, and say `str` where bytes go through unharmed; so
all that is not typed is said here, once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

T = TypeVar("T")
CONNECTED = timedelta(days=20)
"""How long a client that has reached the store waits for its answers; torch counts that in milliseconds of 32 bits."""
CANCEL_TAG = 0
"""Nothing is ever sent under it."""
_record: Callable[[bool], None] = cast(Any, torch.autograd)._enable_record_function


class Keys(Protocol):
    """A store client as it really is. One client is one socket and one mutex: each thread has its own clone."""

    def clone(self) -> Keys:
        """Another client, with a socket of its own."""

    def set_timeout(self, timeout: timedelta, /) -> None:
        """The longest that `get` and `multi_get` wait for an answer, also of a host that is frozen."""

    def set(self, key: str, value: bytes, /) -> None:
        """Write; not acknowledged."""

    def get(self, key: str, /) -> bytes:
        """Read; waits for a missing key."""

    def multi_get(self, keys: Sequence[str], /) -> list[bytes]:
        """Read many; waits for missing ones."""

    def check(self, keys: Sequence[str], /) -> bool:
        """Whether all are there; never waits."""

    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes:
        """Write if the value is the expected one (b"": also if there is none); the value then."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter; its new value."""

    def delete_key(self, key: str, /) -> bool:
        """Take a key away; whether it was there."""


def keys_of(store: Store, prefix: str) -> Keys:
    """A view of `store` in which every key begins with `prefix`."""
    return cast(Keys, PrefixStore(prefix, store))


def reached(connect: Callable[[], T], where: str, *, seconds: float) -> T:
    """What `connect` makes of a store, or its error; a sentence if that takes longer.

    torch bounds the way to a store and not its first answer, for which it waits without end where the host is frozen:
    the system takes connections for it all the same. So that happens in a thread that nobody has to wait for.
    """
    made: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
    threading.Thread(target=lambda: made.put(_tried(connect)), name="reaching", daemon=True).start()
    try:
        return made.get(timeout=min(seconds, threading.TIMEOUT_MAX))()  # `seconds` may be endless
    except queue.Empty:
        raise TimeoutError(
            f"the store at {where} takes connections and has not answered for {seconds:.0f} s: the process that hosts "
            "it, rank 0 or torchrun's agent, is frozen or very busy. Look at its output and its host"
        ) from None


def _tried(connect: Callable[[], T]) -> Callable[[], T]:
    try:
        made = connect()
    except Exception as error:
        return partial(_raised, error)
    return lambda: made


def _raised(error: Exception) -> Any:
    raise error


def client_of(keys: Keys) -> Keys:
    """A client of one's own that outlasts a host that is frozen or cut off; one that is gone is an error at once.

    The time in which a clone has to reach the store would bound its answers, too.
    """
    client = keys.clone()
    client.set_timeout(CONNECTED)
    return client


class Pending(Protocol):
    """A transfer on its way."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Until it is over; raises when the other one is gone."""


class Standing(Protocol):
    """A receive that was posted before it is known where what comes belongs."""

    def take(self, place: Tensor) -> None:
        """Put what came there, as much as that holds; waits until it is here."""


class Connection(Protocol):
    """What a link needs between its ends: order for each tag, and an error in every wait when one end is gone."""

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send; keep the work and the tensor until the peer is known to have it, then `wait`."""

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """Post a receive; a longer message than the tensor would end this process."""

    def stand(self, buffer: Tensor, tag: int) -> Standing:
        """Post a receive of at most so much as `buffer` holds, before it is known where what comes belongs."""

    def cancel(self) -> None:
        """Close the connection: every queued operation fails within milliseconds, in whatever thread waits on it."""


class Clients:
    """Store clients for those who meet in the background, each for one thread at a time, and kept for the next.

    torch looks up the name of the address behind each new socket, which takes seconds where the name service is slow:
    so clients are few, and the training thread never makes one.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._idle: deque[Keys] = deque()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Keys]:
        """A client of one's own; one that met an error is not kept."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = client_of(self._keys)
        yield client
        self._idle.append(client)


def agree(keys: Keys, where: str, *, rank: int, patient: Callable[[], bool]) -> bool:
    """Whether both go to the rendezvous now: once one of two has said "go" there, both must, and neither waits in vain.

    The rendezvous itself cannot be called off. So each says that it is here and looks for the other one while it is
    `patient()`, a call that passes a little time; then it says "go", or "no", and the first word counts for both.
    """
    keys.set(f"{where}/here/{rank}", b"here")
    other = [f"{where}/here/{1 - rank}"]
    while not (there := keys.check(other)) and patient():
        pass
    return keys.compare_set(f"{where}/word", b"", b"go" if there else b"no") == b"go"


def unrecorded(begin: Callable[..., Work], tensor: Tensor, other: int, tag: int) -> Work:
    """Begin a transfer of which no profiler of this thread hears.

    PyTorchProfiler hears of the end in the thread that waits for it, which is another one: that kills the process.
    """
    _record(False)
    try:
        return begin([tensor], other, tag)
    finally:
        _record(True)


class Stood:
    """A receive into a buffer of its own, from which what came is copied."""

    def __init__(self, buffer: Tensor, work: Pending) -> None:
        self._buffer, self._work = buffer, work

    def take(self, place: Tensor) -> None:
        """See `Standing`."""
        self._work.wait()
        place.numpy()[:] = self._buffer[: place.numel()].numpy()  # without Python's lock, and on one thread


class Wire:
    """A gloo group of two. The constructor is the rendezvous: it waits for the other one, at most `timeout` seconds."""

    def __init__(self, keys: Keys, prefix: str, *, rank: int, timeout: float, interface: str | None) -> None:
        untyped: Any = ProcessGroupGloo
        options = untyped._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [_device(interface)]
        options._threads = 1  # of collectives, of which there are none
        self._other = 1 - rank
        self._group = untyped(PrefixStore(prefix, cast(Store, keys)), rank, 2, options)
        self._group.set_timeout(timedelta(days=365))  # a slow peer is not an error

    def send(self, tensor: Tensor, tag: int) -> Work:
        """Begin to send; keep the work and the tensor until the peer is known to have it, then `wait`."""
        return unrecorded(self._group.send, tensor, self._other, tag)

    def receive(self, tensor: Tensor, tag: int) -> Work:
        """Post a receive; a longer message than the tensor would end this process."""
        return unrecorded(self._group.recv, tensor, self._other, tag)

    def stand(self, buffer: Tensor, tag: int) -> Standing:
        """Post a receive before it is known where what comes belongs."""
        return Stood(buffer, self.receive(buffer, tag))

    def cancel(self) -> None:
        """Close the connection: every queued operation fails within milliseconds, in whatever thread waits on it.

        A wait that runs out of time is the only way to this in gloo; it closes all connections of its group, hence one
        group for each link.
        """
        with contextlib.suppress(RuntimeError):
            self.receive(torch.zeros(1), CANCEL_TAG).wait(timedelta(milliseconds=1))


def has_address(interface: str) -> bool:
    """Whether links can go by this network interface."""
    try:
        ProcessGroupGloo.create_device(interface=interface)
    except RuntimeError:
        return False
    return True


def _device(interface: str | None) -> ProcessGroupGloo.Device:
    """The network device: the named interface, else the first of GLOO_SOCKET_IFNAME, else that of the host's name."""
    name = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    return ProcessGroupGloo.create_device(interface=name) if name else ProcessGroupGloo.create_default_device()
