"""tau, alpha_k and the histogram of accepted tokens: the single definition trainer, evaluation and
cards use."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..drafters.generation_block import Round

TAU_DEFINITION = (
    "tau = tokens committed / target verification passes, bonus token included (1.0 = no help, at"
    " most K); the prefill pass and its token are not counted"
)


@dataclass
class Acceptance:
    """What verification passes accepted (Spec-AUF, arXiv 2607.01893, diagnostics).

    Attributes:
        tau (`float`): tokens committed / verification passes, bonus included.
        accepted_per_pass (`float`): mean accepted drafted tokens A.
        alpha (`list[float]`): alpha_k = #{A >= k} / #{passes whose slot k was reached and judged},
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
        """Plain values for JSON files; what was never reached is `None`."""
        values = asdict(self)
        values["alpha"] = [None if math.isnan(a) else a for a in self.alpha]
        return {
            key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()
        }


def summarize(rounds: Sequence[Round], block_size: int) -> Acceptance:
    """Sum rounds up. A pass cut by end of sequence or length counts the tokens it emitted; alpha_k
    ignores slots beyond the cut. With no pass at all tau is NaN, never a number that looks
    measured."""
    passes, tokens = len(rounds), sum(r.emitted for r in rounds)
    alpha = []
    for k in range(1, block_size):
        tested = sum(r.tested >= k for r in rounds)
        alpha.append(sum(r.accepted >= k for r in rounds) / tested if tested else float("nan"))
    histogram = [sum(r.accepted == a for r in rounds) for a in range(block_size)]
    mean = sum(r.accepted for r in rounds) / passes if passes else float("nan")
    return Acceptance(
        tokens / passes if passes else float("nan"), mean, alpha, histogram, passes, tokens
    )


def accepted_prefix(correct: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Length of the correct prefix of each block, the accepted tokens A if `labels` were the
    target's own choice.

    Args:
        correct, valid (`torch.BoolTensor` of shape `(..., K-1)`).

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    return (correct & valid).long().cumprod(-1).sum(-1)


NOT_MEASURED = "not measured"


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure, or that it was not measured."""
    return NOT_MEASURED if value is None else f"{value:{form}}{unit}"
