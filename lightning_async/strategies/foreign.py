"""A `ckpt_path` that is no checkpoint of Lightning's is refused by a sentence, before anything is restored from it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

NEEDED = ("pytorch-lightning_version", "state_dict")
"""What every checkpoint of Lightning has, one of weights alone too."""
UNREADABLE = (KeyError, IndexError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError)
"""How reading ends where the bytes are something else. A file that is not there, or a class in it, says so itself."""
SHOWN = 5


def read(load: Callable[[], dict[str, Any]], path: Any, name: str) -> dict[str, Any]:
    """The checkpoint that `load` reads from `path`; raises for what is none."""
    try:
        checkpoint = load()
    except UNREADABLE as error:
        if "weights_only" in str(error):  # torch refuses a class in it, and says what to do
            raise
        raise _refusal(path, name, f"it cannot be read ({type(error).__name__}: {error})") from error
    if why := _lacks(checkpoint):
        raise _refusal(path, name, why)
    return checkpoint


def _lacks(checkpoint: object) -> str:
    if not isinstance(checkpoint, Mapping):
        return f"it holds a {type(checkpoint).__name__}, not a dictionary"
    missing = [repr(key) for key in NEEDED if key not in checkpoint]
    if not missing:
        return ""
    keys = list(map(repr, checkpoint))
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"it has no {' and no '.join(missing)}, but {', '.join(keys[:SHOWN]) or 'nothing'}{more}"


def _refusal(path: Any, name: str, why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"strategy={name!r}: ckpt_path={os.fspath(path)!r} is no checkpoint that Lightning saved: {why}. A run goes on "
        "from such checkpoints only; to begin with weights alone, leave `ckpt_path` out and load them before `fit`, "
        "with `load_state_dict` (or `load_from_checkpoint` from a file that Lightning saved)"
    )
