"""Domino's loss: lambda * base + (1 - lambda) * final, each branch a mean over its own support.

The base branch is the backbone's logits alone, the final one the logits that decoding uses,
corrected by the causal head under teacher forcing (Domino, arXiv 2605.29707, with the supports of
Spec-AUF, arXiv 2607.01893, section on Domino). Shape letters are those of `blocks.py`.

A mean of two means has two denominators, and where they differ the gradient of a step cannot be
rescaled once at its end, as it is with one. So the step is written over the base branch's
denominator d_b:

    loss = [lambda * n_b + (1 - lambda) * (d_b / d_f) * n_f] / d_b

Only the ratio d_b / d_f must be known before the backward pass. It is 1 where both branches support
the same slots (`domino_decay`, `s_auf`), and with `per_block`, whose denominators are numbers of
blocks. Else both are summed over all processes before the backward pass; where gradients are
accumulated, a pass over all micro-batches without gradients comes first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .head_loss import CausalHead, HeadLoss, head_loss
from .objectives import LossSpec, find_objective, row_terms


# Its shapes follow from what the drafter gets right, so no compiled graph would be used twice.
@torch.compiler.disable
def branch_losses(
    hidden: torch.Tensor,
    low_rank_rows: torch.Tensor | None,
    project: nn.Module | None,
    *,
    head: nn.Module,
    labels: torch.Tensor,
    valid: torch.Tensor,
    spec: LossSpec,
    every_prediction: bool = False,
) -> tuple[HeadLoss, HeadLoss | None]:
    """The loss on the logits that decoding uses, and that of the base branch where the objective
    has one. It runs inside a drafter's forward, as its `reduce`.

    Args:
        hidden (`torch.Tensor` of shape `(B, N, P, H)`): rows that predict.
        low_rank_rows (`torch.Tensor` of shape `(B, N, P, E)`, *optional*), project (`nn.Module`,
            *optional*): the causal head, as the drafter hands it out.
        head, labels, valid: as for `head_loss`.
        spec (`LossSpec`): of the drafter's objective.
        every_prediction (`bool`, *optional*): also predict valid slots that are not supported, by
            the final logits.
    """
    objective = spec.objective
    causal_head = None if project is None else CausalHead(low_rank_rows, project)
    base, within = None, None
    if objective.base is not None:
        base = head_loss(hidden, head, labels, valid, spec.branch(objective.base))
    if objective.shared_support:
        within = base.weights > 0
    final = head_loss(
        hidden, head, labels, valid, spec,
        every_prediction=every_prediction, within=within, causal_head=causal_head,
    )  # fmt: skip
    return final, base


def check_domino_keys(objective: str, normalisation: str, lambda_decay_ratio: float | None) -> None:
    """Raise where a key would be ignored or cannot be had.

    Raises:
        ValueError: the key, and what to change.
    """
    found = find_objective(objective)
    if lambda_decay_ratio is not None and found.base is None:
        raise ValueError(
            f"lambda_decay_ratio is {lambda_decay_ratio}, but objective {objective!r} has no base"
            " branch and would ignore it: remove the key"
        )
    if lambda_decay_ratio is not None and not 0 < lambda_decay_ratio <= 1:
        raise ValueError(
            f"lambda_decay_ratio is {lambda_decay_ratio}; it must be in (0, 1], a share of training"
        )
    if found.base is not None and found.until_fail and normalisation == "per_block":
        raise ValueError(
            f"normalisation: per_block cannot be had with {objective}: a block's weight is known"
            " only after the causal head's gradient is formed. Use normalisation: pooled."
        )


class LossTerms(NamedTuple):
    """A micro-batch's part of the loss."""

    numerator: torch.Tensor  # scalar, with its graph
    numerators: torch.Tensor  # (B,), the same row by row, without
    denominators: torch.Tensor  # (B,)


class BranchBalance:
    """Mixes the two branches of an optimizer step, and keeps d_b / d_f of the step under way.

    Args:
        spec (`LossSpec`): tells whether the two denominators can differ at all.
        add_up (`Callable`): sums a tensor over all processes.
    """

    def __init__(self, spec: LossSpec, add_up: Callable[[torch.Tensor], torch.Tensor]):
        self.differs = spec.supports_differ
        self._spec, self._add_up = spec, add_up
        # known before the first backward pass where gradients are accumulated, else never
        self._ratio_of_step: float | None = None

    def reset(self) -> None:
        """Forget the step that has ended."""
        self._ratio_of_step = None

    @property
    def is_known(self) -> bool:
        """Whether [`begin`] was called for the step under way."""
        return self._ratio_of_step is not None

    def begin(self, denominators: torch.Tensor) -> None:
        """Note the step's ratio.

        Args:
            denominators (`torch.Tensor` of shape `(2,)`): of the base and the final branch, over
                all micro-batches of this process.
        """
        self._ratio_of_step = self._ratio(denominators)

    def mix(self, base: HeadLoss, final: HeadLoss, of_base: float) -> LossTerms:
        """Both branches over the base branch's denominator, as in this file's docstring.

        Args:
            base, final (`HeadLoss`): of a micro-batch, which is a part of the step or the whole.
            of_base (`float`): lambda.
        """
        of_final = (1 - of_base) * self._final_ratio(base, final)
        base_terms, final_terms = (
            row_loss_terms(base, self._spec),
            row_loss_terms(final, self._spec),
        )
        return LossTerms(
            numerator=of_base * base_terms.numerator + of_final * final_terms.numerator,
            numerators=of_base * base_terms.numerators + of_final * final_terms.numerators,
            denominators=base_terms.denominators,
        )

    def _final_ratio(self, base: HeadLoss, final: HeadLoss) -> float:
        if not self.differs:
            return 1.0
        if self.is_known:
            return self._ratio_of_step
        return self._ratio(branch_denominators(base, final))

    def _ratio(self, denominators: torch.Tensor) -> float:
        of_base, of_final = self._add_up(denominators).tolist()
        # without a supported slot the numerator is 0, whatever it is multiplied by
        return of_base / of_final if of_final else 1.0


def row_loss_terms(found: HeadLoss, spec: LossSpec) -> LossTerms:
    """The loss of one branch alone."""
    return LossTerms(found.numerator, *row_terms(found.losses, found.weights, spec.normalisation))


def branch_denominators(base: HeadLoss, final: HeadLoss) -> torch.Tensor:
    """Denominators of both branches, (2,) in float64."""
    return torch.stack([base.denominator, final.denominator]).double()
