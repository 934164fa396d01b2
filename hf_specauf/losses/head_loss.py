"""Cross-entropy through the target's frozen head, of the supported slots alone and a chunk at a
time.

A slot's logits are V numbers, often 150,000: no part of a step needs more memory. In AUF (arXiv
2607.01893) slots after a block's first wrong one weigh nothing, so nobody needs their logits.
`plain_head_loss` is the definition in eight lines. `head_loss` gives the same loss and the same
gradient, and holds no more logits than a chunk's. Shape letters are those of `blocks.py`.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..drafters.modeling_domino import add_correction
from ..drafters.target_parts import apply_head
from .objectives import LossSpec, first_failure_support, loss_terms

# A product with few rows takes as long as one with this many, because the head's weights are read
# once either way. So the last blocks that are still right are given several slots at a time.
FEWEST_ROWS = 32


class HeadLoss(NamedTuple):
    """A loss and what it was made of; `numerator` alone has a graph."""

    numerator: torch.Tensor  # scalar
    denominator: torch.Tensor  # scalar
    losses: torch.Tensor  # (B, N, P), 0 where nothing was computed
    weights: torch.Tensor  # (B, N, P), the objective's, 0 outside its support
    correct: torch.Tensor  # (B, N, P) bool, false where nothing was predicted


class CausalHead(NamedTuple):
    """What corrects logits, and is trained (Domino, arXiv 2605.29707): corrections (..., V) are
    `project(rows)`."""

    rows: torch.Tensor  # (B, N, P, E)
    project: nn.Module  # (..., E) -> (..., V), without biases


def plain_head_loss(
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    valid: torch.Tensor,
    spec: LossSpec,
    causal_head: CausalHead | None = None,
) -> HeadLoss:
    """The definition of [`head_loss`]: all logits at once, and autograd. Tests compare the two.

    Arguments and result are those of `head_loss`, but every slot has its loss.
    """
    logits = apply_head(head, hidden)  # (B, N, P, V)
    if causal_head is not None:
        logits = add_correction(logits, causal_head.project(causal_head.rows))
    right = logits.argmax(-1) == labels  # (B, N, P)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = -logits.to(wide).log_softmax(-1).gather(-1, labels[..., None])[..., 0]  # (B, N, P)
    weights = spec.objective.weights(right, valid, spec.gamma, log_p=-losses)
    numerator, denominator = loss_terms(losses, weights, spec.normalisation)
    return HeadLoss(numerator, denominator, losses, weights, right & valid)


def head_loss(
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    valid: torch.Tensor,
    spec: LossSpec,
    *,
    every_prediction: bool = False,
    within: torch.Tensor | None = None,
    causal_head: CausalHead | None = None,
) -> HeadLoss:
    """Numerator and denominator of an objective, from the drafter's hidden rows and the target's
    frozen head.

    1. Take the first slot of every block that has a valid one.
    2. Compute its logits, a chunk of rows at a time.
    3. Form the loss, the prediction and the gradient of the hidden rows; let the logits go.
    4. Leave behind every block whose slot was wrong; go on from 2 with the next slot of the others.
    5. Multiply in the weights that only whole blocks decide. Divide nothing: the step's denominator
       is not known before all micro-batches and ranks are in.
    6. Hand autograd the finished gradients, scaled by the gradient of the numerator.

    Objectives that support all valid slots take them all in 1, and leave out 4.

    Args:
        hidden (`torch.Tensor` of shape `(B, N, P, H)`): of the slots that predict.
        head (`nn.Module`): `target.get_output_embeddings()`; frozen, also quantised.
        labels, valid (`torch.Tensor` of shape `(B, N, P)`): `valid` bool, contiguous from the first
            slot.
        spec (`LossSpec`): its objective is the one of these logits.
        every_prediction (`bool`, *optional*): also predict valid slots that are not supported, for
            diagnostics.
        within (`torch.BoolTensor` of shape `(B, N, P)`, *optional*): the valid slots that may be
            supported at all, contiguous from the first slot; by default all.
        causal_head (`CausalHead`, *optional*): its rows and its trained parameters receive their
            gradient.

    Raises:
        ValueError: `causal_head` with weights that only whole blocks decide (see 5): its gradient
            needs them in 3.
    """
    if causal_head is not None:
        _check_weights_are_known(spec)
    within = valid if within is None else within
    known_weights = _known_weights(within, spec, hidden.dtype)
    slots = _SlotLosses(hidden, head, labels, within, known_weights, spec, causal_head)
    slots.learn_all()
    losses, correct = slots.losses.view_as(labels), slots.correct.view_as(labels)
    weights = spec.objective.weights(correct, within, spec.gamma, log_p=-losses)
    weights = weights.to(known_weights.dtype)
    numerator, denominator = loss_terms(losses, weights, spec.normalisation)
    if slots.want_gradient:
        slots.reweigh(known_weights, weights)
        numerator = _FinishedGradients.apply(numerator, slots.gradients, *slots.trained)
    if every_prediction:
        slots.predict(valid & (weights == 0))
    return HeadLoss(numerator, denominator, losses, weights, slots.correct.view_as(labels))


def _weighed_afterwards(spec: LossSpec) -> bool:
    """Whether slot weights depend on the whole block, which nobody knows at its first slot."""
    per_block = spec.normalisation == "per_block"
    return spec.objective.factor is not None or (per_block and spec.objective.until_fail)


def _check_weights_are_known(spec: LossSpec) -> None:
    """Raise where a causal head's gradient would need weights that are known too late."""
    if not _weighed_afterwards(spec):
        return
    found = "normalisation: per_block"
    if spec.objective.factor is not None:
        found = "an objective that weighs by probabilities"
    raise ValueError(
        f"{found} cannot be had for a trainable head: a block's weights are known only after its"
        " gradient. Use normalisation: pooled and an objective without probabilities."
    )


