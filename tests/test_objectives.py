"""Slot weights and the loss they make: golden numbers by hand, and the identities of arXiv 2607.01893."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from hf_specauf.losses.objectives import (
    DECAY_GAMMA,
    NORMALISATIONS,
    OBJECTIVES,
    LossSpec,
    first_failure_support,
    loss_terms,
    objectives_for,
    resolve_gamma,
    slot_weights,
)

ONE_BRANCH = objectives_for(1)
GAMMA = {name: 2.0 if objective.decays else None for name, objective in OBJECTIVES.items()}
E1, E2 = math.exp(-1 / 2), math.exp(-2 / 2)  # decay of slots 2 and 3 at gamma 2

# One row, four blocks of K = 4. Label 0 everywhere; V = 3. Right/wrong and valid:
CORRECT = torch.tensor([[[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1]]]).bool()
VALID = torch.tensor([[[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]]]).bool()
WEIGHTS = {
    "uniform": [[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]],
    "decay": [[1, E1, E2], [1, E1, 0], [1, E1, E2], [0, 0, 0]],
    "auf": [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]],
    "auf_decay": [[1, E1, 0], [1, E1, 0], [1, 0, 0], [0, 0, 0]],
}
# Logits that make them: the label at 0 and a rival at ln 2 (wrong) or -ln 2 (right), the third token at -inf.
# So p(label) = 1 / (1 + 2) = 1/3 where wrong and 1 / (1 + 1/2) = 2/3 where right.
RIGHT, WRONG = math.log(3 / 2), math.log(3)
LOSSES = torch.where(CORRECT, RIGHT, WRONG).double()
POOLED = {  # numerator, denominator
    "uniform": (5 * RIGHT + 3 * WRONG, 8),
    "decay": (RIGHT * (2 + E1 + 2 * E2) + WRONG * (1 + 2 * E1), 3 + 3 * E1 + 2 * E2),
    "auf": (3 * RIGHT + 2 * WRONG, 5),
    "auf_decay": (RIGHT * (2 + E1) + WRONG * (1 + E1), 3 + 2 * E1),
}
PER_BLOCK = {  # mean of the three blocks that have any weight
    "uniform": ((2 * RIGHT + WRONG) / 3 + RIGHT + (RIGHT + 2 * WRONG) / 3, 3),
    "decay": (
        (RIGHT * (1 + E2) + WRONG * E1) / (1 + E1 + E2) + RIGHT + (RIGHT * E2 + WRONG * (1 + E1)) / (1 + E1 + E2),
        3,
    ),
    "auf": ((RIGHT + WRONG) / 2 + RIGHT + WRONG, 3),
    "auf_decay": ((RIGHT + WRONG * E1) / (1 + E1) + RIGHT + WRONG, 3),
}


def golden_logits() -> torch.Tensor:  # (1, 4, 3, V)
    rival = torch.where(CORRECT, -math.log(2), math.log(2)).double()
    return torch.stack([torch.zeros_like(rival), rival, torch.full_like(rival, -torch.inf)], dim=-1)


def objective_loss(objective, logits, labels, valid, normalisation="pooled", gamma=None):
    """Numerator and denominator straight from logits, every slot's cross-entropy computed."""
    weights = slot_weights(objective, logits, labels, valid, gamma=gamma)
    losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return loss_terms(losses, weights, normalisation)


@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_weights_match_the_example_by_hand(objective):
    weights = slot_weights(objective, golden_logits(), torch.zeros_like(VALID).long(), VALID, gamma=GAMMA[objective])
    torch.testing.assert_close(weights, torch.tensor([WEIGHTS[objective]]).float())
    torch.testing.assert_close(weights, OBJECTIVES[objective].weights(CORRECT, VALID, GAMMA[objective]))


