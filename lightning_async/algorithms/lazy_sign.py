"""EF-SIGNGD and LE-SIGNGD: one bit a number and a scale travel, what that misses is fed back, no news is not sent.

    v        what is exchanged: the update of this rank's own optimizer (`update`), or its gradient (`gradient`)
    send     sheet = C(v + rest), rest <- v + rest - sheet          agreed = mean over all n ranks of their sheets
    weights  those of the last round + agreed, or the optimizer's step on `agreed`; identical on all ranks, always

What silence means is in `sign_rules`, how a round goes in `sign_rounds`.

Laws: sent + rest = all v + old rest. Weights + mean rest + the servers' rest take exact steps (`always`, `accumulate`,
`periodic`). In lock-step: who ends early or dies stops the others with a sentence.
Sources: Deng, Sun, Liu, Sun (2022); Karimireddy et al. (2019); Zheng et al. (2019) for v as an update; LAG, LAQ and
LASG for the trigger; EF21 (Richtarik et al. 2021) for `innovation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.algorithms.press import Press, Source, Values
from lightning_async.algorithms.settle import settle
from lightning_async.algorithms.sheets import Cut, Scale, Span, cuts, fingerprint
from lightning_async.algorithms.sign_exchange import MEAN, PART, Exchange, Gather, Slices
from lightning_async.algorithms.sign_knobs import Compress, Compressor, Form, check, stretched, weights
from lightning_async.algorithms.sign_late import LateRounds
from lightning_async.algorithms.sign_notices import MOST, NOTICE, Notices
from lightning_async.algorithms.sign_rounds import SignRounds
from lightning_async.algorithms.sign_rules import RULES, Rule
from lightning_async.algorithms.sign_trigger import News, Trigger
from lightning_async.algorithms.signs import BLOCK, STRETCH, NotFinite
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

END = FIRST_FREE_KIND + 2
FEW = 2
"""Up to so many ranks `gather` sends no more bytes than `slices`, in half the time."""


class LazySign(Algorithm):
    """Knobs and rounds; `strategies/lazy_sign.py` says what each knob is for."""

    in_step = True
    _way: ClassVar[Mapping[str, str]] = {}
    """What a state says where rounds go another way than by the rule alone."""
    shrinks = "nothing"  # a round is one mean: no part of it can count less
    kinds: ClassVar[Mapping[int, str]] = {
        PART: "part",
        MEAN: "mean",
        END: "end",
        **dict.fromkeys(range(NOTICE, NOTICE + 2 * MOST + 1), "notice"),
    }

    def __init__(
        self,
        *,
        rule: Rule = "always",
        compress: Compress = "update",
        compressor: Compressor = "sign",
        scale: Scale = "block",
        block: int = BLOCK,
        stretch: float | None = None,
        min_size: int = 1024,
        form: Form = "auto",
        news: News = "change",
        history: int = 10,
        history_weights: Sequence[float] | None = None,
        threshold: float = 0.8,
        error_weight: float = 0.0,
        max_skip: int = 7,
        ahead: int = 1,
        warm_up: int = 0,
        threads: int = 1,
    ) -> None:
        check(rule=rule, compress=compress, compressor=compressor, scale=scale, form=form, news=news)
        check(block=block, min_size=min_size, history=history, max_skip=max_skip, ahead=ahead, warm_up=warm_up)
        check(threads=threads, threshold=threshold, error_weight=error_weight)
        self.rule, self.compress, self.compressor, self.scale = rule, compress, compressor, scale
        self.block, self.min_size, self.form, self.threads = block, min_size, form, threads
        repeats = compress == "update" and not RULES[rule].tracks
        self.stretch = stretched(stretch, STRETCH if repeats else 1.0)
        self.news, self.history, self.threshold, self.error_weight = news, history, threshold, error_weight
        self.history_weights = weights(history_weights, history)
        self.max_skip, self.ahead, self.warm_up = max_skip, ahead, warm_up
        self.travels_whole: Callable[[Tensor], bool] = lambda parameter: False
        """Which parameters travel whole, whatever their size; whoever knows their names assigns it."""
        self._arrivals: list[Arrival] = []

    # -- the run ------------------------------------------------------------------------------------------------------

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All weights are equal; nothing was left over yet."""
        self._begin(mail, rounds)
        if self._alone:
            return
        self._kept = replica.weights() if self.compress == "update" else torch.zeros_like(replica.flat)
        self.signs = self._new_rounds(replica, replica.flat)

    def renew(self, old: Replica, new: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """What is held back of parameters that are trained on stays so: the mean over all ranks and servers is kept.

        What a server held back its rank does from here on. Of what is frozen now it is dropped, what is new has none.
        """
        before, n, skipped = self.state_dict(), len(self._members), self.skipped
        self.begin(new, mail, mass, rounds)
        self._step, self._met, self.skipped = before["step"], before["step"], skipped
        if not self._alone and "rest" in before:
            self._take_over(before, n, partial(new.carried, old=old))

    def _take_over(self, before: Mapping[str, Any], n: int, carried: Callable[[Tensor], Tensor]) -> None:
        """Go on from a state of other sheets: all that is held back is this rank's own from here on."""
        rest = _with_served(before["rest"].clone(), before["exchange"], n)
        self._course.rest.vector.copy_(carried(rest))
        self._go_on(before, carried)

    def _go_on(self, before: Mapping[str, Any], carried: Callable[[Tensor], Tensor]) -> None:
        """Rounds go on from a state of others, whose vectors are to be carried over."""
        self.signs.go_on(before["round"], None if before["common"] is None else carried(before["common"]))

    def _begin(self, mail: Mail, rounds: Rounds) -> None:
        self._rounds, self._members, self._me = rounds, mail.members(), mail.me
        self._step = self._met = self.skipped = 0
        self._peers = [member for member in self._members if member != self._me]
        self._ended: set[int] = set()
        self._arrivals = []

    @property
    def trigger(self) -> Trigger:
        """When this rank sends."""
        return self.signs.trigger

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """With `compress="gradient"`: the optimizer sees what all agreed on in the place of this rank's gradient."""
        if self.compress == "gradient" and not self._alone:
            self._step = step
            _read_gradients(replica, self._kept)
            yield from self._round(mail, Values(self._kept))
            agreed = self.signs.agreed(self._kept.zero_())
            _write_gradients(replica, agreed)
        return self.arrived()

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """With `compress="update"`: in the place of this rank's step all take the one that they agreed on."""
        if self.compress == "update" and not self._alone:
            self._step = step
            yield from self._round(mail, Values(replica.flat, since=self._kept))
            self.signs.agreed(self._kept)
            replica.go_to(self._kept)
        return self.arrived()

    def averaged_over(self, n: int) -> int:
        """Updates are averaged over all ranks after the optimizer; with gradients it is before."""
        return n if self.compress == "update" else 1

    def arrived(self) -> list[Arrival]:
        """The arrivals since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    # -- a round ------------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Nothing travels, so nothing is packed: the optimizer alone."""
        return len(self._members) == 1

    def _round(self, mail: Mail, source: Source) -> Wait[None]:
        """Send or not, and learn what all agreed on; nobody waits where nobody sends."""
        try:
            sent = yield from self._take(mail, source)
        except NotFinite as error:
            raise RuntimeError(
                f"the {self.compress} of rank {self._me} in round {self._number} has a NaN or an infinity, "
                "which would stay in what is fed back for ever: lower the learning rate, clip gradients, or look for "
                "the batch"
            ) from error
        self.skipped += not sent

    def _take(self, mail: Mail, source: Source) -> Wait[bool]:
        return (yield from self.signs.take(mail, source))

    @property
    def _course(self) -> SignRounds | LateRounds:
        """How rounds are gone through."""
        return self.signs

    @property
    def _number(self) -> int:
        return 0 if self._alone else self._course.number

    def _heard(self, letter: Letter) -> None:
        launched = max(letter.message.echo, self._met)
        self._arrivals.append(Arrival(letter.peer, letter.message.step, launched, self._step, letter.seconds))

    def _guard(self, mail: Mail, missing: Sequence[int]) -> bool:
        """Whoever is missing is still coming, or all stop. What an ended rank sent before its end is here by now."""
        if dead := sorted(set(self._members) - set(mail.members())):
            raise RuntimeError(
                f"rank {dead[0]} is gone, and lazy_sign cannot go on without it, because all ranks step together: "
                "start again from the last checkpoint with those that live, or use gossip_ring, which goes on"
            )
        if ended := sorted(self._ended & set(missing)):
            raise RuntimeError(
                f"rank {ended[0]} has no more batches in this epoch while rank {self._me} goes on: lazy_sign needs "
                "equal numbers of batches: use balance='equal' and streams of equal length"
            )
        new = mail.take(END)
        for letter in new:
            self._ended.add(letter.peer)
            mail.folded(letter)
        return bool(new)

    # -- meetings -----------------------------------------------------------------------------------------------------

    def meet(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """All weights are equal already; what was said of rounds to come is said once more, and the mail drained."""
        for peer in self._peers:
            while peer in mail.members() and not mail.post(peer, Message(END)):
                yield f"rank {peer} to take the last word"
        if not self._alone:
            yield from self._agree_where()
        yield from settle(mail, self._rounds, self._peers, lambda: self._pump(mail), lambda: ())
        self._ended, self._met = set(), self._step
        return replica.weights()

    def _agree_where(self) -> Wait[None]:
        """Each says in which round it is, and what it has said of those to come."""
        mine = f"{self.signs.number};{self.signs.notices.words()}"
        words = yield from self._rounds.agree(mine.encode(), what="lazy_sign")
        said = {member: word.decode().split(";") for member, word in words.items()}
        if len({number for number, _ in said.values()}) > 1:
            at = ", ".join(f"rank {member} after {number}" for member, (number, _) in said.items())
            raise RuntimeError(
                f"the ranks meet after different numbers of rounds ({at}): lazy_sign needs equal numbers of batches: "
                "use balance='equal' and streams of equal length"
            )
        self.signs.notices.adopt({member: word for member, (_, word) in said.items()})

    def _pump(self, mail: Mail) -> None:
        mail.lost()
        for letter in mail.take(END):
            mail.folded(letter)
        if not self._alone:
            self.signs.notices.drop(mail)

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """The next updates are counted from here."""
        if self.compress == "update" and not self._alone:
            self._kept.copy_(replica.flat)

    # -- what the run depends on beside the weights -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is left over here and at this rank's server, and what the rule remembers."""
        state: dict[str, Any] = {"method": "LazySign", "rule": self.rule, "compress": self.compress, **self._way}
        state |= {"round": self._number, "step": self._met}
        return state if self._alone else {**state, **self._course.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same rule; to the bit, if its sheets were cut alike (`form`, `block`, ...)."""
        self._check_state(state, self._way.get("way", self.rule))
        self._step = self._met = state["step"]
        if self._alone:
            return
        cut = fingerprint(self._course.cuts)
        if state["exchange"].get("cuts", cut) == cut:  # older states did not say
            self._course.number = state["round"]
            self._course.load_state_dict(state)
        else:
            self._take_over(state, len(self._members), lambda vector: vector)

    def _check_state(self, state: Mapping[str, Any], way: str) -> None:
        if (saved := (state.get("method"), state.get("way", state.get("rule")))) != ("LazySign", way):
            raise ValueError(
                f"the state of {saved[0] or 'another method'} with rule {saved[1]!r} does not fit lazy_sign with rule "
                f"{way!r}: go on with the rule that the run was started with, or start anew from the weights"
            )
        if (saved := state.get("compress", self.compress)) != self.compress:  # older states did not say
            raise ValueError(
                f"the state of lazy_sign with compress={saved!r} does not fit compress={self.compress!r}: what is held "
                "back is of other units. Go on with what the run was started with, or start anew from the weights"
            )

    def inherit(self, replica: Replica, states: Iterable[Mapping[str, Any]], *, world: int) -> None:
        """Take over what ranks of a run with `world` members had not sent: the mean over all of it stays what it was.

        Called after `begin`, in the place of `load_state_dict`. With `innovation`, now or then, nothing is held back;
        of another `compress` it is of other units: all begin anew. So does a lone rank that exchanges gradients.
        """
        for state in states:
            alike = state.get("compress", self.compress) == self.compress
            if not alike or "rest" not in state or "innovation" in (state["rule"], self.rule):
                continue
            all_of_it = _with_served(state["rest"] / world, state["exchange"])
            if not self._alone:
                self._course.rest.vector.add_(all_of_it.to(replica.flat), alpha=len(self._members))
            elif self.compress == "update":
                replica.shift(all_of_it.to(replica.flat))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_rounds(self, replica: Replica, flat: Tensor) -> SignRounds:
        press = self._press(flat)
        return SignRounds(
            RULES[self.rule],
            press,
            self._new_exchange(replica, press, whole=False),
            warm_up=self._new_exchange(replica, press, whole=True) if self.warm_up else None,
            warm=self.warm_up,
            period=self.max_skip + 1,
            notices=Notices(self._me, self._members, ahead=self.ahead),
            trigger=self._new_trigger(flat),
            like=flat,
            guard=self._guard,
            heard=self._heard,
        )

    def _press(self, like: Tensor) -> Press:
        return Press(like, block=self.block, threads=self.threads, stretch=self.stretch)

    def _new_exchange(self, replica: Replica, press: Press, *, whole: bool) -> Exchange:
        gather = self.form == "gather" or (self.form == "auto" and len(self._members) <= FEW)
        parts = self._cuts(replica, parts=1 if gather else len(self._members), whole=whole)
        form = Gather if gather else Slices
        reuse = RULES[self.rule].reuses
        return form(press, parts, self._me, self._members, reuse=reuse, like=replica.flat)

    def _cuts(self, replica: Replica, *, parts: int, whole: bool = False) -> list[Cut]:
        """The model in so many sheets."""
        spans = [Span(at, at + p.numel(), i) for i, (p, at) in enumerate(replica.places)]
        whole = whole or self.compressor == "none"
        exact = [i for i, (p, _) in enumerate(replica.places) if whole or self.travels_whole(p)]
        return cuts(
            spans,
            parts=parts,
            dtype=replica.flat.dtype,
            exact=exact,
            min_size=self.min_size,
            block=self.block,
            scale=self.scale,
        )

    def _new_trigger(self, flat: Tensor) -> Trigger:
        silence = RULES[self.rule]
        remembers = silence.decides and not silence.tracks and self.news == "change"
        return Trigger(
            history=self.history,
            threshold=self.threshold,
            error_weight=self.error_weight,
            max_skip=self.max_skip,
            weights=self.history_weights,
            like=flat if remembers else None,
        )


def _with_served(rest: Tensor, exchange: Mapping[str, Any], times: int = 1) -> Tensor:
    """What a rank holds back, and so many times what its server does added to it."""
    if (served := exchange.get("rest")) is not None:
        rest[exchange["base"] : exchange["base"] + served.numel()].add_(served, alpha=times)
    return rest


def _read_gradients(replica: Replica, into: Tensor) -> None:
    """The gradients as one flat vector; zero where there is none."""
    for parameter, at in replica.places:
        here = into[at : at + parameter.numel()].view(parameter.shape)
        if parameter.grad is None:
            here.zero_()
        else:
            here.copy_(parameter.grad)


def _write_gradients(replica: Replica, agreed: Tensor) -> None:
    """The gradients that all agreed on. Where nobody has any there is none, so that the optimizer leaves it alone.

    Zeros alone say the same, so that all ranks do alike: nobody knows which of both the others had.
    """
    for parameter, at in replica.places:
        here = agreed[at : at + parameter.numel()].view(parameter.shape)
        if not bool(here.any()):
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = here.to(parameter.dtype, copy=True)
        else:
            parameter.grad.copy_(here)
