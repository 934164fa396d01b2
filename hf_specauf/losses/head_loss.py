"""Cross-entropy through the target's frozen head that computes only the logits that count, a chunk
at a time.

Slots after a block's first failure weigh nothing in AUF (arXiv 2607.01893), so nobody needs their
logits. Loss and gradient are those of the plain computation, which is eight lines:

    logits = head(hidden)                                             # (B, N, P, V) log_p =
    logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] right = logits.argmax(-1) == labels
    weights = objective.weights(right, valid, gamma, log_p).detach()  # (B, N, P) numerator =
    -(weights * log_p).sum() denominator = weights.sum() numerator.backward()
    # gradient of hidden loss = numerator / denominator                                    # once
    every micro-batch and rank is in

`head_loss` does the same in this order:

1. Take slot 1 of every block that has one.
2. Compute its logits, a chunk of rows at a time.
3. Form loss, prediction and the gradient of the hidden rows at once; let the logits go.
4. Leave behind every block whose slot was wrong, and go on with the next slot of the others.
5. Hand autograd the finished gradients, scaled by the gradient of the numerator.

Objectives that count all valid slots use the same chunks without step 4. Shape letters are those of
`blocks.py`.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..drafters.candidates import add_correction, apply_head
from .objectives import LossSpec, loss_terms

# A product with few rows costs as much as one with this many, because the head's weights are read
# once either way. So the last survivors are given several slots at a time.
FEWEST_ROWS = 32


class HeadLoss(NamedTuple):
    """What a walk found; `numerator` alone has a graph."""

    numerator: torch.Tensor  # scalar
    denominator: torch.Tensor  # scalar
    losses: torch.Tensor  # (B, N, P), 0 where nothing was computed
    weights: torch.Tensor  # (B, N, P), the objective's, 0 outside its support
    correct: torch.Tensor  # (B, N, P) bool, false where nothing was predicted


class _Walker:
    """One pass over the rows of hidden (M blocks, K-1 slots, H): losses, predictions, gradients."""

    def __init__(
        self, hidden, head, labels, valid, weights, low_rank, want_gradient, rows_per_chunk
    ):
        self.rows = hidden.detach().flatten(0, -2)  # (M (K-1), H)
        self.head, self.labels, self.weights = head, labels.flatten(), weights.flatten()
        self.low_rank_rows, self.project = (None, None) if low_rank is None else low_rank
        self.parameters = trainable(self.project)
        self.want_gradient, self.rows_per_chunk = want_gradient, rows_per_chunk
        self.valid = valid.flatten(0, 1)
        self.counting, self.slots = self.valid.flatten(), self.valid.shape[1]
        self.losses = torch.zeros_like(self.weights)
        self.correct = torch.zeros_like(self.labels, dtype=torch.bool)
        # of the rows, the low-rank rows and the parameters
        given = [hidden] if low_rank is None else [hidden, self.low_rank_rows]
        self.gradients = (
            [torch.zeros_like(t) for t in (*given, *self.parameters)] if want_gradient else []
        )
        self.row_gradients = [gradient.flatten(0, -2) for gradient in self.gradients[: len(given)]]

    def logits(self, index: torch.Tensor):
        """Logits of some rows, and the leaves they depend on."""
        leaves = [self.rows[index]]
        if self.low_rank_rows is not None:
            leaves.append(self.low_rank_rows.detach().flatten(0, -2)[index])
        if self.want_gradient:
            leaves = [leaf.requires_grad_() for leaf in leaves]
        with torch.set_grad_enabled(self.want_gradient):
            with torch.autocast(
                self.rows.device.type, enabled=False
            ):  # inside a drafter's forward it may be on
                logits = apply_head(self.head, leaves[0])
            if self.low_rank_rows is not None:
                logits = add_correction(logits, self.project(leaves[1]))
        return logits, leaves

    def learn(self, index: torch.Tensor, until_fail: bool) -> torch.Tensor:
        """Losses, predictions and gradients of rows (blocks, slots) -> which are right. Of a row of
        `index`, slots after the first wrong one are left out where `until_fail`."""
        flat = index.flatten()
        logits, leaves = self.logits(flat)
        # fp32 logits of a plain head are overwritten in place: its backward needs no output
        copy = type(self.head) is not nn.Linear and self.project is None
        scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=copy)
        best, predicted = scores.max(-1)
        labels = self.labels[flat]
        right = predicted == labels
        counted = self.counting[flat]
        if until_fail and index.shape[1] > 1:
            wrong = (~right & counted).view(index.shape).long()
            counted = counted & (wrong.cumsum(1) - wrong == 0).flatten()
        self.correct[flat] = right & counted
        label_scores = scores.gather(1, labels[:, None])[:, 0]
        total = scores.sub_(best[:, None]).exp_().sum(-1)
        losses = best + total.log() - label_scores
        self.losses[flat] = torch.where(counted, losses, 0.0).to(self.losses.dtype)
        if self.want_gradient:
            weights = torch.where(counted, self.weights[flat].to(scores.dtype), 0.0)
            scores.mul_(
                (weights / total)[:, None]
            )  # weight * softmax, then minus weight at the label
            scores.scatter_add_(1, labels[:, None], -weights[:, None])
            # a backward pass belongs outside autocast, which would cast the head's own products
            with torch.autocast(self.rows.device.type, enabled=False):
                found = torch.autograd.grad(
                    logits, [*leaves, *self.parameters], scores.to(logits.dtype)
                )
            for rows, gradient in zip(self.row_gradients, found):
                rows[flat] = gradient
            for total_gradient, gradient in zip(
                self.gradients[len(leaves) :], found[len(leaves) :]
            ):
                total_gradient += gradient
        return (right & counted).view(index.shape)

    def all_valid(self) -> None:
        """Every valid slot."""
        index = self.valid.flatten().nonzero()
        for chunk in index.split(self.rows_per_chunk):
            self.learn(chunk, until_fail=False)

    def until_first_failure(self) -> None:
        """Slot by slot, only blocks still alive."""
        alive, slot = self.valid[:, 0].nonzero()[:, 0], 0
        while slot < self.slots and len(alive):
            width = min(
                max(1, min(FEWEST_ROWS, self.rows_per_chunk) // len(alive)), self.slots - slot
            )
            slots = torch.arange(slot, slot + width, device=alive.device)
            slot += width
            survivors = []
            for blocks in alive.split(max(1, self.rows_per_chunk // width)):
                right = self.learn(blocks[:, None] * self.slots + slots, until_fail=True)
                survivors.append(blocks[right.all(1)])
            alive = torch.cat(survivors)
            if slot < self.slots:
                alive = alive[self.valid[alive, slot]]

    @torch.no_grad()
    def predict(self, index: torch.Tensor) -> None:
        """Predictions alone, for diagnostics."""
        self.want_gradient = False
        for chunk in index.split(self.rows_per_chunk):
            self.correct[chunk] = self.logits(chunk)[0].argmax(-1) == self.labels[chunk]


class _HeadLossFunction(torch.autograd.Function):
    """Hands the gradients that a walk has formed to autograd: of hidden, low-rank rows and
    parameters."""

    @staticmethod
    def forward(ctx, value, gradients, *trained):
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, scale):
        # scaled in the wider dtype: in bf16 the factor itself would be off by up to 0.4 %
        return None, None, *((g.to(scale.dtype) * scale).to(g.dtype) for g in ctx.saved_tensors)


def trainable(module: nn.Module | None) -> list[nn.Parameter]:
    """Its parameters that are trained."""
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]


def _unknown_weights(spec: LossSpec) -> ValueError:
    """The refusal of a trainable head whose gradient would need weights that only the finished walk
    knows."""
    found = "normalisation: per_block"
    if spec.objective.factor is not None:
        found = "an objective that weighs by probabilities"
    return ValueError(
        f"{found} cannot be had for a trainable head: a block's weights are known only after its"
        " gradient. Use normalisation: pooled and an objective without probabilities."
    )


def head_loss(
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    valid: torch.Tensor,
    spec: LossSpec,
    *,
    every_prediction: bool = False,
    support: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, nn.Module] | None = None,
) -> HeadLoss:
    """Numerator and denominator of an objective, from the drafter's hidden rows and the target's
    frozen head.

    Args:
        hidden (`torch.Tensor` of shape `(B, N, P, H)`): of the slots that predict.
        head (`nn.Module`): `target.get_output_embeddings()`; frozen, also quantised.
        labels, valid (`torch.Tensor` of shape `(B, N, P)`): `valid` bool, contiguous from the first
        slot.
        spec (`LossSpec`): its objective is the one these logits are judged by.
        every_prediction (`bool`, *optional*): also predict valid slots that do not count, for
            diagnostics.
        support (`torch.BoolTensor` of shape `(B, N, P)`, *optional*): the valid slots that may
            count at all, contiguous from the first slot; by default all.
        low_rank (`tuple`, *optional*): trainable rows (B, N, P, E) and the module without biases
            that makes a correction (..., V) of them, which is added to the logits (Domino's head,
            arXiv 2605.29707); rows and the module's trained parameters receive their gradient.

    Raises:
        ValueError: `low_rank` with weights that are known only after the walk: the module's
            gradient needs them in it.
    """
    objective, gamma, per_block = spec.objective, spec.gamma, spec.normalisation == "per_block"
    # Slots are weighed while a block is walked. What depends on the whole block is multiplied in
    # afterwards.
    weighs_later = objective.factor is not None or (per_block and objective.until_fail)
    if low_rank is not None and weighs_later:
        raise _unknown_weights(spec)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tiny = torch.finfo(wide).tiny
    counting = valid if support is None else support
    # what each slot weighs if the walk reaches it, as far as that is known
    if_reached = (
        objective.without_factor().weights(torch.ones_like(valid), counting, gamma).to(wide)
    )
    if per_block and not weighs_later:
        if_reached = if_reached / if_reached.sum(-1, keepdim=True).clamp(min=tiny)
    trained = [hidden] if low_rank is None else [hidden, low_rank[0], *trainable(low_rank[1])]
    want_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in trained)
    walker = _Walker(
        hidden, head, labels, counting, if_reached, low_rank, want_gradient, spec.rows_per_chunk
    )
    if objective.until_fail:
        walker.until_first_failure()
    else:
        walker.all_valid()
    losses, correct = walker.losses.view(valid.shape), walker.correct.view(valid.shape)
    weights = objective.weights(correct, counting, gamma, log_p=-losses).to(wide)
    numerator, denominator = loss_terms(losses, weights, spec.normalisation)
    if want_gradient:
        if objective.factor is not None:
            walker.gradients[0] *= (weights / if_reached.clamp(min=tiny))[..., None]
        if per_block and weighs_later:
            walker.gradients[0] /= weights.sum(-1)[:, :, None, None].clamp(min=1e-30)
        numerator = _HeadLossFunction.apply(numerator, walker.gradients, *trained)
    if every_prediction:
        walker.predict((valid & (weights == 0)).flatten().nonzero()[:, 0])
    return HeadLoss(numerator, denominator, losses, weights, correct)
