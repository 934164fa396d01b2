"""The loop's own claims: little work of the host, criteria asked of each token, what a call returns, threads."""

import sys
import threading
import time
from collections import Counter
from copy import deepcopy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import attach, make_domino, make_drafter, make_target, overfit, random_prompts
from host_work import HostWork
from scipy.stats import chisquare
from test_generate import GREEDY, NEW, PROMPT, inside_a_draft, pair, plain, sampled_p_value, sampling_pair, state_of
from transformers import GenerationMixin, StoppingCriteria
from transformers.generation import (
    LogitsProcessorList,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import hf_specauf
from hf_specauf.drafters.drafts import Extended, counted, padding
from hf_specauf.drafters.loop import Decoding, LeanPasses
from hf_specauf.drafters.overrides import DraftingOverrides
from hf_specauf.drafters.target_parts import pass_mode
from hf_specauf.drafters.transformers_internals import CACHE
from hf_specauf.drafters.verification import Draft, Verifier

pytestmark = pytest.mark.internals


def test_a_greedy_round_takes_twelve_operations_and_one_look_beside_the_two_passes(monkeypatch):
    p, rounds = pair(), []
    work = HostWork(p.target, p.drafter)
    own = Decoding._round

    def counted_round(self):
        before = work.operations.total(), work.looks
        with work.counting():
            own(self)
        rounds.append((work.operations.total() - before[0], work.looks - before[1]))

    monkeypatch.setattr(Decoding, "_round", counted_round)
    with work.leaving_out(), attach(p.target, p.drafter):
        output = p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
    assert torch.equal(output, p.plain[0]) and len(rounds) > 8
    # Ids and positions are made longer once in many tokens, which the worst round pays.
    assert sorted(count for count, _ in rounds)[-3] <= 12, work.operations
    assert {looks for _, looks in rounds} == {1}


def test_rows_that_go_on_are_made_longer_seldom_and_keep_what_they_were():
    start = torch.tensor([[3, 4, 5]])
    rows = Extended(start, counted)
    assert torch.equal(rows.upto(5), torch.tensor([[3, 4, 5, 6, 7]]))
    held = rows.rows
    assert rows.upto(250).shape == (1, 250) and rows.rows is held
    assert torch.equal(rows.upto(700)[0], torch.arange(3, 703)) and rows.rows is not held
    assert torch.equal(start, torch.tensor([[3, 4, 5]]))
    axes = Extended(torch.tensor([[[0, 1]], [[7, 9]]]), counted)  # (axes, 1, S)
    assert axes.upto(4).tolist() == [[[0, 1, 2, 3]], [[7, 9, 10, 11]]]


def test_plain_text_on_a_common_target_takes_the_lean_passes_and_others_prepare_their_own(monkeypatch):
    p, kinds = pair(), []
    own = Decoding.run
    monkeypatch.setattr(Decoding, "run", lambda self: kinds.append(type(self.passes)) or own(self))
    assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY), p.plain[0])

    class Careful(type(p.target)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    careful = deepcopy(p.target)
    careful.__class__ = Careful
    assert torch.equal(hf_specauf.generate(careful, p.drafter, p.prompts[0], **GREEDY), p.plain[0])
    assert [kind is LeanPasses for kind in kinds] == [True, False]
    # padded on the left, which the mask tells
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), p.prompts[0]], dim=1)
    mask = (torch.arange(PROMPT + 3) >= 3).long()[None]
    for target in (p.target, careful):
        output = hf_specauf.generate(target, p.drafter, padded, attention_mask=mask, **GREEDY)
        assert torch.equal(output[:, 3:], p.plain[0])


# ---- criteria, streamer, scores


class Watching(StoppingCriteria):
    """Notes the text and the scores that it is asked with, and stops at a token."""

    def __init__(self, token: int | None = None):
        self.token = token
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append((input_ids[0].tolist(), None if scores is None else torch.cat(scores).clone()))
        return torch.tensor([self.token is not None and int(input_ids[0, -1]) == self.token])


