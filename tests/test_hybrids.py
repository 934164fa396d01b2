"""Hybrid targets: layers that keep a recurrent state beside layers that keep keys and values."""

import threading
from copy import deepcopy

import pytest
import torch
from conftest import GATED, PAD, attach, make_domino, make_drafter, make_target, overfit, random_prompts
from test_generate import GREEDY
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, set_seed

import hf_specauf
from hf_specauf.drafters import target_parts
from hf_specauf.drafters.target_parts import Mixers, check_state, recurrent_mixers

pytestmark = pytest.mark.internals

DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"] * 2, **GATED,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
SHARED = dict(num_experts=4, shared_expert_intermediate_size=16, **EXPERTS)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4, **GATED)
FAMILIES = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | SHARED,
    "qwen3_next": DELTA | SHARED,
    "olmo_hybrid": DELTA,
    "falcon_h1": MAMBA | dict(mamba_n_heads=4, mamba_d_ssm=32),
    "granitemoehybrid": MAMBA | dict(
        layer_types=["mamba", "attention"] * 2, num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=32, position_embedding_type="rope",
    ),
    "bamba": MAMBA | dict(attn_layer_indices=[1, 3]),
    "nemotron_h": GATED | EXPERTS | dict(
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=4, n_routed_experts=4,
        layers_block_type=["mamba", "attention", "mamba", "mlp"], moe_shared_expert_intermediate_size=16,
    ),
    "jamba": GATED | dict(
        mamba_d_state=8, mamba_dt_rank=4, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1,
    ),
    "recurrent_gemma": GATED,
}  # fmt: skip
SERVED = [name for name in FAMILIES if name not in ("jamba", "recurrent_gemma")]
PROMPT, NEW = 12, 40


def hybrid(family: str, dtype: torch.dtype = torch.float32):
    set_seed(0)
    special = dict(eos_token_id=None, pad_token_id=PAD, bos_token_id=None)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | special))
    target = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    target.generation_config.pad_token_id = PAD
    return target.to(dtype).eval()


def trained(target, make=make_drafter):
    """A drafter that knows half of what the target writes."""
    prompts = random_prompts(3, PROMPT)
    texts = torch.cat([target.generate(prompt[None], **GREEDY | dict(max_new_tokens=NEW)) for prompt in prompts])
    return overfit(make(target), target, texts, PROMPT, steps=60), prompts, texts


