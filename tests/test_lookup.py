"""Looked-up drafts: found with the same work however long the text is, lossless, taken where they promise more."""

import random

import pytest
import torch
from conftest import attach, make_domino, make_drafter, make_target, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from test_generate import GREEDY, PROMPT, Enough, K, pair, plain, sampled_p_value, sampling_pair
from transformers.generation import LogitsProcessorList

import hf_specauf
from hf_specauf.drafters.draft_length import ALLOWED_LOSS, ALLOWED_ROUNDS, Costs, DraftLength, Round
from hf_specauf.drafters.drafts import BlockDrafts
from hf_specauf.drafters.lookup import BINS, LONGEST, SHORTEST, Continuation, Lookup, LookupChoice, LookupSurvival
from hf_specauf.drafters.transformers_internals import CACHE
from hf_specauf.drafters.verification import Draft, Verifier

pytestmark = pytest.mark.internals


def slow_continuation(text: list[int], most: int) -> Continuation | None:
    """The same by a scan: the longest of the last n-grams that stands earlier, its latest place, its whole match."""
    for n in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        starts = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
        if starts:
            start, match = starts[-1], n
            while match < min(BINS + SHORTEST, start) and text[start - 1 - match] == text[-1 - match]:
                match += 1
            told = list(text)
            for _ in range(most):
                told.append(told[start + len(told) - len(text)])
            return Continuation(told[len(text) :], match)
    return None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9), st.data())
def test_what_is_found_is_what_a_scan_of_the_text_finds(text, most, data):
    lookup, cut = Lookup(), data.draw(st.integers(0, len(text)))
    lookup.extend(text[:cut])
    lookup.extend(text[cut:])
    assert lookup.continuation(most) == slow_continuation(text, most)


def test_a_token_costs_the_same_work_at_the_end_of_a_long_text():
    class Counted(dict):
        touched = 0

        def __setitem__(self, key, value):
            Counted.touched += 1
            super().__setitem__(key, value)

        def get(self, key):
            Counted.touched += 1
            return super().get(key)

    numbers, lookup, work = random.Random(0), Lookup(), []
    lookup.ends = Counted()
    for size in (100, 32_000):
        lookup.extend([numbers.randrange(500) for _ in range(size - len(lookup.text))])
        Counted.touched = 0
        for _ in range(50):
            lookup.continuation()
            lookup.extend([numbers.randrange(500)])
        work.append(Counted.touched)
    assert max(work) <= 50 * 2 * (LONGEST - SHORTEST + 1)
    assert len(lookup.ends) <= (LONGEST - SHORTEST + 1) * len(lookup.text)


def test_chances_are_learned_by_the_length_of_the_match():
    survival = LookupSurvival()
    short, long = Continuation([5, 6, 7], 2), Continuation([5, 6, 7], 8)
    before = survival.of(short), survival.of(long)
    assert before[0][0] < before[1][0] and before[0] == sorted(before[0], reverse=True)
    for _ in range(60):
        survival.learn(short, [9, 6, 7])  # wrong at once: nothing is learned of what comes after
        survival.learn(long, [5, 6, 7])
    assert survival.of(short)[0] < 0.1 and survival.of(long)[-1] > 0.8
    assert survival.bins[1].tested == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=20, max_size=60), st.booleans())
def test_what_lookups_lose_stays_within_the_bound_of_the_account(rounds, whole):
    policy = DraftLength(15, Costs({0: 1.0, 1: 1.2, 15: 6.0}, drafting=0.3, frozen=True))
    choice = LookupChoice(15, 15 if whole else None)
    policy.learn(Round(1, 0, 0, 0), pass_seconds=1.0)
    lost = 0.0
    for match, right in rounds:
        found = Continuation(list(range(15)), match + SHORTEST)
        length = choice.length(found, policy, 15)
        assert length in (0, 15) or not whole
        accepted = length if right else 0
        round = Round(accepted + 1, accepted, min(accepted + 1, length), length, length > 0)
        choice.learn(round, found, list(range(accepted)) + [99])
        lost += policy.costs.of_pass(length) - round.emitted
        policy.learn(round, pass_seconds=0.0)
        assert lost <= ALLOWED_ROUNDS + ALLOWED_LOSS * policy.spent + 1e-9


