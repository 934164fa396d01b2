"""Objectives of masked block drafters as detached slot weights: pure functions, no logging, no model.

Shape letters are those of `blocks.py`. Every objective answers one question: how much does slot k of block n count?
The loss is then sum(weight * cross-entropy) / sum(weight), over everything an optimizer step sees.
"""

import torch

OBJECTIVES = ("uniform", "decay", "auf", "auf_decay")
# Of Domino drafters (arXiv 2605.29707, 2607.01893); `domino_loss.py` says what each means for its two branches.
DOMINO_OBJECTIVES = ("domino_decay", "b_auf", "s_auf", "f_auf", "b_auf_decay", "s_auf_decay", "f_auf_decay")
NORMALISATIONS = ("pooled", "per_block")
# DFlash (arXiv 2602.06036): gamma for K = 16, 10, 8.
DECAY_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def resolve_gamma(objective: str, block_size: int, gamma: float | None) -> float | None:
    """`gamma` for an objective, checked: refused where it would be ignored, required where it has no published value.

    Raises:
        ValueError: unknown objective; gamma with an objective that has no decay; no gamma for an unpublished K.
    """
    if objective not in OBJECTIVES + DOMINO_OBJECTIVES:
        raise ValueError(
            f"objective is {objective!r}; it must be one of {', '.join(OBJECTIVES)}, or for a Domino drafter one of "
            f"{', '.join(DOMINO_OBJECTIVES)}"
        )
    if not objective.endswith("decay"):
        if gamma is not None:
            raise ValueError(
                f"gamma is {gamma}, but objective {objective!r} has no decay and would ignore it: remove gamma"
            )
        return None
    if gamma is None and block_size not in DECAY_GAMMA:
        raise ValueError(
            f"objective {objective!r} needs gamma: published values exist for block sizes {sorted(DECAY_GAMMA)} only, "
            f"and block_size is {block_size}. Give gamma (slots; about block_size / 2)."
        )
    gamma = DECAY_GAMMA[block_size] if gamma is None else float(gamma)
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: the weight exp(-(k-1)/gamma) needs gamma > 0")
    return gamma


def first_failure_support(correct: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """AUF's support: valid slots up to and *including* the first wrong one (Spec-AUF, arXiv 2607.01893).

    Without the failing slot training collapses (arXiv 2608.30135: tau 3.11 against 5.75).

    Args:
        correct, valid (`torch.BoolTensor` of shape `(B, N, K-1)`).
    """
    wrong = (~correct & valid).long()
    wrong_before = wrong.cumsum(-1) - wrong
    return valid & (wrong_before == 0)


def weights_from_correct(
    objective: str, correct: torch.Tensor, valid: torch.Tensor, gamma: float | None = None
) -> torch.Tensor:
    """Slot weights of an objective that depends on right and wrong alone (all of this module's do).

    Args:
        objective (`str`): one of `OBJECTIVES`.
        correct (`torch.BoolTensor` of shape `(B, N, K-1)`): argmax of the drafter's logits equals the label.
        valid (`torch.BoolTensor` of shape `(B, N, K-1)`): slot is supervised; contiguous from slot 1.
        gamma (`float`, *optional*): decay length in slots, for `decay` and `auf_decay`.

    Returns:
        `torch.FloatTensor` of shape `(B, N, K-1)`, without gradient.
    """
    gamma = resolve_gamma(objective, correct.shape[-1] + 1, gamma)
    support = first_failure_support(correct, valid) if objective.startswith("auf") else valid
    weights = support.float()
    if gamma is not None:
        weights = weights * torch.exp(-torch.arange(correct.shape[-1], device=correct.device) / gamma)
    return weights


def slot_weights(
    objective: str, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, **params
) -> torch.Tensor:
    """Detached slot weights of an objective, from the drafter's logits.

    Args:
        objective (`str`): `uniform`, `decay`, `auf` or `auf_decay`.
        logits (`torch.Tensor` of shape `(B, N, K-1, V)`): of the drafted slots 1..K-1.
        labels (`torch.LongTensor` of shape `(B, N, K-1)`): token at anchor + k.
        valid (`torch.BoolTensor` of shape `(B, N, K-1)`): contiguous from slot 1.
        params: `gamma` (slots) for `decay` and `auf_decay`.

    Returns:
        `torch.FloatTensor` of shape `(B, N, K-1)`: 0 outside the support; for AUF (arXiv 2607.01893) 1 up to and
        including the first slot where `argmax(logits) != labels`.

    Raises:
        ValueError: unknown objective, or gamma where it does not apply.
    """
    with torch.no_grad():
        correct = logits.argmax(-1) == labels
        return weights_from_correct(objective, correct, valid.bool(), **params)


def row_terms(
    losses: torch.Tensor, weights: torch.Tensor, normalisation: str = "pooled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of the loss, row by row; they add up over rows, micro-batches and ranks before the
    one division.

    Args:
        losses (`torch.Tensor` of shape `(B, N, K-1)`): cross-entropy of each slot.
        weights (`torch.Tensor` of shape `(B, N, K-1)`): from `slot_weights`.
        normalisation (`str`): `pooled`: sum of weighted losses over sum of weights. `per_block`: mean over the blocks
            that have any weight of each block's own weighted mean.

    Returns:
        Two tensors of shape `(B,)`. With nothing supervised both are 0 and the numerators still have their graph.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation is {normalisation!r}; it must be one of {', '.join(NORMALISATIONS)}")
    weights = weights.detach().to(losses.dtype)
    # where, not times: a slot of weight 0 may hold anything, even inf
    numerators, denominators = (torch.where(weights > 0, losses, 0.0) * weights).sum(-1), weights.sum(-1)  # (B, N)
    if normalisation == "per_block":
        numerators = numerators / denominators.clamp(min=torch.finfo(losses.dtype).tiny)
        denominators = (denominators > 0).to(losses.dtype)
    return numerators.sum(-1), denominators.sum(-1)


def loss_terms(
    losses: torch.Tensor, weights: torch.Tensor, normalisation: str = "pooled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`row_terms`] summed over all rows: two scalars."""
    numerators, denominators = row_terms(losses, weights, normalisation)
    return numerators.sum(), denominators.sum()