class Tokens(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


def watched(p, **more):
    """A call that ends inside a draft -> output, what its criterion saw, what its streamer saw."""
    token = int(p.plain[0][0, inside_a_draft(p)])
    watching, streamer = Watching(token), Tokens()
    output = p.target.generate(
        p.prompts[0], **GREEDY, stopping_criteria=[watching], streamer=streamer, return_dict_in_generate=True,
        output_scores=True, output_logits=True, **more,
    )  # fmt: skip
    return output, watching.asked, streamer


def test_criteria_streamer_and_scores_see_what_they_see_in_plain_decoding():
    p = pair()
    expected, asked, streamer = watched(p)
    with attach(p.target, p.drafter) as attachment:
        output, drafted_asked, drafted_streamer = watched(p, assistant_model=p.drafter)
    assert attachment.rounds[-1].emitted == attachment.rounds[-1].accepted  # within a draft
    assert torch.equal(output.sequences, expected.sequences)
    assert drafted_streamer.seen == streamer.seen == expected.sequences[0].tolist() and drafted_streamer.ended
    assert [text for text, _ in drafted_asked] == [text for text, _ in asked]
    for (_, found), (_, wanted) in zip(drafted_asked, asked):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for found, wanted in ((output.scores, expected.scores), (output.logits, expected.logits)):
        assert len(found) == len(wanted) == expected.sequences.shape[1] - PROMPT
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=0, atol=1e-5)


def test_scores_of_processed_logits_are_those_of_plain_decoding_and_raw_ones_stay_raw():
    p = pair()
    options = dict(
        GREEDY, repetition_penalty=1.3, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    expected = p.target.generate(p.prompts[1], **options)
    output = hf_specauf.generate(p.target, p.drafter, p.prompts[1], **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(output.scores), torch.cat(expected.scores), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(output.logits), torch.cat(expected.logits), rtol=0, atol=1e-5)


def test_the_cache_that_is_returned_holds_all_but_the_last_token_and_can_be_gone_on_with():
    p = pair()
    output = hf_specauf.generate(p.target, p.drafter, p.prompts[2], **GREEDY, return_dict_in_generate=True)
    cache = output[CACHE]
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    more = p.target.generate(output.sequences, do_sample=False, max_new_tokens=6, **{CACHE: cache})
    assert torch.equal(more, plain(p, p.prompts[2], max_new_tokens=NEW + 6))


def test_a_time_limit_ends_a_call_between_two_passes():
    p = pair()
    slow = p.target.register_forward_hook(lambda *_: time.sleep(0.05))
    try:
        output = hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY, max_time=0.2)
    finally:
        slow.remove()
    assert PROMPT < output.shape[1] < PROMPT + NEW
    assert torch.equal(output, p.plain[0][:, : output.shape[1]])


def test_a_prompt_that_is_read_in_chunks_is_drafted_for_alike():
    p = pair()
    with attach(p.target, p.drafter) as attachment:
        output = p.target.generate(p.prompts[0], **GREEDY, prefill_chunk_size=5, assistant_model=p.drafter)
    assert torch.equal(output, p.plain[0])
    assert attachment.rounds == p.assisted[0][1]


class Asking(StoppingCriteria):
    """A reward model, say: calls the target itself, in ways of its own."""

    def __init__(self, target, call):
        self.target = target
        self.call = call

    def __call__(self, input_ids, scores, **kwargs):
        self.call(self.target, input_ids)
        return False


@pytest.mark.parametrize("call", [
    lambda target, ids: target(ids),
    lambda target, ids: target(ids.repeat(2, 1)),
    lambda target, ids: target.generate(ids, max_new_tokens=2, do_sample=False),
], ids=["pass", "batch", "generate"])  # fmt: skip
def test_passes_that_a_criterion_makes_are_not_taken_for_the_loops_own(call):
    p = pair()
    with attach(p.target, p.drafter) as attachment:
        asking = [Asking(p.target, call)]
        output = p.target.generate(p.prompts[0], **GREEDY, stopping_criteria=asking, assistant_model=p.drafter)
    assert torch.equal(output, p.plain[0])
    assert attachment.rounds == p.assisted[0][1]


def test_a_users_own_limit_of_length_stands_in_the_place_of_the_calls():
    p = pair()
    for longer in (PROMPT + 9, PROMPT + 3):
        keys = dict(do_sample=False, max_new_tokens=5, stopping_criteria=[MaxLengthCriteria(longer)])
        expected = p.target.generate(p.prompts[0], **keys)
        assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[0], **keys), expected)


