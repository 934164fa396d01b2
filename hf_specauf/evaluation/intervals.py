"""How sure a figure is: bootstrap intervals over the prompts.

A figure here is a function of sums over the prompts (tau is tokens over passes). So a draw of the
prompts, with repeats, is a vector of counts, and all draws are one matrix product.

Two intervals, because they answer two questions:

    interval      where does the figure lie, were there prompts of this kind without end?
    another_set   where will the figure of as many other prompts lie? It is wider by a factor of
                  about 1.41, because those prompts are a draw too. Whoever measures again, or
                  compares with a figure of other prompts, needs this one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 2000
SEED = 0
SHARE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure and its intervals; `None` where nothing was measured, or too few prompts were.

    Attributes:
        value (`float`, *optional*): over all prompts.
        interval, another_set (`list[float]`, *optional*): the ends of 95 %, see above.
    """

    value: float | None
    interval: list[float] | None
    another_set: list[float] | None

    def to_dict(self) -> dict:
        """For JSON files."""
        return asdict(self)


def figure(columns: list[list[float]] | np.ndarray, of: Callable) -> Figure:
    """A figure of sums over the prompts, with its intervals. The same prompts give the same ones.

    Args:
        columns (of shape `(prompts, C)`): what is summed of each prompt.
        of (`Callable`): sums (..., C) -> figures (...). NaN where there is none.
    """
    columns = np.asarray(columns, dtype=float)
    count = len(columns)
    if count == 0:
        return Figure(None, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of(columns.sum(0)))
        if not np.isfinite(value):
            return Figure(None, None, None)
        if count == 1:
            return Figure(value, None, None)
        random = np.random.default_rng(SEED)
        draws = random.multinomial(count, [1 / count] * count, size=(2, DRAWS))
        one, other = of(draws @ columns)  # (DRAWS,) each
    # A draw has one prompt fewer to vary by than there are.
    wider = np.sqrt(count / (count - 1))
    return Figure(value, _ends(value, wider * (one - value)), _ends(value, wider * (one - other)))


def _ends(value: float, deviations: np.ndarray) -> list[float] | None:
    """A figure with the ends of the middle 95 % of its deviations."""
    deviations = deviations[np.isfinite(deviations)]
    if not len(deviations):
        return None
    ends = np.quantile(deviations, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return [float(value + end) for end in ends]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second: tokens over passes."""
    return sums[..., 0] / sums[..., 1]


def ratio_of_ratios(sums: np.ndarray) -> np.ndarray:
    """(1st over 2nd) over (3rd over 4th): how much faster one way is than another."""
    return ratio(sums) / ratio(sums[..., 2:])


def difference_of_ratios(sums: np.ndarray) -> np.ndarray:
    """1st over 2nd, less 3rd over 4th: how much one tau is above another."""
    return ratio(sums) - ratio(sums[..., 2:])