def test_looking_up_is_compared_with_as_many_slots_as_the_drafter_would_verify():
    choice = LookupChoice(15)
    for i in range(100):
        choice.learn(Round(2, 1, 1, 1) if i % 5 else Round(1, 0, 1, 1), Continuation([1], 9), [1])
    assert choice.length(Continuation([1], 9), None, slots=1) == 1
    assert choice.length(Continuation([1], 9), None, slots=15) == 0


@pytest.mark.parametrize("cap", [dict(draft_length=K - 1), dict(num_assistant_tokens=K - 1)])
def test_a_cap_that_equals_a_block_is_a_cap(cap):
    p = pair()
    prompt = torch.cat([p.plain[0], p.prompts[0]], dim=1)
    attached = {key: value for key, value in cap.items() if key == "draft_length"}
    call = {key: value for key, value in cap.items() if key != "draft_length"}
    with attach(p.target, p.drafter, lookup=15, **attached) as attachment:
        p.target.generate(prompt, **GREEDY, **call, assistant_model=p.drafter)
    assert max(r.drafted for r in attachment.rounds) == K - 1
    with pytest.raises(ValueError, match="draft_length is True"):
        attach(p.target, p.drafter, draft_length=True)


# ---- decoding


@pytest.mark.own_parameters
@pytest.mark.parametrize("length", [None, 2, "auto"])
@pytest.mark.parametrize("lookup", ["auto", True, 1, 5])
def test_greedy_text_is_the_targets_own_with_drafts_from_both(lookup, length):
    p = pair()
    options = dict(draft_length=length, lookup=lookup)
    if length == "auto":
        options["costs"] = Costs({0: 1.0, 1: 1.05, 3: 1.1}, drafting=0.2, frozen=True)
    with attach(p.target, p.drafter, **options) as attachment:
        for prompt, expected in zip(p.prompts, p.plain):
            repeated = torch.cat([expected, expected[:, :PROMPT]], dim=1)
            for given in (prompt, repeated):
                output = p.target.generate(given, **GREEDY, assistant_model=p.drafter)
                assert torch.equal(output, plain(p, given))
    looked_up = [r for r in attachment.rounds if r.looked_up]
    assert looked_up and sum(r.accepted for r in looked_up) > len(looked_up) / 2
    assert any(not r.looked_up and r.drafted for r in attachment.rounds)
    longest = {None: 15, 2: 2, "auto": 15}[length]
    if isinstance(lookup, int) and lookup is not True:
        longest = min(longest, lookup)
    assert max(r.drafted for r in looked_up) <= longest


def test_length_and_lookup_are_decided_by_what_pays_where_nobody_says():
    p = pair()
    with hf_specauf.attach(p.target, p.drafter) as attachment:
        for prompt, text in zip(p.prompts, p.plain):
            assert torch.equal(p.target.generate(prompt, **GREEDY, assistant_model=p.drafter), text)
    assert attachment.costs.passes[0] > 0  # the first round is plain
    assert isinstance(attachment.lookup, LookupChoice)
    assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY), p.plain[0])