def test_ids_of_another_dtype_give_what_plain_decoding_gives():
    p = pair()
    prompt = p.prompts[0].int()
    output = hf_specauf.generate(p.target, p.drafter, prompt, **GREEDY)
    assert output.dtype == plain(p, prompt).dtype and torch.equal(output, p.plain[0])


def test_a_preparation_of_the_objects_own_is_kept_to():
    target, p, asked = make_target(), pair(), []
    own = target.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        asked.append(1)
        return own(*args, **kwargs)

    target.prepare_inputs_for_generation = prepare
    with attach(target, p.drafter) as attachment:
        output = target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
    assert torch.equal(output, p.plain[0]) and len(asked) == 1 + len(attachment.rounds)


def test_what_keeps_a_state_of_rejected_tokens_or_hides_ids_is_refused():
    p = pair()
    free = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, p.target)
    with pytest.raises(ValueError, match="rejected ones too: the output would be silently wrong"):
        hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY, logits_processor=LogitsProcessorList([free]))
    embeds = p.target.get_input_embeddings()(p.prompts[0])
    with pytest.raises(ValueError, match="inputs_embeds are 12 tokens long and input_ids 1: .* pass ids of all"):
        hf_specauf.generate(p.target, p.drafter, p.prompts[0][:, -1:], inputs_embeds=embeds, **GREEDY)


def test_a_target_whose_inner_model_is_compiled_is_tapped():
    p, target = pair(), make_target()
    target.model.compile(backend="eager")
    try:
        output = hf_specauf.generate(target, p.drafter, p.prompts[0], do_sample=False, max_new_tokens=6)
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            hf_specauf.generate(target, p.drafter, p.prompts[0], max_new_tokens=6, prefill_chunk_size=5)
    finally:
        torch.compiler.reset()
    assert torch.equal(output, p.plain[0][:, : PROMPT + 6])


# ---- sampling, all rows at once


def choices(verify, logits, draft_logits, draws: int) -> torch.Tensor:
    """Counts of the first committed token, (V,), where drafts are drawn from what they claim."""
    counts = torch.zeros(logits.shape[-1])
    ids = torch.zeros(1, 4, dtype=torch.long)
    for _ in range(draws):
        tokens = torch.multinomial(draft_logits[0].softmax(-1), 1).T
        counts[verify(logits, Draft(tokens, draft_logits), torch.cat([ids, tokens], dim=1)).tokens[0]] += 1
    return counts


@pytest.mark.own
@pytest.mark.parametrize("way", ["one_by_one", "all_at_once"])
def test_both_ways_to_verify_a_sampled_draft_follow_the_targets_distribution(way):
    torch.manual_seed(0)
    logits, draft_logits = torch.randn(1, 3, 6) * 1.5, torch.randn(1, 2, 6) * 1.5
    processor = LogitsProcessorList([TemperatureLogitsWarper(1.4), TopKLogitsWarper(5)])
    verify = Verifier(processor, True, False)
    assert verify.scores_alone
    counts = choices(getattr(verify, way), logits, draft_logits, 4000)
    expected = processor(torch.zeros(1, 4), logits[:, 0].clone()).softmax(-1)[0]
    assert counts[expected == 0] == 0
    used = expected > 0
    assert chisquare(counts[used], expected[used] * 4000).pvalue > 1e-3


def test_a_draft_that_equals_the_target_is_accepted_whole_in_both_ways():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 9)
    tokens = torch.multinomial(logits[0, :3].softmax(-1), 1).T
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], dim=1)
    verify = Verifier(LogitsProcessorList(), True, True)
    for way in (verify.one_by_one, verify.all_at_once):
        verdict = way(logits, Draft(tokens, logits[:, :3]), ids)
        assert verdict.accepted == 3 and verdict.tokens[:3] == tokens[0].tolist() and len(verdict.scores) == 4


@pytest.mark.own
def test_sampled_text_follows_its_distribution_where_all_rows_are_verified_at_once(monkeypatch):
    monkeypatch.setattr(Verifier, "__call__", Verifier.all_at_once)
    p_value, accepted = sampled_p_value(sampling_pair()[1], 500, 1.3, 4)
    assert p_value > 1e-3 and 0.1 < accepted < 0.9


