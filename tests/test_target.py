"""The frozen target: what is tapped, what is lent, and what is noticed when either is wrong."""

import pytest
import torch
from accelerate import cpu_offload
from conftest import ARCHITECTURES, MASK, VOCAB, attach, make_domino, make_drafter, make_target, random_prompts
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.models.muse_glimmer.modeling_muse_glimmer import MuseGlimmerTextNormedEmbedding

from hf_specauf.drafters.target_parts import embed_noise
from hf_specauf.identity import Identity, check_pair, embedding_rows
from hf_specauf.target import (
    FrozenTarget,
    decoder_layers,
    default_mask_token_id,
    default_target_layer_ids,
    drafter_config,
)

TAPS = [0, 2]
IDS = random_prompts(2, 20)


def freeze(target, taps=TAPS) -> FrozenTarget:
    return FrozenTarget(target, make_drafter(target, taps=taps).config)


def layer_outputs(frozen: FrozenTarget, call) -> list[torch.Tensor]:
    """Output of every decoder layer while `call()` runs."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(frozen.model)]
    call()
    for handle in handles:
        handle.remove()
    return outputs


def wrapped_in_lora(target, **kwargs):
    """A PEFT model whose adapter changes the output from the start."""
    return get_peft_model(target, LoraConfig(r=2, init_lora_weights=False, **kwargs))


# ---- taps


@pytest.mark.parametrize("taps", [[0, 2], [1], [0, 1, 2]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_are_the_outputs_of_the_named_layers(architecture, taps):
    frozen = freeze(make_target(architecture), taps)
    frozen.check(IDS[:1])
    layers = layer_outputs(frozen, lambda: frozen.model(input_ids=IDS))
    assert len(layers) == 4
    assert frozen.context(IDS).equal(torch.cat([layers[i] for i in taps], dim=-1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_context_keeps_the_taps_alone_and_never_calls_the_head(architecture):
    frozen = freeze(make_target(architecture))
    kept, head_calls = [], []
    frozen.backbone.register_forward_hook(lambda module, args, output: kept.append(output))
    frozen.head.register_forward_hook(lambda *_: head_calls.append(1))
    assert not frozen.context(IDS).requires_grad
    assert [i for i, state in enumerate(kept[0].hidden_states) if state is not None] == [i + 1 for i in TAPS]
    assert not kept[0].get("past_key_values") and not head_calls
    frozen.logits(kept[0].last_hidden_state)
    assert head_calls  # the hook was on the head


@pytest.mark.parametrize("padding", [slice(12, None), slice(0, 5)], ids=["right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_context_does_not_depend_on_what_is_in_the_padding(architecture, padding):
    frozen = freeze(make_target(architecture))
    mask = torch.ones_like(IDS)
    mask[:, padding] = 0
    changed = torch.where(mask.bool(), IDS, (IDS + 1) % MASK)
    one, other = (frozen.context(ids, mask)[mask.bool()] for ids in (IDS, changed))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [1, -1])
def test_a_tap_off_by_one_is_caught(offset):
    """The backbone answers as a transformers release would that counted layers differently."""
    frozen = freeze(make_target(), taps=[1, 2])
    frozen.check(IDS[:1])

    def ask_for_all(module, args, kwargs):
        return args, kwargs | ({"output_hidden_states": True} if kwargs.get("output_hidden_states") else {})

    def shift(module, args, output):
        if output.hidden_states is not None:
            output.hidden_states = output.hidden_states[offset:] + output.hidden_states[:offset]
        return output

    frozen.backbone.register_forward_pre_hook(ask_for_all, with_kwargs=True)
    frozen.backbone.register_forward_hook(shift)
    with pytest.raises(ValueError, match=r"taps \[1, 2\] are not.*wrong layers"):
        frozen.check(IDS[:1])


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt2"])
def test_an_untied_head_is_caught(architecture):
    target = make_target(architecture)
    frozen = freeze(target)
    frozen.check(IDS[:1])
    frozen.head = torch.nn.Linear(32, VOCAB, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="head is not the trained one"):
        frozen.check(IDS[:1])


def test_check_leaves_no_hooks_behind():
    frozen = freeze(make_target())
    frozen.context(IDS)  # transformers installs its own on first use

    def hooks():
        return [len(module._forward_hooks) for module in frozen.model.modules()]

    before = hooks()
    frozen.check(IDS[:1])
    assert hooks() == before


# ---- what is borrowed


def test_target_is_frozen_in_eval_and_lends_its_own_modules():
    target = make_target().train().requires_grad_(True)
    before = [p.data_ptr() for p in target.parameters()]
    frozen = freeze(target)
    assert frozen.model is target and not any(module.training for module in target.modules())
    assert not any(p.requires_grad for p in target.parameters())
    assert [p.data_ptr() for p in target.parameters()] == before  # neither moved nor copied
    assert frozen.head is target.get_output_embeddings() and frozen.embedding is target.get_input_embeddings()


def test_gradient_goes_through_the_lent_head_and_not_into_it():
    frozen = freeze(make_target())
    hidden = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    frozen.logits(hidden).sum().backward()
    assert (hidden.grad != 0).any() and frozen.head.weight.grad is None


def test_a_target_in_peft_is_tapped_with_its_adapter():
    plain = freeze(make_target()).context(IDS)
    wrapped = wrapped_in_lora(make_target(), target_modules=["q_proj", "embed_tokens", "lm_head"])
    frozen = freeze(wrapped)
    frozen.check(IDS[:1])
    assert not any(p.requires_grad for p in wrapped.parameters())
    layers = layer_outputs(frozen, lambda: wrapped(input_ids=IDS))
    assert frozen.context(IDS).equal(torch.cat([layers[i] for i in TAPS], dim=-1))
    with wrapped.disable_adapter():
        assert frozen.context(IDS).equal(plain)
    assert not frozen.context(IDS).equal(plain)
    assert not frozen.context(IDS).requires_grad  # leaving disable_adapter() makes PEFT train its adapter again


def test_a_target_with_a_device_map_is_dispatched():
    target = make_target()
    frozen = freeze(target)
    assert not frozen.dispatched
    target.hf_device_map = {"": "cpu"}  # as from_pretrained(device_map=...) leaves it
    assert frozen.dispatched


def test_a_target_offloaded_by_hand_stays_where_it_is():
    whole, target = freeze(make_target()), cpu_offload(make_target(), execution_device=torch.device("cpu"))
    frozen = freeze(target)
    frozen.place(torch.device("cpu"), shard=False)
    assert frozen.dispatched and all(parameter.is_meta for parameter in target.parameters())
    assert torch.equal(frozen.context(IDS), whole.context(IDS))


# ---- noise embeddings, in training and in decoding


def normed_target():
    """A target whose embedding module normalises (Muse): transformers' DFlash embeds without that norm."""
    target = make_target()
    embedding = MuseGlimmerTextNormedEmbedding(VOCAB, 32, 1).double()
    embedding.weight.data.mul_(3.0)
    target.set_input_embeddings(embedding)
    return target


