"""EF-SIGNGD and LE-SIGNGD: one bit a number and a scale travel, what that misses is fed back, no news is not sent.

    v        what is exchanged: the update of this rank's own optimizer (`update`), or its gradient (`gradient`)
    send     sheet = C(v + rest), rest <- v + rest - sheet          agreed = mean over all n ranks of their sheets
    weights  those of the last round + agreed, or the optimizer's step on `agreed`; identical on all ranks, always

    rule        a rank that does not send               the others count it with       agreed where nobody sends
    always      there is none                           -                              -
    accumulate  rest <- rest + v                        0                              0
    periodic    the same, by the clock: the control     0                              0
    paper       drops v, rest stands still              its last sheet                 what it was in the last round
    innovation  nothing: sheets say how v has changed   no change                      what it was in the last round

Laws: sent + rest = all v + old rest. Weights + mean rest + the servers' rest take exact steps (`always`, `accumulate`,
`periodic`). In lock-step: who ends early or dies stops the others with a sentence.
Sources: Deng, Sun, Liu, Sun (2022); Karimireddy et al. (2019); Zheng et al. (2019) for v as an update; LAG, LAQ and
LASG for the trigger; EF21 (Richtarik et al. 2021) for `innovation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import Algorithm
from lightning_async.algorithms.press import Press, Rest, Source, Values
from lightning_async.algorithms.settle import settle
from lightning_async.algorithms.sheets import SCALES, Scale, Span, cuts
from lightning_async.algorithms.sign_exchange import MEAN, PART, Exchange, Gather, Slices
from lightning_async.algorithms.sign_notices import MOST, NOTICE, Notices
from lightning_async.algorithms.sign_trigger import News, Trigger
from lightning_async.algorithms.signs import BITS, BLOCK, NotFinite
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import FIRST_FREE_KIND, Letter, Mail, Message, Wait
from lightning_async.transport.rounds import Rounds

Rule = Literal["always", "accumulate", "periodic", "paper", "innovation"]
Compress = Literal["update", "gradient"]
Compressor = Literal["sign", "none"]
Form = Literal["auto", "slices", "gather"]
END = FIRST_FREE_KIND + 2
FEW = 2
"""Up to so many ranks `gather` sends no more bytes than `slices`, in half the time."""


class LazySign(Algorithm):
    """Knobs and rounds; `strategies/lazy_sign.py` says what each knob is for."""

    in_step = True
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
        min_size: int = 1024,
        form: Form = "auto",
        news: News = "change",
        history: int = 10,
        threshold: float = 0.8,
        error_weight: float = 0.0,
        max_skip: int = 7,
        ahead: int = 1,
        warm_up: int = 0,
        threads: int = 1,
    ) -> None:
        _check_choices(rule, compress, compressor, scale, form, news)
        _check_numbers(block, min_size, history, max_skip, ahead, warm_up, threads)
        _check_weights(threshold, error_weight)
        self.rule, self.compress, self.compressor, self.scale = rule, compress, compressor, scale
        self.block, self.min_size, self.form, self.threads = block, min_size, form, threads
        self.news, self.history, self.threshold, self.error_weight = news, history, threshold, error_weight
        self.max_skip, self.ahead, self.warm_up = max_skip, ahead, warm_up
        self.travels_whole: Callable[[Tensor], bool] = lambda parameter: False
        """Which parameters travel whole, whatever their size; whoever knows their names assigns it."""
        self._arrivals: list[Arrival] = []

    # -- the run ------------------------------------------------------------------------------------------------------

    def begin(self, replica: Replica, mail: Mail, mass: int, rounds: Rounds) -> None:
        """All weights are equal; nothing was left over yet."""
        self._rounds, self._members, self._me = rounds, mail.members(), mail.me
        self._number = self._step = self._met = self.skipped = 0
        self._peers = [member for member in self._members if member != self._me]
        self._ended: set[int] = set()
        self._silent = True
        self._arrivals = []
        if self._alone:
            return
        flat = replica.flat
        self._press = Press(flat, block=self.block, threads=self.threads)
        self._exchange = self._new_exchange(replica, flat, whole=False)
        self._warm_up = self._new_exchange(replica, flat, whole=True) if self.warm_up else None
        self._kept = replica.weights() if self.compress == "update" else torch.zeros_like(flat)
        self._rest = Rest(torch.zeros_like(flat), tracks=self.rule == "innovation")
        self._common = torch.zeros_like(flat) if self.rule == "innovation" else None
        self._notices = Notices(mail.me, self._members, ahead=self.ahead)
        self.trigger = self._new_trigger(flat)

    def before_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """With `compress="gradient"`: the optimizer sees what all agreed on in the place of this rank's gradient."""
        if self.compress == "gradient" and not self._alone:
            self._step = step
            _read_gradients(replica, self._kept)
            yield from self._round(mail, Values(self._kept))
            agreed = self._agreed(self._kept.zero_())
            _write_gradients(replica, agreed)
        return self.arrived()

    def after_step(self, replica: Replica, mail: Mail, step: int) -> Wait[list[Arrival]]:
        """With `compress="update"`: in the place of this rank's step all take the one that they agreed on."""
        if self.compress == "update" and not self._alone:
            self._step = step
            yield from self._round(mail, Values(replica.flat, since=self._kept))
            self._agreed(self._kept)
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
        self._number += 1
        number, exchange = self._number, self._exchange_now
        try:
            if self.ahead == 0:
                self._decide(mail, number, source)
            senders = yield from self._senders(mail, number)
            self.skipped += self._me not in senders
            if self._me in senders:
                exchange.send(mail, number, source, self._rest)
            elif self.rule in ("accumulate", "periodic"):
                self._press.keep(source, self._rest, exchange.cuts)
            if self.ahead:
                self._decide(mail, number + self.ahead, source)
        except NotFinite as error:
            raise RuntimeError(
                f"the {self.compress} of rank {self._me} in round {number} has a NaN or an infinity, which would stay "
                "in what is fed back for ever: lower the learning rate, clip gradients, or look for the batch"
            ) from error
        if senders:
            yield from exchange.finish(mail, number, senders, self._guard, self._heard)
        else:
            exchange.pass_by()
        self._silent = not senders

    def _agreed(self, onto: Tensor) -> Tensor:
        """Add to a vector what all agreed on in this round."""
        common, moved = self._common, 0.0
        if not self._silent or self.rule == "paper":
            for source, cut in self._exchange_now.agreed():
                self._press.add(source, cut, Rest(onto if common is None else common))
                moved += self._press.square(source, cut)[0] if self._lazy and common is None else 0.0
        if common is not None:
            onto.add_(common)
            moved = float(torch.dot(common, common))
        self.trigger.remember(moved)
        return onto

    @property
    def _exchange_now(self) -> Exchange:
        """What this round goes by: the first ones send whole numbers."""
        if self._warm_up is not None and self._number > self.warm_up:
            self._warm_up = None
        return self._warm_up or self._exchange

    @property
    def _lazy(self) -> bool:
        return self.rule not in ("always", "periodic")

    def _senders(self, mail: Mail, number: int) -> Wait[tuple[int, ...]]:
        """Who sends in this round."""
        if not self._lazy:
            sends = self.rule == "always" or number <= self.warm_up or number % (self.max_skip + 1) == 0
            return self._members if sends else ()
        if number <= self._first:
            return self._members
        return (yield from self._notices.senders(mail, number, self._guard))

    @property
    def _first(self) -> int:
        """So many rounds are sent by all without a word."""
        return max(self.history, self.ahead, self.warm_up + 1 if self.warm_up else 0)

    def _decide(self, mail: Mail, number: int, source: Source) -> None:
        """Tell the others whether this rank sends in a round to come."""
        if self._lazy and number > self._first:
            sends = self.trigger.decide(number, self._press, source, self._rest, self._exchange.cuts)
            self._notices.say(mail, number, sends)

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
        mine = f"{self._number};{self._notices.words()}"
        words = yield from self._rounds.agree(mine.encode(), what="lazy_sign")
        said = {member: word.decode().split(";") for member, word in words.items()}
        if len({number for number, _ in said.values()}) > 1:
            at = ", ".join(f"rank {member} after {number}" for member, (number, _) in said.items())
            raise RuntimeError(
                f"the ranks meet after different numbers of rounds ({at}): lazy_sign needs equal numbers of batches: "
                "use balance='equal' and streams of equal length"
            )
        self._notices.adopt({member: word for member, (_, word) in said.items()})

    def _pump(self, mail: Mail) -> None:
        mail.lost()
        for letter in mail.take(END):
            mail.folded(letter)
        if not self._alone:
            self._notices.drop(mail)

    def resume(self, replica: Replica, *, adopted: bool) -> None:
        """The next updates are counted from here."""
        if self.compress == "update" and not self._alone:
            self._kept.copy_(replica.flat)

    # -- what the run depends on beside the weights -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is left over here and at this rank's server, and what the rule remembers."""
        state: dict[str, Any] = {"method": "LazySign", "rule": self.rule, "round": self._number, "step": self._met}
        if self._alone:
            return state
        return {
            **state,
            "rest": self._rest.vector.cpu().clone(),
            "common": None if self._common is None else self._common.cpu().clone(),
            "exchange": self._exchange.state_dict(),
            "notices": self._notices.state_dict(),
            "trigger": self.trigger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same rule."""
        if (saved := (state.get("method"), state.get("rule"))) != ("LazySign", self.rule):
            raise ValueError(
                f"the state of {saved[0] or 'another method'} with rule {saved[1]!r} does not fit lazy_sign with rule "
                f"{self.rule!r}: go on with the rule that the run was started with, or start anew from the weights"
            )
        self._number, self._step, self._met = state["round"], state["step"], state["step"]
        if self._alone:
            return
        self._rest.vector.copy_(state["rest"])
        if self._common is not None:
            self._common.copy_(state["common"])
        self._exchange.load_state_dict(state["exchange"])
        self._notices.load_state_dict(state["notices"])
        self.trigger.load_state_dict(state["trigger"])

    def inherit(self, replica: Replica, states: Iterable[Mapping[str, Any]], *, world: int) -> None:
        """Take over what ranks of a run with `world` members had not sent: the mean over all of it stays what it was.

        Called after `begin`, in the place of `load_state_dict`. With `innovation` nothing is held back: all begin anew.
        """
        for state in states:
            if state.get("rule") != self.rule or "rest" not in state or self.rule == "innovation":
                continue
            rest, served = state["rest"], state["exchange"]
            all_of_it = rest / world
            if (slice_ := served.get("rest")) is not None:
                all_of_it[served["base"] : served["base"] + slice_.numel()] += slice_
            if not self._alone:
                self._rest.vector.add_(all_of_it.to(self._rest.vector), alpha=len(self._members))
            elif self.compress == "update":
                replica.shift(all_of_it.to(replica.flat))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_exchange(self, replica: Replica, flat: Tensor, *, whole: bool) -> Exchange:
        spans = [Span(at, at + p.numel(), i) for i, (p, at) in enumerate(replica.places)]
        whole = whole or self.compressor == "none"
        exact = [i for i, (p, _) in enumerate(replica.places) if whole or self.travels_whole(p)]
        gather = self.form == "gather" or (self.form == "auto" and len(self._members) <= FEW)
        parts = cuts(
            spans,
            parts=1 if gather else len(self._members),
            dtype=flat.dtype,
            exact=exact,
            min_size=self.min_size,
            block=self.block,
            scale=self.scale,
        )
        form = Gather if gather else Slices
        return form(self._press, parts, self._me, self._members, reuse=self.rule == "paper", like=flat)

    def _new_trigger(self, flat: Tensor) -> Trigger:
        remembers = self._lazy and self.rule != "innovation" and self.news == "change"
        return Trigger(
            history=self.history,
            threshold=self.threshold,
            error_weight=self.error_weight,
            max_skip=self.max_skip,
            like=flat if remembers else None,
        )


def _read_gradients(replica: Replica, into: Tensor) -> None:
    """The gradients as one flat vector; zero where there is none."""
    for parameter, at in replica.places:
        here = into[at : at + parameter.numel()].view(parameter.shape)
        if parameter.grad is None:
            here.zero_()
        else:
            here.copy_(parameter.grad)


def _write_gradients(replica: Replica, agreed: Tensor) -> None:
    """The gradients that all agreed on. Where nobody has any there is none, so that the optimizer leaves it alone."""
    for parameter, at in replica.places:
        here = agreed[at : at + parameter.numel()].view(parameter.shape)
        if not bool(here.any()):
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = here.to(parameter.dtype, copy=True)
        else:
            parameter.grad.copy_(here)


def _check_choices(
    rule: object, compress: object, compressor: object, scale: object, form: object, news: object
) -> None:
    choices: Iterable[tuple[str, object, tuple[str, ...]]] = (
        ("rule", rule, get_args(Rule)),
        ("compress", compress, get_args(Compress)),
        ("compressor", compressor, get_args(Compressor)),
        ("scale", scale, SCALES),
        ("form", form, get_args(Form)),
        ("news", news, get_args(News)),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_numbers(
    block: object, min_size: object, history: object, max_skip: object, ahead: object, warm_up: object, threads: object
) -> None:
    least = {"block": BITS, "min_size": 0, "history": 1, "max_skip": 0, "ahead": 0, "warm_up": 0, "threads": 1}
    given = (block, min_size, history, max_skip, ahead, warm_up, threads)
    for (name, low), value in zip(least.items(), given, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"`{name}` must be an integer of at least {low}, got {value!r}")
    if isinstance(block, int) and block % BITS:
        raise ValueError(f"`block` must be a multiple of {BITS}, got {block}")
    if isinstance(ahead, int) and ahead > MOST:
        raise ValueError(f"`ahead` must be at most {MOST} rounds, got {ahead}")


def _check_weights(threshold: object, error_weight: object) -> None:
    for name, value in (("threshold", threshold), ("error_weight", error_weight)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}")
