"""`head_loss` gives the plain computation's loss and gradients, and computes no more rows than are supported."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from hf_specauf.losses import head_loss as module
from hf_specauf.losses.head_loss import CausalHead, head_loss, plain_head_loss
from hf_specauf.losses.objectives import NORMALISATIONS, OBJECTIVES, LossSpec, Objective, objectives_for

H, V, E = 8, 13, 3
ONE_BRANCH = objectives_for(1)
AUF = LossSpec(OBJECTIVES["auf"])


def spec_of(name: str, normalisation: str = "pooled", rows_per_chunk: int = 256) -> LossSpec:
    objective = OBJECTIVES[name]
    return LossSpec(objective, 2.5 if objective.decays else None, normalisation, rows_per_chunk)


def dpace(right, log_p, support):
    """D-PACE's weights (arXiv 2605.18810): slot k weighs sum over j >= k of the product of q_1 .. q_j, with
    q = (1 + p) / 2; slots outside the support weigh nothing. It looks at every slot of a block at once."""
    q = torch.where(support, 0.5 + 0.5 * log_p.exp(), 1.0)
    reach = torch.where(support, q.cumprod(-1), 0.0)
    return reach.flip(-1).cumsum(-1).flip(-1)


def confident(right, log_p, support):
    """A weight where the loss stops early: by the label's own probability."""
    return 2.0 - log_p.exp()


BY_PROBABILITY = {
    "dpace": Objective("D-PACE", "all slots, by the chance to reach them", factor=dpace),
    "auf_confident": Objective("AUF by confidence", "up to the first wrong slot", until_fail=True, factor=confident),
    "decay_confident": Objective("decay by confidence", "all slots, weighted", decays=True, factor=confident),
}


