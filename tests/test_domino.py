"""Domino: golden tests of the causal head, the supports of every variant, and decoding that stays the target's own."""

import math
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import MASK, attach, make_domino, make_target, overfit, random_prompts
from peft import LoraConfig, get_peft_model
from test_generate import GREEDY, NEW, PROMPT, SAMPLING, FollowOn, decode, plain, recorded, sampled_p_value
from torch import nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModel, set_seed
from transformers.generation import LogitsProcessorList

import hf_specauf
from hf_specauf import DFlashConfig, DominoConfig, DominoDraftModel
from hf_specauf.drafters.drafts import BlockDrafts
from hf_specauf.drafters.modeling_domino import add_correction
from hf_specauf.drafters.verification import Draft
from hf_specauf.losses.blocks import make_blocks
from hf_specauf.losses.branches import branch_losses
from hf_specauf.losses.objectives import OBJECTIVES, LossSpec, objectives_for
from hf_specauf.target import FrozenTarget

pytestmark = pytest.mark.internals

K = 5
HEADS = [dict(shift_label=shift, pure_draft_prefix_len=pure) for shift in (True, False) for pure in (0, 1, 2)]


def named(head: dict) -> str:
    return f"{'shifted' if head['shift_label'] else 'unshifted'}, {head['pure_draft_prefix_len']} pure"


# ---- golden: training and decoding see the same


class Recording(BlockDrafts):
    """Keeps (tokens before, draft, logits of the draft) of every block."""

    def _fill(self, input_ids, hidden_states, base):
        self.scores = []
        draft, logits = super()._fill(input_ids, hidden_states, base)
        self.drafter.seen.append((input_ids, draft, torch.stack(self.scores, dim=1)))
        return Draft(draft, logits)

    def _draw(self, scores):
        self.scores.append(scores)
        return super()._draw(scores)


@torch.no_grad()
def teacher_forced(target, drafter, ids, anchor: int) -> torch.Tensor:
    """Final logits (P, V) of one block, in the training-mode forward, told the tokens that lie in `ids`."""
    config, frozen = drafter.config, FrozenTarget(target, drafter.config)
    anchors = torch.tensor([[anchor]])
    everything, document = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    blocks = make_blocks(
        ids, everything, document, anchors, anchors > 0, config.block_size, MASK, predictions=config.predictions
    )
    logits = drafter(
        frozen.noise_embeds(blocks.noise_ids), frozen.context(ids), blocks.attention_mask, blocks.position_ids,
        prev_embeds=frozen.noise_embeds(blocks.previous_ids),
        reduce=lambda hidden, rows, project: add_correction(frozen.logits(hidden), project(rows)),
    ).reduced  # fmt: skip
    return logits[0, 0]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("head", HEADS, ids=named)
def test_logits_of_slot_by_slot_decoding_equal_teacher_forced_ones_on_the_same_tokens(head, do_sample):
    target = make_target()
    drafter = make_domino(target, K, dtype=torch.float64, **head)
    drafter.embed_proj[2].weight.data.mul_(30)  # corrections that decide
    drafter.seen = []
    drafter.get_drafts = lambda target, config, **keys: Recording(drafter, target, config, **keys)
    set_seed(0)
    with attach(target, drafter):
        options = dict(do_sample=True, top_k=0) if do_sample else dict(do_sample=False)
        target.generate(random_prompts(1, PROMPT), max_new_tokens=12, **options, assistant_model=drafter)
    full = [(before, draft, logits) for before, draft, logits in drafter.seen if draft.shape[1] == K - 1]
    assert len(full) >= 3
    for before, draft, logits in full:
        ids = torch.cat([before, draft, draft[:, :1]], dim=1)  # one token more: shifted blocks have K labels
        expected = teacher_forced(target, drafter, ids, before.shape[1] - 1)[: K - 1]
        torch.testing.assert_close(logits[0].double(), expected, rtol=0, atol=1e-5 if do_sample else 1e-10)


