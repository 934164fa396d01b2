"""Anchors and blocks: what may be drawn, what a slot is asked, and what it can see."""

from dataclasses import replace

import pytest
import torch
from conftest import MASK, PAD, make_drafter, make_target, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import cross_entropy

from hf_specauf.losses.blocks import (
    EVALUATION_STEP,
    AttentionRule,
    anchor_candidates,
    document_positions,
    make_blocks,
    sample_anchors,
)
from hf_specauf.losses.objectives import loss_terms
from hf_specauf.target import FrozenTarget

K = 4
# Two documents and padding in one row; the second document starts supervised.
SUPERVISED, DOCUMENTS = "..####.#####..", "000000011111--"


def flags(row: str) -> torch.Tensor:
    """`..##` -> (1, S) bool"""
    return torch.tensor([[c == "#" for c in row]])


def documents(row: str) -> torch.Tensor:
    """`0011-` -> (1, S) long, - is padding"""
    return torch.tensor([[-1 if c == "-" else int(c) for c in row]])


def blocks_at(anchors: list[int], supervised: str = SUPERVISED, document_row: str = DOCUMENTS, real=None, ids=None):
    """Blocks at hand-chosen anchors of one row whose tokens, unless given, are 10, 11, 12, ..."""
    ids = torch.arange(10, 10 + len(supervised))[None] if ids is None else ids
    anchors = torch.tensor([anchors])
    real = torch.ones_like(anchors, dtype=torch.bool) if real is None else torch.tensor([real])
    return make_blocks(ids, flags(supervised), documents(document_row), anchors, real, K, MASK)


# ---- what may be drawn


@pytest.mark.parametrize(
    ("supervised", "document_row", "expected"),
    [
        ("..####..", "00000000", "..###..."),  # the label after the last one is not supervised
        ("..#.##..", "00000000", "....#..."),  # nor is the one after a lone supervised token
        ("####", "0000", ".##."),  # no context before the first token, no label after the last
        ("######", "000111", ".#..#."),  # neither reaches over a document's end
        ("#####", "00---", "....."),  # nor into padding, whatever is said to be supervised there
    ],
)
def test_anchors_are_supervised_with_context_before_and_a_label_after(supervised, document_row, expected):
    assert anchor_candidates(flags(supervised), documents(document_row)).equal(flags(expected))


