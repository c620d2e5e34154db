"""What Lightning saves, loads and removes is a checkpoint of all ranks at meetings, and of one rank alone between them.

save_checkpoint      MEETING: the consensus, and beside it each rank's own (`checkpoints.py`)
                     alone: this rank's weights, and a warning that says so; asked by a cut, the cut's (`cuts.py`)
                     after the run: the consensus, and of the ranks' own the first one's
load_checkpoint      MEETING: all decide together how the run goes on
remove_checkpoint    the main file, then the files of all ranks
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_async.strategies import foreign
from lightning_async.strategies.checkpoints import Checkpoints
from lightning_async.strategies.collectives import Collectives
from lightning_async.strategies.cuts import Cuts


class Saving(Collectives):
    """Gives Lightning's file operations their meaning.

    Attributes:
        checkpoints: Saves and restores the run, seen from this rank.
        cuts: The same between meetings, where a strategy can.
    """

    checkpoints: Checkpoints
    cuts: Cuts

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """The consensus, and beside it what each rank has of its own. Between meetings there is none: say so."""
        if self.cuts.asking:
            self.cuts.save(checkpoint, filepath, storage_options)
            return
        if self.meeting and self.checkpoints.holds_all(checkpoint):
            self.checkpoints.before_save()
            self.together(self.checkpoints.save(checkpoint, filepath, storage_options))
            return
        if not self.meeting and self.office.is_open:
            rank_zero_warn(
                f"{self.name}: a checkpoint between meetings holds the weights of one rank, not the consensus; save at "
                "the end of an epoch"
            )
        if not self.office.is_open and self.world_size > 1 and "optimizer_states" in checkpoint:
            rank_zero_info(
                f"{self.name}: a checkpoint that is saved after `fit` holds the consensus, but of each rank's own "
                "state only the first one's: to go on exactly, let `ModelCheckpoint(save_last=True)` save in the run"
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None, **options: Any) -> dict[str, Any]:
        """What Lightning restores on this rank. Read by all ranks."""
        load = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only, **options)
        checkpoint = foreign.read(load, checkpoint_path, self.name)
        if not self.meeting:
            return checkpoint
        return self.together(self.checkpoints.load(checkpoint_path, checkpoint, weights_only=weights_only))

    def remove_checkpoint(self, filepath: Any) -> None:
        """The main file, then the files of all ranks."""
        if self.cuts.asking:
            self.cuts.remove_behind(partial(self.remove_checkpoint, filepath))
            return
        path, remove = self.checkpoints.agreed(filepath), super().remove_checkpoint
        self.checkpoints.behind(lambda: remove(path))
        if self.is_global_zero:
            self.checkpoints.remove(path)