@pytest.mark.parametrize("head", HEADS, ids=named)
def test_a_predicted_token_never_changes_its_own_logits_and_changes_the_corrected_ones_after_it(head):
    target = make_target()
    drafter = make_domino(target, K, dtype=torch.float64, **head)
    ids, anchor, pure = random_prompts(1, 24), 9, head["pure_draft_prefix_len"]
    before = teacher_forced(target, drafter, ids, anchor)
    assert len(before) == (K if head["shift_label"] else K - 1)
    for j in range(len(before)):
        changed = ids.clone()
        changed[0, anchor + j + 1] = (ids[0, anchor + j + 1] + 1) % MASK
        difference = (teacher_forced(target, drafter, changed, anchor) - before).abs().amax(-1)
        assert bool((difference[: j + 1] == 0).all()), j
        later = torch.arange(len(before)) > j
        assert torch.equal(difference > 0, later & (torch.arange(len(before)) >= pure)), j


@pytest.mark.parametrize(
    ("shift_label", "inner"), [(False, [1 + 0.8, -2 - 0.2]), (True, [0.5 + 0.8, 1 - 0.2, -2 + 0.4])]
)
def test_three_tokens_by_hand(shift_label, inner):
    """Gates of 1/2, candidate tanh(x), so S = x'/2 + S/2; W1 reads S twice and, of the hidden row, half its first
    entry. S: 0.4; 0.2 + 0.2 = 0.4; -0.3 + 0.2 = -0.1; 0.25 - 0.05 = 0.2. The first prediction is pure. Prediction j
    reads slot j + 1, whose entries are 1, 2, -4, or shifted slot j: 5, 1, 2, -4."""
    head = dict(gru_hidden_dim=1, emb_dim=1, pure_draft_prefix_len=1, shift_label=shift_label)
    drafter = make_domino(make_target(), 4, **head).double()
    layer = drafter.layers[0]
    zeroed = (layer.self_attn.o_proj, layer.mlp.down_proj, drafter.prefix_gru, drafter.embed_proj)
    for parameter in (parameter for module in zeroed for parameter in module.parameters()):
        parameter.data.zero_()  # the backbone is its last norm alone
    drafter.norm.eps = 0.0
    drafter.prefix_gru.weight_ih_l0.data[2, 0] = 1.0  # rows: reset, update, candidate
    drafter.embed_proj[0].weight.data[0, 0] = 0.5
    drafter.embed_proj[0].weight.data[0, -1] = 2.0
    drafter.embed_proj[2].weight.data[7, 0] = 3.0
    noise, count = torch.zeros(1, 4, 32).double(), len(inner) + 1
    noise[0, :, 0] = torch.tensor([5.0, 1.0, 2.0, -4.0])
    noise[0, :, 1] = (32 - noise[0, :, 0] ** 2).sqrt()  # a root mean square of 1, so that the norm changes nothing
    told = torch.zeros(1, 1, count, 32).double()
    told[..., 0] = torch.atanh(torch.tensor([0.8, 0.4, -0.6, 0.5], dtype=torch.float64))[:count]
    expected = torch.zeros(count, 96).double()
    expected[1:, 7] = torch.tensor([3 * x / (1 + math.exp(-x)) for x in inner], dtype=torch.float64)
    hidden, correction = drafter(
        noise, torch.ones(1, 5, 64).double(), prev_embeds=told,
        reduce=lambda hidden, rows, project: (hidden, project(rows)),
    ).reduced  # fmt: skip
    torch.testing.assert_close(hidden[0, 0, :, 0], noise[0, -count:, 0])
    torch.testing.assert_close(correction[0, 0], expected, rtol=1e-12, atol=1e-12)
    base, state = torch.arange(96.0)[None].double(), None
    for j in range(count):
        logits, state = drafter.correct(base, hidden[0, :, j], told[0, :, j], state, j)
        torch.testing.assert_close(logits, base + expected[j], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.flatten(), torch.tensor([0.2 if shift_label else -0.1]).double())