def _known_weights(within: torch.Tensor, spec: LossSpec, dtype: torch.dtype) -> torch.Tensor:
    """What each slot weighs if it is supported, as far as that is known before any prediction,
    (B, N, P). `_SlotLosses.reweigh` makes up for the rest."""
    wide = torch.promote_types(dtype, torch.float32)
    all_right = torch.ones_like(within)
    objective = spec.objective.without_factor()
    weights = objective.weights(all_right, within, spec.gamma).to(wide)
    if spec.normalisation == "per_block" and not _weighed_afterwards(spec):
        of_block = weights.sum(-1, keepdim=True)  # (B, N, 1)
        weights = weights / of_block.clamp(min=torch.finfo(wide).tiny)
    return weights


class _SlotLosses:
    """Losses, predictions and gradients of slots, filled in a chunk at a time.

    Slots are numbered through all M = B * N blocks: slot j of block m has the number m * P + j.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: nn.Module,
        labels: torch.Tensor,
        within: torch.Tensor,
        weights: torch.Tensor,
        spec: LossSpec,
        causal_head: CausalHead | None,
    ):
        self.head, self.spec = head, spec
        self.rows = hidden.detach().flatten(0, -2)  # (M * P, H)
        self.labels, self.weights = labels.flatten(), weights.flatten()  # (M * P,)
        self.blocks_within = within.flatten(0, 1)  # (M, P)
        self.within = within.flatten()  # (M * P,)
        self.losses = torch.zeros_like(self.weights)
        self.correct = torch.zeros_like(self.within)
        self.project, self.parameters = None, []
        rows_with_gradient = [hidden]
        if causal_head is not None:
            self.project = causal_head.project
            self.low_rank_rows = causal_head.rows.detach().flatten(0, -2)  # (M * P, E)
            self.parameters = [p for p in self.project.parameters() if p.requires_grad]
            rows_with_gradient.append(causal_head.rows)
        self.trained = [*rows_with_gradient, *self.parameters]
        self.want_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in self.trained)
        # one for each of `trained`: rows are written once, parameters add up over all chunks
        self.gradients = []
        if self.want_gradient:
            self.gradients = [torch.zeros_like(tensor) for tensor in self.trained]
        count = len(rows_with_gradient)
        self.row_gradients = [gradient.flatten(0, -2) for gradient in self.gradients[:count]]
        self.parameter_gradients = self.gradients[count:]

    def learn_all(self) -> None:
        """Learn every slot that the objective may support."""
        if self.spec.objective.until_fail:
            self._learn_until_first_failure()
            return
        for chunk in self.within.nonzero().split(self.spec.rows_per_chunk):
            self._learn(chunk)

    def _learn_until_first_failure(self) -> None:
        slots_per_block = self.blocks_within.shape[1]
        slot = 0
        alive = self.blocks_within[:, 0].nonzero()[:, 0]  # numbers of blocks
        while slot < slots_per_block and len(alive):
            # With few blocks left, several slots of each fill a product. Later ones may turn out to
            # lie after a failure, and are then thrown away.
            most = min(FEWEST_ROWS, self.spec.rows_per_chunk)
            width = max(1, most // len(alive))
            width = min(width, slots_per_block - slot)
            offsets = torch.arange(slot, slot + width, device=alive.device)
            survivors = []
            for blocks in alive.split(max(1, self.spec.rows_per_chunk // width)):
                right = self._learn(blocks[:, None] * slots_per_block + offsets)
                survivors.append(blocks[right.all(1)])
            alive = torch.cat(survivors)
            slot += width
            if slot < slots_per_block:
                alive = alive[self.blocks_within[alive, slot]]

    def _learn(self, numbers: torch.Tensor) -> torch.Tensor:
        """Losses, predictions and gradients of slots, given as neighbours in some blocks.

        Args:
            numbers (`torch.LongTensor` of shape `(blocks, width)`).

        Returns:
            `torch.BoolTensor` of the same shape: right and supported.
        """
        flat = numbers.flatten()
        logits, leaves = self._logits(flat, with_graph=self.want_gradient)
        # Logits are overwritten where their backward pass does not read them, which saves memory:
        # after a plain product, and after adding a correction. Any other head may read its output.
        copy = type(self.head) is not nn.Linear and self.project is None
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.detach().to(wide, copy=copy)  # (rows, V)
        best, predicted = scores.max(-1)
        labels = self.labels[flat]
        right = predicted == labels
        supported = self.within[flat]
        if self.spec.objective.until_fail and numbers.shape[1] > 1:
            supported = first_failure_support(right.view_as(numbers), supported.view_as(numbers))
            supported = supported.flatten()
        self.correct[flat] = right & supported

        label_scores = scores.gather(1, labels[:, None])[:, 0]
        exponentials = scores.sub_(best[:, None]).exp_()  # less the largest, so that none overflows
        total = exponentials.sum(-1)
        losses = best + total.log() - label_scores
        self.losses[flat] = torch.where(supported, losses, 0.0).to(self.losses.dtype)
        if self.want_gradient:
            weights = torch.where(supported, self.weights[flat].to(wide), 0.0)
            # the gradient of weight * loss by the logits is weight * softmax, less weight at the
            # label
            gradient = exponentials.mul_((weights / total)[:, None])
            gradient.scatter_add_(1, labels[:, None], -weights[:, None])
            self._keep_gradient(flat, logits, leaves, gradient.to(logits.dtype))
        return (right & supported).view_as(numbers)

    def _logits(
        self, numbers: torch.Tensor, *, with_graph: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (rows, V) of some slots, and the leaves they were computed from."""
        leaves = [self.rows[numbers]]
        if self.project is not None:
            leaves.append(self.low_rank_rows[numbers])
        if with_graph:
            leaves = [leaf.requires_grad_() for leaf in leaves]
        with torch.set_grad_enabled(with_graph):
            # inside a drafter's forward autocast may be on, and the target's head has a dtype of
            # its own
            with torch.autocast(self.rows.device.type, enabled=False):
                logits = apply_head(self.head, leaves[0])
            if self.project is not None:
                logits = add_correction(logits, self.project(leaves[1]))
        return logits, leaves

    def _keep_gradient(self, numbers, logits, leaves, gradient) -> None:
        # a backward pass belongs outside autocast, which would cast the head's own products
        with torch.autocast(self.rows.device.type, enabled=False):
            found = torch.autograd.grad(logits, [*leaves, *self.parameters], gradient)
        of_leaves, of_parameters = found[: len(leaves)], found[len(leaves) :]
        for rows, of_leaf in zip(self.row_gradients, of_leaves, strict=True):
            rows[numbers] = of_leaf
        for total, of_parameter in zip(self.parameter_gradients, of_parameters, strict=True):
            total += of_parameter

    def reweigh(self, known: torch.Tensor, weights: torch.Tensor) -> None:
        """Multiply into the gradient of the hidden rows what was not known while it was formed.

        Args:
            known, weights (`torch.Tensor` of shape `(B, N, P)`): slot weights as they were taken,
                and as they are.
        """
        if not _weighed_afterwards(self.spec):
            return
        if self.spec.objective.factor is not None:
            # where the known weight is 0 the gradient is 0 too, whatever it is multiplied by
            tiny = torch.finfo(known.dtype).tiny
            self.gradients[0] *= (weights / known.clamp(min=tiny))[..., None]
        if self.spec.normalisation == "per_block":
            of_block = weights.sum(-1)[:, :, None, None]  # (B, N, 1, 1)
            self.gradients[0] /= of_block.clamp(min=1e-30)

    @torch.no_grad()
    def predict(self, which: torch.Tensor) -> None:
        """Predict some slots (B, N, P) bool, without loss or gradient."""
        numbers = which.flatten().nonzero()[:, 0]
        for chunk in numbers.split(self.spec.rows_per_chunk):
            logits, _ = self._logits(chunk, with_graph=False)
            self.correct[chunk] = logits.argmax(-1) == self.labels[chunk]


class _FinishedGradients(torch.autograd.Function):
    """Hands gradients that are formed already to autograd, scaled by that of the numerator."""

    @staticmethod
    def forward(ctx, numerator, gradients, *trained):
        ctx.save_for_backward(*gradients)
        return numerator

    @staticmethod
    def backward(ctx, scale):
        # scaled in the wider dtype: in bf16 the factor itself would be off by up to 0.4 %
        scaled = [(g.to(scale.dtype) * scale).to(g.dtype) for g in ctx.saved_tensors]
        return None, None, *scaled
