"""What a checkpoint says of Lightning's loops: of all ranks that they are in one epoch, or that it is over for all.

    saved behind a batch             one epoch, under way:  begun, not processed;   the batch is not its last one
    by who waits for the others      the same, and its batches are all completed:   it has no more, and waits again
    behind the last batch of all     as at the end of the epoch, which nobody goes on with
    behind the validation there      begun, not processed, and the batch is its last one: its end is still to come

Callbacks save in hooks where Lightning's counts are one rank's: it may stand at the end of an epoch that others are in,
and whether a batch is the last is told to callbacks as if it were theirs (`asking`).
"""

from __future__ import annotations

from typing import Any

Loop = dict[str, Any]
"""The state of the loop over epochs."""


def is_between_epochs(fit: Loop) -> bool:
    """Whether Lightning counts the epoch as over: saved at its very end, and not while it validated or trained."""
    current = fit["epoch_progress"]["current"]
    return bool(current["ready"] == current["started"] == current["processed"])


def close(fit: Loop) -> None:
    """The epoch is over, also for Lightning, which goes by this count: it begins the next one."""
    epochs = fit["epoch_progress"]
    for count in (epochs["current"], epochs["total"]):
        count["completed"] = count["processed"]


def begin_loaders_anew(fit: Loop, *, whatever_they_say: bool) -> None:
    """They are told nothing, and Lightning does not look for as many; so too where they say nothing."""
    state = fit.get("state_dict", {})
    if whatever_they_say or not any(state.get("combined_loader", ())):
        state.pop("combined_loader", None)


def reopen(fit: Loop) -> None:
    """Of a run that stopped within the epoch, whose hooks at its end Lightning calls: it goes on there."""
    epochs = fit["epoch_progress"]
    for count in (epochs["current"], epochs["total"]):
        count["processed"] -= 1
        count["completed"] = count["processed"]
    wait_again(fit)


def wait_again(fit: Loop) -> None:
    """Of a rank whose batches are over, and others' are not: its epoch is not, which Lightning would take for over if
    the last batch were still to be counted as completed, or known to be the last."""
    batches = fit["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    for count in (batches["current"], batches["total"]):
        count["completed"] = count["processed"]


def within_batch(fit: Loop) -> None:
    """Of who saves right behind the hooks of a batch: as in them."""
    batches = fit["epoch_loop.batch_progress"]
    for count in (batches["current"], batches["total"]):
        count["completed"] = count["processed"] - 1


def is_within_batch(fit: Loop) -> bool:
    """Whether it was saved in the hooks of a batch that is trained on."""
    current = fit["epoch_loop.batch_progress"]["current"]
    return bool(current["completed"] < current["processed"])


def go_on(fit: Loop) -> None:
    """Of a rank that goes on behind this batch."""
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False


def at_step(fit: Loop, steps: int) -> None:
    """Of who saved while others were on their way: the run's step was not known exactly then."""
    automatic = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    for total in (automatic, fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]):
        if total["completed"]:
            total["ready"] = total["completed"] = steps


def end_epoch(fit: Loop, *, counted: bool) -> None:
    """Behind the last batch of all. Where nobody counts epochs, Lightning ends this one when it goes on."""
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    batches["is_last_batch"] = True
    if counted and is_within_batch(fit):
        for count in (epochs["current"], epochs["total"]):
            count["processed"] = count["ready"]
        for count in (batches["current"], batches["total"]):
            count["completed"] = count["processed"]
