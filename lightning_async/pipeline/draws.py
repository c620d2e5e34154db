"""Random numbers that depend on what is done, not on who does it: the first and the last stage draw the same.

Before a batch all generators are set from (seed, batch, place). What runs before the call of the pipelined module is
place 0, on whichever stage it runs; the blocks of stage s are place s + 1; between two batches it is `BETWEEN`. An
iterator over the data is made at `ITERATOR`, and each batch is fetched at `FETCH`, whatever hooks drew before.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

BEFORE_THE_CALL = 0
BETWEEN = -1
ITERATOR = -2
FETCH = -3


def reseed(seed: int, batch: int, place: int) -> None:
    """Set the generators of python, numpy and torch."""
    words = f"{seed} {batch} {place}".encode()
    number = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)  # `torch.manual_seed` takes a stack trace for devices that are not used
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)