def test_the_head_is_a_torch_gru_and_two_matrices_as_sglang_computes_them():
    drafter = make_domino(make_target(), K, dtype=torch.float64)
    gru = nn.GRU(32, 12, bias=False, batch_first=True).double()
    gru.load_state_dict(drafter.prefix_gru.state_dict())
    hidden, told = torch.randn(2, 3, K, 32).double(), torch.randn(2, 3, K, 32).double()
    states = gru(told.flatten(0, 1))[0].view(2, 3, K, 12)
    joint = torch.cat([hidden, states], dim=-1)
    expected = silu(joint @ drafter.embed_proj[0].weight.T) @ drafter.embed_proj[2].weight.T
    found = drafter.embed_proj[2](drafter.low_rank(hidden, told))
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:], rtol=1e-12, atol=1e-12)
    assert bool((found[:, :, 0] == 0).all()) and expected.abs().min() > 0


# ---- the loss


def crafted(base_right: list[list[int]], final_right: list[list[int]]):
    """Blocks whose base and final predictions are right (1) or wrong (0) as said: label 0, wrong is token 1."""
    base, final = torch.tensor([base_right]), torch.tensor([final_right])
    hidden = nn.functional.one_hot(1 - base, 4).double().requires_grad_()
    head = nn.Linear(4, 4, bias=False).double().requires_grad_(False)
    head.weight.data = torch.eye(4).double()
    project = nn.Linear(4, 4, bias=False).double()
    project.weight.data = 9 * torch.eye(4).double()
    rows = nn.functional.one_hot(1 - final, 4).double().requires_grad_()  # outvotes the base logits
    return hidden, rows, project, head, torch.zeros_like(base)


BASE_RIGHT = [[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
FINAL_RIGHT = [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
BASE_SUPPORT = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
FINAL_SUPPORT = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
ALL = [[1, 1, 1, 1]] * 3
SUPPORTS = {
    "domino": (ALL, ALL), "b_auf": (BASE_SUPPORT, ALL), "s_auf": (BASE_SUPPORT, BASE_SUPPORT),
    "f_auf": (BASE_SUPPORT, FINAL_SUPPORT),
}  # fmt: skip


@pytest.mark.parametrize("objective", objectives_for(2))
def test_supports_of_each_variant_on_hand_made_predictions(objective):
    hidden, rows, project, head, labels = crafted(BASE_RIGHT, FINAL_RIGHT)
    decays = objective.endswith("decay")
    valid = torch.ones_like(labels, dtype=torch.bool)
    final, base = branch_losses(
        hidden, rows, project, head=head, labels=labels, valid=valid, every_prediction=True,
        spec=LossSpec.of(objective, 5, 2.0 if decays else None),
    )  # fmt: skip
    decay = torch.exp(-torch.arange(4) / 2.0) if decays else torch.ones(4)
    for branch, support in zip((base, final), SUPPORTS[objective.removesuffix("_decay")]):
        torch.testing.assert_close(branch.weights[0], torch.tensor(support) * decay, check_dtype=False)
        counted = torch.tensor(support).bool()
        (gradient,) = torch.autograd.grad(branch.numerator, hidden, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, counted)
    assert torch.equal(final.correct[0], torch.tensor(FINAL_RIGHT).bool())
    with pytest.raises(RuntimeError, match="not have been used"):  # the base branch knows nothing of the head
        torch.autograd.grad(base.numerator, rows)


def test_a_slot_that_is_not_valid_ends_every_support():
    hidden, rows, project, head, labels = crafted(ALL, ALL)
    valid = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]]).bool()
    for objective in objectives_for(2):
        spec = LossSpec.of(objective, 5, 2.0 if OBJECTIVES[objective].decays else None)
        for branch in branch_losses(hidden, rows, project, head=head, labels=labels, valid=valid, spec=spec):
            assert torch.equal(branch.weights > 0, valid)


# ---- decoding is the target's own


@cache
def pair(shift_label: bool, architecture: str = "qwen3"):
    """As `test_generate.pair`, with a Domino drafter of K = 4."""
    target = make_target(architecture)
    prompts = random_prompts(3, PROMPT)
    texts = target.generate(prompts[:2], **GREEDY, suppress_tokens=[MASK])
    drafter = make_domino(target, 4, dtype=torch.float64, shift_label=shift_label)
    drafter = overfit(drafter, target, texts, PROMPT, steps=100)
    p = SimpleNamespace(target=target, drafter=drafter, prompts=[prompt[None] for prompt in prompts])
    p.plain = [plain(p, prompt) for prompt in p.prompts]
    p.assisted = [decode(p, prompt) for prompt in p.prompts]
    return p


