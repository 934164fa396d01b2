"""Domino's loss: lambda * base + (1 - lambda) * final, each branch a mean over its own support.

The base branch is the backbone's logits alone, the final one the logits that decoding uses, corrected by the causal
head under teacher forcing (Domino, arXiv 2605.29707, with the supports of Spec-AUF, arXiv 2607.01893, section on
Domino). Shape letters are those of `blocks.py`; P = K - 1 predictions of a block, K with `shift_label`.

A mean of two means has two denominators, and where they differ the gradient of a step cannot be rescaled once at its
end, as it is with one. So the step is written over the base branch's denominator d_b:

    loss = [lambda * n_b + (1 - lambda) * (d_b / d_f) * n_f] / d_b

Only the ratio d_b / d_f must be known before the backward pass. It is 1 where both branches count the same slots
(`domino_decay`, `s_auf`, and `per_block`, whose denominators count blocks). Else both are summed over all processes
before the backward pass; where gradients are accumulated, a pass over all micro-batches without gradients comes first.
"""

import torch
from torch import nn

from .objectives import DOMINO_OBJECTIVES
from .progressive import HeadLoss, head_loss

# objective without decay -> objectives of base and final branch
BRANCHES = {
    "domino": ("uniform", "uniform"),  # only with decay: domino_decay
    "b_auf": ("auf", "uniform"),  # up to the base branch's first failure, for the base branch alone
    "s_auf": ("auf", "uniform"),  # that same support for both
    "f_auf": ("auf", "auf"),  # each branch up to its own first failure
}


def branch_objectives(objective: str) -> tuple[str, str]:
    """Objectives (of `objectives.py`) of the base and the final branch."""
    decays = objective.endswith("_decay")
    pair = BRANCHES[objective.removesuffix("_decay")]
    return tuple({"uniform": "decay", "auf": "auf_decay"}[part] if decays else part for part in pair)


def domino_losses(
    hidden: torch.Tensor,
    low_rank_rows: torch.Tensor,
    project: nn.Module,
    *,
    head: nn.Module,
    labels: torch.Tensor,
    valid: torch.Tensor,
    objective: str,
    gamma: float | None = None,
    every_prediction: bool = False,
    **keys,
) -> tuple[HeadLoss, HeadLoss]:
    """Base and final branch of a batch; runs inside the drafter's forward, as its `reduce`.

    Args:
        hidden (`torch.Tensor` of shape `(B, N, P, H)`): rows that predict.
        low_rank_rows (`torch.Tensor` of shape `(B, N, P, E)`), project: the causal head, as the drafter hands it out.
        head, labels, valid, gamma: as for `head_loss`.
        objective (`str`): one of `objectives.DOMINO_OBJECTIVES`.
        every_prediction (`bool`, *optional*): the final branch also predicts valid slots that do not count.
        keys: `normalisation` and `rows_per_chunk`, as for `head_loss`.
    """
    of_base, of_final = branch_objectives(objective)
    base = head_loss(hidden, head, labels, valid, objective=of_base, gamma=gamma, **keys)
    final = head_loss(
        hidden, head, labels, valid, objective=of_final, gamma=gamma, every_prediction=every_prediction,
        support=base.weights > 0 if objective.startswith("s_auf") else None, low_rank=(low_rank_rows, project), **keys,
    )  # fmt: skip
    return base, final


def check_domino_keys(objective: str, normalisation: str, lambda_decay_ratio: float | None) -> None:
    """Raise where a key would be ignored or cannot be had."""
    if lambda_decay_ratio is not None and objective not in DOMINO_OBJECTIVES:
        raise ValueError(
            f"lambda_decay_ratio is {lambda_decay_ratio}, but objective {objective!r} has no base branch and would "
            "ignore it: remove the key"
        )
    if lambda_decay_ratio is not None and not 0 < lambda_decay_ratio <= 1:
        raise ValueError(f"lambda_decay_ratio is {lambda_decay_ratio}; it must be in (0, 1], a share of training")
    if objective.startswith("f_auf") and normalisation == "per_block":
        raise ValueError(
            "normalisation: per_block cannot be had with f_auf: a block's weight is known only after the causal "
            "head's gradient is formed. Use normalisation: pooled."
        )


class TwoBranches:
    """The trainer's part: lambda, and d_b / d_f of the optimizer step under way."""

    _micro_batches: list[dict] = []
    _step_balance: float | None = None  # d_b / d_f, where accumulation needs it before the first backward pass

    def base_weight(self, step: int) -> float:
        """lambda: from 1 at step 0 linearly to 0 at `lambda_decay_ratio` of all steps (arXiv 2605.29707)."""
        return max(0.0, 1.0 - step / ((self.args.lambda_decay_ratio or 1.0) * self.state.max_steps))

    @property
    def _supports_differ(self) -> bool:
        return self.args.normalisation == "pooled" and self.args.objective.startswith(("b_auf", "f_auf"))

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's own; the micro-batches of a step are kept for [`begin_balance`]."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = batches if self._supports_differ else []
        return batches, items

    @torch.no_grad()
    def begin_balance(self, model) -> None:
        """Before the first of several micro-batches: the supports of all, which the first backward pass needs. (With
        dropout in an adapter this pass and the next differ a little.)"""
        if self._supports_differ and len(self._micro_batches) > 1 and self._step_balance is None:
            sums = 0.0
            for inputs in self._micro_batches:
                _, final, base = self._run_blocks(
                    model, self._prepare_inputs(inputs), self.state.global_step, self.args.anchors_per_row,
                    objective=self.args.objective, gamma=self.gamma,
                )  # fmt: skip
                sums = sums + torch.stack([base.denominator, final.denominator]).double()
            self._step_balance = self._ratio(sums)

    def balance(self, base: HeadLoss, final: HeadLoss) -> float:
        """d_b / d_f over the whole step."""
        if not self._supports_differ:
            return 1.0
        if self._step_balance is not None:
            return self._step_balance
        return self._ratio(torch.stack([base.denominator, final.denominator]).double())

    def _ratio(self, sums: torch.Tensor) -> float:
        of_base, of_final = self.accelerator.reduce(sums, "sum").tolist()
        return of_base / of_final if of_final else 1.0
