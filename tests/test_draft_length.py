"""How long a draft should be: the policy in simulated worlds, with injected clocks, and its guarantee."""

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_specauf.drafters.draft_length import (
    ALLOWED_LOSS,
    ALLOWED_ROUNDS,
    LENGTHS,
    Costs,
    DraftLength,
    Round,
    Survival,
)

LONGEST = 15
DRAFTING = 0.23  # of a plain pass
SHAPES = {
    "flat": lambda d: 1.0,
    "steep": lambda d: 1 + 0.12 * d,
    "stairs": lambda d: 1 + 0.16 * (d // 8),
    "step": lambda d: 1 + 0.6 * (d > 0) + 0.01 * d,  # two CPU cores: products of many rows take another way
}


def chance(kind: str, position: int) -> float:
    """Of a slot to be accepted, on average."""
    if kind == "switching":  # code and prose in turn
        return 0.9 if position // 150 % 2 == 0 else 0.3
    return {"good": 0.875, "middling": 0.68}[kind]


def draw_slots(kind: str, position: int, count: int, rng: random.Random) -> list[tuple[float, float]]:
    """Of each slot the chance to be accepted, and the drafter's confidence."""
    if kind == "random":
        return [(1e-4, 0.3 * rng.random()) for _ in range(count)]
    mean = chance(kind, position)
    found = [rng.betavariate(4 * mean, 4 * (1 - mean)) for _ in range(count)]
    return [(one, one) for one in found]


def text(kind, shape, tokens, rng, policy=None, fixed=0, confident=True) -> tuple[int, float]:
    """Decode a text by a policy, or always with `fixed` drafted tokens -> tokens, seconds."""
    written, seconds = 0, 0.0
    while written < tokens:
        slots = draw_slots(kind, written, fixed if policy is None else LONGEST, rng)
        confidences = [confidence for _, confidence in slots] if confident else None
        drafts, length = fixed > 0, fixed
        if policy is not None:
            drafts = policy.wants_draft()
            length = policy.length(confidences) if drafts else 0
        accepted = 0
        while accepted < length and rng.random() < slots[accepted][0]:
            accepted += 1
        one, drafting = SHAPES[shape](length), DRAFTING if drafts else None
        seconds += one + (drafting or 0.0)
        written += accepted + 1
        if policy is not None:
            tested = min(accepted + 1, length)
            made = Round(accepted + 1, accepted, tested, length)
            known = confidences if drafts else None
            policy.learn(made, pass_seconds=one, drafting_seconds=drafting, confidences=known)
    return written, seconds


@cache
def rate(
    kind: str, shape: str, tokens: int, fixed: int | None = None, texts: int = 8, confident: bool = True
) -> float:
    """Tokens a plain pass's time over texts that share a policy, two seeds."""
    written = seconds = 0
    for seed in range(2):
        rng = random.Random(seed)
        policy = DraftLength(LONGEST) if fixed is None else None
        for _ in range(texts):
            one = text(kind, shape, tokens, rng, policy, fixed or 0, confident)
            written, seconds = written + one[0], seconds + one[1]
    return written / seconds


def best_fixed(kind: str, shape: str, tokens: int) -> float:
    return max(rate(kind, shape, tokens, fixed=length) for length in LENGTHS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_worthless_drafter_costs_no_more_than_three_percent(shape):
    assert rate("random", shape, 256, texts=1) > 0.97
    assert rate("random", shape, 256, texts=1, confident=False) > 0.97
    assert rate("random", shape, 256, fixed=LONGEST, texts=1) < 0.82


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["good", "middling"])
def test_it_is_as_fast_as_the_best_fixed_length_which_nobody_knows_before(kind, shape):
    assert rate(kind, shape, 256) > 0.95 * best_fixed(kind, shape, 256)
    assert rate(kind, shape, 256, confident=False) > 0.93 * best_fixed(kind, shape, 256)


@pytest.mark.parametrize("shape", ["steep", "stairs"])
def test_it_is_faster_than_any_fixed_length_where_code_and_prose_alternate(shape):
    assert rate("switching", shape, 600) > best_fixed("switching", shape, 600)


def test_a_drafter_that_becomes_good_is_found_again():
    policy, rng = DraftLength(LONGEST), random.Random(0)
    text("random", "steep", 400, rng, policy)
    written, seconds = text("good", "steep", 400, rng, policy)
    assert written / seconds > 0.85 * best_fixed("good", "steep", 256)


def looked_up_rate(kind: str | None, shape: str, lookup: bool = True, tokens: int = 512, seeds: int = 4) -> float:
    """Tokens a plain pass's time over texts of which a third can be looked up, in runs of some tokens. `kind`:
    of the drafter, `None` for none."""
    written = seconds = 0
    for seed in range(seeds):
        rng = random.Random(seed)
        policy, position = DraftLength(LONGEST if kind else 0), 0
        runs = random.Random(seed + 100)
        # of each token: how many after it stand earlier in the text
        there = []
        while len(there) < 2 * tokens:
            there += [0] * runs.randrange(8, 24) + list(range(runs.randrange(4, 12), 0, -1))
        while position < tokens:
            known = [0.75] * 10 if lookup and there[position] else []
            length = policy.lookup_length([0.75 ** (k + 1) for k in range(len(known))]) if known else 0
            accepted, drafting, confidences, looked_up = 0, None, None, length > 0
            if looked_up:
                accepted = min(there[position], length)
            elif policy.wants_draft():
                slots = draw_slots(kind, position, LONGEST, rng)
                confidences, drafting = [confidence for _, confidence in slots], DRAFTING
                length = policy.length(confidences)
                while accepted < length and rng.random() < slots[accepted][0]:
                    accepted += 1
            one = SHAPES[shape](length)
            made = Round(accepted + 1, accepted, min(accepted + 1, length), length, looked_up)
            policy.learn(made, pass_seconds=one, drafting_seconds=drafting, confidences=confidences)
            position += accepted + 1
            seconds += one + (drafting or 0.0)
        written += position
    return written / seconds


@pytest.mark.parametrize("shape", SHAPES)
def test_a_worthless_drafter_costs_lookups_nothing_and_a_good_one_and_lookups_help_each_other(shape):
    alone = looked_up_rate(None, shape)
    assert alone > 1.05
    assert looked_up_rate("random", shape) > 0.97 * alone
    for kind in ("middling", "good"):
        assert looked_up_rate(kind, shape) > 0.98 * max(alone, looked_up_rate(kind, shape, lookup=False))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, LONGEST), st.lists(st.floats(0, 1), min_size=15, max_size=15)), max_size=150),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_drafting_never_loses_more_than_its_account_allows(worlds, drafting, slope):
    """Whatever is accepted, and however confident the drafter is, where costs are as they were measured."""
    known = {length: 1 + slope * length for length in LENGTHS}
    policy = DraftLength(LONGEST, Costs(known, drafting=drafting, frozen=True))
    lost = spent = 0.0
    for right, confidences in worlds:
        drafts = policy.wants_draft()
        length = policy.length(confidences) if drafts else 0
        accepted = min(right, length)
        policy.learn(
            Round(accepted + 1, accepted, min(accepted + 1, length), length),
            pass_seconds=99.0,  # frozen costs stand for the clock
            drafting_seconds=99.0 if drafts else None,
            confidences=confidences if drafts else None,
        )
        seconds = known[length] + (drafting if drafts else 0.0)
        spent += seconds
        lost += seconds - (accepted + 1)
        assert lost <= ALLOWED_LOSS * spent + ALLOWED_ROUNDS + 1e-9