ALIGNMENTS = pytest.mark.parametrize("shift_label", [True, False], ids=["shifted", "unshifted"])


@pytest.mark.own_parameters
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt2"])
@ALIGNMENTS
def test_greedy_decoding_is_lossless_with_accepted_and_rejected_tokens(architecture, shift_label):
    p = pair(shift_label, architecture)
    for expected, (output, rounds, _) in zip(p.plain, p.assisted):
        assert torch.equal(output, expected)
        assert sum(r.emitted for r in rounds) == NEW - 1
        assert all(r.emitted == r.accepted + 1 and r.accepted <= r.tested <= r.drafted <= 3 for r in rounds)
    seen = p.assisted[0][1] + p.assisted[1][1]
    assert sum(r.accepted for r in seen) >= len(seen)
    assert any(r.accepted < r.tested for r in seen + p.assisted[2][1])


@ALIGNMENTS
def test_the_causal_head_decides_what_is_drafted(shift_label):
    p = pair(shift_label)
    dull = deepcopy(p.drafter)
    dull.embed_proj[2].weight.data.zero_()
    with_head, without = (
        sum(r.accepted for prompt in p.prompts[:2] for r in decode(p, prompt, drafter=drafter)[1])
        for drafter in (p.drafter, dull)
    )
    assert with_head > without


@ALIGNMENTS
def test_caps_and_skipped_rounds_change_no_output(shift_label):
    p = pair(shift_label)
    for attached in (dict(draft_length=1), dict(skip_round=lambda rounds: len(rounds) % 2 == 0)):
        output, rounds, _ = decode(p, p.prompts[0], attached=attached)
        assert torch.equal(output, p.plain[0]) and any(r.accepted for r in rounds)


@pytest.mark.parametrize(
    "options",
    [dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2), dict(min_new_tokens=20, eos_token_id=80)],
    ids=str,
)
@ALIGNMENTS
def test_logits_processors_give_what_they_give_without_a_drafter(options, shift_label):
    p = pair(shift_label)
    accepted = 0
    for prompt in p.prompts[:2]:
        output, rounds, _ = decode(p, prompt, **options)
        assert torch.equal(output, plain(p, prompt, **options))
        accepted += sum(r.accepted for r in rounds)
    assert accepted


