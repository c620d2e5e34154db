"""Who steps as far whatever all its gradients are multiplied by: Adam divides each by its own size, Lion takes signs.

A factor on the gradients is lost on these; it has to go on their learning rate. They are told by their names, so that
those of other packages are known without being imported.
"""

from __future__ import annotations

from torch.optim import Optimizer

FAMILIES = (
    "Adam",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "RMSprop",
    "Rprop",
    "Lion",
    "LAMB",
    "Lamb",
    "Muon",
    "SignSGD",
)
"""What is in the name of its class, or of one that this is made from: SparseAdam, AdamW8bit and FusedLAMB too."""


def sees_no_factor(optimizer: Optimizer) -> bool:
    """Whether a factor on all gradients changes nothing of its steps; of a wrapper, of what it wraps."""
    bare = getattr(optimizer, "optimizer", optimizer)
    return any(family in kind.__name__ for kind in type(bare).__mro__ for family in FAMILIES)
