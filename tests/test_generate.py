"""`attach` and transformers' own route: the target's own output, honest statistics, nothing left behind."""

import warnings
from copy import deepcopy
from functools import cache
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import compile_regions
from conftest import (
    ARCHITECTURES,
    EOS,
    MASK,
    PAD,
    VOCAB,
    attach,
    byte_level_tokenizer,
    make_domino,
    make_drafter,
    make_target,
    overfit,
    random_prompts,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CompileConfig,
    DynamicCache,
    GenerationMixin,
    pipeline,
    set_seed,
)
from transformers.cache_utils import QuantizedCache
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import hf_specauf
from hf_specauf.drafters.draft_length import Costs, Round
from hf_specauf.drafters.drafts import BlockDrafts
from hf_specauf.drafters.modeling_dflash import DFlashDraftModel
from hf_specauf.drafters.transformers_internals import CACHE, STATIC_CACHES_CROP, check_cache
from hf_specauf.drafters.verification import Draft
from hf_specauf.evaluation.compare import compare
from hf_specauf.identity import Origin, note_origin, origin_of, target_fingerprint, tokenizer_hashes, unwrapped
from hf_specauf.identity.origins import _ORIGINS
from hf_specauf.layouts.adapters import AdapterBase, borrow
from hf_specauf.losses.blocks import make_blocks
from hf_specauf.serving.acceptance import accepted_prefix, summarize
from hf_specauf.target import FrozenTarget, decoder_layers, drafter_config

pytestmark = pytest.mark.internals

K, PROMPT, NEW = 4, 12, 36
GREEDY = dict(do_sample=False, max_new_tokens=NEW)


@cache
def pair(architecture: str = "qwen3"):
    """A float64 target, a drafter that helps, the two prompts whose texts it has seen and one it has not, and what
    plain and assisted decoding make of each."""
    target = make_target(architecture)
    prompts = random_prompts(3, PROMPT)
    texts = target.generate(prompts[:2], **GREEDY, suppress_tokens=[MASK])
    drafter = overfit(make_drafter(target, block_size=K, dtype=torch.float64), target, texts, PROMPT, steps=100)
    p = SimpleNamespace(target=target, drafter=drafter, prompts=[prompt[None] for prompt in prompts])
    p.plain = [plain(p, prompt) for prompt in p.prompts]
    p.assisted = [decode(p, prompt) for prompt in p.prompts]
    return p


def plain(p, prompt, **options):
    return p.target.generate(prompt, **GREEDY | options)


def decode(p, prompt, drafter=None, attached=None, **options):
    """One `generate` with the drafter attached -> output, rounds, and what the drafter made of each block (K, H)."""
    drafter, hidden = drafter or p.drafter, []
    handle = drafter.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state[0]))
    try:
        with attach(p.target, drafter, **attached or {}) as attachment, torch.no_grad():
            output = p.target.generate(prompt, **GREEDY | options, assistant_model=drafter)
    finally:
        handle.remove()
    assert len(attachment.generations) == 1
    return output, attachment.rounds, hidden


def emitted_anchors(rounds: list[Round], prompt_length: int) -> list[int]:
    """Index, in the output, of the anchor of each pass: the last token committed before it."""
    return [prompt_length + n for n in accumulate((r.emitted for r in rounds), initial=0)][:-1]


@torch.no_grad()
def teacher_forced(p, output, rounds, prompt_length: int = PROMPT):
    """Blocks at just the anchors decoding visited, filled by the training-mode forward over the finished text ->
    hidden states (N, K, H), and the accepted tokens of each before any cut."""
    frozen = FrozenTarget(p.target, p.drafter.config)
    anchors = torch.tensor([emitted_anchors(rounds, prompt_length)])
    everything, document = torch.ones_like(output, dtype=torch.bool), torch.zeros_like(output)
    blocks = make_blocks(output, everything, document, anchors, torch.ones_like(anchors).bool(), K, MASK)
    hidden = p.drafter(
        frozen.noise_embeds(blocks.noise_ids), frozen.context(output), blocks.attention_mask, blocks.position_ids
    ).last_hidden_state.view(anchors.shape[1], K, -1)
    drafts = frozen.logits(hidden[:, 1:]).argmax(-1)
    return hidden, accepted_prefix(drafts == blocks.labels[0], blocks.valid[0]).tolist()