@pytest.mark.parametrize("family", SERVED)
def test_logits_after_every_round_are_those_of_the_whole_text(family):
    target = hybrid(family)
    drafter, prompts, texts = trained(target)
    with attach(target, drafter) as attachment:
        for prompt, text in zip(prompts, texts):
            found = target.generate(
                prompt[None], **GREEDY | dict(max_new_tokens=NEW), assistant_model=drafter,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            assert torch.equal(found.sequences[0], text)
            with torch.no_grad():
                whole = target(found.sequences).logits[0, PROMPT - 1 : -1]
            torch.testing.assert_close(torch.cat(found.logits), whole.float(), rtol=0, atol=1e-5)
    parts = {round.accepted for round in attachment.rounds if round.accepted < round.drafted}
    assert 0 in parts and len(parts) > 1, "no draft was accepted in part"


def test_without_reading_again_the_logits_are_off(monkeypatch):
    """That the test above can fail: tokens alone would often not show it."""
    target = hybrid("qwen3_5_text")
    drafter, prompts, _ = trained(target)
    with attach(target, drafter):
        monkeypatch.setattr(Mixers, "read_again", lambda self, rows, kept: None)
        found = target.generate(
            prompts[:1], **GREEDY | dict(max_new_tokens=NEW), assistant_model=drafter, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    with torch.no_grad():
        whole = target(found.sequences).logits[0, PROMPT - 1 : -1]
    assert (torch.cat(found.logits) - whole).abs().max() > 1e-3


@pytest.mark.own_parameters
@pytest.mark.parametrize("options", [{}, {"draft_length": "auto"}, {"lookup": 6}], ids=["plain", "auto", "lookup"])
@pytest.mark.parametrize("make", [make_drafter, make_domino])
def test_every_way_to_draft_serves_a_hybrid_and_sampling_too(make, options):
    target = hybrid("qwen3_5_text")
    drafter, prompts, texts = trained(target, make)
    with attach(target, drafter, **options) as attachment:
        found = target.generate(prompts[:1], **GREEDY | dict(max_new_tokens=NEW), assistant_model=drafter)
        assert torch.equal(found, texts[:1])
        assert any(round.accepted < round.drafted for round in attachment.rounds)
        set_seed(0)
        sampled = target.generate(
            prompts[:1], max_new_tokens=NEW, do_sample=True, top_k=5, assistant_model=drafter,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    with torch.no_grad():
        whole = target(sampled.sequences).logits[0, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.cat(sampled.logits), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_a_padded_prompt_of_a_hybrid_decodes_as_plain_decoding_does(family):
    target = hybrid(family)
    drafter, prompts, _ = trained(target)
    padded = torch.cat([torch.full((1, 3), PAD), prompts[:1]], dim=1)
    inputs = dict(inputs=padded, attention_mask=(padded != PAD).long(), **GREEDY | dict(max_new_tokens=NEW))
    plain = target.generate(**inputs)
    assert torch.equal(hf_specauf.generate(target, drafter, **inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_reads_several_tokens_wrongly_is_refused_by_name_in_any_dtype(dtype):
    """Jamba starts from no state where it reads several tokens."""
    target = hybrid("jamba", dtype)
    with pytest.raises(ValueError, match="JambaForCausalLM reads several tokens .* Generate without assistant_model"):
        attach(target, make_drafter(target))
    assert type(target).__name__ == "JambaForCausalLM" and not hasattr(type(target), "_attached_drafters")


def test_a_state_outside_of_the_cache_is_refused_by_name():
    target = hybrid("recurrent_gemma")
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM keeps a state that cannot be put back"):
        attach(target, make_drafter(target))


def test_a_mixer_that_forgets_is_found_out_and_a_sound_target_is_tried_once(monkeypatch):
    target = hybrid("qwen3_5_text", torch.bfloat16)
    check_state(target)
    with monkeypatch.context() as patch:
        patch.setattr(target_parts, "_read", None)
        check_state(target)

    class Forgetful(type(recurrent_mixers(target)[0])):
        def forward(self, hidden_states, **kwargs):
            cache = next(value for value in kwargs.values() if hasattr(value, "get_recurrent_state"))
            if hidden_states.shape[1] > 1 and cache.layers[self.layer_idx].recurrent_states[0] is not None:
                cache.layers[self.layer_idx].recurrent_states[0].zero_()
            return super().forward(hidden_states, **kwargs)

    broken = deepcopy(target)
    recurrent_mixers(broken)[0].__class__ = Forgetful
    with pytest.raises(ValueError, match="rows of a mixer differ"):
        check_state(broken)


def test_a_static_cache_and_a_compiled_hybrid_are_refused():
    target = hybrid("qwen3_5_text")
    drafter = make_drafter(target)
    prompt = random_prompts(1, PROMPT)
    with attach(target, drafter), pytest.raises(ValueError, match="static"):
        target.generate(prompt, **GREEDY, assistant_model=drafter, cache_implementation="static")
    target.compile(backend="eager")
    with attach(target, drafter), pytest.raises(ValueError, match="without torch.compile"):
        target.generate(prompt, **GREEDY, assistant_model=drafter)


def test_threads_share_a_hybrid():
    target = hybrid("qwen3_5_text")
    drafter, prompts, texts = trained(target)
    found = {}

    def decode(i: int):
        for _ in range(3):
            found[i] = target.generate(
                prompts[i : i + 1], **GREEDY | dict(max_new_tokens=NEW), assistant_model=drafter
            )

    with attach(target, drafter):
        threads = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], texts[i : i + 1]) for i in range(3))


def test_an_interrupted_call_leaves_no_hook_on_a_hybrid():
    target = hybrid("qwen3_5_text")
    drafter = make_drafter(target)
    mixers = recurrent_mixers(target)

    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > PROMPT + 3:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with attach(target, drafter), pytest.raises(KeyboardInterrupt):
        target.generate(
            random_prompts(1, PROMPT), **GREEDY, assistant_model=drafter, stopping_criteria=[Interrupt()]
        )  # fmt: skip
    assert len(mixers) == 2
    assert not any(module._forward_pre_hooks for module in mixers)


def test_targets_without_a_state_are_not_tried(monkeypatch):
    target = make_target()
    monkeypatch.setattr(target_parts, "_read", None)
    check_state(target)
    assert recurrent_mixers(target) == []
