"""A run goes on to the bit where its ranks are those that were saved; otherwise from the consensus, and says so.

    the same world and method, all files there    each rank has its own back (masses: with the same batch sizes)
    the same, saved by a cut                      each its own weights; what was under way to it, as its next mail
    anything else                                 weights: the consensus, so sums are conserved
                                                  data: what nobody completed; counts: those of all
                                                  rank r's optimizer: that of the saved rank r modulo their number,
                                                  with r the first rank of one's member
                                                  gradients of a step to come: their mean (`added_up`)
    no word of ours in the file                   as Lightning does it

All ranks decide it together: one that goes on from its own state among others that do not would break their sum. What
needs the optimizers, the algorithm or the loader to be there is put back right before the first batch; but where the
saved run was between two epochs, its next draws were those of a new iterator, and the random states come before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_async.strategies import compat
from lightning_async.strategies.added_up import mean_of_all
from lightning_async.strategies.own_state import BEGUN_ANEW, Part, all_parts, keeps_own, own_keys, put_back_tensors
from lightning_async.strategies.rank_files import RankFiles, main_file, rank_file
from lightning_async.strategies.saved_loops import Loop, close, is_between_epochs
from lightning_async.strategies.trainable import train_again
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

KEY = "lightning_async"
"""Our key in the main file."""
VERSION = 1
"""The form of what stands under it, and of the ranks' own files."""