@pytest.mark.parametrize(("normalisation", "table"), [("pooled", POOLED), ("per_block", PER_BLOCK)])
@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_loss_matches_the_example_by_hand(objective, normalisation, table):
    labels = torch.zeros_like(VALID).long()
    terms = objective_loss(objective, golden_logits(), labels, VALID, normalisation, GAMMA[objective])
    torch.testing.assert_close(torch.stack(terms), torch.tensor(table[objective]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("correct", "valid", "support"),
    [
        ("000", "111", "100"),  # at the start of training the support is slot 1 alone
        ("101", "111", "110"),  # the failing slot is in, what follows is out, right or wrong
        ("110", "111", "111"),
        ("111", "111", "111"),
        ("111", "110", "110"),
        ("110", "110", "110"),
        ("000", "000", "000"),
    ],
)
def test_support_goes_up_to_and_includes_the_first_failure(correct, valid, support):
    def bits(row):
        return torch.tensor([[[c == "1" for c in row]]])

    assert first_failure_support(bits(correct), bits(valid)).equal(bits(support))


# ---- identities


@st.composite
def batches(draw, vocab: int = 5):
    """(B, N, K-1, V) float64 logits with a mix of right and wrong slots, labels and contiguous valid."""
    rows, count, slots = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    labels = torch.randint(vocab, (rows, count, slots), generator=generator)
    easy = draw(st.sampled_from([0.0, 1.5, 4.0]))
    logits = torch.randn(rows, count, slots, vocab, generator=generator, dtype=torch.float64)
    logits = logits + easy * one_hot(labels, vocab)
    lengths = torch.randint(slots + 1, (rows, count, 1), generator=generator)
    return logits, labels, torch.arange(slots) < lengths


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(["auf", "auf_decay"]), st.sampled_from(["pooled", "per_block"]))
def test_gradient_is_exactly_zero_after_the_first_failure_and_not_at_it(batch, objective, normalisation):
    logits, labels, valid = batch
    logits.requires_grad_()
    objective_loss(objective, logits, labels, valid, normalisation, GAMMA[objective])[0].backward()
    support = first_failure_support(logits.argmax(-1) == labels, valid)
    assert (logits.grad[~support] == 0).all()
    assert (logits.grad[support] != 0).all()


@settings(deadline=None, max_examples=30)
@given(batches())
def test_auf_equals_uniform_where_every_slot_is_right(batch):
    logits, labels, valid = batch
    logits = logits + 100.0 * one_hot(labels, logits.shape[-1])
    assert slot_weights("auf", logits, labels, valid).equal(slot_weights("uniform", logits, labels, valid))
    auf, uniform = (objective_loss(objective, logits, labels, valid) for objective in ("auf", "uniform"))
    assert auf == uniform


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.1, 20.0))
def test_auf_decay_is_auf_times_decay(batch, gamma):
    auf = slot_weights("auf", *batch)
    decay = slot_weights("decay", *batch, gamma=gamma)
    assert slot_weights("auf_decay", *batch, gamma=gamma).equal(auf * decay)


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(ONE_BRANCH), st.sampled_from(["pooled", "per_block"]), st.integers(1, 3))
def test_padding_blocks_and_micro_batches_change_nothing(batch, objective, normalisation, padding):
    def terms_and_gradient(parts):
        leaf = batch[0].clone().requires_grad_()
        terms = torch.zeros(2, dtype=torch.float64)
        for rows, blocks in parts:
            logits, labels, valid = leaf[rows, blocks], batch[1][rows, blocks], batch[2][rows, blocks]
            pad = labels.new_zeros(labels.shape[0], padding, labels.shape[2])
            logits = torch.cat([logits, logits.new_zeros(*pad.shape, logits.shape[-1])], dim=1)
            labels, valid = torch.cat([labels, pad], dim=1), torch.cat([valid, pad.bool()], dim=1)
            part = objective_loss(objective, logits, labels, valid, normalisation, GAMMA[objective])
            part[0].backward()
            terms += torch.stack(part).detach()
        return terms, leaf.grad

    whole = batch[0].clone().requires_grad_()
    expected = torch.stack(objective_loss(objective, whole, *batch[1:], normalisation, GAMMA[objective]))
    expected[0].backward()
    rows, count = batch[1].shape[:2]
    everything = slice(None)
    for parts in (
        [(everything, everything)],
        [(slice(i, i + 1), everything) for i in range(rows)],
        [(everything, slice(i, i + 1)) for i in range(count)],
    ):
        terms, gradient = terms_and_gradient(parts)
        torch.testing.assert_close(terms, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-12)


# ---- edges


@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_weights_carry_no_gradient(objective):
    logits = golden_logits().requires_grad_()
    weights = slot_weights(objective, logits, torch.zeros_like(VALID).long(), VALID, gamma=GAMMA[objective])
    assert not weights.requires_grad
    losses = torch.ones(VALID.shape, requires_grad=True)
    learnt = torch.ones(VALID.shape, requires_grad=True)  # even weights that do are cut off
    loss_terms(losses, learnt * weights)[0].backward()
    assert learnt.grad is None and losses.grad.equal(weights)


@pytest.mark.parametrize("normalisation", ["pooled", "per_block"])
@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_nothing_supervised_gives_zero_over_zero_with_a_graph(objective, normalisation):
    logits = golden_logits().requires_grad_()
    nothing = torch.zeros_like(VALID)
    numerator, denominator = objective_loss(
        objective, logits, nothing.long(), nothing, normalisation, GAMMA[objective]
    )
    numerator.backward()
    assert numerator == 0 and denominator == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("normalisation", ["pooled", "per_block"])