@pytest.mark.parametrize("way", ["one_by_one", "all_at_once"])
def test_a_rare_token_stays_rare_whatever_torchs_default_dtype_is(way):
    logits = torch.tensor([[[0.0, -8.0], [0.0, 0.0]]])
    verify, tokens = Verifier(LogitsProcessorList(), True, False), torch.tensor([[1]])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        accepted = sum(getattr(verify, way)(logits, Draft(tokens), tokens).tokens[0] for _ in range(4000))
    finally:
        torch.set_default_dtype(torch.float32)
    assert accepted <= 5  # 1.3 are expected, and 8 of coins with eight bits


# ---- threads, other calls, copies


def test_threads_share_a_target_and_an_attachment():
    p, outputs, errors = pair(), {}, []

    def decode(i, **more):
        try:
            for _ in range(4):
                outputs[i] = p.target.generate(p.prompts[i % 3], **GREEDY, **more)
        except Exception as error:
            errors.append(error)

    with attach(p.target, p.drafter) as attachment:
        threads = [
            threading.Thread(target=decode, args=(i,), kwargs=dict(assistant_model=p.drafter)) for i in range(3)
        ]
        threads.append(threading.Thread(target=decode, args=(3,)))  # plain, meanwhile
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    for i, output in outputs.items():
        assert torch.equal(output, p.plain[i % 3])
    assert len(attachment.generations) == 12
    assert Counter(map(tuple, attachment.generations)) == Counter({tuple(r): 4 for _, r, _ in p.assisted})


def test_threads_may_attach_and_detach_while_others_decode():
    p, before, errors, done = pair(), state_of(pair().target), [], threading.Event()

    def attaching():
        try:
            while not done.is_set():
                DraftingOverrides(p.target, object(), None).undo()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=attaching) for _ in range(3)]
    switch, _ = sys.getswitchinterval(), sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for i in range(3):
            assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[i], **GREEDY), p.plain[i])
            assert torch.equal(plain(p, p.prompts[i], prompt_lookup_num_tokens=3), p.plain[i])
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switch)
    assert errors == [] and state_of(p.target) == before


def test_a_target_can_be_trained_after_it_was_decoded_with():
    """Passes run in inference mode, whose tensors autograd refuses; this target makes its frequencies anew in them."""
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    target = make_target(dtype=torch.float32, max_position_embeddings=16, rope_parameters=rope)
    drafter = pair().drafter
    prompt = random_prompts(1, PROMPT)
    with pytest.warns(UserWarning, match="beyond 16 tokens, .*rope_type 'dynamic'"):
        found = hf_specauf.generate(
            target, drafter, prompt, **GREEDY, return_dict_in_generate=True, output_logits=True
        )  # fmt: skip
    assert not any(one.is_inference() for one in (found.sequences, *found.logits))
    target(found.sequences, labels=found.sequences).loss.backward()
    assert target.get_input_embeddings().weight.grad.abs().sum() > 0


def test_inference_mode_is_for_targets_whose_weights_stay_where_they_are():
    target = make_target()
    assert pass_mode(target) is pass_mode(make_drafter(target)) is torch.inference_mode
    assert pass_mode(torch.compile(target)) is not torch.inference_mode
    handle = target.model.layers[1].register_forward_hook(lambda *_: None)
    assert pass_mode(target) is not torch.inference_mode
    handle.remove()
    assert pass_mode(target) is torch.inference_mode
    add_hook_to_module(target.model.norm, ModelHook())
    assert pass_mode(target) is not torch.inference_mode


def modes_of_rounds(monkeypatch, target, drafter, **call) -> tuple[set[bool], torch.Tensor]:
    """Whether rounds run in inference mode, and what a call returns."""
    modes, whole = set(), Decoding._round

    def asked(self):
        modes.add(torch.is_inference_mode_enabled())
        return whole(self)

    monkeypatch.setattr(Decoding, "_round", asked)
    found = hf_specauf.generate(target, drafter, random_prompts(1, PROMPT), max_new_tokens=NEW, **call)
    monkeypatch.undo()
    return modes, found


@pytest.mark.parametrize("call", [dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=5)])
def test_rounds_run_in_inference_mode_where_nobody_else_sees_a_tensor(call, monkeypatch):
    target = make_target()
    for drafter in (make_drafter(target), None):
        modes, output = modes_of_rounds(monkeypatch, target, drafter, **call)
        # Autograd takes what comes back.
        assert modes == {True} and not output.is_inference()
        target(output, labels=output).loss.backward()


