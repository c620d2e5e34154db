"""Cables that take time: what goes in at one end comes out at the other so many seconds later, in its order.

    host i [eth0] ---- a frame is read, held for half of the delay, and written ---- [p<i>] bridge

    python benchmarks/delay_line.py CABLES SECONDS

`Hosts(..., delay=...)` starts it, since few kernels have netem. Both ends are TAP devices, made in the namespace it
runs in; from there an end may be moved to another. Frames pass as the kernel has them, up to 64 kB and unchanged, so
few of them are read. It says "ready", ends with its standard input, and its devices end with it. It goes before
all others on a busy machine, as a cable does not wait for a host's compute.
"""

from __future__ import annotations

import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

SET_NAME, SET_OFFLOAD = 0x400454CA, 0x400454D0  # TUNSETIFF, TUNSETOFFLOAD
TAP_WITH_HEADER = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
UNCUT = 1 | 2 | 4  # checksums and segments are left to who reads them: TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
LARGEST = 70_000
AT_ONCE = 64  # frames of one end, before the others have their turn
LOOK = 0.5


def end_of(name: str) -> int:
    """A new TAP device."""
    import fcntl

    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, SET_NAME, struct.pack("16sH22x", name.encode("ascii"), TAP_WITH_HEADER))
    fcntl.ioctl(end, SET_OFFLOAD, UNCUT)
    return end


def carry(cables: int, seconds: float) -> None:
    """Make so many cables, `h<i>` to `p<i>`, and carry frames until standard input ends."""
    pairs = [(end_of(f"h{i}"), end_of(f"p{i}")) for i in range(cables)]
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    print("ready", flush=True)
    held: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else LOOK
        ready, _, _ = select.select([*other, 0], [], [], wait)
        if 0 in ready and not os.read(0, 1):
            return
        for end in ready:
            for _ in range(AT_ONCE if end else 0):
                try:
                    frame = os.read(end, LARGEST)
                except OSError:  # no more of them, or the device is down
                    break
                held.append((time.monotonic() + seconds, other[end], frame))
        while held and held[0][0] <= time.monotonic():
            _, to, frame = held.popleft()
            with suppress(OSError):  # a cable that is pulled out
                os.write(to, frame)


if __name__ == "__main__":
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    carry(int(sys.argv[1]), float(sys.argv[2]))