@pytest.mark.parametrize("do_sample", [False, True])
@ALIGNMENTS
def test_the_chain_itself_goes_through_the_logits_processors(do_sample, shift_label):
    p = pair(shift_label)
    output, rounds, _ = decode(
        p, p.prompts[0], do_sample=do_sample, logits_processor=LogitsProcessorList([FollowOn()])
    )
    assert all(r.accepted == r.drafted for r in rounds) and len(rounds) == -(-(NEW - 1) // 4)


def sampling_drafter(shift_label: bool):
    """A drafter for `test_generate.sampling_pair`'s target whose corrections matter as much as its base logits."""
    target = make_target(vocab_size=6, num_hidden_layers=2, dtype=torch.float32)
    config = dict(
        num_hidden_layers=1, block_size=4, mask_token_id=5, target_layer_ids=[0],
        kind="domino", own_keys=dict(gru_hidden_dim=8, emb_dim=4, shift_label=shift_label),
    )  # fmt: skip
    set_seed(0)
    drafter = DominoDraftModel(hf_specauf.target.drafter_config(target, **config)).eval()
    drafter.embed_proj[2].weight.data.mul_(20)
    return drafter


class ClaimsTheBase(BlockDrafts):
    """Draws from the corrected logits, but says it drew from the base ones."""

    def _fill(self, input_ids, hidden_states, base):
        return super()._fill(input_ids, hidden_states, base)._replace(logits=base)


@pytest.mark.own
def test_a_draft_that_claims_the_base_distribution_is_detected():
    drafter = sampling_drafter(True)
    drafter.get_drafts = lambda target, config, **keys: ClaimsTheBase(drafter, target, config, **keys)
    p_value, accepted = sampled_p_value(drafter, 900, 1.0, 0)
    assert p_value < 1e-6
    assert 0 < accepted < 1


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@ALIGNMENTS
def test_the_logits_a_draft_comes_with_are_the_corrected_ones_each_token_was_drawn_from(shift_label, options):
    for draft, drawn_from, claimed in recorded(sampling_drafter(shift_label), **options):
        torch.testing.assert_close(claimed, drawn_from, rtol=0, atol=0)
        assert torch.isfinite(claimed.gather(1, draft.T)).all()


@pytest.mark.own
@pytest.mark.parametrize(
    ("temperature", "top_k", "shift_label"),
    [(1.0, 0, True), (1.0, 0, False), (1.3, 4, True)],
    ids=["shifted", "unshifted", "temperature and top-k"],
)
def test_sampling_follows_the_targets_exact_distribution(temperature, top_k, shift_label):
    drafter = sampling_drafter(shift_label)
    p_value, accepted = sampled_p_value(drafter, 900, temperature, top_k)
    assert p_value > 1e-3
    assert 0.1 < accepted < 0.9


@pytest.mark.parametrize(
    ("target_dtype", "drafter_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_target_and_drafter_may_differ_in_dtype(target_dtype, drafter_dtype, do_sample):
    p = pair(True)
    mixed = SimpleNamespace(target=deepcopy(p.target).to(target_dtype), drafter=deepcopy(p.drafter).to(drafter_dtype))
    set_seed(0)
    output, rounds, _ = decode(mixed, p.prompts[0], do_sample=do_sample)
    assert any(r.accepted for r in rounds)
    if target_dtype == torch.float32 and not do_sample:
        assert torch.equal(output, p.plain[0])


# ---- the three ways to call it, and the one that is refused


@ALIGNMENTS
def test_generate_in_one_call_gives_the_targets_text_and_leaves_nothing_behind(shift_label):
    p = pair(shift_label)
    before = set(vars(p.target))
    passes = []
    handle = p.target.register_forward_hook(lambda *_: passes.append(1))
    try:
        output = hf_specauf.generate(p.target, p.drafter, p.prompts[0], draft_length=None, lookup=False, **GREEDY)
    finally:
        handle.remove()
    assert torch.equal(output, p.plain[0]) and set(vars(p.target)) == before
    assert len(passes) == len(p.assisted[0][1]) + 1  # drafts as an attached drafter does


def test_generate_in_one_call_within_an_attachment_gives_the_attachment_back():
    p = pair(True)
    other = make_domino(p.target, 4, dtype=torch.float64)
    with attach(p.target, p.drafter) as attachment:
        hf_specauf.generate(p.target, other, p.prompts[0], **GREEDY)
        assert attachment.generations == []
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
    assert attachment.rounds == p.assisted[0][1]


@ALIGNMENTS
def test_a_saved_folder_serves_as_custom_generate(shift_label, tmp_path):
    p = pair(shift_label)
    p.drafter.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DominoDraftModel
    call = dict(**GREEDY, assistant_model=again, custom_generate=str(tmp_path), trust_remote_code=True)
    call |= dict(local_files_only=True, token="a private repository's")
    before = set(vars(p.target))
    assert torch.equal(p.target.generate(p.prompts[0], **call), p.plain[0])
    assert set(vars(p.target)) == before
    with pytest.raises(ValueError, match="load the drafter with AutoModel.from_pretrained"):
        p.target.generate(p.prompts[0], **call | dict(assistant_model=None))
    with pytest.raises(ValueError, match=r"its config says num_target_layers 4 \(target: 5\)"):
        make_target(num_hidden_layers=5).generate(p.prompts[0], **call)
    with pytest.raises(ValueError, match=r"its config says vocab_size 96 \(target: 97\)"):
        make_target(vocab_size=97).generate(p.prompts[0], **call)


def test_a_push_that_would_leave_custom_generate_out_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"call drafter.push_to_hub\(repo\)"):
        pair(True).drafter.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="you/domino")
    assert not (tmp_path / "new").exists()


def test_a_shifted_domino_on_the_plain_dflash_route_is_refused_with_what_to_call():
    p = pair(True)
    with pytest.raises(ValueError, match=r"hf_specauf.generate\(target, drafter.*custom_generate="):
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter, speculation_type="dflash")


