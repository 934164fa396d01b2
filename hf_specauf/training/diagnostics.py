"""What is counted of each batch, by name, and the paper's figures made of it (arXiv 2607.01893).

The words *supervised*, *valid* and *supported* are those of `losses/blocks.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import EvalPrediction, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ..losses.branches import LossTerms
from ..losses.objectives import LossSpec
from ..serving.acceptance import accepted_prefix
from .config import AUFConfig
from .forward import BatchLosses

# Sums over the slots of a row; the first columns of every counter tensor, in this order. After them
# come, for each of the K - 1 slots that decoding drafts, the blocks that tested it, and then the
# blocks that accepted it.
COUNTERS = (
    "numerator",  # of the loss
    "denominator",
    "supported",  # slots
    "supported_correct",
    "valid",  # slots
    "predicted",  # valid slots, if all of them were predicted, else 0
    "predicted_correct",
    "slots",  # all slots of all anchors asked for
    "base_supported",  # slots that the base branch supports
)


def empty_counters(block_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Counters (C,) that have counted nothing: C columns, of which `COUNTERS` names the first."""
    columns = len(COUNTERS) + 2 * (block_size - 1)
    return torch.zeros(columns, dtype=torch.float64, device=device)


def count_rows(
    terms: LossTerms,
    losses: BatchLosses,
    spec: LossSpec,
    *,
    block_size: int,
    anchors_per_row: int,
    every_prediction: bool,
) -> torch.Tensor:
    """Counters of each row, (B, C) in float64.

    Args:
        terms (`LossTerms`): of the loss.
        losses (`BatchLosses`), spec (`LossSpec`): what they were made of.
        block_size (`int`): K.
        anchors_per_row (`int`): N, real or not.
        every_prediction (`bool`): valid slots that are not supported were predicted too.
    """
    valid, final, base = losses
    supported, correct = final.weights > 0, final.correct
    base_supported = torch.zeros_like(valid)
    if base is not None:
        base_supported = base.weights > 0
    predicted = torch.zeros_like(valid)
    if every_prediction or spec.objective.predicts_every_slot:
        predicted = valid
    # The first wrong slot ends a prefix, and a loss that stops there has seen it. A support that
    # the base branch cut hides it.
    seen = valid
    if spec.objective.shared_support and not every_prediction:
        seen = torch.zeros_like(valid)
    # decoding drafts K - 1 slots, and a drafter with shift_label predicts one more in training
    drafted = slice(block_size - 1)
    tested, accepted = verdicts(correct[:, :, drafted], seen[:, :, drafted])
    counters = {
        "numerator": terms.numerators,
        "denominator": terms.denominators,
        "supported": supported.sum((1, 2)),
        "supported_correct": (supported & correct).sum((1, 2)),
        "valid": valid.sum((1, 2)),
        "predicted": predicted.sum((1, 2)),
        "predicted_correct": (predicted & correct).sum((1, 2)),
        "slots": torch.full_like(terms.numerators, anchors_per_row * valid.shape[2]),
        "base_supported": base_supported.sum((1, 2)),
    }
    named_columns = torch.stack([counters[name].double() for name in COUNTERS], dim=1)
    return torch.cat([named_columns, tested.sum(1).double(), accepted.sum(1).double()], dim=1)


def verdicts(correct: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots of a block were tested and which accepted, if the labels are what the target
    would choose: a slot is tested where all slots before it were accepted and its label is there.

    Args:
        correct, seen (`torch.BoolTensor` of shape `(B, N, K - 1)`): seen slots have a label, and it
            is known whether they are correct.

    Returns:
        two `torch.BoolTensor` of the same shape.
    """
    slots = torch.arange(correct.shape[-1], device=correct.device)
    prefix = accepted_prefix(correct, seen)[:, :, None]
    return (slots <= prefix) & seen, slots < prefix


def named(sums: torch.Tensor) -> dict[str, float]:
    """Summed counters (C,) by their names."""
    return dict(zip(COUNTERS, sums[: len(COUNTERS)].tolist(), strict=True))


def loss_terms_of(sums: torch.Tensor) -> torch.Tensor:
    """Numerator and denominator (2,) of summed counters (C,). They stay on the device,
    because reading them would wait for it."""
    return torch.stack([sums[COUNTERS.index(name)] for name in ("numerator", "denominator")])


def teacher_forced_tau(sums: torch.Tensor) -> float:
    """What decoding would commit a pass if the labels were the target's choice, from summed
    counters (C,); 1 is the bonus.

    It is 1 + alpha_1 + alpha_1 alpha_2 + ..., where alpha_k counts only blocks that tested slot k.
    A block that ends with its answer, and without an error, says nothing of the slots after it. A
    mean of correct prefixes would take its end for an error, and be lower the shorter the answers
    are (verl-SpeCo#62). Without such blocks both are the same number. NaN where no slot was tested.
    """
    tested, accepted = sums[len(COUNTERS) :].view(2, -1)
    if tested[0] == 0:
        return float("nan")
    # NaN from the first slot that no block tested
    survivors = (accepted / tested).cumprod(0)
    return 1 + survivors.nansum().item()


def diagnostics(sums: torch.Tensor) -> dict[str, float]:
    """The paper's diagnostics from summed counters (C,). A Domino drafter's are of its
    final logits; `base_active_ratio` is its base branch's."""
    total = named(sums)

    def ratio(a: str, b: str) -> float:
        return total[a] / total[b] if total[b] else float("nan")

    found = {
        "active_ratio": ratio("supported", "valid"),
        "active_ratio_all_slots": ratio("supported", "slots"),
        "support_accuracy": ratio("supported_correct", "supported"),
        "teacher_forced_tau": teacher_forced_tau(sums),
    }
    if total["predicted"]:
        found["common_accuracy"] = ratio("predicted_correct", "predicted")
    if total["base_supported"]:
        found["base_active_ratio"] = ratio("base_supported", "valid")
    return found


def evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss and diagnostics of an evaluation, from the counters of all its rows."""
    sums = torch.from_numpy(prediction.predictions.sum(0))
    total = named(sums)
    return {"loss": total["numerator"] / max(total["denominator"], 1.0)} | diagnostics(sums)


def will_log(args: AUFConfig, state: TrainerState) -> bool:
    """Whether Trainer will log the step under way. Accuracy over all valid slots needs logits that
    AUF never computes, so it is measured on these steps alone."""
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.EPOCH:
        steps_per_epoch = round(state.max_steps / state.num_train_epochs)
        return step % max(steps_per_epoch, 1) == 0
    if step == 1 and args.logging_first_step:
        return True
    # 0 where a share of all steps was asked for, and that is less than one
    every = max(state.logging_steps, 1)
    return args.logging_strategy == IntervalStrategy.STEPS and step % every == 0


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

    def add(self, sums: torch.Tensor) -> None:
        """Add a micro-batch's summed counters (C,)."""
        self._terms += loss_terms_of(sums)

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
        # a sum above 0 says that at least one process is in that state
        signs = self._terms.new_tensor([unsound, told_to_stop])
        numerator, denominator, bad, stop = add_up(torch.cat([self._terms, signs])).tolist()
        self.reset()
        return StepTotals(numerator, denominator, bad > 0, stop > 0)