def test_a_users_own_code_is_not_called_in_inference_mode(monkeypatch):
    target, modes = make_target(), set()
    drafter = make_drafter(target)

    class Streamer(BaseStreamer):
        def put(self, value):
            modes.add(torch.is_inference_mode_enabled())

        def end(self):
            pass

    class Own(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            modes.add(torch.is_inference_mode_enabled())
            return torch.zeros(1, dtype=torch.bool)

    def processor(input_ids, scores):
        modes.add(torch.is_inference_mode_enabled())
        return scores

    greedy, processors = dict(do_sample=False), LogitsProcessorList([processor])
    for given in (
        dict(streamer=Streamer()), dict(stopping_criteria=[Own()]), dict(logits_processor=processors),
        dict(return_dict_in_generate=True, output_scores=True),
    ):  # fmt: skip
        assert modes_of_rounds(monkeypatch, target, drafter, **greedy, **given)[0] == {False}
    assert modes == {False}
    target.model.layers[1].register_forward_hook(lambda *_: None)
    assert modes_of_rounds(monkeypatch, target, drafter, **greedy)[0] == {False}


def test_a_users_hook_may_take_gradients_and_keep_what_it_saw():
    p, kept = pair(), []

    def hook(module, args, output):
        with torch.enable_grad():
            seen = output.detach().requires_grad_()
            torch.autograd.grad(seen.square().sum(), seen)
        kept.append(output)

    handle = p.target.model.layers[1].register_forward_hook(hook)
    try:
        assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY), p.plain[0])
    finally:
        handle.remove()
    torch.nn.Linear(32, 3, dtype=torch.float64)(kept[-1]).sum().backward()


def test_a_mask_of_ones_is_no_mask_and_padding_is_one():
    assert padding(torch.ones(1, 4)) is None and padding(None) is None
    mask = torch.tensor([[0, 1, 1]])
    assert padding(mask) is mask


def test_an_interrupted_call_leaves_the_target_as_it_was():
    p, before = pair(), state_of(pair().target)

    class Interrupting(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > PROMPT + 5:
                raise KeyboardInterrupt
            return torch.tensor([False])

    with pytest.raises(KeyboardInterrupt), attach(p.target, p.drafter):
        p.target.generate(p.prompts[0], **GREEDY, stopping_criteria=[Interrupting()], assistant_model=p.drafter)
    assert state_of(p.target) == before
    assert torch.equal(hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY), p.plain[0])


def test_a_copy_of_a_target_under_a_drafter_is_a_plain_one(tmp_path):
    p, target = pair(), make_target()
    own = type(target)
    with attach(target, p.drafter):
        assert type(target) is not own and isinstance(target, own)
        target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
        copied = deepcopy(target)
        torch.save(target, tmp_path / "target.pt")
    loaded = torch.load(tmp_path / "target.pt", weights_only=False)
    for model in (copied, loaded):
        assert type(model) is own
        assert torch.equal(model.generate(p.prompts[0], **GREEDY), p.plain[0])


def test_where_processes_must_call_together_a_finished_one_goes_on_calling(monkeypatch):
    p, passes = pair(), []
    own = GenerationMixin._has_unfinished_sequences
    others = iter([True] * (len(p.assisted[0][1]) + 4) + [False])

    def unfinished(self, this_peer_finished, synced_gpus, device):
        assert synced_gpus and own(self, this_peer_finished, False, device) is not this_peer_finished
        return next(others)

    monkeypatch.setattr(GenerationMixin, "_has_unfinished_sequences", unfinished)
    handle = p.target.register_forward_hook(lambda *_: passes.append(1))
    try:
        whole = dict(draft_length=None, lookup=False, synced_gpus=True)
        output = hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY, **whole)
    finally:
        handle.remove()
    assert torch.equal(output, p.plain[0])
    assert len(passes) == 1 + len(p.assisted[0][1]) + 4


def test_a_causal_head_drafts_for_several_threads_too():
    target = make_target()
    prompt = random_prompts(1, PROMPT)
    expected = target.generate(prompt, **GREEDY)
    drafter = overfit(make_domino(target, 4, dtype=torch.float64), target, expected, PROMPT, steps=30)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(hf_specauf.generate(target, drafter, prompt, **GREEDY)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(output, expected) for output in found)
