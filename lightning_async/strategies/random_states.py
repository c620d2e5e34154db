"""The random states of this process as tensors and numbers: python's, numpy's, torch's, and that of its CUDA device.

A resumed rank draws the numbers that it would have drawn. They are put back last of all, right before the first batch:
whatever is set up draws some too.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The states that training draws from, for a rank on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """All states as they are now."""
        version, words, gauss = random.getstate()
        state = {"python": (version, torch.tensor(words), gauss), "numpy": _numpy(), "torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw on from `state`; a CUDA state is passed over where there is no such device."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self._device)


def _numpy() -> tuple[str, torch.Tensor, int, int, float]:
    """The state of numpy's global generator."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)