@pytest.mark.parametrize(
    ("options", "drafted"),
    [({}, 0), (dict(draft_length=None, lookup=False), K - 1), (dict(draft_length=1, lookup=2), 1)],
    ids=["by default", "whole blocks", "numbers"],
)
def test_what_the_hubs_generate_drafts_can_be_said_and_is_learned_from_call_to_call(options, drafted, monkeypatch):
    target = make_target()
    drafter = make_domino(target)
    prompt = random_prompts(1, PROMPT)
    kept = []
    own = BlockDrafts.learn
    monkeypatch.setattr(BlockDrafts, "learn", lambda self, *args: (own(self, *args), kept.append(self))[0])
    expected = target.generate(prompt, **GREEDY)
    for _ in range(2):
        assert torch.equal(drafter.generate_for(target, prompt, **options, **GREEDY), expected)
    first, last = kept[0], kept[-1]
    assert first is not last
    assert (first.draft_length is last.draft_length) and (first.draft_length is None) == bool(options)
    assert (first.lookup is None) == (options.get("lookup") is False)
    assert first.rounds[0].drafted == drafted


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_without_a_drafter_drafts_are_looked_up_alone(architecture):
    p = pair(architecture)
    with hf_specauf.attach(p.target, None, lookup=5, draft_length=None) as attachment:
        for prompt, text in zip(p.prompts, p.plain):
            assert torch.equal(p.target.generate(prompt, **GREEDY, assistant_model=attachment.drafter), text)
        first = p.target.generate(
            p.prompts[0], **GREEDY, assistant_model=attachment.drafter, return_dict_in_generate=True
        )
        turn = torch.cat([first.sequences, random_prompts(1, 5)], dim=1)
        given = {CACHE: first[CACHE], "assistant_model": attachment.drafter}
        assert torch.equal(p.target.generate(turn, **GREEDY, **given), p.target.generate(turn, **GREEDY))
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=attachment.drafter, num_assistant_tokens=2)
    assert max(round.drafted for round in attachment.generations[-1]) == 2
    assert max(round.drafted for round in attachment.rounds) == 5
    assert all(round.looked_up == (round.drafted > 0) for round in attachment.rounds)
    assert 0 < sum(round.accepted for round in attachment.rounds)
    assert torch.equal(hf_specauf.generate(p.target, None, p.prompts[0], **GREEDY), p.plain[0])
    assert not hasattr(type(p.target), "_attached_drafters")
    # and a chat goes on, call by call
    first = hf_specauf.generate(p.target, None, p.prompts[0], **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, random_prompts(1, 5)], dim=1)
    onward = hf_specauf.generate(p.target, None, turn, **GREEDY, **{CACHE: first[CACHE]})
    assert torch.equal(onward, p.target.generate(turn, **GREEDY))


def test_costs_of_lookups_alone_can_be_frozen():
    p = pair()
    with hf_specauf.attach(p.target, None) as attachment:
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=attachment.drafter)
    attachment.costs.frozen = True
    with hf_specauf.attach(p.target, None, costs=attachment.costs) as again:
        found = p.target.generate(p.prompts[0], **GREEDY, assistant_model=again.drafter)
    assert torch.equal(found, p.plain[0])


def test_virtual_tokens_are_refused_without_a_drafter_too():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    target = get_peft_model(make_target(), settings)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        hf_specauf.attach(target, None)


def test_without_drafter_and_lookup_there_is_nothing_to_draft_with():
    with pytest.raises(ValueError, match="give a drafter, or leave out lookup=False"):
        hf_specauf.attach(pair().target, None, lookup=False)
    with pytest.raises(ValueError, match="lookup=3 says how many"):
        hf_specauf.attach(pair().target, None, draft_length=3)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (dict(draft_length=K), r"must be in 1\.\.3"),
        (dict(draft_length="most"), 'or "auto"'),
        (dict(lookup=0), "or False"),
    ],
)
def test_the_hubs_generate_refuses_what_attach_refuses(options, advice):
    target = make_target()
    with pytest.raises(ValueError, match=advice):
        make_domino(target).generate_for(target, random_prompts(1, PROMPT), **options, **GREEDY)


def test_without_lookup_nothing_is_looked_up():
    p = pair()
    with attach(p.target, p.drafter) as attachment:
        p.target.generate(p.plain[0], **GREEDY, assistant_model=p.drafter)
    assert not any(r.looked_up for r in attachment.rounds)


def test_acceptance_is_the_drafters_own_where_longer_drafts_were_looked_up():
    p, drafter = pair(), make_drafter(pair().target, K, dtype=torch.float64)
    prompt = torch.cat([p.plain[0]] * 2, dim=1)
    with attach(p.target, drafter, lookup="auto") as attachment:
        for given in (prompt, torch.cat([p.plain[1]] * 2, dim=1), p.prompts[2]):
            p.target.generate(given, **GREEDY, assistant_model=drafter)
    assert max(r.accepted for r in attachment.rounds if r.looked_up) > K - 1  # more than the drafter has slots
    own = [r for r in attachment.rounds if not r.looked_up]
    acceptance = attachment.acceptance()
    assert 0 < acceptance.passes == len(own) < len(attachment.rounds)
    assert acceptance.tokens == sum(r.emitted for r in own)