@st.composite
def rows_of_documents(draw):
    """(B, S) supervised and document ids with padding at the end, and N."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 14))
    supervised, ids = [], []
    for _ in range(rows):
        supervised.append(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        row = sorted(draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)))
        padding = draw(st.integers(0, length))
        ids.append(row[: length - padding] + [-1] * padding)
    return torch.tensor(supervised), torch.tensor(ids), draw(st.integers(1, 20))


@settings(deadline=None, max_examples=150)
@given(rows_of_documents(), st.integers(0, 2**31 - 1), st.integers(EVALUATION_STEP, 2**31 - 1))
def test_anchors_are_distinct_candidates_as_many_as_there_are(row, seed, step):
    supervised, document_ids, count = row
    anchors, real = sample_anchors(supervised, document_ids, count, torch.arange(len(supervised)), seed, step)
    blocks = make_blocks(torch.zeros_like(document_ids), supervised, document_ids, anchors, real, K, MASK)
    candidates = anchor_candidates(supervised, document_ids)
    assert anchors.shape == real.shape == (len(supervised), count)
    assert real.sum(1).equal(candidates.sum(1).clamp(max=count))
    for row_anchors, row_real, row_candidates in zip(anchors, real, candidates):
        drawn = row_anchors[row_real]
        assert drawn.equal(drawn.unique()) and row_candidates[drawn].all()  # unique() sorts
    assert blocks.valid[..., 0].equal(real)  # a drawn block has at least one slot, a padding block none
    assert (blocks.valid[..., 1:] <= blocks.valid[..., :-1]).all()  # contiguous from slot 1


def test_each_candidate_is_drawn_equally_often_and_independently_from_step_to_step():
    supervised, document_ids, candidates, count, steps = flags("." + "#" * 25), documents("0" * 26), 24, 6, 2000
    drawn = torch.zeros(steps, 26)
    for step in range(steps):
        anchors, _ = sample_anchors(supervised, document_ids, count, torch.tensor([3]), 0, step)
        drawn[step, anchors[0]] = 1
    share = count / candidates
    deviation = (share * (1 - share) / steps) ** 0.5
    assert ((drawn.mean(0)[1:25] - share).abs() < 4.5 * deviation).all()
    kept = (drawn[1:] * drawn[:-1]).sum(1).mean()  # anchors two steps have in common
    assert abs(kept - count * share) < 0.1


def test_anchors_of_a_row_do_not_depend_on_its_batch_or_padding():
    rows = [(7, "..########", 0), (1, "..####....", 0), (12, ".#########", 5)]  # row number, supervised, more padding

    def draw(chosen, width):
        supervised = torch.cat([flags(row.ljust(width, ".")) for _, row, _ in chosen])
        ids = torch.cat([documents(("0" * len(row)).ljust(width, "-")) for _, row, _ in chosen])
        anchors, real = sample_anchors(supervised, ids, 3, torch.tensor([n for n, _, _ in chosen]), 5, 40)
        return [a[r].tolist() for a, r in zip(anchors, real)]

    alone = [draw([row], len(row[1]) + row[2])[0] for row in rows]
    assert draw(rows, 10) == alone
    assert draw(rows[::-1], 33) == alone[::-1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 9}, {"step": EVALUATION_STEP}, {"row_ids": 4}])
def test_anchors_change_with_seed_step_and_row_and_repeat_otherwise(change):
    def draw(seed=0, step=8, row_ids=3):
        row = "." + "#" * 60
        return sample_anchors(flags(row), documents("0" * 61), 10, torch.tensor([row_ids]), seed, step)[0].tolist()

    assert draw() == draw()
    assert draw(**change) != draw()


def test_rows_shorter_than_n_are_padded_with_blocks_that_are_not_real():
    anchors, real = sample_anchors(flags(".###"), documents("0000"), 8, torch.tensor([0]), 0, 0)
    assert anchors.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    assert real.tolist() == [[True, True] + [False] * 6]


# ---- what a slot is asked


def test_labels_are_the_tokens_after_the_anchor_and_noise_is_anchor_and_masks():
    blocks = blocks_at([2, 7])
    assert blocks.labels.tolist() == [[[13, 14, 15], [18, 19, 20]]]  # the token at anchor + k, k = 1..3
    assert blocks.noise_ids.tolist() == [[12, MASK, MASK, MASK, 17, MASK, MASK, MASK]]
    assert blocks.labels[blocks.valid].tolist() == [13, 14, 15, 18, 19, 20]


@pytest.mark.parametrize(
    ("supervised", "document_row", "anchor", "expected"),
    [
        ("..####..", "00000000", 2, "###"),
        ("..####..", "00000000", 3, "##."),  # supervision ends: partial blocks are kept
        ("..####..", "00000000", 4, "#.."),
        ("..##.##.", "00000000", 2, "#.."),  # nothing after a hole
        ("..######", "00001111", 2, "#.."),  # the document ends
        ("..######", "0000----", 2, "#.."),  # padding begins
        ("..######", "00000000", 5, "##."),  # the row ends
        ("..#.##..", "00000000", 2, "..."),
    ],
)
def test_valid_is_contiguous_and_ends_with_supervision_document_or_row(supervised, document_row, anchor, expected):
    assert blocks_at([anchor], supervised, document_row).valid[0].equal(flags(expected))


def test_positions_restart_at_a_document_and_slots_count_on_from_their_anchor():
    blocks = blocks_at([4, 8])
    context = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    positions = blocks.position_ids[0].tolist()
    assert positions[:12] == context == document_positions(documents(DOCUMENTS))[0, :12].tolist()
    assert positions[len(DOCUMENTS) :] == [4, 5, 6, 7] + [1, 2, 3, 4]


# ---- what a slot can see: a real drafter in float64


@pytest.fixture(scope="module")
def models():
    target = make_target()
    drafter = make_drafter(target, block_size=K, layers=2, dtype=torch.float64)
    return FrozenTarget(target, drafter.config), drafter


@pytest.fixture(scope="module")
def packed(models):
    """Blocks in both documents of the packed row, with their inputs: (blocks, context, noise)."""
    ids = random_prompts(1, len(DOCUMENTS))
    blocks = blocks_at([2, 3, 4, 8, 10, 5], real=[True] * 5 + [False], ids=ids)
    return blocks, models[0].context(ids), models[0].noise_embeds(blocks.noise_ids)


def fill(drafter, blocks, context, noise) -> torch.Tensor:  # (B, N, K, H)
    hidden = drafter(noise, context, blocks.attention_mask, blocks.position_ids).last_hidden_state
    return hidden.view(*blocks.anchors.shape, K, -1)


def reached(drafter, packed, which: str) -> torch.Tensor:
    """(inputs, N, K) bool: slots whose output changes, exactly, when one context position or one slot's noise does."""
    blocks, context, noise = packed
    before, rows = fill(drafter, blocks, context, noise), []
    for i in range((context if which == "context" else noise).shape[1]):
        changed = {"context": context.clone(), "noise": noise.clone()}
        changed[which][:, i] += 1.0
        rows.append((fill(drafter, blocks, **changed) != before).any(-1)[0])
    return torch.stack(rows)


