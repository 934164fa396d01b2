"""A cache that a call with a drafter returned, given back: a chat feeds its new turn alone."""

import pickle
from copy import deepcopy

import pytest
import torch
from conftest import attach, make_drafter, make_target, random_prompts
from test_generate import GREEDY, PROMPT, pair
from test_hybrids import hybrid

import hf_specauf
from hf_specauf.drafters.transformers_internals import CACHE, past_of

pytestmark = pytest.mark.internals

ASKED = dict(return_dict_in_generate=True, output_logits=True)


def fed(target):
    """Tokens that each pass of a target reads."""
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].shape[1])

    return read, target.register_forward_pre_hook(note, with_kwargs=True)


def two_turns(target, drafter, prompt, change=lambda ids: ids, **options):
    """The second of two turns, with the cache given back and without; and tokens its prefill read."""
    with attach(target, drafter, **options) as attachment:
        first = target.generate(prompt, **GREEDY, **ASKED, assistant_model=drafter)
        turn = torch.cat([change(first.sequences), random_prompts(1, 5, seed=9)], dim=1)
        # else a pad token that the target wrote would be masked
        whole = dict(attention_mask=torch.ones_like(turn))
        again = target.generate(turn, **GREEDY, **ASKED, **whole, assistant_model=drafter)
        passes = len(attachment.generations[-1])
        read, handle = fed(target)
        onward = target.generate(turn, **GREEDY, **ASKED, **whole, assistant_model=drafter, **{CACHE: first[CACHE]})
        handle.remove()
    return again, onward, read[0], passes, attachment


@pytest.mark.own_parameters
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt2", "gpt_oss"])
def test_a_new_turn_is_read_alone_and_gives_what_feeding_all_again_gives(architecture):
    p = pair(architecture)
    again, onward, read, passes, attachment = two_turns(p.target, p.drafter, p.prompts[0])
    assert torch.equal(onward.sequences, again.sequences)
    torch.testing.assert_close(torch.cat(onward.logits), torch.cat(again.logits), rtol=0, atol=1e-5)
    # the last token of the first turn was not read then
    assert read == 5 + 1
    # the drafter knows what it knows where it has read all again
    assert len(attachment.generations[-1]) == passes
    for ours, its in zip(past_of(onward[CACHE]).cache.layers, past_of(again[CACHE]).cache.layers):
        torch.testing.assert_close(ours.keys, its.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, its.values, rtol=0, atol=1e-4)
    # and the cache goes on
    assert onward[CACHE].get_seq_length() == onward.sequences.shape[1] - 1


