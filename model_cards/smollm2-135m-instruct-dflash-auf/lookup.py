"""Drafts that cost nothing: what followed the text's last tokens where they occurred before.

Travels to the Hub: imports the standard library and its sibling. transformers has the same as
prompt lookup (`prompt_lookup_num_tokens`), without a drafter beside it and by a scan of the whole
text each pass.

A match is where the text's last n tokens also stand earlier: of the longest such n, up to 4, the
latest place, and as many tokens before it as agree too. Its m tokens say how much a continuation is
worth: the chance that the next token is right is learned by m. Once it was right the match is m + 1
long, so the chance of slot k is that of m + k - 1.

Letters: m tokens of a match, n tokens of an n-gram, S_k the chance that slot k is reached and is
right.
"""

from typing import NamedTuple

from .draft_length import Count, DraftLength, Round, Survival, products

SHORTEST, LONGEST = 2, 4  # n-grams that are indexed
BINS = 12  # of match lengths; longer ones count as the last
MOST_TOKENS = 15  # of a continuation
# The chance that the token after the shortest match is wrong, before anything is known, and what is
# left of it with each token of a longer one. Of 58,000 tokens that SmolLM2-135M-Instruct answered
# ShareGPT's questions with, 0.52, 0.66, 0.75, 0.82 were right after matches of 2, 4, 6 and 8.
DOUBT, DOUBT_DECAY = 0.5, 0.86
UNLIKELY = 0.25  # tokens that are reached and right less often are not verified, without costs


def check_lookup(lookup: int | str | bool) -> int | None:
    """The looked-up tokens of a round, `None` for as many as promise something.

    Raises:
        ValueError: it is neither "auto" nor a number of 1 or more.
    """
    if lookup is True or lookup == "auto":
        return None
    if type(lookup) is not int or lookup < 1:
        raise ValueError(
            f'lookup is {lookup!r}; it must be "auto", a number of tokens from 1 on, or False'
        )
    return lookup


class Continuation(NamedTuple):
    """What followed a match.

    Attributes:
        tokens (`list[int]`): the looked-up draft.
        match (`int`): tokens of the match, m.
    """

    tokens: list[int]
    match: int


class Lookup:
    """An index of a text that grows. A token costs the same work however long the text is.

    Memory: 12 MB at 32,000 random tokens (three dictionary entries each).
    """

    def __init__(self):
        self.text: list[int] = []
        # An n-gram, to the index behind its latest end. The n-gram at the very end of the text is
        # not in here yet, so that it finds an earlier one.
        self.ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Take in committed tokens."""
        text = self.text
        for token in tokens:
            end = len(text)
            for n in range(SHORTEST, LONGEST + 1):
                if end >= n:
                    self.ends[tuple(text[end - n :])] = end
            text.append(token)

    def continuation(self, most: int = MOST_TOKENS) -> Continuation | None:
        """What followed the longest match; `None` without one.

        Args:
            most (`int`): tokens at most.
        """
        text, size = self.text, len(self.text)
        for n in range(min(LONGEST, size), SHORTEST - 1, -1):
            start = self.ends.get(tuple(text[size - n :]))
            if start is None:
                continue
            match = n
            while match < BINS + SHORTEST and match < start:
                if text[start - 1 - match] != text[size - 1 - match]:
                    break
                match += 1
            # A text that repeats itself is followed by its own continuation.
            tokens = text[start : start + most]
            while len(tokens) < most:
                tokens.append(tokens[len(tokens) - (size - start)])
            return Continuation(tokens, match)
        return None


class LookupSurvival:
    """The chance that looked-up tokens are right, by the length of their match, learned as text is
    decoded."""

    def __init__(self):
        self.bins = [Count() for _ in range(BINS)]

    def of(self, found: Continuation) -> list[float]:
        """S_1, S_2, ...: the chance that each token is reached and right."""
        chances = []
        for slot in range(len(found.tokens)):
            match = found.match + slot
            prior = 1 - DOUBT * DOUBT_DECAY ** (min(match, SHORTEST + BINS) - SHORTEST)
            chances.append(self._bin(match).chance(prior))
        return products(chances)

    def learn(self, found: Continuation, committed: list[int]) -> None:
        """Compare a continuation with what was committed, whatever was drafted in that pass."""
        for slot, (looked_up, token) in enumerate(zip(found.tokens, committed)):
            right = looked_up == token
            self._bin(found.match + slot).add(right)
            if not right:
                break

    def _bin(self, match: int) -> Count:
        return self.bins[min(match - SHORTEST, BINS - 1)]


class LookupChoice:
    """Whether a round verifies what was looked up instead of running the drafter.

    With a [`DraftLength`] it compares tokens beyond what their seconds are worth. Without, it
    compares expected tokens, because no cost is known. One object may serve many texts, and then
    starts warm.

    Args:
        drafted (`int`): K - 1, the drafter's slots.
        tokens (`int`, *optional*): verify so many looked-up tokens, instead of as many as promise
            something.
    """

    def __init__(self, drafted: int, tokens: int | None = None):
        self.tokens = tokens
        self.longest = MOST_TOKENS if tokens is None else tokens
        self.survival = LookupSurvival()
        self.drafter = Survival(drafted)

    def length(self, found: Continuation, policy: DraftLength | None, slots: int) -> int:
        """How many looked-up tokens to verify; 0 to leave the round to the drafter.

        Args:
            policy (`DraftLength`, *optional*): decides by costs.
            slots (`int`): of the drafter that could be verified instead.
        """
        survival = self.survival.of(found)
        whole = self.tokens is not None
        if policy is not None:
            return policy.lookup_length(survival, whole)
        length = len(survival)
        if not whole:
            length = sum(chance >= UNLIKELY for chance in survival)
        if sum(survival[:length]) < sum(self.drafter.of()[:slots]):
            return 0
        return length

    def learn(self, round: Round, found: Continuation | None, committed: list[int]) -> None:
        """Take in a verified round, and what had been looked up before it."""
        if found is not None:
            self.survival.learn(found, committed)
        if round.drafted > 0 and not round.looked_up:
            self.drafter.learn(round.accepted, round.tested, None)