EMBEDDINGS = {  # target -> factor on the embedding's rows
    "plain": (make_target, 1.0),
    "gemma scale": (lambda: make_target("gemma3_text"), 32**0.5),
    "embed_norm": (normed_target, 1.0),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_noise_keeps_an_embeddings_scale_and_leaves_out_its_norm(case):
    build, factor = EMBEDDINGS[case]
    target = build()
    embedding, before = target.get_input_embeddings(), target.get_input_embeddings()(IDS)
    expected = torch.nn.functional.embedding(IDS, embedding.weight) * factor
    torch.testing.assert_close(embed_noise(embedding, IDS), expected, rtol=1e-6, atol=0)  # Gemma's scale is fp32
    assert embedding(IDS).equal(before)  # the target itself keeps its norm
    assert before.allclose(expected, rtol=1e-6) == (case != "embed_norm")


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_training_and_decoding_embed_noise_alike(case):
    target = EMBEDDINGS[case][0]()
    drafter = make_drafter(target, block_size=4, dtype=torch.float64)
    frozen, seen = FrozenTarget(target, drafter.config), []
    drafter.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["noise_embeds"]), with_kwargs=True)
    with attach(target, drafter):
        text = target.generate(IDS[:1, :6], assistant_model=drafter, max_new_tokens=4, do_sample=False)
    anchor = text[:, 6:7]  # the prefill pass wrote it
    trained = frozen.noise_embeds(torch.cat([anchor, torch.full((1, 3), MASK)], dim=1))
    assert seen[0].equal(trained)


