"""Replayed rounds are those of real decoding: the same accepted tokens, pass by pass."""

import pytest
import torch
from conftest import EOS, attach, make_domino, make_drafter, make_target, overfit, random_prompts

from hf_specauf.drafters.draft_length import Round
from hf_specauf.evaluation.ways import decoding_config
from hf_specauf.serving.replay import replay, walk
from hf_specauf.target import FrozenTarget

PROMPT, NEW = 12, 28


def plain(target, prompts: torch.Tensor) -> torch.Tensor:
    config = decoding_config(target, NEW, 1)
    return torch.cat([target.generate(row[None], generation_config=config) for row in prompts])


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(4, PROMPT)


@pytest.fixture(scope="module")
def texts(target, prompts):
    return plain(target, prompts)


@pytest.fixture(scope="module", params=["DFlash", "Domino", "Domino, slots not shifted, two uncorrected"])
def drafter(request, target, texts):
    """A half-trained drafter in float64: some of its blocks are right as a whole, and some not at all."""
    made = {
        "DFlash": lambda: make_drafter(target, block_size=4, layers=2),
        "Domino": lambda: make_domino(target, block_size=4),
        "Domino, slots not shifted, two uncorrected": lambda: make_domino(
            target, block_size=5, shift_label=False, pure_draft_prefix_len=2
        ),
    }[request.param]()
    return overfit(made, target, texts[:3], PROMPT, steps=50).to(torch.float64)


def decoded(target, drafter, prompts, ends: list[int] | None, **options) -> list[tuple[torch.Tensor, list[Round]]]:
    """Real assisted decoding -> each output with its rounds."""
    config = decoding_config(target, NEW, 1)
    config.eos_token_id = ends
    found = []
    with attach(target, drafter, **options) as attachment:
        for prompt in prompts:
            output = target.generate(prompt[None], generation_config=config, assistant_model=drafter)
            found.append((output, attachment.generations[-1]))
    return found


def test_replayed_rounds_are_those_of_decoding(target, drafter, prompts):
    frozen = FrozenTarget(target, drafter.config)
    lengths = set()
    for output, rounds in decoded(target, drafter, prompts, None):
        assert replay(frozen, drafter, output, prompt_tokens=PROMPT, max_new_tokens=NEW) == rounds
        lengths |= {one.accepted for one in rounds}
    assert {0, 1, drafter.config.block_size - 1} <= lengths  # or this test would prove little


def test_replay_ends_where_decoding_does(target, drafter, prompts, texts):
    """With two frequent tokens as ends: some passes accept an end among their drafts, some write it themselves."""
    frozen = FrozenTarget(target, drafter.config)
    ends = texts[:, PROMPT + 6 :].flatten().mode().values.item()
    cut = 0
    for output, rounds in decoded(target, drafter, prompts, [ends, EOS]):
        assert replay(frozen, drafter, output, prompt_tokens=PROMPT, max_new_tokens=NEW) == rounds
        cut += output.shape[1] < PROMPT + NEW
    assert cut


def test_replay_caps_drafts_as_decoding_does(target, drafter, prompts):
    frozen = FrozenTarget(target, drafter.config)
    for output, rounds in decoded(target, drafter, prompts[:2], None, draft_length=2):
        found = replay(frozen, drafter, output, prompt_tokens=PROMPT, max_new_tokens=NEW, draft_length=2)
        assert found == rounds and max(one.drafted for one in rounds) == 2


def test_walk_by_hand():
    # ten new tokens, of which the first is the prefill's; drafts of at most three
    assert walk([3, 0, 0, 0, 1, 9, 2, 9, 9], max_new_tokens=10, draft_length=3) == [
        Round(4, 3, 3, 3), Round(2, 1, 2, 3), Round(3, 2, 2, 2)
    ]  # fmt: skip
    # the text ended by itself: its last token was drafted and accepted, so no bonus came after it
    assert walk([0, 2, 1], max_new_tokens=10, draft_length=3) == [Round(1, 0, 1, 3), Round(2, 2, 2, 3)]
    # at the limit nothing can be drafted any more
    assert walk([0], max_new_tokens=2, draft_length=3) == [Round(1, 0, 0, 0)]
    assert walk([], max_new_tokens=1, draft_length=3) == []


def test_a_text_past_the_limit_is_refused(target, texts):
    drafter = make_drafter(target)
    frozen = FrozenTarget(target, drafter.config)
    with pytest.raises(ValueError, match=f"max_new_tokens {NEW - 1}: give the prompt and the whole greedy output"):
        replay(frozen, drafter, texts[:1], prompt_tokens=PROMPT, max_new_tokens=NEW - 1)