# ---- greedy decoding is the target's own, and the statistics are true


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attached_greedy_is_lossless_with_accepted_and_rejected_tokens(architecture):
    p = pair(architecture)
    for expected, (output, rounds, _) in zip(p.plain, p.assisted):
        assert torch.equal(output, expected)
        assert sum(r.emitted for r in rounds) == NEW - 1  # the prefill emits the first token
        assert all(r.emitted == r.accepted + 1 and r.accepted <= r.tested <= r.drafted <= K - 1 for r in rounds)
    seen = p.assisted[0][1] + p.assisted[1][1]
    assert sum(r.accepted for r in seen) >= len(seen)  # one a pass on average
    assert any(r.accepted < r.tested for r in seen + p.assisted[2][1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_own_route_is_lossless_and_accepts_as_much(architecture):
    p, passes = pair(architecture), []
    handle = p.target.register_forward_hook(lambda *_: passes.append(1))
    try:
        for prompt, expected, (_, rounds, _) in zip(p.prompts, p.plain, p.assisted):
            passes.clear()
            output = p.target.generate(prompt, **GREEDY, assistant_model=p.drafter, speculation_type="dflash")
            assert torch.equal(output, expected)
            assert len(passes) - 1 == len(rounds)  # less the prefill; which accept and reject, see above
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_forced_tau_at_the_anchors_decoding_visited_equals_decoded_tau(architecture):
    p = pair(architecture)
    for output, rounds, hidden in p.assisted:
        expected, accepted = teacher_forced(p, output, rounds)
        # the last pass may verify fewer slots than the text lets teacher forcing judge
        accepted = [min(a, r.drafted) for a, r in zip(accepted, rounds)]
        assert accepted == [r.accepted for r in rounds]
        assert summarize(rounds, K).tau == pytest.approx(1 + sum(accepted) / len(rounds), abs=1e-12)
        drafting = [i for i, r in enumerate(rounds) if r.drafted]
        torch.testing.assert_close(torch.stack(hidden), expected[drafting], rtol=0, atol=1e-10)


def test_acceptance_sums_up_every_generation_of_an_attachment():
    p = pair()
    with attach(p.target, p.drafter) as attachment:
        assert attachment.acceptance().passes == 0
        for prompt in p.prompts:
            p.target.generate(prompt, **GREEDY, assistant_model=p.drafter)
            p.target.generate(prompt, **GREEDY)  # leaves no trace
    assert len(attachment.generations) == 3
    assert attachment.rounds == [r for _, rounds, _ in p.assisted for r in rounds]
    acceptance = attachment.acceptance()
    assert acceptance.tokens == 3 * (NEW - 1)
    assert acceptance.tau == acceptance.tokens / acceptance.passes == 1 + acceptance.accepted_per_pass


@pytest.mark.parametrize("key", ["draft_length", "num_assistant_tokens"])
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_a_cap_holds_for_every_draft(cap, key):
    p, cap_of = pair(), {key: cap}
    options = dict(attached=cap_of) if key == "draft_length" else cap_of
    output, rounds, _ = decode(p, p.prompts[1], **options)
    assert torch.equal(output, p.plain[1])
    room = [PROMPT + NEW - anchor - 2 for anchor in emitted_anchors(rounds, PROMPT)]  # one is left for the bonus
    assert [r.drafted for r in rounds] == [min(cap, left) for left in room]
    assert max(r.emitted for r in rounds) == cap + 1


def test_a_draft_length_decided_each_round_is_lossless_and_with_equal_costs_the_same():
    p = pair()
    steep = Costs({0: 1.0, 1: 1.2, 3: 1.9}, drafting=0.1, frozen=True)
    with attach(p.target, p.drafter, draft_length="auto", costs=steep) as attachment:
        for prompt, expected in zip(p.prompts, p.plain):
            assert torch.equal(p.target.generate(prompt, **GREEDY, assistant_model=p.drafter), expected)
    lengths = [r.drafted for r in attachment.rounds]
    assert len(set(lengths)) > 2
    assert attachment.costs is steep and steep.passes == {0: 1.0, 1: 1.2, 3: 1.9}
    # equal costs, equal decisions
    with attach(p.target, p.drafter, draft_length="auto", costs=steep) as again:
        for prompt in p.prompts:
            p.target.generate(prompt, **GREEDY, assistant_model=p.drafter)
    assert [r.drafted for r in again.rounds] == lengths


def test_costs_are_measured_where_none_are_given():
    p = pair()
    with attach(p.target, p.drafter, draft_length="auto") as attachment:
        assert torch.equal(p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter), p.plain[0])
    assert attachment.rounds[0].drafted == 0 and attachment.rounds[1].drafted > 0
    assert {0, attachment.rounds[1].drafted} <= set(attachment.costs.passes)
    assert min(attachment.costs.passes.values()) > 0 < attachment.costs.drafting
    with attach(p.target, p.drafter) as attachment:
        assert attachment.costs is None


SKIPS = {
    "every": lambda rounds: True,
    "every second": lambda rounds: len(rounds) % 2 == 0,
    "the first three": lambda rounds: len(rounds) < 3,
    "after a failure": lambda rounds: bool(rounds) and rounds[-1].drafted > rounds[-1].accepted,
}


@pytest.mark.parametrize("skip", SKIPS)
def test_skipped_rounds_lose_no_context_for_later_drafts(skip):
    p = pair()
    output, rounds, hidden = decode(p, p.prompts[0], attached=dict(skip_round=SKIPS[skip]))
    assert torch.equal(output, p.plain[0])
    skipped = [i for i in range(len(rounds)) if SKIPS[skip](rounds[:i])]
    drafting = [i for i, r in enumerate(rounds) if r.drafted]
    assert skipped and all(rounds[i] == Round(emitted=1, accepted=0, tested=0, drafted=0) for i in skipped)
    assert len(hidden) == len(drafting)  # a skipped round costs no drafter pass
    if skip == "every":
        assert drafting == []
        return
    # at the same anchors a drafter that skipped nothing says the same
    expected, accepted = teacher_forced(p, output, rounds)
    torch.testing.assert_close(torch.stack(hidden), expected[drafting], rtol=0, atol=1e-10)
    assert [min(accepted[i], rounds[i].drafted) for i in drafting] == [rounds[i].accepted for i in drafting]
    assert any(rounds[i].accepted for i in drafting)


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.3),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=20, eos_token_id=80),
        dict(repetition_penalty=1.1, suppress_tokens=[80, 77], bad_words_ids=[[30, 74]]),
    ],
    ids=str,
)
def test_logits_processors_give_what_they_give_without_a_drafter(options):
    p = pair()
    changed = accepted = 0
    for prompt, unprocessed in zip(p.prompts[:2], p.plain):
        output, rounds, _ = decode(p, prompt, **options)
        assert torch.equal(output, plain(p, prompt, **options))
        changed += not torch.equal(output, unprocessed)
        accepted += sum(r.accepted for r in rounds)
    assert changed and accepted


