"""Chance is the state of the process's random generators: taken, put back, and written as text for a log.

    torch     dropout, initial weights, shuffling          numpy, python     augmentation in many data sets

A program is repeated to the bit only if its draws are. These are states of generators, not weights: a few kilobytes.
"""

from __future__ import annotations

import base64
import json
import random
import zlib
from typing import Any

import numpy as np
import torch

Chance = dict[str, Any]
"""The state of each generator, by name."""


def taken() -> Chance:
    """The generators as they are now."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}


def put_back(chance: Chance) -> None:
    """Let the generators go on from here; one that is not named stays as it is."""
    if "torch" in chance:
        torch.set_rng_state(chance["torch"])
    if "numpy" in chance:
        np.random.set_state(chance["numpy"])
    if "python" in chance:
        random.setstate(chance["python"])


def write(chance: Chance) -> dict[str, str]:
    """As text, each generator for itself."""
    numpy = {**chance["numpy"], "state": {**chance["numpy"]["state"], "key": chance["numpy"]["state"]["key"].tolist()}}
    return {
        "torch": _pack(chance["torch"].numpy().tobytes()),
        "numpy": _pack(json.dumps(numpy).encode()),
        "python": _pack(json.dumps(chance["python"]).encode()),
    }


def read(text: dict[str, str]) -> Chance:
    """The generators that were written."""
    raw = {name: zlib.decompress(base64.b64decode(packed)) for name, packed in text.items()}
    chance: Chance = {}
    if "torch" in raw:
        chance["torch"] = torch.tensor(list(raw["torch"]), dtype=torch.uint8)
    if "numpy" in raw:
        chance["numpy"] = json.loads(raw["numpy"])
        state = chance["numpy"]["state"]
        state["key"] = np.array(state["key"], dtype=np.uint32)
    if "python" in raw:
        version, words, gauss = json.loads(raw["python"])
        chance["python"] = (version, tuple(words), gauss)
    return chance


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()
