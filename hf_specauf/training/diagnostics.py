"""What is counted of each batch, by name, and the paper's figures made of it (arXiv 2607.01893)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..losses.head_loss import HeadLoss
from ..serving.acceptance import accepted_prefix

# Sums over the slots or blocks of a row; the columns of every counter tensor, in this order.
COUNTERS = (
    "numerator",  # of the loss
    "denominator",
    "supported",  # slots that count in the loss
    "supported_correct",
    "valid",  # supervised slots
    "judged",  # valid slots whose prediction is known
    "judged_correct",
    "slots",  # all slots of all anchors asked for
    "blocks",  # blocks with a valid slot whose prefix is known
    "prefix",  # correct slots before the first wrong one
    "base_supported",  # as supported, in the base branch
)


def count_rows(
    numerators: torch.Tensor,
    denominators: torch.Tensor,
    found: HeadLoss,
    base: HeadLoss | None,
    valid: torch.Tensor,
    *,
    drafted: int,
    slots: int,
    judges_all: bool,
    hides_prefix: bool,
) -> torch.Tensor:
    """Counters of each row, (B, len(COUNTERS)) in float64.

    Args:
        numerators, denominators (`torch.Tensor` of shape `(B,)`): of the loss.
        found, base (`HeadLoss`): of the logits that decoding uses, and of the base branch where
        there is one.
        valid (`torch.BoolTensor` of shape `(B, N, P)`).
        drafted (`int`): slots of a block that decoding drafts, K - 1.
        slots (`int`): slots of a row's anchors, real or not.
        judges_all (`bool`): every valid slot was predicted, not the supported ones alone.
        hides_prefix (`bool`): the support says nothing of how far the correct prefix goes.
    """
    supported, correct = found.weights > 0, found.correct
    nothing = torch.zeros_like(valid)
    judged = valid if judges_all else nothing
    walked = (nothing if hides_prefix else valid)[:, :, :drafted]
    of_base = nothing if base is None else base.weights > 0
    counted = {
        "numerator": numerators,
        "denominator": denominators,
        "supported": supported.sum((1, 2)),
        "supported_correct": (supported & correct).sum((1, 2)),
        "valid": valid.sum((1, 2)),
        "judged": judged.sum((1, 2)),
        "judged_correct": (judged & correct).sum((1, 2)),
        "slots": torch.full_like(numerators, slots),
        "blocks": walked.any(-1).sum(1),
        "prefix": accepted_prefix(correct[:, :, :drafted], walked).sum(1),
        "base_supported": of_base.sum((1, 2)),
    }
    return torch.stack([counted[name].double() for name in COUNTERS], dim=1)


def diagnostics(sums: torch.Tensor) -> dict[str, float]:
    """The paper's diagnostics from summed counters (len(COUNTERS),). A Domino drafter's are of its
    final logits; `base_active_ratio` is its base branch's."""
    total = named(sums)

    def ratio(a: str, b: str) -> float:
        return total[a] / total[b] if total[b] else float("nan")

    found = {
        "active_ratio": ratio("supported", "valid"),
        "active_ratio_all_slots": ratio("supported", "slots"),
        "support_accuracy": ratio("supported_correct", "supported"),
        "teacher_forced_tau": 1 + ratio("prefix", "blocks"),
    }
    if total["judged"]:
        found["common_accuracy"] = ratio("judged_correct", "judged")
    if total["base_supported"]:
        found["base_active_ratio"] = ratio("base_supported", "valid")
    return found


def named(sums: torch.Tensor) -> dict[str, float]:
    """Summed counters (len(COUNTERS),) by their names."""
    return dict(zip(COUNTERS, sums.tolist()))


class StepTotals(NamedTuple):
    """What all processes know at the end of an optimizer step."""

    numerator: float
    denominator: float
    unsound: bool  # a process has a gradient that is not finite
    told_to_stop: bool  # a process was interrupted


class StepSums:
    """The loss of the optimizer step under way, summed over its micro-batches, and what else the
    processes must agree on. One reduction carries all of it, so that every process draws the same
    conclusion."""

    def __init__(self, device: torch.device):
        self._terms = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, counters: torch.Tensor) -> None:
        """Add a micro-batch's summed counters (len(COUNTERS),)."""
        self._terms += counters[:2]

    def reset(self) -> None:
        """Forget the step, whatever ended it."""
        self._terms.zero_()

    def agree(
        self, add_up: Callable[[torch.Tensor], torch.Tensor], *, unsound: bool, told_to_stop: bool
    ) -> StepTotals:
        """End the step: the totals over all processes.

        Args:
            add_up (`Callable`): sums a tensor over all processes.
            unsound, told_to_stop (`bool`): of this process, see [`StepTotals`].
        """
        signs = self._terms.new_tensor([unsound, told_to_stop])
        numerator, denominator, bad, stop = add_up(torch.cat([self._terms, signs])).tolist()
        self.reset()
        return StepTotals(numerator, denominator, bad > 0, stop > 0)