@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_slots_of_weight_zero_may_hold_anything(objective, normalisation, poison):
    table = {"pooled": POOLED, "per_block": PER_BLOCK}[normalisation]
    labels = torch.zeros_like(VALID).long()
    unused = torch.tensor([WEIGHTS[objective]]) == 0
    logits = golden_logits().masked_fill(unused[..., None], poison)
    weights = slot_weights(objective, logits, labels, VALID, gamma=GAMMA[objective])
    losses = LOSSES.masked_fill(unused, poison).requires_grad_()
    terms = loss_terms(losses, weights, normalisation)
    terms[0].backward()
    torch.testing.assert_close(torch.stack(terms), torch.tensor(table[objective]).double(), rtol=1e-6, atol=0)
    assert (losses.grad[unused] == 0).all() and (losses.grad[~unused] > 0).all()


def test_published_gammas():
    assert DECAY_GAMMA == {16: 7.0, 10: 5.0, 8: 4.0}
    for block_size, gamma in DECAY_GAMMA.items():
        assert resolve_gamma("decay", block_size, None) == resolve_gamma("auf_decay", block_size, None) == gamma
        assert resolve_gamma("auf", block_size, None) is None
        correct = torch.ones(1, 1, block_size - 1, dtype=torch.bool)
        weights = OBJECTIVES["decay"].weights(correct, correct, gamma)[0, 0]
        expected = [math.exp(-(k - 1) / gamma) for k in range(1, block_size)]
        torch.testing.assert_close(weights, torch.tensor(expected))
    assert resolve_gamma("decay", 16, 2) == 2.0  # a given one wins


@pytest.mark.parametrize(
    ("objective", "block_size", "gamma", "message"),
    [
        ("uniform", 16, 7.0, "'uniform' has no decay.*remove gamma"),
        ("auf", 8, 4.0, "'auf' has no decay.*remove gamma"),
        ("decay", 12, None, "needs gamma.*block_size is 12"),
        ("auf_decay", 4, None, "needs gamma.*block_size is 4"),
        ("decay", 16, 0.0, "gamma > 0"),
        ("auf_decay", 16, -1.0, "gamma > 0"),
        ("AUF", 16, None, "'AUF'.*uniform, decay, auf, auf_decay"),
    ],
)
def test_gamma_and_objective_that_cannot_be_meant_are_refused(objective, block_size, gamma, message):
    with pytest.raises(ValueError, match=message):
        resolve_gamma(objective, block_size, gamma)
    with pytest.raises(ValueError, match=message):
        LossSpec.of(objective, block_size, gamma)
    labels, valid = torch.zeros(1, 1, block_size - 1).long(), torch.ones(1, 1, block_size - 1).bool()
    with pytest.raises(ValueError, match=message):
        slot_weights(objective, torch.zeros(1, 1, block_size - 1, 3), labels, valid, gamma)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'mean'.*pooled, per_block"):
        LossSpec.of("auf", 4, normalisation="mean")


# ---- the table


def test_every_entry_of_two_branches_says_what_each_of_them_supports():
    supported = {
        name: (entry.base.until_fail, entry.until_fail, entry.shared_support)
        for name, entry in OBJECTIVES.items()
        if entry.branches == 2
    }
    assert supported == {
        "domino_decay": (False, False, False),
        "b_auf": (True, False, False), "b_auf_decay": (True, False, False),
        "s_auf": (True, False, True), "s_auf_decay": (True, False, True),
        "f_auf": (True, True, False), "f_auf_decay": (True, True, False),
    }  # fmt: skip
    for name, entry in OBJECTIVES.items():
        assert entry.decays == name.endswith("decay") and entry.says and entry.title
        assert entry.base is None or entry.base.decays == entry.decays
        assert entry.base is None or entry.base.branches == 1
    assert objectives_for(1) == ["uniform", "decay", "auf", "auf_decay"] and len(objectives_for(2)) == 7


def test_two_denominators_are_at_work_where_the_branches_may_support_different_slots():
    differ = {
        (name, normalisation)
        for name in OBJECTIVES
        for normalisation in NORMALISATIONS
        if LossSpec.of(name, 4, GAMMA[name], normalisation=normalisation).supports_differ
    }
    assert differ == {(name, "pooled") for name in ("b_auf", "b_auf_decay", "f_auf", "f_auf_decay")}


def test_the_dearest_step_supports_every_slot_of_every_branch():
    for name in OBJECTIVES:
        most = LossSpec.of(name, 4, GAMMA[name], rows_per_chunk=9).of_every_slot()
        assert most.rows_per_chunk == 9 and most.objective.branches == OBJECTIVES[name].branches
        for objective in {most.objective, most.objective.base} - {None}:
            assert objective.weights(~CORRECT, VALID).equal(VALID.float())
