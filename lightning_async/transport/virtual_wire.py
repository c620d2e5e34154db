"""The wires of a virtual cluster: bandwidth, latency, cuts, and buffers that are used again.

    post -> [ uplink of the sender: one bulk after the other ] -> latency -> inbox     (in order on each link)
    folded -> latency -> slot free                                                      (passes the bulk)

A body of at most `SMALL` bytes passes the bulk too, but not what was posted before it on its own link. A transfer that
left its sender arrives also if the sender is killed meanwhile; one that is still in the uplink does not. What meets a
cut is held back there and passes at the moment the cut heals.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lightning_async.transport.mail import Message
from lightning_async.transport.virtual_clock import VirtualClock
from lightning_async.transport.virtual_health import Health

HEADER_BYTES = 128
SMALL = 1024


class Packet:
    """One message on its way, and the answer that it was folded."""

    __slots__ = ("clock", "departs", "message", "number", "receiver", "sender")

    def __init__(self, sender: int, receiver: int, number: int, message: Message, clock: float) -> None:
        self.sender = sender
        self.receiver = receiver
        self.number = number
        self.message = message
        self.clock = clock
        self.departs = 0.0


class Link:
    """What a sender knows of one of its links."""

    __slots__ = ("arrival", "clock", "departs", "number", "out", "step")

    def __init__(self, clock: float) -> None:
        self.number = 0
        self.out: dict[int, Packet] = {}
        self.step = 0
        self.clock = clock
        self.arrival = 0.0
        self.departs = 0.0

    def follow(self, when: float) -> float:
        """Arrive at this time, or right behind what was sent before."""
        self.arrival = when if when > self.arrival else math.nextafter(self.arrival, math.inf)
        return self.arrival


class End(Protocol):
    """Where wires end: a member's carrier."""

    def receive(self, packet: Packet) -> None:
        """A message arrived."""

    def acknowledged(self, packet: Packet, step: int, clock: float) -> None:
        """A message of this member was folded when the receiver was at this step and clock."""


class Pool:
    """Buffers for bodies: a world of a thousand members posts without asking for memory."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device, int], list[Tensor]] = {}

    def copy(self, body: Tensor) -> Tensor:
        """A copy of `body` in a buffer that nobody else has."""
        free = self._free.get((body.dtype, body.device, body.numel()))
        if free:
            buffer = free.pop()
        else:
            with torch.inference_mode(False):
                buffer = torch.empty(body.numel(), dtype=body.dtype, device=body.device)
        return buffer.copy_(body.detach())

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; it is spoilt at once, so that whoever still reads a folded body finds out."""
        if buffer.is_floating_point():
            buffer.fill_(math.nan)
        self._free.setdefault((buffer.dtype, buffer.device, buffer.numel()), []).append(buffer)


class Wire:
    """Carries packets and their acknowledgements between the ends."""

    def __init__(
        self, clock: VirtualClock, health: Health, *, bandwidth: float | None, latency: float, jitter: float
    ) -> None:
        self._clock = clock
        self._health = health
        self._per_byte = 0.0 if bandwidth is None else 1.0 / bandwidth
        self._latency = latency
        self._jitter = jitter
        self._uplinks: dict[int, float] = {}
        self._held: list[tuple[Packet, int, float]] = []
        self.ends: list[End] = []
        self.pool = Pool()

    def lag(self) -> float:
        """Seconds that something small is under way."""
        return self._latency * (1.0 + self._jitter * self._clock.random.random())

    def send(self, link: Link, packet: Packet) -> None:
        """Put a packet on the wire; on one link, it arrives after all that was sent before."""
        body = packet.message.body
        size = 0 if body is None else body.numel() * body.element_size()
        departs = self._leave(packet.sender, size)
        packet.departs = link.departs = max(departs, link.departs)
        self._clock.at(link.follow(departs + self.lag()), self._arrive, packet)

    def acknowledge(self, packet: Packet, step: int, clock: float) -> None:
        """Tell the sender of a packet that it was folded."""
        self._clock.at(self._clock.time + self.lag(), self._confirm, packet, step, clock)

    def release(self) -> None:
        """Let pass what was held back by a cut that is no more; in the order in which it met the cut."""
        held, self._held = self._held, []
        for packet, step, clock in held:
            if step < 0:
                self._arrive(packet)
            else:
                self._confirm(packet, step, clock)

    def _leave(self, sender: int, size: int) -> float:
        seconds = (size + HEADER_BYTES) * self._per_byte
        now = self._clock.time
        if size <= SMALL:
            return now + seconds
        departs = max(now, self._uplinks.get(sender, 0.0)) + seconds
        self._uplinks[sender] = departs
        return departs

    def _arrive(self, packet: Packet) -> None:
        sender, receiver = packet.sender, packet.receiver
        killed = self._health.killed
        if sender in killed and killed[sender] < packet.departs:
            return
        if self._health.is_cut(sender, receiver):
            self._held.append((packet, -1, 0.0))
            return
        self.ends[receiver].receive(packet)

    def _confirm(self, packet: Packet, step: int, clock: float) -> None:
        if self._health.is_cut(packet.sender, packet.receiver):
            self._held.append((packet, step, clock))
            return
        self.ends[packet.sender].acknowledged(packet, step, clock)