@pytest.mark.parametrize("make", [make_drafter, make_domino])
def test_taps_of_looked_up_rounds_reach_the_drafter(make):
    """A drafter that skipped rounds drafts what it would have drafted with all of the context."""
    target = make_target()
    drafter = make(target, K, dtype=torch.float64)
    prompt = random_prompts(1, PROMPT)
    text = target.generate(prompt, **GREEDY)
    prompt = torch.cat([text, prompt], dim=1)
    hidden = {}
    for lookup in (False, "auto"):
        seen = hidden[lookup] = {}

        def keep(module, args, kwargs, output, seen=seen):
            seen[int(kwargs["position_ids"][0, -K])] = output.last_hidden_state[0]

        handle = drafter.register_forward_hook(keep, with_kwargs=True)
        with attach(target, drafter, lookup=lookup) as attachment:
            target.generate(prompt, **GREEDY, assistant_model=drafter)
        handle.remove()
    assert any(r.looked_up for r in attachment.rounds)
    both = hidden[False].keys() & hidden["auto"].keys()
    assert len(both) > 3
    for anchor in both:
        torch.testing.assert_close(hidden[False][anchor], hidden["auto"][anchor], rtol=0, atol=1e-10)


def test_a_stopping_criterion_within_a_looked_up_draft_stops_where_plain_decoding_does():
    p, stopped = pair(), 0
    drafter = make_drafter(p.target, K, dtype=torch.float64)  # so bad that looking up promises more
    for expected in p.plain:
        prompt = torch.cat([expected, expected[:, :PROMPT]], dim=1)
        expected = plain(p, prompt)
        with attach(p.target, drafter, lookup="auto") as attachment:
            p.target.generate(prompt, **GREEDY, assistant_model=drafter)
        at = prompt.shape[1] + 1
        for r in attachment.rounds:
            if r.looked_up and r.accepted > 2:
                stop = dict(stopping_criteria=[Enough(at + 2)])
                output = hf_specauf.generate(p.target, drafter, prompt, lookup="auto", **GREEDY, **stop)
                assert torch.equal(output, expected[:, : at + 2])
                stopped += 1
            at += r.emitted
    assert stopped


@pytest.mark.own
def test_sampled_text_follows_its_distribution_with_lookup():
    p_value, accepted = sampled_p_value(sampling_pair()[1], 500, 1.0, 0, lookup="auto")
    assert p_value > 1e-3
    assert 0.1 < accepted < 0.9


def point_mass_counts(draws: int, way: str = "one_by_one"):
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 6)
    verify = Verifier(LogitsProcessorList(), True, False)
    tokens = logits[:, :1].argmax(-1)  # (1, 1), the likeliest
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[getattr(verify, way)(logits, Draft(tokens), ids).tokens[0]] += 1
    return chisquare(counts, logits[0, 0].softmax(-1) * draws).pvalue


@pytest.mark.parametrize("way", ["one_by_one", "all_at_once"])
def test_a_looked_up_token_is_accepted_with_the_targets_own_probability(way):
    assert point_mass_counts(3000, way) > 1e-3


def test_a_wrong_rule_for_looked_up_tokens_is_detected(monkeypatch):
    """As if it had been drawn from the target: always accepted."""
    monkeypatch.setattr(Draft, "probabilities", lambda self, like: like.new_full((1, 6), 1e-9))
    assert point_mass_counts(500) < 1e-6


@pytest.mark.parametrize("lookup", [0, -1, "always", 1.5])
def test_a_lookup_that_is_none_names_what_may_stand_there(lookup):
    p = pair()
    with pytest.raises(ValueError, match=r'it must be "auto", a number of tokens from 1 on, or False'):
        attach(p.target, p.drafter, lookup=lookup)
