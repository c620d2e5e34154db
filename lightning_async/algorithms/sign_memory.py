"""Signs of gradients, averaged by an optimizer's momentum m, are fed back 1 / (1 - m) times too strongly.

What a sign misses is in the next gradients, but the step that missed it goes on counting for 1 / (1 - m) steps. So
weights are lr / (1 - m) * rest away from those of exact steps, where with signs of updates they are one rest away, and
that rest is of a velocity in which the noise of many gradients has been averaged already. The same learning rate no
longer converges. Adam also takes the size of signs, the same for a whole block, for that of gradients.

It is of one optimizer's steps, and of one unit: a gradient scaler changes that, and drops steps whose signs were sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

from torch.optim import Optimizer

MOST = 0.5
"""Up to this momentum what is held back counts at most twice."""


def momentum(optimizers: Iterable[Optimizer]) -> float:
    """The largest momentum, or first beta, of all groups."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return max((float(g.get("momentum", g.get("betas", (0.0,))[0])) for g in groups), default=0.0)


def refusal(optimizers: Sized, precision: object, *, who: str, remedy: str) -> str | None:
    """Why signs of gradients cannot be sent in this run at all."""
    if len(optimizers) > 1:
        return f"{who} goes by one optimizer, and there are {len(optimizers)}; {remedy}"
    if str(precision) == "16-mixed":
        return (
            f"{who}: with precision='16-mixed' gradients are scaled, and infinite now and then, which would be kept "
            f"for ever; {remedy}, or precision='bf16-mixed'"
        )
    return None


def warning(optimizers: Iterable[Optimizer], *, who: str, remedy: str) -> str | None:
    """What a user who sends signs of gradients should know of these optimizers."""
    strongest = momentum(optimizers)
    if strongest <= MOST:
        return None
    return (
        f"{who} sends signs of gradients, and the optimizer averages them with a momentum of {strongest:g}: what signs "
        f"miss counts {1 / (1 - min(strongest, 0.999)):.3g} times, and a learning rate that is right for ddp may not "
        f"converge; {remedy}"
    )
