"""tau, alpha_k and the histogram of accepted tokens.

The single definition: trainer, evaluation and cards use it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..drafters.draft_length import Round

TAU_DEFINITION = (
    "tau = tokens committed / target verification passes, bonus token included (1.0 = no help, at"
    " most K); the prefill pass and its token are not counted"
)
NOT_MEASURED = "not measured"


@dataclass
class Acceptance:
    """What verification passes accepted (Spec-AUF, arXiv 2607.01893, diagnostics).

    Attributes:
        tau (`float`): tokens committed / verification passes, bonus included.
        accepted_per_pass (`float`): mean accepted drafted tokens A.
        alpha (`list[float]`): alpha_k = #{passes with A >= k} / #{passes that tested slot k},
            k = 1..K-1.
        histogram (`list[int]`): passes by A = 0..K-1.
        passes, tokens (`int`): verification passes, and tokens they committed.
    """

    tau: float
    accepted_per_pass: float
    alpha: list[float]
    histogram: list[int]
    passes: int
    tokens: int

    def to_dict(self) -> dict:
        """Plain values for JSON files; `None` where nothing was tested."""
        values = asdict(self)
        values["alpha"] = [_or_none(value) for value in self.alpha]
        values["tau"] = _or_none(self.tau)
        values["accepted_per_pass"] = _or_none(self.accepted_per_pass)
        return values


def _or_none(value: float) -> float | None:
    # JSON has no NaN.
    return None if math.isnan(value) else value


def _ratio(part: int, whole: int) -> float:
    # NaN and not 0: no number may look measured where nothing was.
    return part / whole if whole > 0 else math.nan


def summarize(rounds: Sequence[Round], block_size: int) -> Acceptance:
    """Sum rounds up.

    A pass that an end of sequence or the length limit cuts counts the tokens it emitted, and
    alpha_k leaves out the slots beyond the cut. With no pass at all tau is NaN.

    Args:
        rounds (`Sequence[Round]`): verification passes, of one generation or of many.
        block_size (`int`): K.
    """
    passes = len(rounds)
    tokens = sum(r.emitted for r in rounds)
    alpha = []
    for k in range(1, block_size):
        tested = sum(r.tested >= k for r in rounds)
        accepted = sum(r.accepted >= k for r in rounds)
        alpha.append(_ratio(accepted, tested))
    histogram = [0] * block_size
    for r in rounds:
        histogram[r.accepted] += 1
    return Acceptance(
        tau=_ratio(tokens, passes),
        accepted_per_pass=_ratio(sum(r.accepted for r in rounds), passes),
        alpha=alpha,
        histogram=histogram,
        passes=passes,
        tokens=tokens,
    )


def accepted_prefix(correct: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Length of the correct prefix of each block: the accepted tokens A, if the labels are what the
    target itself would choose.

    Args:
        correct, valid (`torch.BoolTensor` of shape `(..., K-1)`).

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    # The running product is 1 up to the first slot that is wrong or not valid, and 0 from there on.
    return (correct & valid).long().cumprod(-1).sum(-1)


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure in words, or that it was not measured."""
    if value is None:
        return NOT_MEASURED
    return f"{value:{form}}{unit}"
