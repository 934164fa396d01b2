"""How many drafted tokens the target verifies in a pass, so that drafting is never slower than
plain decoding.

Travels to the Hub: imports the standard library alone. It holds no tensor and no clock. Whoever
decodes tells it what each round cost and brought, and asks it before the next.

Letters: c(d) is the seconds of one target pass over the anchor and d drafted tokens, drafting not
included; q_j the chance that slot j is accepted once the slots before it were; S_k = q_1 .. q_k the
survival of slot k; rho the tokens a second lately, of rounds that were not looked up.

Three questions, in this order:

    1. May a round be drafted at all? What drafting has lost against plain decoding is an account,
       and it has a limit. This is the guarantee.
    2. Is it worth running the drafter? Only averages are known before it has run.
    3. How long a draft? The d that maximises 1 + S_1 + .. + S_d - rho c(d).

The third is the renewal-reward rule: it maximises the tokens a second over all rounds, where the
best ratio of each round would not, because rounds differ.

Lossless whatever it decides. Greedy: every committed token is the target's own choice. Sampled:
whether slot k is verified may depend on anything but the token drawn there. So confidences must be
those of a slot's whole distribution (its largest probability), never that of the drawn token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LENGTHS = (0, 1, 2, 3, 5, 7, 11, 15)  # candidates for d; 0 is plain decoding
FIRST_LENGTH = 7  # the first draft is no longer

COST_DECAY = 0.9  # weight that a moving average keeps of its past, a round
LONGEST_STALL = 1.5  # a pass that took longer than so many times its average counts as that

BINS = 10  # of confidence
PRIOR_WEIGHT = 2.0  # a bin first believes the confidence itself, as if seen so often
COUNT_DECAY = 0.985  # what a count keeps at each use, so that old text is forgotten
PRIOR_ALPHA = 0.5  # chance of a slot of which nothing is known

RATE_DECAY = 0.95  # of the tokens and seconds that rho is made of
VALUE_DECAY = 0.8  # of what drafted rounds brought

LONGEST_PAUSE = 64  # plain rounds between two probes at most
ALLOWED_LOSS = 0.02  # of all time may be lost by drafting, and as much by looking up ...
ALLOWED_ROUNDS = 1.0  # ... and so many plain passes beside
SAVINGS = 2.0  # what was gained counts against later losses, up to so many plain passes


class Round(NamedTuple):
    """One verification pass of the target. The prefill pass is not a round.

    Attributes:
        emitted (`int`): tokens committed, bonus included.
        accepted (`int`): drafted tokens accepted, A.
        tested (`int`): drafted slots whose verdict is known. Where an end of sequence or the length
            limit cuts the pass, the slots beyond it are not tested.
        drafted (`int`): drafted slots given to the target; 0 in a skipped round.
        looked_up (`bool`): the draft was looked up in the text, and the drafter did not run.
    """

    emitted: int
    accepted: int
    tested: int
    drafted: int
    looked_up: bool = False


@dataclass
class Costs:
    """Seconds of target passes by drafted length, and of the drafter.

    Args:
        passes (`dict[int, float]`): c(d) of the lengths that were measured.
        drafting (`float`, *optional*): seconds of one drafter run; `None` before the first.
        frozen (`bool`, *optional*): keep these values, and count them instead of the clock. Then
            equal inputs give equal decisions on any machine.
    """

    passes: dict[int, float] = field(default_factory=dict)
    drafting: float | None = None
    frozen: bool = False

    def of_pass(self, length: int) -> float:
        """c(d): measured, or on a line between the measured lengths around it, or beyond them.

        Raises:
            ValueError: nothing was measured.
        """
        if not self.passes:
            raise ValueError("no pass of the target was measured yet: the first round is plain")
        if length in self.passes:
            return self.passes[length]
        lengths = sorted(self.passes)  # a copy, because another thread may add one
        if len(lengths) == 1 or length < lengths[0]:
            # Nothing else is known: as cheap as that.
            return self.passes[lengths[0]]
        low = max(known for known in lengths if known < length)
        longer = [known for known in lengths if known > length]
        if longer:
            start, end = low, longer[0]
        else:
            # The average of a token over all that was measured. On CPUs the first token of a draft
            # is much the dearest, and the last two lengths may be 0 and 1.
            start, end = lengths[0], lengths[-1]
        slope = (self.passes[end] - self.passes[start]) / (end - start)
        found = self.passes[start] + (length - start) * slope
        # A noisy clock may say that longer is cheaper. It is not.
        return max(found, self.passes[start])

    def learn(self, length: int, seconds: float, drafting: float | None) -> None:
        """Take one round in, unless frozen. `drafting` is `None` where the drafter did not run."""
        if self.frozen:
            return
        self.passes[length] = _moved(self.passes.get(length), seconds)
        if drafting is not None:
            self.drafting = _moved(self.drafting, drafting)


def _moved(average: float | None, value: float) -> float:
    """A moving average with one value more. One stall of the machine must not decide a text."""
    if average is None:
        return value
    value = min(value, LONGEST_STALL * average)
    return COST_DECAY * average + (1 - COST_DECAY) * value


@dataclass
class Account:
    """Seconds that drafts of one source have lost against plain decoding. Each source has its own:
    what one has gained the other must not lose."""

    lost: float = 0.0

    def allowance(self, spent: float, plain: float) -> float:
        """Seconds that it may yet lose, where all rounds took `spent` and a plain pass `plain`."""
        return ALLOWED_LOSS * spent + ALLOWED_ROUNDS * plain - self.lost

    def add(self, seconds: float, plain: float) -> None:
        """Take a loss in, below 0 where it is a gain."""
        self.lost = max(self.lost + seconds, -SAVINGS * plain)


@dataclass
class Count:
    """How often slots of one kind were accepted, old ones forgotten."""

    accepted: float = 0.0
    tested: float = 0.0

    def add(self, accepted: bool) -> None:
        self.accepted = COUNT_DECAY * self.accepted + accepted
        self.tested = COUNT_DECAY * self.tested + 1

    def chance(self, prior: float) -> float:
        """The share that was accepted, drawn towards a prior where little was seen."""
        return (PRIOR_WEIGHT * prior + self.accepted) / (PRIOR_WEIGHT + self.tested)


def products(chances: Sequence[float]) -> list[float]:
    """S_1, S_2, ...: the running products of q_1, q_2, ..."""
    survival, alive = [], 1.0
    for chance in chances:
        alive *= chance
        survival.append(alive)
    return survival


class Survival:
    """The chance that each slot of a draft is reached and accepted, learned as text is decoded.

    With confidences it is a calibration: ten bins of confidence, each with the share that was
    accepted. Without, it is alpha_k of each slot.

    Args:
        longest (`int`): slots of a draft, K - 1.
    """

    def __init__(self, longest: int):
        self.bins = [Count() for _ in range(BINS)]
        self.slots = [Count() for _ in range(longest)]

    def of(self, confidences: Sequence[float] | None = None) -> list[float]:
        """S_1 .. S_(K-1).

        Args:
            confidences (`Sequence[float]`, *optional*): the largest probability of each slot.
        """
        chances = []
        if confidences is None:
            for slot in self.slots:
                # A slot that was never reached is taken to be as good as the one before it.
                prior = chances[-1] if chances else PRIOR_ALPHA
                chances.append(slot.chance(prior))
        else:
            chances = [self._bin(confidence).chance(confidence) for confidence in confidences]
        return products(chances)

    def learn(self, accepted: int, tested: int, confidences: Sequence[float] | None) -> None:
        """Take in a verified draft: its first `accepted` slots were right, and a tested one after
        them was wrong. Slots after that were never asked for."""
        seen = min(tested, accepted + 1)
        for slot in range(seen):
            right = slot < accepted
            self.slots[slot].add(right)
            if confidences is not None:
                self._bin(confidences[slot]).add(right)

    def _bin(self, confidence: float) -> Count:
        return self.bins[min(int(confidence * BINS), BINS - 1)]


class DraftLength:
    """Decides the draft length of each round, and learns from each.

    One object may serve many texts, and then starts warm.

    Args:
        longest (`int`): K - 1, the longest draft; 0 where there is no drafter, and only looked-up
            drafts are decided on.
        costs (`Costs`, *optional*): from an earlier run, frozen or not.

    Raises:
        ValueError: frozen costs lack a plain pass or drafting.
    """

    def __init__(self, longest: int, costs: Costs | None = None):
        self.costs = costs if costs is not None else Costs()
        unknown = longest > 0 and self.costs.drafting is None
        if self.costs.frozen and (0 not in self.costs.passes or unknown):
            # They would never be measured, and no round would be drafted.
            raise ValueError(
                f"the costs are frozen and hold passes of {sorted(self.costs.passes)} drafted"
                f" tokens and drafting {self.costs.drafting}: they need passes[0] (a plain pass)"
                " and drafting, in seconds. Let a run measure them first, or set frozen to False"
            )
        self.survival = Survival(longest)
        kept = [length for length in LENGTHS if length <= longest]
        # The whole block is always a candidate.
        self.lengths = sorted({*kept, longest})
        # decayed tokens and seconds, whose ratio is rho
        self.tokens = self.seconds = 0.0
        # what a drafted round brings beyond its seconds at the rate rho, averaged; in tokens
        self.value: float | None = None
        # plain rounds until the next probe, and the pause after a probe that fails
        self.waiting, self.pause = 0, 1
        self.spent = 0.0  # seconds of all rounds
        self.drafter, self.lookup = Account(), Account()

    # ---- before a round

    def wants_draft(self) -> bool:
        """Whether the drafter should run at all."""
        if 0 not in self.costs.passes or len(self.lengths) == 1:
            # The first round is plain: all that follows is measured against it. Or nobody drafts.
            return False
        if self.price(self.lengths[1]) > self.drafter.allowance(self.spent, self.costs.of_pass(0)):
            return False
        return self.looks_worthwhile() or self.waiting == 0

    def price(self, length: int, drafting: float | None = None) -> float:
        """Seconds that a drafted round loses where it brings its one own token alone. `drafting`:
        seconds of the drafter, where not its own."""
        if drafting is None:
            drafting = self.costs.drafting or 0.0
        return drafting + self.costs.of_pass(length) - self.costs.of_pass(0)

    def looks_worthwhile(self) -> bool:
        """Whether averages promise more from a drafted round than from a plain one."""
        if self.value is None:
            # Nothing was drafted yet: try.
            return True
        return self.promised() > 1 - self.rate() * self.costs.of_pass(0)

    def promised(self) -> float:
        """What a drafted round brings beyond what its seconds are worth, by averages; in tokens."""
        rate, survival = self.rate(), self.survival.of()
        length = self.best_length(survival, rate)
        seconds = self.costs.of_pass(length) + (self.costs.drafting or 0.0)
        expected = 1 + sum(survival[:length]) - rate * seconds
        if self.value is None:
            return expected
        return (expected + self.value) / 2

    def lookup_length(self, survival: Sequence[float], whole: bool = False) -> int:
        """How much of a looked-up draft to verify instead of running the drafter; 0 for none of it.

        Args:
            survival (`Sequence[float]`): S_1, S_2, ... of its tokens.
            whole (`bool`): all of it or nothing.
        """
        if 0 not in self.costs.passes:
            return 0
        rate = self.rate()
        shorter = (0,) if whole else LENGTHS
        lengths = [length for length in shorter if length < len(survival)] + [len(survival)]
        length = self.best_length(survival, rate, lengths, looks_up=True)
        if length == 0 or not self.wants_draft():
            # More than a plain round, and that would be the other choice.
            return length
        worth = 1 + sum(survival[:length]) - rate * self.costs.of_pass(length)
        return length if worth >= self.promised() else 0

    def rate(self) -> float:
        """rho, tokens a second; never below plain decoding's."""
        plain = 1 / self.costs.of_pass(0)
        if self.seconds == 0:
            return plain
        return max(self.tokens / self.seconds, plain)

    def best_length(
        self,
        survival: Sequence[float],
        rate: float,
        lengths: Sequence[int] | None = None,
        looks_up: bool = False,
    ) -> int:
        """The d with the most tokens beyond what its seconds are worth.

        All candidates are compared, because c(d) may be a staircase, which has several maxima.
        Those that the account does not cover are left out.
        """
        lengths = lengths or self.lengths
        account, drafting = (self.lookup, 0.0) if looks_up else (self.drafter, None)
        allowance = account.allowance(self.spent, self.costs.of_pass(0))
        if len(self.costs.passes) == 1:
            # Nothing is known of longer passes yet. A short one tells at little cost.
            lengths = [length for length in lengths if length <= FIRST_LENGTH]
        best, most = 0, -float("inf")
        for length in lengths:
            if length > 0 and self.price(length, drafting) > allowance:
                continue
            worth = 1 + sum(survival[:length]) - rate * self.costs.of_pass(length)
            if worth > most:
                best, most = length, worth
        return best

    def length(self, confidences: Sequence[float] | None = None) -> int:
        """How much of a draft to verify, once the drafter has run.

        Args:
            confidences (`Sequence[float]`, *optional*): the largest probability of each slot.
        """
        return self.best_length(self.survival.of(confidences), self.rate())

    # ---- after a round

    def learn(
        self,
        round: Round,
        *,
        pass_seconds: float,
        drafting_seconds: float | None = None,
        confidences: Sequence[float] | None = None,
    ) -> None:
        """Take in what a round cost and brought.

        Args:
            round (`Round`): what was drafted, tested, accepted and emitted.
            pass_seconds (`float`): of the target's pass.
            drafting_seconds (`float`, *optional*): of the drafter; `None` where it did not run.
            confidences (`Sequence[float]`, *optional*): as for `length`.
        """
        self.costs.learn(round.drafted, pass_seconds, drafting_seconds)
        if self.costs.frozen:
            pass_seconds = self.costs.of_pass(round.drafted)
            if drafting_seconds is not None:
                drafting_seconds = self.costs.drafting or 0.0
        seconds = pass_seconds + (drafting_seconds or 0.0)
        self.spent += seconds
        plain = self.costs.of_pass(0)
        if round.looked_up:
            # It says nothing of the drafter. Nor does rho count it: how many tokens can be looked
            # up does not depend on what is done between them.
            self.lookup.add(seconds - round.emitted * plain, plain)
            return
        if drafting_seconds is None:
            self.waiting = max(self.waiting - 1, 0)
        else:
            self.survival.learn(round.accepted, round.tested, confidences)
            self.drafter.add(seconds - round.emitted * plain, plain)
            self._learn_drafted(round.emitted, seconds)
        self.tokens = RATE_DECAY * self.tokens + round.emitted
        self.seconds = RATE_DECAY * self.seconds + seconds

    def _learn_drafted(self, emitted: int, seconds: float) -> None:
        plain, rate = self.costs.of_pass(0), self.rate()
        value = emitted - rate * seconds
        if self.value is None:
            self.value = value
        else:
            self.value = VALUE_DECAY * self.value + (1 - VALUE_DECAY) * value
        if value > 1 - rate * plain:
            self.waiting, self.pause = 0, 1
        else:
            self.waiting = self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