@pytest.fixture(scope="module")
def seen_context(models, packed):
    return reached(models[1], packed, "context")  # (S, N, K)


@pytest.fixture(scope="module")
def seen_noise(models, packed):
    return reached(models[1], packed, "noise").view(6, K, 6, K)  # (N, K, N, K)


@pytest.mark.parametrize(("block", "anchor", "start"), [(0, 2, 0), (1, 3, 0), (2, 4, 0), (3, 8, 7), (4, 10, 7)])
class TestVisibleContext:
    def test_block_cannot_see_target_at_or_past_anchor(self, seen_context, block, anchor, start):
        assert not seen_context[anchor:, block].any()

    def test_block_cannot_see_another_document(self, seen_context, block, anchor, start):
        assert not seen_context[:start, block].any()

    def test_every_slot_sees_all_of_its_document_before_the_anchor(self, seen_context, block, anchor, start):
        assert seen_context[start:anchor, block].all()


def test_block_cannot_see_another_block_and_sees_all_of_itself(seen_noise):
    expected = torch.eye(6, dtype=torch.bool)[:, None, :, None].expand(6, K, 6, K)
    assert seen_noise.equal(expected)


def test_padding_block_sees_no_context(seen_context):
    assert not seen_context[:, 5].any()


@pytest.mark.parametrize("slots", [1, 2 * K, 4 * K])
def test_groups_change_nothing_and_hold_no_more_than_they_see(models, packed, monkeypatch, slots):
    blocks, context, noise = packed
    whole = fill(models[1], blocks, context, noise)
    monkeypatch.setattr("hf_specauf.losses.blocks.SMALLEST_GROUP", slots)
    real = torch.tensor([[True] * 5 + [False]])
    masks = AttentionRule(blocks.anchors, real, documents(DOCUMENTS), K).group_masks()
    per_group, seen = max(1, slots // K), [2, 3, 4, 8, 10, 0]
    parts = [seen[i : i + per_group] for i in range(0, 6, per_group)]
    assert [tuple(mask.shape[2:]) for mask in masks] == [(len(p) * K, max(p) + len(p) * K) for p in parts]
    blocks = replace(blocks, attention_mask=masks)
    torch.testing.assert_close(fill(models[1], blocks, context, noise), whole, rtol=1e-12, atol=1e-12)


def test_eager_and_sdpa_attention_agree(models, packed):
    drafter = models[1]
    assert drafter.config._attn_implementation == "sdpa"
    sdpa = fill(drafter, *packed)
    drafter.set_attn_implementation("eager")
    try:
        eager = fill(drafter, *packed)
    finally:
        drafter.set_attn_implementation("sdpa")
    assert not eager.equal(sdpa)  # two computations, not one twice
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-5)  # transformers' eager softmax is always fp32