class Resuming:
    """The way back of one rank."""

    def __init__(self, strategy: AsyncStrategy, files: RankFiles, parts: dict[str, Part]) -> None:
        self._strategy = strategy
        self._files = files
        self._parts = parts
        self._waiting: dict[str, Any] = {}
        self._between_epochs = False

    def load(self, path: str, checkpoint: dict[str, Any], *, weights_only: bool | None) -> Wait[dict[str, Any]]:
        """The checkpoint with this rank's own in the place of the first rank's; both are read as the user said."""
        self._waiting = {}
        shared, strategy = checkpoint.get(KEY), self._strategy
        if strategy.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        strategy.clock.loaded()
        if shared is None:
            return checkpoint
        refuse_newer(shared, path)
        path, ranks = main_file(path), shared["ranks"]
        self._train_again(path, checkpoint)
        file = rank_file(path, shared["save"], ranks[strategy.global_rank % len(ranks)])
        own, trouble = self._read(file, weights_only)
        said = yield from strategy.office.rounds.agree(
            (self._foreign(shared) or trouble).encode()[:2000], what="how to go on"
        )
        if reasons := dict.fromkeys(sentence.decode(errors="replace") for sentence in said.values() if sentence):
            added = yield from mean_of_all(
                strategy,
                shared,
                own,
                lambda rank: self._read(rank_file(path, shared["save"], rank), weights_only)[0],
                sorted(said),
            )
            own = yield from self._of_the_speaker(path, shared, own, trouble, weights_only)
            own = _without_place(own, checkpoint)
            own["parts"]["stepping"] = {"skipped": 0, "carried": added[0], "divided": shared.get("divided")}
            if shared.get("progress"):  # older versions did not save it
                own["parts"].setdefault("progress", {**shared["progress"], "ended": False})
            self._warn(path, shared, list(reasons), *added)
        if of_all := shared.get("consensus"):
            own["exact"] = of_all
        strategy.feeding.load_state_dict(shared["data"])
        self._waiting, self._between_epochs = own, is_between_epochs(checkpoint["loops"]["fit_loop"])
        mine = {**checkpoint, **{key: own[key] for key in own_keys(strategy) if key in own}}
        epoch = self._tell_epoch(mine["loops"]["fit_loop"])
        waits = own.get("waits", False)  # older versions did not say
        anew = self._between_epochs and compat.reloads_with(strategy.trainer, epoch)
        loaders = () if anew else own.get("loaders", ())
        strategy.feeding.load_loader_states(loaders, in_mid_epoch=not self._between_epochs, over=waits)
        return mine

    @property
    def cut(self) -> dict[str, Any] | None:
        """This rank's part of the cut that the run goes on from; None where it goes on from a meeting."""
        return self._waiting.get("cut")

    def before_loader(self) -> None:
        """Put the random states back here if the loader's first iterator is that of the epoch to come, once."""
        if self._between_epochs and (state := self._waiting.get("parts", {}).pop("random", None)) is not None:
            all_parts(self._strategy, self._parts)["random"].load_state_dict(state)

    def before_algorithm(self) -> None:
        """Restore weights and buffers as they were: of half-precision ones the module shows no more than roundings."""
        strategy = self._strategy
        if self._waiting and keeps_own(strategy, self._waiting):
            self._waiting = strategy.together(self._with_masses_of_now(self._waiting))
        put_back_tensors(strategy, self._waiting)

    def put_back(self) -> None:
        """Restore what could not be restored before, once."""
        strategy, own = self._strategy, self._waiting
        self._waiting = {}
        if "steps" in own:
            strategy.stepping.taken = own["steps"]
            strategy.office.mail.at(strategy.steps)
        states = own.get("parts", {})
        for name, part in all_parts(strategy, self._parts).items():
            if name == "algorithm" and "cut" in own and name in states:
                strategy.algorithm.go_on(states[name])  # type: ignore[attr-defined]  # those that can be cut have it
            elif name in states:
                part.load_state_dict(states[name])

    def forget(self) -> None:
        """The run is over."""
        self._waiting = {}

    def _tell_epoch(self, fit: Loop) -> int:
        """The epoch to come, or to go on with. The Trainer's loops are told before they are restored: it may make its
        loaders earlier (`estimated_stepping_batches`), and those of one epoch may not be those of another."""
        if self._between_epochs:
            close(fit)
        epoch: int = fit["epoch_progress"]["current"]["completed"]
        self._strategy.trainer.fit_loop.epoch_progress.current.completed = epoch
        return epoch

    def _train_again(self, path: str, checkpoint: dict[str, Any]) -> None:
        """What was thawed when the run was saved is thawed, whatever `setup` froze again."""
        saved = checkpoint[KEY].get("trained")  # older versions did not save it
        if saved and (other := train_again(self._strategy.trainer.lightning_module, saved, checkpoint["state_dict"])):
            rank_zero_warn(
                f"{self._strategy.name}: the run goes on with the parameters that were trained when {path} was saved: "
                f"it trains {other}. To train what the module says now, begin a new run with its weights alone "
                "(`load_from_checkpoint`)"
            )

    def _with_masses_of_now(self, own: dict[str, Any]) -> Wait[dict[str, Any]]:
        """Masses go by batch sizes. Where a rank has another one, what they moved is lost on all: the consensus is not.

        (Who adopts the consensus begins with the masses of now anyway.) What was under way in a cut is in it, too.
        """
        mass = self._strategy.feeding.mass
        born = own.get("parts", {}).get("algorithm", {}).get("born", mass)
        said = yield from self._strategy.office.rounds.agree(b"" if born == mass else b"other", what="masses")
        if not (other := [str(rank) for rank, word in said.items() if word]):
            return own
        rank_zero_warn(
            f"{self._strategy.name}: the batch of rank {', '.join(other)} has another size than when the run was "
            "saved, so masses begin anew, and all ranks start from the consensus"
        )
        parts = {name: state for name, state in own["parts"].items() if name != "algorithm"}
        return {**{key: own[key] for key in own if key not in ("weights", "cut")}, "parts": parts}

    def _of_the_speaker(
        self, path: str, shared: dict[str, Any], own: dict[str, Any], trouble: str, weights_only: bool | None
    ) -> Wait[dict[str, Any]]:
        """What is this rank's: one state for all ranks of a member, since they step alike. {}: one cannot read it."""
        office, ranks = self._strategy.office, shared["ranks"]
        if (siblings := office.siblings) is None:
            return own
        if not siblings.speaks:
            file = rank_file(path, shared["save"], ranks[siblings.speaker % len(ranks)])
            own, trouble = self._read(file, weights_only)
        said = yield from office.rounds.agree(b"unread" if trouble else b"", what="whose optimizers")
        return {} if any(said.get(rank) for rank in siblings.ranks) else own

    def _read(self, file: str, weights_only: bool | None) -> tuple[dict[str, Any], str]:
        """A rank's own file, or why there is none."""
        try:
            return self._strategy.checkpoint_io.load_checkpoint(file, weights_only=weights_only is not False), ""
        except Exception as error:  # each CheckpointIO has its own way to say that there is no such file
            return {}, f"{file} cannot be read ({type(error).__name__}: {error})"

    def _foreign(self, shared: dict[str, Any]) -> str:
        """Why the ranks of this run are not those that were saved."""
        strategy, world, ranks = self._strategy, shared["world"], shared["ranks"]
        saved = f"{shared['strategy']} ({shared['algorithm']})"
        if (mine := f"{strategy.name} ({type(strategy.algorithm).__name__})") != saved:
            return f"it was saved by {saved}, and this is {mine}"
        if world != strategy.world_size:
            return f"it was saved by {world} ranks, and there are {strategy.world_size}"
        if (members := shared.get("members", world)) != strategy.members:  # older versions had members of one rank
            return f"its {world} ranks were {members} members, and here they are {strategy.members}"
        if (grouped := _grouped(shared)) not in ("", here := _grouped(vars(strategy.office))):
            return f"its members were the ranks {grouped}, and here they are {here}"
        dead = ", ".join(str(rank) for rank in range(world) if rank not in ranks)
        return f"rank {dead} had died before it was saved" if dead else ""

    def _warn(
        self, path: str, shared: dict[str, Any], reasons: list[str], added: dict[str, Tensor], lost: list[int]
    ) -> None:
        ranks, anew = shared["ranks"], "masses, turns, steps"
        method = f"The state of the method ({anew}) and the random states begin anew"
        if self._strategy.taken_over and another_world(self._strategy, shared):
            method = f"{self._strategy.taken_over}. What else the method knew ({anew}) and the random states begin anew"
        who = "Rank r" if self._strategy.office.siblings is None else "A rank whose member's first rank is r"
        rank_zero_warn(
            f"{self._strategy.name}: the run does not go on to the bit from {path}: {'; '.join(reasons)}. All ranks "
            f"start from the consensus and go on with the samples of the epoch that nobody completed. {who} has the "
            f"optimizer state of the saved rank number r modulo {len(ranks)} (of rank {ranks[0]} where that cannot be "
            "read), and the place of its stream, if each rank has a stream of its own: with fewer ranks than before "
            "nobody goes on with the others' streams, with more ranks one is gone on with twice. "
            f"{_of_gradients(added, lost)}{method}"
        )