def test_an_unshifted_domino_on_the_plain_dflash_route_drafts_by_its_backbone_with_a_warning_and_stays_lossless():
    p = pair(False)
    with pytest.warns(UserWarning, match=r"leaves the causal head out. Call hf_specauf.generate\(target, drafter"):
        output = p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter, speculation_type="dflash")
    assert torch.equal(output, p.plain[0])


ADAPTERS = {
    "LoRA": dict(target_modules=["q_proj", "embed_proj.0", "embed_proj.2"], modules_to_save=["prefix_gru"]),
    "in full": dict(target_modules=["q_proj"], modules_to_save=["prefix_gru", "embed_proj"]),
}


@pytest.mark.parametrize("way", ADAPTERS)
def test_an_adapter_with_the_head_by_lora_or_in_full_acts_in_training_and_in_decoding(way):
    p = pair(True)
    set_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **ADAPTERS[way])
    wrapped = get_peft_model(deepcopy(p.drafter), config)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    with attach(p.target, wrapped) as attachment:
        output = p.target.generate(p.prompts[0], **GREEDY, assistant_model=wrapped)
    assert torch.equal(output, p.plain[0])
    merged = deepcopy(wrapped).merge_and_unload()
    assert type(merged) is DominoDraftModel
    assert decode(p, p.prompts[0], drafter=merged)[1] == attachment.rounds
    told = [teacher_forced(p.target, model, p.plain[0], 20) for model in (wrapped.get_base_model(), merged, p.drafter)]
    torch.testing.assert_close(told[0], told[1], rtol=0, atol=1e-10)
    assert (told[0] - told[2]).abs().max() > 1e-3


# ---- the configuration


def test_config_has_the_keys_sglang_reads_in_both_places_and_comes_back(tmp_path):
    drafter = make_domino(make_target(), K)
    drafter.save_pretrained(tmp_path)
    written = AutoConfig.from_pretrained(tmp_path)
    assert type(written) is DominoConfig and written.architectures == ["DominoDraftModel"]
    assert written.predictions == K and DFlashConfig(block_size=K).predictions == K - 1
    mirrored = written.to_dict()["dflash_config"]
    assert mirrored == {
        "projector_type": "domino", "emb_dim": 8, "gru_hidden_dim": 12, "pure_draft_prefix_len": 1,
        "shift_label": True, "mask_token_id": MASK, "target_layer_ids": [0, 2],
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in drafter.named_parameters() if name.startswith(("prefix", "embed"))}
    assert shapes == {
        "prefix_gru.weight_ih_l0": (36, 32), "prefix_gru.weight_hh_l0": (36, 12),
        "embed_proj.0.weight": (8, 44), "embed_proj.2.weight": (96, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (dict(pure_draft_prefix_len=5), r"must be in 0\.\.4"),
        (dict(pure_draft_prefix_len=4, shift_label=False), r"must be in 0\.\.3"),
        (dict(gru_hidden_dim=0), "the causal head needs 1 or more"),
        (dict(dflash_config={"shift_label": False}), "both must agree"),
        (dict(dflash_config={"projector_type": "dspark"}), "both must agree"),
        (dict(rank=3), "Unknown key"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_meant_is_refused(keys, advice):
    with pytest.raises(ValueError, match=advice):
        DominoConfig(**dict(block_size=5) | keys)


@pytest.mark.parametrize("key", ["gru_hidden_dim", "emb_dim", "pure_draft_prefix_len", "shift_label"])
def test_a_config_json_without_a_key_of_the_head_is_refused_by_name(tmp_path, key):
    values = make_domino(make_target(), K).config.to_dict()
    del values[key]
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
        DominoConfig.from_dict(values)