# ---- configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size 64 \(target: 32\)"),
        ({"num_target_layers": 5}, r"num_target_layers 5 \(target: 4\)"),
        ({"hidden_size": 64, "num_target_layers": 5}, r"hidden_size 64 .*num_target_layers 5 .*another drafter"),
    ],
)
def test_a_drafter_of_another_target_is_refused_by_name(change, message):
    target = make_target()
    config = make_drafter(target).config
    check_pair(target, config)
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        FrozenTarget(target, config)


def resized(rows: int, **kwargs):
    target = make_target(**kwargs)
    target.resize_token_embeddings(rows, mean_resizing=False)
    return target


def test_a_drafter_trained_further_for_a_resized_target_says_so_in_its_config():
    target = resized(VOCAB + 8)
    for make, rows in ((make_drafter, VOCAB + 8), (make_domino, VOCAB)):
        config = make(make_target()).config
        Identity.of(target).write_into(config)
        assert config.vocab_size == rows  # Domino has V rows of its own
    with pytest.raises(ValueError, match=r"^this Domino drafter .* vocab_size 96 \(target: 104\).*a row of its own"):
        FrozenTarget(target, config)


def test_a_resized_vocabulary_without_the_mask_token_is_refused_with_what_to_give_back():
    with pytest.raises(ValueError, match=r"mask_token_id is 95, .* cut to 95 rows.*its 96 rows back .*resize_token"):
        FrozenTarget(resized(MASK), make_drafter(make_target()).config)


def test_vocabulary_is_counted_in_embedding_rows():
    target = make_target()
    target.resize_token_embeddings(VOCAB + 4)
    target.config.vocab_size = VOCAB  # what a tokenizer or an old config may still say
    config = make_drafter(target).config
    assert embedding_rows(target) == VOCAB + 4 == config.vocab_size
    check_pair(target, config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drafter_config_takes_the_targets_widths_and_ids(architecture):
    target = make_target(architecture)
    target.generation_config.eos_token_id = 0
    config = drafter_config(target, num_hidden_layers=2, block_size=8, mask_token_id=MASK, target_layer_ids=TAPS)
    kv_heads = 4 if architecture == "gpt2" else 2
    assert (config.hidden_size, config.vocab_size, config.num_target_layers, config.head_dim) == (32, VOCAB, 4, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, kv_heads)
    assert config.intermediate_size == (128 if architecture == "gpt2" else 64)  # GPT-2 names none: 4 H
    assert config.max_position_embeddings == 256  # the target's, never the training length
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 0, 1)
    rope = getattr(target.config, "rope_parameters", None) or {"rope_theta": 10_000.0}
    rope = rope.get("full_attention", rope)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": rope["rope_theta"]}


@pytest.mark.parametrize(
    ("depth", "taps", "expected"),
    [(36, 5, [1, 9, 17, 25, 33]), (28, 5, [1, 7, 13, 19, 25]), (8, 5, [1, 2, 3, 4, 5]), (12, 1, [6]), (4, 1, [2])],
)
def test_default_taps(depth, taps, expected):
    assert default_target_layer_ids(depth, taps) == expected


@pytest.mark.parametrize(("depth", "taps"), [(4, 5), (7, 5), (4, 2), (3, 2)])
def test_default_taps_of_a_shallow_target_are_refused(depth, taps):
    message = rf"{depth} layers is too shallow.*target_layer_ids yourself.*0\.\.{depth - 2}"
    with pytest.raises(ValueError, match=message):
        default_target_layer_ids(depth, taps)


def test_default_mask_token_is_the_tokenizers_own_else_the_first_unused_row():
    def tokenizer(length, **special):
        words = {f"w{i}": i for i in range(length)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), **special)

    target = make_target()  # 96 rows
    assert default_mask_token_id(target, tokenizer(VOCAB, mask_token="w7")) == 7
    assert default_mask_token_id(target, tokenizer(90)) == 90
    with pytest.raises(ValueError, match="no mask token.*ids use every row.*give mask_token_id"):
        default_mask_token_id(target, tokenizer(VOCAB))


def test_a_model_without_a_head_is_refused():
    target = make_target()
    with pytest.raises(
        ValueError, match="Qwen3Model is not a decoder-only.*load the target with AutoModelForCausalLM"
    ):
        check_pair(target.model, make_drafter(target).config)
