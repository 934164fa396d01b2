"""tau, alpha_k and the histogram, by hand and by their identity."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_specauf.drafters.draft_length import Round
from hf_specauf.serving.acceptance import accepted_prefix, summarize

NAN = math.nan
CASES = {  # K = 4 -> tau, A per pass, alpha_1..3, histogram of A = 0..3
    "a full, a partial and a failed draft": (
        [Round(4, 3, 3, 3), Round(2, 1, 2, 3), Round(1, 0, 1, 3)],
        (7 / 3, 4 / 3, [2 / 3, 1 / 2, 1.0], [1, 1, 0, 1]),
    ),
    # eos was the second drafted token: it is accepted, there is no bonus, slot 3 was never judged
    "a pass cut by end of sequence": (
        [Round(4, 3, 3, 3), Round(2, 2, 2, 3)],
        (3.0, 2.5, [1.0, 1.0, 1.0], [0, 0, 1, 1]),
    ),
    "slots beyond a cut are not failures": (
        [Round(2, 1, 2, 3), Round(1, 1, 1, 3)],
        (1.5, 1.0, [1.0, 0.0, NAN], [0, 2, 0, 0]),
    ),
    "a skipped round is a pass that judges no slot": (
        [Round(3, 2, 3, 3), Round(1, 0, 0, 0)],
        (2.0, 1.0, [1.0, 1.0, 0.0], [1, 0, 1, 0]),
    ),
    "a draft shortened by the length limit": (
        [Round(2, 1, 1, 1)],
        (2.0, 1.0, [1.0, NAN, NAN], [0, 1, 0, 0]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_summary_matches_the_example_by_hand(case):
    rounds, (tau, mean, alpha, histogram) = CASES[case]
    summary = summarize(rounds, block_size=4)
    assert (summary.tau, summary.accepted_per_pass) == pytest.approx((tau, mean))
    assert summary.alpha == pytest.approx(alpha, nan_ok=True)
    assert summary.histogram == histogram
    assert (summary.passes, summary.tokens) == (len(rounds), sum(r.emitted for r in rounds))


def test_no_pass_at_all_is_nan_and_null_in_json():
    summary = summarize([], block_size=3)
    assert math.isnan(summary.tau) and math.isnan(summary.accepted_per_pass)
    assert all(map(math.isnan, summary.alpha)) and len(summary.alpha) == 2
    values = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert values == {
        "tau": None, "accepted_per_pass": None, "alpha": [None, None], "histogram": [0, 0, 0], "passes": 0, "tokens": 0
    }  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 8).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), min_size=1))))
def test_tau_is_one_plus_the_sum_of_products_of_alpha(case):
    block_size, accepted = case
    drafted = block_size - 1
    summary = summarize([Round(a + 1, a, min(a + 1, drafted), drafted) for a in accepted], block_size)
    assert summary.tau == pytest.approx(1 + summary.accepted_per_pass)
    expected, product = 1.0, 1.0
    for alpha in summary.alpha:
        if product == 0:  # beyond every pass: alpha is NaN
            assert math.isnan(alpha)
            break
        product *= alpha
        expected += product
    assert summary.tau == pytest.approx(expected)


def test_accepted_prefix_counts_right_slots_before_the_first_wrong_or_invalid_one():
    correct = torch.tensor([[[1, 1, 1], [1, 0, 1], [0, 1, 1]], [[1, 1, 1], [1, 1, 0], [1, 1, 1]]]).bool()
    valid = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1], [0, 0, 0]]]).bool()
    assert accepted_prefix(correct, valid).tolist() == [[3, 1, 0], [2, 2, 0]]
