"""Products of few rows on a CPU: two forms, the faster of which is found by trying, while a drafter is at work."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import attach
from test_generate import GREEDY, pair
from torch import nn
from torch.nn import functional as F

import hf_specauf
from hf_specauf.drafters import verification
from hf_specauf.drafters.verification import FEW, TRIED, FewRows, Trial, few_rows

pytestmark = pytest.mark.internals


def replaced(*models) -> list[nn.Module]:
    """Modules that multiply so."""
    return [module for model in models for module in model.modules() if type(module.forward) is FewRows]


def chosen(turned: bool) -> Trial:
    trial = Trial()
    trial.turned = turned
    return trial


class Everywhere(dict):
    """Trials that are all decided, and the keys that were asked for."""

    def __init__(self, turned: bool):
        super().__init__()
        self.turned, self.asked = turned, set()

    def get(self, key, default=None):
        self.asked.add(key)
        return chosen(self.turned)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 6), (4, 6), (2, 3, 6), (1, FEW, 6)])
def test_both_forms_are_the_same_product_in_rows_that_lie_one_after_another(shape, bias):
    linear = nn.Linear(6, 10, bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y = FewRows(linear).product(x, turned=True)
    torch.testing.assert_close(y, F.linear(x, linear.weight, linear.bias), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous() and y.shape == (*shape[:-1], 10)
    # x need not lie so: heads are cut out of wider rows
    wide = torch.randn(*shape[:-1], 9, dtype=torch.float64)[..., 2:8]
    torch.testing.assert_close(FewRows(linear).product(wide, turned=True), linear(wide), rtol=1e-12, atol=1e-12)


def test_both_forms_compute_in_autocasts_dtype_and_have_the_same_gradient():
    linear, x = nn.Linear(6, 10), torch.randn(1, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = FewRows(linear).product(x, turned=True)
        assert turned.dtype == linear(x).dtype == torch.bfloat16
    gradients = []
    for form in (False, True):
        (gradient,) = torch.autograd.grad(FewRows(linear).product(x, turned=form).square().sum(), linear.weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("seconds", "turned"), [((2.0, 1.0), True), ((1.0, 2.0), False), ((1.0, 0.95), False)])
def test_the_forms_take_turns_until_one_is_clearly_the_faster(seconds, turned):
    trial, turns = Trial(), []
    while trial.turned is None:
        turns.append(trial.turn())
        # stalls of the machine, which must not decide
        trial.learn(turns[-1], 100.0 if len(turns) in (1, 2, 4) else seconds[turns[-1]])
    assert turns == [False, True] * TRIED
    assert trial.turned is turned is trial.turn()


def test_threads_that_come_at_once_decide_all_the_same():
    trial = Trial()
    for seconds in (trial.seconds[False], trial.seconds[True]):
        seconds += [1.0] * TRIED  # so many were added before anybody looked
    trial.learn(True, 1.0)
    assert trial.turned is False


def test_the_first_products_of_a_shape_are_tried_and_later_ones_take_what_was_chosen(monkeypatch):
    monkeypatch.setattr(verification, "TRIALS", {})
    linear, forms = nn.Linear(6, 10), []
    few, product = FewRows(linear), FewRows.product
    monkeypatch.setattr(FewRows, "product", lambda self, x, turned: forms.append(turned) or product(self, x, turned))
    for _ in range(2 * TRIED + 3):
        few(torch.randn(1, 4, 6))
    (trial,) = verification.TRIALS.values()
    assert forms == [False, True] * TRIED + [trial.turned] * 3
    # One row, and many, are left to torch, and so is all that must be the same in each run.
    monkeypatch.setattr(verification, "TRIALS", Everywhere(True))
    forms.clear()
    for rows in (1, 2, FEW, FEW + 1):
        few(torch.randn(1, rows, 6))
    assert forms == [False, True, True, False]
    torch.use_deterministic_algorithms(True)
    try:
        few(torch.randn(1, 4, 6))
    finally:
        torch.use_deterministic_algorithms(False)
    assert forms[4:] == [False]


@pytest.mark.parametrize("turned", [True, False])
def test_output_is_plain_decodings_in_both_forms(turned, monkeypatch):
    p = pair()
    monkeypatch.setattr(verification, "TRIALS", Everywhere(turned))
    output = hf_specauf.generate(p.target, p.drafter, p.prompts[0], **GREEDY, lookup=False, draft_length=None)
    assert torch.equal(output, p.plain[0])
    # the target's and the drafter's, the head among them
    shapes = {key[1:3] for key in verification.TRIALS.asked}
    assert tuple(p.target.lm_head.weight.shape) in shapes and tuple(p.drafter.fc.weight.shape) in shapes


def test_both_models_multiply_so_while_a_call_lasts_and_no_longer(monkeypatch):
    p, seen = pair(), []
    prefill = hf_specauf.drafters.loop.Decoding._prefill

    def looked(self):
        seen.append(len(replaced(p.target, p.drafter)))
        copies = copy.deepcopy(p.target), pickle.loads(pickle.dumps(p.drafter))
        assert all(module.forward.linear is module for module in replaced(*copies))
        prefill(self)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(hf_specauf.drafters.loop.Decoding, "_prefill", looked)
    with attach(p.target, p.drafter):
        assert replaced(p.target, p.drafter) == []
        p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
        assert replaced(p.target, p.drafter) == []
        with pytest.raises(KeyboardInterrupt):
            p.target.generate(p.prompts[0], **GREEDY, assistant_model=p.drafter)
    assert replaced(p.target, p.drafter) == []
    linears = [one for model in (p.target, p.drafter) for one in model.modules() if type(one) is nn.Linear]
    assert seen == [len(linears)] * 2 and len(linears) > 20


def test_what_multiplies_in_its_own_way_is_left_alone():
    class Own(nn.Linear):
        pass

    hooked, compiled = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(hooked, ModelHook())
    forward = hooked.forward
    compiled[0].compile()
    wrapped = nn.Sequential(torch.compile(nn.Linear(4, 4)))
    others = nn.Sequential(hooked, Own(4, 4), nn.Linear(4, 4, device="meta"), nn.Embedding(4, 4), nn.Linear(4, 4))
    with few_rows(others, compiled, wrapped, None, len):
        assert [type(one.forward) is FewRows for one in others] == [False, False, False, False, True]
        assert hooked.forward is forward and replaced(compiled, wrapped) == []
    assert replaced(others, compiled, wrapped) == [] and hooked.forward is forward
    assert "forward" not in others[-1].__dict__