def another_world(strategy: AsyncStrategy, shared: dict[str, Any]) -> bool:
    """Whether the same strategy saved, on other ranks or members, or without one that had died."""
    saved, mine = (shared["world"], shared.get("members", shared["world"])), (strategy.world_size, strategy.members)
    regrouped = _grouped(shared) not in ("", _grouped(vars(strategy.office)))
    died = len(shared["ranks"]) < shared["world"]
    return shared["strategy"] == strategy.name and (saved != mine or regrouped or died)


def _grouped(shared: dict[str, Any]) -> str:
    """Which ranks were one member, for people; "" where it was not saved, or went without saying."""
    return " | ".join(" ".join(map(str, ranks)) for ranks in shared.get("ranks_of_members", ()))


def refuse_newer(shared: dict[str, Any], path: str) -> None:
    """Raise for a checkpoint that a later version of this package wrote in another form."""
    if shared["version"] > VERSION:
        raise MisconfigurationException(
            f"{path} was written by a newer lightning_async (form {shared['version']}; this one knows {VERSION}): "
            "install that version to resume from it. Its weights load everywhere, with `strategy='auto'` too"
        )


def _of_gradients(added: dict[str, Tensor], lost: list[int]) -> str:
    """What becomes of the gradients that were added up to a step still to come, in words; "" if there were none."""
    on = "Each rank adds the mean of the gradients that all had added up to a step still to come to its first step. "
    of = ", ".join(str(rank) for rank in lost)
    gone = f"The gradients that rank {of} had added up to a step still to come are lost; their samples are done. "
    return on * bool(added) + gone * bool(lost)


def _without_place(own: dict[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """Of an own state, what a rank can use that takes another's place: the optimizers', and where its loaders stood."""
    kept: dict[str, Any] = {key: own[key] for key in ("optimizer_states", "loaders", "waits") if key in own}
    kept["parts"] = {name: state for name, state in own.get("parts", {}).items() if name not in BEGUN_ANEW}
    loaders = own.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader")
    if loaders:
        fit = main["loops"]["fit_loop"]
        fit = {**fit, "state_dict": {**fit["state_dict"], "combined_loader": loaders}}
        kept["loops"] = {**main["loops"], "fit_loop": fit}
    return kept