def test_the_first_round_is_plain_and_the_first_draft_short():
    policy = DraftLength(LONGEST)
    assert not policy.wants_draft()
    policy.learn(Round(1, 0, 0, 0), pass_seconds=1.0)
    assert policy.wants_draft()
    assert policy.length([0.99] * LONGEST) == 7


def test_costs_between_and_beyond_measured_lengths_lie_on_a_line_that_never_falls():
    costs = Costs({0: 1.0, 3: 1.3})
    assert costs.of_pass(1) == pytest.approx(1.1)
    assert costs.of_pass(15) == pytest.approx(2.5)
    assert Costs({0: 1.0}).of_pass(7) == 1.0
    assert Costs({0: 1.0, 3: 0.9}).of_pass(15) == 1.0
    # the step of a CPU: what the nearest two say of longer ones is far too much
    assert Costs({0: 1.0, 1: 1.6, 7: 1.7}).of_pass(15) == pytest.approx(2.5)
    assert Costs({3: 1.3, 7: 1.7}).of_pass(0) == 1.3
    with pytest.raises(ValueError, match="the first round is plain"):
        Costs().of_pass(0)


def test_one_stall_of_the_machine_moves_a_cost_by_five_percent():
    costs = Costs()
    costs.learn(0, 1.0, None)
    costs.learn(0, 60.0, None)
    assert costs.passes[0] == pytest.approx(1.05)


def test_overconfidence_is_unlearned():
    survival = Survival(1)
    assert survival.of([0.95]) == [pytest.approx(0.95)]
    rng = random.Random(0)
    for _ in range(400):
        survival.learn(int(rng.random() < 0.3), 1, [0.95])
    assert survival.of([0.95])[0] == pytest.approx(0.3, abs=0.1)
    assert survival.of()[0] == pytest.approx(0.3, abs=0.1)
    assert survival.of([0.15]) == [pytest.approx(0.15)]


def test_without_slots_nothing_is_drafted_and_lookups_are_decided_on():
    policy = DraftLength(0)
    for _ in range(3):
        policy.learn(Round(1, 0, 0, 0), pass_seconds=1.0)
    assert not policy.wants_draft()
    assert policy.lookup_length([0.9, 0.8]) == 2
    policy.learn(Round(1, 0, 1, 2, True), pass_seconds=1.5)
    assert policy.lookup_length([0.1, 0.01]) == 0


@pytest.mark.parametrize(
    "costs", [Costs(frozen=True), Costs({0: 1.0}, frozen=True), Costs({3: 1.0}, 0.1, frozen=True)]
)
def test_frozen_costs_by_which_nothing_would_ever_be_drafted_are_refused(costs):
    with pytest.raises(ValueError, match=r"need passes\[0\] .* and drafting"):
        DraftLength(LONGEST, costs)