def problem(rows=2, count=3, slots=4, correct="some", spans="some", dtype=torch.float64, seed=0):
    """hidden (with gradient), a frozen head, labels, valid."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, count, slots, H, dtype=dtype, requires_grad=True)
    head = nn.Linear(H, V, bias=False).to(dtype).requires_grad_(False)
    best = head(hidden).argmax(-1)
    hit = {"all": torch.ones(best.shape), "none": torch.zeros(best.shape), "some": torch.rand(best.shape)}[correct]
    labels = torch.where(hit > 0.4, best, (best + 1) % V)
    ends = {"whole": torch.full(best.shape[:2], slots), "empty": torch.zeros(best.shape[:2], dtype=torch.long)}
    ends["some"] = torch.randint(0, slots + 1, best.shape[:2])
    return hidden, head, labels, torch.arange(slots) < ends[spans][..., None]


def by_hand(hidden, head, labels, valid, name: str, per_block: bool):
    """Numerator and denominator written out, slot by slot, with nothing of ours but the names of four objectives."""
    numerator, denominator = 0.0 * hidden.sum(), 0.0
    for rows, row_labels, row_valid in zip(hidden.flatten(0, 1), labels.flatten(0, 1), valid.flatten(0, 1)):
        total, weights = 0.0, 0.0
        for k in range(len(row_labels)):
            if not row_valid[k]:
                break
            logits = rows[k] @ head.weight.T
            weight = math.exp(-k / 2.5) if name.endswith("decay") else 1.0
            total = total + weight * (logits.exp().sum().log() - logits[row_labels[k]])
            weights += weight
            if name.startswith("auf") and logits.argmax() != row_labels[k]:
                break
        if weights > 0:
            numerator = numerator + (total / weights if per_block else total)
            denominator += 1.0 if per_block else weights
    return numerator, denominator


@pytest.mark.parametrize("per_block", [False, True], ids=["pooled", "per_block"])
@pytest.mark.parametrize("name", ["uniform", "decay", "auf", "auf_decay"])
def test_both_ways_equal_a_loop_over_slots_by_hand(name, per_block):
    given = hidden, head, labels, valid = problem(3, 6, 5)
    spec = spec_of(name, "per_block" if per_block else "pooled", rows_per_chunk=4)
    numerator, denominator = by_hand(hidden, head, labels, valid, name, per_block)
    (expected,) = torch.autograd.grad(numerator, hidden)
    for way in (head_loss, plain_head_loss):
        found = way(*given, spec)
        (gradient,) = torch.autograd.grad(found.numerator, hidden)
        torch.testing.assert_close(found.numerator, numerator, rtol=1e-6, atol=1e-12)  # weights are fp32
        assert found.denominator.item() == pytest.approx(denominator, rel=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)


shapes = st.fixed_dictionaries(
    dict(
        rows=st.integers(1, 3), count=st.integers(1, 5), slots=st.integers(1, 7), seed=st.integers(0, 999),
        correct=st.sampled_from(["all", "none", "some"]), spans=st.sampled_from(["whole", "empty", "some"]),
    )
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    shape=shapes, objective=st.sampled_from([*ONE_BRANCH, *BY_PROBABILITY]),
    normalisation=st.sampled_from(NORMALISATIONS), chunk=st.sampled_from([1, 2, 1000]),
    fewest=st.sampled_from([1, 4, 32]), low_rank=st.booleans(),
)  # fmt: skip
def test_equal_to_all_logits_in_float64(shape, objective, normalisation, chunk, fewest, low_rank):
    hidden, head, labels, valid = problem(**shape)
    patch = pytest.MonkeyPatch()
    for name, entry in BY_PROBABILITY.items():  # an objective is one entry of the table
        patch.setitem(OBJECTIVES, name, entry)
    spec, extra = spec_of(objective, normalisation, chunk), None
    if low_rank:
        project = nn.Sequential(nn.Linear(E, E, bias=False), nn.Linear(E, V, bias=False)).double()
        project[0].requires_grad_(False)  # as part of an adapter may be
        extra = CausalHead(torch.randn(*labels.shape, E, dtype=hidden.dtype, requires_grad=True), project)
        if spec.objective.factor or (spec.objective.until_fail and normalisation == "per_block"):
            with pytest.raises(ValueError, match="Use normalisation: pooled"):
                head_loss(hidden, head, labels, valid, spec, causal_head=extra)
            patch.undo()
            return
    numerator, denominator, _, weights, _ = plain_head_loss(hidden, head, labels, valid, spec, extra)
    leaves = (hidden, *((extra.rows, extra.project[1].weight) if extra else ()))
    expected = torch.autograd.grad(2.5 * numerator, leaves)
    patch.setattr(module, "FEWEST_ROWS", fewest)
    found = head_loss(hidden, head, labels, valid, spec, causal_head=extra)
    patch.undo()
    gradients = torch.autograd.grad(2.5 * found.numerator, leaves)
    torch.testing.assert_close(found.numerator, numerator, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.denominator, denominator.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, weights.double(), rtol=1e-6 if spec.objective.factor else 1e-12, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert bool((gradients[0][weights == 0] == 0).all())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("objective", ONE_BRANCH)
def test_equal_in_fp32_to_1e_6(objective, device):
    hidden, head, labels, valid = (part.to(device) for part in problem(4, 16, 7, dtype=torch.float32))
    spec = spec_of(objective, rows_per_chunk=5)
    numerator = plain_head_loss(hidden, head, labels, valid, spec).numerator
    (expected,) = torch.autograd.grad(numerator, hidden)
    found = head_loss(hidden, head, labels, valid, spec)
    (gradient,) = torch.autograd.grad(found.numerator, hidden)
    torch.testing.assert_close(found.numerator, numerator, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_bf16_equals_given_the_same_argmax_and_few_first_failures_flip():
    hidden, head, labels, valid = problem(8, 64, 7, dtype=torch.bfloat16, spans="whole")
    logits = head(hidden)
    found = head_loss(hidden, head, labels, valid, spec_of("auf", rows_per_chunk=11))
    (gradient,) = torch.autograd.grad(found.numerator, hidden)
    weights = plain_head_loss(hidden, head, labels, valid, AUF).weights
    same = (found.weights == weights).all(-1)  # (B, N)
    assert (~same).sum().item() <= 5  # of 512 blocks
    losses = cross_entropy(logits.float().flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    numerator = (losses * weights)[same].sum()
    (expected,) = torch.autograd.grad(numerator, hidden)
    torch.testing.assert_close((found.losses * found.weights)[same].sum(), numerator, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient[same], expected[same], rtol=0.05, atol=0.01)


def test_bf16_gradients_are_scaled_exactly():
    hidden, head, labels, valid = problem(dtype=torch.bfloat16)
    numerator = head_loss(hidden, head, labels, valid, AUF).numerator
    (one,) = torch.autograd.grad(numerator, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(numerator / 7680, hidden)  # 1 / 7680 in bf16 is off by 0.3 %
    torch.testing.assert_close(scaled, (one.float() / 7680).bfloat16(), rtol=0, atol=0)


def test_autocast_around_a_drafters_forward_leaves_the_heads_loss_and_gradient_alone():
    hidden, head, labels, valid = problem(dtype=torch.float32)
    outside = head_loss(hidden, head, labels, valid, AUF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head_loss(hidden, head, labels, valid, AUF)
    assert torch.equal(inside.numerator, outside.numerator)
    gradients = [torch.autograd.grad(found.numerator, hidden)[0] for found in (inside, outside)]
    assert torch.equal(*gradients)


class CountingHead(nn.Linear):
    """A head that is no plain Linear, and counts the rows it is asked for."""

    computed = 0

    def forward(self, rows):
        self.computed += rows.shape[0]
        return super().forward(rows)


@pytest.mark.parametrize("fewest", [1, 16])
def test_rows_computed_are_the_support_alone(monkeypatch, fewest):
    monkeypatch.setattr(module, "FEWEST_ROWS", fewest)
    hidden, head, labels, valid = problem(4, 32, 7)
    counting = CountingHead(H, V, bias=False).double().requires_grad_(False)
    counting.weight.data = head.weight.data
    found = head_loss(hidden, counting, labels, valid, AUF)
    support = int((found.weights > 0).sum())
    assert 0 < support < int(valid.sum()) / 1.5
    if fewest == 1:
        assert counting.computed == support
    else:  # a few rows more in each of the last products, of which there are fewer
        assert support <= counting.computed < support + 7 * fewest
    correct = head_loss(hidden, head, labels, valid, AUF, every_prediction=True).correct
    assert torch.equal(correct, (head(hidden).argmax(-1) == labels) & valid)
    (plain_head,), (other,) = (
        torch.autograd.grad(head_loss(hidden, h, labels, valid, AUF).numerator, hidden) for h in (head, counting)
    )
    torch.testing.assert_close(plain_head, other)


@pytest.mark.parametrize("rows_per_chunk", [1, 10])
@pytest.mark.parametrize("objective", ["uniform", "auf"])
def test_logits_of_no_more_rows_than_a_chunk_at_a_time(objective, rows_per_chunk):
    hidden, head, labels, valid = problem(1, 33, 7, spans="whole", correct="all")  # 33: the last chunks are small
    most = []

    class Watching(CountingHead):
        def forward(self, rows):
            most.append(rows.shape[0])
            return super().forward(rows)

    watching = Watching(H, V, bias=False).double()
    watching.weight.data = head.weight.data
    for blocks in (33, 1):  # of one block several slots would go together
        most.clear()
        few = (part[:, :blocks] for part in (labels, valid))
        head_loss(hidden[:, :blocks], watching, *few, spec_of(objective, rows_per_chunk=rows_per_chunk))
        assert max(most) == min(rows_per_chunk, 7 * blocks)
        assert sum(most) == 7 * blocks


def test_without_gradient_nothing_is_formed_and_the_loss_is_the_same():
    hidden, head, labels, valid = problem()
    with torch.no_grad():
        silent = head_loss(hidden, head, labels, valid, AUF)
    loud = head_loss(hidden, head, labels, valid, AUF)
    assert not silent.numerator.requires_grad and loud.numerator.requires_grad
    assert silent.numerator == loud.numerator


def test_nothing_valid_gives_zero_with_a_graph():
    hidden, head, labels, valid = problem(spans="empty")
    found = head_loss(hidden, head, labels, valid, AUF)
    assert found.numerator == 0 and found.denominator == 0
    (gradient,) = torch.autograd.grad(found.numerator, hidden)
    assert bool((gradient == 0).all())
