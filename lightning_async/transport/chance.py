"""Chance is the state of the process's random generators: taken, put back, and written as text for a log.

    torch     dropout, initial weights, shuffling          numpy, python     augmentation in many data sets
    cuda      the same as torch, on a device of that kind; passed over where there is none

A program is repeated to the bit only if its draws are. Taken, these are tensors and numbers, so that a checkpoint can
hold them; they are states of generators, not weights: a few kilobytes.
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


def taken(device: torch.device | None = None) -> Chance:
    """The generators as they are now; with a CUDA device, its own too."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    chance = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *_numbers(*rest)),
        "python": (version, torch.tensor(words), gauss),
    }
    if device is not None and device.type == "cuda":
        chance["cuda"] = torch.cuda.get_rng_state(device)
    return chance


def put_back(chance: Chance, device: torch.device | None = None) -> None:
    """Let the generators go on from here; one that is not named stays as it is."""
    if "torch" in chance:
        torch.set_rng_state(chance["torch"].cpu())
    if "numpy" in chance:
        kind, keys, *rest = chance["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "python" in chance:
        version, words, gauss = chance["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in chance and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(chance["cuda"].cpu(), device)


def write(chance: Chance) -> dict[str, str]:
    """As text, each generator of the process for itself."""
    kind, keys, *rest = chance["numpy"]
    version, words, gauss = chance["python"]
    return {
        "torch": _pack(chance["torch"].numpy().tobytes()),
        "numpy": _pack(json.dumps([kind, keys.tolist(), *rest]).encode()),
        "python": _pack(json.dumps([version, words.tolist(), gauss]).encode()),
    }


def read(text: dict[str, str]) -> Chance:
    """The generators that were written."""
    raw = {name: zlib.decompress(base64.b64decode(packed)) for name, packed in text.items()}
    chance: Chance = {}
    if "torch" in raw:
        chance["torch"] = torch.frombuffer(bytearray(raw["torch"]), dtype=torch.uint8)
    for name in ("numpy", "python"):
        if name in raw:
            first, words, *rest = json.loads(raw[name])
            chance[name] = (first, torch.tensor(words), *rest)
    return chance


def packed(generator: torch.Generator | None = None) -> str:
    """One generator of torch's as text; the process's own without one."""
    return _pack((generator or torch.default_generator).get_state().numpy().tobytes())


def unpacked(text: str) -> torch.Tensor:
    """The state that was written."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8)


def _numbers(position: Any, has_gauss: Any, gauss: Any) -> tuple[int, int, float]:
    return int(position), int(has_gauss), float(gauss)


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()