@pytest.mark.parametrize("options", [{}, {"draft_length": "auto", "lookup": "auto"}], ids=["whole blocks", "auto"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_hybrids_go_on_too(family, options):
    target = hybrid(family)
    again, onward, read, *_ = two_turns(target, make_drafter(target), random_prompts(1, PROMPT), **options)
    assert torch.equal(onward.sequences, again.sequences) and read == 5 + 1
    torch.testing.assert_close(torch.cat(onward.logits), torch.cat(again.logits), rtol=0, atol=1e-5)


def test_three_turns_with_a_drafter_that_read_nothing_for_a_while():
    p, cache = pair(), None
    text = p.prompts[0]
    with attach(p.target, p.drafter, skip_round=lambda rounds: len(rounds) % 4 != 3) as attachment:
        for seed in range(3):
            given = {} if cache is None else {CACHE: cache}
            found = p.target.generate(text, **GREEDY, **ASKED, assistant_model=p.drafter, **given)
            assert torch.equal(found.sequences, p.target.generate(text, **GREEDY))
            text, cache = torch.cat([found.sequences, random_prompts(1, 3, seed=seed)], dim=1), found[CACHE]
    assert any(round.accepted for round in attachment.rounds)


@pytest.mark.parametrize("kept", [1, PROMPT, PROMPT + 7])
def test_a_text_that_leaves_the_cached_one_is_read_from_there(kept):
    """A chat template may render an answer otherwise than it was written."""
    p = pair()
    again, onward, read, passes, attachment = two_turns(
        p.target,
        p.drafter,
        p.prompts[0],
        lambda ids: torch.cat([ids[:, :kept], (ids[:, kept : kept + 1] + 1) % 90], 1),
    )
    assert torch.equal(onward.sequences, again.sequences)
    assert read == 1 + 5 and len(attachment.generations[-1]) == passes


@pytest.mark.parametrize("target", [lambda: make_target("gemma3_text"), lambda: hybrid("qwen3_5_text")])
def test_windows_and_states_cannot_go_back(target):
    target = target()
    with pytest.raises(ValueError, match="leave the text in the cache given at token 3 .* no cache"):
        two_turns(target, make_drafter(target), random_prompts(1, PROMPT), lambda ids: ids[:, :3])


def test_a_prompt_that_is_all_in_the_cache_reads_its_last_token():
    p = pair()
    with attach(p.target, p.drafter):
        first = p.target.generate(p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter)
        read, handle = fed(p.target)
        again = p.target.generate(
            p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter, **{CACHE: first[CACHE]}
        )  # fmt: skip
        handle.remove()
    assert read[0] == 1 and torch.equal(again.sequences, p.plain[0])


def test_caches_of_others_are_refused():
    p = pair()
    other = deepcopy(p.drafter)
    turn = torch.cat([p.plain[0], random_prompts(1, 5)], dim=1)
    plain = p.target.generate(p.prompts[0], **GREEDY, **ASKED)
    with attach(p.target, p.drafter), attach(p.target, other):
        drafted = p.target.generate(p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter)
        gone_on = deepcopy(drafted[CACHE])
        p.target(turn, **{CACHE: gone_on})
        for cache, drafter in ((plain[CACHE], p.drafter), (drafted[CACHE], other), (gone_on, p.drafter)):
            with pytest.raises(ValueError, match="already holds tokens, .* pass the full conversation"):
                p.target.generate(turn, **GREEDY, assistant_model=drafter, **{CACHE: cache})
        # a copy serves as the original does, and leaves it as it is
        copy = deepcopy(drafted[CACHE])
        for cache in (copy, drafted[CACHE]):
            found = p.target.generate(turn, **GREEDY, assistant_model=p.drafter, **{CACHE: cache})
            assert torch.equal(found, p.target.generate(turn, **GREEDY))


def test_a_returned_cache_can_be_pickled_and_is_then_one_that_nobody_knows():
    p = pair()
    with attach(p.target, p.drafter):
        found = p.target.generate(p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter)
        sent = pickle.loads(pickle.dumps(found))
        assert torch.equal(sent.sequences, found.sequences)
        turn = torch.cat([sent.sequences, random_prompts(1, 5)], dim=1)
        with pytest.raises(ValueError, match="no call with this drafter left it so"):
            p.target.generate(turn, **GREEDY, assistant_model=p.drafter, **{CACHE: sent[CACHE]})
        plain = p.target.generate(turn, **GREEDY, **{CACHE: sent[CACHE]})
    assert torch.equal(plain, p.target.generate(turn, **GREEDY))


def test_new_ids_alone_and_texts_that_share_nothing_are_refused():
    p = pair()
    with attach(p.target, p.drafter):
        found = p.target.generate(p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter)
        new = random_prompts(1, 5, seed=9)
        given = {"assistant_model": p.drafter, CACHE: found[CACHE]}
        mask = torch.ones(1, found.sequences.shape[1] + 5, dtype=torch.long)
        with pytest.raises(ValueError, match="input_ids are 5 tokens and attention_mask 53: pass the full"):
            p.target.generate(new, **GREEDY, attention_mask=mask, **given)
        other = (p.prompts[0] + 1) % 90
        with pytest.raises(ValueError, match="at token 0 of 47, and it cannot go back so far"):
            p.target.generate(other, **GREEDY, **given)


def test_a_cache_whose_call_was_interrupted_is_refused():
    p = pair()

    def interrupt(ids, scores, **kwargs):
        raise KeyboardInterrupt

    with attach(p.target, p.drafter):
        first = p.target.generate(p.prompts[0], **GREEDY, **ASKED, assistant_model=p.drafter)
        turn = dict(inputs=torch.cat([first.sequences, random_prompts(1, 5)], dim=1), assistant_model=p.drafter)
        turn[CACHE] = first[CACHE]
        with pytest.raises(KeyboardInterrupt):
            p.target.generate(**turn, **GREEDY, stopping_criteria=[interrupt])
        with pytest.raises(ValueError, match="already holds tokens"):
            p.target.generate(**turn, **GREEDY)


def test_a_call_in_one_line_goes_on_too():
    p = pair()
    first = hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY, **ASKED)
    turn = torch.cat([first.sequences, random_prompts(1, 5)], dim=1)
    found = hf_specauf.generate(p.target, p.drafter, turn, **GREEDY, **{CACHE: first[CACHE]})
    assert torch.equal(found, p.target.generate(turn, **GREEDY))