class FollowOn(LogitsProcessor):
    """Allows one token alone, which depends on the one before it."""

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, (input_ids[:, -1:] * 7 + 3) % VOCAB, 0.0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_draft_itself_goes_through_the_logits_processors_slot_by_slot(do_sample):
    p = pair()
    processors = LogitsProcessorList([FollowOn()])
    output, rounds, _ = decode(p, p.prompts[0], do_sample=do_sample, logits_processor=processors)
    tokens = output[0, PROMPT - 1 :].tolist()
    assert tokens[1:] == [(token * 7 + 3) % VOCAB for token in tokens[:-1]]
    assert all(r.accepted == r.drafted for r in rounds) and len(rounds) == -(-(NEW - 1) // K)


def first_occurrence(output, rounds, wanted) -> tuple[int, int] | None:
    """(pass, slot) of a token that `wanted(round, slot)` and that the text holds nowhere before."""
    for i, (anchor, r) in enumerate(zip(emitted_anchors(rounds, PROMPT), rounds)):
        for slot in range(1, r.emitted + 1):
            text = output[0, PROMPT : anchor + slot].tolist()
            if wanted(r, slot) and output[0, anchor + slot].item() not in text:
                return i, slot
    return None


ENDS = {  # where the end of sequence falls -> what the last round says
    "inside the accepted draft": (lambda r, s: 1 < s < r.accepted, lambda r, s: Round(s, s, s, r.drafted)),
    "the last slot of a full draft": (lambda r, s: s == r.accepted == K - 1, lambda r, s: Round(s, s, s, r.drafted)),
    "the bonus after a full draft": (lambda r, s: s == K == r.emitted, lambda r, s: r),
    "in place of a rejected token": (lambda r, s: s == r.emitted <= r.drafted, lambda r, s: r),
}


@pytest.mark.parametrize("where", ENDS)
def test_an_end_of_sequence_in_a_block_cuts_output_and_round_there(where):
    wanted, last = ENDS[where]
    cases = 0
    for architecture in ("qwen3", "llama", "gpt2"):
        p = pair(architecture)
        for prompt, (output, rounds, _) in zip(p.prompts, p.assisted):
            if (found := first_occurrence(output, rounds, wanted)) is None:
                continue
            i, slot = found
            anchor = emitted_anchors(rounds, PROMPT)[i]
            eos = output[0, anchor + slot].item()
            ended, its_rounds, _ = decode(p, prompt, eos_token_id=[eos, EOS])
            assert torch.equal(ended, output[:, : anchor + slot + 1])
            assert torch.equal(ended, plain(p, prompt, eos_token_id=[eos, EOS]))
            assert its_rounds == [*rounds[:i], last(rounds[i], slot)]
            cases += 1
    assert cases


def test_an_end_of_sequence_from_the_prefill_leaves_no_round():
    p = pair()
    first = p.plain[0][0, PROMPT].item()
    output, rounds, hidden = decode(p, p.prompts[0], eos_token_id=first)
    assert output.shape[1] == PROMPT + 1 and rounds == [] and hidden == []


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt2", "gpt_oss"])
def test_a_left_padded_prompt_decodes_like_the_bare_one(architecture):
    p = pair(architecture)
    prompt = p.prompts[0]
    padded = torch.cat([torch.full((1, 5), PAD), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    output, rounds, hidden = decode(p, padded, attention_mask=mask)
    assert torch.equal(output, plain(p, padded, attention_mask=mask))
    bare, its_rounds, its_hidden = p.assisted[0]
    assert torch.equal(output[:, 5:], bare) and rounds == its_rounds
    # positions and mask reach the drafter, too
    torch.testing.assert_close(torch.stack(hidden), torch.stack(its_hidden), rtol=0, atol=1e-10)
    assert not torch.equal(output, plain(p, padded, attention_mask=torch.ones_like(mask)))


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token_once_and_several_at_a_time():
    p, streamer = pair(), Collect()
    output, rounds, _ = decode(p, p.prompts[1], streamer=streamer)
    assert sum(streamer.pieces, []) == output[0].tolist() and streamer.ended
    assert [len(piece) for piece in streamer.pieces] == [PROMPT, 1, *(r.emitted for r in rounds)]


@pytest.mark.parametrize(
    ("length", "new", "expected_rounds"),
    [(PROMPT, 1, []), (PROMPT, 2, [Round(1, 0, 0, 0)]), (1, 1, []), (1, 2, [Round(1, 0, 0, 0)]), (1, NEW, None)],
)
def test_the_shortest_prompts_and_answers_are_lossless(length, new, expected_rounds):
    p = pair()
    prompt = p.prompts[0][:, :length]
    output, rounds, _ = decode(p, prompt, max_new_tokens=new)
    assert torch.equal(output, plain(p, prompt, max_new_tokens=new)) and output.shape[1] == length + new
    if expected_rounds is not None:
        assert rounds == expected_rounds
    else:
        _, accepted = teacher_forced(p, output, rounds, prompt_length=1)
        assert [min(a, r.drafted) for a, r in zip(accepted, rounds)] == [r.accepted for r in rounds]


def test_a_target_without_position_ids_is_served():
    set_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4)).double().eval()
    for parameter in bloom.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    bloom.generation_config.eos_token_id, bloom.generation_config.pad_token_id = None, PAD
    prompts = random_prompts(2, PROMPT)
    # widths, depth and vocabulary are those of the other tiny targets
    drafter = make_drafter(make_target(), block_size=K, dtype=torch.float64)
    texts = bloom.generate(prompts, do_sample=False, max_new_tokens=24)
    p = SimpleNamespace(target=bloom, drafter=overfit(drafter, bloom, texts, PROMPT, steps=60))
    padded = torch.cat([torch.full((1, 5), PAD), prompts[:1]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    for prompt, options in ((prompts[:1], {}), (prompts[1:], {}), (padded, dict(attention_mask=mask))):
        output, rounds, _ = decode(p, prompt, **options)
        assert torch.equal(output, plain(p, prompt, **options))
        assert sum(r.accepted for r in rounds) > len(rounds) / 2


@pytest.mark.parametrize(
    "options",
    [
        lambda p: dict(speculation_type="dflash"),  # the line that works without this package works with it
        lambda p: {CACHE: DynamicCache(config=p.target.config)},  # empty
        lambda p: dict(inputs_embeds=p.target.get_input_embeddings()(p.prompts[0])),  # beside input_ids
        lambda p: dict(return_dict_in_generate=True, output_scores=True),
        lambda p: dict(max_length=PROMPT + NEW, max_new_tokens=None),
    ],
    ids=["speculation_type", "an empty cache", "embeddings beside ids", "a dict of outputs", "max_length"],
)
def test_harmless_options_change_neither_output_nor_rounds(options):
    p = pair()
    with torch.no_grad():
        output, rounds, _ = decode(p, p.prompts[0], **options(p))
    sequences = output if torch.is_tensor(output) else output.sequences
    assert torch.equal(sequences, p.plain[0]) and rounds == p.assisted[0][1]


# ---- static caches: taken by transformers from 5.24 on

served = pytest.mark.skipif(not STATIC_CACHES_CROP, reason="static caches can be cropped from transformers 5.24 on")


@served
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2", "mixtral"])
def test_a_static_cache_gives_the_output_and_rounds_of_a_dynamic_one(architecture):
    p = pair(architecture)
    for prompt, expected, (_, rounds, _) in zip(p.prompts, p.plain, p.assisted):
        output, found, _ = decode(p, prompt, cache_implementation="static")
        assert torch.equal(output, expected) and found == rounds


@served
def test_a_compiled_verification_pass_gives_the_same_output():
    p, graphs = pair(), []

    def backend(graph, example_inputs, **options):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=False)
    config._compile_all_devices = True  # transformers compiles on accelerators alone
    try:
        output, rounds, _ = decode(p, p.prompts[0], cache_implementation="static", compile_config=config)
    finally:
        vars(p.target).pop("_compiled_call", None)
        torch.compiler.reset()
    assert graphs, "nothing was compiled"
    assert torch.equal(output, p.plain[0])
    # At a text's end drafts are cut to a width that was compiled before.
    assert len(rounds) > 4 and rounds[:-3] == p.assisted[0][1][: len(rounds) - 3]


@served
@pytest.mark.parametrize("drafted", [1, 2, 3])
def test_compiled_passes_have_few_widths_whatever_is_drafted(drafted):
    p, widths = pair(), []
    config = CompileConfig(fullgraph=False)
    config._compile_all_devices = True

    def compiled(input_ids, **inputs):
        widths.append(input_ids.shape[1])
        return p.target(input_ids=input_ids, **inputs)

    # Where transformers keeps what it compiled.
    p.target._compiled_call, p.target._last_compile_config = compiled, config
    options = dict(cache_implementation="static", compile_config=config, num_assistant_tokens=drafted)
    try:
        output, rounds, _ = decode(p, p.prompts[0], **options)
    finally:
        del p.target._compiled_call, p.target._last_compile_config
    assert torch.equal(output, p.plain[0])
    assert max(round.drafted for round in rounds) == drafted
    # three tokens are read as four, and at the end no width comes that was not compiled before
    assert set(widths) <= {1, 2, 4} and max(widths) == {1: 2, 2: 4, 3: 4}[drafted]


@served
@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss"])
def test_a_static_cache_with_windows_serves_texts_within_the_window_and_is_refused_beyond(architecture):
    p = pair(architecture)
    short = dict(cache_implementation="static", max_new_tokens=4)  # 16 tokens, as many as the window
    output, rounds, _ = decode(p, p.prompts[0], **short)
    assert torch.equal(output, p.plain[0][:, : PROMPT + 4]) and rounds
    with pytest.raises(ValueError, match="its sliding-window layers overwrite.*Leave cache_implementation out"):
        decode(p, p.prompts[0], cache_implementation="static")


@pytest.mark.skipif(STATIC_CACHES_CROP, reason="transformers 5.24 takes static caches")
def test_a_static_cache_is_refused_with_the_version_that_takes_it():
    p = pair()
    with pytest.raises(ValueError, match="go together from transformers 5.24 on.*Leave cache_implementation out"):
        decode(p, p.prompts[0], cache_implementation="static")


def test_a_quantised_cache_is_refused():
    quantised = QuantizedCache.__new__(QuantizedCache)  # its backends are packages of their own
    with pytest.raises(ValueError, match="a quantised cache cannot be cut back.*dynamic cache"):
        check_cache(quantised)


# ---- experts


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_fused_expert_kernels_give_plain_decodings_text(kernel):
    """transformers switches between these two kernels while decoding, on accelerators."""
    target = make_target("mixtral", dtype=torch.float32)
    drafter, prompt = make_drafter(target, block_size=K), random_prompts(1, PROMPT)
    target.set_experts_implementation(kernel)
    p = SimpleNamespace(target=target, drafter=drafter)
    output, rounds, _ = decode(p, prompt)
    assert torch.equal(output, plain(p, prompt)) and rounds


@pytest.mark.parametrize(
    ("target_dtype", "drafter_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_target_and_drafter_may_differ_in_dtype(target_dtype, drafter_dtype, do_sample):
    p = pair()
    mixed = SimpleNamespace(target=deepcopy(p.target).to(target_dtype), drafter=deepcopy(p.drafter).to(drafter_dtype))
    set_seed(0)
    output, rounds, _ = decode(mixed, p.prompts[0], do_sample=do_sample)
    assert any(r.accepted for r in rounds)
    if target_dtype == torch.float32 and not do_sample:
        assert torch.equal(output, p.plain[0])


# ---- sampling keeps the target's distribution

SMALL_VOCAB, JOINT = 6, 3
SAMPLING = [dict(temperature=1.0, top_k=0), dict(temperature=1.3, top_k=4), dict(top_k=0, repetition_penalty=1.5)]


class Enough(StoppingCriteria):
    """Stops once the joint is there; `max_new_tokens` is larger, so that its tokens come from wide drafts."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length])


@cache
def sampling_pair():
    target = make_target(vocab_size=SMALL_VOCAB, num_hidden_layers=2, dtype=torch.float32)
    config = drafter_config(
        target, num_hidden_layers=1, block_size=K, mask_token_id=SMALL_VOCAB - 1, target_layer_ids=[0]
    )
    set_seed(0)
    return target, DFlashDraftModel(config).eval(), torch.tensor([[3, 2, 4, 3]])


@torch.no_grad()
def exact_joint(target, prompt, warpers: LogitsProcessorList) -> torch.Tensor:  # (V ** JOINT,)
    """The target's own probability of every continuation of JOINT tokens."""
    tails = torch.cartesian_prod(*[torch.arange(SMALL_VOCAB)] * JOINT)
    rows = torch.cat([prompt.expand(len(tails), -1), tails], dim=1)
    logits = target(rows).logits[:, -JOINT - 1 : -1].double()
    chances = [warpers(rows, logits[:, i]).softmax(-1).gather(1, tails[:, i : i + 1]) for i in range(JOINT)]
    return torch.cat(chances, dim=1).prod(dim=1)


def sampled_p_value(drafter, draws: int, temperature: float, top_k: int, **attached):
    """Chi-squared p of JOINT tokens drawn by assisted generation against the exact joint, and what was accepted."""
    target, _, prompt = sampling_pair()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    expected = exact_joint(target, prompt, warpers) * draws
    length = prompt.shape[1] + JOINT
    place = SMALL_VOCAB ** torch.arange(JOINT - 1, -1, -1)
    set_seed(0)
    with attach(target, drafter, **attached) as attachment:
        drawn = [
            target.generate(
                prompt, do_sample=True, temperature=temperature, top_k=top_k, max_new_tokens=JOINT + 2,
                assistant_model=drafter, stopping_criteria=[Enough(length)],
            )[0, length - JOINT : length] @ place
            for _ in range(draws)
        ]  # fmt: skip
    observed = torch.bincount(torch.stack(drawn), minlength=SMALL_VOCAB**JOINT)
    assert (observed[expected == 0] == 0).all()
    frequent = expected >= 5  # the others are pooled: too rare to be judged alone
    observed, expected = (
        torch.cat([counts[frequent], counts[~frequent].sum()[None]]) for counts in (observed.double(), expected)
    )
    used = expected > 0
    p_value = chisquare(observed[used], expected[used] * (draws / expected.sum())).pvalue
    return p_value, sum(r.accepted for r in attachment.rounds) / sum(r.tested for r in attachment.rounds)


class Recording(BlockDrafts):
    """Keeps of every block the scores each of its tokens was drawn from, and the logits given to verification."""

    def _fill(self, *args):
        self.scores = []
        draft, logits = super()._fill(*args)
        self.drafter.seen.append((draft, torch.cat(self.scores), logits[0]))
        return Draft(draft, logits)

    def _draw(self, scores):
        draft = super()._draw(scores)
        self.scores.append(scores.clone())
        return draft


def recorded(drafter, **options) -> list[tuple[torch.Tensor, ...]]:
    """Sample a few texts -> of every block the draft, what it was drawn from, and what it claims."""
    target, _, prompt = sampling_pair()
    drafter = deepcopy(drafter)
    drafter.seen = []
    drafter.get_drafts = lambda target, config, **keys: Recording(drafter, target, config, **keys)
    set_seed(0)
    with attach(target, drafter):
        for _ in range(10):
            target.generate(prompt, do_sample=True, max_new_tokens=16, assistant_model=drafter, **options)
    return drafter.seen


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_logits_a_draft_comes_with_are_those_each_token_was_drawn_from(options):
    """The law of speculative sampling asks this of a draft; the sampled tests ask the whole, by statistics."""
    blocks = recorded(sampling_pair()[1], **options)
    assert len(blocks) > 30
    for draft, drawn_from, claimed in blocks:
        torch.testing.assert_close(claimed, drawn_from, rtol=0, atol=0)
        assert torch.isfinite(claimed.gather(1, draft.T)).all()  # no token of chance 0


@pytest.mark.own_parameters
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.3, 4)], ids=["plain", "temperature and top-k"])
def test_sampling_follows_the_targets_exact_distribution(temperature, top_k):
    p_value, accepted = sampled_p_value(sampling_pair()[1], 600, temperature, top_k)
    assert p_value > 1e-3
    assert 0.1 < accepted < 0.9


class GreedyDraft(BlockDrafts):
    """z-lab#74: drafts the best token, but says it was drawn from the whole distribution."""

    def _fill(self, *args):
        _, logits = super()._fill(*args)
        return Draft(logits.argmax(-1), logits)


@pytest.mark.own
def test_sampling_follows_it_too_where_each_drafts_length_is_decided_anew():
    costs = Costs({0: 1.0, 1: 1.15, 3: 1.45}, drafting=0.02, frozen=True)
    seen = []

    class Watched(BlockDrafts):
        def learn(self, *args):
            super().learn(*args)
            seen.extend(self.rounds[-1:])

    drafter = deepcopy(sampling_pair()[1])
    drafter.get_drafts = lambda target, config, **kwargs: Watched(drafter, target, config, **kwargs)
    p_value, accepted = sampled_p_value(drafter, 600, 1.0, 0, draft_length="auto", costs=costs)
    assert p_value > 1e-3
    assert 0.1 < accepted < 0.9
    assert {r.drafted for r in seen} >= {1, 2, 3}


class CutByTheTokenDrawn(BlockDrafts):
    """Keeps a draft up to the first token that it does not like, which nobody may who has seen the token."""

    def _fill(self, *args):
        draft, logits = super()._fill(*args)
        kept = int(((draft[0] >= SMALL_VOCAB // 2).cumsum(0) < 1).sum())
        if kept == 0:
            return None
        return Draft(draft[:, :kept], logits[:, :kept])


@pytest.mark.own
def test_a_draft_cut_by_the_token_drawn_is_detected():
    target, untrained, prompt = sampling_pair()
    set_seed(0)
    texts = target.generate(prompt.expand(64, -1), do_sample=True, top_k=0, max_new_tokens=8)
    # a drafter that is mostly accepted, so that what is cut away is missed
    drafter = overfit(deepcopy(untrained), target, texts, prompt.shape[1], steps=60)
    drafter.get_drafts = lambda target, config, **keys: CutByTheTokenDrawn(drafter, target, config, **keys)
    p_value, accepted = sampled_p_value(drafter, 500, 1.0, 0)
    assert p_value < 1e-3 and accepted > 0.7


@pytest.mark.own
def test_a_draft_not_drawn_from_the_distribution_it_claims_is_detected():
    drafter = deepcopy(sampling_pair()[1])
    drafter.get_drafts = lambda target, config, **kwargs: GreedyDraft(drafter, target, config, **kwargs)
    p_value, accepted = sampled_p_value(drafter, 400, 1.0, 0)
    assert p_value < 1e-6
    assert 0 < accepted < 1


# ---- stopping


class AtToken(StoppingCriteria):
    """Stops where the last token is this one: a draft accepted past it hides it from who looks once a pass."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def inside_a_draft(p) -> int:
    """Index of a generated token, the first of its kind, that was accepted with more tokens of its pass behind it."""
    at = PROMPT + 1
    for r in p.assisted[0][1]:
        for index in range(at, at + r.emitted - 1):
            if p.plain[0][0, index] not in p.plain[0][0, PROMPT:index]:
                return index
        at += r.emitted
    raise AssertionError("no token fits")


def test_a_stopping_criterion_that_fires_inside_an_accepted_draft_stops_where_plain_decoding_does():
    p = pair()
    index = inside_a_draft(p)
    stop = dict(stopping_criteria=[AtToken(int(p.plain[0][0, index]))])
    expected = plain(p, p.prompts[0], **stop)
    assert expected.shape[1] == index + 1
    output, rounds, _ = decode(p, p.prompts[0], **stop)
    assert torch.equal(output, expected)
    assert sum(r.emitted for r in rounds) == index - PROMPT  # the prefill emits the first token
    assert all(r.accepted <= r.tested <= r.drafted for r in rounds)
    with attach(p.target, p.drafter):  # a call without the drafter, in a batch
        batch = torch.cat(p.prompts)
        assert torch.equal(p.target.generate(batch, **GREEDY, **stop), p.target.generate(batch, **GREEDY, **stop))
        assert torch.equal(plain(p, p.prompts[0], **stop), expected)
        assert torch.equal(plain(p, p.prompts[0], prompt_lookup_num_tokens=3, **stop), expected)


def test_stop_strings_stop_where_plain_decoding_does(text_target, tokenizer):
    target = deepcopy(text_target)
    target.generation_config.bos_token_id = None
    config = drafter_config(
        target, num_hidden_layers=1, block_size=K, mask_token_id=tokenizer.mask_token_id, target_layer_ids=[0, 2]
    )
    set_seed(0)
    prompt = tokenizer("the quick brown", return_tensors="pt")["input_ids"]
    text = target.generate(prompt, do_sample=False, max_new_tokens=24)
    drafter = overfit(DFlashDraftModel(config), target, text, prompt.shape[1], steps=60)
    cut = 0
    for word in {tokenizer.decode([token]) for token in text[0, prompt.shape[1] :]} - {""}:
        stop = dict(do_sample=False, max_new_tokens=24, stop_strings=[word], tokenizer=tokenizer)
        expected = target.generate(prompt, **stop)
        with attach(target, drafter) as attachment:
            assert torch.equal(target.generate(prompt, **stop, assistant_model=drafter), expected)
        # in the middle of a draft
        cut += bool(attachment.rounds) and attachment.rounds[-1].emitted == attachment.rounds[-1].accepted < K - 1
    assert cut


# ---- nothing is left behind, and other ways to generate keep working


def state_of(target) -> tuple:
    """What a drafter might leave behind: the class, attributes, hooks."""
    return type(target), set(vars(target)), [list(module._forward_hooks) for module in target.modules()]


def test_detach_and_the_context_manager_give_the_target_its_own_generate_back():
    p = pair()
    before = state_of(p.target)
    with attach(p.target, p.drafter) as attachment:
        assert state_of(p.target) != before
    assert state_of(p.target) == before
    with pytest.raises(AttributeError):  # transformers' plain behaviour for a drafter it is not told of
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
    assert attachment.rounds == []
    with pytest.raises(RuntimeError, match="inside"), attach(p.target, p.drafter):
        raise RuntimeError("an error inside the block")
    attachment = attach(p.target, p.drafter)
    attachment.detach()
    attachment.detach()
    assert state_of(p.target) == before
    with attach(p.target, p.drafter) as later:
        attachment.detach()  # takes nothing from those who came after it
        assert torch.equal(plain(p, p.prompts[0], assistant_model=p.drafter), p.plain[0]) and later.rounds


def test_several_drafters_may_be_attached_and_detached_in_any_order():
    p, before = pair(), state_of(pair().target)
    other = make_drafter(p.target, block_size=K, dtype=torch.float64)
    first, second = attach(p.target, p.drafter), attach(p.target, other)
    for drafter, attachment in ((p.drafter, first), (other, second)):
        assert torch.equal(plain(p, p.prompts[0], assistant_model=drafter), p.plain[0])
        assert len(attachment.generations) == 1
    first.detach()  # not the last that came
    assert torch.equal(plain(p, p.prompts[0], assistant_model=other), p.plain[0])
    with pytest.raises(AttributeError):
        plain(p, p.prompts[0], assistant_model=p.drafter)
    second.detach()
    with pytest.raises(AttributeError):
        plain(p, p.prompts[0], assistant_model=other)
    assert torch.equal(plain(p, p.prompts[0]), p.plain[0])
    with attach(p.target, p.drafter), attach(p.target, other):
        assert state_of(p.target) != before
    assert state_of(p.target) == before


def test_other_assistants_and_prompt_lookup_work_while_attached():
    p = pair()
    small = make_target(seed=1, num_hidden_layers=1)
    with attach(p.target, p.drafter) as attachment:
        for others in (dict(assistant_model=small), dict(prompt_lookup_num_tokens=3), {}):
            assert torch.equal(plain(p, p.prompts[0], **others), p.plain[0])
        beams = plain(p, p.prompts[0], num_beams=2)
    assert attachment.generations == []
    assert torch.equal(beams, plain(p, p.prompts[0], num_beams=2))


def test_attaching_changes_neither_the_generation_config_nor_what_is_saved(tmp_path):
    p = pair()
    p.target.save_pretrained(tmp_path / "before")
    config = p.target.generation_config
    own = config.to_dict()
    with attach(p.target, p.drafter):
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
        p.target.save_pretrained(tmp_path / "after")
    assert p.target.generation_config is config and config.to_dict() == own
    files = [{f.name: f.read_bytes() for f in (tmp_path / when).iterdir()} for when in ("before", "after")]
    assert files[0] == files[1] and "generation_config.json" in files[0]


def lora(model, alpha: float, **more):
    """A LoRA wrapper whose weights already do something."""
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
    set_seed(0)
    return get_peft_model(deepcopy(model), config)


def test_a_peft_wrapped_target_is_served():
    p = pair()
    wrapped = SimpleNamespace(target=lora(p.target, 0.2, task_type="CAUSAL_LM"), drafter=p.drafter)
    output, rounds, _ = decode(wrapped, p.prompts[0])
    assert torch.equal(output, plain(wrapped, p.prompts[0]))
    assert not torch.equal(output, p.plain[0]) and any(r.accepted for r in rounds)
    assert not hasattr(type(wrapped.target.get_base_model()), "_attached_drafters")
    assert torch.equal(hf_specauf.generate(wrapped.target, p.drafter, input_ids=p.prompts[0], **GREEDY), output)


@pytest.fixture
def process_group(tmp_path):
    """One process, so that DDP can wrap a model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_layers(model):
    """Each layer compiled by itself, as people do it by hand."""
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "torch.compile": compiled,
    "DDP": DistributedDataParallel,
    "DataParallel": torch.nn.DataParallel,
    "DDP of a compiled one": lambda model: DistributedDataParallel(compiled(model)),
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "layers compiled by accelerate": lambda model: compile_regions(model, backend="eager"),
    "layers compiled by hand": compiled_in_layers,
    "compiled PEFT": lambda model: compiled(lora(model, 0.0, task_type="CAUSAL_LM")),
    "PEFT of mixed kinds": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"]), mixed=True),
    "PEFT of a compiled one": lambda model: get_peft_model(compiled(model), LoraConfig(target_modules=["q_proj"])),
}


@pytest.mark.own_parameters
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_target_is_the_same_target_and_is_served(name, process_group):
    p = pair()
    wrapped = WRAPPERS[name](deepcopy(p.target).requires_grad_(True))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="this drafter may accept little")
            output = hf_specauf.generate(wrapped, p.drafter, input_ids=p.prompts[0], **GREEDY)
            with attach(wrapped, p.drafter) as attachment:
                again = unwrapped(wrapped).generate(input_ids=p.prompts[0], **GREEDY, assistant_model=p.drafter)
        assert FrozenTarget(wrapped, p.drafter.config).model is attachment.target
        assert drafter_config(
            wrapped, num_hidden_layers=1, block_size=K, mask_token_id=MASK, target_layer_ids=[0, 2]
        ).to_dict() == make_drafter(p.target, block_size=K).config.to_dict() | {"dtype": None}  # fmt: skip
    finally:
        torch.compiler.reset()
    assert torch.equal(output, p.plain[0]) and torch.equal(again, output)
    assert attachment.rounds == p.assisted[0][1]
    assert not hasattr(type(attachment.target), "_attached_drafters")


def test_wrapped_targets_are_compared_as_what_is_inside(process_group):
    p = pair()
    wrapped = DistributedDataParallel(deepcopy(p.target).requires_grad_(True))
    results = compare(wrapped, p.drafter, p.prompts[:1], 8, pad_token_id=PAD, show_progress=False)
    assert results["lossless"] == {"identical": 1, "near_tie": 0, "different": 0}


@pytest.mark.own_parameters
@pytest.mark.parametrize("wrap", [
    lambda drafter, backend: torch.compile(drafter, backend=backend),
    lambda drafter, backend: torch.compile(lora(drafter, 0.0), backend=backend),
    lambda drafter, backend: DistributedDataParallel(torch.compile(drafter, backend=backend)),
    lambda drafter, backend: drafter.compile(backend=backend) or drafter,
], ids=["torch.compile", "compiled PEFT", "DDP of a compiled one", "in place"])  # fmt: skip
def test_a_compiled_drafter_runs_compiled_and_drafts_the_same(wrap, process_group):
    p, calls = pair(), []

    def backend(graph, example_inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    drafter = wrap(deepcopy(p.drafter).requires_grad_(True), backend)
    try:
        with attach(p.target, drafter) as attachment:
            output = p.target.generate(p.prompts[0], **GREEDY, assistant_model=drafter)
    finally:
        torch.compiler.reset()
    assert torch.equal(output, p.plain[0])
    assert attachment.rounds == p.assisted[0][1] and attachment.acceptance().tau > 1
    assert len(calls) >= len(attachment.rounds)


def test_a_target_with_virtual_tokens_is_refused():
    p = pair()
    prefixed = get_peft_model(deepcopy(p.target), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        attach(prefixed, p.drafter)
    with pytest.raises(ValueError, match="Use a LoRA on the target"):
        hf_specauf.generate(prefixed, p.drafter, input_ids=p.prompts[0], **GREEDY)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        FrozenTarget(prefixed, p.drafter.config)  # the drafter would be trained on the plain target
    FrozenTarget(prefixed.get_base_model(), p.drafter.config)


def test_a_target_with_an_activated_lora_is_served_and_not_trained_on():
    p = pair()
    start = p.prompts[0][0, 4].item()
    config = LoraConfig(
        target_modules=["q_proj"], alora_invocation_tokens=[start], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    activated = get_peft_model(deepcopy(p.target), config)
    assert target_fingerprint(activated) != target_fingerprint(p.target)
    wrapped = SimpleNamespace(target=activated, drafter=p.drafter)
    own = plain(wrapped, p.prompts[0])
    with pytest.warns(UserWarning, match="other weights"):
        assert torch.equal(decode(wrapped, p.prompts[0])[0], own)
    assert not torch.equal(own, p.plain[0])
    with pytest.raises(ValueError, match="an activated LoRA .*train on the target without it"):
        FrozenTarget(activated, p.drafter.config)


class ValueHead(torch.nn.Module):
    """As trl's models for PPO are made."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.config = model, model.config

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)


def test_a_wrapper_nobody_knows_is_refused_with_the_model_inside():
    p = pair()
    with pytest.raises(TypeError, match=r"^ValueHead is no model .* the Qwen3ForCausalLM .* \(\.pretrained_model\)"):
        attach(ValueHead(p.target), p.drafter)
    with pytest.raises(TypeError, match="^str is no model of transformers: load one with AutoModelForCausalLM"):
        FrozenTarget("Qwen/Qwen3-8B", p.drafter.config)


OFFLOADED = {
    "head": ["lm_head"],
    "embedding": ["model.embed_tokens"],
    "all but a norm": ["model.embed_tokens", "lm_head", *(f"model.layers.{i}" for i in range(4))],
}


@pytest.fixture(params=OFFLOADED)
def offloaded(request, tmp_path):
    """The target of `pair`, some of whose modules lie on the disk."""
    p = pair()
    p.target.save_pretrained(tmp_path / "target")
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(modules + [f"model.layers.{i}" for i in range(4)], "cpu")
    places |= dict.fromkeys(OFFLOADED[request.param], "disk")
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=places, offload_folder=tmp_path / "offload"
    )
    target.generation_config = p.target.generation_config
    assert any(parameter.is_meta for parameter in target.parameters())
    return target


def test_a_target_with_offloaded_weights_is_served_and_lends_the_same(offloaded):
    p = pair()
    before = set(vars(offloaded))
    output = hf_specauf.generate(offloaded, p.drafter, p.prompts[0], **GREEDY)
    assert torch.equal(output, p.plain[0])
    assert set(vars(offloaded)) == before
    with attach(offloaded, p.drafter) as attachment:
        offloaded.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
        assert torch.equal(plain(SimpleNamespace(target=offloaded), p.prompts[0]), output)
    assert attachment.rounds == p.assisted[0][1]
    frozen, whole = (FrozenTarget(target, p.drafter.config) for target in (offloaded, p.target))
    frozen.check(p.prompts[0])
    assert torch.equal(frozen.noise_embeds(p.prompts[0]), whole.noise_embeds(p.prompts[0]))
    assert torch.equal(frozen.context(p.prompts[0]), whole.context(p.prompts[0]))
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(frozen.logits(hidden), whole.logits(hidden), rtol=1e-12, atol=1e-12)
    config = make_drafter(p.target, layers=2).config
    found, expected = (borrow(target, config, [1, 3], frozen=True).state_dict() for target in (offloaded, p.target))
    assert all(torch.equal(found[name], expected[name]) for name in expected if name.startswith("layers."))


ADAPTERS = {
    "lora": dict(target_modules=["q_proj", "down_proj"]),
    "dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "norms in full": dict(target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[0, 5]),
    "embedding and head": dict(target_modules=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_does_nothing_leaves_a_target_who_it_is_and_one_that_does_is_its_merged_model(kind, tied):
    if tied and kind == "embedding and head":
        pytest.skip("PEFT adapts a tied weight twice, and merges it twice")
    target = make_target(dtype=torch.float32, tie_word_embeddings=tied)
    own = target_fingerprint(target)
    model = get_peft_model(deepcopy(target), LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS[kind]))
    assert target_fingerprint(model) == target_fingerprint(model.get_base_model()) == own
    set_seed(0)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_B", "lora_embedding_A", "modules_to_save", "tokens_delta")):
            parameter.data.add_(torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = target_fingerprint(model)
    assert adapted != own
    with model.disable_adapter():
        assert target_fingerprint(model) == own
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # only read
    merged = deepcopy(model)
    merged.merge_adapter()
    assert target_fingerprint(merged) == adapted
    assert target_fingerprint(deepcopy(model).merge_and_unload()) == adapted


def test_layers_are_borrowed_from_a_lora_target_as_from_its_merged_model():
    target = make_target(dtype=torch.float32)
    adapted = lora(target, 0.2, task_type="CAUSAL_LM")
    merged = deepcopy(adapted).merge_and_unload()
    config = make_drafter(target, layers=2).config
    for wrapped, plain_target in ((adapted, merged), (compiled_in_layers(deepcopy(target)), target)):
        found = borrow(wrapped, config, [1, 3], frozen=True).state_dict()
        expected = borrow(plain_target, config, [1, 3], frozen=True).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected if name.startswith("layers."))
        assert AdapterBase.of_layers(wrapped, [1]).fingerprint == AdapterBase.of_layers(plain_target, [1]).fingerprint


def test_a_peft_wrapped_drafter_drafts_like_the_merged_one():
    p, hidden = pair(), []
    wrapped = lora(p.drafter, 0.2)
    wrapped.get_base_model().register_forward_hook(lambda module, args, output: hidden.append(output[0][0]))
    with attach(p.target, wrapped) as attachment:
        output = plain(p, p.prompts[1], assistant_model=wrapped)
    assert torch.equal(output, p.plain[1])
    _, rounds, merged = decode(p, p.prompts[1], drafter=deepcopy(wrapped).merge_and_unload())
    assert attachment.rounds == rounds
    torch.testing.assert_close(torch.stack(hidden[: len(merged)]), torch.stack(merged), rtol=0, atol=1e-10)
    assert (hidden[0] - p.assisted[1][2][0]).abs().max() > 1e-3  # the adapter does something


def test_the_text_generation_pipeline_takes_an_attached_drafter(text_target, tokenizer):
    target = deepcopy(text_target)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):  # the pipeline compares those of the two configs
        value = getattr(tokenizer, key)
        setattr(target.config, key, value)
        setattr(target.generation_config, key, value)
    config = drafter_config(
        target, num_hidden_layers=1, block_size=K, mask_token_id=tokenizer.mask_token_id, target_layer_ids=[0, 2]
    )
    set_seed(0)
    drafter = DFlashDraftModel(config).eval()
    options = dict(max_new_tokens=12, do_sample=False)
    expected = pipeline("text-generation", model=target, tokenizer=tokenizer)("the quick brown", **options)
    with attach(target, drafter) as attachment:
        drafting = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
        assert drafting("the quick brown", **options) == expected
    assert sum(r.emitted for r in attachment.rounds) == 11 and any(r.drafted for r in attachment.rounds)


# ---- errors


WATERMARK = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)


def filled_cache(p):
    return {CACHE: p.target(p.prompts[0][:, :4], use_cache=True)[CACHE]}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (filled_cache, "pass the full conversation as input_ids and no cache"),
        (lambda p: dict(inputs=torch.cat(p.prompts)), "the batch has 3 rows.*Call generate row by row"),
        (lambda p: dict(num_beams=2), "silently ignore the drafter: set num_beams=1"),
        (lambda p: dict(num_return_sequences=2, do_sample=True), "set num_return_sequences to 1"),
        (lambda p: dict(output_hidden_states=True, return_dict_in_generate=True), "Run one more forward pass"),
        (lambda p: dict(inputs=None, inputs_embeds=p.target.get_input_embeddings()(p.prompts[0])), "pass input_ids"),
        (lambda p: dict(use_cache=False), "use_cache=True"),
        (lambda p: dict(guidance_scale=1.5), "silently wrong. Leave them out"),
        (lambda p: dict(watermarking_config=WATERMARK, do_sample=True), "silently wrong. Leave them out"),
    ],
    ids=["filled cache", "batch", "beams", "sequences", "hidden states", "embeds alone", "no cache", "guidance",
         "SynthID"],
)  # fmt: skip
def test_a_call_that_cannot_be_drafted_for_says_what_to_change(options, advice):
    p = pair()
    with attach(p.target, p.drafter) as attachment, pytest.raises(ValueError, match=advice):
        p.target.generate(**GREEDY | dict(inputs=p.prompts[0], assistant_model=p.drafter) | options(p))
    assert attachment.rounds == []


def test_internals_that_are_gone_or_changed_are_one_clear_error_before_anything_is_decoded(monkeypatch):
    p = pair()
    advice = "tested with 5.23 to 5.24: `pip install 'transformers==5.24"
    with monkeypatch.context() as patch:
        patch.delattr(GenerationMixin, "_prefill")
        with pytest.raises(RuntimeError, match=f"has no method _prefill.*{advice}"):
            attach(p.target, p.drafter)
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "_validate_generation_mode", lambda self, mode: None)
        with pytest.raises(RuntimeError, match=f"takes no generation_mode or generation_config.*{advice}"):
            hf_specauf.generate(p.target, p.drafter, p.prompts[0])
    assert not hasattr(type(p.target), "_attached_drafters")
    assert torch.equal(decode(p, p.prompts[0])[0], p.plain[0])


@pytest.mark.parametrize(
    ("drafter", "options", "error", "advice"),
    [
        (lambda: make_drafter(make_target(), dtype=torch.float16), {}, ValueError, "bfloat16 or float32"),
        (lambda: make_drafter(make_target(hidden_size=64)), {}, ValueError, r"hidden_size 64 \(target: 32\)"),
        (lambda: make_domino(make_target(vocab_size=97)), {}, ValueError, r"Domino .* vocab_size 97 \(target: 96\)"),
        (lambda: make_drafter(make_target(num_hidden_layers=5)), {}, ValueError, r"num_target_layers 5 \(target: 4\)"),
        (lambda: make_target(), {}, TypeError, "is not a block drafter; load one with AutoModel"),
        (lambda: pair().drafter, dict(draft_length=0), ValueError, r"must be in 1\.\.3"),
        (lambda: pair().drafter, dict(draft_length=K), ValueError, r"must be in 1\.\.3"),
        (lambda: pair().drafter, dict(draft_length="most"), ValueError, "'most'; .* or \"auto\""),
        (lambda: pair().drafter, dict(costs=Costs()), ValueError, 'costs are for draft_length="auto"'),
    ],
    ids=["fp16", "hidden size", "vocabulary", "layers", "a plain model", "of 0", "of K", "a word", "costs alone"],
)
def test_attach_refuses_what_cannot_work_and_leaves_the_target_alone(drafter, options, error, advice):
    target = pair().target
    before = set(vars(target))
    with pytest.raises(error, match=advice):
        attach(target, drafter(), **options)
    assert set(vars(target)) == before


@pytest.mark.parametrize("rows", [VOCAB + 8, MASK + 1], ids=["more rows", "fewer rows"])
@pytest.mark.parametrize("route", ["attach", "generate", "native"])
def test_a_fine_tune_with_a_resized_vocabulary_is_drafted_for_with_a_warning(rows, route):
    big = make_target(vocab_size=VOCAB + 4)
    drafter = make_drafter(big, dtype=torch.float64)
    target = deepcopy(big)
    target.resize_token_embeddings(rows, mean_resizing=False)
    prompt = random_prompts(1)
    expected = target.generate(prompt, **GREEDY)
    call = dict(GREEDY, assistant_model=drafter)
    if route == "native":
        assert torch.equal(target.generate(prompt, **call, speculation_type="dflash"), expected)
        return
    with pytest.warns(UserWarning, match=f"had {VOCAB + 4} rows in training, and this one's has {rows}"):
        if route == "generate":
            assert torch.equal(hf_specauf.generate(target, drafter, prompt, **GREEDY), expected)
            return
        attachment = attach(target, drafter)
    with attachment:
        assert torch.equal(target.generate(prompt, **call), expected)
    assert any(r.drafted for r in attachment.rounds)
    assert drafter.config.vocab_size == VOCAB + 4  # it is still the drafter of the target it was trained for


def test_a_target_whose_config_names_fewer_rows_than_it_was_padded_to_is_drafted_for():
    target = make_target(vocab_size=VOCAB + 4)
    drafter = make_drafter(target, dtype=torch.float64)
    target.config.vocab_size = VOCAB
    prompt = random_prompts(1)
    assert torch.equal(hf_specauf.generate(target, drafter, prompt, **GREEDY), target.generate(prompt, **GREEDY))


def test_words_added_by_a_fine_tune_are_no_other_vocabulary_and_one_that_takes_the_mask_is_a_warning(text_target):
    tokenizer = byte_level_tokenizer()
    trained = len(tokenizer)
    target = deepcopy(text_target)
    target.resize_token_embeddings(trained + 4, mean_resizing=False)
    drafter = make_drafter(target)
    for key, value in tokenizer_hashes(tokenizer).items():
        setattr(drafter.config, key, value)
    assert tokenizer.add_tokens(["<tool>", "</tool>"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(target, drafter, tokenizer=tokenizer).detach()
    drafter.config.mask_token_id = trained + 1
    with pytest.warns(UserWarning, match=f"mask token {trained + 1} is now the word '</tool>'"):
        attach(target, drafter, tokenizer=tokenizer).detach()
    drafter.config.tokenizer_hash = "0" * 16
    with pytest.raises(ValueError, match="nor that one with a few tokens added: load the tokenizer of"):
        attach(target, drafter, tokenizer=tokenizer)


def test_other_weights_of_the_target_are_noticed_whatever_it_is_called(text_target):
    drafter = make_drafter(text_target)
    drafter.config.target_model_name_or_path = "some/model"
    other = deepcopy(text_target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(other, drafter).detach()  # the same weights from a folder
        attach(other.to(torch.bfloat16), drafter).detach()  # and in another dtype
    other = deepcopy(text_target)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 0.1
    with pytest.warns(UserWarning, match="trained for some/model, and the target .* has other weights"):
        attach(other, drafter).detach()


def test_another_target_commit_or_template_is_a_warning_and_other_words_an_error(text_target, tokenizer):
    drafter = make_drafter(text_target)
    drafter.config.target_model_name_or_path, drafter.config.target_revision = "some/model", "a" * 40
    drafter.config.target_fingerprint = None  # as in drafters of a quantised target: names are all there is
    name, commit = text_target.config._name_or_path, "b" * 40
    assert origin_of(text_target) is None
    try:
        text_target.config._name_or_path = "some/finetune"
        with pytest.warns(UserWarning, match="trained for some/model, and the target is some/finetune"):
            attach(text_target, drafter).detach()
        text_target.config._name_or_path = "some/model"
        note_origin(text_target, Origin("some/model", commit))
        with pytest.warns(UserWarning, match=f"at {'a' * 40}, and the target is at {commit}"):
            attach(text_target, drafter).detach()
    finally:
        text_target.config._name_or_path = name
        _ORIGINS.pop(text_target, None)
    for key, value in tokenizer_hashes(tokenizer).items():
        setattr(drafter.config, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(text_target, drafter, tokenizer=tokenizer).detach()
    drafter.config.chat_template_hash = "0" * 16
    with pytest.warns(UserWarning, match="chat template is not the one it was trained with"):
        attach(text_target, drafter, tokenizer=tokenizer).detach()
    drafter.config.tokenizer_hash = "0" * 16
    with pytest.raises(ValueError, match="the tokenizer's vocabulary.*0000"):
        attach(text_target, drafter, tokenizer=tokenizer)
