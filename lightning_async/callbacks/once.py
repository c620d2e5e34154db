"""A callback that counts, or makes faults, stands once among the Trainer's: two of them would each do all of it."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer


def stands_once(trainer: Trainer, callback: Callback, otherwise: str) -> None:
    """Refuse a second one of the same class; `otherwise` says what the two would do."""
    alike = [one for one in vars(trainer)["callbacks"] if type(one) is type(callback)]
    if len(alike) > 1:
        raise MisconfigurationException(
            f"{type(callback).__name__} stands {len(alike)} times among the callbacks: {otherwise}; leave one "
            "(config files append, so perhaps two of them name it)"
        )