def packed_rows(device: str = "cpu"):
    """ids, document ids, anchors, real of two long rows: several groups, two documents, padding."""
    ids, document_ids = random_prompts(2, 150).to(device), torch.zeros(2, 150, dtype=torch.long, device=device)
    document_ids[0, 70:] = 1
    document_ids[1, 140:] = -1
    anchors, real = sample_anchors(torch.ones_like(ids, dtype=torch.bool), document_ids, 40, torch.arange(2), 0, 0)
    real[1, -3:] = False
    return ids, document_ids, anchors, real


def test_flex_mask_is_the_same_rule():
    ids, document_ids, anchors, real = packed_rows()
    rule = AttentionRule(anchors, real, document_ids, K)
    flex = create_mask(rule.flex_mask().mask_mod, 2, None, 40 * K, 150 + 40 * K, "cpu")
    dense, start = torch.zeros_like(flex), 0
    for mask in rule.group_masks():
        slots, seen = mask.shape[2], mask.shape[3] - mask.shape[2]
        dense[:, :, start : start + slots, :seen] = mask[..., :seen]
        dense[:, :, start : start + slots, 150 + start : 150 + start + slots] = mask[..., seen:]
        start += slots
    assert len(rule.group_masks()) == 2 and torch.equal(flex, dense)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no backward of FlexAttention on CPU")
def test_flex_and_sdpa_attention_agree_on_cuda():
    target = make_target(dtype=torch.float32, hidden_size=64, head_dim=16).cuda()
    drafter = make_drafter(target, block_size=K, layers=2).cuda()
    frozen = FrozenTarget(target, drafter.config)
    ids, document_ids, anchors, real = packed_rows("cuda")
    found = []
    for name in ("sdpa", "flex_attention"):
        drafter.set_attn_implementation(name)
        supervised = torch.ones_like(ids, dtype=torch.bool)
        flex = name == "flex_attention"
        blocks = make_blocks(ids, supervised, document_ids, anchors, real, K, MASK, flex=flex)
        hidden = fill(drafter, blocks, frozen.context(ids), frozen.noise_embeds(blocks.noise_ids))
        found.append([hidden, *torch.autograd.grad(hidden[real].pow(2).sum(), list(drafter.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def gradients(models, supervised: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform pooled loss numerator on one row with N anchors, and its gradient for every drafter parameter."""
    frozen, drafter = models
    ids, document_ids = random_prompts(1, len(supervised)), torch.zeros(1, len(supervised), dtype=torch.long)
    anchors, real = sample_anchors(flags(supervised), document_ids, count, torch.tensor([0]), 0, 0)
    blocks = make_blocks(ids, flags(supervised), document_ids, anchors, real, K, MASK)
    hidden = fill(drafter, blocks, frozen.context(ids), frozen.noise_embeds(blocks.noise_ids))[:, :, 1:]
    losses = cross_entropy(frozen.logits(hidden).flatten(0, 2), blocks.labels.flatten(), reduction="none")
    numerator, _ = loss_terms(losses.view_as(blocks.labels), blocks.valid.float())
    grads = torch.autograd.grad(numerator, list(drafter.parameters()))
    return numerator.detach(), torch.cat([g.flatten() for g in grads])


def test_padding_blocks_add_nothing_to_loss_and_gradient(models):
    loss, gradient = gradients(models, "..###...", 2)  # as many as there are candidates
    padded_loss, padded_gradient = gradients(models, "..###...", 7)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-9, atol=1e-13)


def test_gradient_is_exactly_zero_when_no_slot_is_valid(models):
    loss, gradient = gradients(models, "........", 5)
    assert loss == 0 and (gradient == 0).all()  # NaN == 0 is false


def test_pad_token_in_a_row_is_masked_by_document_id_alone(models):
    """Padding is told by document id -1, so tokens that happen to equal pad are ordinary context."""
    frozen, drafter = models
    ids = random_prompts(1, 8)
    ids[0, 1] = PAD
    blocks = blocks_at([3], "..######", "00000000", ids=ids)
    assert blocks.attention_mask[0][0, 0].tolist() == [[True] * 3 + [True] * K] * K
