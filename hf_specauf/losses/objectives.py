"""Objectives of masked block drafters, as a table: which slots of a block are supported, and what
each of them weighs.

Shape letters, and the words *supervised*, *valid* and *supported*, are those of `blocks.py`. The
loss of any objective is

    sum(weight * cross-entropy) / sum(weight)

over everything an optimizer step sees. Weights carry no gradient. To add an objective, add one
entry to `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

NORMALISATIONS = ("pooled", "per_block")
# DFlash (arXiv 2602.06036): gamma, in slots, for K = 16, 10, 8.
DECAY_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


@dataclass(frozen=True)
class Objective:
    """One entry of the table: what a drafter's logits are trained for.

    A drafter with two branches of logits (Domino: the backbone's, and the same corrected by a
    causal head) has an entry with a `base`. The entry itself is then the objective of the final
    logits, those that decoding uses.

    Attributes:
        title (`str`): what cards call it.
        says (`str`): which slots it supports, in a few words, for `--help`.
        until_fail (`bool`): supports slots up to and *including* the first wrong one
            (Accept-Until-Fail); otherwise all valid slots.
        decays (`bool`): slot k's weight is multiplied by exp(-(k-1) / gamma).
        factor (`Callable`, *optional*): multiplies the weights by what the drafter predicted.
            Called with `right` (bool), `log_p` (of the label; 0 where nothing was computed) and
            `support` (bool), each of shape `(B, N, P)`; returns a tensor of that shape, 0 or more.
        base (`Objective`, *optional*): the objective of the base branch's logits.
        shared_support (`bool`): the final branch supports only slots that the base branch supports.
    """

    title: str
    says: str
    until_fail: bool = False
    decays: bool = False
    factor: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    base: "Objective | None" = None
    shared_support: bool = False

    @property
    def branches(self) -> int:
        """Branches of logits that a drafter must have for this objective."""
        return 1 if self.base is None else 2

    @property
    def supports_differ(self) -> bool:
        """Whether the two branches may support different slots. The loss then has two
        denominators."""
        if self.base is None or self.shared_support:
            return False
        return self.until_fail or self.base.until_fail

    @property
    def predicts_every_slot(self) -> bool:
        """Whether the loss needs a prediction of every valid slot. Otherwise it stops early in a
        block, and nobody knows what the drafter would have predicted in the rest."""
        return not self.until_fail and not self.shared_support

    def without_factor(self) -> "Objective":
        """The same, as far as it is known before anything was predicted."""
        return replace(self, factor=None)

    def support(self, right: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The supported ones of the valid slots. Bool tensors of shape `(B, N, P)`."""
        return first_failure_support(right, valid) if self.until_fail else valid

    @torch.no_grad()
    def weights(
        self,
        right: torch.Tensor,
        valid: torch.Tensor,
        gamma: float | None = None,
        log_p: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Slot weights, without gradient.

        Args:
            right (`torch.BoolTensor` of shape `(B, N, P)`): the drafter's first choice is the
                label.
            valid (`torch.BoolTensor` of shape `(B, N, P)`): contiguous from the first slot.
            gamma (`float`, *optional*): decay length in slots, where the objective decays.
            log_p (`torch.Tensor` of shape `(B, N, P)`, *optional*): log-probability of the label,
                in nats; needed where the objective has a `factor`.

        Returns:
            `torch.FloatTensor` of shape `(B, N, P)`, 0 outside the support.
        """
        support = self.support(right, valid)
        weights = support.float()
        if self.decays:
            # arange starts at 0, and the formula's k at 1
            slots = torch.arange(right.shape[-1], device=right.device)
            weights = weights * torch.exp(-slots / gamma)
        if self.factor is not None:
            weights = weights * self.factor(right, log_p, support).to(weights.dtype)
        return weights


def with_decay(objective: Objective) -> Objective:
    """The same, with every branch's slots weighted exp(-(k-1)/gamma) as well."""
    return replace(
        objective,
        title=f"{objective.title} and decay",
        says=f"{objective.says}, weighted exp(-(k-1)/gamma)",
        decays=True,
        base=None if objective.base is None else with_decay(objective.base),
    )


# One branch of logits: DFlash (arXiv 2602.06036) and Spec-AUF (arXiv 2607.01893).
UNIFORM = Objective(
    title="equal weights",
    says="all valid slots",
)
# A slot is accepted only after all slots before it, so an early one is worth more.
DECAY = Objective(
    title="decay weights",
    says="all valid slots, weighted exp(-(k-1)/gamma): the DFlash baseline",
    decays=True,
)
# Decoding throws away whatever follows the first wrong slot, so training leaves it out too.
AUF = Objective(
    title="Accept-Until-Fail",
    says="up to and including the first wrong slot",
    until_fail=True,
)

# Two branches: Domino (arXiv 2605.29707) with the supports of Spec-AUF's section on Domino. The
# entry is the final branch's; `base` is the base branch's.
DOMINO_DECAY = replace(
    DECAY,
    says="both branches everywhere, weighted exp(-(k-1)/gamma)",
    base=DECAY,
)
B_AUF = Objective(
    title="B-AUF (Accept-Until-Fail)",
    says="base branch up to its first wrong slot, final branch everywhere",
    base=AUF,
)
S_AUF = Objective(
    title="S-AUF (Accept-Until-Fail)",
    says="base branch up to its first wrong slot, final branch the same slots",
    base=AUF,
    shared_support=True,
)
F_AUF = Objective(
    title="F-AUF (Accept-Until-Fail)",
    says="each branch up to its own first wrong slot",
    base=AUF,
    until_fail=True,
)

# By the names that recipes use. `--help` lists them in this order.
OBJECTIVES: dict[str, Objective] = {
    "uniform": UNIFORM,
    "decay": DECAY,
    "auf": AUF,
    "auf_decay": with_decay(AUF),
    "domino_decay": DOMINO_DECAY,
    "b_auf": B_AUF,
    "s_auf": S_AUF,
    "f_auf": F_AUF,
    "b_auf_decay": with_decay(B_AUF),
    "s_auf_decay": with_decay(S_AUF),
    "f_auf_decay": with_decay(F_AUF),
}


def objectives_for(branches: int) -> list[str]:
    """Names of the objectives for drafters with so many branches of logits (1 or 2)."""
    return [name for name, objective in OBJECTIVES.items() if objective.branches == branches]


def find_objective(name: str) -> Objective:
    """The entry of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective is {name!r}; it must be one of {', '.join(objectives_for(1))}, or for a"
            f" Domino drafter one of {', '.join(objectives_for(2))}"
        )
    return OBJECTIVES[name]


def resolve_gamma(name: str, block_size: int, gamma: float | None) -> float | None:
    """`gamma` for an objective; where none is given, the published one for this block size.

    Raises:
        ValueError: unknown objective; gamma with an objective that has no decay; no gamma for an
            unpublished K.
    """
    decays = find_objective(name).decays
    if not decays and gamma is not None:
        raise ValueError(
            f"gamma is {gamma}, but objective {name!r} has no decay and would ignore it: remove"
            " gamma"
        )
    if not decays:
        return None
    if gamma is None and block_size not in DECAY_GAMMA:
        raise ValueError(
            f"objective {name!r} needs gamma: published values exist for block sizes"
            f" {sorted(DECAY_GAMMA)} only, and block_size is {block_size}. Give gamma (slots; about"
            " block_size / 2)."
        )
    gamma = DECAY_GAMMA[block_size] if gamma is None else float(gamma)
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: the weight exp(-(k-1)/gamma) needs gamma > 0")
    return gamma


def check_normalisation(name: str) -> None:
    """Raise for a name that is none of `NORMALISATIONS`."""
    if name not in NORMALISATIONS:
        raise ValueError(
            f"normalisation is {name!r}; it must be one of {', '.join(NORMALISATIONS)}"
        )


@dataclass(frozen=True)
class LossSpec:
    """Everything that decides a loss. The trainer makes it once, and hands it down whole.

    Attributes:
        objective (`Objective`): of the drafter, or of the one branch whose loss is computed.
        gamma (`float`, *optional*): decay length in slots, where the objective decays.
        normalisation (`str`): `pooled`: one division by all weights of an optimizer step.
            `per_block`: mean over blocks of each block's own weighted mean.
        rows_per_chunk (`int`): slots whose logits (V each) are held at once.
    """

    objective: Objective
    gamma: float | None = None
    normalisation: str = "pooled"
    rows_per_chunk: int = 256

    def __post_init__(self):
        check_normalisation(self.normalisation)

    @classmethod
    def of(
        cls,
        name: str,
        block_size: int,
        gamma: float | None = None,
        *,
        normalisation: str = "pooled",
        rows_per_chunk: int = 256,
    ) -> "LossSpec":
        """By an objective's name, for blocks of `block_size` slots.

        Raises:
            ValueError: as [`resolve_gamma`]; an unknown normalisation.
        """
        return cls(
            find_objective(name),
            resolve_gamma(name, block_size, gamma),
            normalisation,
            rows_per_chunk,
        )

    @property
    def supports_differ(self) -> bool:
        """Whether the two branches have two denominators. `per_block` denominators count blocks:
        they are equal."""
        return self.normalisation == "pooled" and self.objective.supports_differ

    def branch(self, objective: Objective) -> "LossSpec":
        """The same for one branch's objective."""
        return replace(self, objective=objective)

    def of_every_slot(self) -> "LossSpec":
        """The same with every valid slot supported, in both branches: the most that a step can
        cost."""
        base = None if self.objective.base is None else UNIFORM
        return replace(
            self, objective=replace(UNIFORM, base=base), gamma=None, normalisation="pooled"
        )


def first_failure_support(right: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """AUF's support: valid slots up to and *including* the first wrong one (Spec-AUF, arXiv
    2607.01893).

    Without the failing slot training collapses (arXiv 2608.30135: tau 3.11 against 5.75).

    Args:
        right, valid (`torch.BoolTensor` of shape `(B, N, P)`).
    """
    wrong = (~right & valid).long()
    # less itself, so that the failing slot is kept
    wrong_before = wrong.cumsum(-1) - wrong
    return valid & (wrong_before == 0)


@torch.no_grad()
def slot_weights(
    objective: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    gamma: float | None = None,
) -> torch.Tensor:
    """Slot weights of an objective, straight from a drafter's logits. `head_loss` finds the same
    without all logits.

    Args:
        objective (`str`): a name in `OBJECTIVES`, of one branch.
        logits (`torch.Tensor` of shape `(B, N, K-1, V)`): of the drafted slots 1..K-1.
        labels (`torch.LongTensor` of shape `(B, N, K-1)`): token at anchor + k.
        valid (`torch.BoolTensor` of shape `(B, N, K-1)`): contiguous from slot 1.
        gamma (`float`, *optional*): decay length in slots, for objectives that decay.

    Returns:
        `torch.FloatTensor` of shape `(B, N, K-1)`: 0 outside the support; for AUF (arXiv
        2607.01893) 1 up to and including the first slot where `argmax(logits) != labels`.

    Raises:
        ValueError: unknown objective, or gamma where it does not apply.
    """
    gamma = resolve_gamma(objective, logits.shape[-2] + 1, gamma)
    log_p = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return OBJECTIVES[objective].weights(logits.argmax(-1) == labels, valid.bool(), gamma, log_p)


def row_terms(
    losses: torch.Tensor, weights: torch.Tensor, normalisation: str = "pooled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of the loss, row by row; they add up over rows, micro-batches and
    ranks before the one division.

    Args:
        losses (`torch.Tensor` of shape `(B, N, P)`): cross-entropy of each slot.
        weights (`torch.Tensor` of shape `(B, N, P)`): of an objective.
        normalisation (`str`): as in [`LossSpec`].

    Returns:
        Two tensors of shape `(B,)`. Without a valid slot both are 0, and the numerators still have
        their graph.
    """
    weights = weights.detach().to(losses.dtype)
    # where, not times: a slot of weight 0 may hold anything, even inf
    weighted = torch.where(weights > 0, losses, 0.0) * weights
    numerators, denominators = weighted.sum(-1), weights.sum(-1)  # (B, N)
    if normalisation == "per_block":
        # a block without a supported slot is 0 / tiny here, and no block in the denominator
        numerators = numerators / denominators.clamp(min=torch.finfo(losses.dtype).tiny)
        denominators = (denominators > 0).to(losses.dtype)
    return numerators.sum(-1), denominators.sum(-1)


def loss_terms(
    losses: torch.Tensor, weights: torch.Tensor, normalisation: str = "pooled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`row_terms`] summed over all rows: two scalars."""
    numerators, denominators = row_terms(losses, weights, normalisation)
    return numerators.sum(), denominators.sum()
